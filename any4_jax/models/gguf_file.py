"""The GGUF container: the metadata and tensors of one model. Nothing here depends on the model."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from any4_jax.models.gguf_metadata import Metadata, Values
from any4_jax.models.gguf_parts import NUMBER, read_parts
from any4_jax.models.gguf_tensors import StoredTensor, locate
from any4_jax.one_line import shown
from any4_jax.schema import Name


class GGUFFile(Values, Mapping[str, np.ndarray]):
    """Name -> array, under the file's own names; each access reads and dequantizes the tensor.

    F32, F16 and BF16 keep their dtype; quantized types become float32. Shapes are row-major: linears are [N, K]. All
    parts of a split model are read as one file.
    The reader in the `gguf` package creates several objects for each token of the vocabulary, which takes seconds and
    more memory than a small model; this one keeps lists of plain values.

    The typed readers (`count`, `index`, `positive`, `finite`, `text`, `flag`, `value`) take keys of the architecture:
    `count("block_count")` of a llama is that of "llama.block_count". Those of `metadata` take full keys.

    Attributes:
        path: the file, or the part of a split model that was given.
        metadata: full key -> number, bool, text, or a list of these.
        architecture: the kind of model, with which the keys of its metadata begin.
    """

    def __init__(self, path: Path) -> None:
        """Reads the header, or those of all parts, and compares all that it says with the data.

        Args:
            path: a .gguf file; of a split model, any part.

        Raises:
            FileNotFoundError: there is no such file, or a part is missing.
            ValueError: it is not a GGUF file, is damaged or truncated, or holds tensors of an unsupported type; or its
                parts don't belong together.
        """
        self.path = path
        parts = read_parts(path)
        self.metadata = Metadata.joined(path, [part.metadata for part in parts], frozenset({NUMBER}))
        self.architecture: str = self.metadata.value("general.architecture", Name)
        self._tensors: dict[str, StoredTensor] = {}
        for part in parts:
            for name, tensor in locate(part).items():
                if name in self._tensors:
                    raise ValueError(
                        f"tensor {shown(name)} is both in {self._tensors[name].path} and in {part.path}: they are "
                        "parts of different models; fetch them again"
                    )
                self._tensors[name] = tensor

    def look_up(self, key: str) -> tuple[str, Any]:
        return self.metadata.look_up(f"{self.architecture}.{key}")

    def single(self, key: str, value: Any) -> Any:
        """If a value is a list with one entry per layer, the value of all entries.

        Raises:
            ValueError: the layers have different values.
        """
        if not isinstance(value, list) or not value:
            return value
        if any(item != value[0] for item in value):
            raise ValueError(
                f"{shown(key)} of {self.path} differs from layer to layer, and one value is needed; use another model"
            )
        return value[0]

    def number(self, key: str, default: Any = None) -> Any:
        """The value of "<architecture>.<key>", of whichever type; see `single`.

        Raises:
            ValueError: it is missing and there is no default, or the layers have different values.
        """
        full, value = self.look_up(key)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"{self.path} lacks {shown(full)}; convert the model again")
        return self.single(full, value)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
