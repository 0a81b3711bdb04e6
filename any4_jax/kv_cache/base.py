"""The protocol between the attention of a block and its cache.

Letters: B rows of the batch, T new tokens, S slots of the cache, H query heads, Hkv key/value heads, D head
size.

A *slot* is a place in the cache; all rows of a batch write to the same slots. Prompts of unequal length are
padded on the left, so the first token of row b is in slot `start[b]`, and the rotary embedding uses

    position = slot - start[b]

A negative position marks padding.

Attention passes keys and queries *before* their rotation, because a cache may store keys unrotated (each channel
then keeps a steady scale, which quantizes better) and rotate them when it reads them.
"""

import dataclasses
import inspect
from typing import Any, Protocol, Self, TypeGuard, cast, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from any4_jax.kv_cache.settings import PLAIN, AttentionSettings
from any4_jax.pytree import register_dataclass


class Rope(Protocol):
    """A rotary position embedding."""

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotate x [B, T, heads, D] by the angles of positions int32 [B, T]; returns the shape and dtype of x."""
        ...


@runtime_checkable
class PairRope(Rope, Protocol):
    """A rope that is `rotate_pairs` with the factors of its own: a kernel that rotates asks for these.

    It may have an attribute `is_linear`, true where its angles are proportional to the position, whatever the text.
    """

    def factors(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(cos, sin), float32 [B, T, D/2], of positions int32 [B, T]."""
        ...


def is_pair_rope(rope: Rope | None) -> TypeGuard[PairRope]:
    """Whether a kernel may rotate by the rope's factors: it has some, and no subclass of it rotates otherwise."""
    return isinstance(rope, PairRope) and written_for(type(rope), "factors", "rotate")


def is_linear_rope(rope: Rope | None) -> bool:
    """Whether a kernel may put angles together from those of other positions, or there are none."""
    return rope is None or (is_pair_rope(rope) and bool(getattr(rope, "is_linear", False)))


