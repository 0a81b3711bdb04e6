"""Which kernel computes a product, and why, in words."""

from typing import Any

from any4_jax.choice import default_platform
from any4_jax.product import plan
from any4_jax.product.matmul import matmul

DENSE = "no quantized leaf: a dense product in XLA"


def explain(x: Any, w: Any, platform: str | None = None) -> str:
    """Says for each backend, in a line, whether the product x W^T takes it on `platform`, or why it can't.

    Args:
      x: an array or ShapeDtypeStruct [..., K], floating.
      w: an operator [N, K]. Where its product is made of several, each of those that a kernel computes gets its lines.
      platform: "cpu", "cuda", "rocm" or "tpu"; None for the platform of this process's default device.

    Raises:
      ValueError, TypeError: as in `matmul`.
    """
    where = platform or default_platform()
    lines = [line for problem in plan.problems(matmul, x, w) for line in _lines(*problem, where)]
    return "\n".join(lines) if lines else DENSE


def _lines(x: Any, w: Any, platform: str) -> list[str]:
    taken = plan.BACKENDS.first(x, w, platform=platform)
    lines = []
    for backend in plan.BACKENDS.options:
        reason = backend.supports(x, w, platform)
        verdict = reason or ("taken" if backend is taken else f"could, but {taken.name!r} comes first")
        detail = backend.detail(x, w) if backend.detail and reason is None else None
        lines.append(f"{backend.name}: {verdict}" + (f" ({detail})" if detail else ""))
    return lines
