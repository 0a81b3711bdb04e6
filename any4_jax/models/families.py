"""The families of decoders: one row each, by which loading, checkpoints and generation find all that they need."""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from any4_jax.models.base import Decoder
from any4_jax.models.config import LlamaConfig
from any4_jax.models.hf_config import read_config
from any4_jax.models.llama import Llama


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of decoder.

    Attributes:
        name: in checkpoints.
        module: the decoder's class, of no other family.
        config: the class of its config, of no other family: a frozen dataclass of plain values, tuples and further such
            dataclasses.
        architectures, model_types: what config.json of Hugging Face calls it.
        read_config: (config.json, generation_config.json or None) -> the config.
    """

    name: str
    module: type[Decoder]
    config: type
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any], Mapping[str, Any] | None], Any]

    def abstract(self, config: Any, dtype: DTypeLike) -> Decoder:
        """The model of a config with a jax.ShapeDtypeStruct in the place of each array."""
        make: Any = self.module
        return nnx.eval_shape(lambda: make(config, dtype=dtype, rngs=nnx.Rngs(0)))

    def config_to_json(self, config: Any) -> dict[str, Any]:
        """A config as JSON values."""
        return dataclasses.asdict(config)

    def config_from_json(self, content: Mapping[str, Any]) -> Any:
        """The inverse of `config_to_json`.

        Raises:
            KeyError, TypeError: `content` lacks a field, or has one that the config doesn't.
        """
        return _from_json(self.config, content)


FAMILIES: dict[str, Family] = {}
"""Name -> family; `register` adds to it."""


def register(family: Family) -> Family:
    """Makes a family known.

    Raises:
        ValueError: its name, module, config, an architecture or a model type is another family's.
    """
    for other in FAMILIES.values():
        for field in ("name", "module", "config"):
            if getattr(other, field) == getattr(family, field):
                raise ValueError(
                    f"the {field} of family {family.name!r} is that of family {other.name!r}; give it its own"
                )
        for field in ("architectures", "model_types"):
            taken = set(getattr(other, field)) & set(getattr(family, field))
            if taken:
                raise ValueError(f"{', '.join(sorted(taken))} belongs to family {other.name!r} already; name another")
    FAMILIES[family.name] = family
    return family


def named(name: str) -> Family:
    """The family of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in FAMILIES:
        raise ValueError(f"got family {name!r}, known are {', '.join(FAMILIES)}; register it, or upgrade any4_jax")
    return FAMILIES[name]


def family_of(model: Any) -> Family:
    """The family that a model belongs to.

    Raises:
        TypeError: no family has exactly this class; a subclass may compute something else than its base.
    """
    for family in FAMILIES.values():
        if type(model) is family.module:
            return family
    known = ", ".join(family.module.__name__ for family in FAMILIES.values())
    raise TypeError(
        f"got a {type(model).__name__}, which is the class of no family (known are {known}); register a family for it "
        "with any4_jax.models.families.register"
    )


def family_of_config(config: Any) -> Family:
    """The family that a config belongs to.

    Raises:
        TypeError: no family has exactly this class of configs.
    """
    for family in FAMILIES.values():
        if type(config) is family.config:
            return family
    known = ", ".join(family.config.__name__ for family in FAMILIES.values())
    raise TypeError(f"got a {type(config).__name__}, and the config of a family is needed; pass one of {known}")


def by_architecture(config: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        ValueError: none is registered for its architecture or, where it names none, for its model_type.
    """
    names, kind = config.get("architectures"), config.get("model_type")
    for family in FAMILIES.values():
        if set(names) <= set(family.architectures) if names else kind in family.model_types:
            return family
    if names:
        known = " and ".join(name for family in FAMILIES.values() for name in family.architectures)
        raise ValueError(f"architecture {', '.join(names)} is not supported, only {known}; convert the model")
    known = " and ".join(repr(name) for family in FAMILIES.values() for name in family.model_types)
    raise ValueError(f"config.json names no architecture and model_type {kind!r}, and only {known} is supported")


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


register(
    Family(
        name="llama",
        module=Llama,
        config=LlamaConfig,
        architectures=("LlamaForCausalLM",),
        model_types=("llama",),
        read_config=read_config,
    )
)
