"""Statistics of models that run as a whole: each Dense layer is tapped while the model computes as usual."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from any4_jax import statistics
from any4_jax.methods.matrices import Progress
from any4_jax.models import hf_flax
from any4_jax.nn.swapping import intercepted, quantized_dense, tapping
from any4_jax.nn.watching import flattened
from any4_jax.statistics import Gathered, Statistic
from any4_jax.surgery import Declared, nnx_modules
from any4_jax.surgery.linen_modules import layer_path, params_of
from any4_jax.surgery.nnx_kernels import watch
from any4_jax.surgery.tracing import call_of

Needs = tuple[Statistic, ...]
Found = dict[str, Gathered]


def run_hf(model: Any, batches: Sequence[Any], needs: Needs, progress: Progress | None) -> Found:
    """Statistics by path of a Hugging Face Flax model, over batches of keyword arguments. Tokens that "attention_mask"
    hides are not counted.

    Raises:
      ValueError: a Dense layer is inside a lifted transformation.
    """

    def forward(params, batch, tap):
        run = hf_flax.with_params(model, params)
        run._module = intercepted(run._module, tapping(tap))
        run(**batch)

    return _gather(forward, model.params, batches, needs, progress)


def run_linen(
    model: Any, batches: Sequence[Any], needs: Needs, progress: Progress | None, declared: Declared = ()
) -> Found:
    """Statistics by path of a pair (Linen module, variables), over batches of arguments of `apply`.

    Raises:
      ValueError: a Dense layer is inside a lifted transformation.
    """
    module, variables = model

    def forward(variables, batch, tap):
        arguments, named = call_of(batch)
        tapped = intercepted(module, quantized_dense, tapping(tap))
        tapped.apply(variables, *arguments, **named, mutable=True)

    whole = variables if "params" in variables else {"params": params_of(variables)}
    return _gather(forward, whole, batches, needs, progress)


def _gather(
    forward: Callable, variables: Any, batches: Sequence[Any], needs: Needs, progress: Progress | None
) -> Found:
    @jax.jit
    def step(variables, batch, seen):
        seen = dict(seen)
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None

        def tap(path: tuple[str, ...], x: jax.Array) -> None:
            name = layer_path(path)
            hidden = mask if mask is not None and mask.shape == x.shape[:-1] else None
            before = seen.get(name, statistics.empty(x.shape[-1], needs))
            seen[name] = statistics.update(before, x, None if hidden is None else hidden.astype(bool))

        forward(variables, batch, tap)
        return seen

    seen: Found = {}
    for index, batch in enumerate(batches):
        try:
            seen = step(variables, batch, seen)
        except jax.errors.UnexpectedTracerError:
            raise ValueError(
                "got a model with Dense layers inside a lifted transformation (nn.scan, nn.remat), whose inputs can't "
                "be tapped; calibrate an unrolled one, or quantize without statistics"
            ) from None
        if progress is not None:
            progress(index + 1, len(batches), "batch")
    return seen


def run_nnx(
    model: nnx.Module, batches: Sequence[Any], needs: Needs, progress: Progress | None, declared: Declared = ()
) -> Found:
    """Statistics by path of any NNX module, over batches of arguments of its call, or of its method "method".

    Kernels that no class of layers tells of are found by tracing the first batch, or by what is declared of them. Each
    matrix of a stack, an expert's or a layer's under nnx.scan and nnx.vmap, has statistics of its own.
    """
    watched: Any = nnx.clone(model)
    kernels = watch(watched, nnx_modules.matrices(model, batches[0], declared), needs)
    steps: dict[Any, Callable[..., Any]] = {}
    for index, batch in enumerate(batches):
        arguments, named = call_of(batch)
        name = named.pop("method", "__call__")
        step = steps.setdefault(name, nnx.jit(lambda module, a, n, name=name: getattr(module, name)(*a, **n)))
        step(watched, arguments, named)
        if progress is not None:
            progress(index + 1, len(batches), "batch")
    return {path: flattened(kernel.seen.get_value()) for path, kernel in kernels.items()}
