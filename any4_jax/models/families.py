"""The families of decoders by name: loading, checkpoints and generation find here all that depends on the model.

To add a family, `register` its row, either here or in any package before its first use.
"""

from collections.abc import Mapping
from typing import Any

from any4_jax.models.family import GGUF, Family
from any4_jax.models.gemma_family import GEMMA2, GEMMA3
from any4_jax.models.llama_family import LLAMA
from any4_jax.models.mistral import MISTRAL
from any4_jax.models.mixtral import MIXTRAL
from any4_jax.models.opt_family import OPT_FAMILY
from any4_jax.models.qwen import QWEN2, QWEN3
from any4_jax.models.qwen3_moe import QWEN3_MOE
from any4_jax.schema import Name, Schema, check

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
"""What checkpoints say in place of a family for a model that is not a decoder of this library."""


class _Named(Schema):
    """How config.json names the model."""

    architectures: tuple[Name, ...] | None = None
    model_type: Name | None = None


FAMILIES: dict[str, Family] = {}
"""Name -> family; `register` adds to it."""


def register(family: Family) -> Family:
    """Adds a family to FAMILIES, and returns it.

    Raises:
        ValueError: another family has its name, config, or one of its architectures or model types; or its name is
            one of WITHOUT_FAMILY.
    """
    if family.name in WITHOUT_FAMILY:
        raise ValueError(
            f"got family name {family.name!r}, which checkpoints use for models without a family; choose another"
        )
    for other in FAMILIES.values():
        for field in ("name", "config"):
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
    """The family with this name.

    Raises:
        ValueError: no family has it.
    """
    if name not in FAMILIES:
        raise ValueError(
            f"got family {name!r}, and the registered families are {', '.join(FAMILIES)}; register it, or upgrade "
            "any4_jax"
        )
    return FAMILIES[name]


def family_of(model: Any) -> Family:
    """The family that a model belongs to.

    Raises:
        TypeError: no family has exactly this class with a config of exactly this class. A subclass is refused too: it
            would be saved as its base, and may compute something else.
    """
    for family in FAMILIES.values():
        if type(model) is family.module and type(model.config) is family.config:
            return family
    known = ", ".join(dict.fromkeys(family.module.__name__ for family in FAMILIES.values()))
    raise TypeError(
        f"got a {type(model).__name__}, which belongs to no family (the families have {known}); register a family for "
        "it with any4_jax.models.register"
    )


def family_of_config(config: Any) -> Family:
    """The family that a config belongs to.

    Raises:
        TypeError: no family has exactly this class of config.
    """
    for family in FAMILIES.values():
        if type(config) is family.config:
            return family
    known = " or ".join(family.config.__name__ for family in FAMILIES.values())
    raise TypeError(f"got a {type(config).__name__}, and the config of a family is needed; pass a {known}")


def by_architecture(config: Mapping[str, Any]) -> Family:
    """The family of a config.json of Hugging Face.

    Raises:
        ValueError: no family has its architecture or, if it names none, its model_type.
    """
    named = check(_Named, config, "config.json", "take the file that belongs to the weights")
    names, kind = named.architectures, named.model_type
    for family in FAMILIES.values():
        if set(names) <= set(family.architectures) if names else kind in family.model_types:
            return family
    if names:
        known = ", ".join(name for family in FAMILIES.values() for name in family.architectures)
        raise ValueError(f"architecture {', '.join(names)} is not supported (supported: {known}); convert the model")
    known = ", ".join(repr(name) for family in FAMILIES.values() for name in family.model_types)
    raise ValueError(
        f"config.json names no architecture, and its model_type {kind!r} is not supported (supported: {known}); take "
        "the config.json of another model"
    )


def by_gguf(architecture: Any, experts: bool = False) -> tuple[Family, GGUF]:
    """The family of a GGUF file's "general.architecture", and its GGUF row.

    Args:
        architecture: what the file says.
        experts: whether it has experts.

    Raises:
        ValueError: no family has this architecture, with experts or without.
    """
    for family in FAMILIES.values():
        if family.gguf is not None and (family.gguf.architecture, family.gguf.experts) == (architecture, experts):
            return family, family.gguf
    known = ", ".join(repr(name) for family in FAMILIES.values() for name in _gguf_names(family))
    architecture = f"{architecture} with experts" if experts else architecture
    raise ValueError(f"architecture {architecture!r} is not supported (supported: {known}); convert the model")


def _hf_names(family: Family) -> tuple[str, ...]:
    return (*family.architectures, *family.model_types)


def _gguf_names(family: Family) -> tuple[str, ...]:
    if family.gguf is None:
        return ()
    return (family.gguf.architecture + " with experts" * family.gguf.experts,)


for _family in (LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, GEMMA2, GEMMA3, OPT_FAMILY):
    register(_family)
