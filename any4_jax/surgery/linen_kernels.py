"""What is known of a Linen model's kernels without running it: by its modules, by names, and by the shapes of biases.

The parameters alone don't tell what a product contracts. Whatever is read here, the model's own code computes with the
kernel afterwards, so a wrong reading would cost accuracy and time, and change no function.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors, linen
from flax.core import meta

from any4_jax.surgery import trees
from any4_jax.surgery.declarations import Einsum
from any4_jax.weights import Contraction, Layout, is_operator

Shape = tuple[int, ...]

_ATTENTION = {"query": "KNN", "key": "KNN", "value": "KNN", "out": "KKN"}
"""The kernels of flax's attentions, by the names of their layers."""


def layouts(module: Any, variables: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Layout]:
    """The layouts of the kernels of more than two axes, and of einsums, as far as they can be read in one way only.

    Args:
      module: a Linen module. Those that it makes in `setup`, or has in its fields, are known by their classes.
      variables: all its collections.
      params: those of the collection "params".

    Returns:
      The layouts by dotted path, with ".kernel".
    """
    arrays = {path: meta.unbox(leaf) for path, leaf in trees.leaves(params).items()}
    shapes = {path: tuple(a.shape) for path, a in arrays.items() if not is_operator(a) and hasattr(a, "shape")}
    kernels = {path: shape for path, shape in shapes.items() if trees.is_kernel(path) and len(shape) > 1}
    if not kernels:
        return {}
    found = _by_names(kernels)
    for path, shape in kernels.items():
        roles = _by_bias(shape, shapes.get(f"{path.removesuffix('kernel')}bias"))
        if roles is not None and len(shape) > 2:
            found.setdefault(path, roles)
    for at, node in _modules(module, variables).items():
        key = ".".join((*at, "kernel"))
        if key in kernels:
            roles = _by_class(node, kernels[key], shapes.get(".".join((*at, "bias"))))
            if roles is not None:
                found[key] = roles
    return {path: Layout(roles, kernels[path], jnp.dtype(arrays[path].dtype).name) for path, roles in found.items()}


def _by_names(kernels: Mapping[str, Shape]) -> dict[str, str]:
    """The axes of the kernels of attentions: layers "query", "key", "value" and "out" side by side, of equal heads."""
    found: dict[str, str] = {}
    for path in kernels:
        outer, _, last = path.rpartition("query.kernel")
        paths = {name: f"{outer}{name}.kernel" for name in _ATTENTION}
        if last or not path.endswith("query.kernel") or not all(key in kernels for key in paths.values()):
            continue
        *inner, out = (kernels[key] for key in paths.values())
        more = len(out) - 3
        heads = {(len(shape), shape[:more], shape[-2:]) for shape in inner}
        if more >= 0 and heads == {(len(out), out[:more], out[-3:-1])}:
            found |= {paths[name]: "L" * more + roles for name, roles in _ATTENTION.items()}
    return found


def _by_bias(kernel: Shape, bias: Shape | None) -> str | None:
    """The axes of a kernel [*L, *K, *N] with a bias [*L, *N], if that can be one way only.

    Two axes of K and one of N are those of a convolution too, and count as unknown.
    """
    ways = [
        "L" * stack + "K" * (len(kernel) - stack - outer) + "N" * outer
        for stack in range(len(kernel))
        for outer in range(1, len(kernel) - stack)
        if bias == (*kernel[:stack], *kernel[len(kernel) - outer :])
    ]
    one = ways[0] if len(ways) == 1 else ""
    return one if one.count("K") == 1 or one.count("N") > 1 else None


def _by_class(module: Any, kernel: Shape, bias: Shape | None) -> str | None:
    """The axes of the kernel of an nn.DenseGeneral or nn.Einsum; None where its fields don't tell, or don't fit."""
    if isinstance(module, linen.DenseGeneral):
        outer, inner, batch = (_tuple(each) for each in (module.features, module.axis, module.batch_dims))
        roles = "L" * len(batch) + "K" * len(inner) + "N" * len(outer)
        more = len(kernel) - len(roles)
        # Which axis is the stack's, a bias tells alone.
        stacked = more > 0 and bias == (*kernel[: more + len(batch)], *outer)
        fits = kernel[-len(outer) :] == outer and (more == 0 or stacked)
        return "L" * more + roles if fits and len(kernel) > 2 else None
    if isinstance(module, linen.Einsum) and module.einsum_str is not None:
        more = len(kernel) - len(module.shape)
        without = [kernel[:at] + kernel[at + 1 :] == tuple(module.shape) for at in range(len(kernel))]
        if kernel == tuple(module.shape) or (more == 1 and without.index(True) == 0 == sum(without) - 1):
            try:
                return "L" * more + Einsum(module.einsum_str).roles
            except ValueError:
                return None  # an equation of another form
    return None


def _tuple(value: int | Sequence[int]) -> Shape:
    return (value,) if isinstance(value, int) else tuple(value)


def _modules(module: Any, variables: Mapping[str, Any]) -> dict[tuple[str, ...], linen.Module]:
    """The modules that a module has in its fields or makes in `setup`, and those in them, by path. Those that a compact
    method makes are there when it runs, and not before."""
    found: dict[tuple[str, ...], linen.Module] = {}

    def visit(node: linen.Module) -> None:
        found[node.path] = node
        dir(node)  # runs setup
        held = [value for name, value in vars(node).items() if name not in ("parent", "_state")]
        for child in jax.tree.leaves(held, is_leaf=lambda each: isinstance(each, linen.Module)):
            if isinstance(child, linen.Module) and child.scope is not None and child.path not in found:
                visit(child)

    abstract = jax.tree.map(_abstract, meta.unbox(variables), is_leaf=is_operator)
    # A setup may need random numbers, or run under a lifted transformation: then what was seen so far is known.
    with contextlib.suppress(errors.FlaxError, TypeError, ValueError):
        jax.eval_shape(lambda whole: visit(module.bind(whole, mutable=True)), abstract)
    return found


def _abstract(leaf: Any) -> Any:
    if is_operator(leaf):
        shape = leaf.kernel_shape if isinstance(leaf, Contraction) else (*leaf.shape[:-2], *leaf.shape[:-3:-1])
        return jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))
