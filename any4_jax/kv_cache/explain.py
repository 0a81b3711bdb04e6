"""Which kernel attends over a cache, and why, in words."""

from typing import Any, cast

from any4_jax.kv_cache.base import Cache, Rope, written_for
from any4_jax.kv_cache.settings import PLAIN, AttentionSettings

NO_CHOICE = "xla: taken, as this cache has no other kernel"


def explain(
    cache: Cache,
    queries: Any,
    keys: Any,
    rope: Rope | None = None,
    settings: AttentionSettings = PLAIN,
    *,
    platform: str,
) -> str:
    """Says for each backend, in a line, whether it takes the step `append_attend` on `platform`, or why it can't.

    Args:
        cache: of one block; its arrays, like the others, may be ShapeDtypeStructs.
        queries: [B, T, H, D].
        keys: [B, T, Hkv, D].
        rope, settings: of the block.
        platform: one of `any4_jax.choice.PLATFORMS`.
    """
    # A subclass that attends otherwise doesn't make the choice of the class above it.
    if not written_for(type(cache), "choice", "append", "attend", "append_attend"):
        return NO_CHOICE
    options, problem = cast(Any, cache).choice(queries, keys, rope, settings)
    return "\n".join(f"{option.name}: {verdict}" for option, verdict in options.verdicts(*problem, platform=platform))
