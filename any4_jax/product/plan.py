"""Which kernel computes a product: `matmul`, `matmul_each` and `explain` ask here, so what is explained is what runs.

Backends are tried in the order of `BACKENDS`. The last, "xla", takes every operator that a kernel reads as a whole, and
is the reference that the others must match. Other operators are multiplied part by part (`any4_jax.weights.product`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from any4_jax.choice import Choice, lowered_by_platform, platform_of
from any4_jax.partition import combine, partition
from any4_jax.product.backends.base import Backend
from any4_jax.product.backends.cpu import CPU
from any4_jax.product.backends.cuda import CUDA
from any4_jax.product.backends.pallas import PALLAS
from any4_jax.product.backends.xla import XLA
from any4_jax.product.quantized_input import is_integer_product, product_of_rounded, why_no_bytes
from any4_jax.product.recording import Problem, noted, recording
from any4_jax.weights import (
    QuantizedTensor,
    QuantizeInput,
    Slice,
    Sparse,
    Sum,
    binary_planes,
    dense_product,
    dequantize,
    is_operator,
    leaf_of,
    parts,
    product,
    with_outliers,
)

BACKENDS: Choice[Backend] = Choice((CUDA, PALLAS, CPU, XLA))


def planned(
    x: jax.Array, w: Any, backend: str | None, call: Callable[[Backend], Callable[..., jax.Array]] | None = None
) -> jax.Array:
    """The product [M, N] on one of the backends: the implementation of `product` for operators that kernels read.

    Args:
      x: [M, K], a floating dtype.
      w: [N, K], an operator that at least XLA's backend supports.
      backend: a name, or None for the first that supports the operands on the platform of the program.
      call: backend -> the function of (x, w) that runs. None gives one that is differentiated through the dense matrix.

    Raises:
      ValueError: there is no such backend, or it can't compute the product, or no backend can; the message gives the
        reason. Or the arrays of a QuantizedTensor don't fit together.
    """
    check_leaves(w)
    call = call or _differentiable
    zeros = noted(x, w)
    if zeros is not None:
        return zeros
    name = BACKENDS.choose(backend, x, w, arrays=tuple(jax.tree.leaves((x, w))))
    return BACKENDS.lowered(call, x, w, name=name)(x, w)


def planned_each(
    x: jax.Array, ws: Sequence[Any], call: Callable[[tuple[Backend, ...]], Callable[..., tuple[jax.Array, ...]]]
) -> tuple[jax.Array, ...]:
    """The products [M, N] of one input with several weights, each on the backend that `planned` chooses for it.

    Args:
      x: [M, K], a floating dtype.
      ws: weights as `planned` takes them.
      call: the backends of the weights, in order -> the function of (x, ws) that runs.

    Raises:
      ValueError: no backend can compute one of the products; the message gives the reason.
    """
    for w in ws:
        check_leaves(w)
    zeros = tuple(y for w in ws if (y := noted(x, w)) is not None)
    if zeros:
        return zeros

    def pick(platform: str) -> tuple[Backend, ...]:
        return tuple(BACKENDS.first(x, w, platform=platform) for w in ws)

    operands = x, tuple(ws)
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(operands)):
        return call(pick(_platform(*operands)))(*operands)
    return lowered_by_platform(pick, (BACKENDS.options[-1],) * len(ws), call)(*operands)


def check_leaves(w: Any) -> None:
    """Checks that the arrays fit together in every QuantizedTensor of an operator, by shapes and dtypes.

    Raises:
      ValueError, TypeError: they don't; kernels read them as they are.
    """
    for part in parts(w):
        leaf = leaf_of(part)
        if leaf is not None:
            leaf.check()


def _platform(x: Any, w: Any) -> str:
    return platform_of(*jax.tree.leaves((x, w)))


def problems(run: Callable[..., jax.Array], x: Any, w: Any, platform: str | None = None) -> list[Problem]:
    """The operands (x, w), as ShapeDtypeStructs, of each product that run(x, w) would leave to a backend.

    `run` is traced, and no backend runs.

    Args:
      platform: where it would run; None for that of a program of x and w.
    """
    with recording() as record:
        jax.eval_shape(run, x, w)
    platform = platform or _platform(x, w)
    return [problem for noted in record for problem in _split(*noted, platform)]


def _split(x: Any, w: Any, platform: str) -> list[Problem]:
    """A product, or those of its terms where no backend computes it at once."""
    taken = with_outliers(w) is None or any(b.supports(x, w, platform) is None for b in BACKENDS.options)
    return [(x, w)] if taken else [(x, term) for term in w.terms]


def check_named(x: Any, w: Any, backend: str) -> None:
    """Raises ValueError where the name of a backend would have no effect, since no part of `w` gets to `planned`. Where
    a part does, `planned` itself refuses a backend that can't compute the product."""
    last, platform = BACKENDS.options[-1], _platform(x, w)
    named = BACKENDS.named(backend)
    reached = [part for part in parts(w) if last.supports(x, part, platform) is None]
    # XLA multiplies by the entries beside what the named kernel takes, but not in place of it.
    if named is last or any(type(part) is not Sparse or named.supports(x, part, platform) is None for part in reached):
        return
    if is_operator(w) or isinstance(w, jax.Array):
        BACKENDS.required(backend, x, w, platform=platform)


def _differentiable(kernel: Backend) -> Callable[..., jax.Array]:
    return functools.partial(coded_product, backend=kernel.name)


