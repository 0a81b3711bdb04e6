"""Converts operators and the settings of methods to plain JSON and named arrays, and back."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from any4_jax.methods.matrices import plain_note
from any4_jax.methods.spec import method_from_json, method_to_json
from any4_jax.surgery import Recipe
from any4_jax.weights import is_operator, operator_types


def operator_spec(operator: Any, name: str, arrays: dict[str, jax.Array]) -> Any:
    """JSON that describes an operator. Adds the operator's arrays to `arrays` under `name`/field.

    Raises:
      TypeError: a field holds something other than an array, an operator, a tuple of these, or a plain value.
    """
    if is_operator(operator):
        fields = {
            f.name: operator_spec(getattr(operator, f.name), f"{name}/{f.name}", arrays)
            for f in dataclasses.fields(operator)
        }
        return {"operator": type(operator).__name__, **fields}
    if isinstance(operator, tuple):
        return [operator_spec(item, f"{name}/{i}", arrays) for i, item in enumerate(operator)]
    if operator is None or isinstance(operator, bool | int | float | str):
        return operator
    if not hasattr(operator, "dtype"):
        raise TypeError(
            f"{name}: got a {type(operator).__name__}, and a checkpoint takes arrays, operators, tuples of these, "
            "numbers and strings; register the operator with such fields"
        )
    arrays[name] = operator
    return {"array": name}


def operator_from_spec(spec: Any, take: Callable[[str], jax.Array]) -> Any:
    """The inverse of `operator_spec`; `take` maps a name to its array.

    Raises:
      ValueError: the spec names an operator that is not registered.
    """
    if isinstance(spec, list):
        return tuple(operator_from_spec(item, take) for item in spec)
    if not isinstance(spec, dict):
        return spec
    if "operator" not in spec:
        return take(spec["array"])
    name, known = spec["operator"], operator_types()
    if name not in known:
        raise ValueError(
            f"got an operator {name!r}, and the registered ones are {', '.join(known)}; import the module that "
            "registers it, or upgrade any4_jax"
        )
    return known[name](**{key: operator_from_spec(value, take) for key, value in spec.items() if key != "operator"})


def recipe_spec(recipe: Recipe) -> dict[str, Any]:
    """How a model was quantized, as JSON: the rules, and the method, fields and notes of each linear."""
    return {
        "rules": [[pattern, method_to_json(method)] for pattern, method in recipe.rules],
        "linears": {
            path: {**(method_to_json(method) or {}), "notes": dict(notes)} for path, method, notes in recipe.linears
        },
    }


def recipe_from_spec(spec: Mapping[str, Any]) -> Recipe:
    """The inverse of `recipe_spec`.

    Raises:
      ValueError: this version doesn't have the method, or one of its fields.
    """
    linears = []
    for path, entry in sorted(spec["linears"].items()):
        method = method_from_json(entry)
        assert method is not None
        # JSON turned the tuples of notes into lists.
        notes = {name: plain_note(note) for name, note in entry["notes"].items()}
        linears.append((path, method, tuple(sorted(notes.items()))))
    return Recipe(tuple((pattern, method_from_json(entry)) for pattern, entry in spec["rules"]), tuple(linears))
