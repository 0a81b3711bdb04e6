"""GGUF models in several parts: found from any part, and refused if they don't belong together."""

import struct
from pathlib import Path

import pytest
from gguf_bytes import I32, LLAMA, STRING, Tensor, container, pair

from any4_jax.models.gguf_file import GGUFFile


def part(number: int, count: int = 3, total: int = 3, *pairs: bytes, name: bytes | None = None) -> bytes:
    """One part of a split model; only the first has an architecture."""
    split = [pair("split.no", 2, number), pair("split.count", 2, count), pair("split.tensors.count", I32, total)]
    tensor = Tensor(name or f"t{number}".encode())
    data = struct.pack("<4f", *[number] * 4)
    return container([LLAMA] * (number == 0) + [*split, *pairs], [tensor], data)


def write_parts(folder: Path, *parts: bytes) -> list[Path]:
    paths = [folder / f"m-{number:05}-of-{len(parts):05}.gguf" for number in range(1, len(parts) + 1)]
    for path, content in zip(paths, parts, strict=True):
        path.write_bytes(content)
    return paths


def test_any_part_gives_the_whole_model(tmp_path: Path) -> None:
    for path in write_parts(tmp_path, *map(part, range(3))):
        file = GGUFFile(path)
        assert file.architecture == "llama"
        assert {name: array.tolist() for name, array in file.items()} == {f"t{i}": [i] * 4 for i in range(3)}


SPLITS = {
    "fewer tensors": (
        [part(0, 3, 4), part(1, 3, 4), part(2, 3, 4)],
        "hold 3 tensors, and its split.tensors.count says 4",
    ),
    "other model": ([part(0), part(1), part(2, 3, 5)], "split.tensors.count of .*00003.* is 5, and 3 in the parts"),
    "swapped": ([part(0), part(2), part(1)], "00002-of-00003.gguf is part 2 by its name, and 3 by its split.no"),
    "other count": ([part(0), part(1), part(2, 4)], "split.count of .*00003-of-00003.gguf is 4, and 3"),
    "same tensor": ([part(0), part(1), part(2, name=b"t1")], "tensor t1 is both in .*00002.* and in .*00003"),
    "other value": (
        [part(0), part(1, 3, 3, pair("general.architecture", STRING, "gemma")), part(2)],
        "'?gemma'?, and llama",
    ),
    "no number": ([part(0), part(1).replace(b"split.no", b"split.nr"), part(2)], "lacks split.no"),
    "count as text": (
        [container([LLAMA, pair("split.count", STRING, "3")])],
        "split.count is '3', and a valid integer",
    ),
    "negative count": ([container([LLAMA, pair("split.count", I32, -3)])], "split.count is -3"),
    "damaged part": ([part(0), part(1)[:40], part(2)], "00002-of-00003.gguf is damaged or truncated in its header"),
}


@pytest.mark.parametrize("case", SPLITS)
def test_parts_that_do_not_belong_together(tmp_path: Path, case: str) -> None:
    contents, words = SPLITS[case]
    paths = write_parts(tmp_path, *contents)
    with pytest.raises(ValueError, match=words):
        GGUFFile(paths[0])


def test_parts_that_are_missing_or_renamed(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, *map(part, range(3)))
    paths[1].unlink()
    with pytest.raises(FileNotFoundError, match="one of 3 parts, and m-00002-of-00003.gguf is missing"):
        GGUFFile(paths[2])
    paths[2].rename(tmp_path / "other.gguf")
    with pytest.raises(ValueError, match="other.gguf is part 3 of 3, and a name that ends in -00003-of-00003.gguf is"):
        GGUFFile(tmp_path / "other.gguf")
    many = tmp_path / "m{0}-00001-of-60000.gguf"
    many.write_bytes(part(0, 60_000))
    with pytest.raises(FileNotFoundError, match="one of 60000 parts, and m.0.-00002-of-60000.gguf is missing"):
        GGUFFile(many)
