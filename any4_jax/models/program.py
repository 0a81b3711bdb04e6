"""The static part of a model, on which a compiled program depends, and its arrays, told apart fast.

`jax.tree.flatten` calls back into Python for each module: 10 ms for 32 quantized blocks, as long as some tokens take.
So the layout of a model is noted once, and serves as long as nothing but arrays changes.
"""

import dataclasses
import functools
import weakref
from collections.abc import Hashable, Sequence
from itertools import chain
from operator import is_
from typing import Any, Self

import jax
from flax import nnx


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The static part of a model. Equal programs are one object, so jax compares them by identity.

    For 32 blocks a comparison of their structures takes 10 ms, and jax would repeat it on every call.
    """

    treedef: Any

    @classmethod
    def of(cls, model: nnx.Module) -> tuple["Program", list[Any]]:
        """The program of a model, and its arrays as they are now, in the order of `jax.tree.leaves`."""
        layout = _LAYOUTS.get(id(model))
        leaves = None if layout is None else layout.leaves(model)
        if layout is not None and leaves is not None:
            return layout.program, leaves
        leaves, treedef = jax.tree.flatten(model)
        program = _program(treedef)
        _LAYOUTS.pop(id(model), None)
        # A model with traced arrays lives no longer than its trace.
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            layout = _Layout.of(model, program)
            seen = None if layout is None else layout.leaves(model)
            # They differ where a class has its own idea of its tree.
            if layout is not None and seen is not None and len(seen) == len(leaves) and all(map(is_, seen, leaves)):
                _LAYOUTS[id(model)] = layout
        return program, leaves

    def model(self, leaves: Sequence[Any]) -> Any:
        """Rebuilds the model with these arrays."""
        return jax.tree.unflatten(self.treedef, leaves)


_program = functools.lru_cache(maxsize=64)(Program)


@dataclasses.dataclass(eq=False)
class _Layout:
    """Where the arrays of a model are, and all else that its tree depends on.

    It holds no array, and modules only weakly: the arrays are read from the model each time, and what surgery replaces
    is freed. The "values" are the attributes of all modules, one module after the other.

    Attributes:
        program: of the model.
        modules: in the order of the tree, the model first.
        classes: of the modules.
        names: of each module's values.
        children: the places of all modules but the first among the values.
        fixed: the places of the values that are no modules, variables or arrays.
        constants: what stands there.
        held: the places of variables and arrays, in the order of the leaves.
        kinds: the classes of the variables, None for an array.
        metadata: of the variables, None for an array.
        size: the number of values.
    """

    program: Program
    modules: list[weakref.ref[Any]] = dataclasses.field(default_factory=list)
    classes: list[type] = dataclasses.field(default_factory=list)
    names: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    children: list[int] = dataclasses.field(default_factory=list)
    fixed: list[int] = dataclasses.field(default_factory=list)
    constants: list[Any] = dataclasses.field(default_factory=list)
    held: list[int] = dataclasses.field(default_factory=list)
    kinds: list[type[nnx.Variable[Any]] | None] = dataclasses.field(default_factory=list)
    metadata: list[dict[str, Any] | None] = dataclasses.field(default_factory=list)
    size: int = 0

    @classmethod
    def of(cls, model: nnx.Module, program: Program) -> Self | None:
        """The layout of a model; None if its tree has containers, full or to be filled, that aren't modules: they may
        change unseen."""
        layout = cls(program)
        return layout if layout._add(model, functools.partial(_forget, id(model))) else None

    def _add(self, module: Any, when_dead: Any = None) -> bool:
        """Notes a module and all below it; returns whether that can be noted."""
        attributes, first = vars(module), self.size
        self.size += len(attributes)
        self.modules.append(weakref.ref(module, when_dead))
        self.classes.append(type(module))
        self.names.append(tuple(attributes))
        places = {name: first + i for i, name in enumerate(attributes)}
        for path, value in _children(module):
            name = _name(path)
            place = places.pop(name, None)
            if place is None:
                return False
            if isinstance(value, nnx.Pytree):
                self.children.append(place)
                if not self._add(value):
                    return False
            elif isinstance(value, nnx.Variable) or jax.tree_util.all_leaves([value]):
                self.held.append(place)
                self.kinds.append(type(value) if isinstance(value, nnx.Variable) else None)
                self.metadata.append(value.get_metadata() if isinstance(value, nnx.Variable) else None)
            elif not isinstance(value, Hashable) or _children(value):
                return False
            else:
                places[name] = place
        self.fixed.extend(places.values())
        self.constants.extend(attributes[name] for name in places)
        return True

    def leaves(self, model: nnx.Module) -> list[Any] | None:
        """The arrays of the model; None if anything else has changed since the layout was noted."""
        modules = [module() for module in self.modules]
        if modules[0] is not model or not all(map(is_, map(type, modules), self.classes)):
            return None
        attributes = list(map(vars, modules))
        if list(map(tuple, attributes)) != self.names:
            return None
        values: list[Any] = list(chain.from_iterable(map(dict.values, attributes)))
        if not all(map(is_, [values[i] for i in self.children], modules[1:])):
            return None
        if not all(map(is_, [values[i] for i in self.fixed], self.constants)):
            return None
        leaves = []
        for place, kind, metadata in zip(self.held, self.kinds, self.metadata, strict=True):
            value = values[place]
            if kind is not None:
                if type(value) is not kind or value.get_metadata() != metadata:
                    return None
                value = value.get_raw_value()
            leaves.append(value)
        return leaves if jax.tree_util.all_leaves(leaves) else None


# By the ids of models, and removed when these die: a module may be of a class that can't be hashed.
_LAYOUTS: dict[int, _Layout] = {}


def _forget(key: int, model: weakref.ref[Any]) -> None:
    """Removes the layout of a model that has died."""
    layout = _LAYOUTS.get(key)
    if layout is not None and layout.modules[0] is model:
        del _LAYOUTS[key]


def _children(node: Any) -> list[tuple[Any, Any]]:
    """The paths and values of what a node of a tree holds directly, None too."""
    return jax.tree.leaves_with_path(node, is_leaf=lambda other: other is not node)


def _name(path: Any) -> str:
    """The attribute that the path of a child stands for; "" for an object that is no tree, which is its own leaf."""
    for key in path:
        return next(str(getattr(key, kind)) for kind in ("name", "idx", "key") if hasattr(key, kind))
    return ""
