"""Any4Linear: nnx.Linear over a quantized weight."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from any4_jax import weights
from any4_jax.matmul import matmul


class Tables(nnx.Variable):
    """The floating-point arrays of a quantized weight (lut, scales, offsets): what may be trained."""


class Codes(nnx.Variable):
    """The integer arrays of a quantized weight. No optimiser and no gradient looks at this class."""


class Any4Linear(nnx.Module):
    """y = x W^T + b with W an operator [N, K] of any4_jax.weights; called like nnx.Linear.

    The operator is kept in two variables, the halves of `weights.partition`, so that
    `nnx.grad(..., wrt=nnx.filterlib.OfType(Tables))` and optimisers can leave the codes alone.

    Attributes:
      tables, codes: the halves of the operator.
      bias: nnx.Param [N] or None.
      in_features, out_features: K and N (static).
      dtype: the dtype that inputs are cast to; None keeps the input's (static).
    """

    def __init__(self, weight: Any, *, bias: jax.Array | None = None, dtype: DTypeLike | None = None) -> None:
        """Raises ValueError for a weight that is not [N, K]."""
        if len(weight.shape) != 2:
            raise ValueError(f"got a weight of shape {weight.shape}, Any4Linear takes [N, K]; use nnx.vmap for stacks")
        self.out_features, self.in_features = weight.shape
        tables, codes = weights.partition(weight)
        self.tables = Tables(tables)
        self.codes = Codes(codes)
        self.bias = None if bias is None else nnx.Param(bias)
        self.dtype = None if dtype is None else jnp.dtype(dtype)

    @property
    def weight(self) -> Any:
        """The operator [N, K]."""
        return weights.combine(self.tables.get_value(), self.codes.get_value())

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., K] -> [..., N]."""
        if self.dtype is not None:
            x = x.astype(self.dtype)
        y = matmul(x, self.weight)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)
