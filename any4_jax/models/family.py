"""`Family`, a row of `any4_jax.models.families`: what sets one kind of decoder apart."""

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from any4_jax.models.base import Decoder
from any4_jax.models.gguf_file import GGUFFile

Names = tuple[tuple[str, str], ...]
"""Pairs of templates that spell the names of the same tensors in two ways. "{i}" stands for a number, any other word in
braces for letters, digits and underscores; a word stands for the same text in both templates of a pair."""


def renamed(names: Names, name: str) -> str | None:
    """The second spelling of a name that is in the first spelling; None if no pair matches it."""
    for ours, theirs in names:
        if match := _pattern(ours).fullmatch(name):
            return theirs.format(**match.groupdict())
    return None


def matches(templates: Iterable[str], name: str) -> bool:
    """Whether one of the templates matches a name."""
    return any(_pattern(template).fullmatch(name) for template in templates)


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    text, *rest = re.split(r"\{(\w+)\}", template)
    pattern = re.escape(text)
    for word, text in zip(rest[::2], rest[1::2], strict=True):
        pattern += rf"(?P<{word}>{r'[0-9]+' if word == 'i' else r'[0-9A-Za-z_]+'})" + re.escape(text)
    return re.compile(pattern)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUF:
    """How a family's GGUF files differ from its Hugging Face folders.

    Attributes:
        architecture: the value of "general.architecture".
        names: GGUF name -> Hugging Face name.
        read_config: file -> config.
        heads: (template of GGUF names, field of the config with the number of heads) for tensors whose rows are in
            another order: the rotary embedding of a GGUF llama rotates neighbouring channels (2i, 2i+1), that of
            Hugging Face rotates channels (i, i + D/2).
        ignored: templates of names that are not weights.
    """

    architecture: str
    names: Names
    read_config: Callable[[GGUFFile], Any]
    heads: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()

    def hf_name(self, name: str) -> str:
        """The Hugging Face name of a tensor; a name that the family doesn't have is returned unchanged."""
        return renamed(self.names, name) or name

    def in_hf_order(self, name: str, array: np.ndarray, config: Any) -> np.ndarray:
        """The tensor of a GGUF name, with its rows in Hugging Face's order."""
        for template, field in self.heads:
            heads = getattr(config, field)
            if matches([template], name) and array.shape[0] % (2 * heads) == 0:
                return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        return array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of decoder: all that loading, saving and generation need to know about it.

    Attributes:
        name: its name in checkpoints.
        module: the class of the decoder; no other family has it.
        config: the class of its config; no other family has it. A frozen dataclass of plain values, tuples and other
            such dataclasses; `DecoderConfig` lists the fields that it needs.
        architectures, model_types: its names in a Hugging Face config.json.
        read_config: (config.json, generation_config.json or None) -> config. Raises ValueError for settings that the
            family doesn't support.
        names: dotted path of a variable -> Hugging Face name. A variable whose path ends in "kernel" is the transpose,
            [in, out], of a stored tensor [out, in].
        embedding, head: Hugging Face names. The stored dtype of the embedding is the model's; if the model ties the
            two, a stored head that equals the embedding is ignored.
        ignored: templates of Hugging Face names that are not weights.
        gguf: how GGUF files hold this family; None if they don't.
    """

    name: str
    module: type[Decoder]
    config: type
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any], Mapping[str, Any] | None], Any]
    names: Names
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    ignored: tuple[str, ...] = ()
    gguf: GGUF | None = None

    def abstract(self, config: Any, dtype: DTypeLike) -> Decoder:
        """The model of a config, with a jax.ShapeDtypeStruct in place of each array."""
        make: Any = self.module
        return nnx.eval_shape(lambda: make(config, dtype=dtype, rngs=nnx.Rngs(0)))

    def hf_name(self, path: tuple[Any, ...]) -> str:
        """The Hugging Face name of the variable at a path.

        Raises:
            ValueError: no template of `names` matches the path.
        """
        dotted = ".".join(map(str, path))
        name = renamed(self.names, dotted)
        if name is None:
            raise ValueError(f"{dotted} has no Hugging Face name in family {self.name!r}; add it to the family's names")
        return name

    def config_to_json(self, config: Any) -> dict[str, Any]:
        """A config as JSON values."""
        return dataclasses.asdict(config)

    def config_from_json(self, content: Mapping[str, Any]) -> Any:
        """The inverse of `config_to_json`.

        Raises:
            KeyError, TypeError: `content` lacks a field, or has one that the config doesn't have.
        """
        return _from_json(self.config, content)


def _from_json(cls: type, content: Mapping[str, Any]) -> Any:
    """A dataclass from JSON values: a list becomes a tuple, an object the dataclass that is its field's type."""
    hints = typing.get_type_hints(cls)

    def value(name: str, given: Any) -> Any:
        if isinstance(given, list):
            return tuple(given)
        if isinstance(given, Mapping):
            return _from_json(_dataclass_in(hints[name]), given)
        return given

    return cls(**{name: value(name, given) for name, given in content.items()})


def _dataclass_in(hint: Any) -> Any:
    """The dataclass that a type is, or that a union contains."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next(option for option in options if dataclasses.is_dataclass(option))
