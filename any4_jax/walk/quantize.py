"""`quantize_model`: takes any kind of model and returns a quantized one of the same kind."""

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from operator import itemgetter
from typing import Any

from flax import nnx

from any4_jax.data.passages import sketch
from any4_jax.methods import AnyMethod
from any4_jax.methods.base import Note, Result, scope_of
from any4_jax.methods.fields import check_fields
from any4_jax.methods.lifts import unlifted
from any4_jax.methods.matrices import (
    Finished,
    Job,
    Matrix,
    Progress,
    find_finished,
    job_key,
    plain_note,
    quantize_matrices,
)
from any4_jax.models.base import Decoder
from any4_jax.statistics import Gathered
from any4_jax.surgery import (
    DEFAULT_RULES,
    Recipe,
    Rules,
    Training,
    around,
    container_of,
    copy_module,
    declarations,
    holders,
    pairs,
    recipe_of,
    refuse_special,
    replace_module,
    resolve,
)
from any4_jax.surgery.coverage import arrays_of
from any4_jax.surgery.linen_modules import is_pair
from any4_jax.walk.batches import Batch, token_batches
from any4_jax.walk.calibrate import Data, calibrate
from any4_jax.walk.contents import few, refuse_nonfinite
from any4_jax.walk.driver import Plan, check_scopes, walk
from any4_jax.walk.left import nothing_found, tell_what_is_left


def quantize_model(
    model: Any,
    method: AnyMethod | None,
    *,
    data: Data | None = None,
    stats: Mapping[str, Gathered] | None = None,
    rules: Rules | None = None,
    inputs: Any = None,
    batch_size: int = 8,
    seqlen: int = 2048,
    progress: Progress | None = None,
    finished: Finished | None = None,
    strict: bool = False,
) -> Any:
    """The model with its linears quantized. `model` itself stays as it was; the new one shares the arrays that are left
    alone.

    With data, a decoder is walked block by block. In each block, the statistics that the methods need are gathered from
    what enters each linear, and the linears are quantized. The walk goes on from the output of the float block, or of
    the quantized one if a method is sequential.

    Args:
      model: one of
        - a decoder of any4_jax.models, or any other NNX module: every nnx.Linear becomes an Any4Linear, every nnx.Embed
          that a rule names an Any4Embed, and every other kernel an Any4Kernel in the place of its nnx.Param;
        - a Hugging Face Flax model: its kernels become operators, and it still works, including `generate`;
        - a pair (Linen module, variables or their "params"): the new pair's module has the same `apply` and `init`;
        - a tree of arrays (dicts and lists), where "kernel" is [K, N] and "weight" is [N, K]; others are declared.
      method: for the linears that no rule matches; None leaves these alone.
      data: what statistics are gathered from, as in `calibrate`; None for methods that need none, or with `stats`.
      stats: statistics of the input of each linear by path, as `calibrate` returns them, in place of `data`.
      rules: pairs of a regex of paths and a method, see `any4_jax.surgery.resolve`. A third part declares what is
        contracted of the kernels there: any4_jax.Einsum("BTD,NDH->BTNH"), or any4_jax.Axes("NKN").
      inputs: for an NNX module or a Linen pair, example arguments of its call or of `apply`: a tuple, or a dict by name
        ("method" among them); ShapeDtypeStructs will do. The model is traced with them, and every kernel that products
        contract is found, whatever its rank. None takes the first batch of `data`. Without either, an NNX module has
        the kernels of flax's own layers and of modules with an `einsum_str`, and a pair every two-dimensional "kernel",
        which counts as a Dense layer's, and those of more axes that a module made in `setup`, the layers of an
        attention or the shape of a bias tell of.
      batch_size, seqlen: how the data is cut into batches, as in `calibrate`.
      progress: called with (done, total, path) after each linear.
      strict: whether a matrix of 4096 entries or more that stays float, is no embedding, and is named by no rule is an
        error. Without it, there is a warning where more than a tenth of the weights stay float so.
      finished: where results are kept as soon as they are there. They are looked up before anything is computed, so a
        run that was killed continues, with equal bytes. None keeps nothing.

    Returns:
      A new model of the same kind.

    Raises:
      ValueError: there is no linear to quantize, or all are quantized already; a rule matches nothing; `data` and
        `stats` are both given; `stats` has a path that the model lacks, or lacks one that a method needs; a method of
        sites or blocks is used for a model without blocks; weights or other parameters are not finite.
    """
    new = _quantized(model, method, data, stats, rules, inputs, batch_size, seqlen, progress, finished)
    if method is not None:
        tell_what_is_left(new, rules, strict, traced=inputs is not None or data is not None)
    return new


