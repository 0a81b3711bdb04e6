"""`Family`, a row of `any4_jax.models.families`: what sets one kind of decoder apart."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from any4_jax.models.base import Decoder
from any4_jax.models.gguf_file import GGUFFile
from any4_jax.schema import check

Names = tuple[tuple[str, str], ...]
"""Pairs of templates that spell the names of the same tensors in two ways. "{i}" stands for a number, any other word in
braces for letters, digits and underscores; a word stands for the same text in both templates of a pair. A word that
only the second template has stays in the result: "{expert}" in a Hugging Face name (see `Family.names`)."""

EXPERT = "{expert}"


def renamed(names: Names, name: str) -> str | None:
    """The second spelling of a name that is in the first spelling; None if no pair matches it."""
    for ours, theirs in names:
        if match := _pattern(ours).fullmatch(name):
            return theirs.format_map(_Words(match.groupdict()))
    return None


@dataclasses.dataclass(frozen=True)
class _Exactly:
    """A value that equals those with its own repr: 1, 1.0 and True differ."""

    value: Any = dataclasses.field(compare=False)
    text: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", repr(self.value))


# Tracing a model takes a tenth of a second or more, as often as it is loaded.
@functools.lru_cache(maxsize=32)
def _traced(make: Any, config: _Exactly, dtype: _Exactly) -> tuple[nnx.GraphDef[Any], nnx.State[Any, Any]]:
    return nnx.split(nnx.eval_shape(lambda: make(config.value, dtype=dtype.value, rngs=nnx.Rngs(0))))


class _Words(dict[str, str]):
    def __missing__(self, word: str) -> str:
        return f"{{{word}}}"


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
        experts: whether these are the files of the architecture that have experts.
        names: GGUF name -> Hugging Face name. A stack of experts is one tensor, and its name is that of one expert's
            tensor without the "{expert}." in it.
        read_config: file -> config.
        heads: (template of GGUF names, field of the config with the number of heads) for tensors whose rows are in
            another order: the rotary embedding of a GGUF llama rotates neighbouring channels (2i, 2i+1), that of
            Hugging Face rotates channels (i, i + D/2).
        raised: templates of GGUF names whose values are those of Hugging Face plus 1, as for norms that multiply by
            1 + weight.
        ignored: templates of names that are not weights.
    """

    architecture: str
    names: Names
    read_config: Callable[[GGUFFile], Any]
    experts: bool = False
    heads: tuple[tuple[str, str], ...] = ()
    raised: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def hf_name(self, name: str) -> str:
        """The Hugging Face name of a tensor; a name that the family doesn't have is returned unchanged."""
        return renamed(self.names, name) or name

    def as_in_hf(self, name: str, array: np.ndarray, config: Any) -> np.ndarray:
        """The tensor of a GGUF name, with the values and the order of rows that it has in Hugging Face's files."""
        if matches(self.raised, name):
            array = (array.astype(np.float32) - 1).astype(array.dtype)
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
        module: the class of the decoder. Families with equal blocks may share it.
        config: the class of its config; no other family has it. A frozen dataclass of plain values, tuples and other
            such dataclasses; `DecoderConfig` lists the fields that it needs. What its annotations say is checked when a
            checkpoint is read (see `any4_jax.schema`).
        architectures, model_types: its names in a Hugging Face config.json.
        read_config: (config.json, generation_config.json or None) -> config. Raises ValueError for settings that the
            family doesn't support.
        names: dotted path of a variable -> Hugging Face name. A variable whose path ends in "kernel" is the transpose,
            [in, out], of a stored tensor [out, in]. If the Hugging Face name has "{expert}", the variable is a stack
            [X, ...] of the tensors of experts 0 to X - 1.
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
        model: Decoder = nnx.merge(*_traced(self.module, _Exactly(config), _Exactly(dtype)))
        return model

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
            ValueError: `content` lacks a field, has one that the config doesn't have, or a value doesn't fit its field.
        """
        source, advice = f"the config of family {self.name!r}", "save the model again"
        config: Any = check(self.config, content, source, advice)
        unknown = sorted(set(content) - {field.name for field in dataclasses.fields(self.config)})
        if unknown:
            raise ValueError(f"{source} has the unknown keys {', '.join(unknown)}; upgrade any4_jax, or {advice}")
        return config