def rotate_pairs(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [B, T, heads, D] with the channel pair (a, b) = (i, i + D/2) as (a cos_i - b sin_i, b cos_i + a sin_i).

    It computes in float32 and returns x's dtype; cos and sin are float32 [B, T, D/2].
    """
    # Without a barrier XLA recomputes both for every head, in the fusion that rotates.
    cos, sin = jax.lax.optimization_barrier((cos[:, :, None], sin[:, :, None]))
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


def rotated(x: jax.Array, positions: jax.Array, rope: Rope | None) -> jax.Array:
    """x [B, T, heads, D] rotated by `rope`; x itself if the model has no rope."""
    return x if rope is None else rope.rotate(x, positions)


@runtime_checkable
class Cache(Protocol):
    """The keys and values of one block: an immutable pytree whose shapes never change.

    A cache may define `append_attend` too, with the arguments and results of the function of that name, where it does
    both at once in less time, and `choice(queries, keys, rope, settings)`: the `Choice` among kernels that this makes,
    and the problem that it asks them about, for `explain`. It may define `with_slots(slots)`, which gives the same
    tokens in a cache of more slots: then a text that grows in turns begins with few.
    """

    def append(self, keys: jax.Array, values: jax.Array, positions: jax.Array, rope: Rope | None) -> Self:
        """A cache that holds T new tokens as well.

        Args:
            keys, values: [B, T, Hkv, D], keys not rotated.
            positions: int32 [B, T].
            rope: the rotation that belongs to these keys; None in a model without one.

        Raises:
            ValueError: T exceeds the number of slots. How many slots are in use is known only when the program runs,
                so the caller must see to it that all appends together fit.
        """
        ...

    def attend(
        self, queries: jax.Array, positions: jax.Array, rope: Rope | None, settings: AttentionSettings = PLAIN
    ) -> jax.Array:
        """Causal attention over all tokens that were appended; `kv_cache.attention` has the mathematics.

        A query sees the tokens of its row whose position is at most its own, or the last `settings.window` of them.

        Args:
            queries: [B, T, H, D], not rotated; H is a multiple of Hkv.
            positions: int32 [B, T], of the queries.
            rope: the rotation of queries and keys; None in a model without one.
            settings: scale, softcap and window.

        Returns:
            [B, T, H, D] in the queries' dtype. Rows of padding are finite but meaningless.
        """
        ...


def append_attend(
    cache: Cache,
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    rope: Rope | None,
    settings: AttentionSettings = PLAIN,
) -> tuple[jax.Array, Cache]:
    """Appends T new tokens and attends from them: (`attend`'s result [B, T, H, D], the cache that holds them).

    It is `append`, then `attend`, unless the cache's class does both by its own `append_attend`. A subclass that
    overrides one of the two is not bypassed: it has to override `append_attend` as well to be called by it.

    Args:
        cache: of the block.
        queries, keys, values, positions, rope, settings: as for `Cache.append` and `Cache.attend`.

    Raises:
        ValueError: as in `Cache.append`.
    """
    if written_for(type(cache), "append_attend", "append", "attend"):
        return cast(Any, cache).append_attend(queries, keys, values, positions, rope, settings)
    cache = cache.append(keys, values, positions, rope)
    return cache.attend(queries, positions, rope, settings), cache


def written_for(kind: type, name: str, *others: str) -> bool:
    """Whether a class has a method `name` that stands for its own `others`: no subclass since has overridden these."""
    order = kind.__mro__

    def place(name: str) -> int:
        return next((i for i, each in enumerate(order) if name in vars(each)), len(order))

    return place(name) < len(order) and place(name) <= min(map(place, others))


class CacheFactory(Protocol):
    """Creates the caches of a model, one for each block: a cache class, or an object with settings and tables.

    A factory that holds arrays is a pytree, usually a frozen dataclass registered with
    `any4_jax.pytree.register_dataclass`. Its arrays are traced, so new tables need no recompilation; its settings are
    static fields. A factory without arrays may be any hashable object.

    A factory may define `as_decoded` too, as the function of that name has it, if its caches don't show several tokens
    that come together what each would see alone.
    """

    def create(
        self, block: int, batch: int, length: int, heads: int, head_dim: int, start: jax.Array, dtype: DTypeLike
    ) -> Cache:
        """The empty cache of one block.

        Blocks share one compiled program if their caches have equal structure, shapes and dtypes.

        Args:
            block: the index of the block, from 0.
            batch: B.
            length: S, the slots.
            heads: Hkv.
            head_dim: D.
            start: int32 [B], the first slot of each row that holds no padding.
            dtype: of the model's activations.
        """
        ...


def as_decoded(factory: CacheFactory) -> CacheFactory:
    """The factory whose caches show each of several tokens that come together what it would see if they came one by
    one: what a measurement in one pass needs. It is the factory itself unless it defines `as_decoded`."""
    own = getattr(factory, "as_decoded", None)
    return factory if own is None else own()


@register_dataclass
@dataclasses.dataclass(frozen=True)
class StaticFactory:
    """A pytree without arrays that wraps a factory which is not a pytree."""

    factory: CacheFactory = dataclasses.field(metadata=dict(static=True))

    def create(self, *args: Any, **kwargs: Any) -> Cache:
        """What the factory creates."""
        return self.factory.create(*args, **kwargs)


def traceable(factory: CacheFactory) -> CacheFactory:
    """The factory in a form that a jitted function takes: its arrays are traced, all else is static.

    Raises:
        TypeError: the factory has no `create`, is a class whose `create` needs an instance, or is neither a pytree nor
            hashable.
    """
    if not callable(getattr(factory, "create", None)):
        raise TypeError(
            f"the cache factory is a {type(factory).__name__}, and an object with a method `create` is needed; pass a "
            "cache class, such as DenseCache, or a CacheFactory"
        )
    unbound = inspect.isfunction(inspect.getattr_static(factory, "create", None))
    if isinstance(factory, type) and unbound:
        raise TypeError(f"the cache factory is the class {factory.__name__}, and an instance is needed; call the class")
    if not jax.tree_util.all_leaves([factory]):
        return factory
    try:
        hash(factory)
    except TypeError:
        raise TypeError(
            f"the cache factory is a {type(factory).__name__}, which is neither a pytree nor hashable; "
            "register its class with any4_jax.pytree.register_dataclass"
        ) from None
    return StaticFactory(factory)
