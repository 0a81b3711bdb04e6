"""Looks up the table entries of codes inside a Triton kernel: by byte permutation, or by loads from the table.

Triton has no table in registers: no gather, no indexing of values. Of three ways (H100, 8192 x 8192, one row of x), a
binary tree of selects takes 92 us; loads from the table at the code's place, which L1 answers, take 43; PRMT takes 26.

PRMT picks four bytes of eight by four nibbles. A row's sixteen entries are kept as four words of their low bytes and
four of their high bytes; a word of eight codes is its own selector. Three of a code's four bits select within a pair of
words; the fourth, moved to where PRMT looks, selects between the two results.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

ENTRIES = 16
# Elements that one piece of assembly takes: eight bytes of codes, in two registers.
_PACK = 8
# Which of the eight neighbouring elements of a lane belong to one row: all eight where codes were loaded along a row;
# each of these two sets where they lie as a tensor core takes them.
_SAME_ROW = ((0, 1, 4, 5), (2, 3, 6, 7))


def table_words(entry: Callable[[int], jax.Array]) -> list[jax.Array]:
    """Eight int32 [rows, 1]: words of the entries' low bytes, then words of their high bytes.

    Args:
      entry: maps a code to that entry of each row, [rows], bfloat16 or float16.
    """
    bits = [jax.lax.bitcast_convert_type(entry(code), jnp.uint16).astype(jnp.int32) for code in range(ENTRIES)]
    low, high = [], []
    for a, b, c, d in zip(bits[::4], bits[1::4], bits[2::4], bits[3::4], strict=True):
        even, odd = a | (c << 16), b | (d << 16)
        low.append((even & 0x00FF00FF) | ((odd & 0x00FF00FF) << 8))
        high.append((jax.lax.shift_right_logical(even, 8) & 0x00FF00FF) | (odd & jnp.int32(-0x00FF0100)))
    return [word[:, None] for word in (*low, *high)]


def permuted(codes: jax.Array, rows: jax.Array, words: Sequence[jax.Array], part: str, dtype) -> jax.Array:
    """The table entries of the codes in each byte.

    Args:
      codes: uint8 [rows, bytes], two codes a byte.
      rows: int32 [rows], different for different rows.
      words: from `table_words`.
      part: "pairs" for both entries in an int32, the first in its lower half; "even" or "odd" for one of them.
      dtype: that of the table; "pairs" ignores it.
    """
    spread = [jnp.broadcast_to(word, codes.shape) for word in (rows[:, None], *words)]
    text, constraints = _assembly(part)
    (entries,) = plt.elementwise_inline_asm(
        text,
        args=[codes, *spread],
        constraints=constraints,
        pack=_PACK,
        result_shape_dtypes=[jax.ShapeDtypeStruct(codes.shape, jnp.int32 if part == "pairs" else dtype)],
    )
    return entries


@functools.cache
def _assembly(part: str) -> tuple[str, str]:
    """PTX and LLVM's constraints: results, two registers of codes, then eight registers for rows and for each word."""
    results = _PACK if part == "pairs" else _PACK // 2
    row = [f"${results + 2 + element}" for element in range(_PACK)]
    word = [[f"${results + 2 + _PACK * (1 + i) + element}" for element in range(_PACK)] for i in range(8)]
    lines = []
    # If a compiler laid elements out differently, the product would be wrong; this turns that into an error. It costs
    # nothing: where rows are the same, they are the same register, and the comparison is folded away.
    for first, *others in _SAME_ROW:
        for other in others:
            lines += [f"setp.ne.s32 differ, {row[first]}, {row[other]};", "@differ trap;"]
    for (first, *_), halves in zip(_SAME_ROW, ("0x5410", "0x7632"), strict=True):
        lines.append(f"prmt.b32 codes, ${results}, ${results + 1}, {halves};")
        lines.append("and.b32 select, codes, 0x77777777;")
        lines.append("shr.b32 choose, codes, 1;")
        lines.append("lop3.b32 choose, choose, 0x44444444, 0x32103210, 0xEA;")  # (a & b) | c
        for half in range(2):
            for name, plane in (("low", word[:4]), ("high", word[4:])):
                a, b, c, d = (registers[first] for registers in plane)
                lines.append(f"prmt.b32 {name}, {a}, {b}, select;")
                lines.append(f"prmt.b32 upper, {c}, {d}, select;")
                lines.append(f"prmt.b32 {name}, {name}, upper, choose;")
            pair = 2 * half + first // 2
            if part == "pairs":
                lines.append(f"prmt.b32 ${2 * pair}, low, high, 0x5140;")
                lines.append(f"prmt.b32 ${2 * pair + 1}, low, high, 0x7362;")
            else:
                lines.append(f"prmt.b32 ${pair}, low, high, {'0x6240' if part == 'even' else '0x7351'};")
            if half == 0:
                lines += ["shr.b32 select, select, 16;", "shr.b32 choose, choose, 16;"]
    text = "{.reg .b32 codes, select, choose, upper, low, high; .reg .pred differ;\n" + "\n".join(lines) + "\n}"
    return text, ",".join(["=&r"] * results + ["r"] * (2 + _PACK * 9))


def halves(pairs: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """float32 values of the lower and upper halves of int32 `pairs`, which are of `dtype`, bfloat16 or float16."""
    if dtype == jnp.bfloat16:
        return (
            jax.lax.bitcast_convert_type(pairs << 16, jnp.float32),
            jax.lax.bitcast_convert_type(pairs & jnp.int32(-0x10000), jnp.float32),
        )
    lower, upper = pairs.astype(jnp.uint16), jax.lax.shift_right_logical(pairs, 16).astype(jnp.uint16)
    return tuple(jax.lax.bitcast_convert_type(half, dtype).astype(jnp.float32) for half in (lower, upper))  # type: ignore[return-value]


def codes_of(loaded: Sequence[jax.Array], columns: jax.Array, bits: int) -> list[jax.Array]:
    """The codes, int32, that start in each byte of the first plane, in order.

    Args:
      loaded: for each plane, the bytes with the codes of these bytes of the first plane: uint8 [rows, bytes].
      columns: int32 [1, bytes], the numbers of these bytes.
    """
    if bits == 3:
        low, high = (plane.astype(jnp.int32) for plane in loaded)
        upper = jax.lax.shift_right_logical(high, jnp.broadcast_to(4 * (columns % 2), high.shape))
        return [((low >> (2 * i)) & 3) | (((upper >> i) & 1) << 2) for i in range(4)]
    byte = loaded[0].astype(jnp.int32)
    return [(byte >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)]