def _quantized(
    model: Any,
    method: AnyMethod | None,
    data: Data | None,
    stats: Mapping[str, Gathered] | None,
    rules: Rules | None,
    inputs: Any,
    batch_size: int,
    seqlen: int,
    progress: Progress | None,
    finished: Finished | None,
) -> Any:
    if data is not None and stats is not None:
        raise ValueError("got both data and stats, need only one source of statistics; leave one out")
    runs = is_pair(model) or (isinstance(model, nnx.Module) and not isinstance(model, Decoder))
    if data is not None and inputs is None and runs:
        data, inputs = _first_of(data)
    container = container_of(model)
    matrices = container.matrices(model, inputs, declarations(rules))
    by_name = {path for path, matrix in matrices.items() if matrix.by_name}
    done = container.operators(model)
    others = {path: other for path, other in arrays_of(model) if path not in matrices}
    chosen = resolve(matrices, method, rules, by_name, done, others)
    refuse_special(matrices, chosen)
    if not chosen:
        found = len(matrices) - len(by_name)
        if done:
            raise ValueError(
                f"got a model of which {len(done)} layers are quantized already ({few(done)}), and the rules leave the "
                f"other {found} alone; quantize the float model, or name one of the others by a rule"
            )
        raise ValueError(nothing_found(model, found, traced=inputs is not None))
    if stats is not None:
        _check(chosen, stats)
        _check_stats(stats, {*matrices, *done, *others}, chosen, by_name)
    refuse_nonfinite(model, [matrices[path].array for path in chosen])
    count = _counting(len(chosen), progress)
    wider = any(scope_of(m) != "matrix" for m in chosen.values())
    batches = []
    if data is not None and isinstance(model, Decoder):
        batches = token_batches(model, data, batch_size, seqlen)
    if not wider and not any(m.needs or m.sequential for m in chosen.values()):
        data = None  # Nothing would be gathered from it.
    if isinstance(model, Decoder) and (data is not None or wider):
        plan = Plan(
            chosen,
            batches,
            stats or {},
            sequential=data is not None and any(m.sequential for m in chosen.values()),
            finished=finished,
            on_linear=count,
        )
        check_scopes(model, chosen)
        _check(chosen, _tapped(model) if batches else plan.given)
        new, notes = _walked(model, plan)
        new.recipe = _recipe(model, method, rules, chosen, notes, _training(chosen.values(), batches))
        return new
    _refuse_wider_scopes(container.name, chosen)
    if data is not None:
        stats = calibrate(model, data, method, rules=rules, batch_size=batch_size, seqlen=seqlen)
    stats = stats or {}
    _check(chosen, stats)
    results = _results({path: (matrices[path], m, stats.get(path)) for path, m in chosen.items()}, count, finished)
    notes = {path: result.notes for path, result in results.items()}
    operators = {path: matrices[path].held(result.operator) for path, result in results.items()}
    return container.replace(model, operators, _recipe(model, method, rules, chosen, notes))


def _first_of(data: Data) -> tuple[Data, Any]:
    """The data, and its first batch if it is batches of a model's own inputs."""
    if isinstance(data, str | bytes) or not isinstance(data, Iterable):
        return data, None
    batches: Any = [data] if hasattr(data, "shape") else list(data)
    return batches, batches[0] if batches else None


def _walked(model: Decoder, plan: Plan) -> tuple[Decoder, dict[str, Mapping[str, Note]]]:
    """The decoder as a walk quantizes it, and the methods' notes by path."""
    walked = walk(model, plan)
    new: Any = copy_module(model)
    for index, block in enumerate(walked.blocks):
        if block is not model.blocks[index]:
            replace_module(new, model.block_path(index), block)
    held = holders(model)
    for path, operator in walked.others.items():
        replace_module(new, path, around(held[path], operator))
    return new, walked.notes


