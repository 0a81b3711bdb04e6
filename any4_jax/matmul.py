"""y = x W^T for every operator, the table of kernels that can do it, and why one is or isn't taken.

Backends are tried in the order of `BACKENDS`; the last, "xla", does everything and is the truth that all must match.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax import weights
from any4_jax.backends.base import Backend
from any4_jax.backends.cpu import CPU
from any4_jax.backends.cuda import CUDA
from any4_jax.backends.pallas import PALLAS
from any4_jax.layer import Layer
from any4_jax.partition import combine, partition
from any4_jax.quantized_input import integer_product, is_integer_leaf, quantize_input
from any4_jax.weights import LowRank, PermuteInput, QuantizedTensor, QuantizeInput, ScaleInput, Sum

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def _xla_run(x: jax.Array, w: QuantizedTensor) -> jax.Array:
    # Ties the weight to x: else XLA dequantizes every layer before a decoding loop and keeps the lot through it.
    x, w = jax.lax.optimization_barrier((x, w))
    return _dense(x, weights.dequantize(w, x.dtype))


def _dense(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [M, K] by w [N, K], accumulated in float32; HIGHEST keeps a GPU or TPU from rounding float32 to fewer bits."""
    y = jax.lax.dot_general(
        x,
        w,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return y.astype(x.dtype)


XLA = Backend(
    name="xla",
    supports=lambda x, w, platform: None,
    run=_xla_run,
    prepare=lambda w: w,
    unprepare=lambda arrays: arrays,
)

BACKENDS: tuple[Backend, ...] = (CUDA, PALLAS, CPU, XLA)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A leaf in the layout of one backend: made by `prepare` when a weight is put on a device, never saved."""

    backend: str
    arrays: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return unprepare(self).shape


jax.tree_util.register_dataclass(Prepared, ["arrays"], ["backend"])


def is_quantized(node: Any) -> bool:
    """Whether a node of a tree is an operator, be it prepared for a backend or not."""
    return weights.is_operator(node) or isinstance(node, Prepared)


def named(name: str) -> Backend:
    """The backend of that name, or a ValueError that gives the names there are."""
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    known = ", ".join(repr(b.name) for b in BACKENDS)
    raise ValueError(
        f"got backend={name!r}, this installation has {known}; pass one of them, or None to let it be chosen"
    )


def prepare(w, backend: str):
    """Puts every QuantizedTensor of `w` (an operator or any tree) into the layout of `backend`.

    Raises:
      ValueError: there is no such backend.
    """
    chosen = named(backend)
    return jax.tree.map(
        lambda node: Prepared(backend, chosen.prepare(node)) if isinstance(node, QuantizedTensor) else node,
        w,
        is_leaf=lambda node: isinstance(node, QuantizedTensor),
    )


def unprepare(w):
    """The exact inverse of `prepare`, for an operator or any tree."""
    return jax.tree.map(
        lambda node: named(node.backend).unprepare(node.arrays) if isinstance(node, Prepared) else node,
        w,
        is_leaf=lambda node: isinstance(node, Prepared),
    )


@weights.dequantize.register
def _(w: Prepared, dtype=jnp.float32) -> jax.Array:
    return weights.dequantize(unprepare(w), dtype)


def matmul(x: jax.Array, w, backend: str | None = None) -> jax.Array:
    """The product with a weight's transpose, [..., K] to [..., N].

    The matrix is dequantized in float32 and rounded once to x's dtype; products accumulate in float32. Gradients
    flow to x, and to the floating-point arrays of `w`; codes have none.

    Args:
      x: [..., K], a floating dtype.
      w: an array [N, K] or an operator of that shape.
      backend: a kernel's name, or None for the first that supports the operands where the program is lowered.

    Raises:
      ValueError: K differs, `w` has leading axes (take one by `layer`, or use jax.vmap), or the named backend doesn't
        exist or can't.
      TypeError: x is not floating.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"got x of dtype {x.dtype}, need a floating dtype; convert x first")
    if len(w.shape) != 2:
        raise ValueError(
            f"got a weight of shape {w.shape}, matmul takes [N, K]; use `layer` or jax.vmap over its leading axes"
        )
    if x.ndim == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"got x of shape {x.shape} and a weight [N, K] = {w.shape}; x must end in K={w.shape[1]}")
    y = _apply(w, x.reshape(-1, x.shape[-1]), backend)
    return y.reshape(*x.shape[:-1], w.shape[0])


@functools.singledispatch
def _apply(w, x: jax.Array, backend: str | None) -> jax.Array:
    """matmul with x as [M, K]; registered for each operator, arrays (traced ones too) are dealt with here."""
    if isinstance(w, jax.Array):
        return _dense(x, w.astype(x.dtype))
    raise TypeError(f"got a weight of type {type(w).__name__}, need an array or an operator; register matmul for it")


@_apply.register
def _(w: Prepared, x, backend):
    if backend is not None and backend != w.backend:
        raise ValueError(f"got backend={backend!r} for a weight prepared for {w.backend!r}; unprepare it first")
    return leaf_product(x, w, w.backend)


