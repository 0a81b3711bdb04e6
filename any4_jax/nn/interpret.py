"""Runs a traced program in which some arrays are kernels that stay as they are stored: codes, or floats under watch.

A model that multiplies by a kernel in its own words, `jnp.einsum("BTD,DNH->BTNH", x, self.w)`, is traced with a float
array in the kernel's place. Then the program is run operation by operation. Those that only turn a kernel around
(transpose, cast, reshape, index) move no data. Products read the codes. Whatever else reads a kernel gets the
dequantized array, so that the result is right in any case.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.extend.core import ClosedJaxpr, Literal

from any4_jax.nn.stored import Stored

_DECODING = ("ragged_dot_general",)
"""The products that decode a stack where they have rows for all of it."""


class Reader:
    """What happens where a program reads a stored kernel; subclasses watch.

    Attributes:
      state: a pytree of arrays, by path of kernels. It is carried through loops, and sliced along with a kernel that a
        loop scans over.
    """

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def product(self, kernel: Stored, x: jax.Array, contracted: Any, batch: Any) -> None:
        """A product reads the kernel.

        Args:
          kernel: what is read.
          x: the other factor.
          contracted: the axes that are contracted: (of x, of the present array of the kernel).
          batch: likewise, the axes along which both have entries of their own.
        """

    def chosen(self, kernel: Stored, x: jax.Array, experts: jax.Array) -> None:
        """A product of rows x [M, K], each with one matrix of a stack: experts int32 [M]."""

    def other(self, kernel: Stored, name: str) -> None:
        """An operation that is no product reads the kernel as an array: one of codes is decoded as a whole."""
        if kernel.coded and name not in _DECODING:
            warnings.warn(
                f"{kernel.path}: its codes are decoded as a whole in each call, because {name} reads them as an array "
                "or contracts other axes; quantize with example inputs=, or leave it float by a rule",
                stacklevel=2,
            )

    def split(self, state: Any) -> tuple[Any, Callable[[Any], Any]]:
        """The state of a kernel that is scanned over: arrays to scan over, in the order of its leaves, and a function
        from one entry of them to the state of one matrix."""
        return state, lambda arrays: arrays


def evaluate(program: ClosedJaxpr, args: Sequence[Any], reader: Reader) -> list[Any]:
    """The outputs of a program, some of whose arguments are Stored, and so are outputs that hold these."""
    return _run(program.jaxpr, program.consts, args, reader)


def _run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], reader: Reader) -> list[Any]:
    known: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else known[atom]

    known.update(zip(jaxpr.constvars, consts, strict=True))
    known.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        known.update(zip(eqn.outvars, _step(eqn, values, reader), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _step(eqn: Any, values: list[Any], reader: Reader) -> Sequence[Any]:
    name = eqn.primitive.name
    if any(isinstance(value, Stored) for value in values) and name in RULES:
        done = RULES[name](eqn, values, reader)
        if done is not None:
            return done
    for value in values:
        if isinstance(value, Stored):
            reader.other(value, name)
    bound = eqn.primitive.get_bind_params(eqn.params)
    subfuns, params = bound if isinstance(bound, tuple) else ((), bound)  # jax keeps the functions here or there
    with eqn.ctx.manager:
        done = eqn.primitive.bind(*subfuns, *map(plain, values), **params)
    return done if eqn.primitive.multiple_results else [done]


def plain(value: Any) -> Any:
    """A value as an array."""
    return value.dense() if isinstance(value, Stored) else value


Rule = Callable[[Any, list[Any], Reader], Sequence[Any] | None]


def _inline(key: str) -> Rule:
    def rule(eqn: Any, values: list[Any], reader: Reader) -> Sequence[Any]:
        inner = eqn.params[key]
        jaxpr, consts = (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, ())
        return _run(jaxpr, consts, values, reader)

    return rule


def _remat(eqn: Any, values: list[Any], reader: Reader) -> Sequence[Any]:
    jaxpr = eqn.params["jaxpr"]
    arrays, put = _apart(values)

    def body(arrays: list[Any], state: Any) -> Any:
        return _within(jaxpr, (), put(arrays), reader, state)

    run = jax.checkpoint(body, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
    outputs, reader.state = run(arrays, reader.state)
    return outputs


def _cond(eqn: Any, values: list[Any], reader: Reader) -> Sequence[Any] | None:
    index, *operands = values
    if isinstance(index, Stored):
        return None
    arrays, put = _apart(operands)

    def branch(closed: Any) -> Callable[..., Any]:
        return lambda arrays, state: _within(closed.jaxpr, closed.consts, put(arrays), reader, state)

    outputs, reader.state = jax.lax.switch(index, [branch(b) for b in eqn.params["branches"]], arrays, reader.state)
    return outputs


def _scan(eqn: Any, values: list[Any], reader: Reader) -> Sequence[Any] | None:
    consts, carries = eqn.params["num_consts"], eqn.params["num_carry"]
    fixed, carry, rest = values[:consts], values[consts : consts + carries], values[consts + carries :]
    for value in carry:
        if isinstance(value, Stored):
            reader.other(value, "scan")
    carry = list(map(plain, carry))
    scanned, close = [], []
    for value in rest:
        opened = value.opened() if isinstance(value, Stored) else None
        if isinstance(value, Stored) and opened is None:
            reader.other(value, "scan")
        arrays, back = opened or (plain(value), lambda one: one)
        scanned.append(arrays)
        close.append(back)
    paths = {value.path for value in rest if isinstance(value, Stored)} & set(reader.state)
    split = {path: reader.split(reader.state[path]) for path in paths}
    outer = {path: state for path, state in reader.state.items() if path not in paths}
    closed = eqn.params["jaxpr"]

    def body(carried: Any, one: Any) -> Any:
        values, state = carried
        entries, own = one
        inner = [back(entry) for back, entry in zip(close, entries, strict=True)]
        mine = {path: split[path][1](arrays) for path, arrays in own.items()}
        outputs, new = _within(closed.jaxpr, closed.consts, [*fixed, *values, *inner], reader, state | mine)
        own = {path: reader.split(new.pop(path))[0] for path in split}
        return (outputs[:carries], new), (outputs[carries:], own)

    first = {path: arrays for path, (arrays, _) in split.items()}
    (carried, outer), (outputs, own) = jax.lax.scan(
        body,
        (carry, outer),
        (scanned, first),
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    reader.state = outer | {path: _rejoined(reader.state[path], arrays) for path, arrays in own.items()}
    return [*carried, *outputs]


def _while(eqn: Any, values: list[Any], reader: Reader) -> Sequence[Any]:
    tests, steps = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    for value in (*values[:tests], *values[tests + steps :]):
        if isinstance(value, Stored):
            reader.other(value, "while")
    test, fixed, carry = list(map(plain, values[:tests])), values[tests : tests + steps], values[tests + steps :]

    def step(carried: Any) -> Any:
        values, state = carried
        return _within(body.jaxpr, body.consts, [*fixed, *values], reader, state)

    def goes_on(carried: Any) -> Any:
        return _within(cond.jaxpr, cond.consts, [*test, *carried[0]], reader, {})[0][0]

    outputs, reader.state = jax.lax.while_loop(goes_on, step, (list(map(plain, carry)), reader.state))
    return outputs


def _rejoined(like: Any, arrays: Any) -> Any:
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(arrays))


def _within(jaxpr: Any, consts: Any, values: Sequence[Any], reader: Reader, state: Any) -> tuple[list[Any], Any]:
    """The outputs of a program within another, as arrays, and the reader's state after it."""
    outside, reader.state = reader.state, dict(state)
    try:
        return list(map(plain, _run(jaxpr, consts, values, reader))), reader.state
    finally:
        reader.state = outside


