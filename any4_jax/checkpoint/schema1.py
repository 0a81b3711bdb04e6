"""Converts manifest contents of schema 1, which had one form for decoders and another for the rest, to schema 2.

    {"kind": "llama", "config", "dtype", "parameters": [names], "layers": {path: operator}, "recipe"}
    {"kind": "tree", "tree", "recipe", "model": null or {"kind", "class", and "config", "dtype", ... of "hf_flax"}}

In both, what a recipe now calls "linears" was called "layers". The names of arrays stay the same: in a decoder, the
arrays of an operator were named "<path of the linear>/<field>".
"""

from collections.abc import Mapping
from typing import Any

from any4_jax.checkpoint.content_schema import Decoder1, Other1, check_content
from any4_jax.models import families

# Schema 1 knew one family of decoders.
_FAMILY = "llama"
# The only one of its modules whose matrix wasn't called "kernel".
_EMBEDDING = "embed_tokens"


def upgraded(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """A content of schema 1 in the form of schema 2; any other content unchanged.

    Raises:
      ValueError: it is not what schema 1 declares.
    """
    if content.get("kind") == _FAMILY:
        check_content(Decoder1, content)
        return _decoder(content)
    if content.get("kind") == "tree":
        check_content(Other1, content)
        return _other(content)
    return content


def _decoder(content: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {"dict": {}}
    for name in content["parameters"]:
        _put(tree, name.split("."), {"array": name})
    for path, operator in content["layers"].items():
        _put(tree, [*path.split("."), "embedding" if path == _EMBEDDING else "kernel"], operator)
    return {
        "family": _FAMILY,
        "config": content["config"],
        "dtype": content["dtype"],
        "tree": tree,
        "recipe": _recipe(content["recipe"]),
        "model": {"class": families.named(_FAMILY).module.__name__},
    }


def _other(content: Mapping[str, Any]) -> dict[str, Any]:
    # The earliest checkpoints of trees had neither.
    model, recipe = content.get("model"), content.get("recipe")
    known = dict(model or {"kind": "tree"})
    return {
        "family": known.pop("kind"),
        "config": known.pop("config", None),
        "dtype": known.pop("dtype", None),
        "tree": content["tree"],
        "recipe": _recipe(recipe),
        "model": known or None,
    }


def _recipe(recipe: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if recipe is None else {"rules": recipe["rules"], "linears": recipe["layers"]}


def _put(tree: dict[str, Any], keys: list[str], leaf: Any) -> None:
    """Adds a leaf to a tree's JSON.

    Raises:
      ValueError: the place is another leaf's, or lies within one.
    """
    for key in keys[:-1]:
        tree = tree["dict"].setdefault(key, {"dict": {}})
        if "dict" not in tree:
            break
    if keys[-1] in tree.get("dict", keys[-1:]):
        raise ValueError(f"the model's description has two leaves at {'.'.join(keys)}; save it again")
    tree["dict"][keys[-1]] = {"leaf": leaf}
