"""Any4Dense: flax.linen.Dense over a quantized weight."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.linen.dtypes import promote_dtype
from jax.typing import DTypeLike

from any4_jax.methods import Any4, Method, quantize
from any4_jax.nn.axes import array_axes, matrix_axes
from any4_jax.product import matmul
from any4_jax.weights import Contraction, is_operator, places


class Any4Dense(nn.Module):
    """y = x W^T + b with W an operator [N, K] of any4_jax.weights; a drop-in for `flax.linen.Dense`.

    Parameters: "kernel", the operator, and "bias" [N]. `init` quantizes the kernel that nn.Dense of the same name and
    key would start from; `jax.eval_shape` of `init` gives the abstract tree that a checkpoint is loaded into. Where
    `nn.with_partitioning` wraps kernel_init, every array of the operator is boxed, see `boxed`.

    There is no dot_general, dot_general_cls or promote_dtype: these replace a product of two arrays, but here the
    kernel that any4_jax.product chooses decodes the second factor inside the product.

    Attributes:
      features: N.
      use_bias: whether b is added.
      dtype: what x and b are cast to; None promotes x with b. The dtypes of the stored tables and scales don't matter.
      param_dtype: of the bias, and of the initial kernel before it is quantized.
      precision: accepted so that calls written for nn.Dense fit. Products run at HIGHEST, never below what is asked.
      kernel_init, bias_init: initializers of the float kernel [K, N] and of the bias [N].
      method: quantizes the initial kernel, without statistics.
      group_size: replaces the method's; None keeps the method's.
    """

    features: int
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Any = None
    kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    method: Method = Any4()
    group_size: int | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """x [..., K] -> [..., N].

        Raises:
          ValueError: the kernel is not [N, K], or the method refuses to quantize it.
          TypeError: the kernel is not an operator, or `group_size` is set and the method has none.
        """
        if self.has_variable("params", "kernel"):
            # Not self.param, which would trace the quantizing initializer in every call to compare shapes.
            kernel = meta.unbox(self.get_variable("params", "kernel"))
        else:
            kernel = self.param("kernel", _initial_kernel, self, jnp.shape(inputs)[-1])
        return call_dense(self, inputs, kernel, lambda key, shape: self.bias_init(key, shape, self.param_dtype))


def _initial_kernel(key: jax.Array, layer: Any4Dense, k: int) -> Any:
    method = with_group_size(layer.method, layer.group_size)
    kernel = layer.kernel_init(key, (k, layer.features), layer.param_dtype)
    operator = quantize(meta.unbox(kernel), method, transposed=True, path=layer_name(layer))
    return boxed(operator, kernel) if isinstance(kernel, meta.AxisMetadata) else operator


def with_group_size(method: Any, group_size: int | None) -> Method:
    """The method with this group size, or the method as it is where `group_size` is None.

    Raises:
      TypeError: the method has no group size.
    """
    if group_size is None:
        return method
    if not hasattr(method, "group_size"):
        raise TypeError(
            f"got group_size={group_size} for {type(method).__name__}, which has no such field; set it in the method"
        )
    return dataclasses.replace(method, group_size=group_size)


def boxed(operator: Any, box: meta.AxisMetadata) -> Any:
    """An operator [*L, N, K] with each array boxed like the float kernel was, under the names of the axes that the
    array has (`any4_jax.nn.axes`). The box names the axes [*L, K, N], or those of the kernel that a Contraction is.

    Raises:
      TypeError: the box is not an `nn.Partitioned`, which has names, or has fewer than two of them.
    """
    if not isinstance(box, meta.Partitioned) or len(box.names) < 2:
        raise TypeError(f"got a kernel boxed as {box!r}, need nn.Partitioned with a name for each axis; box it so")

    names = box.names
    if isinstance(operator, Contraction) and len(names) == len(operator.layout.roles):
        names = matrix_axes(tuple(names), operator.layout.roles)
    boxes = [
        box.replace(value=leaf, names=array_axes(place.axes, names, leaf.shape)) for place, leaf in places(operator)
    ]
    return jax.tree.unflatten(jax.tree.structure(operator), boxes)


def layer_name(module: nn.Module) -> str:
    """The dotted path of a bound module, for errors."""
    return ".".join(module.path) or "the model"


def call_dense(module: Any, x: jax.Array, kernel: Any, bias_init: Callable[..., Any]) -> jax.Array:
    """The output [..., N] of a dense module whose kernel is an operator.

    Args:
      module: bound, inside its __call__, with nn.Dense's fields features, use_bias and dtype.
      x: [..., K], floating.
      kernel: an operator [N, K].
      bias_init: (key, (N,)) -> the bias; called while parameters are initialised.

    Raises:
      ValueError: the kernel is not [N, K] for the module's N and the K of x.
      TypeError: the kernel is not an operator.
    """
    if not is_operator(kernel):
        raise TypeError(
            f"{layer_name(module)}: got a kernel of type {type(kernel).__name__}, need an operator [N, K]; "
            "quantize the parameters, or initialise them again"
        )
    n = module.features if isinstance(module.features, int) else module.features[0]
    need = (n, jnp.shape(x)[-1])
    if kernel.shape != need:
        raise ValueError(
            f"{layer_name(module)}: got a kernel [N, K] = {kernel.shape} for {n} features and x of shape "
            f"{jnp.shape(x)}, need {need}; pass the parameters and the input that belong together"
        )
    bias = module.param("bias", bias_init, (n,)) if module.use_bias else None
    return dense(x, kernel, bias, module.dtype)


def dense(x: jax.Array, kernel: Any, bias: jax.Array | None, dtype: DTypeLike | None) -> jax.Array:
    """x W^T + bias, [..., N], for x [..., K], an operator [N, K] and bias [N] or None.

    It is computed in `dtype`; None means the dtype to which x and bias promote.
    """
    x, bias = promote_dtype(x, bias, dtype=dtype)
    return with_bias(matmul(x, kernel), bias)


def with_bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    """y [..., N] plus the bias [N], if there is one."""
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)
