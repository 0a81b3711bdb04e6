"""kill -9 at twenty points of `any4 quantize`: the rerun finishes, with equal hashes, and redoes nothing."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

# Forks one command after another from a process that has everything imported and no thread started.
SERVER = """
import json, os, signal, sys, threading
import numpy as np, orbax.checkpoint
from any4_jax.checkpoint import partial
from any4_jax.cli import commands, main
from any4_jax.data import bundled
from any4_jax.methods import matrices
from any4_jax.models import read_config
from any4_jax.models.families import family_of_config

with bundled("stories260k") as folder:  # traced once, for all commands; no device is used
    config = read_config(json.loads((folder / "config.json").read_text()))
family_of_config(config).abstract(config, np.dtype("float32"))

def job(command, log, point):
    lock, events = threading.Lock(), [0]
    compute, keep = matrices.quantize_matrix, os.replace
    def event():
        with lock:
            events[0] += 1
            if events[0] == point:
                os.kill(os.getpid(), signal.SIGKILL)
    def computing(layer, method, stats, path):
        event()
        with open(log, "a") as file:
            file.write(path + chr(10))
        return compute(layer, method, stats, path)
    def keeping(source, target):
        event()
        keep(source, target)
        event()
    matrices.quantize_matrix, os.replace = computing, keeping
    signal.alarm(120)
    return main(command)

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        os.dup2(2, 1)
        os._exit(job(**json.loads(line)))
    print(os.waitpid(pid, 0)[1], flush=True)
"""
LINEARS = 35
COMMAND = ["--method", "int", "--group-size", "32", "--calibrate", "none"]


def test_a_run_that_is_killed_twenty_times_redoes_nothing(tmp_path: Path) -> None:
    out, whole, log = tmp_path / "out", tmp_path / "whole", tmp_path / "log"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parent.parent)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, "-c", SERVER], env=environment, **pipes)

    def run(target: Path, point: int) -> tuple[int, int]:
        """(how the command ended, how many linears it computed)."""
        log.write_text("")
        order = {"command": ["quantize", "tiny", str(target), *COMMAND], "log": str(log), "point": point}
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline()), len(log.read_text().split())

    def kept() -> int:
        return len(list((tmp_path / "out.partial").glob("unit-*.safetensors")))

    rng = random.Random(15)
    for _ in range(20):
        before = kept()
        ended, computed = run(out, rng.randint(1, 4))
        assert ended == 9 and not out.exists()
        # Two threads: what the other one had at hand when the process was killed isn't finished.
        assert before <= kept() <= before + computed and computed - (kept() - before) <= 2
    left = kept()
    assert 0 < left < LINEARS
    assert run(out, 0) == (0, LINEARS - left)
    assert run(whole, 0) == (0, LINEARS)
    _, said = server.communicate()
    assert f"resuming: {left} of {LINEARS} layers were done before" in said
    arrays = [json.loads((folder / "any4.json").read_text())["arrays"] for folder in (out, whole)]
    assert arrays[0] == arrays[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "out", "whole"]
