"""Damaged and forged checkpoints: each is refused by the name of what is wrong."""

import json
import os
import signal

import numpy as np
import pytest
from stored_example import assert_equal, copied_checkpoint, data_directory, example, saved_checkpoint  # noqa: F401

from any4_jax import checkpoint
from any4_jax.checkpoint import manifest as manifests


def test_one_flipped_byte_in_any_file_is_refused_by_name(copied):
    rng = np.random.default_rng(3)
    files = [path for path in copied.rglob("*") if path.is_file()]
    assert len(files) > 8
    for file in files:
        raw = bytearray(file.read_bytes())
        for _ in range(8 if file.name == "any4.json" else 1):
            position, bit = (int(rng.integers(max(1, len(raw)))), 1 << int(rng.integers(8)))
            damaged = bytearray(raw) if raw else bytearray(1)
            damaged[position] ^= bit
            file.write_bytes(damaged)
            with pytest.raises(ValueError) as caught:
                checkpoint.read(copied)
            assert str(file.relative_to(copied)) in str(caught.value)
            assert str(copied) in str(caught.value)
            assert "\n" not in str(caught.value)
        file.write_bytes(raw)
    assert_equal(checkpoint.read(copied)[0], example())


@pytest.mark.parametrize("name", ["files/tokenizer.json", "arrays/manifest.ocdbt"])
def test_truncated_missing_and_linked_files_are_refused_by_name(copied, tmp_path, name):
    file = data_directory(copied) / name
    raw = file.read_bytes()
    file.write_bytes(raw[:-1])
    with pytest.raises(ValueError, match=f"{name} has {len(raw) - 1} bytes and needs {len(raw)}"):
        checkpoint.read(copied)
    file.unlink()
    with pytest.raises(ValueError, match=f"{name} can't be read"):
        checkpoint.read(copied)
    (tmp_path / "outside").write_bytes(raw)
    file.symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=f"{name} is a link out of it"):
        checkpoint.read(copied)


def matrix_entry(**change):
    def edit(body):
        body["arrays"]["layers.0.q_proj/uint8/matrix"] |= change

    return edit


def put(key, value):
    return lambda body: body.__setitem__(key, value)


def nested(depth):
    return {"a": nested(depth - 1)} if depth else {}


FILE_ENTRY = {"size": 0, "sha256": "0" * 64}
ARRAY_ENTRY = {"shape": [], "dtype": "bool", "sha256": []}
FORGED = {
    "newer": (put("schema", 3), r"newer any4_jax \(schema 3\); this one reads schemas up to 2, so upgrade"),
    "schema 0": (put("schema", 0), "is damaged: it has schema 0"),
    "schema true": (put("schema", True), "no integer"),
    "extra key": (put("extra", 1), "is damaged: it has schema 2 and the keys .*'extra'"),
    "data outside": (put("data", "../data-0123456789ab"), "names the data directory '../data"),
    "file outside": (put("files", {"../x": FILE_ENTRY}), "could leave the checkpoint: the path '../x'"),
    "absolute file": (put("files", {"/x": FILE_ENTRY}), "could leave the checkpoint: the path '/x'"),
    "array outside": (put("arrays", {"a/../../b": ARRAY_ENTRY}), "names an array: the name"),
    "file size": (
        put("files", {"x": FILE_ENTRY | {"size": -1}}),
        "files.x.size is -1, and greater than or equal to 0 is needed",
    ),
    "array shape": (
        matrix_entry(shape=[-1, 3]),
        r"uint8/matrix\.shape\.0 is -1, and greater than or equal to 0 is needed",
    ),
    "other shape": (matrix_entry(shape=[3, 5]), r"uint8 \[5, 3\] on disk but uint8 \[3, 5\]"),
    "huge shape": (matrix_entry(shape=[1 << 40, 1 << 20]), r"uint8 \[5, 3\] on disk"),
    "other dtype": (matrix_entry(dtype="int8"), r"uint8 \[5, 3\] on disk but int8 \[5, 3\]"),
    "cast dtype": (matrix_entry(dtype="float32"), r"uint8 \[5, 3\] on disk but float32 \[5, 3\]"),
    "unknown dtype": (matrix_entry(dtype="posit8"), "dtype is 'posit8', and 'bool', .* is needed"),
    "array hash": (
        matrix_entry(sha256=["0" * 64]),
        "'layers.0.q_proj/uint8/matrix' doesn't match its sha256",
    ),
    "hash missing": (matrix_entry(sha256=[]), "'layers.0.q_proj/uint8/matrix' doesn't match its sha256"),
    "array missing": (
        lambda body: body["arrays"].update(ghost=body["arrays"]["layers.0.q_proj/uint8/matrix"]),
        "array 'ghost' is not readable",
    ),
    "array keys": (matrix_entry(order="C"), r"uint8/matrix\.order is unknown"),
    "array rank": (matrix_entry(shape=[1] * 65), "shape"),
    "deep": (put("content", nested(200)), "nested more than 150 deep"),
    "content": (put("content", []), r"content is \[\], and an object is needed"),
}


@pytest.mark.parametrize(("edit", "message"), FORGED.values(), ids=FORGED)
def test_forged_manifests_are_refused(copied, edit, message):
    """Each has a right digest of itself, so only the check of its fields or of the arrays can refuse it."""
    body = json.loads((copied / "any4.json").read_bytes())
    del body["sha256"]
    edit(body)
    body["sha256"] = manifests._digest(body)
    (copied / "any4.json").write_bytes(manifests._text(body))
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.read(copied)
    assert str(copied) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[1]", b"{}", b'{"schema": "1"}', b"\xff\xfe", b"[" * 100_000], ids=range(7)
)
def test_what_is_no_manifest_is_refused(copied, raw):
    (copied / "any4.json").write_bytes(raw)
    with pytest.raises(ValueError, match="any4.json is not"):
        checkpoint.read_manifest(copied)


def pipe(file):
    os.mkfifo(file)


def loop(file):
    file.symlink_to(file.name)


def folder(file):
    file.mkdir()


def device(file):
    file.symlink_to("/dev/zero")


IRREGULAR = (
    (pipe, "is a named pipe"),
    (loop, "is a link to itself"),
    (folder, "is a folder"),
    (device, "is a link out"),
)


@pytest.mark.parametrize(
    "name", ["any4.json", "data/files/tokenizer.json", "data/arrays/manifest.ocdbt", "data/arrays/x"]
)
@pytest.mark.parametrize(("make", "said"), IRREGULAR, ids=[make.__name__ for make, _ in IRREGULAR])
def test_only_regular_files_are_read(copied, name, make, said):
    """Nothing waits for a pipe or reads a device without end: the alarm would end the whole run of tests."""
    if name.endswith("x") and make is folder:
        pytest.skip("an empty folder holds nothing that could be read")
    file = copied / name.replace("data", data_directory(copied).name)
    file.unlink(missing_ok=True)
    make(file)
    signal.alarm(20)
    with pytest.raises(ValueError, match=f"{file.name} {said}.*; put the file") as caught:
        checkpoint.read(copied)
    assert "\n" not in str(caught.value)
    signal.alarm(0)