Coded = QuantizedTensor | Slice | QuantizeInput | Sparse | Sum
"""What backends multiply by: a leaf, one of a stack, one of these behind rounded inputs, entries, or a sum of binary
planes."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def coded_product(x: jax.Array, w: Coded, backend: str) -> jax.Array:
    """The product [M, N] of x [M, K] and a weight [N, K] on one backend.

    The custom derivative makes every kernel differentiable, forward, in reverse and more than once.
    """
    kernel = BACKENDS.named(backend)
    return kernel.run(x, operand(kernel, w))


def operand(kernel: Backend, w: Coded) -> Coded:
    """What `kernel.run` reads of a weight: the slice itself where it can, else the matrix taken out of the stack."""
    if isinstance(w, QuantizeInput):
        return dataclasses.replace(w, inner=operand(kernel, w.inner))
    if isinstance(w, Sum):
        return Sum(tuple(operand(kernel, term) for term in w.terms))
    return w.matrix() if isinstance(w, Slice) and not kernel.takes_slices else w


@coded_product.defjvp
def _(backend, primals, tangents):
    return coded_product(*primals, backend), product_tangent(*primals, *tangents)


@jax.checkpoint
def product_tangent(x: jax.Array, w: Coded, dx: jax.Array, dw: Any) -> jax.Array:
    """The tangent [M, N] of a product, for the tangents of x [M, K] and of the weight [N, K].

    It is computed from the dense matrix. Under a checkpoint, a backward pass decodes that again instead of keeping it.
    Behind rounded inputs it is that of the weight's product with them, where x passes the rounding straight through.
    """
    tables, codes = partition(w)
    d_tables = jax.tree.map(lambda table, tangent: None if table is None else tangent, tables, dw, is_leaf=_is_none)
    if isinstance(w, QuantizeInput):
        reference = lambda x, tables: _rounded(x, combine(tables, codes))  # noqa: E731
        return jax.jvp(reference, (x, tables), (dx, d_tables))[1]
    dense, d_dense = jax.jvp(lambda t: dequantize(combine(t, codes)), (tables,), (d_tables,))
    # In x's dtype throughout: its transpose multiplies in that dtype too, where accelerators are fast.
    first = jax.lax.dot_general(dx, dense.astype(x.dtype), _BY_K, precision=jax.lax.Precision.HIGHEST)
    return first + dense_product(x.astype(jnp.float32), d_dense).astype(x.dtype)


_BY_K = (((1,), (1,)), ((), ()))


def _is_none(node: Any) -> bool:
    return node is None


@product.register(QuantizedTensor)
@product.register(Slice)
def _(w, x, backend=None):
    return planned(x, w, backend)


@product.register
def _(w: Sum, x, backend=None):
    if binary_planes(w) is not None:
        return planned(x, w, backend)
    if with_outliers(w) is not None:
        return _at_once(x, w, backend)
    return _term_by_term(x, w, backend)


def _term_by_term(x: jax.Array, w: Sum, backend: str | None) -> jax.Array:
    return functools.reduce(jnp.add, [product(term, x, backend) for term in w.terms])


def _at_once(x: jax.Array, w: Sum, backend: str | None) -> jax.Array:
    """The product by a coded matrix and the entries beside it, in one call where a kernel has it."""
    check_leaves(w)
    zeros = noted(x, w)
    if zeros is not None:
        return zeros

    def pick(platform: str) -> Backend | None:
        options = BACKENDS.options if backend is None else (BACKENDS.named(backend),)
        return next((option for option in options if option.supports(x, w, platform) is None), None)

    def call(kernel: Backend | None) -> Callable[..., jax.Array]:
        return functools.partial(_term_by_term, backend=backend) if kernel is None else _differentiable(kernel)

    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((x, w))):
        return call(pick(_platform(x, w)))(x, w)
    return lowered_by_platform(pick, None, call)(x, w)


@product.register
def _(w: Sparse, x, backend=None):
    named = None if backend is None else BACKENDS.named(backend)
    other = named is not None and named.supports(x, w, _platform(x, w)) is not None
    return planned(x, w, BACKENDS.options[-1].name if other else backend, _of_entries)


def _of_entries(kernel: Backend) -> Callable[..., jax.Array]:
    """XLA's product is differentiated as it is, entry by entry, and the others' through the dense matrix."""
    return kernel.run if kernel is BACKENDS.options[-1] else _differentiable(kernel)


@product.register
def _(w: QuantizeInput, x, backend=None):
    if is_integer_product(w):
        return planned(x, w, backend)
    if why_no_bytes(w) is None:
        return planned(x, w, backend, None if backend else unnamed)
    return _rounded(x, w, backend)


def _rounded(x: jax.Array, w: QuantizeInput, backend: str | None = None) -> jax.Array:
    return product_of_rounded(x, w, functools.partial(product, backend=backend))


def unnamed(kernel: Backend) -> Callable[..., jax.Array]:
    """The function of (x, w) that multiplies on a backend which the plan chose.

    Where that is XLA for rounded inputs that it doesn't multiply as integers, the platform has no kernel that does, and
    they take its first one for floats.
    """
    differentiable = _differentiable(kernel)
    if kernel is not BACKENDS.options[-1]:
        return differentiable
    return lambda x, w: (_rounded if _has_no_integers(w) else differentiable)(x, w)


def _has_no_integers(w: Coded) -> bool:
    return isinstance(w, QuantizeInput) and not is_integer_product(w)
