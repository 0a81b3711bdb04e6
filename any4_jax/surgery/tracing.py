"""Finds the kernels of a model by tracing it: the parameters that its products contract."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from any4_jax.nn.interpret import evaluate, plain, trace
from any4_jax.nn.stored import stored
from any4_jax.nn.watching import Finding
from any4_jax.weights import Layout


def find(run: Callable[..., Any], kernels: Mapping[str, Any], *rest: Any) -> Finding:
    """What run(kernels, *rest) does with some arrays; it is traced, and nothing is computed.

    Args:
      run: a function of the kernels by path, and of anything else.
      kernels: arrays or ShapeDtypeStructs.
      rest: passed to `run` as well.
    """
    program, arrays, _ = trace(run, dict(kernels), *rest)
    reader, paths = Finding(), sorted(kernels)

    def evaluated(arrays: list[Any]) -> list[Any]:
        first = [
            stored(path, array, Layout("?" * array.ndim, array.shape, jnp.dtype(array.dtype).name))
            for path, array in zip(paths, arrays, strict=False)
        ]
        return list(map(plain, evaluate(program, [*first, *arrays[len(first) :]], reader)))

    jax.eval_shape(evaluated, [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays])
    return reader


def shapes(run: Callable[..., Any], *args: Any) -> None:
    """Traces run(*args), whose arguments may hold anything, for what happens on the way."""
    trace(run, *args)


def layouts(finding: Finding, kernels: Mapping[str, Any]) -> dict[str, Layout | str]:
    """The layout of each kernel that products read, or in words why it has none that all of them agree in."""
    found: dict[str, Layout | str] = {}
    for path, kernel in kernels.items():
        ways = {roles for roles in finding.roles.get(path, ()) if {"K", "N"} <= set(roles)}
        if path in finding.tables and not ways and len(kernel.shape) == 2:
            ways = {"NK"}
        if len(ways) > 1:
            found[path] = f"an array {list(kernel.shape)} of which products contract different axes"
        elif ways:
            found[path] = Layout(ways.pop(), tuple(kernel.shape), jnp.dtype(kernel.dtype).name)
    return found


def call_of(inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """Arguments of a model, (positional, by name): from a tuple or list of them, a dict, or the only one."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}
