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
from any4_jax.nn.linen import dense, with_group_size
from any4_jax.nn.operator_variables import Codes, Quantized, Tables, blank
from any4_jax.product import lookup, matmul_each

__all__ = ["Any4Embed", "Any4Linear", "Codes", "Tables", "call_each"]

_METHOD = Any4()
_NONE: Mapping[str, Any] = {}


class Any4Linear(Quantized):
    """y = x W^T + b with W an operator [N, K] of any4_jax.weights; a drop-in for nnx.Linear.

    Each array of the operator is a variable of its own in `arrays`, named by its place in the operator ("codes",
    "lut", "terms/0/scales"; those of checkpoints): Codes if it holds integers, nnx.LoRAParam if it is a factor of a
    LowRank, a plain nnx.Variable if it is a constant (the scale of a LowRank, the table of an integer format), else
    Tables. So `nnx.Optimizer(model, optimizer, wrt=Tables)` trains tables, scales and offsets, and optimisers see
    the codes only where they are asked to.

    Of nnx.Linear's parameters, `dot_general`, `promote_dtype` and `preferred_element_type` are left out, because the
    product is any4_jax.matmul's: it decodes within the product, accumulates in float32 and gives the dtype of `x`.

    Under nnx.vmap and nnx.scan the arrays have leading stack axes [*L, ...], added and taken by these transforms.

    Attributes:
      weight: the operator [*L, N, K], rebuilt from `arrays`; may be set.
      arrays: nnx.Dict of variables.
      bias: nnx.Param [*L, N] or None.
      in_features, out_features: K and N (static).
      dtype: what x and the bias are cast to; None promotes one with the other. The dtypes that tables and scales are
        stored in have no part in it (static).
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
        """Draws the kernel and bias that nnx.Linear would draw, and quantizes the kernel.

        Args:
          in_features, out_features: K and N.
          use_bias: whether there is a bias.
          dtype: see the class.
          param_dtype: what the kernel is drawn in, and the bias is kept in.
          precision: taken so that calls written for nnx.Linear fit; the product runs at HIGHEST in any case.
          kernel_init, bias_init: initializers of [K, N] and [N]. The axis names (K's, N's) of
            nnx.with_partitioning go to each array of the operator along its own axes.
          rngs: its stream `params` is drawn from.
          kernel_metadata, bias_metadata: metadata of the variables, `out_sharding` like the names above.
          method: how the kernel is quantized.
          group_size: in the place of the method's; None keeps that.

        Raises:
          ValueError: what `any4_jax.quantize` refuses.
          TypeError: a group_size for a method that has none.
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
        """The layer around an operator in hand.

        Args:
          weight: an operator or array [*L, N, K]. Leading axes are for nnx.vmap and nnx.scan.
          bias: [*L, N].
          dtype: see the class.
          kernel_metadata, bias_metadata: what the variables of an nnx.Linear's kernel [*L, K, N] and bias have; the
            arrays stay on the devices where they are.

        Raises:
          ValueError: a weight with fewer than two axes.
        """
        if len(weight.shape) < 2:
            raise ValueError(f"got a weight of shape {weight.shape}, Any4Linear takes [N, K]; reshape it")
        layer = blank(cls)
        parameter = None
        if bias is not None:
            parameter = nnx.Param(bias)
            parameter.set_metadata(parameter.get_metadata() | _plain(bias_metadata))
        layer._hold(weight, parameter, dtype, kernel_metadata, place=False)
        return layer

    def _hold(self, weight: Any, bias: Any, dtype: Any, metadata: Mapping[str, Any], place: bool) -> None:
        self.out_features, self.in_features = weight.shape[-2:]
        self._metadata = tuple(_plain(metadata).items())
        self._arrange(weight, place)
        self.bias = nnx.data(bias)
        self.dtype = None if dtype is None else jnp.dtype(dtype)

    @property
    def kernel_metadata(self) -> dict[str, Any]:
        """The metadata that the arrays' was made from, as of a kernel [K, N]."""
        return dict(self._metadata)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., K], floating -> [..., N]."""
        return dense(x, self.weight, None if self.bias is None else self.bias.get_value(), self.dtype)


def call_each(layers: Sequence[Any], x: jax.Array) -> list[jax.Array]:
    """`[layer(x) for layer in layers]`, by `matmul_each` where all of them are Any4Linear.

    Args:
      layers: modules that read the same input.
      x: [..., K].
    """
    if not all(type(layer) is Any4Linear for layer in layers):
        return [layer(x) for layer in layers]
    biases = [None if layer.bias is None else layer.bias.get_value() for layer in layers]
    promoted = [promote_dtype(x, bias, dtype=layer.dtype) for layer, bias in zip(layers, biases, strict=True)]
    if len({inputs.dtype for inputs, _ in promoted}) > 1:
        return [layer(x) for layer in layers]
    ys = matmul_each(promoted[0][0], [layer.weight for layer in layers])
    return [y if bias is None else y + bias for y, (_, bias) in zip(ys, promoted, strict=True)]


class Any4Embed(Quantized):
    """nnx.Embed over a quantized table: rows are decoded as they are looked up, and `attend` is a product.

    Attributes:
      weight: the operator [N, K] of the embedding; may be set.
      arrays: nnx.Dict of variables, as in Any4Linear.
      num_embeddings, features: N and K (static).
      dtype: of what comes out; None is float32 for the lookup and the input's for `attend` (static).
    """

    dtype: Any

    @classmethod
    def of(cls, weight: Any, *, dtype: DTypeLike | None = None) -> "Any4Embed":
        """The embedding around an operator [N, K] in hand.

        Raises:
          ValueError: a weight that is no matrix.
        """
        if len(weight.shape) != 2:
            raise ValueError(f"got a weight of shape {weight.shape}, Any4Embed takes [N, K]; reshape it")
        layer = blank(cls)
        layer.num_embeddings, layer.features = weight.shape
        layer._arrange(weight, False)
        layer.dtype = None if dtype is None else jnp.dtype(dtype)
        return layer

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int tokens [...] -> [..., K]."""
        return lookup(self.weight, tokens, jnp.float32 if self.dtype is None else self.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """x [..., K], floating -> [..., N], the products with all rows."""
        return dense(x, self.weight, None, self.dtype)


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata for other arrays: without hooks, which are written for float kernels, and without how NNX keeps it."""
    kept = set(metadata) - nnx.Variable.required_metadata
    return {key: metadata[key] for key in sorted(kept) if not key.startswith("on_")}
