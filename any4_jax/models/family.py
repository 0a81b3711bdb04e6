"""What a family of decoders is: the row of `any4_jax.models.families`."""

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
"""Pairs of templates for the same tensors in two spellings. "{i}" stands for a number, any other word in braces for
letters, digits and underscores; what it stands for is the same in both."""


def renamed(names: Names, name: str) -> str | None:
    """The second spelling of a name in the first; None where no pair has it."""
    for ours, theirs in names:
        if match := _pattern(ours).fullmatch(name):
            return theirs.format(**match.groupdict())
    return None


def matches(templates: Iterable[str], name: str) -> bool:
    """Whether a name is one of those that the templates stand for."""
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
        architecture: what "general.architecture" says.
        names: a GGUF name -> the Hugging Face name.
        read_config: the file -> the config.
        heads: (template of GGUF names, field of the config that is the number of heads) for the tensors whose rows are
            in another order: the rotary embedding of a GGUF llama turns neighbouring channels (2i, 2i+1), that of
            Hugging Face halves (i, i + D/2).
        ignored: templates of names that are no weights.
    """

    architecture: str
    names: Names
    read_config: Callable[[GGUFFile], Any]
    heads: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()

    def hf_name(self, name: str) -> str:
        """The Hugging Face name of a tensor; a name that the family doesn't have comes back as it is."""
        return renamed(self.names, name) or name

    def in_hf_order(self, name: str, array: np.ndarray, config: Any) -> np.ndarray:
        """The tensor of a GGUF name with its rows in the order of Hugging Face."""
        for template, field in self.heads:
            heads = getattr(config, field)
            if matches([template], name) and array.shape[0] % (2 * heads) == 0:
                return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        return array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of decoder: all that loading, saving and generation have to know of it.

    Attributes:
        name: in checkpoints.
        module: the decoder's class, of no other family.
        config: the class of its config, of no other family: a frozen dataclass of plain values, tuples and further such
            dataclasses; see `DecoderConfig` for the fields that it needs.
        architectures, model_types: what config.json of Hugging Face calls it.
        read_config: (config.json, generation_config.json or None) -> the config. Raises ValueError for what the family
            doesn't compute.
        names: the dotted path of a variable -> the Hugging Face name. Paths that end in "kernel" hold the transpose,
            [in, out] for [out, in].
        embedding, head: Hugging Face names; the dtype of the embedding is that of the model, and a stored head that
            equals the embedding is left out where the model ties them.
        ignored: templates of Hugging Face names that are no weights.
        gguf: for families that GGUF files hold.
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
        """The model of a config with a jax.ShapeDtypeStruct in the place of each array."""
        make: Any = self.module
        return nnx.eval_shape(lambda: make(config, dtype=dtype, rngs=nnx.Rngs(0)))

    def hf_name(self, path: tuple[Any, ...]) -> str:
        """The Hugging Face name of a variable's path.

        Raises:
            ValueError: `names` has no such path.
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
            KeyError, TypeError: `content` lacks a field, or has one that the config lacks.
        """
        return _from_json(self.config, content)


def _from_json(cls: type, content: Mapping[str, Any]) -> Any:
    """A dataclass of JSON values: lists become tuples, objects the dataclass of their field's type."""
    hints = typing.get_type_hints(cls)

    def value(name: str, given: Any) -> Any:
        if isinstance(given, list):
            return tuple(given)
        if isinstance(given, Mapping):
            return _from_json(_dataclass_in(hints[name]), given)
        return given

    return cls(**{name: value(name, given) for name, given in content.items()})


def _dataclass_in(hint: Any) -> Any:
    """The dataclass that a type, or one of a union, is."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next(option for option in options if dataclasses.is_dataclass(option))
