"""The checkpoint store: exact round trips, what it refuses to write, memory, device topology."""

import fcntl
import os
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from new_process import run_python
from stored_example import CONTENT, FILES, assert_equal, copied_checkpoint, data_directory, example, saved_checkpoint  # noqa: F401

from any4_jax import checkpoint
from any4_jax.checkpoint import arrays as stored_arrays


def test_round_trip_is_exact(saved):
    arrays, content, files = checkpoint.read(saved)
    assert_equal(arrays, example())
    assert all(isinstance(array, jax.Array) for array in arrays.values())
    assert content == CONTENT
    assert files == FILES


def test_jax_arrays_and_arrays_of_odd_layout_round_trip(tmp_path):
    wide = np.random.default_rng(1).standard_normal((300, 4000), np.float32)
    given = {"jax": jnp.asarray(wide, jnp.bfloat16), "transposed": wide.T, "strided": wide[::3, ::-7]}
    checkpoint.write(tmp_path / "c", given, {})
    assert_equal(checkpoint.read(tmp_path / "c")[0], given)


def test_arrays_of_several_blocks_and_chunks(tmp_path, monkeypatch):
    for name in ("BLOCK_BYTES", "_CHUNK_BYTES", "_BAND_BYTES"):
        monkeypatch.setattr(stored_arrays, name, 4096)
    rng = np.random.default_rng(2)
    given = {"tall": rng.integers(0, 256, (5000, 3), np.uint8), "flat": rng.standard_normal(9999, np.float32)}
    given |= {"wide": rng.integers(0, 256, (3, 50000), np.uint8), "cube": rng.standard_normal((9, 10, 111))}
    given["cube"] = given["cube"].astype(np.float16)
    checkpoint.write(tmp_path / "c", given, {})
    assert len(checkpoint.read_manifest(tmp_path / "c").arrays["tall"].sha256) == 4
    assert_equal(checkpoint.read(tmp_path / "c")[0], given)


def test_nothing_at_all_round_trips(tmp_path):
    checkpoint.write(tmp_path / "c", {}, {})
    assert checkpoint.read(tmp_path / "c") == ({}, {}, {})


def test_plain_orbax_reads_the_arrays(saved):
    import orbax.checkpoint as ocp

    found = ocp.PyTreeCheckpointer().restore(data_directory(saved) / "arrays")
    wanted = {name: array for name, array in example().items() if array.size}
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        values = np.asarray(found[name]).astype(np.float32)
        assert np.array_equal(values, array.astype(np.float32), equal_nan=True), name


def test_paths_select_arrays(saved):
    name = "layers.0.q_proj/uint4/matrix"
    assert_equal(checkpoint.read(saved, paths=[name])[0], {name: example()[name]})
    assert checkpoint.read(saved, paths=[])[0] == {}
    with pytest.raises(ValueError, match="has no array 'nope'"):
        checkpoint.read(saved, paths=[name, "nope"])


def test_manifest_is_readable_without_the_arrays(copied):
    shutil.rmtree(data_directory(copied))
    manifest = checkpoint.read_manifest(copied)
    assert manifest.content == CONTENT
    assert manifest.arrays["layers.0.q_proj/bfloat16/matrix"].shape == (5, 3)
    assert manifest.library["jax"] == jax.__version__


def test_save_replaces_and_cleans_leftovers_but_load_does_not(copied):
    leftovers = [copied / "data-0123456789ab", copied / "any4.json.0123456789ab.tmp"]
    leftovers[0].mkdir()
    leftovers[1].write_text("half")
    (copied / "README").write_text("the user's own")
    checkpoint.read(copied)
    assert all(path.exists() for path in leftovers)
    checkpoint.write(copied, {"w": jnp.arange(3)}, {"version": 2})
    arrays, content, files = checkpoint.read(copied)
    assert arrays["w"].tolist() == [0, 1, 2]
    assert (content, files) == ({"version": 2}, {})
    assert {path.name for path in copied.iterdir()} == {"any4.json", "README", data_directory(copied).name}


def test_leftovers_of_a_killed_first_save_are_no_obstacle(tmp_path):
    (tmp_path / "c" / "data-0123456789ab").mkdir(parents=True)
    checkpoint.write(tmp_path / "c", {}, {})
    assert len(list((tmp_path / "c").iterdir())) == 2
    assert data_directory(tmp_path / "c").name == checkpoint.read_manifest(tmp_path / "c").data


