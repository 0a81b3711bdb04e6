"""Add a format: 4-bit levels that are powers of two, so that a product is a shift.

Run: python examples/add_format.py

On the command line: PYTHONPATH=examples any4 quantize MODEL OUT --import add_format --method log4
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

import any4_jax as a4
from any4_jax.formats import Format
from any4_jax.methods import CATALOGUE, NF4
from any4_jax.methods.rtn import RoundToNearest

MAGNITUDES = [2.0**-power for power in range(7, -1, -1)]  # 1/128 ... 1
LEVELS = (*(-m for m in reversed(MAGNITUDES[1:])), 0.0, *MAGNITUDES)  # 16, ascending


@dataclasses.dataclass(frozen=True)
class Log4(RoundToNearest):
    """Powers of two, scaled by the group's max|w|. A format is a table, and nothing else has to be told."""

    name: ClassVar[str] = "log4"

    def format(self, k: int) -> Format:
        return Format(bits=4, levels=LEVELS, rule="absmax")


CATALOGUE[Log4.name] = Log4

if __name__ == "__main__":
    w = jax.random.normal(jax.random.key(0), (64, 256))
    for method in (NF4(group_size=64), Log4(group_size=64)):
        q = a4.quantize(w, method)
        noise = jnp.square(a4.dequantize(q) - w).mean() / jnp.square(w).mean()
        level = -10 * jnp.log10(noise)
        print(f"{method.name:5} {q.bits_per_weight:.2f} bits per weight, SQNR of normal weights {level:.2f} dB")
    x = jax.random.normal(jax.random.key(1), (3, 256))
    print(a4.explain(x, q))  # the kernels for tables serve it
    print(f"largest difference from the dense product: {jnp.abs(a4.matmul(x, q) - x @ a4.dequantize(q).T).max():.1e}")
