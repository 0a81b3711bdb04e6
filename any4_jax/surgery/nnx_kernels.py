"""The kernels of NNX modules that no quantized layer takes the place of: those of einsums, of several axes, of experts.

They are known by the class of their module, by a declaration of the caller's, or by tracing the model.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from any4_jax.methods.matrices import Matrix
from any4_jax.nn.kernel import CONTAINERS, Any4Kernel, Kernel, WatchedKernel, put_kernel
from any4_jax.nn.plain import is_layer
from any4_jax.surgery import tracing
from any4_jax.surgery.declarations import Declaration, Declared, Einsum, layout_of
from any4_jax.surgery.nnx_calls import caller, under_maps
from any4_jax.surgery.rules import declared_for
from any4_jax.surgery.trees import dotted
from any4_jax.weights import Contraction, Layout

Place = tuple[tuple, str]
"""The path of a module, and the attribute in which it holds a kernel."""
_ADAPTER = nnx.LoRAParam


def name_of(path: tuple, attribute: str) -> str:
    """The path by which rules know a kernel: that of its layer if it is its "kernel", else its own."""
    return dotted(path if attribute == "kernel" and path else (*path, attribute))


def parameters(model: nnx.Module) -> dict[str, tuple[Place, nnx.Param]]:
    """The parameters of at least two axes that are no part of an nnx.Linear or nnx.Embed, by name."""
    # A kernel that several attributes hold has the name that it has in the module's state: the first of the alphabet.
    found: dict[str, tuple[Place, nnx.Param]] = {}
    seen: set[int] = set()
    for path, module in nnx.iter_modules(model):
        if is_layer(module):
            continue
        for attribute, value in sorted(vars(module).items()):
            own = isinstance(value, nnx.Param) and not isinstance(value, _ADAPTER)
            if own and id(value) not in seen and getattr(value.get_value(), "ndim", 0) > 1:
                seen.add(id(value))
                found[name_of(path, attribute)] = (path, attribute), value
    return found


def _by_class(module: nnx.Module) -> tuple[str, Declaration | Layout] | None:
    """The kernel of a module whose class or equation says what it contracts: (attribute, what it says)."""
    if isinstance(module, nnx.LinearGeneral | nnx.LoRALinear):
        inner, outer = _features(module)
        kernel = module.kernel.get_value()
        roles = "L" * (kernel.ndim - len(inner + outer)) + "K" * len(inner) + "N" * len(outer)
        return "kernel", Layout(roles, tuple(kernel.shape), jnp.dtype(kernel.dtype).name)
    equation = getattr(module, "einsum_str", None)
    if not isinstance(equation, str):
        return None
    arrays = [
        attribute
        for attribute, value in vars(module).items()
        if isinstance(value, nnx.Param) and not isinstance(value, _ADAPTER) and attribute != "bias"
    ]
    try:
        return (arrays[0], Einsum(equation)) if len(arrays) == 1 else None
    except ValueError:
        return None  # an equation of another form: a tracing may tell


def _features(module: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The lengths of the axes of K and of N in the kernel of an nnx.LinearGeneral or nnx.LoRALinear."""
    inner, outer = module.in_features, module.out_features
    return (inner, outer) if isinstance(inner, tuple) else ((inner,), (outer,))


def _turned(module: nnx.Module, kernel: Any) -> str | None:
    """Why the axes of a kernel are not those that its module says, in words; None if they are, or it says nothing."""
    if isinstance(module, nnx.LinearGeneral | nnx.LoRALinear):
        inner, outer = _features(module)
        need = (*inner, *outer)
    else:
        need = tuple(getattr(module, "kernel_shape", ()))
    if not need or tuple(kernel.shape[-len(need) :]) == need:
        return None
    kind = type(module).__name__
    return f"an nnx.{kind} {list(need)} with a kernel {list(kernel.shape)}, whose stack is not in front"


def matrices(model: nnx.Module, inputs: Any, declared: Declared) -> dict[str, Matrix]:
    """The kernels, by name.

    Args:
      model: the module.
      inputs: example arguments of its call, or None; see `quantize_model`.
      declared: regexes of names, and what is declared of the kernels that match.
    """
    here = parameters(model)
    told: dict[str, Layout | str] = {}
    for path, module in nnx.iter_modules(model):
        by_class = _by_class(module)
        if by_class is not None and name_of(path, by_class[0]) in here:
            attribute, says = by_class
            name = name_of(path, attribute)
            kernel = vars(module)[attribute].get_value()
            turned = _turned(module, kernel)
            if turned is not None:
                told[name] = turned
            elif isinstance(says, Layout):
                told[name] = says
            elif len(says.roles) <= kernel.ndim:
                told[name] = layout_of(name, says, kernel)
    tables: set[str] = set()
    if inputs is not None:
        kernels = {name: param.get_value() for name, (_, param) in here.items()}
        mapped: dict[str, set[tuple[int, ...]]] = {}
        names = {(*path, attribute): name for name, ((path, attribute), _) in here.items()}
        finding = tracing.find(caller(model, names, mapped), kernels, *tracing.call_of(inputs))
        found_so = tracing.layouts(finding, kernels)
        told |= {name: under_maps(says, mapped.get(name, set())) for name, says in found_so.items() if name not in told}
        tables = finding.tables
    for name, declaration in declared_for(here, declared).items():
        told[name] = layout_of(name, declaration, here[name][1].get_value())
    beside = _adapters(model)
    found = {}
    for name, known in told.items():
        (path, _), param = here[name]
        layout, special = (None, known) if isinstance(known, str) else (known, beside.get(path))
        found[name] = Matrix(param.get_value(), False, by_name=name in tables, special=special, layout=layout)
    return found


