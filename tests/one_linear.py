"""A block of linears that read one input, small enough to be checked by hand: what methods of a block are held to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from any4_jax import matmul, statistics
from any4_jax.methods import BlockResult
from any4_jax.methods.apply import apply_method, apply_site
from any4_jax.methods.base import SiteWeights, scope_of
from any4_jax.models.base import Site
from any4_jax.weights import ScaleInput, is_operator


def summed(contents: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """x [B, T, K] by every kernel, float [K, N] or an operator, times the norm's scale: [B, T, N]."""
    kernels = [contents[name] for name in sorted(contents) if name.endswith(".kernel")]
    ys = [matmul(x, w) if is_operator(w) else jnp.matmul(x, w, precision="highest") for w in kernels]
    return sum(ys) * contents["norm.scale"]


@dataclasses.dataclass
class Linears:
    """See `any4_jax.methods.Block`; the float block is `contents`, and `wanted` what it is to give."""

    contents: Mapping[str, Any]
    assigned: Mapping[str, Any]
    inputs: list[jax.Array]
    masks: list[Any]
    wanted: list[jax.Array]
    last: bool = True

    @classmethod
    def of(cls, method: Any, matrices: Mapping[str, Any], x: Any = None, mask: Any = None, **fields: Any) -> Linears:
        """The block for matrices [N, K] by path and inputs x [R, T, K], in batches of 2 rows."""
        contents = {f"{path}.kernel": jnp.asarray(w, jnp.float32).T for path, w in matrices.items()}
        contents["norm.scale"] = jnp.full(len(next(iter(matrices.values()))), 1.5, jnp.float32)
        x = jnp.zeros((0, 1, 1)) if x is None else jnp.asarray(x, jnp.float32)
        mask = jnp.ones(x.shape[:2], bool) if mask is None else jnp.asarray(mask)
        inputs, masks = ([a[i : i + 2] for i in range(0, len(a), 2)] for a in (x, mask))
        wanted = [summed(contents, each) for each in inputs]
        return cls(contents, dict.fromkeys(matrices, method), inputs, masks, wanted, **fields)

    @property
    def sites(self) -> tuple[Site, ...]:
        return (Site("in", tuple(self.assigned), "norm"),)

    def program(self, batch: int, length: int) -> Any:
        return summed

    def run(self, contents: Mapping[str, Any], x: jax.Array) -> jax.Array:
        return summed(contents, x)

    def targets(self) -> list[jax.Array]:
        return self.wanted

    def reassigned(self, method: Any) -> Linears:
        return dataclasses.replace(self, assigned=dict.fromkeys(self.assigned, method))

    def gather(self, contents: Any, needs: Mapping[str, tuple]) -> dict[str, statistics.Gathered]:
        if not needs:
            return {}
        kinds = dict.fromkeys(kind for each in needs.values() for kind in each)
        x = jnp.concatenate(self.inputs).reshape(-1, self.inputs[0].shape[-1])
        return {"in": statistics.from_activations(x, statistics=kinds)}

    def quantize(self, contents: Mapping[str, Any], paths: list[str], gathered: Mapping[str, Any]) -> BlockResult:
        made, notes = dict(contents), {}
        for path in paths:
            method, w = self.assigned[path], jnp.asarray(contents[f"{path}.kernel"]).T
            if scope_of(method) == "matrix":
                result, scale = apply_method(w, method, gathered.get("in"), path=path), None
            else:
                site = apply_site(SiteWeights({path: w}), method, gathered.get("in"), path)
                result, scale = site.results[path], site.input_scale
            made[f"{path}.kernel"] = result.operator if scale is None else ScaleInput(result.operator, scale)
            notes[path] = result.notes
        return BlockResult(made, notes)
