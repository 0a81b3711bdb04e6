"""Methods lifted to a wider scope: of one matrix to a site, of a matrix or a site to a block."""

import dataclasses
from typing import Any, ClassVar, Literal

from any4_jax.methods.base import (
    AnyMethod,
    Block,
    BlockMethod,
    BlockResult,
    Method,
    SiteMethod,
    SiteResult,
    SiteWeights,
    scope_of,
)
from any4_jax.statistics import Gathered, Statistic

Order = Literal["at_once", "by_site"]


@dataclasses.dataclass(frozen=True)
class _Lifted:
    """A method that stands for another."""

    inner: AnyMethod

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def sequential(self) -> bool:
        return self.inner.sequential

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return self.inner.needs

    def check(self, gathered: bool) -> None:
        self.inner.check(gathered)


@dataclasses.dataclass(frozen=True)
class _OnSite(_Lifted):
    scope: ClassVar[Literal["site"]] = "site"
    inner: Method

    def apply(self, site: SiteWeights, gathered: Gathered | None) -> SiteResult:
        return SiteResult({path: self.inner.apply(w, gathered) for path, w in site.weights.items()})


def on_site(method: Method) -> SiteMethod:
    """The site method that quantizes each matrix of a site by itself."""
    return _OnSite(method)  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class OnBlock:
    """The block method that quantizes each of a block's linears by the method that it is assigned.

    Attributes:
      order: "at_once": statistics of all sites are gathered in one run of the block as it came; "by_site": those of a
        site with the sites before it quantized already, as published GPTQ and any4 do.
    """

    order: Order

    def apply(self, block: Block) -> BlockResult:
        """See `BlockMethod.apply`."""
        stages = [block.sites] if self.order == "at_once" else [(site,) for site in block.sites]
        contents, notes = block.contents, dict[str, Any]()
        for stage in stages:
            paths = [path for site in stage for path in site.linears if path in block.assigned]
            if not paths:
                continue
            needs = {site.name: needs_of(block, site) for site in stage}
            gathered = block.gather(contents, {name: kinds for name, kinds in needs.items() if kinds})
            made = block.quantize(contents, paths, gathered)
            contents, notes = made.contents, {**notes, **made.notes}
        return BlockResult(contents, notes)


def needs_of(block: Block, site) -> tuple[Statistic, ...]:
    """All statistics of a site's input that the methods assigned to its linears use, each once."""
    methods = [block.assigned[path] for path in site.linears if path in block.assigned]
    return tuple(dict.fromkeys(statistic for method in methods for statistic in method.needs))


@dataclasses.dataclass(frozen=True)
class _OnBlock(_Lifted):
    scope: ClassVar[Literal["block"]] = "block"
    targets: ClassVar[bool] = False
    order: Order

    def apply(self, block: Block) -> BlockResult:
        return OnBlock(self.order).apply(block.reassigned(self.inner))


def on_block(method: Method | SiteMethod, order: Order | None = None) -> BlockMethod:
    """The block method that quantizes all linears that it is assigned by `method`; see `OnBlock` for the order. None is
    "by_site" where the method is sequential.

    Raises:
      ValueError: a method of a block.
    """
    if scope_of(method) == "block":
        raise ValueError(f"got {method.name}, which is a block's method already; use it as it is")
    chosen: Order = order or ("by_site" if method.sequential else "at_once")
    return _OnBlock(method, chosen)  # type: ignore[return-value]
