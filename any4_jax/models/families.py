"""The families of decoders, by name: where loading, checkpoints and generation find all that depends on the model.

To add a family, `register` its row: here, or from any package before the first use.
"""

from collections.abc import Mapping
from typing import Any

from any4_jax.models.family import GGUF, Family
from any4_jax.models.llama_family import LLAMA

__all__ = [
    "FAMILIES",
    "GGUF",
    "WITHOUT_FAMILY",
    "Family",
    "by_architecture",
    "by_gguf",
    "family_of",
    "family_of_config",
    "named",
    "register",
]

WITHOUT_FAMILY = ("hf_flax", "nnx", "linen", "tree")
"""What checkpoints say in the place of a family for models that are no decoders of this library."""

FAMILIES: dict[str, Family] = {}
"""Name -> family; `register` adds to it."""


def register(family: Family) -> Family:
    """Makes a family known.

    Raises:
        ValueError: its name, module, config, an architecture or a model type is another family's, or its name is one
            of WITHOUT_FAMILY.
    """
    if family.name in WITHOUT_FAMILY:
        raise ValueError(f"got family name {family.name!r}, which checkpoints use for models of none; take another")
    for other in FAMILIES.values():
        for field in ("name", "module", "config"):
            if getattr(other, field) == getattr(family, field):
                raise ValueError(
                    f"the {field} of family {family.name!r} is that of family {other.name!r}; give it its own"
                )
        for names, others in ((_hf_names(family), _hf_names(other)), (_gguf_names(family), _gguf_names(other))):
            if taken := sorted(set(names) & set(others)):
                raise ValueError(
                    f"family {family.name!r} claims {', '.join(taken)}, which family {other.name!r} has; leave it out"
                )
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
        TypeError: no family has exactly this class. A subclass is refused too: it may compute something else than its
            base, as which it would be saved.
    """
    for family in FAMILIES.values():
        if type(model) is family.module:
            return family
    known = ", ".join(family.module.__name__ for family in FAMILIES.values())
    raise TypeError(
        f"got a {type(model).__name__}, which is the class of no family (known are {known}); register a family for it "
        "with any4_jax.models.register"
    )


def family_of_config(config: Any) -> Family:
    """The family that a config belongs to.

    Raises:
        TypeError: no family has exactly this class of configs.
    """
    for family in FAMILIES.values():
        if type(config) is family.config:
            return family
    known = " or ".join(family.config.__name__ for family in FAMILIES.values())
    raise TypeError(f"got a {type(config).__name__}, and the config of a family is needed; pass a {known}")


def by_architecture(config: Mapping[str, Any]) -> Family:
    """The family of a config.json of Hugging Face.

    Raises:
        ValueError: none has its architecture or, where it names none, its model_type.
    """
    names, kind = config.get("architectures"), config.get("model_type")
    for family in FAMILIES.values():
        if set(names) <= set(family.architectures) if names else kind in family.model_types:
            return family
    if names:
        known = ", ".join(name for family in FAMILIES.values() for name in family.architectures)
        raise ValueError(f"architecture {', '.join(names)} is not supported, only {known}; convert the model")
    known = ", ".join(repr(name) for family in FAMILIES.values() for name in family.model_types)
    raise ValueError(
        f"config.json names no architecture and model_type {kind!r}, which is not supported, only {known}; take the "
        "config.json of another model"
    )


def by_gguf(architecture: Any) -> tuple[Family, GGUF]:
    """The family of a GGUF file's "general.architecture", and its GGUF row.

    Raises:
        ValueError: there is none.
    """
    for family in FAMILIES.values():
        if family.gguf is not None and family.gguf.architecture == architecture:
            return family, family.gguf
    known = ", ".join(repr(name) for family in FAMILIES.values() for name in _gguf_names(family))
    raise ValueError(f"architecture {architecture!r} is not supported, only {known}; convert the model")


def _hf_names(family: Family) -> tuple[str, ...]:
    return (*family.architectures, *family.model_types)


def _gguf_names(family: Family) -> tuple[str, ...]:
    return () if family.gguf is None else (family.gguf.architecture,)


register(LLAMA)
