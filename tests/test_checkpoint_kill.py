"""A save that is killed, or that the disk refuses, leaves the old checkpoint or the new."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from any4_jax import checkpoint
from any4_jax.checkpoint.quiet import reported_once

KILL_SERVER = """
import json, os, resource, shutil, signal, sys
import numpy as np
import jax, orbax.checkpoint, tensorstore
from any4_jax import checkpoint

def save(root, version):
    arrays = {f"a.{i}/codes": np.full((40, 50), version * 10 + i, np.int32) for i in range(3)}
    checkpoint.write(root, arrays, {"version": version}, {"tokenizer.json": b"%d" % version})

def job(root, version, point, call, after):
    signal.alarm(60)
    counts = {}
    def wrap(name):
        module = {"os": os, "shutil": shutil}[name.split(".")[0]]
        plain = getattr(module, name.split(".")[1])
        def counted(*args, **kwargs):
            # What comes after the rename is counted anew: Orbax's files, and so the syncs before it, vary in number.
            key = name + " after os.replace" if name == "os.fsync" and "os.replace" in counts else name
            counts[key] = counts.get(key, 0) + 1
            last = key == point and counts[key] == call
            if last and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = plain(*args, **kwargs)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        setattr(module, name.split(".")[1], counted)
    if point == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
    for name in ("os.fsync", "os.replace", "shutil.rmtree"):
        wrap(name)
    jax.devices()
    print("started", os.getpid(), flush=True)
    try:
        save(root, version)
    except OSError as error:
        counts["error"] = str(error)
    print(json.dumps(counts), flush=True)
    os._exit(0)

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        job(**json.loads(line))
    os.waitpid(pid, 0)
    print("ended", flush=True)
"""


class KillServer:
    """A process with everything imported and no thread started, which forks one save after another."""

    def __init__(self, root: Path):
        self.root, self.version = root, 0
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parent.parent),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", KILL_SERVER],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def save(self, point=None, call=0, after=False, delay=None):
        """Save the next version, killed at a call or after a delay; (counts or None, seconds it ran)."""
        self.version += 1
        order = {
            "root": str(self.root),
            "version": self.version,
            "point": point,
            "call": call,
            "after": after,
        }
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        start_line = self.process.stdout.readline().split()
        begun = time.monotonic()
        if delay is not None:
            time.sleep(delay)
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(start_line[1]), 9)
        lines = list(iter(self.process.stdout.readline, "ended\n"))
        return (json.loads(lines[0]) if lines else None), time.monotonic() - begun

    def loaded_version(self) -> int:
        """The version found, after checking that all of it is of that version."""
        arrays, content, files = checkpoint.read(self.root)
        version = content["version"]
        assert files == {"tokenizer.json": b"%d" % version}
        wanted = {f"a.{i}/codes": np.full((40, 50), version * 10 + i, np.int32) for i in range(3)}
        assert set(arrays) == set(wanted)
        for name, array in wanted.items():
            np.testing.assert_array_equal(np.asarray(arrays[name]), array, strict=True)
        return version


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    server = KillServer(tmp_path_factory.mktemp("kill") / "ckpt")
    server.counts, server.seconds = server.save()
    yield server
    server.process.stdin.close()
    server.process.wait(timeout=30)


def test_kill_at_chosen_calls_leaves_the_old_or_the_new(killed):
    replaces, syncs = killed.counts["os.replace"], killed.counts["os.fsync"]
    # The last syncs before the rename: any4.json's new text, its directory. After it: the directory again, its parent.
    old = [("os.fsync", 1, False), ("os.fsync", syncs // 2, False), ("os.fsync", syncs - 1, False)]
    old += [("os.fsync", syncs, True), ("os.replace", replaces, False)]
    new = [("os.replace", replaces, True), ("os.fsync after os.replace", 1, False), ("shutil.rmtree", 1, False)]
    for points, is_new in ((old, False), (new, True)):
        for point, call, after in points:
            before = killed.loaded_version()
            counts, _ = killed.save(point, call, after)
            if counts is not None:
                # One file fewer than in the first save: this one ended.
                assert point == "os.fsync" and syncs - 1 <= counts[point] < call
            expected = killed.version if is_new or counts is not None else before
            assert killed.loaded_version() == expected, (point, call, after)


def test_kill_at_twenty_moments_leaves_the_old_or_the_new(killed):
    _, seconds = killed.save()
    outcomes = []
    for moment in range(20):
        before = killed.loaded_version()
        killed.save(delay=seconds * moment / 18)
        found = killed.loaded_version()
        assert found in (before, killed.version)
        outcomes.append(found == killed.version)
    assert False in outcomes
    killed.save()
    assert killed.loaded_version() == killed.version
    assert sorted(path.name.split("-")[0] for path in killed.root.iterdir()) == ["any4.json", "data"]


FULL = """
import resource, signal, sys
import numpy as np
import jax
from any4_jax import checkpoint

jax.devices()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
rng = np.random.default_rng(0)
arrays = {f"a{i}": rng.integers(0, 256, (1000, 1000), np.uint8) for i in range(8)}
for _ in range(3):
    try:
        checkpoint.write(sys.argv[1], arrays, {}, {})
    except OSError as error:
        print(error)
"""


def test_a_full_disk_prints_nothing_but_our_sentence_and_leaves_nothing(tmp_path):
    root = tmp_path / "c"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", FULL, str(root)], env=environment, capture_output=True, text=True)
    said = f"can't write checkpoint {root} (File too large); free some space there or pass another directory"
    assert done.stdout.splitlines() == [said] * 3
    assert done.stderr == ""
    assert not root.exists()


def test_a_disk_that_takes_no_more_is_one_sentence(killed):
    before = killed.loaded_version()
    counts, _ = killed.save("full")
    assert counts["error"].startswith(f"can't write checkpoint {killed.root} (")
    assert "\n" not in counts["error"]
    assert killed.loaded_version() == before
    assert len(list(killed.root.iterdir())) == 2


def test_what_asyncio_says_late_of_a_failed_write_is_dropped(tmp_path, caplog):
    with pytest.raises(OSError, match="full"), reported_once(tmp_path):
        raise OSError("full")
    for text in (f"can't write {tmp_path}/arrays", "another"):
        logging.getLogger("asyncio").error("Future exception was never retrieved", exc_info=ValueError(text))
    assert [str(record.exc_info[1]) for record in caplog.records] == ["another"]
