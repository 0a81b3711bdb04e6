"""A block's contents by name, what a killed run left, and what runs of a block have shown."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax import nnx

from any4_jax.methods.base import AnyMethod, Result, scope_of
from any4_jax.methods.matrices import Finished
from any4_jax.models.base import Site
from any4_jax.models.fold import module_at
from any4_jax.statistics import Gathered
from any4_jax.surgery import nnx_modules, trees
from any4_jax.weights import is_operator

Contents = Mapping[str, Any]


def contents_of(block: nnx.Module) -> dict[str, Any]:
    """The arrays and operators of a block by dotted name; see `any4_jax.methods.Block`."""
    return trees.leaves(nnx_modules.contents(block))


def with_contents(block: nnx.Module, own: Contents, contents: Contents) -> nnx.Module:
    """A block like this one with other contents; the block itself where they equal `own`, the contents it has."""
    changed = {name: leaf for name, leaf in contents.items() if leaf is not own[name]}
    if not changed:
        return block
    new = nnx_modules.copy_module(block)
    for name, leaf in changed.items():
        path, _, last = name.rpartition(".")
        if is_operator(leaf):
            nnx_modules.replace_module(new, path, nnx_modules.around(module_at(new, path), leaf))
        else:
            getattr(module_at(new, path), last).set_value(leaf)
    return new


def site_units(site: Site, methods: Mapping[str, AnyMethod]) -> dict[str, list[str]]:
    """The linears that each site method of a site quantizes together, by a name for this work within the block.

    Args:
      site: of the block.
      methods: of linears, by path in the block; those of other scopes and other sites are passed over.
    """
    mine = {path: methods[path] for path in site.linears if path in methods and scope_of(methods[path]) == "site"}
    together = [[path for path in mine if mine[path] == method] for method in dict.fromkeys(mine.values())]
    return {_unit(site.name, paths): paths for paths in together}


def block_unit(block: str, paths: Iterable[str]) -> str:
    """A name for the work of a block's method on the linears at `paths`; `block` is the block's own path."""
    return _unit(block, paths)


def _unit(name: str, paths: Iterable[str]) -> str:
    # No linear's path looks like this, and no two units of a site or a block have a linear in common.
    return f"{name}({', '.join(paths)})"


@dataclasses.dataclass
class Kept:
    """What a killed run left: results by the path of a linear or the name of one of `site_units` or a `block_unit`.

    Attributes:
      keys: the key of every unit of work, by path; empty where nothing is kept.
      results: those that were found under their keys, by path.
      store: where further results go; None where nothing is kept.
    """

    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    results: Mapping[str, Result] = dataclasses.field(default_factory=dict)
    store: Finished | None = None

    def put(self, path: str, result: Result) -> None:
        """Keeps the result of a unit of work."""
        if self.store is not None:
            self.store.put(path, self.keys[path], result)


@dataclasses.dataclass
class Captured:
    """What runs of a block have shown.

    Attributes:
      gathered: statistics by the name of a site.
      outputs: the float block's output for its inputs, [B, T, E] for each batch; None until a run has shown it.
      targets: its output for the float model's own inputs, likewise.
      built: the last contents, and the module that was built from them.
    """

    gathered: dict[str, Gathered] = dataclasses.field(default_factory=dict)
    outputs: list[jax.Array] | None = None
    targets: list[jax.Array] | None = None
    built: tuple[Contents, nnx.Module] | None = None
