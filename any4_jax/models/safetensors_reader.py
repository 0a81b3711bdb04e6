"""Reads the tensors of a Hugging Face folder, from one file or from shards, one at a time and without torch."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import safetensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class SafetensorsFolder(Mapping[str, np.ndarray]):
    """Name -> array, read from disk at each access; only the names stay in memory.

    bfloat16 is `ml_dtypes.bfloat16`. The constructor opens every file once, so a missing, truncated or contradictory
    file is found before any tensor is used.
    """

    def __init__(self, folder: Path) -> None:
        """Lists the tensors of `model.safetensors` or, without that, of the shards that the index names.

        Raises:
            FileNotFoundError: there is neither file nor index, or a shard is missing.
            ValueError: a file is damaged, a tensor is in two shards, or the index and a shard disagree.
        """
        self._files: dict[str, Path] = {}
        if (folder / SINGLE).is_file():
            self._files = dict.fromkeys(_names(folder / SINGLE), folder / SINGLE)
        elif (folder / INDEX).is_file():
            self._add_shards(folder)
        else:
            pickled = sorted(path.name for path in folder.glob("*.bin"))
            found = f"only {pickled[0]}, a pickle that is never read" if pickled else "no weights"
            raise FileNotFoundError(f"{folder} holds {found}, and {SINGLE} or {INDEX} is needed; convert it first")

    def _add_shards(self, folder: Path) -> None:
        index = _weight_map(folder / INDEX)
        shards = sorted(set(index.values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {', '.join(missing)} of the {len(shards)} shards that {INDEX} names; fetch it again"
            )
        for shard in shards:
            for name in _names(folder / shard):
                if name in self._files:
                    raise ValueError(
                        f"tensor {name} is both in {self._files[name]} and in {folder / shard}; keep one of them"
                    )
                self._files[name] = folder / shard
        for name, shard in index.items():
            if self._files.get(name) != folder / shard:
                raise ValueError(f"{folder / shard} lacks tensor {name}, which {INDEX} says it holds; fetch both again")

    def __getitem__(self, name: str) -> np.ndarray:
        path = self._files[name]
        try:
            # Opened at each access: an open file stays mapped, and its pages would count as resident memory beside
            # the arrays that are made from them, twice the model in all.
            with safetensors.safe_open(path, framework="numpy") as file:
                return np.asarray(file.get_tensor(name))
        except Exception as error:  # the reader's exceptions for types that numpy lacks share no base class
            raise ValueError(
                f"tensor {name} of {path} can't be read ({error}); F32, F16 and BF16 are supported"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _names(path: Path) -> list[str]:
    """The names in one file; its length is checked against its header."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return list(file.keys())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated ({error}); fetch it again") from error


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> name of a file in the same folder."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has no readable weight_map ({error!r}); fetch it again") from error
    outside = [shard for shard in set(index.values()) if Path(shard).name != shard]
    if outside:
        raise ValueError(f"{path} names {outside[0]!r}, and file names without a folder are needed; don't trust it")
    return dict(index)
