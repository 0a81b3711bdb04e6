"""Which kernel computes a product, and why, in words."""

from typing import Any

import jax

from any4_jax.choice import PLATFORMS, platform_of
from any4_jax.product import plan
from any4_jax.product.matmul import matmul
from any4_jax.product.quantized_input import is_integer_product, why_no_bytes
from any4_jax.weights import QuantizeInput, leaf_of, parts

DENSE = "no quantized leaf: a dense product in XLA"


def explain(x: Any, w: Any, platform: str | None = None) -> str:
    """Says for each backend, in a line, whether the product x W^T takes it on `platform`, or why it can't.

    Args:
      x: an array or ShapeDtypeStruct [..., K], floating.
      w: an operator [N, K]. Where its product is made of several, each of those that a kernel computes gets its lines,
        after one that names it.
      platform: "cpu", "cuda", "rocm" or "tpu"; None for that of the device that x and w are committed to, else of this
        process's default device.

    Raises:
      ValueError, TypeError: as in `matmul`, or `platform` is none of these, or x has no shape and dtype.
    """
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"got x of type {type(x).__name__}, need an array or a ShapeDtypeStruct [..., K]; pass one")
    return explain_on(explained_platform(platform, (x, w)), x, w)


def explain_on(where: str, x: Any, w: Any) -> str:
    """As `explain`, on a platform that `explained_platform` found."""
    lines = [
        f"inputs of {part.bits} bits: {reason}; x is rounded, and multiplies as floats"
        for part in parts(w)
        if isinstance(part, QuantizeInput) and not is_integer_product(part) and (reason := why_no_bytes(part))
    ]
    problems = plan.problems(matmul, x, w, where)
    for place, (rows, part) in enumerate(problems, 1):
        lines += [f"product {place} of {len(problems)}, by {_named(part)}:"] * (len(problems) > 1)
        lines += _lines(rows, part, where)
    return "\n".join(lines) if lines else DENSE


def check_rows(rows: Any) -> None:
    """Raises ValueError unless `rows` is a number of rows."""
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise ValueError(f"got rows={rows!r}, need an integer of at least 1; 1 is decoding")


def explained_platform(platform: str | None, operands: Any) -> str:
    """The platform that was asked for, or without one that on which a program of a tree of operands runs.

    Raises:
      ValueError: `platform` is none of PLATFORMS.
    """
    if platform is None:
        return platform_of(*jax.tree.leaves(operands))
    if platform not in PLATFORMS:
        known = ", ".join(map(repr, PLATFORMS))
        raise ValueError(
            f"got platform={platform!r}, need one of {known}; pass one of these, or None for where the operands are"
        )
    return platform


def _named(w: Any) -> str:
    leaf = leaf_of(w)
    return f"a {type(w).__name__}" if leaf is None else f"codes of {leaf.bits} bit{'s' * (leaf.bits > 1)}"


def _lines(x: Any, w: Any, platform: str) -> list[str]:
    lines = []
    for backend, verdict in plan.BACKENDS.verdicts(x, w, platform=platform):
        detail = backend.detail(x, w) if backend.detail and backend.supports(x, w, platform) is None else None
        lines.append(f"{backend.name}: {verdict}" + (f" ({detail})" if detail else ""))
    return lines
