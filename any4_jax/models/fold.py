"""Moves a factor per channel from the input of a site into the layer before it; the block computes the same function.

If y = W x with x = before(h), a factor s on each channel of x cancels: y = (W / s) (s * before(h)).
`scale_channels` scales `before`, `fold` also divides W. Products and quotients are computed in float32 and rounded once
to the stored dtype, so a float32 block stays the same up to rounding. (On a GPU XLA's division may be off by one unit
in the last place.)

Letters: K inputs of a site, C outputs of the layer before it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from any4_jax.models.base import Site
from any4_jax.models.norms import RMSNorm
from any4_jax.nn.plain import why_not_plain

Rescale = Callable[[jax.Array], jax.Array]
"""An array [..., C] times a factor [C], or divided by it."""


class ScaleOutputs:
    """Rescales the outputs of a layer by rescaling its arrays, in place: `scale_outputs(layer, rescale)`.

    `@scale_outputs.register(cls)` adds the class of a layer that can be scaled. A subclass has to be added itself, for
    it may compute something else. `scale_channels` doesn't change a layer of any other class, and returns the factor as
    the leftover.
    """

    def __init__(self) -> None:
        self._functions: dict[type, Callable[[Any, Rescale], None]] = {}

    def register(self, cls: type) -> Callable[[Callable[[Any, Rescale], None]], Callable[[Any, Rescale], None]]:
        """Decorator: the function scales layers of the class `cls`, and not those of its subclasses."""

        def add(function: Callable[[Any, Rescale], None]) -> Callable[[Any, Rescale], None]:
            self._functions[cls] = function
            return function

        return add

    def takes(self, layer: Any) -> bool:
        """Whether a function is registered for the layer's own class, and the layer computes what its class says."""
        return type(layer) in self._functions and (type(layer) is not nnx.Linear or why_not_plain(layer) is None)

    def __call__(self, layer: Any, rescale: Rescale) -> None:
        """Rescales the outputs of `layer`.

        Raises:
            TypeError: no function is registered for the layer's own class.
        """
        if not self.takes(layer):
            raise TypeError(f"got layer {type(layer).__name__}, which has no scale_outputs; register a function for it")
        self._functions[type(layer)](layer, rescale)


scale_outputs = ScaleOutputs()


@scale_outputs.register(RMSNorm)
@scale_outputs.register(nnx.RMSNorm)
def _(layer: Any, rescale: Rescale) -> None:
    _set(layer.scale, rescale)


@scale_outputs.register(nnx.LayerNorm)
def _(layer: nnx.LayerNorm, rescale: Rescale) -> None:
    _set(layer.scale, rescale)
    _set(layer.bias, rescale)


@scale_outputs.register(nnx.Linear)
def _(layer: nnx.Linear, rescale: Rescale) -> None:
    _set(layer.kernel, rescale)
    _set(layer.bias, rescale)


def is_foldable(block: nnx.Module, site: Site) -> bool:
    """Whether a factor on the input of a site can be moved into the layer before it.

    It can't if there is no such layer, if the layer is quantized, if no `scale_outputs` is registered for its own class
    (that of a base class doesn't count), if it is an nnx.Linear with functions of the caller's, or if it is a norm of
    flax without a scale.
    """
    if site.after is None:
        return False
    layer = module_at(block, site.after)
    if getattr(layer, "use_scale", True) is False:
        return False
    return scale_outputs.takes(layer)


def scale_channels(
    block: nnx.Module, site: Site, factor: jax.Array | np.ndarray, *, inverse: bool = False
) -> tuple[nnx.Module, jax.Array | None]:
    """Multiplies the input channels of a site by scaling the outputs of the layer before it.

    This changes what the block computes: the caller must divide the site's linears, or call `fold` instead.

    Args:
        block: stays as it is.
        site: of the block.
        factor: [K], nonzero.
        inverse: divide by the factor instead.

    Returns:
        A new block that shares all other arrays, and the leftover [K]: the factor for the channels that could not be
        folded, 1 for the others; None if all were folded. If the repeats of a channel (see `Site`) have unequal
        factors, none of them is folded. Under jit a site with repeats always has a leftover, because equality isn't
        known while tracing.

    Raises:
        ValueError: the factor doesn't have shape [K].
    """
    factor = _checked(block, site, factor)
    if not is_foldable(block, site):
        return block, factor
    folded, leftover = _split(site, factor)
    new = nnx.clone(block)
    scale_outputs(module_at(new, site.after or ""), functools.partial(rescaled, factor=folded, divide=inverse))
    return new, leftover


