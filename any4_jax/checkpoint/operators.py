"""Converts operators and the settings of methods to plain JSON and named arrays, and back."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from any4_jax.methods.matrices import plain_note
from any4_jax.methods.spec import method_from_json, method_to_json
from any4_jax.surgery import Recipe, Training
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


def operator_from_spec(spec: Any, take: Callable[[str], jax.Array], name: str = "it") -> Any:
    """The inverse of `operator_spec`.

    Args:
      spec: what `operator_spec` returned.
      take: maps a name to its array.
      name: what the operator is called in messages.

    Raises:
      ValueError: the spec names an operator that is not registered, or doesn't have the fields of its class.
    """
    if isinstance(spec, list):
        return tuple(operator_from_spec(item, take, name) for item in spec)
    if not isinstance(spec, dict):
        return spec
    if "operator" not in spec:
        return take(spec["array"])
    kind, known = spec["operator"], operator_types()
    if kind not in known:
        raise ValueError(
            f"got an operator {kind!r}, and the registered ones are {', '.join(known)}; import the module that "
            "registers it, or upgrade any4_jax"
        )
    fields = {key: value for key, value in spec.items() if key != "operator"}
    declared = dataclasses.fields(known[kind])
    needed = {f.name for f in declared if f.default is f.default_factory is dataclasses.MISSING}
    lacking, unknown = sorted(needed - set(fields)), sorted(set(fields) - {f.name for f in declared})
    if lacking or unknown:
        wrong = f"lacks {lacking[0]!r}" if lacking else f"has no field {unknown[0]!r}"
        raise ValueError(f"{name}: its {kind} {wrong}; save it again, or upgrade any4_jax")
    return known[kind](**{key: operator_from_spec(value, take, name) for key, value in fields.items()})


def recipe_spec(recipe: Recipe) -> dict[str, Any]:
    """How a model was quantized, as JSON: the rules, the method, fields and notes of each linear, and what trained it,
    if anything did."""
    training = [{**dataclasses.asdict(each), "settings": dict(each.settings)} for each in recipe.training]
    return {
        "rules": [[pattern, method_to_json(method)] for pattern, method in recipe.rules],
        "linears": {
            path: {**(method_to_json(method) or {}), "notes": dict(notes)} for path, method, notes in recipe.linears
        },
        **({"training": training} if training else {}),
    }


def recipe_from_spec(spec: Mapping[str, Any]) -> Recipe:
    """The inverse of `recipe_spec`.

    Raises:
      ValueError: this version doesn't have a method or one of its fields, or a field or note has a value that it can't
        have.
    """
    rules = tuple((pattern, _method(entry, f"rule {pattern!r}")) for pattern, entry in spec["rules"])
    linears = [(path, _method(entry, path), _notes(entry["notes"])) for path, entry in sorted(spec["linears"].items())]
    training = tuple(
        Training(each["by"], _notes(each["settings"]), each["tokens"], each["passages"])
        for each in spec.get("training", ())
    )
    recipe = Recipe(rules, tuple(linears), training)
    try:
        hash(recipe)
    except TypeError as error:
        raise ValueError(f"its recipe has a note or a field of a kind that none has ({error}); save it again") from None
    return recipe


def _notes(entry: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    # JSON turned the tuples of notes into lists.
    return tuple(sorted((name, plain_note(note)) for name, note in entry.items()))


def _method(entry: Any, where: str) -> Any:
    try:
        return method_from_json(entry)
    except ValueError as error:
        raise ValueError(f"{where} of its recipe: {error}") from None
    # A method checks the values of its fields as it likes, and may be of another package.
    except Exception as error:
        raise ValueError(
            f"{where} of its recipe has fields that its method refuses ({type(error).__name__}: {error}); save it again"
        ) from None
