"""The reader of safetensors: indexes, shards, headers and types that it refuses."""

import json
import os
import socket
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from any4_jax.models.safetensors_reader import INDEX, SINGLE, SafetensorsFolder

SHARD = "s.safetensors"
A = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


def file_of(header: Any, data: bytes = bytes(16)) -> bytes:
    """A file, of a header as an object or as text."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + data


def folder_of(folder: Path, index: Any, shards: tuple[str, ...] = (SHARD,)) -> Path:
    """A folder of shards with the tensor a, and an index as an object or as text."""
    for shard in shards:
        (folder / shard).write_bytes(file_of({"a": A}))
    (folder / INDEX).write_text(index if isinstance(index, str) else json.dumps(index))
    return folder


def test_types_that_numpy_has_are_read_as_stored(tmp_path: Path) -> None:
    tensors = {
        np.dtype(dtype).name: np.arange(4).astype(dtype)
        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int8, np.uint8, np.int64, np.bool_)
    }
    save_file(tensors, tmp_path / SINGLE)
    got = SafetensorsFolder(tmp_path)
    assert got.keys() == tensors.keys()
    assert all(got[name].dtype == tensors[name].dtype for name in tensors)
    assert all(np.array_equal(got[name], tensors[name]) for name in tensors)


INDEXES = {
    "text": ("nonsense", "is not JSON"),
    "list": ([], "holds a list, and an object is needed"),
    "null": ("null", "holds a NoneType"),
    "number": ("5", "holds a int"),
    "nesting": ("[" * 100_000, "is nested too deeply"),
    "no map": ({"metadata": {}}, "lacks weight_map"),
    "map null": ({"weight_map": None}, "weight_map is None, and .* is needed"),
    "map list": ({"weight_map": ["a"]}, r"weight_map is \['a'\]"),
    "map text": ({"weight_map": "a"}, "weight_map is 'a'"),
    "shard null": ({"weight_map": {"a": None}}, "weight_map.a is None, and a valid string is needed"),
    "shard number": ({"weight_map": {"a": 5}}, "weight_map.a is 5, and a valid string"),
    "shard list": ({"weight_map": {"a": [SHARD]}}, "weight_map.a is .*, and a valid string"),
    "shard object": ({"weight_map": {"a": {}}}, "weight_map.a is {}, and a valid string"),
    "empty": ({"weight_map": {"a": ""}}, "names '', and file names without a folder"),
    "here": ({"weight_map": {"a": "."}}, "names '.', and file names without a folder"),
    "above": ({"weight_map": {"a": ".."}}, "names '..', and file names without a folder"),
    "outside": ({"weight_map": {"a": "../s.safetensors"}}, "file names without a folder"),
    "absolute": ({"weight_map": {"a": "/s.safetensors"}}, "file names without a folder"),
    "below": ({"weight_map": {"a": "b/s.safetensors"}}, "file names without a folder"),
    "null byte": ({"weight_map": {"a": "s\0.safetensors"}}, r"names 's\\x00.safetensors'"),
    "pickle": ({"weight_map": {"a": "pytorch_model.bin"}}, "names 'pytorch_model.bin', and names of .safetensors"),
    "missing": ({"weight_map": {"a": "t.safetensors"}}, "lacks t.safetensors of the 1 shards"),
    "long": ({"weight_map": {"a": "t" * 5000 + ".safetensors"}}, "t.safetensors"),
    "surrogate": ('{"weight_map": {"a": "\\ud800.safetensors"}}', "is needed"),
    "absent": ({"weight_map": {"a": SHARD, "b": SHARD}}, "s.safetensors lacks tensor 'b', which"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_indexes(tmp_path: Path, case: str) -> None:
    index, words = INDEXES[case]
    folder_of(tmp_path, index)
    with pytest.raises((ValueError, OSError), match=words) as caught:
        SafetensorsFolder(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    index = {"weight_map": {"a": SHARD, "b": "t.safetensors"}}
    with pytest.raises(ValueError, match="tensor 'a' is both in .*s.safetensors and in .*t.safetensors"):
        SafetensorsFolder(folder_of(tmp_path, index, (SHARD, "t.safetensors")))


B = {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}
HEADERS = {
    "empty": (b"", "of 0 bytes is damaged or truncated"),
    "length": (struct.pack("<Q", 2**60) + b"{}", "is damaged or truncated"),
    "longer than the file": (struct.pack("<Q", 2**20) + b"{}", "is damaged or truncated"),
    "no JSON": (file_of("nonsense"), "is damaged"),
    "list": (file_of([]), "is damaged"),
    "nesting": (file_of('{"a":' * 100_000), "is damaged"),
    "unknown type": (file_of({"a": {**A, "dtype": "F99"}}), "is damaged"),
    "negative": (file_of({"a": {**A, "shape": [-4]}}), "is damaged"),
    "overflow": (file_of({"a": {**A, "shape": [2**62, 2**62]}}), "is damaged"),
    "shape": (file_of({"a": {**A, "shape": [5]}}), "is damaged"),
    "cut": (file_of({"a": A}, bytes(15)), "is damaged or truncated"),
    "rest": (file_of({"a": A}, bytes(17)), "is damaged or truncated"),
    "overlap": (file_of({"a": A, "b": B}, bytes(24)), "is damaged"),
    "twice": (file_of(f'{{"a":{json.dumps(A)},"a":{json.dumps(A)}}}'), "holds 'a' twice in its header"),
    "key twice": (file_of('{"__metadata__":{"x":"1","x":"2"}}', b""), "holds 'x' twice in its header"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers(tmp_path: Path, case: str) -> None:
    content, words = HEADERS[case]
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        SafetensorsFolder(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / SINGLE) in str(caught.value)


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2"])
@pytest.mark.parametrize("scaled", [True, False])
def test_types_that_need_scales_are_refused_by_name(tmp_path: Path, kind: str, scaled: bool) -> None:
    bits = int(kind[1])
    header: dict[str, Any] = {"w": {"dtype": kind, "shape": [16], "data_offsets": [0, 2 * bits]}}
    if scaled:
        header["w_scale_inv"] = {"dtype": "F32", "shape": [], "data_offsets": [2 * bits, 2 * bits + 4]}
    (tmp_path / SINGLE).write_bytes(file_of(header, bytes(2 * bits + 4 * scaled)))
    with pytest.raises(
        ValueError, match=f"tensor 'w' of .* is {kind}, whose scales are not applied, .*; load the float"
    ):
        SafetensorsFolder(tmp_path)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)


@pytest.mark.parametrize("make, words", [(pipe, "a named pipe"), (Path.mkdir, "a folder"), (unix_socket, "a socket")])
@pytest.mark.parametrize("name", [SINGLE, INDEX, SHARD])
def test_only_regular_files_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, words: str, name: str
) -> None:
    # The path of a socket must be short.
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path, {"weight_map": {"a": SHARD}})
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is {words}, and a regular file is needed"):
        SafetensorsFolder(tmp_path)


def test_links_are_followed_as_the_hub_uses_them(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0123").write_bytes(file_of({"a": A}))
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / SINGLE).symlink_to("../blobs/0123")
    folder = SafetensorsFolder(tmp_path / "snapshot")
    assert folder["a"].tolist() == [0, 0, 0, 0]
    (tmp_path / "blobs" / "0123").unlink()
    with pytest.raises(FileNotFoundError, match="can't be found"):
        folder["a"]
