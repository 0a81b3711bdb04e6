"""Lifts of a method to a wider scope: from a matrix to a site, from a matrix or a site to a block."""

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from any4_jax.methods.base import (
    AnyMethod,
    Block,
    BlockMethod,
    BlockResult,
    Method,
    Order,
    SiteMethod,
    SiteResult,
    SiteWeights,
    scope_of,
)
from any4_jax.statistics import Gathered, Statistic


@dataclasses.dataclass(frozen=True)
class _Lifted:
    """What lifted methods take from the method that they lift."""

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


def unlifted(method: Any) -> Any:
    """The method that a lifted one lifts; any other, and None, is itself."""
    return unlifted(method.inner) if isinstance(method, _Lifted) else method


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
    """The block method that quantizes each linear of a block by the method assigned to it.

    Attributes:
      order: with "at_once", one run of the unchanged block gathers the statistics of all sites. With "by_site", those
        of a site are gathered after the sites before it are quantized, as published GPTQ and any4 do.
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
        sited = {path for site in block.sites for path in site.linears}
        made = block.quantize(contents, [path for path in block.assigned if path not in sited], {})
        return BlockResult(made.contents, {**notes, **made.notes})


def order_of(methods: Iterable[AnyMethod]) -> Order:
    """The order that methods of one block need if one of them is sequential."""
    return "at_once" if any(getattr(method, "order", None) == "at_once" for method in methods) else "by_site"


def needs_of(block: Block, site) -> tuple[Statistic, ...]:
    """The statistics that the methods assigned to a site's linears need of its input, each once."""
    methods = [block.assigned[path] for path in site.linears if path in block.assigned]
    return tuple(dict.fromkeys(statistic for method in methods for statistic in method.needs))


@dataclasses.dataclass(frozen=True)
class _OnBlock(_Lifted):
    scope: ClassVar[Literal["block"]] = "block"
    targets: ClassVar[bool] = False
    order: Order

    @property
    def sequential(self) -> bool:
        return self.order == "by_site"

    def apply(self, block: Block) -> BlockResult:
        return OnBlock(self.order).apply(block.reassigned(self.inner))


def on_block(method: Method | SiteMethod, order: Order | None = None) -> BlockMethod:
    """The block method that quantizes all linears assigned to it by `method`.

    Args:
      method: a method of one matrix or of a site.
      order: see `OnBlock`; None means "by_site" if the method is sequential, else "at_once".

    Raises:
      ValueError: `method` is a block's method already.
    """
    if scope_of(method) == "block":
        raise ValueError(f"got {method.name}, which is a block's method already; use it as it is")
    chosen: Order = order or ("by_site" if method.sequential else "at_once")
    return _OnBlock(method, chosen)  # type: ignore[return-value]
