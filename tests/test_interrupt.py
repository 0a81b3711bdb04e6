"""Ctrl-C in real processes: exit code 130, one line, nothing half-written, and a rerun that ends like a first run."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from any4_jax.cli import interrupts
from any4_jax.cli.output import progress

REPOSITORY = Path(__file__).resolve().parent.parent

# Everything is imported once; each command is a fork, which sets the process up and ends it as `any4` does. Some models
# that it can be told to open deal with Ctrl-C in ways of their own.
SERVER = """
import ctypes, json, os, signal, sys, time
import numpy as np, orbax.checkpoint
from any4_jax.cli import commands, generate, main
from any4_jax.data import bundled
from any4_jax.models import Tokenizer, read_config
from any4_jax.models.families import family_of_config

with bundled("stories260k") as folder:  # traced once, for all commands; no device is used
    config = read_config(json.loads((folder / "config.json").read_text()))
family_of_config(config).abstract(config, np.dtype("float32"))

def press():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)

def swallowed():
    ctypes.CFUNCTYPE(None)(press)()
    time.sleep(60)

def disguised():
    try:
        press()
    except KeyboardInterrupt:
        raise RuntimeError("INTERNAL: a callback failed") from None

def twice():
    try:
        press()
    finally:
        press()
        time.sleep(60)

OPEN = {f.__name__: f for f in (swallowed, disguised, twice)}
real = generate.open_model
generate.open_model = lambda name, inputs: OPEN[name]() if name in OPEN else real(name, inputs)
Tokenizer.chat_template = None
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if pid == 0:
        for number, name in enumerate(("out", "err"), 1):
            os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = ["any4", *order["argv"]]
        sys.exit(main())
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Commands:
    """Runs commands one after the other, interrupted or not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline() == "ready\n"

    def run(self, *argv: object, after: float | None = None) -> tuple[int, str, list[str]]:
        """Exit code, stdout, lines of stderr; `after` is in seconds from the start to Ctrl-C."""
        files = {name: str(self.folder / name) for name in ("out", "err")}
        self.process.stdin.write(json.dumps({"argv": [str(word) for word in argv]} | files) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        if after is not None:
            time.sleep(after)
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.kill(pid, signal.SIGINT)
        code = int(self.process.stdout.readline())
        out, err = (Path(path).read_text() for path in files.values())
        return code, out, err.splitlines()


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    server = Commands(tmp_path_factory.mktemp("streams"))
    yield server
    server.process.stdin.close()
    server.process.wait(timeout=60)


def arrays(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "any4.json").read_text())["arrays"]


def test_quantize_at_random_moments(commands, tmp_path) -> None:
    draws = random.Random(7)
    work = ["--method", "int", "--group-size", "32", "--calibrate", "none", "--rules", r".*mlp.*=none"]
    begin = time.monotonic()
    assert commands.run("quantize", "tiny", tmp_path / "whole", *work)[0] == 0
    seconds = time.monotonic() - begin
    out = tmp_path / "out"
    interrupted = 0
    for _ in range(6):
        kept = out.is_dir()
        code, _, err = commands.run("quantize", "tiny", out, *work, after=draws.uniform(0, seconds))
        assert code in (0, 130), err
        said = [line for line in err if not line.startswith(("to quantize: ", "resuming: ", "quantize: "))]
        if code == 130:
            interrupted += 1
            continues = (tmp_path / "out.partial").is_dir()
            (line,) = said
            assert line.startswith(
                "any4: interrupted; run it again to continue" if continues else "any4: interrupted; nothing"
            )
            # The save was the last thing: either it was whole, or there is what was there before.
            assert out.is_dir() or not kept
        else:
            assert said == []
        if out.is_dir():
            assert arrays(out) == arrays(tmp_path / "whole")
    assert interrupted >= 3
    assert commands.run("quantize", "tiny", out, *work)[0] == 0
    assert arrays(out) == arrays(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    assert sorted(path.name.split("-")[0] for path in out.iterdir()) == ["any4.json", "data"]


def test_generate_at_random_moments(commands) -> None:
    draws, work = random.Random(8), ["generate", "tiny", "--prompt", "Once", "--max-new-tokens", "300"]
    begin = time.monotonic()
    code, whole, _ = commands.run(*work)
    seconds = time.monotonic() - begin
    assert code == 0
    interrupted = 0
    for _ in range(4):
        code, out, err = commands.run(*work, after=draws.uniform(0, seconds))
        if code == 130:
            interrupted += 1
            # The rate of a text that was whole may stand before it.
            assert err[-1] == "any4: interrupted; nothing was kept, so running it again begins anew" and len(err) <= 2
            assert whole.startswith(out.removesuffix("\n"))
        else:
            assert (code, out) == (0, whole)
    assert interrupted >= 1


@pytest.mark.parametrize(
    ("model", "words"),
    [("swallowed", "begins anew"), ("disguised", "begins anew"), ("twice", "at once")],
)
def test_what_becomes_of_an_interrupt(model, words, commands) -> None:
    begin = time.monotonic()
    code, out, err = commands.run("generate", model, "--prompt", "x")
    assert (code, out, len(err)) == (130, "", 1), err
    assert err[0].startswith("any4: interrupted; ") and words in err[0]
    assert time.monotonic() - begin < 50


def test_a_step_raises_what_was_swallowed(monkeypatch) -> None:
    with progress("work", "step") as bar:
        bar(1, 2)
        monkeypatch.setattr(interrupts._State, "came", True)
        with pytest.raises(KeyboardInterrupt):
            bar(2, 2)


def test_during_imports() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "any4_jax", "--version"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "jaxlib" not in maps.read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines() == ["any4: interrupted; nothing was kept, so running it again begins anew"]


def test_another_program_keeps_its_interrupts() -> None:
    code = "import signal, any4_jax; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True
    )
    assert done.stdout == "True\n", done.stderr