def fold(
    block: nnx.Module, site: Site, factor: jax.Array | np.ndarray, *, inverse: bool = False
) -> tuple[nnx.Module, jax.Array | None]:
    """Multiplies the input channels of a site, and divides its linears by the same factor.

    The block computes the same function. Arguments and results are those of `scale_channels`; the linears are divided
    by the part of the factor that was folded, not by the leftover.

    Raises:
        ValueError: the factor doesn't have shape [K], or a linear of the site is quantized or no plain nnx.Linear.
    """
    for path in site.linears:
        linear = module_at(block, path)
        if not isinstance(linear, nnx.Linear):
            raise ValueError(f"{path} is not an nnx.Linear but {type(linear).__name__}; fold before quantizing")
        if (special := why_not_plain(linear)) is not None:
            raise ValueError(f"{path} is {special}, and fold divides the kernel of a plain nnx.Linear; make it one")
    factor = _checked(block, site, factor)
    new, leftover = scale_channels(block, site, factor, inverse=inverse)
    if new is block:
        return block, leftover
    folded = factor if leftover is None else factor / leftover
    rescale = functools.partial(rescaled, factor=folded[:, None], divide=not inverse)
    for path in site.linears:
        _set(module_at(new, path).kernel, rescale)
    return new, leftover


def repeated(site: Site, factor: np.ndarray) -> np.ndarray:
    """Converts a factor [C] on the outputs of the layer before a site to a factor [K] on the site's inputs."""
    return np.repeat(factor.reshape(-1, site.width), site.repeat, axis=0).reshape(-1)


def inputs_of(block: nnx.Module, site: Site) -> int:
    """K, the number of input channels of the site."""
    return module_at(block, site.linears[0]).in_features


def module_at(module: Any, path: str) -> Any:
    """The submodule at a dotted path; the module itself at ""."""
    for name in filter(None, path.split(".")):
        module = module[int(name)] if name.isdigit() else getattr(module, name)
    return module


def _checked(block: nnx.Module, site: Site, factor: jax.Array | np.ndarray) -> jax.Array:
    k = inputs_of(block, site)
    if factor.shape != (k,):
        raise ValueError(f"the factor has shape {factor.shape}, and site {site.name} has K={k} inputs; pass [{k}]")
    return jnp.asarray(factor, jnp.float32)


def _split(site: Site, factor: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Splits a factor [K] into one on the outputs [C] of the layer before the site, and the leftover [K] or None."""
    if site.repeat == 1:
        return factor, None
    runs = factor.reshape(-1, site.repeat, site.width)
    equal = (runs == runs[:, :1]).all(axis=1)
    folded = jnp.where(equal, runs[:, 0], 1).reshape(-1)
    if not isinstance(equal, jax.core.Tracer) and bool(equal.all()):
        return folded, None
    return folded, jnp.where(equal[:, None], 1, runs).reshape(-1)


@functools.partial(jax.jit, static_argnames="divide")
def rescaled(array: jax.Array, factor: jax.Array, divide: bool) -> jax.Array:
    wide = array.astype(jnp.float32)
    # Without a barrier XLA multiplies by the reciprocal of the broadcast factor, which rounds twice.
    factor = jax.lax.optimization_barrier(jnp.broadcast_to(factor, wide.shape))
    return (wide / factor if divide else wide * factor).astype(array.dtype)


def _set(variable: Any, rescale: Rescale) -> None:
    if variable is not None:
        variable.set_value(rescale(variable.get_value()))
