"""Caches by name, and the one that a model carries."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from any4_jax.kv_cache.base import CacheFactory, traceable
from any4_jax.kv_cache.dense import DenseCache
from any4_jax.kv_cache.kivi import Kivi
from any4_jax.kv_cache.kvquant import KVQuant

CATALOGUE: dict[str, type] = {"kvquant": KVQuant, "kivi": Kivi}
"""Cache factories by name: dataclasses whose fields are plain values, or arrays in a NamedTuple that the class names in
`TABLES`. Add your own, and manifests and the command line will know it."""


@dataclasses.dataclass(frozen=True, eq=False)
class DefaultCache:
    """What a model's `cache` holds: the factory of the caches that are used where no other is asked for.

    It is compared by identity, so that a model, of which it is a static part, stays hashable.
    """

    factory: CacheFactory


def default_cache(model: Any) -> CacheFactory | None:
    """The factory that a model carries, from its checkpoint, or None."""
    held = getattr(model, "cache", None)
    return held.factory if isinstance(held, DefaultCache) else None


def cache_to_json(cache: CacheFactory | None, arrays: dict[str, Any]) -> dict[str, Any] | None:
    """A factory as {"cache": name, "fields": plain values, "tables": {field: {name: array's name}}}; None for none and
    for the plain cache. Adds the arrays to `arrays`.

    Raises:
      ValueError: the factory is not in the catalogue.
    """
    if cache is None or cache is DenseCache:
        return None
    name = next((name for name, kind in CATALOGUE.items() if kind is type(cache)), None)
    if name is None:
        kind = getattr(cache, "__name__", type(cache).__name__)
        raise ValueError(
            f"got the cache {kind}, which a checkpoint is read without unless kv_cache.CATALOGUE has it; add it there"
        )
    fields = {f.name: getattr(cache, f.name) for f in dataclasses.fields(cache)}  # type: ignore[arg-type]
    tables = {field: fields.pop(field) for field in _tables(type(cache))}
    named = {
        field: {key: f"kv_cache/{field}/{key}" for key in table._fields}
        for field, table in tables.items()
        if table is not None
    }
    for field, keys in named.items():
        arrays |= {place: getattr(tables[field], key) for key, place in keys.items()}
    return {"cache": name, "fields": fields, "tables": named}


def cache_from_json(spec: Mapping[str, Any], take: Any, blocks: int, heads: int, head_dim: int) -> CacheFactory:
    """The inverse of `cache_to_json`, for a model with so many blocks, key/value heads and channels of a head.

    Args:
      spec: what `cache_to_json` returned.
      take: maps a name to its array.
      blocks, heads, head_dim: of the model.

    Raises:
      ValueError: this version doesn't have the cache or a field of it, or its arrays don't fit.
    """
    kind = CATALOGUE.get(spec["cache"])
    if kind is None:
        raise ValueError(
            f"got a cache {spec['cache']!r}, this version knows {', '.join(CATALOGUE)}; upgrade any4_jax, or import "
            "the module that adds it to kv_cache.CATALOGUE"
        )
    known, types = {f.name for f in dataclasses.fields(kind)}, _tables(kind)
    unknown = sorted(set(spec["fields"]) - known | set(spec["tables"]) - set(types))
    if unknown:
        raise ValueError(f"its cache {spec['cache']!r} has no field {unknown[0]!r} in this version; upgrade any4_jax")
    try:
        tables = {name: types[name](**{k: take(v) for k, v in x.items()}) for name, x in spec["tables"].items()}
        cache: CacheFactory = kind(**spec["fields"], **tables)
    except (ValueError, TypeError) as error:
        raise ValueError(f"its cache {spec['cache']!r} can't be made of its fields ({error}); save it again") from None

    # Its arrays may stand for those to come.
    try:
        check_creates(cache, blocks, heads, head_dim)
    except Exception as error:
        raise ValueError(f"its cache {spec['cache']!r} doesn't fit the model ({error}); save it again") from None
    return cache


def check_creates(cache: CacheFactory, blocks: int, heads: int, head_dim: int) -> None:
    """Raises what the factory raises if it can't create the caches of a model with so many blocks, key/value heads and
    channels of a head: because it has learned nothing yet, or from another model."""

    def create(cache: CacheFactory, start: jax.Array) -> Any:
        return [cache.create(block, 1, 1, heads, head_dim, start, "float32") for block in (0, blocks - 1)]

    jax.eval_shape(create, traceable(cache), jax.ShapeDtypeStruct((1,), "int32"))


def _tables(kind: type) -> Mapping[str, Any]:
    return getattr(kind, "TABLES", {})