def _adapters(model: nnx.Module) -> dict[tuple, str]:
    """The modules that hold an adapter beside their kernels, which code outside of them may add, by path."""
    found = {}
    for path, module in nnx.iter_modules(model):
        names = [name for name, value in vars(module).items() if isinstance(value, _ADAPTER)]
        if names:
            found[path] = f"a {type(module).__name__} with {' and '.join(names)} beside its kernel"
    return found


def shared(model: nnx.Module, layers: Mapping[str, Any]) -> dict[str, str]:
    """The kernels that a layer and a module of another kind share, by name, and why they stay, in words.

    Args:
      model: the module.
      layers: the variables of its nnx.Linears and nnx.Embeds, by name.
    """
    owners = {id(variable): name for name, variable in layers.items()}
    both = {
        name_of(path, attribute): owners[id(value)]
        for path, module in nnx.iter_modules(model)
        if not is_layer(module)
        for attribute, value in vars(module).items()
        if id(value) in owners
    }
    pairs = [*both.items(), *((layer, name) for name, layer in both.items())]
    return {name: f"with an array that {other} holds too" for name, other in pairs}


def held(model: nnx.Module) -> dict[str, tuple[Place, Any]]:
    """The quantized kernels of a module, by name."""
    found: dict[str, tuple[Place, Any]] = {}
    seen: set[int] = set()
    for path, module in nnx.iter_modules(model):
        for attribute, value in sorted(vars(module).items()):
            if isinstance(value, Any4Kernel) and id(value) not in seen:
                seen.add(id(value))
                found[name_of(path, attribute)] = (path, attribute), value
    return found


def places(model: nnx.Module) -> dict[str, tuple]:
    """Where the kernels are that are quantized or may be, by name: the path of the parameter."""
    return {name: (*path, own) for name, ((path, own), _) in (parameters(model) | held(model)).items()}


def put(model: nnx.Module, done: Mapping[str, Any]) -> None:
    """Puts operators in the places of kernels, by name; a kernel that several modules hold is replaced in all of them.

    Args:
      model: is changed.
      done: a Contraction for a float kernel, an operator or Contraction for a quantized one.
    """
    new: dict[int, Kernel] = {}
    owners, reader = _owners(model)
    for path, module in owners:
        for attribute, value in list(vars(module).items()):
            name = name_of(path, attribute)
            if isinstance(value, nnx.Param | Any4Kernel) and (name in done or id(value) in new):
                if id(value) not in new:
                    new[id(value)] = _kernel(done[name], value)
                put_kernel(module, attribute, new[id(value)], reader(path))


def watch(model: nnx.Module, matrices: Mapping[str, Matrix], needs: tuple[Any, ...]) -> dict[str, WatchedKernel]:
    """Puts a WatchedKernel in the place of each float kernel among `matrices`, and returns them by name.

    Args:
      model: is changed.
      matrices: the float weights by name; embeddings are passed over.
      needs: what is gathered.
    """
    found: dict[str, WatchedKernel] = {}
    new: dict[int, WatchedKernel] = {}
    owners, reader = _owners(model)
    for path, module in owners:
        for attribute, value in list(vars(module).items()):
            matrix = matrices.get(name_of(path, attribute))
            if not isinstance(value, nnx.Param) or matrix is None or matrix.by_name or attribute == "bias":
                continue
            layout = matrix.layout or (linear_layout(value.get_value(), True) if matrix.transposed else None)
            if layout is not None:
                kernel = new.setdefault(id(value), WatchedKernel(value, layout, needs))
                found[name_of(path, attribute)] = kernel
                put_kernel(module, attribute, kernel, reader(path))
    return found


def linear_layout(kernel: Any, transposed: bool) -> Layout:
    """The layout of a linear's kernel, [*L, K, N] if transposed, else [*L, N, K]."""
    roles = "L" * (kernel.ndim - 2) + ("KN" if transposed else "NK")
    return Layout(roles, tuple(kernel.shape), jnp.dtype(kernel.dtype).name)


def _owners(model: nnx.Module) -> tuple[list[tuple[tuple, nnx.Module]], Callable[[tuple], nnx.Module]]:
    """The modules with their paths, and a function from a path to the module there or around it that has code."""
    owners = list(nnx.iter_modules(model))  # at once, because replacing changes what is walked
    at = dict(owners)

    def reader(path: tuple) -> nnx.Module:
        while path and isinstance(at[path], CONTAINERS):
            path = path[:-1]
        return at[path]

    return owners, reader


def _kernel(operator: Any, value: Any) -> Any4Kernel:
    whole = isinstance(operator, Contraction)
    if isinstance(value, Any4Kernel):
        layout, metadata = value.own_layout, value.kernel_metadata
        new = Any4Kernel.of(operator.matrix if whole else operator, operator.layout if whole else layout)
        new._metadata = tuple(metadata.items())
        new._arrange(new.weight, False)
        return new
    return Any4Kernel.of(operator.matrix, operator.layout, value.get_metadata())
