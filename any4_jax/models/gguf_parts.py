"""Finds the parts of a model that was split into several GGUF files, as llama.cpp's gguf-split names them."""

import re
from collections.abc import Iterator
from pathlib import Path

from any4_jax.models.gguf_header import Header, read_header

NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
_NAME = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})(\.gguf)", re.IGNORECASE | re.DOTALL)


def read_parts(path: Path) -> list[Header]:
    """The headers of all parts, in order; that of a whole file alone.

    Args:
        path: any part.

    Raises:
        FileNotFoundError: a part is missing; the message names it.
        ValueError: a header is damaged, a file isn't the part that its name says, or the parts don't belong together.
    """
    header = read_header(path)
    count = header.metadata.index(COUNT, 1)
    if count <= 1:
        return [header]
    parts = []
    # Looked for one by one, because the count is only a claim.
    for file in _paths(path, header.metadata.index(NUMBER), count):
        if not file.exists():
            raise FileNotFoundError(f"{path} is one of {count} parts, and {file.name} is missing; fetch all parts")
        parts.append(header if file == path else read_header(file))
    for number, part in enumerate(parts):
        if (got := part.metadata.index(NUMBER)) != number:
            raise ValueError(
                f"{part.path} is part {number + 1} by its name, and {got + 1} by its {NUMBER}; fetch it again"
            )
    total, needed = sum(len(part.tensors) for part in parts), header.metadata.index(TENSORS, None)
    if needed is not None and total != needed:
        raise ValueError(
            f"the {count} parts of {path} hold {total} tensors, and its {TENSORS} says {needed}: they are parts of "
            "different models; fetch them again"
        )
    return parts


def _paths(path: Path, number: int, count: int) -> Iterator[Path]:
    """The files of all parts, from the name of one."""
    match = _NAME.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        ending = f"-{number + 1:05}-of-{count:05}.gguf"
        raise ValueError(
            f"{path} is part {number + 1} of {count}, and a name that ends in {ending} is needed to find the others; "
            "give each part its own name back"
        )
    return (path.with_name(f"{match[1]}-{part:05}-of-{match[3]}{match[4]}") for part in range(1, count + 1))
