"""Where files of Hugging Face tensors keep the variables of a decoder, and in which form."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from any4_jax.models.family import EXPERT, Family
from any4_jax.one_line import shown

Tensors = Mapping[str, np.ndarray]

_FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(jnp.bfloat16))
_DTYPES = "float32, float16 or bfloat16"


def floats(name: str, array: Any) -> np.ndarray:
    """The array of a tensor.

    Raises:
        ValueError: it isn't float.
    """
    array = np.asarray(array)
    if array.dtype not in _FLOATS:
        raise ValueError(f"tensor {shown(name)} is {array.dtype}, and {_DTYPES} is needed; load the float checkpoint")
    return array


@dataclasses.dataclass(frozen=True)
class Stored:
    """The tensors of one variable.

    Attributes:
        names: one name, or one for each expert.
        apart: whether the variable is a stack of experts, and each expert has a tensor.
        shape: of the variable.
        is_kernel: whether the variable is [..., in, out], and its tensors are [..., out, in].
    """

    names: tuple[str, ...]
    apart: bool
    shape: tuple[int, ...]
    is_kernel: bool

    @classmethod
    def of(
        cls, family: Family, path: tuple[Any, ...], shape: tuple[int, ...], tensors: Tensors | None = None
    ) -> "Stored":
        """Where `tensors` keep the variable at a path, or, with None, where Hugging Face would keep it."""
        name, is_kernel = family.hf_name(path), path[-1] == "kernel"
        whole = name.replace(f"{EXPERT}.", "")
        if EXPERT not in name or tensors is not None and whole in tensors:
            return cls((whole,), False, shape, is_kernel)
        # No file has more experts than tensors, so a size that isn't true costs nothing.
        count = shape[0] if tensors is None else min(shape[0], len(tensors) + 1)
        return cls(tuple(name.replace(EXPERT, str(expert)) for expert in range(count)), True, shape, is_kernel)

    def parts(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of each tensor."""
        shape = self.shape[1:] if self.apart else self.shape
        if self.is_kernel:
            shape = (*shape[:-2], *shape[:-3:-1])
        for name in self.names:
            yield name, shape

    def read(self, tensors: Tensors, dtype: np.dtype, misshapen: list[str]) -> np.ndarray | None:
        """The value of the variable, in new memory; None if a tensor has another shape, which `misshapen` gets told."""
        value = np.empty(self.shape, dtype) if self.apart else None
        for index, (name, expected) in enumerate(self.parts()):
            array = floats(name, tensors[name])
            if array.shape != expected:
                misshapen.append(f"{name} {array.shape} instead of {expected}")
                return None
            array = array.swapaxes(-1, -2) if self.is_kernel else array
            if value is None:
                return np.array(array, dtype=dtype, order="C", copy=True)
            value[index] = array
        return value

    def write(self, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """(name, array) of each tensor; the inverse of `read`."""
        value = value.swapaxes(-1, -2) if self.is_kernel else value
        yield from zip(self.names, value if self.apart else [value], strict=True)
