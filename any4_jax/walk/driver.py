"""The walk: for each block, capture what enters its sites, quantize it, keep the results, and go on from its output.

At any time it holds the activations at one boundary between blocks, and the statistics of one block.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from any4_jax import statistics
from any4_jax.methods.apply import apply_block
from any4_jax.methods.base import AnyMethod, BlockMethod, BlockResult, Note, Result, scope_of
from any4_jax.methods.checks import refuse_faults
from any4_jax.methods.lifts import OnBlock, needs_of, order_of
from any4_jax.methods.matrices import Finished, Job, find_finished, quantize_matrices
from any4_jax.models.base import Decoder
from any4_jax.statistics import Gathered, Statistic, is_paired
from any4_jax.surgery import nnx_modules
from any4_jax.walk.batches import Batch
from any4_jax.walk.blocks import WalkedBlock
from any4_jax.walk.capture import EmptyCaches, embed, gather_head
from any4_jax.walk.contents import is_finite
from any4_jax.walk.keys import unit_keys
from any4_jax.walk.records import Kept, block_unit, contents_of
from any4_jax.weights import is_operator


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a walk has to do.

    Attributes:
      assigned: the method of each linear to quantize, by its path in the decoder.
      batches: calibration data; without any, no block runs.
      given: statistics from the caller, by the path of a linear, for a walk without data.
      watch: statistics to gather at every site and return.
      sequential: whether each site's statistics come from the model as quantized so far.
      finished: where results are kept and looked up; None keeps nothing.
      on_linear: called with a path as soon as its linear is quantized.
      on_block: called with a block's path when the walk leaves the block.
    """

    assigned: Mapping[str, AnyMethod]
    batches: list[Batch] = dataclasses.field(default_factory=list)
    given: Mapping[str, Gathered] = dataclasses.field(default_factory=dict)
    watch: tuple[Statistic, ...] = ()
    sequential: bool = False
    finished: Finished | None = None
    on_linear: Callable[[str], None] = lambda path: None
    on_block: Callable[[str], None] = lambda path: None


@dataclasses.dataclass(frozen=True)
class Walked:
    """What a walk has done.

    Attributes:
      blocks: each block with its linears quantized; an unchanged one is the decoder's own.
      others: the operators of what is quantized outside of the blocks, by path.
      notes: the methods' notes by the path of each linear that is quantized.
      gathered: statistics by the path of a linear, where `Plan.watch` asks for any.
    """

    blocks: list[nnx.Module]
    others: dict[str, Any]
    notes: dict[str, Mapping[str, Note]]
    gathered: dict[str, Gathered]


def walk(decoder: Decoder, plan: Plan) -> Walked:
    """Quantizes the linears of `plan.assigned`, gathers what `plan.watch` asks for, or both."""
    kept = _kept(decoder, plan)
    done = Walked([], {}, {}, {})
    masks = [mask for _, mask in plan.batches]
    hidden = [embed(decoder, tokens) for tokens, _ in plan.batches]
    methods = plan.assigned.values()
    paired = plan.sequential and any(is_paired(statistic) for method in methods for statistic in method.needs)
    floats = hidden if paired or any(getattr(method, "targets", False) for method in methods) else None
    caches = EmptyCaches(decoder)
    for index, module in enumerate(decoder.blocks):
        path, own = decoder.block_path(index), contents_of(module)
        block = WalkedBlock(
            module=module,
            own=own,
            path=path,
            decoder=decoder,
            contents=own,
            assigned=_within(plan.assigned, path),
            sites=decoder.sites(index),
            inputs=hidden,
            masks=masks,
            caches=caches.of(index),
            last=index == len(decoder.blocks) - 1,
            float_inputs=floats,
            given=plan.given,
            watch=plan.watch,
            keep_outputs=not plan.sequential,
            kept=kept,
            count=plan.on_linear,
        )
        result = _quantize_block(block, plan.sequential)
        if floats is not None:
            floats = block.targets()
        if hidden:
            hidden = block.finish(result.contents)
        done.blocks.append(block.module_of(result.contents))
        done.notes.update(
            {
                f"{path}.{linear}": result.notes.get(linear, {})
                for linear in block.assigned
                if is_operator(result.contents[f"{linear}.kernel"])
            }
        )
        for site in block.sites if plan.watch else ():
            done.gathered.update(
                dict.fromkeys((f"{path}.{x}" for x in site.linears), block.captured.gathered[site.name])
            )
        plan.on_block(path)
    _quantize_rest(decoder, plan, hidden, floats if paired else None, masks, kept, done)
    return done


def check_scopes(decoder: Decoder, assigned: Mapping[str, AnyMethod]) -> None:
    """Checks that each method can be used where it is assigned.

    Raises:
      ValueError: a method of sites for a linear of no site, or a method of blocks for one outside of all blocks.
    """
    blocks = [decoder.block_path(index) for index in range(len(decoder.blocks))]
    sited = {
        f"{path}.{linear}" for i, path in enumerate(blocks) for site in decoder.sites(i) for linear in site.linears
    }
    inside = tuple(f"{path}." for path in blocks)
    for path, method in assigned.items():
        scope = scope_of(method)
        if (scope == "site" and path not in sited) or (scope == "block" and not path.startswith(inside)):
            raise ValueError(
                f"{path}: {method.name} quantizes the matrices of a {scope} together, and this one is in no {scope}; "
                "name a method of one matrix for it in a rule"
            )


