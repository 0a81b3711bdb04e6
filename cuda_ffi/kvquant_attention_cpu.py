"""Attention of one new token a row over a KVQuant cache that holds it already, on a CPU, over plain arrays.

Letters as in `kvquant_attention`.
"""

import jax

from cuda_ffi import kvquant_attention, registration
from cuda_ffi.dtypes import why_not as dtypes_why_not
from cuda_ffi.kvquant_attention import Factors, Held, call

TARGET = "any4_cpu_kvquant_attention"
CHUNK = 256
"""Tokens whose scores are computed at a time, as in csrc/cpu/attention.h."""
UNIT, MOST_SIZE = 32, 256


def why_not(heads: int, held: Held, *dtypes: jax.typing.DTypeLike) -> str | None:
    """None if the kernel takes H = `heads`, this cache, and queries of these dtypes; else the reason in words."""
    size = held.recent_keys.shape[-1]
    reason = dtypes_why_not(("float32", "bfloat16"), *dtypes, held.recent_keys.dtype)
    if reason is not None:
        return reason
    if size % UNIT or not 0 < size <= MOST_SIZE:
        return f"a head has {size} channels, which is no multiple of {UNIT} up to {MOST_SIZE}"
    return None


def chunks(held: Held) -> int:
    """How many chunks of CHUNK positions the cache has."""
    return kvquant_attention.chunks(held, CHUNK)


def attend(
    queries: jax.Array,
    held: Held,
    positions: jax.Array,
    near: Factors,
    far: Factors,
    *,
    bits: int,
    scale: float,
    softcap: float | None,
    window: int | None,
    isa: str = "auto",
) -> jax.Array:
    """Attends from position 0 of each row to the new token's, as `kvquant_attention.attend`.

    Queries and cache are float32 or bfloat16. Numbers of codes aren't rounded; all is computed in float32. Results
    don't depend on the number of threads.

    Args:
      isa: the instruction set: "avx512", "avx2", "portable", or "auto" for the best that this processor has.

    Raises:
      RuntimeError: the library can't be used; `registration.why_not("cpu")` says why without raising.
    """
    registration.register("cpu")
    output = jax.ShapeDtypeStruct(queries.shape, queries.dtype)
    operands = queries, held, positions, near, far
    return call(TARGET, output, *operands, bits=bits, scale=scale, softcap=softcap, window=window, isa=isa)
