"""The codes of a block of columns in sequence, each compensating the errors of those before it, over plain arrays."""

import functools

import jax
import jax.numpy as jnp

from cuda_ffi import registration

TARGETS = {"cpu": "any4_cpu_compensation", "cuda": "any4_cuda_compensation"}
MOST_COLUMNS = 128
"""The columns of one call; of more there are several calls, with a product between."""


def compensate(
    own: jax.Array,
    wanted: jax.Array,
    corner: jax.Array,
    table: jax.Array,
    scales: jax.Array,
    offsets: jax.Array | None,
    *,
    kind: str,
    uniform: bool,
    isa: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """(codes, errors) of B columns of N weights: column i takes the codes nearest to wanted_i + sum_{j<i} U_ji e_j.

    The error e_i of column i is own_i - (table[code] scale_i + offset_i). A weight's result depends on its own row
    alone. Under vmap over rows it stays one call, with more rows; over corners it becomes a loop.

    Args:
      own, wanted: float32 [B, N].
      corner: U, float32 [B, B], of which what is above the diagonal counts.
      table: float32 [N, 2**bits], 2 to 256 entries, ascending.
      scales: float32 [B, N]; a weight whose scale is zero has the code that is nearest to zero.
      offsets: like scales, or None.
      kind: which library, "cpu" or "cuda".
      uniform: the table is an arithmetic ramp, on which values are rounded, half to even. A value midway between two
        levels of another table takes the one farther from zero.
      isa: the instruction set of the cpu kind: "avx512", "avx2", "portable", or "auto" for the best that this processor
        has.

    Returns:
      codes uint8 [B, N], errors float32 [B, N].

    Raises:
      RuntimeError: the library can't be used; `registration.why_not(kind)` says why without raising.
    """
    registration.register(kind)
    call = _call(kind, uniform, isa)
    codes: list[jax.Array] = []
    errors: list[jax.Array] = []
    for start in range(0, max(own.shape[0], 1), MOST_COLUMNS):
        part = slice(start, start + MOST_COLUMNS)
        here = wanted[part]
        if start > 0:
            before = jnp.concatenate(errors)
            here = here + jnp.matmul(corner[:start, part].T, before, precision=jax.lax.Precision.HIGHEST)
        found = call(own[part], here, corner[part, part], table, *(a[part] for a in (scales, offsets) if a is not None))
        codes.append(found[0])
        errors.append(found[1])
    return jnp.concatenate(codes), jnp.concatenate(errors)


@functools.cache
def _call(kind: str, uniform: bool, isa: str):
    """The custom call on (own, wanted, corner, table, scales[, offsets]) with its rule for vmap."""
    attributes = {"uniform": uniform} | ({"isa": isa} if kind == "cpu" else {})

    @jax.custom_batching.custom_vmap
    def call(own, wanted, corner, table, scales, *offsets):
        # An array of no elements stands for absent offsets.
        given = offsets[0] if offsets else jnp.zeros((0, 0), jnp.float32)
        outputs = [jax.ShapeDtypeStruct(own.shape, jnp.uint8), jax.ShapeDtypeStruct(own.shape, jnp.float32)]
        return tuple(jax.ffi.ffi_call(TARGETS[kind], outputs)(own, wanted, corner, table, scales, given, **attributes))

    @call.def_vmap
    def _rule(axis_size, batched, *operands):
        whole = [a if b else jnp.broadcast_to(a, (axis_size, *a.shape)) for a, b in zip(operands, batched, strict=True)]
        if batched[2]:
            return jax.lax.map(lambda one: call(*one), tuple(whole)), (True, True)
        columns, rows = operands[0].shape[-2:]
        own, wanted, scales, *offsets = (
            jnp.moveaxis(a, 0, 1).reshape(columns, axis_size * rows) for a in (*whole[:2], *whole[4:])
        )
        table = whole[3].reshape(axis_size * rows, whole[3].shape[-1])
        found = call(own, wanted, operands[2], table, scales, *offsets)
        return tuple(jnp.moveaxis(a.reshape(columns, axis_size, rows), 1, 0) for a in found), (True, True)

    return call
