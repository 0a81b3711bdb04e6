"""Time of a decoding step against the length of the context, by the cache that holds it. Several caches take turns."""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.benchmarks import shapes
from any4_jax.benchmarks.timing import StreamingRead, significant, tree_bytes
from any4_jax.kv_cache import Cache, CacheFactory, DenseCache, Kivi, KVQuant, append_attend
from any4_jax.models.program import Program
from any4_jax.models.rope import Rope

CACHES: dict[str, CacheFactory] = {
    "dense": DenseCache,
    "kivi-4": Kivi(4),
    "kivi-2": Kivi(2),
    "kivi-4-64": Kivi(4, group_size=64),
    "kivi-2-64": Kivi(2, group_size=64),
    "kvquant-4": KVQuant(4),
    "kvquant-3": KVQuant(3),
    "kvquant-2": KVQuant(2),
}
"""The caches that are measured, by their bits; a second number is the group size where it is not the usual one."""
# What XLA calls of ours in a program.
_KERNEL = re.compile(r"@(any4_\w*attention)|__cudnn\$(fmha)")


@dataclasses.dataclass(frozen=True)
class CacheBench:
    """What to measure.

    Attributes:
      shape: a key of `shapes.CONFIGS`.
      method: a key of `shapes.METHODS`, of the linears of the model whose whole step is timed; None times attention
        alone.
      contexts: tokens that a cache holds at the first step.
      batch: rows.
      tokens: steps of a turn.
      rounds: turns of each cache.

    Raises:
      ValueError: a number is below 1, or the model's context is too short.
    """

    shape: str
    method: str | None
    contexts: tuple[int, ...]
    batch: int = 1
    tokens: int = 32
    rounds: int = 5

    def __post_init__(self) -> None:
        least = dict(contexts=min(self.contexts, default=0), batch=self.batch, tokens=self.tokens, rounds=self.rounds)
        for name, value in least.items():
            if value < 1:
                raise ValueError(f"got {name}={getattr(self, name)}, need 1 or more; raise it")
        most = shapes.CONFIGS[self.shape].max_position_embeddings
        if max(self.contexts) + self.tokens > most:
            raise ValueError(
                f"{self.shape} has a context of {most} tokens, and {max(self.contexts)} with {self.tokens} new ones "
                f"are {max(self.contexts) + self.tokens}; shorten the context or decode fewer"
            )


