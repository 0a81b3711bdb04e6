"""What a content may be, declared: its schemas 1 and 2, see `any4_jax.checkpoint.contents` and `schema1`.

A manifest that was edited may carry a right digest of itself, so nothing in it is believed before it is checked.
Whether an operator's arrays and fields belong together is the matter of `any4_jax.checkpoint.laws`.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Discriminator, Field, Tag

from any4_jax.checkpoint.manifest import check_depth
from any4_jax.schema import Schema, check

_ADVICE = "save it again"


class _Exact(Schema):
    """A schema without keys of other names."""

    model_config = pydantic.ConfigDict(extra="forbid")


class _Array(_Exact):
    """An array, by its name in the manifest."""

    array: str


class _Operator(Schema):
    """An operator, with its fields beside its name."""

    model_config = pydantic.ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, "_Value"]

    operator: str


class _Tuple(pydantic.RootModel[list["_Value"]]):
    """Several values in a field of an operator."""


def _kind_of_leaf(value: Any) -> str:
    return "an operator" if isinstance(value, Mapping) and "operator" in value else "an array"


def _kind_of_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return _kind_of_leaf(value)
    return "a tuple" if isinstance(value, list) else "a plain value"


_Leaf = Annotated[
    Annotated[_Array, Tag("an array")] | Annotated[_Operator, Tag("an operator")], Discriminator(_kind_of_leaf)
]
_Value = Annotated[
    Annotated[_Array, Tag("an array")]
    | Annotated[_Operator, Tag("an operator")]
    | Annotated[_Tuple, Tag("a tuple")]
    | Annotated[None | bool | int | float | str, Tag("a plain value")],
    Discriminator(_kind_of_value),
]


class _Dict(_Exact):
    """Trees by name."""

    named: Mapping[str, "_Tree"] = Field(alias="dict")


class _List(_Exact):
    """Trees in order."""

    ordered: list["_Tree"] = Field(alias="list")


class _Node(_Exact):
    """An array or an operator of a tree."""

    leaf: _Leaf


def _kind_of_tree(node: Any) -> str:
    return next((kind for kind in ("dict", "list") if isinstance(node, Mapping) and kind in node), "leaf")


_Tree = Annotated[
    Annotated[_Dict, Tag("a dict")] | Annotated[_List, Tag("a list")] | Annotated[_Node, Tag("a leaf")],
    Discriminator(lambda node: f"a {_kind_of_tree(node)}"),
]


class _Method(Schema):
    """A method and its fields; that of a linear has notes too."""

    method: str
    fields: dict[str, Any]


class _Linear(_Method):
    notes: dict[str, Any]


_Rules = tuple[tuple[str, _Method | None], ...]


class _Training(Schema):
    """What trained a model, and on what; `passages` is a sketch of the text."""

    by: str
    settings: dict[str, Any]
    tokens: int
    passages: Annotated[str, Field(pattern=r"^([0-9a-f]{16})*$")]


class _Recipe(Schema):
    rules: _Rules
    linears: dict[str, _Linear]
    training: tuple[_Training, ...] = ()


class _Recipe1(Schema):
    rules: _Rules
    layers: dict[str, _Linear]


class _Made(Schema):
    """What a model was: its class, and more for a Hugging Face model."""

    name: str = Field(alias="class")
    generation: dict[str, Any] | None = None
    repaired: bool = False


class _Cache(_Exact):
    """The cache that a model carries, see `any4_jax.kv_cache.catalogue`."""

    cache: str
    fields: dict[str, Any]
    tables: dict[str, dict[str, str]]


class Content2(Schema):
    """A content of schema 2."""

    family: str
    config: dict[str, Any] | None
    dtype: str | None
    tree: _Tree
    recipe: _Recipe | None
    model: _Made | None
    cache: _Cache | None = None


class Decoder1(Schema):
    """A decoder's content of schema 1."""

    config: dict[str, Any]
    dtype: str
    parameters: tuple[str, ...]
    layers: dict[str, _Leaf]
    recipe: _Recipe1 | None


class _Made1(_Made):
    kind: Literal["hf_flax", "nnx", "linen"]
    config: dict[str, Any] | None = None
    dtype: str | None = None


class Other1(Schema):
    """Any other model's content of schema 1; the earliest had neither recipe nor model."""

    tree: _Tree
    recipe: _Recipe1 | None = None
    model: _Made1 | None = None


def check_content(schema: type[Schema], content: Any) -> None:
    """Raise ValueError, which says where and what, unless a content is JSON of this schema."""
    check_depth(content, "the model's description is")
    try:
        json.dumps(content, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the model's description is not plain JSON ({error}); {_ADVICE}") from None
    check(schema, content, "the model's description", _ADVICE)
