"""What the attention kernels say of dtypes."""

import jax
import jax.numpy as jnp


def why_not(allowed: tuple[str, str], *dtypes: jax.typing.DTypeLike) -> str | None:
    """None if queries and cache have one dtype, which is allowed; else the reason in words."""
    kinds = list(dict.fromkeys(jnp.dtype(dtype).name for dtype in dtypes))
    if len(kinds) > 1:
        return f"the dtypes of queries and cache differ, {' and '.join(kinds)}"
    return None if kinds[0] in allowed else f"queries and cache are {kinds[0]}, not {' or '.join(allowed)}"
