"""A block of a decoder during a walk: the `any4_jax.methods.Block` that methods get."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from any4_jax import statistics
from any4_jax.methods.apply import apply_site
from any4_jax.methods.base import SCALED, AnyMethod, BlockResult, Result, SiteWeights, scope_of
from any4_jax.methods.matrices import Job, Matrix, quantize_matrices, stacked
from any4_jax.models.base import Decoder, Site
from any4_jax.models.fold import is_foldable, rescaled, scale_channels
from any4_jax.statistics import Gathered, Statistic, is_paired
from any4_jax.walk.capture import positions_of, run_block
from any4_jax.walk.program import BlockProgram
from any4_jax.walk.records import Captured, Contents, Kept, contents_of, site_units, with_contents
from any4_jax.weights import ScaleInput, Sparse, is_operator, parts, with_room

_FOLDED = "/folded"
"""The name of a site's folded factor among what is kept of it; no array of a block has a name with a slash."""


@dataclasses.dataclass
class WalkedBlock:
    """See `any4_jax.methods.Block` for contents, assigned, sites, inputs, masks and last.

    Attributes:
      module: the block of the decoder, unchanged.
      own: the contents of `module`.
      path: the path of the block in the decoder.
      decoder: the model.
      caches: (B, T) -> an empty cache of this block.
      float_inputs: what enters the block in the float model; None where no method asks for `targets` or for statistics
        of pairs, or all inputs are the float model's.
      given: statistics from the caller, by the path of a linear in the decoder.
      watch: statistics that are gathered at every site besides those that methods need, and recorded.
      keep_outputs: whether the next block gets the outputs of `module`, not those of the quantized block.
      kept: see `Kept`.
      captured: what runs of the block have shown so far.
      count: called with the path in the decoder of each linear once it is quantized.
    """

    module: nnx.Module
    own: Contents
    path: str
    decoder: Decoder
    contents: Contents
    assigned: Mapping[str, AnyMethod]
    sites: tuple[Site, ...]
    inputs: list[jax.Array]
    masks: list[Any]
    caches: Callable[[int, int], Any]
    last: bool
    float_inputs: list[jax.Array] | None
    given: Mapping[str, Gathered]
    watch: tuple[Statistic, ...]
    keep_outputs: bool
    kept: Kept
    count: Callable[[str], None]
    captured: Captured = dataclasses.field(default_factory=Captured)

    def reassigned(self, method: AnyMethod) -> "WalkedBlock":
        return dataclasses.replace(self, assigned=dict.fromkeys(self.assigned, method))

    def program(self, batch: int, length: int) -> BlockProgram:
        return BlockProgram.of(type(self.decoder).block, self.module, self.caches(batch, length))

    def run(self, contents: Contents, x: jax.Array) -> jax.Array:
        cache = self.caches(*x.shape[:2])
        y, _ = type(self.decoder).block(*nnx.split(self.module_of(contents)), x, cache, positions_of(x), None)
        return y

    def targets(self) -> list[jax.Array]:
        if self.float_inputs is None:
            raise ValueError(f"{self.path}: got no float activations; set `targets` in the method that asks for them")
        captured = self.captured
        if captured.targets is None:
            # Without a sequential method the block's inputs are the float model's own.
            captured.targets = captured.outputs if self.keep_outputs else None
            captured.targets = captured.targets or self._run(self.own, self.float_inputs, {}, outputs=True)[0]
        return captured.targets

    def gather(self, contents: Contents, needs: Mapping[str, tuple[Statistic, ...]]) -> dict[str, Gathered]:
        captured = self.captured
        wanted = {} if not self.inputs else {s.name: s for s in self.sites if s.name in needs and not self._is_kept(s)}
        shown = captured.gathered if self.keep_outputs else {}
        missing = [name for name in wanted if name not in shown or not set(needs[name]) <= set(shown[name])]
        if missing:
            seen = {name: self._empty(wanted[name], self.own, needs[name]) for name in missing}
            outputs = self.keep_outputs and captured.outputs is None
            ys, seen = self._run(self.own if self.keep_outputs else contents, self.inputs, seen, outputs)
            if outputs:
                captured.outputs = ys
            captured.gathered |= seen
        return {name: captured.gathered[name] for name in wanted}

    def finish(self, contents: Contents) -> list[jax.Array]:
        """What the next block gets, once this one is quantized: [B, T, E] for each batch. Also gathers the watched
        statistics of the sites that no run has shown yet."""
        captured = self.captured
        rest = [site for site in self.sites if self.watch and site.name not in captured.gathered]
        if captured.outputs is not None and not rest:
            return captured.outputs
        seen = {site.name: self._empty(site, contents, ()) for site in rest}
        ys, seen = self._run(self.own if self.keep_outputs else contents, self.inputs, seen, outputs=True)
        captured.gathered |= seen
        return ys

    def quantize(self, contents: Contents, paths: list[str], gathered: Mapping[str, Gathered]) -> BlockResult:
        by_linear = {linear: gathered.get(site.name) for site in self.sites for linear in site.linears}
        stats = {path: by_linear.get(path) or self.given.get(f"{self.path}.{path}") for path in paths}
        single = [path for path in paths if scope_of(self.assigned[path]) == "matrix"]
        result = BlockResult(contents, {})
        # From the last site to the first, so that what a factor is folded into is still float.
        for site in reversed(self.sites):
            mine = {path: self.assigned[path] for path in site.linears if path in paths}
            for unit, chosen in site_units(site, mine).items():
                made, folded = self._quantize_site(
                    result.contents, site, f"{self.path}.{unit}", chosen, stats[chosen[0]]
                )
                result = BlockResult(made.contents, {**result.notes, **made.notes})
                # The site's other matrices were divided by what was folded, and read the scaled input.
                for path in set(mine) - set(chosen):
                    own = stats[path]
                    stats[path] = own if own is None or folded is None else own.scaled(folded)
        made = self._quantize_matrices(result.contents, single, stats)
        return BlockResult(made.contents, {**result.notes, **made.notes})

    def module_of(self, contents: Contents) -> nnx.Module:
        """The block with these contents."""
        built = self.captured.built
        if built is None or built[0] is not contents:
            built = contents, with_contents(self.module, self.own, contents)
            if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(contents)):
                self.captured.built = built
        return built[1]

    def _quantize_matrices(self, contents: Contents, paths: list[str], stats: Mapping[str, Any]) -> BlockResult:
        jobs, results = {}, {}
        for path in paths:
            full = f"{self.path}.{path}"
            if full in self.kept.results:
                results[path] = self.kept.results[full]
                self.count(full)
                continue
            matrix = Matrix(contents[f"{path}.kernel"], transposed=True)
            jobs[full] = Job(matrix, self.assigned[path], stats[path], self.kept.keys.get(full, ""))  # type: ignore[arg-type]
        done = quantize_matrices(jobs, self.count, self.kept.store)
        results |= {full.removeprefix(f"{self.path}."): result for full, result in done.items()}
        new = {f"{path}.kernel": result.operator for path, result in results.items()}
        return BlockResult({**contents, **new}, {path: results[path].notes for path in paths})

    def _quantize_site(
        self, contents: Contents, site: Site, unit: str, paths: list[str], stats: Gathered | None
    ) -> tuple[BlockResult, jax.Array | None]:
        """The contents with linears of a site quantized by their method, and the factor [K] that was folded before the
        site, if any."""
        method: Any = self.assigned[paths[0]]
        found = self.kept.results.get(unit)
        if found is None:
            stack = contents[f"{paths[0]}.kernel"].shape[:-2]
            apply = self._applied_to_stack if stack else self._applied
            found = apply(contents, site, unit, method, paths, stats)
            self.kept.put(unit, found)
        for path in paths:
            self.count(f"{self.path}.{path}")
        changed = dict(found.operator)
        folded = changed.pop(_FOLDED, None)
        return BlockResult({**contents, **changed}, found.notes), folded

    def _applied(
        self, contents: Contents, site: Site, unit: str, method: Any, paths: list[str], stats: Gathered | None
    ) -> Result:
        """What a site method changes in the contents, and the notes on each linear."""
        weights = {path: jnp.asarray(contents[f"{path}.kernel"], jnp.float32).T for path in paths}
        foldable = is_foldable(self.module_of(contents), site)
        made = apply_site(SiteWeights(weights, site.repeat, site.width, foldable), method, stats, unit)
        changed, told = self._placed(contents, site, made.results, made.input_scale)
        return Result(changed, {path: {**result.notes, **told} for path, result in made.results.items()})

    def _applied_to_stack(
        self, contents: Contents, site: Site, unit: str, method: Any, paths: list[str], stats: Gathered | None
    ) -> Result:
        """The same for stacks of as many matrices each. Experts are sites of their own: each has the statistics of its
        own tokens, and keeps its own factors, for the layer before them all can't hold those."""
        kernels = {path: contents[f"{path}.kernel"] for path in paths}
        ((*stack, _, _), *others) = (kernel.shape for kernel in kernels.values())
        if any([*shape[:-2]] != stack for shape in others):
            raise ValueError(
                f"{self.path}.{site.name} has matrices of the shapes {[*map(tuple, (stack, *others))]}, and "
                f"{method.name} takes stacks of as many matrices each; give them a method of one matrix by a rule"
            )
        flat = {path: kernel.reshape(-1, *kernel.shape[-2:]) for path, kernel in kernels.items()}
        each: dict[str, list[Result]] = {path: [] for path in paths}
        for i in range(math.prod(stack)):
            weights = {path: jnp.asarray(kernel[i], jnp.float32).T for path, kernel in flat.items()}
            own = stats.of_expert(i) if stats is not None and stats.stack else stats
            made = apply_site(SiteWeights(weights, foldable=False), method, own, f"{unit}[{i}]")
            for path, result in made.results.items():
                if made.input_scale is not None:
                    result = dataclasses.replace(result, operator=ScaleInput(result.operator, made.input_scale))
                    result = dataclasses.replace(
                        result, notes={**result.notes, SCALED: "kept, each expert has its own"}
                    )
                each[path].append(result)
        results = {path: stacked(made, tuple(stack)) for path, made in each.items()}
        changed = {f"{path}.kernel": result.operator for path, result in results.items()}
        return Result(changed, {path: result.notes for path, result in results.items()})

    def _placed(
        self, contents: Contents, site: Site, results: Mapping[str, Result], scale: jax.Array | None
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """The contents that change when a site's operators replace its kernels and its input is scaled, and under
        _FOLDED the factor that was folded; and a note on where the scale is, if there is one."""
        operators = {f"{path}.kernel": result.operator for path, result in results.items()}
        if scale is None or _is_one(scale):
            return operators, {}
        module, leftover = scale_channels(self.module_of(contents), site, scale)
        told = f"folded into {site.after}"
        if leftover is not None:
            operators = {name: ScaleInput(operator, leftover) for name, operator in operators.items()}
            if not is_foldable(self.module_of(contents), site):
                return operators, {SCALED: f"kept, {site.after or 'no layer before it'} can't hold it"}
            told += " where repeats share it, else kept"
        folded = scale if leftover is None else scale / leftover
        before = f"{site.after}."
        changed = {name: value for name, value in contents_of(module).items() if name.startswith(before)}
        for name in (f"{path}.kernel" for path in site.linears if f"{path}.kernel" not in operators):
            kernel = contents[name]
            if is_operator(kernel):
                changed[name] = ScaleInput(kernel, 1 / folded)
            else:
                changed[name] = rescaled(kernel, folded[:, None], divide=True)
        return changed | operators | {_FOLDED: folded}, {SCALED: told}

    def _is_kept(self, site: Site) -> bool:
        """Whether an earlier run left the results of all that is assigned at a site."""
        if self.watch:
            return False
        mine = {path: self.assigned[path] for path in site.linears if path in self.assigned}
        if not mine or any(scope_of(method) == "block" for method in mine.values()):
            return False
        units = [path for path, method in mine.items() if scope_of(method) == "matrix"] + [*site_units(site, mine)]
        return all(f"{self.path}.{unit}" in self.kept.results for unit in units)

    def _empty(self, site: Site, contents: Contents, needs: tuple[Statistic, ...]) -> Gathered:
        kernel = contents[f"{site.linears[0]}.kernel"]
        k = kernel.shape[-1] if is_operator(kernel) else kernel.shape[-2]
        experts = kernel.shape[0] if len(kernel.shape) == 3 else None
        return statistics.empty(k, dict.fromkeys((*self.watch, *needs)), experts)

    def _run(
        self, contents: Contents, inputs: list[jax.Array], seen: dict[str, Gathered], outputs: bool
    ) -> tuple[list[jax.Array], dict[str, Gathered]]:
        # A number of outliers of its own would take each block a program of its own.
        sparse = any(isinstance(part, Sparse) for value in contents.values() for part in parts(value))
        graphdef, state = nnx.split(self.module_of(with_room(contents) if sparse else contents))
        paired = any(is_paired(statistic) for gathered in seen.values() for statistic in gathered)
        beside: list[tuple[Any, ...]] = [()] * len(inputs)
        if paired and self.float_inputs is not None and not self.keep_outputs:
            beside = [(*nnx.split(self.module), x_float) for x_float in self.float_inputs]
        ys = []
        for x, mask, floats in zip(inputs, self.masks, beside, strict=True):
            cache = self.caches(*x.shape[:2])
            y, seen = run_block(type(self.decoder).block, graphdef, state, x, cache, mask, seen, outputs, *floats)
            ys.append(y)
        return ys, seen


def _is_one(scale: jax.Array) -> bool:
    """Whether a scale is known to change nothing, so that none has to be kept."""
    return not isinstance(scale, jax.core.Tracer) and bool((scale == 1).all())