REFUSED_CALLS = [
    ({"arrays": {"../up": np.zeros(1)}}, ValueError, "array name '../up'"),
    ({"arrays": {"a//b": np.zeros(1)}}, ValueError, "array name 'a//b'"),
    ({"arrays": {"": np.zeros(1)}}, ValueError, "array name ''"),
    ({"arrays": {"a": np.zeros(1)}}, ValueError, "'a' has dtype float64"),
    ({"arrays": {"a": [1, 2]}}, TypeError, "'a' is a list"),
    ({"arrays": {"a": jax.random.key(0)}}, ValueError, "'a' has dtype key"),
    ({"files": {"/etc/passwd": b""}}, ValueError, "file name '/etc/passwd'"),
    ({"manifest": {"a": float("nan")}}, ValueError, "not plain JSON"),
    ({"manifest": {"a": np.float32(1)}}, ValueError, "not plain JSON"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSED_CALLS, ids=[row[2] for row in REFUSED_CALLS])
def test_what_cannot_be_stored_is_refused_and_makes_nothing(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        checkpoint.write(tmp_path / "c", **({"arrays": {}, "manifest": {}} | change))
    assert not (tmp_path / "c").exists()


def test_foreign_directories_and_missing_parents_are_refused(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    for name, error, message in (
        ("home", FileExistsError, "home is not empty, and holds no any4_jax checkpoint"),
        ("file", FileExistsError, "file is a file"),
        ("none/ckpt", FileNotFoundError, "none is not a directory"),
        ("file/ckpt", FileNotFoundError, "file is not a directory"),
    ):
        with pytest.raises(error, match=message):
            checkpoint.write(tmp_path / name, {}, {})
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.tex"]
    for name in ("home", "none", "file"):
        with pytest.raises(FileNotFoundError, match=f"{name} holds no any4.json"):
            checkpoint.read(tmp_path / name)


def test_a_second_save_at_the_same_time_is_refused(copied):
    handle = os.open(copied, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(BlockingIOError, match="another save .* is running"):
        checkpoint.write(copied, {}, {})
    os.close(handle)
    assert checkpoint.read(copied)[1] == CONTENT


@pytest.mark.parametrize("fails", ["os.fsync", "os.replace", "shutil.disk_usage"])
def test_a_failed_save_changes_nothing(copied, tmp_path, monkeypatch, fails):
    module, name = fails.split(".")

    def refuse(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules[module], name, refuse)
    for target in (copied, tmp_path / "new"):
        with pytest.raises(OSError, match=rf"can't write checkpoint {target} \(No space left"):
            checkpoint.write(target, {"w": np.zeros(3, np.float32)}, {}, {"a": b"b"})
    monkeypatch.undo()
    assert not (tmp_path / "new").exists()
    assert checkpoint.read(copied)[1] == CONTENT
    assert len(list(copied.iterdir())) == 2


def test_other_device_topologies(saved, tmp_path):
    """One device's checkpoint loads on four and on a mesh of two; a sharded one of four loads on one."""
    script = """
        import sys
        import jax, numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        from any4_jax import checkpoint

        mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
        split, one = NamedSharding(mesh, P(None, "x")), jax.sharding.SingleDeviceSharding(jax.devices()[3])
        name = "layers.0.q_proj/int4/stack"
        whole = checkpoint.read(sys.argv[1])[0]
        assert {d for a in whole.values() for d in a.devices()} == {jax.devices()[0]}
        rule = lambda name, struct: one if struct.shape == () else None
        assert checkpoint.read(sys.argv[1], sharding=rule)[0][name.replace("stack", "scalar")].devices() == {
            jax.devices()[3]
        }
        wide = np.arange(24, dtype=np.int32).reshape(3, 8)
        four = NamedSharding(Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y")), P(None, "x"))
        checkpoint.write(sys.argv[2], {"w": jax.device_put(wide, four)}, {})
        back = checkpoint.read(sys.argv[2], sharding=split)[0]["w"]
        assert back.sharding == split and {s.data.shape for s in back.addressable_shards} == {(3, 4)}
        assert np.array_equal(back, wide)
        try:
            checkpoint.read(sys.argv[1], sharding=split, paths=[name])
        except ValueError as error:
            print(error)
    """
    printed = run_python(script, saved, tmp_path / "four", devices=4)
    assert "array 'layers.0.q_proj/int4/stack' of shape [2, 1, 7] doesn't fit" in printed
    loaded = checkpoint.read(tmp_path / "four")[0]["w"]
    assert np.array_equal(loaded, np.arange(24).reshape(3, 8))
    assert loaded.devices() == {jax.devices()[0]}


def test_memory_of_a_load_stays_near_the_arrays(tmp_path):
    """Incompressible bytes, one array of half the checkpoint: nothing may hold an array twice."""
    rng = np.random.default_rng(4)
    sizes = {"embed": (12_000, 10_000)} | {f"layers.{i}/codes": (2000, 1000) for i in range(90)}
    checkpoint.write(tmp_path / "c", {n: rng.integers(0, 256, s, np.uint8) for n, s in sizes.items()}, {})
    script = """
        import sys
        import jax, numpy as np
        from any4_jax import checkpoint

        def megabytes(field):
            (line,) = [line for line in open("/proc/self/status") if line.startswith(field + ":")]
            return int(line.split()[1]) / 1024

        jax.block_until_ready(jax.device_put(np.zeros(3)))
        idle = megabytes("VmRSS")
        arrays = checkpoint.read(sys.argv[1])[0]
        print((megabytes("VmHWM") - idle) / (sum(a.nbytes for a in arrays.values()) / 2**20))
    """
    assert float(run_python(script, tmp_path / "c")) <= 1.3
