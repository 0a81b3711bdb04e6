"""Any4Linear and Any4Embed: nnx.Linear and nnx.Embed over quantized weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.linen.dtypes import promote_dtype
from jax.nn import initializers
from jax.typing import DTypeLike

from any4_jax.methods import Any4, Method, quantize
from any4_jax.nn.linen import dense, with_bias, with_group_size
from any4_jax.nn.operator_variables import Codes, Quantized, Tables, blank, plain_metadata
from any4_jax.product import lookup, matmul_each

__all__ = ["Any4Embed", "Any4Linear", "Codes", "Tables", "call_each"]

_METHOD = Any4()
_NONE: Mapping[str, Any] = {}


class Any4Linear(Quantized):
    """y = x W^T + b with W an operator [N, K] of any4_jax.weights; a drop-in for nnx.Linear.

    Each array of the operator is a variable of its own in `arrays`, named by its place in the operator as in
    checkpoints ("codes", "lut", "terms/0/scales"). It is a Codes if it holds integers, an nnx.LoRAParam if it is a
    factor of a LowRank, a plain nnx.Variable if it is a constant (the scale of a LowRank, the table of an integer
    format), and else a Tables. So `nnx.Optimizer(model, optimizer, wrt=Tables)` trains tables, scales and offsets, and
    optimisers see the codes only where they are asked to.

    Of nnx.Linear's parameters, `dot_general`, `promote_dtype` and `preferred_element_type` are left out, because
    any4_jax.matmul computes the product: it decodes inside the product, accumulates in float32 and returns x's dtype.

    Under nnx.vmap and nnx.scan the arrays have leading stack axes [*L, ...], which these transforms add and remove.

    Attributes:
      weight: the operator [*L, N, K], rebuilt from `arrays`; may be set.
      arrays: nnx.Dict of variables.
      bias: nnx.Param [*L, N] or None.
      in_features, out_features: K and N (static).
      dtype: what x and the bias are cast to; None promotes one with the other. The dtypes of the stored tables and
        scales don't matter (static).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        kernel_init: jax.nn.initializers.Initializer = initializers.lecun_normal(),  # noqa: B008 (a pure function)
        bias_init: jax.nn.initializers.Initializer = initializers.zeros,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = _NONE,
        bias_metadata: Mapping[str, Any] = _NONE,
        method: Method = _METHOD,
        group_size: int | None = None,
    ) -> None:
        """Draws the kernel and the bias as nnx.Linear does, and quantizes the kernel.

        Args:
          in_features, out_features: K and N.
          use_bias: whether there is a bias.
          dtype: see the class.
          param_dtype: what the kernel is drawn in, and the bias is kept in.
          precision: accepted so that calls written for nnx.Linear fit; the product runs at HIGHEST in any case.
          kernel_init, bias_init: initializers of [K, N] and [N]. If nnx.with_partitioning names the axes K and N, each
            array of the operator gets the names of the axes that it has.
          rngs: random numbers are drawn from its stream `params`.
          kernel_metadata, bias_metadata: metadata of the variables; `out_sharding` is treated like the names above.
          method: how the kernel is quantized.
          group_size: replaces the method's; None keeps the method's.

        Raises:
          ValueError: as in `any4_jax.quantize`.
          TypeError: `group_size` is set and the method has none.
        """
        kernel = nnx.Param(kernel_init(rngs.params(), (in_features, out_features), param_dtype), **kernel_metadata)
        bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype), **bias_metadata) if use_bias else None
        weight = quantize(kernel.get_value(), with_group_size(method, group_size), transposed=True)
        metadata = kernel.get_metadata()
        self._hold(weight, bias, dtype, metadata, place=metadata["eager_sharding"])

    @classmethod
    def of(
        cls,
        weight: Any,
        *,
        bias: jax.Array | None = None,
        dtype: DTypeLike | None = None,
        kernel_metadata: Mapping[str, Any] = _NONE,
        bias_metadata: Mapping[str, Any] = _NONE,
    ) -> "Any4Linear":
        """A layer around an existing operator.

        Args:
          weight: an operator or array [*L, N, K]. Leading axes are for nnx.vmap and nnx.scan.
          bias: [*L, N], or None.
          dtype: see the class.
          kernel_metadata, bias_metadata: the metadata of an nnx.Linear's kernel [*L, K, N] and bias; the arrays stay on
            the devices where they are.

        Raises:
          ValueError: the weight has fewer than two axes.
        """
        if len(weight.shape) < 2:
            raise ValueError(f"got a weight of shape {weight.shape}, Any4Linear takes [N, K]; reshape it")
        layer = blank(cls)
        parameter = None
        if bias is not None:
            parameter = nnx.Param(bias)
            parameter.set_metadata(parameter.get_metadata() | plain_metadata(bias_metadata))
        layer._hold(weight, parameter, dtype, kernel_metadata, place=False)
        return layer

    def _hold(self, weight: Any, bias: Any, dtype: Any, metadata: Mapping[str, Any], place: bool) -> None:
        self.out_features, self.in_features = weight.shape[-2:]
        self._metadata = tuple(plain_metadata(metadata).items())
        self._arrange(weight, place)
        self.bias = nnx.data(bias)
        self.dtype = None if dtype is None else jnp.dtype(dtype)

    @property
    def kernel_metadata(self) -> dict[str, Any]:
        """The metadata of a kernel [K, N], from which that of the arrays was made."""
        return dict(self._metadata)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., K], floating -> [..., N]."""
        return dense(x, self.weight, None if self.bias is None else self.bias.get_value(), self.dtype)


def call_each(linears: Sequence[Any], x: jax.Array) -> list[jax.Array]:
    """`[linear(x) for linear in linears]`, through `matmul_each` where all linears are Any4Linear.

    Args:
      linears: modules that read the same input.
      x: [..., K], floating.

    Returns:
      y [..., N] for each linear.
    """
    if not all(type(linear) is Any4Linear for linear in linears):
        return [linear(x) for linear in linears]
    biases = [None if linear.bias is None else linear.bias.get_value() for linear in linears]
    promoted = [promote_dtype(x, bias, dtype=linear.dtype) for linear, bias in zip(linears, biases, strict=True)]
    if len({inputs.dtype for inputs, _ in promoted}) > 1:
        return [linear(x) for linear in linears]
    ys = matmul_each(promoted[0][0], [linear.weight for linear in linears])
    return [with_bias(y, bias) for y, (_, bias) in zip(ys, promoted, strict=True)]


class Any4Embed(Quantized):
    """nnx.Embed over a quantized table: rows are decoded as they are looked up, and `attend` is a product.

    Attributes:
      weight: the operator [N, K] of the embedding; may be set.
      arrays: nnx.Dict of variables, as in Any4Linear.
      num_embeddings, features: N and K (static).
      dtype: of the output; None means float32 for the lookup, and the input's dtype for `attend` (static).
    """

    dtype: Any

    @classmethod
    def of(cls, weight: Any, *, dtype: DTypeLike | None = None) -> "Any4Embed":
        """An embedding around an existing operator [N, K].

        Raises:
          ValueError: the weight is not a matrix.
        """
        if len(weight.shape) != 2:
            raise ValueError(f"got a weight of shape {weight.shape}, Any4Embed takes [N, K]; reshape it")
        layer = blank(cls)
        layer.num_embeddings, layer.features = weight.shape
        layer._arrange(weight, False)
        layer.dtype = None if dtype is None else jnp.dtype(dtype)
        return layer

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens int [...] -> their rows [..., K]."""
        return lookup(self.weight, tokens, jnp.float32 if self.dtype is None else self.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """x floating [..., K] -> its products with all rows, [..., N]."""
        return dense(x, self.weight, None, self.dtype)
