"""What a caller says of a kernel that no class of layers says: which of its axes a product contracts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from any4_jax.weights import Layout


@dataclasses.dataclass(frozen=True)
class Einsum:
    """The kernel is the second factor of an einsum: `Einsum("BTD,NDH->BTNH")` contracts D, and N and H are outputs.

    An axis that both factors and the output have is one of a stack, such as experts: `Einsum("ETD,EDF->ETF")`.

    Attributes:
      equation: as in jnp.einsum, with two factors and an output. "..." may be in x and in the output.
    """

    equation: str

    def __post_init__(self) -> None:
        if isinstance(self.equation, str):
            first, _, rest = self.equation.replace(" ", "").partition(",")
            kernel, arrow, out = rest.partition("->")
            letters = [c for c in kernel if c.isalpha()]
            shared, kept = set(first) & set(letters), set(letters) & set(out)
            told = len(set(letters)) == len(kernel) > 1 and set(letters) == shared | kept and shared - kept
            if first and arrow and "," not in rest and told and kept - shared:
                return
        raise ValueError(
            f"got the equation {self.equation!r}, need two factors and an output of which the second factor has axes "
            'that are contracted and axes that stay, such as "BTD,NDH->BTNH"; write it so'
        )

    @property
    def roles(self) -> str:
        """A letter for each axis of the kernel, see `weights.Layout`."""
        first, _, rest = self.equation.replace(" ", "").partition(",")
        kernel, _, out = rest.partition("->")
        return "".join("N" if c not in first else "L" if c in out else "K" for c in kernel)


@dataclasses.dataclass(frozen=True)
class Axes:
    """What each axis of the kernel is: `Axes("NKN")` for a kernel [N, D, H] of which D is contracted.

    Attributes:
      roles: a letter for each axis: K is contracted, N is an output, L numbers matrices (experts, layers of a scan).
    """

    roles: str

    def __post_init__(self) -> None:
        if not isinstance(self.roles, str) or set(self.roles) - set("LNK") or not {"N", "K"} <= set(self.roles):
            raise ValueError(
                f"got the axes {self.roles!r}, need a letter for each axis: K contracted, N output, L stacked, such as "
                '"KNN"; write them so'
            )


Declaration = Einsum | Axes
Declared = Sequence[tuple[str, Declaration]]
"""Regexes of paths, and what is declared of the kernels that match; the first that matches counts."""


def layout_of(path: str, declaration: Declaration, kernel: Any) -> Layout:
    """The layout of a float kernel for which this was declared.

    Raises:
      ValueError: the kernel has another number of axes.
    """
    roles, shape = declaration.roles, tuple(kernel.shape)
    more = len(shape) - len(roles)
    if more < 0:
        raise ValueError(
            f"{path}: got a kernel {list(shape)}, and {declaration} has {len(roles)} axes; declare what the kernel has"
        )
    return Layout("L" * more + roles, shape, jnp.dtype(kernel.dtype).name)
