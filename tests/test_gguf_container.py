"""The GGUF container: what it refuses, which types it decodes, and models in several parts."""

import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_bytes import ARRAY, BOOL, F32, I32, LLAMA, STRING, U32, Tensor, container, pair

from any4_jax.models.gguf_file import GGUFFile
from any4_jax.models.gguf_tensors import PLAIN, QUANTIZED

KINDS = gguf.GGMLQuantizationType
HUGE = 2**60
NOTHING = (0, 0)


def opened(folder: Path, content: bytes, name: str = "m.gguf") -> GGUFFile:
    (folder / name).write_bytes(content)
    return GGUFFile(folder / name)


def with_pair(key: bytes | str, kind: int, content: Any) -> bytes:
    return container([LLAMA, pair(key, kind, content)])


def with_alignment(kind: int, content: Any) -> bytes:
    return with_pair("general.alignment", kind, content)


def two(second: Tensor) -> bytes:
    """A file of the tensor a, 16 bytes, and a second one."""
    return container(tensors=[Tensor(), second], data=b"\0" * 64)


def nested(depth: int) -> bytes:
    """The content of an array of arrays."""
    return struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQ", U32, 0)


B = Tensor(b"b", offset=32)
REFUSED = {
    "version": (container(version=1), "of GGUF version 1, and 2 or 3"),
    "other byte order": (container(version=3 << 24), "of GGUF version 50331648"),
    "no tensor count": (container()[:10], r"in its header \(its counts: needs 16 bytes"),
    "tensors": (container(counts=(HUGE, None)), rf"claims {HUGE} tensors, and \d+ fit"),
    "pairs": (container(counts=(None, HUGE)), rf"claims {HUGE} pairs, and \d+ fit"),
    "more pairs than there are": (container(counts=(None, 2)), "in its header"),
    "key length": (container([struct.pack("<Q", HUGE)]), rf"pair 1 of 1: needs {HUGE} bytes, and \d+ are left"),
    "key twice": (container([LLAMA, LLAMA]), "holds the key general.architecture twice"),
    "key not UTF-8": (with_pair(b"k\xff", U32, 1), r"its key is b'k\\xff', and UTF-8 is needed"),
    "type": (with_pair("k", 13, b"\0" * 8), r"\(k: its type is 13, and one of 0 to 12"),
    "element type": (with_pair("k", ARRAY, struct.pack("<IQ", 77, 0)), "its type is 77"),
    "string length": (with_pair("k", STRING, b"")[:-100], "in its header"),
    "elements": (with_pair("k", ARRAY, struct.pack("<IQ", U32, HUGE)), rf"\(k: claims {HUGE} elements"),
    "strings": (with_pair("k", ARRAY, struct.pack("<IQ", STRING, HUGE)), rf"claims {HUGE} elements"),
    "arrays": (with_pair("k", ARRAY, struct.pack("<IQ", ARRAY, HUGE)), rf"claims {HUGE} elements"),
    "unknown elements": (with_pair("k", ARRAY, struct.pack("<IQ", 77, HUGE)), rf"claims {HUGE} elements"),
    "nesting": (with_pair("k", ARRAY, nested(100_000)), "nested deeper than 4"),
    "bool": (with_pair("k", BOOL, b"\2"), "a bool is 2, and 0 or 1"),
    "bools": (with_pair("k", ARRAY, struct.pack("<IQ3B", BOOL, 3, 0, 1, 255)), "a bool is 255"),
    "no architecture": (container([]), "lacks general.architecture"),
    "architecture": (
        container([pair("general.architecture", U32, 5)]),
        "general.architecture is 5, and a valid string",
    ),
    "alignment 0": (with_alignment(U32, 0), "general.alignment is 0, and a power of two of at least 8"),
    "alignment -32": (with_alignment(I32, -32), "general.alignment is -32"),
    "alignment 1": (with_alignment(U32, 1), "general.alignment is 1"),
    "alignment 7": (with_alignment(U32, 7), "general.alignment is 7"),
    "alignment 24": (with_alignment(U32, 24), "general.alignment is 24"),
    "alignment as text": (with_alignment(STRING, "32"), "general.alignment is '32', and a valid integer"),
    "alignment as bool": (with_alignment(BOOL, 1), "general.alignment is True, and a valid integer"),
    "alignment as float": (with_alignment(F32, 32.0), "general.alignment is 32.0, and a valid integer"),
    "huge alignment": (with_alignment(U32, 2**31), "is truncated"),
    "tensor name": (container(tensors=[Tensor(b"a\xff")]), r"its name is b'a\\xff', and UTF-8"),
    "no axes": (container(tensors=[Tensor(dims=())]), r"\(tensor a: has 0 axes, and 1 to 4"),
    "five axes": (container(tensors=[Tensor(dims=(1,) * 5)]), "has 5 axes"),
    "axes": (container(tensors=[Tensor(axes=2**32 - 1)]), "has 4294967295 axes"),
    "empty axis": (container(tensors=[Tensor(dims=(4, 0))]), r"has the shape \(0, 4\), and axes of at least 1"),
    "huge axis": (container(tensors=[Tensor(dims=(HUGE,))]), f"its tensor a ends at {4 * HUGE + 128}"),
    "huge axes": (container(tensors=[Tensor(dims=(HUGE,) * 4)]), "is truncated"),
    "tensor twice": (two(Tensor(b"a", offset=32)), "holds tensor a twice"),
    "unknown kind": (container(tensors=[Tensor(kind=5)]), "tensor a of .* is of the unknown type 5, and F32, F16,"),
    "unsupported kind": (container(tensors=[Tensor(kind=KINDS.I32)]), "is I32, and F32, F16, .* are supported"),
    "blocks": (container(tensors=[Tensor(dims=(48, 2), kind=KINDS.Q8_0)]), "rows of 48 values, and a multiple of 32"),
    "misaligned": (
        two(Tensor(b"b", offset=33)),
        "b of .* begins at byte 193, and 192 is needed, .* of 32 after tensor a",
    ),
    "overlap": (two(Tensor(b"b", offset=0)), "tensor b of .* begins at byte 160, and 192 is needed"),
    "gap": (two(Tensor(b"b", offset=64)), "tensor b of .* begins at byte 224, and 192 is needed"),
    "gap before": (container(tensors=[Tensor(offset=32)], data=b"\0" * 64), "of 32 after the header"),
    "outside": (two(Tensor(b"b", offset=2**63)), f"begins at byte {2**63 + 160}"),
    "shrunk kind": (
        container(tensors=[Tensor(dims=(64,), kind=1)], data=b"\0" * 256),
        "its data ends at 256 with tensor a",
    ),
    "cut data": (two(B)[:-17], "its tensor b ends at 208; it is truncated"),
    "rest": (two(B) + b"\0", "bytes, and its data ends at 208 with tensor b"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_file_says_is_compared_before_it_is_used(tmp_path: Path, case: str) -> None:
    content, words = REFUSED[case]
    tracemalloc.start()
    with pytest.raises(ValueError, match=words) as caught:
        opened(tmp_path, content)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "m.gguf") in str(caught.value)
    # The buffers and messages of any opened file come on top.
    assert peak < 2 * len(content) + 2**19


def test_sound_files_of_every_form_are_read(tmp_path: Path) -> None:
    a = np.arange(4, dtype=np.float32)
    data = a.tobytes() + b"\0" * 16
    for content in (
        container(data=data),
        container(data=data, version=2),
        container(data=data[:16]),
        container([LLAMA, pair("general.alignment", U32, 64)], data=data + b"\0" * 32, alignment=64),
        container([LLAMA, pair("general.alignment", U32, 8)], data=data[:16], alignment=8),
        # Listed in another order than they are stored.
        container(tensors=[B, Tensor()], data=data + data),
    ):
        np.testing.assert_array_equal(opened(tmp_path, content)["a"], a)
    assert opened(tmp_path, container(tensors=[], data=b"")).keys() == set()


VALUES = {
    "u8": (0, 255),
    "i64": (11, -(2**63)),
    "u64": (10, 2**64 - 1),
    "f32": (F32, 1e-5),
    "f64": (12, 0.1),
    "bool": (BOOL, True),
    "text": (STRING, "caf\u00e9 \0 \n"),
    "empty": (STRING, ""),
    "ints": (ARRAY, (I32, [-1, 2])),
    "bools": (ARRAY, (BOOL, [True, False])),
    "texts": (ARRAY, (STRING, ["a", ""])),
    "nested": (ARRAY, (ARRAY, [(U32, [1]), (U32, [])])),
}


def test_metadata_keeps_its_values_and_types(tmp_path: Path) -> None:
    file = opened(tmp_path, container([LLAMA, *(pair(key, *content) for key, content in VALUES.items())]))
    expected = {key: content[1] if kind == ARRAY else content for key, (kind, content) in VALUES.items()}
    expected |= {"general.architecture": "llama", "nested": [[1], []]}
    assert dict(file.metadata) == expected
    assert all(type(file.metadata[key]) is type(expected[key]) for key in expected)


def test_a_text_that_is_not_utf8_spoils_its_own_key_only(tmp_path: Path) -> None:
    keys = {
        "general.name": (STRING, b"caf\xe9"),
        "tokens": (ARRAY, (STRING, [b"a", b"\xff\xfe", b"c"])),
        "llama.n": (U32, 3),
    }
    file = opened(tmp_path, container([LLAMA, *(pair(key, *content) for key, content in keys.items())]))
    assert file.count("n") == 3
    assert np.all(file["a"] == 0)
    for key, got in (("general.name", r"b'caf\\xe9'"), ("tokens", r"b'\\xff\\xfe'")):
        with pytest.raises(ValueError, match=f"{key} of .*m.gguf holds {got}, and UTF-8 is needed"):
            file.metadata.get(key)


READS: list[tuple[str, Any, Any]] = [
    ("count", 1, None),
    ("count", [7, 7], None),
    ("count", 0, "llama.k is 0, and greater than or equal to 1 is needed"),
    ("count", -1, "llama.k is -1"),
    ("count", 2**31, "less than 2147483648"),
    ("count", True, "llama.k is True, and a valid integer"),
    ("count", "8", "llama.k is '8', and a valid integer"),
    ("count", 8.0, "llama.k is 8.0, and a valid integer"),
    ("count", [], r"llama.k is \[\], and a valid integer"),
    ("count", [7, 8], "llama.k of .* differs from layer to layer"),
    ("count", [[1], [1]], r"llama.k is \[1\], and a valid integer"),
    ("index", 0, None),
    ("index", -1, "llama.k is -1, and greater than or equal to 0"),
    ("positive", 1e-5, None),
    ("positive", 10000, None),
    ("positive", 0.0, "llama.k is 0.0, and greater than 0"),
    ("positive", float("nan"), "llama.k is nan, and a finite number"),
    ("positive", float("inf"), "llama.k is inf, and a finite number"),
    ("positive", True, "llama.k is True, and a valid number"),
    ("finite", -2.5, None),
    ("finite", float("-inf"), "a finite number"),
    ("text", "linear", None),
    ("text", 1, "llama.k is 1, and a valid string"),
    ("flag", False, None),
    ("flag", 1, "llama.k is 1, and a valid boolean"),
    ("flag", "true", "llama.k is 'true', and a valid boolean"),
]


@pytest.mark.parametrize("reader, content, words", READS)
def test_typed_readers(tmp_path: Path, reader: str, content: Any, words: str | None) -> None:
    def kind(item: Any) -> int:
        return {bool: BOOL, int: 11, float: 12, str: STRING, list: ARRAY}[type(item)]

    def stored(item: Any) -> Any:
        if not isinstance(item, list):
            return item
        return (kind(item[0]) if item else U32, [stored(element) for element in item])

    file = opened(tmp_path, with_pair("llama.k", kind(content), stored(content)))
    read = getattr(file, reader)
    if words is None:
        assert read("k") == (content[0] if isinstance(content, list) else content)
    else:
        with pytest.raises(ValueError, match=words):
            read("k")
    assert read("absent", None) is None
    with pytest.raises(ValueError, match="m.gguf lacks llama.absent"):
        read("absent")


def test_lists_are_read_by_their_elements(tmp_path: Path) -> None:
    metadata = opened(tmp_path, with_pair("t.tokens", ARRAY, (STRING, ["a", "b"]))).metadata
    assert metadata.value("t.tokens", list[str]) == ["a", "b"]
    with pytest.raises(ValueError, match="t.tokens.0 is 'a', and a valid integer"):
        metadata.value("t.tokens", list[int])
    with pytest.raises(ValueError, match="t.tokens is .*, and a valid string"):
        metadata.text("t.tokens")


@pytest.mark.parametrize("kind", [*PLAIN, *QUANTIZED])
@pytest.mark.parametrize("shape", [(512,), (3, 256), (2, 3, 512)])
def test_every_type_is_decoded_as_the_gguf_package_does(tmp_path: Path, kind: str, shape: tuple[int, ...]) -> None:
    number = KINDS[kind]
    blocks = gguf.quants.quant_shape_to_byte_shape(shape, number)
    raw = np.random.default_rng(0).integers(0, 256, blocks, np.uint8)
    tensors = [Tensor(b"z", dims=shape[::-1], kind=number), Tensor(b"a", offset=-(-raw.size // 32) * 32)]
    file = opened(tmp_path, container(tensors=tensors, data=raw.tobytes() + b"\0" * (-raw.size % 32 + 16)))
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, number)
    got = file["z"]
    assert got.shape == shape
    assert got.dtype == PLAIN.get(kind, np.float32)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(got.astype(np.float32), expected)


def test_a_file_that_changes_after_it_was_opened(tmp_path: Path) -> None:
    file = opened(tmp_path, container())
    file.path.write_bytes(container()[:-20])
    with pytest.raises(ValueError, match="tensor a ends at .*; it is truncated"):
        file["a"]
    file.path.unlink()
    with pytest.raises(FileNotFoundError, match="m.gguf' can't be found"):
        file["a"]
    os.mkfifo(file.path)
    with pytest.raises(ValueError, match="m.gguf is a named pipe, and a regular file is needed"):
        file["a"]
    with pytest.raises(ValueError, match="m.gguf is a named pipe"):
        GGUFFile(file.path)
    with pytest.raises(ValueError, match="is a folder"):
        GGUFFile(tmp_path)
