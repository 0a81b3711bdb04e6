"""Products with weights: y = x W^T for every operator, the kernels that compute it, and the rows of a weight."""

from any4_jax.product.explain import explain
from any4_jax.product.lookup import lookup
from any4_jax.product.matmul import matmul
from any4_jax.product.plan import BACKENDS, planned
from any4_jax.product.together import matmul_each

__all__ = ["BACKENDS", "explain", "lookup", "matmul", "matmul_each", "planned"]