def _results(
    work: Mapping[str, tuple[Matrix, Any, Gathered | None]], count: Callable[[str], None], finished: Finished | None
) -> dict[str, Result]:
    """The results, by path, of matrices that are independent of each other; kept results are reused."""
    if finished is None:
        return quantize_matrices({path: Job(*each) for path, each in work.items()}, count)
    keys = {path: job_key(*each) for path, each in work.items()}
    kept = find_finished(keys, finished)
    for path in kept:
        count(path)
    jobs = {path: Job(*each, keys[path]) for path, each in work.items() if path not in kept}
    return kept | quantize_matrices(jobs, count, finished)


def _tapped(model: Decoder) -> Collection[str]:
    """The paths of the linears whose inputs a walk sees."""
    sites = ((model.block_path(i), site) for i in range(len(model.blocks)) for site in model.sites(i))
    return {*model.head_site.linears, *(f"{path}.{linear}" for path, site in sites for linear in site.linears)}


def _check(chosen: Mapping[str, AnyMethod], seen: Collection[str]) -> None:
    """Checks each method's fields before any work is done; `seen` are the paths that have statistics."""
    for path, method in chosen.items():
        try:
            check_fields(method)
            method.check(path in seen)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _check_stats(
    stats: Mapping[str, Gathered], known: Collection[str], chosen: Mapping[str, AnyMethod], by_name: Collection[str]
) -> None:
    """Checks that a caller's statistics are of this model, and of all its linears that need them."""
    foreign = [path for path in stats if path not in known]
    if foreign:
        raise ValueError(
            f"got statistics of {few(foreign)}, where the model has no linear; gather them from this model with "
            "calibrate(model, data, method)"
        )
    # What enters an embedding is no activation, so none has statistics unless it is the head too.
    missing = [path for path, method in chosen.items() if method.needs and path not in stats and path not in by_name]
    if missing:
        raise ValueError(
            f"got statistics without those of {few(missing)}, which the method needs; gather them with "
            "calibrate(model, data, method), or leave these linears out by a rule"
        )


def _refuse_wider_scopes(container: str, chosen: Mapping[str, AnyMethod]) -> None:
    for path, method in chosen.items():
        if scope_of(method) != "matrix":
            raise ValueError(
                f"{path}: {method.name} quantizes the matrices of a {scope_of(method)} together, and {container} has "
                "no blocks to walk; pass a decoder of any4_jax.models, or a method of one matrix"
            )


def _recipe(
    model: Any,
    method: AnyMethod | None,
    rules: Rules | None,
    chosen: Mapping[str, AnyMethod],
    notes: Mapping[str, Mapping[str, Note]],
    training: tuple[Training, ...] = (),
) -> Recipe:
    """The record of how a model is quantized now, on top of what was done to it before."""
    earlier = recipe_of(model)
    decided = [
        (path, unlifted(m), tuple(sorted((name, plain_note(note)) for name, note in notes[path].items())))
        for path, m in chosen.items()
        if path in notes
    ]
    return Recipe(
        rules=tuple((pattern, unlifted(m)) for pattern, m in (*pairs(rules), *DEFAULT_RULES, (r".*", method))),
        linears=tuple(sorted((*(earlier.linears if earlier else ()), *decided), key=itemgetter(0))),
        training=(*(earlier.training if earlier else ()), *training),
    )


def _training(methods: Iterable[AnyMethod], batches: list[Batch]) -> tuple[Training, ...]:
    """The record of the text that blocks were trained on, for each method that trains."""
    names = dict.fromkeys(method.name for method in methods if getattr(method, "targets", False))
    if not names or not batches:
        return ()
    rows = [row[counts] for tokens, mask in batches for row, counts in zip(tokens, mask, strict=True)]
    passages = sketch(rows)
    return tuple(Training(name, (), sum(map(len, rows)), passages) for name in names)


def _counting(total: int, progress: Progress | None) -> Callable[[str], None]:
    done = itertools.count(1)
    return lambda path: None if progress is None else progress(next(done), total, path)
