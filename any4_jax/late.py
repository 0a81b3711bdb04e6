"""Functions that are traced no earlier than a program that holds them is lowered.

`jax.lax.platform_dependent` traces its branches for all platforms, and lowers one of them. A branch of hundreds of
operations takes seconds to trace, which are lost wherever another branch runs.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

_CALL = Primitive("any4_late")
_CALL.multiple_results = True


def late(function: Callable[..., Any], like: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, traced when a program that calls it is lowered, or earlier where the call is under vmap.

    Args:
      function: of pytrees of arrays; jax can't differentiate the result.
      like: a function with the same arguments and results of the same shapes and dtypes, which is traced at once.

    Returns:
      A function with the arguments and results of `function`.
    """

    def call(*operands: Any) -> Any:
        leaves, given = jax.tree.flatten(operands)
        results, made = jax.tree.flatten(jax.eval_shape(like, *operands))

        def flat(*arrays: jax.Array) -> list[jax.Array]:
            return jax.tree.leaves(function(*jax.tree.unflatten(given, arrays)))

        shapes = tuple((result.shape, result.dtype) for result in results)
        return jax.tree.unflatten(made, _CALL.bind(*leaves, function=flat, shapes=shapes))

    return call


def _run(*arrays: Any, function: Callable[..., list[jax.Array]], shapes: tuple) -> list[jax.Array]:
    return function(*arrays)


def _abstract(*_: Any, function: Callable[..., list[jax.Array]], shapes: tuple) -> list[jax.core.ShapedArray]:
    return [jax.core.ShapedArray(shape, dtype) for shape, dtype in shapes]


def _batched(
    arrays: Any, axes: Any, *, function: Callable[..., list[jax.Array]], shapes: tuple
) -> tuple[list[jax.Array], list[int]]:
    results = jax.vmap(function, in_axes=tuple(axes))(*arrays)
    return results, [0] * len(results)


_CALL.def_impl(_run)
_CALL.def_abstract_eval(_abstract)
batching.primitive_batchers[_CALL] = _batched
mlir.register_lowering(_CALL, mlir.lower_fun(_run, multiple_results=True))
