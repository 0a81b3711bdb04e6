"""Reads the tensors of a Hugging Face folder, from one file or from shards, one at a time and without torch."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from any4_jax.one_line import one_line
from any4_jax.regular_file import check_regular, read_regular
from any4_jax.schema import Schema, check, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Values of these are wrong without their scales, which are tensors whose names differ from tool to tool.
_SCALED = ("F8_", "F6_", "F4")


class _Index(Schema):
    """The part of an index that is read: tensor name -> name of a file in the same folder."""

    weight_map: dict[str, str]


class SafetensorsFolder(Mapping[str, np.ndarray]):
    """Name -> array, read from disk at each access; only the names stay in memory.

    bfloat16 is `ml_dtypes.bfloat16`. The constructor opens every file once, so a missing, truncated or contradictory
    file is found before any tensor is used.
    """

    def __init__(self, folder: Path) -> None:
        """Lists the tensors of `model.safetensors` or, without that, of the shards that the index names.

        Raises:
            FileNotFoundError: there is neither file nor index, or a shard is missing.
            ValueError: a file is damaged or not a regular file, a tensor is there twice or of a type that needs scales,
                or the index and a shard disagree.
        """
        self._files: dict[str, Path] = {}
        if (folder / SINGLE).exists():
            self._files = dict.fromkeys(_names(folder / SINGLE), folder / SINGLE)
        elif (folder / INDEX).exists():
            self._add_shards(folder)
        else:
            pickled = sorted(path.name for path in folder.glob("*.bin"))
            found = f"only {pickled[0]}, a pickle that is never read" if pickled else "no weights"
            raise FileNotFoundError(f"{folder} holds {found}, and {SINGLE} or {INDEX} is needed; convert it first")

    def _add_shards(self, folder: Path) -> None:
        index = _weight_map(folder / INDEX)
        shards = sorted(set(index.values()))
        missing = [shard for shard in shards if not (folder / shard).exists()]
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {', '.join(missing)} of the {len(shards)} shards that {INDEX} names; fetch it again"
            )
        for shard in shards:
            for name in _names(folder / shard):
                if name in self._files:
                    raise ValueError(
                        f"tensor {name[:60]!r} is both in {self._files[name]} and in {folder / shard}; keep one of them"
                    )
                self._files[name] = folder / shard
        for name, shard in index.items():
            if self._files.get(name) != folder / shard:
                raise ValueError(
                    f"{folder / shard} lacks tensor {name[:60]!r}, which {INDEX} says it holds; fetch both again"
                )

    def __getitem__(self, name: str) -> np.ndarray:
        path = self._files[name]
        check_regular(path)
        try:
            # Opened at each access: an open file stays mapped, and its pages would count as resident memory beside
            # the arrays that are made from them, twice the model in all.
            with safetensors.safe_open(path, framework="numpy") as file:
                return np.asarray(file.get_tensor(name))
        except Exception as error:  # the reader's exceptions for types that numpy lacks share no base class
            raise ValueError(
                f"tensor {name[:60]!r} of {path} can't be read ({one_line(error)}); F32, F16 and BF16 are supported"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _names(path: Path) -> list[str]:
    """The names in one file; its length is checked against its header."""
    length = check_regular(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} of {length} bytes is damaged or truncated ({one_line(error)}); fetch it again"
        ) from error
    _refuse_twice(path)
    for name, kind in kinds.items():
        if kind.startswith(_SCALED):
            raise ValueError(
                f"tensor {name[:60]!r} of {path} is {kind}, whose scales are not applied, and F32, F16 or BF16 is "
                "needed; load the float checkpoint, or convert this one to bfloat16 first"
            )
    return list(kinds)


def _refuse_twice(path: Path) -> None:
    """Refuses a header with a name that is there twice, of which the reader would silently take the last.

    The reader has accepted the header: its length is sound, and it is JSON in UTF-8.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            names = [name for name, _ in pairs]
            name = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{path} holds {name[:60]!r} twice in its header; convert the model again")
        return content

    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        json.loads(file.read(length), object_pairs_hook=once)


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> name of a file in the same folder."""
    index = check(_Index, read_json(read_regular(path), str(path)), str(path), "fetch it again").weight_map
    for shard in set(index.values()):
        if shard in ("", "..") or Path(shard).name != shard or not shard.isprintable():
            raise ValueError(f"{path} names {shard[:60]!r}, and file names without a folder are needed; don't trust it")
        if Path(shard).suffix != ".safetensors":
            raise ValueError(
                f"{path} names {shard[:60]!r}, and names of .safetensors files are needed; convert it first"
            )
    return index