@_apply.register(QuantizedTensor)
@_apply.register(Layer)
def _(w, x, backend):
    if backend is not None:
        reason = named(backend).supports(x, stored(w), default_platform())
        if reason is not None:
            raise ValueError(f"backend {backend!r} can't do this product: {reason}; pass another backend, or None")
        return leaf_product(x, w, backend)
    chosen = {platform: choose(x, w, platform).name for platform in PLATFORMS}
    default = BACKENDS[-1].name
    special = {p: functools.partial(leaf_product, backend=name) for p, name in chosen.items() if name != default}
    if not special:
        return leaf_product(x, w, default)
    return jax.lax.platform_dependent(x, w, default=functools.partial(leaf_product, backend=default), **special)


def default_platform() -> str:
    """The platform of this process by default, in the words of PLATFORMS: jax calls a GPU of either make "gpu"."""
    name = jax.default_backend()
    if name != "gpu":
        return name
    return "rocm" if "rocm" in jax.devices()[0].client.platform_version.lower() else "cuda"


def stored(w: QuantizedTensor | Layer) -> QuantizedTensor:
    """The leaf that holds a weight: itself, or the stack that it is one of."""
    return w.stack if isinstance(w, Layer) else w


def choose(x, w: QuantizedTensor | Layer, platform: str) -> Backend:
    """The first backend that can do the product on a platform."""
    return next(b for b in BACKENDS if b.supports(x, stored(w), platform) is None)


def operand(kernel: Backend, w) -> Any:
    """What `kernel.run` reads of a QuantizedTensor, a Layer, or either of them prepared for it."""
    prepared, w = isinstance(w, Prepared), w.arrays if isinstance(w, Prepared) else w
    if isinstance(w, Layer) and not kernel.takes_layers:
        w = w.take()
    return w if prepared else kernel.prepare(w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def leaf_product(x: jax.Array, w, backend: str) -> jax.Array:
    """The product on one backend. The custom derivative makes every kernel differentiable and recomputes the dense
    matrix in the backward pass instead of keeping it."""
    kernel = named(backend)
    return kernel.run(x, operand(kernel, w))


def _leaf_forward(x, w, backend):
    return leaf_product(x, w, backend), (x, w)


def leaf_gradients(backend, saved, dy):
    """The cotangents of x and of a leaf."""
    x, w = saved
    tables, codes = partition(w)
    dense, pull = jax.vjp(lambda t: weights.dequantize(combine(t, codes)), tables)
    dx = _dense(dy, dense.T.astype(dy.dtype))
    (d_tables,) = pull(_dense(dy.T.astype(jnp.float32), x.T.astype(jnp.float32)))
    d_codes = jax.tree.map(lambda c: np.zeros(c.shape, jax.dtypes.float0), codes)
    return dx.astype(x.dtype), combine(d_tables, d_codes)


leaf_product.defvjp(_leaf_forward, leaf_gradients)


@_apply.register
def _(w: Sum, x, backend):
    return functools.reduce(jnp.add, [_apply(term, x, backend) for term in w.terms])


@_apply.register
def _(w: ScaleInput, x, backend):
    return _apply(w.inner, (x.astype(jnp.float32) * w.scale.astype(jnp.float32)).astype(x.dtype), backend)


@_apply.register
def _(w: PermuteInput, x, backend):
    return _apply(w.inner, jnp.take(x, w.permutation, axis=-1), backend)


@_apply.register
def _(w: QuantizeInput, x, backend):
    if w.levels is None and is_integer_leaf(w.inner):
        return integer_product(x, w, w.inner)
    return _apply(w.inner, quantize_input(x, w), backend)


@_apply.register
def _(w: LowRank, x, backend):
    b = (w.b.astype(jnp.float32) * w.scale).astype(x.dtype)
    return _dense(_dense(x, w.a.astype(x.dtype)), b)


def explain(x, w, platform: str | None = None) -> str:
    """A table in words: for each backend, whether the product x w^T takes it on `platform`, or why it can't.

    Args:
      x: an array or ShapeDtypeStruct [..., K].
      w: an operator [N, K]; each of its leaves gets its lines.
      platform: "cpu", "cuda", "rocm" or "tpu"; None for this process's default device.
    """
    where = platform or default_platform()
    leaves = jax.tree.leaves(w, is_leaf=lambda node: isinstance(node, (QuantizedTensor, Prepared)))
    lines = []
    for leaf in leaves:
        if isinstance(leaf, Prepared):
            lines.append(f"{leaf.backend}: taken, the weight is prepared for it")
        elif isinstance(leaf, QuantizedTensor):
            taken = choose(x, leaf, where)
            for backend in BACKENDS:
                reason = backend.supports(x, leaf, where)
                verdict = reason or ("taken" if backend is taken else f"could, but {taken.name!r} comes first")
                detail = f" ({backend.detail(x, leaf)})" if backend.detail and reason is None else ""
                lines.append(f"{backend.name}: {verdict}{detail}")
    return "\n".join(lines) if lines else "no quantized leaf: a dense product in XLA"
