"""Which kernel attends over a cache, and why, in words."""

from typing import Any

from any4_jax.kv_cache.base import Cache
from any4_jax.kv_cache.settings import PLAIN, AttentionSettings

NO_CHOICE = "xla: taken, as this cache has no other kernel"


def explain(cache: Cache, queries: Any, keys: Any, settings: AttentionSettings = PLAIN, *, platform: str) -> str:
    """Says for each backend, in a line, whether it takes the step `append_attend` on `platform`, or why it can't.

    Args:
        cache: of one block; its arrays, like the others, may be ShapeDtypeStructs.
        queries: [B, T, H, D].
        keys: [B, T, Hkv, D].
        settings: of the block.
        platform: one of `any4_jax.choice.PLATFORMS`.
    """
    choice = getattr(cache, "choice", None)
    if choice is None:
        return NO_CHOICE
    options, problem = choice(queries, keys, settings)
    return "\n".join(f"{option.name}: {verdict}" for option, verdict in options.verdicts(*problem, platform=platform))