def run(
    names: Sequence[str],
    bench: CacheBench,
    *,
    stream: StreamingRead,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[dict[str, Any]]:
    """One row per context and cache, with medians over rounds. What the caches hold is random.

    Args:
      names: keys of `CACHES`; speeds are compared with the first.
      bench: what to measure.
      stream: measured before each context.
      progress: called with (done, total, what is next).
    """
    programs: dict[str, tuple[Callable[..., Any], Any]] = {"attention": (_attention(bench), ())}
    if bench.method is not None:
        program, leaves = Program.of(shapes.random_model(bench.shape, shapes.METHODS[bench.method]))
        programs["step"] = _step(program, bench), leaves
    rows: list[dict[str, Any]] = []
    done, total = 0, len(bench.contexts) * len(programs)
    for context in bench.contexts:
        played: dict[str, dict[str, _Player]] = {name: {} for name in names}
        for kind, (turn, leaves) in programs.items():
            progress(done, total, f"{kind}, {context} tokens")
            done += 1
            stream.measure()
            for name in names:
                played[name][kind] = _Player(name, bench, context, turn, leaves)
            for i in range(bench.rounds):
                for place in range(len(names)):
                    played[names[(i + place) % len(names)]][kind].turn()
            for name in names:
                # The next program's caches need the memory.
                played[name][kind].leave()
        rows += [_row(played[name], played[names[0]], name, context, bench) for name in names]
    return rows


def caches_of(name: str, bench: CacheBench, context: int) -> list[Cache]:
    """The caches of all blocks, with random numbers for `context` tokens and room for those of a turn."""
    config = shapes.CONFIGS[bench.shape]
    slots, factory = _slots(bench, context), CACHES[name]
    sizes = config.num_key_value_heads, config.head_dim
    if isinstance(factory, KVQuant):
        factory = factory.stand_in(config.num_hidden_layers, *sizes)

    def create(block: int) -> Cache:
        start = jnp.zeros(bench.batch, jnp.int32)
        empty = factory.create(block, bench.batch, slots, *sizes, start, jnp.bfloat16)
        return _filled(math.prod(sizes), empty, context, block)

    return [create(i) for i in range(config.num_hidden_layers)]


# One program for all blocks.
@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _filled(channels: int, cache: Any, context: Any, seed: Any) -> Cache:
    leaves, structure = jax.tree.flatten_with_path(cache)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def draw(path: Any, leaf: jax.Array, key: jax.Array) -> jax.Array:
        names = [part.name for part in path if isinstance(part, jax.tree_util.GetAttrKey)]
        if "channels" in names:
            return jax.random.randint(key, leaf.shape, 0, channels).astype(leaf.dtype)
        if leaf.dtype == jnp.uint8:
            return jax.random.bits(key, leaf.shape, jnp.uint8)
        floats = jnp.issubdtype(leaf.dtype, jnp.floating) and "levels" not in names
        return jax.random.normal(key, leaf.shape, leaf.dtype) / 8 if floats else leaf

    full = jax.tree.unflatten(structure, [draw(*leaf, key) for leaf, key in zip(leaves, keys, strict=True)])
    return dataclasses.replace(full, length=jnp.asarray(context, jnp.int32))


class _Player:
    """A cache in a program, which gives it back for the next turn."""

    def __init__(self, name: str, bench: CacheBench, context: int, turn: Callable[..., Any], leaves: Any) -> None:
        self._caches: list[Any] = caches_of(name, bench, context)
        self._leaves = leaves
        traced = jax.jit(turn, donate_argnums=0).lower(self._caches, leaves)
        found = {(match[1] or match[2]).removeprefix("any4_") for match in _KERNEL.finditer(traced.as_text())}
        self.kernel = " and ".join(sorted(found)) or "xla"
        self._call, self._length = traced.compile(), context
        self.nbytes = sum(tree_bytes(cache) for cache in self._caches)
        self.seconds: list[float] = []
        self.turn()
        self.seconds.clear()

    def turn(self) -> None:
        """Steps through the tokens once more, from the same length."""
        # An array of its own for each, which is given away.
        caches = [dataclasses.replace(cache, length=jnp.array(self._length, jnp.int32)) for cache in self._caches]
        jax.block_until_ready(caches)
        begin = time.perf_counter()
        _, self._caches = jax.block_until_ready(self._call(caches, self._leaves))
        self.seconds.append(time.perf_counter() - begin)

    def leave(self) -> None:
        """Frees the cache."""
        self._caches = []


def _attention(bench: CacheBench) -> Callable[..., Any]:
    """The attention of all blocks, one after another, for each token."""
    config = shapes.CONFIGS[bench.shape]
    rope = Rope(config.head_dim, config.rope_theta)

    # Traced once for all blocks.
    @jax.jit
    def attend(queries: jax.Array, keys: jax.Array, cache: Any, positions: jax.Array) -> Any:
        return append_attend(cache, queries, keys, keys, positions, rope)

    def turn(caches: list[Any], leaves: Any) -> Any:
        shape = bench.batch, 1, config.num_attention_heads, config.head_dim
        queries = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
        keys = queries[:, :, : config.num_key_value_heads]

        def one(_: Any, carry: Any) -> Any:
            queries, caches = carry
            done, positions = [], (caches[0].length - caches[0].start)[:, None]
            for cache in caches:
                queries, cache = attend(queries, keys, cache, positions)
                done.append(cache)
            return queries, done

        return jax.lax.fori_loop(0, bench.tokens, one, (queries, caches))

    return turn


def _step(program: Program, bench: CacheBench) -> Callable[..., Any]:
    """The whole model for each token, which is the likeliest."""

    def turn(caches: list[Any], leaves: Any) -> Any:
        model = program.model(leaves)

        def one(_: Any, carry: Any) -> Any:
            tokens, caches = carry
            positions = (caches[0].length - caches[0].start)[:, None]
            x, caches = model.decode(tokens, caches, positions)
            return model.head(x)[:, 0].argmax(axis=-1).astype(jnp.int32)[:, None], caches

        first = jnp.ones((bench.batch, 1), jnp.int32), caches
        return jax.lax.fori_loop(0, bench.tokens, one, first)

    return turn


def _row(
    players: Mapping[str, _Player], first: Mapping[str, _Player], name: str, context: int, bench: CacheBench
) -> Any:
    def ms(player: _Player) -> float:
        return 1e3 * float(np.median(player.seconds)) / bench.tokens

    one, whole = players["attention"], players.get("step")
    slots = _slots(bench, context)
    return {
        "cache": name,
        "context": context,
        "batch": bench.batch,
        "kernel": one.kernel,
        "bytes_per_token": significant(one.nbytes / slots / bench.batch),
        "bytes_ratio_to_first": significant(one.nbytes / first["attention"].nbytes),
        "attention_ms": significant(ms(one)),
        "attention_speed_ratio_to_first": significant(ms(first["attention"]) / ms(one)),
        "step_ms": None if whole is None else significant(ms(whole)),
        "step_speed_ratio_to_first": None if whole is None else significant(ms(first["step"]) / ms(whole)),
    }


def _slots(bench: CacheBench, context: int) -> int:
    return -(-(context + bench.tokens) // 64) * 64
