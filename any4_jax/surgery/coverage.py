"""How much of a model is quantized, and what is left."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.core import meta

from any4_jax.surgery import trees
from any4_jax.surgery.containers import container_of
from any4_jax.surgery.linen_modules import is_pair, params_of
from any4_jax.weights import is_operator

BIG = 4096
"""The entries of the smallest array that counts as a matrix which might have been quantized."""
SHARE = 0.1
"""The share of the big matrices' weights that may stay float without a word."""
_EMBEDDING = re.compile(r"(?i).*embed.*")
_NAMED = 3
_NUMBER = re.compile(r"\b\d+\b")


@dataclasses.dataclass(frozen=True)
class Left:
    """A matrix that is not quantized.

    Attributes:
      kind: the class that holds it, or "array".
      shape: of the array.
      embedding: whether it is a table whose rows are looked up, as far as its name or class tells.
    """

    kind: str
    shape: tuple[int, ...]
    embedding: bool

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.kind} {list(self.shape)}"


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How much of a model is quantized. An array counts as a matrix if it has two axes or more and 4096 entries.

    Attributes:
      done: the weights of each quantized matrix, by path.
      left: the float matrices, by path.
    """

    done: Mapping[str, int]
    left: Mapping[str, Left]

    @property
    def share(self) -> float:
        """The share of all matrices' weights that is quantized."""
        whole = self.weights + sum(one.size for one in self.left.values())
        return self.weights / whole if whole else 0.0

    @property
    def weights(self) -> int:
        """The number of quantized weights."""
        return sum(self.done.values())

    def unnamed(self, names: Callable[[str], bool]) -> dict[str, Left]:
        """The float matrices that are no embeddings and that no rule names.

        Args:
          names: path -> whether a rule names it.
        """
        return {path: one for path, one in self.left.items() if not one.embedding and not names(path)}

    def __str__(self) -> str:
        count = len(self.done) + len(self.left)
        text = f"{len(self.done)} of {count} matrices, {100 * self.share:.3g} % of their weights, are quantized"
        return f"{text}; left: {few(self.left)}" if self.left else text


def few(left: Mapping[str, Left]) -> str:
    """Some of the matrices that are left, those of like layers once."""
    alike = Counter(f"{_NUMBER.sub('*', path)} ({one})" for path, one in left.items())
    shown = [text if count == 1 else f"{count} x {text}" for text, count in alike.items()]
    rest = len(shown) - _NAMED
    return ", ".join(shown[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def coverage(model: Any) -> Coverage:
    """How much of a model is quantized: any model that `quantize_model` takes, and the contents of a checkpoint."""
    found = {path: meta.unbox(leaf) for path, leaf in _leaves(model).items()}
    done = {path.removesuffix(".kernel"): math.prod(w.shape) for path, w in found.items() if is_operator(w)}
    return Coverage(done, {path: one for path, one in arrays_of(model) if one.size >= BIG})


def arrays_of(model: Any) -> Iterator[tuple[str, Left]]:
    """The float arrays of a model that have at least two axes, by path."""
    kinds = _kinds(model) if isinstance(model, nnx.Module) else {}
    for path, leaf in _leaves(model).items():
        array = meta.unbox(leaf)
        shape = tuple(getattr(array, "shape", ()))
        if not is_operator(array) and len(shape) > 1 and jnp.issubdtype(array.dtype, jnp.floating):
            kind = kinds.get(path, "array")
            yield path.removesuffix(".kernel"), Left(kind, shape, kind == "Embed" or bool(_EMBEDDING.fullmatch(path)))


def _leaves(model: Any) -> dict[str, Any]:
    """What a model has learned, by path; of Linen's variables only the parameters."""
    tree = container_of(model).tree(model)
    return trees.leaves(params_of(tree) if is_pair(model) else tree)


def _kinds(model: nnx.Module) -> dict[str, str]:
    """The class that holds each variable of a module, by the variable's path."""
    return {
        trees.dotted((*path, name)): type(module).__name__
        for path, module in nnx.iter_modules(model)
        for name, value in vars(module).items()
        if isinstance(value, nnx.Variable)
    }


def named_by(patterns: Iterable[str]) -> Callable[[str], bool]:
    """path -> whether one of these regexes matches it as a whole."""
    compiled = [re.compile(pattern) for pattern in patterns]
    return lambda path: any(pattern.fullmatch(path) for pattern in compiled)
