"""Statistics of models that run as a whole: the products read float kernels under watch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx

from any4_jax.methods.matrices import Matrix, Progress
from any4_jax.models import hf_flax
from any4_jax.nn.coded_variables import watched
from any4_jax.nn.interpret import jit_arrays
from any4_jax.nn.swapping import intercepted, quantized_dense
from any4_jax.nn.watching import Gathering, empty, flattened
from any4_jax.statistics import Gathered, Statistic
from any4_jax.surgery import Declared, linen_modules, nnx_modules
from any4_jax.surgery.nnx_kernels import linear_layout, watch
from any4_jax.surgery.tracing import call_of

Needs = tuple[Statistic, ...]
Found = dict[str, Gathered]


def run_hf(
    model: Any, batches: Sequence[Any], needs: Needs, progress: Progress | None, declared: Declared = ()
) -> Found:
    """Statistics by path of a Hugging Face Flax model, over batches of keyword arguments. Tokens that "attention_mask"
    hides are not counted. The kernels are those of its dense layers, and those of which something is declared."""

    def forward(kernels: dict[str, Any], params: Any, arguments: tuple, named: dict[str, Any]) -> None:
        hf_flax.with_params(model, linen_modules.with_kernels(params, kernels))(*arguments, **named)

    return _gather(forward, model.params, linen_modules.hf_matrices(model, declared=declared), batches, needs, progress)


def run_linen(
    model: Any, batches: Sequence[Any], needs: Needs, progress: Progress | None, declared: Declared = ()
) -> Found:
    """Statistics by path of a pair (Linen module, variables), over batches of arguments of `apply` ("method" too).

    Kernels that are no Dense layer's are found as in `run_nnx`.
    """
    module, variables = model
    swapped = intercepted(module, quantized_dense)

    def forward(kernels: dict[str, Any], variables: Any, arguments: tuple, named: dict[str, Any]) -> None:
        params = linen_modules.with_kernels(variables["params"], kernels)
        swapped.apply({**variables, "params": params}, *arguments, **named, mutable=True)

    whole = variables if "params" in variables else {"params": linen_modules.params_of(variables)}
    matrices = linen_modules.pair_matrices(model, batches[0], declared)
    return _gather(forward, whole, matrices, batches, needs, progress)


def _gather(
    forward: Callable[..., Any],
    variables: Any,
    matrices: Mapping[str, Matrix],
    batches: Sequence[Any],
    needs: Needs,
    progress: Progress | None,
) -> Found:
    taken = {path: matrix for path, matrix in matrices.items() if not matrix.by_name}
    layouts = {path: matrix.layout or linear_layout(matrix.array, matrix.transposed) for path, matrix in taken.items()}
    kernels = {path: matrix.array for path, matrix in taken.items()}
    seen = {path: empty(layout.shape[-1], needs, layout.shape[:-2]) for path, layout in layouts.items()}

    def step(kernels: Any, variables: Any, seen: Found, arguments: tuple, named: dict[str, Any]) -> Found:
        reader = Gathering(seen, named.get("attention_mask"))
        both = {path: (kernel, layouts[path]) for path, kernel in kernels.items()}
        watched(forward, both, reader, variables, arguments, named)
        return reader.state

    jitted = jit_arrays(step)
    for index, batch in enumerate(batches):
        seen = jitted(kernels, variables, seen, *call_of(batch))
        if progress is not None:
            progress(index + 1, len(batches), "batch")
    return {path: flattened(gathered) for path, gathered in seen.items()}


def run_nnx(
    model: nnx.Module, batches: Sequence[Any], needs: Needs, progress: Progress | None, declared: Declared = ()
) -> Found:
    """Statistics by path of any NNX module, over batches of arguments of its call, or of its method "method".

    Kernels that no class of layers tells of are found by tracing the first batch, or by what is declared of them. Each
    matrix of a stack, an expert's or a layer's under nnx.scan and nnx.vmap, has statistics of its own.
    """
    tapped: Any = nnx.clone(model)
    kernels = watch(tapped, nnx_modules.matrices(model, batches[0], declared), needs)

    def step(module: Any, arguments: tuple, named: dict[str, Any]) -> None:
        named = dict(named)
        getattr(module, named.pop("method", "__call__"))(*arguments, **named)

    jitted = jit_arrays(step, nnx.jit)
    for index, batch in enumerate(batches):
        jitted(tapped, *call_of(batch))
        if progress is not None:
            progress(index + 1, len(batches), "batch")
    return {path: flattened(kernel.seen.get_value()) for path, kernel in kernels.items()}
