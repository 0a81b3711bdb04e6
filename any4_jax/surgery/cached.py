"""The attention of a decoder over its caches: which kernel each kind of block takes, and why."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from any4_jax import kv_cache
from any4_jax.kv_cache import PLAIN, AttentionSettings, Cache, CacheFactory, DenseCache, Rope, default_cache
from any4_jax.models import Decoder
from any4_jax.pytree import register_dataclass


def explain_attention(model: Decoder, factory: CacheFactory | None, rows: int, platform: str) -> list[str]:
    """A paragraph for each kind of block: what the step of one new token a row takes.

    Args:
      model: a step of it is traced, and nothing runs.
      factory: of the caches; None for the model's own, or the plain one.
      rows: B.
      platform: one of PLATFORMS.
    """
    factory = factory or default_cache(model) or DenseCache
    slots = model.config.max_position_embeddings
    seen: list[_Step] = []
    note = _Note(seen)

    def decode(model: Decoder) -> Any:
        caches: list[Any] = [_Watched(cache, note) for cache in model.init_cache(rows, slots, cache=factory)]
        return model.decode(jnp.zeros((rows, 1), jnp.int32), caches, jnp.zeros((rows, 1), jnp.int32))[0]

    jax.eval_shape(decode, model)
    # Blocks of one structure are traced once.
    return list(dict.fromkeys(step.told(_said(factory), slots, platform) for step in seen))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class _Step:
    """What the attention of a block handed to its cache; shapes stand for arrays."""

    cache: Cache
    queries: Any
    keys: Any
    rope: Rope | None = dataclasses.field(metadata=dict(static=True))
    settings: AttentionSettings = dataclasses.field(metadata=dict(static=True))

    def told(self, kind: str, slots: int, platform: str) -> str:
        heads, size = self.queries.shape[2:]
        settings = "".join(f", {each}" for each in _given(self.settings))
        shape = f"{heads} heads on {self.keys.shape[2]}, {size} channels, {slots} tokens{settings}"
        head = f"attention over {kind}  [{shape}]"
        text = kv_cache.explain(self.cache, self.queries, self.keys, self.rope, self.settings, platform=platform)
        return "\n".join([head, *(f"    {line}" for line in text.splitlines())])


class _Note:
    """Where steps are noted; each is another static field, so that nothing that was compiled before serves."""

    def __init__(self, steps: list[_Step]) -> None:
        self.steps = steps


@register_dataclass
@dataclasses.dataclass(frozen=True)
class _Watched:
    """A cache that notes what it is handed, and answers with zeros."""

    cache: Any
    note: _Note = dataclasses.field(metadata=dict(static=True))

    def append_attend(
        self,
        queries: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        positions: jax.Array,
        rope: Rope | None,
        settings: AttentionSettings = PLAIN,
    ) -> tuple[jax.Array, Any]:
        told = _Step(self.cache, queries, keys, rope, settings)
        self.note.steps.append(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), told))
        return jnp.zeros_like(queries), self


def _said(factory: Any) -> str:
    """A factory by its class, and the fields in which it differs from the usual one."""
    name = getattr(factory, "__name__", type(factory).__name__)
    plain = isinstance(factory, type) or not dataclasses.is_dataclass(factory)
    return name if plain else f"{name}({', '.join(_given(factory))})"


def _given(settings: Any) -> list[str]:
    """The fields of a dataclass that aren't as they are by default."""
    shown = [field for field in dataclasses.fields(settings) if field.repr]
    return [f"{f.name}={getattr(settings, f.name)!r}" for f in shown if getattr(settings, f.name) != f.default]
