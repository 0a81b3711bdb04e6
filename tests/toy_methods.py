"""Methods of each scope as a stranger would write them, small enough to be checked by hand."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from any4_jax.methods import AnyMethod, BlockResult, Int, Method, Result, SiteResult, on_block
from any4_jax.statistics import AbsMax, Hessian, Statistic


@dataclasses.dataclass(frozen=True)
class Nested:
    """A method of one matrix around another: the inner one's result, with a note of the Hessian's mean diagonal.

    Attributes:
      inner: what quantizes.
      by_site: whether it is sequential.
    """

    name: ClassVar[str] = "toy-nested"
    inner: Method = Int(4)
    by_site: bool = True

    @property
    def sequential(self) -> bool:
        return self.by_site

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return (Hessian(), *self.inner.needs)

    def check(self, gathered: bool) -> None:
        if not gathered:
            raise ValueError("got no data, toy-nested needs a Hessian; pass data")
        self.inner.check(gathered)

    def apply(self, w, gathered) -> Result:
        result = self.inner.apply(w, gathered)
        energy = jnp.trace(gathered[Hessian()].mean) / w.shape[1]
        return Result(result.operator, {**result.notes, "energy": energy, "searched": True})


@dataclasses.dataclass(frozen=True)
class EvenInputs:
    """A method of a site: it divides each input by the square root of its largest magnitude, in the manner of
    SmoothQuant (arXiv 2211.10438, eq. 4 with alpha = 1/2 and weights of one size).

    Attributes:
      inner: what quantizes the scaled matrices.
      by_site: whether it is sequential.
    """

    name: ClassVar[str] = "toy-even"
    scope: ClassVar[Literal["site"]] = "site"
    needs: ClassVar[tuple[Statistic, ...]] = (AbsMax(),)
    inner: Method = Int(8)
    by_site: bool = False

    @property
    def sequential(self) -> bool:
        return self.by_site

    def check(self, gathered: bool) -> None:
        self.inner.check(gathered)

    def apply(self, site, gathered) -> SiteResult:
        k = next(iter(site.weights.values())).shape[1]
        size = jnp.ones(k) if gathered is None else jnp.sqrt(jnp.maximum(gathered[AbsMax()], 1e-5))
        size = site.shared(size)
        scaled = None if gathered is None else gathered.scaled(1 / size)
        made = {path: self.inner.apply(w * size, scaled) for path, w in site.weights.items()}
        noted = {path: Result(one.operator, {"largest": size.max()}) for path, one in made.items()}
        return SiteResult(noted, 1 / size)


@dataclasses.dataclass(frozen=True)
class FitNorms:
    """A method of a block: `inner` quantizes it, then gradient descent fits the scales of its norms to the float
    block's outputs.

    Attributes:
      inner: what quantizes.
      steps: of gradient descent.
    """

    name: ClassVar[str] = "toy-fit"
    scope: ClassVar[Literal["block"]] = "block"
    targets: ClassVar[bool] = True
    sequential: ClassVar[bool] = True
    inner: AnyMethod = Int(3)
    steps: int = 12

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return self.inner.needs

    def check(self, gathered: bool) -> None:
        self.inner.check(gathered)

    def apply(self, block) -> BlockResult:
        start = on_block(self.inner).apply(block.reassigned(self.inner))
        norms = {name: start.contents[name] for name in start.contents if name.endswith("norm.scale")}
        # As arguments, not constants: so the blocks' programs are equal, and the compilation cache holds them once.
        given = dict(start.contents), block.inputs, block.targets()

        def loss(norms, contents, inputs, targets):
            ys = [block.run({**contents, **norms}, x) for x in inputs]
            return sum(jnp.mean((y - target) ** 2) for y, target in zip(ys, targets, strict=True))

        step = jax.jit(jax.value_and_grad(loss))
        first, best, least = None, norms, jnp.inf
        for _ in range(self.steps):
            error, gradient = step(norms, *given)
            first = error if first is None else first
            if error < least:
                best, least = norms, error
            norms = jax.tree.map(lambda n, g: n - 0.05 * g / (jnp.abs(g).max() + 1e-12), norms, gradient)
        notes = {path: {"before": float(first), "after": float(least)} for path in block.assigned}
        return BlockResult({**start.contents, **best}, notes)