def _quantize_block(block: WalkedBlock, sequential: bool) -> BlockResult:
    """Quantizes a block's linears, first by the methods of a matrix or a site, then by the methods of a block."""
    whole = {path: method for path, method in block.assigned.items() if scope_of(method) == "block"}
    parts = {path: method for path, method in block.assigned.items() if path not in whole}
    # Methods that see several matrices can't tell which of them is at fault.
    for path in (path for path, method in block.assigned.items() if scope_of(method) != "matrix"):
        refuse_faults({"weights": is_finite(block.own[f"{path}.kernel"])}, f"{block.path}.{path}")
    if not sequential:
        # One run of the float block shows all that any of its methods needs.
        needs = {site.name: needs_of(block, site) for site in block.sites}
        block.gather(block.own, {name: kinds for name, kinds in needs.items() if kinds})
    order = order_of(parts.values()) if sequential else "at_once"
    result = OnBlock(order).apply(dataclasses.replace(block, assigned=parts))
    contents, notes = result.contents, result.notes
    for method in dict.fromkeys(whole.values()):
        mine = {path: method for path, other in whole.items() if other == method}
        made = _quantize_whole(dataclasses.replace(block, assigned=mine, contents=contents), method)
        contents, notes = made.contents, {**notes, **made.notes}
    return BlockResult(contents, notes)


def _quantize_whole(block: WalkedBlock, method: BlockMethod | Any) -> BlockResult:
    unit = block_unit(block.path, block.assigned)
    found = block.kept.results.get(unit)
    if found is None:
        if method.targets and block.float_inputs is not None:
            block.targets()
        # What the method tries on the way is neither kept, nor counted, nor among the statistics that are watched.
        apart = dataclasses.replace(block.captured, gathered=dict(block.captured.gathered))
        trial = dataclasses.replace(block, kept=Kept(), count=lambda path: None, captured=apart)
        made = apply_block(trial, method, block.path)
        changed = {name: value for name, value in made.contents.items() if value is not block.contents.get(name)}
        found = Result(changed, {path: dict(made.notes.get(path, {})) for path in block.assigned})
        block.kept.put(unit, found)
    for path in block.assigned:
        block.count(f"{block.path}.{path}")
    return BlockResult({**block.contents, **found.operator}, found.notes)


def _quantize_rest(
    decoder, plan: Plan, hidden: list[Any], floats: list[Any] | None, masks: list[Any], kept: Kept, done: Walked
) -> None:
    """Quantizes what lies outside of the blocks: the head, with statistics of its input, and embeddings, without."""
    head = decoder.head_site
    heads = [path for path in head.linears if path in nnx_modules.holders(decoder)]
    blocks = tuple(f"{decoder.block_path(index)}." for index in range(len(decoder.blocks)))
    methods = {path: method for path, method in plan.assigned.items() if not path.startswith(blocks)}
    needs = [s for path in heads if path in methods for s in methods[path].needs]
    gathered = dict(plan.given)
    if hidden and heads and (plan.watch or needs):
        seen = statistics.empty(hidden[0].shape[-1], dict.fromkeys((*plan.watch, *needs)))
        for x, mask, x_float in zip(hidden, masks, floats or [None] * len(hidden), strict=True):
            seen = gather_head(decoder, x, mask, seen, x_float)
        gathered |= dict.fromkeys(heads, seen)
        done.gathered.update(dict.fromkeys(heads, seen) if plan.watch else {})
    matrices = nnx_modules.matrices(decoder)
    jobs = {
        path: Job(matrices[path], method, gathered.get(path), kept.keys.get(path, ""))  # type: ignore[arg-type]
        for path, method in methods.items()
        if path not in kept.results
    }
    results = {path: kept.results[path] for path in methods if path in kept.results}
    for path in results:
        plan.on_linear(path)
    results |= quantize_matrices(jobs, plan.on_linear, kept.store)
    done.others.update({path: results[path].operator for path in methods})
    done.notes.update({path: results[path].notes for path in methods})


def _within(assigned: Mapping[str, AnyMethod], path: str) -> dict[str, AnyMethod]:
    """The methods of a block's linears, by their paths in the block."""
    prefix = f"{path}."
    return {linear.removeprefix(prefix): method for linear, method in assigned.items() if linear.startswith(prefix)}


def _kept(decoder: Decoder, plan: Plan) -> Kept:
    """What earlier runs left; all of it is looked up before anything is computed."""
    if plan.finished is None:
        return Kept()
    keys = unit_keys(decoder, plan.assigned, plan.batches, plan.given, plan.sequential)
    return Kept(keys, find_finished(keys, plan.finished), plan.finished)
