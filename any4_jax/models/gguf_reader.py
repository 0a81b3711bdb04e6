"""Reads models from GGUF files, in the same parts that a Hugging Face folder has."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from any4_jax.models import families
from any4_jax.models.family import GGUF, matches
from any4_jax.models.gguf_file import GGUFFile
from any4_jax.models.gguf_tokenizer import read_tokenizer
from any4_jax.models.tokenizer import Tokenizer


class HFTensors(Mapping[str, np.ndarray]):
    """The tensors of a GGUF file under Hugging Face names and as in Hugging Face's files, read at each access.

    Names that the family doesn't have stay unchanged, so that the caller can refuse them.
    """

    def __init__(self, file: GGUFFile, row: GGUF, config: Any) -> None:
        """Lists the tensors; see `GGUF` for the row."""
        self._file, self._row, self._config = file, row, config
        self._names = {row.hf_name(name): name for name in file if not matches(row.ignored, name)}

    def __getitem__(self, name: str) -> np.ndarray:
        stored = self._names[name]
        return self._row.as_in_hf(stored, self._file[stored], self._config)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_gguf(path: Path) -> tuple[Any, Mapping[str, np.ndarray], Tokenizer | None]:
    """The config, the tensors (read one at a time) and the tokenizer of a GGUF file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or has an unsupported architecture, tensor type, rope scaling or tokenizer; the
            message names it.
        ImportError: the gguf package is missing.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{path} can't be read without the gguf package; install it with pip") from error
    file = GGUFFile(path)
    try:
        _, row = families.by_gguf(file.architecture, experts=bool(file.number("expert_count", 0)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    config = row.read_config(file)
    return config, HFTensors(file, row, config), read_tokenizer(file.metadata)
