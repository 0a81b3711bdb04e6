"""A kernel of any rank as a matrix: which of its axes a product contracts, which it keeps, and which are stacked."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from any4_jax.weights.operator import Operator, dequantize, operator, product, take_rows

_LETTERS = "LNK"


@dataclasses.dataclass(frozen=True)
class Layout:
    """What each axis of a float kernel is to the products that read it.

    Attributes:
      roles: a letter for each axis: "K" is contracted, "N" is an axis of the output, "L" numbers matrices that products
        read one by one or side by side: experts, layers stacked for a scan.
      dims: the axes' lengths.
      dtype: of the float kernel.
    """

    roles: str
    dims: tuple[int, ...]
    dtype: str = "float32"

    @property
    def order(self) -> tuple[int, ...]:
        """The axes of the kernel in the order of the matrix: those of L, of N, of K."""
        return tuple(axis for letter in _LETTERS for axis, role in enumerate(self.roles) if role == letter)

    @property
    def shape(self) -> tuple[int, ...]:
        """(*L, N, K) of the matrix."""
        return (*self._of("L"), math.prod(self._of("N")), math.prod(self._of("K")))

    def _of(self, letter: str) -> tuple[int, ...]:
        return tuple(n for n, role in zip(self.dims, self.roles, strict=True) if role == letter)

    def matrix(self, kernel: Any) -> jax.Array:
        """A kernel as a matrix [*L, N, K]; it may have more axes in front, which stay there."""
        more = kernel.ndim - len(self.dims)
        axes = (*range(more), *(more + axis for axis in self.order))
        return jnp.transpose(kernel, axes).reshape(*kernel.shape[:more], *self.shape)

    def kernel(self, matrix: Any) -> jax.Array:
        """The inverse of `matrix`."""
        more = matrix.shape[: matrix.ndim - len(self.shape)]
        split = matrix.reshape(*more, *(self.dims[axis] for axis in self.order))
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return jnp.transpose(split, (*range(len(more)), *(len(more) + axis for axis in back)))

    def stacked(self, stack: tuple[int, ...]) -> "Layout":
        """The layout of a kernel whose matrix has the axes `stack` in place of L: more in front, or the last few."""
        mine = self._of("L")
        if len(stack) >= len(mine):
            more = stack[: len(stack) - len(mine)]
            return Layout("L" * len(more) + self.roles, (*more, *self.dims), self.dtype)
        left = len(mine) - len(stack)
        gone = [axis for axis, role in enumerate(self.roles) if role == "L"][:left]
        kept = [axis for axis in range(len(self.dims)) if axis not in gone]
        return Layout("".join(self.roles[axis] for axis in kept), tuple(self.dims[axis] for axis in kept), self.dtype)


@operator(static={"roles", "dims", "dtype"}, axes={"matrix": "NK"})
class Contraction(Operator):
    """A kernel of any rank, stored as the matrix that its products read.

    As an operator it is that matrix, [*L, N, K]. `layout` says how the kernel's axes became those of the matrix. Where
    a transformation added leading axes to the arrays, or took some away, the layout follows.

    Attributes:
      matrix: an operator [*L, N, K].
      roles, dims, dtype: see `Layout`.
    """

    matrix: Operator
    roles: str
    dims: tuple[int, ...]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        shape, own = tuple(self.matrix.shape), Layout(self.roles, tuple(self.dims), self.dtype).shape
        if shape[-2:] != own[-2:]:
            raise ValueError(f"a kernel {list(self.dims)} with the axes {self.roles} is no matrix {list(shape)}")
        return shape

    @property
    def layout(self) -> Layout:
        """How the kernel's axes became those of the matrix."""
        return Layout(self.roles, tuple(self.dims), self.dtype).stacked(tuple(self.matrix.shape[:-2]))

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """The shape of the float kernel."""
        return self.layout.dims


def contraction(matrix: Any, layout: Layout) -> Contraction:
    """An operator [*L, N, K] as the kernel of this layout."""
    return Contraction(matrix, layout.roles, layout.dims, layout.dtype)


@dequantize.register
def _(w: Contraction, dtype=jnp.float32) -> jax.Array:
    return dequantize(w.matrix, dtype)


@product.register
def _(w: Contraction, x: jax.Array, backend: str | None = None) -> jax.Array:
    return product(w.matrix, x, backend)


@take_rows.register
def _(w: Contraction, rows):
    return take_rows(w.matrix, rows)