def _apart(values: Sequence[Any]) -> tuple[list[Any], Callable[[list[Any]], list[Any]]]:
    """The arrays among some values, and a function that puts others in their place. Stored kernels stay outside."""
    at = [i for i, value in enumerate(values) if not isinstance(value, Stored)]

    def put(arrays: list[Any]) -> list[Any]:
        new = dict(zip(at, arrays, strict=True))
        return [new.get(i, value) for i, value in enumerate(values)]

    return [values[i] for i in at], put


def trace(function: Callable[..., Any], *args: Any) -> tuple[ClosedJaxpr, list[Any], Callable[[Sequence[Any]], Any]]:
    """Traces function(*args), whose arguments and results may hold anything; what is no array is passed as it is.

    Returns:
      (the program, its arguments, a function from its outputs to the result).
    """
    leaves, structure = jax.tree.flatten(args, is_leaf=_is_whole)
    at = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
    told: dict[str, Any] = {}

    def run(*arrays: Any) -> list[Any]:
        new = dict(zip(at, arrays, strict=True))
        result = function(*jax.tree.unflatten(structure, [new.get(i, leaf) for i, leaf in enumerate(leaves)]))
        outputs, told["structure"] = jax.tree.flatten(result, is_leaf=_is_whole)
        told["outputs"] = [None if _is_array(output) else (output,) for output in outputs]
        return [output for output in outputs if _is_array(output)]

    arrays = [leaves[i] for i in at]
    program = jax.make_jaxpr(run)(*arrays)

    def result(outputs: Sequence[Any]) -> Any:
        rest = iter(outputs)
        whole = [next(rest) if output is None else output[0] for output in told["outputs"]]
        return jax.tree.unflatten(told["structure"], whole)

    return program, arrays, result


def jit_arrays(function: Callable[..., Any], jit: Callable[..., Any] = jax.jit) -> Callable[..., Any]:
    """`function` under jit; what is no array in its arguments is static, such as a flag or the name of a method."""
    programs: dict[Any, Callable[..., Any]] = {}

    def call(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args, is_leaf=_is_whole)
        dynamic = [_is_array(leaf) or _is_whole(leaf) for leaf in leaves]
        fixed = [None if moves else leaf for leaf, moves in zip(leaves, dynamic, strict=True)]
        key = (structure, tuple(dynamic), repr(fixed))

        def run(*moving: Any) -> Any:
            rest = iter(moving)
            whole = [next(rest) if moves else leaf for leaf, moves in zip(fixed, dynamic, strict=True)]
            return function(*jax.tree.unflatten(structure, whole))

        program = programs.setdefault(key, jit(run))
        return program(*(leaf for leaf, moves in zip(leaves, dynamic, strict=True) if moves))

    return call


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) or type(leaf).__module__ == "numpy"


def _is_whole(node: Any) -> bool:
    """Whether a node of arguments or results is passed as it is: an NNX module keeps its identity."""
    return isinstance(node, nnx.Module)


RULES: dict[str, Rule] = {
    "jit": _inline("jaxpr"),
    "pjit": _inline("jaxpr"),
    "closed_call": _inline("call_jaxpr"),
    "core_call": _inline("call_jaxpr"),
    "remat2": _remat,
    "checkpoint": _remat,
    "cond": _cond,
    "scan": _scan,
    "while": _while,
}
"""How each operation treats stored kernels, by its name in jax; None from a rule means that it needs the arrays. The
rules of operations on arrays are added by any4_jax.nn.reading."""
