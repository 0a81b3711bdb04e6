"""Quantized weights in Linen models that know nothing of them: interceptors around their dense layers.

An operator [N, K] sits in the parameters at "kernel", where the float kernel [K, N] was. `quantized_dense` computes
with it in place of the layer's own code, and `Intercepted` puts interceptors around a module for good.
"""

import dataclasses
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import DenyList, meta
from flax.linen.dtypes import promote_dtype
from flax.linen.module import InterceptorContext

from any4_jax.nn.coded_variables import with_kernels
from any4_jax.nn.linen import Any4Dense, call_dense
from any4_jax.weights import Layout, contraction, is_operator

Interceptor = Callable[[Callable[..., Any], Any, Any, InterceptorContext], Any]
Path = tuple[str, ...]


def quantized_dense(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: InterceptorContext) -> Any:
    """A `flax.linen.intercept_methods` interceptor: dense layers whose "kernel" is an operator compute with it.

    Dense layers are nn.Dense, nn.DenseGeneral from the last axis to one, and the FlaxConv1D of transformers. Layers
    with a float kernel, and all other modules, run as they are. The code of another module with an operator in place
    of a kernel [K, N], and without modules of its own, reads it as `with_kernels` says.

    Raises:
      TypeError: a module of another form holds an operator.
      ValueError: an operator doesn't have the layer's shape.
    """
    module: Any = context.module
    if context.method_name != "__call__" or module.scope is None or isinstance(module, Any4Dense):
        return next_fun(*args, **kwargs)
    kernel = module.get_variable("params", "kernel")
    if not is_operator(kernel):
        return next_fun(*args, **kwargs)
    if _kernel_is_kn(module) is None:
        if _reads_by_itself(module, meta.unbox(kernel)):
            return _by_code(module, meta.unbox(kernel), args, kwargs)
        path = ".".join(module.path) or "kernel"  # as surgery names a layer that is the whole model
        raise TypeError(
            f"{path}: a {type(module).__name__} holds a quantized kernel, need nn.Dense, nn.DenseGeneral from the "
            "last axis to one, or a module without others in it, whose code reads a kernel [K, N]; quantize with "
            f"example inputs=, which tell what it contracts, or leave it out with the rule ({path!r}, None)"
        )
    return call_dense(module, _input(args, kwargs), meta.unbox(kernel), nn.initializers.zeros_init())


def _reads_by_itself(module: Any, kernel: Any) -> bool:
    """Whether all that a module reads are a kernel [K, N] and other parameters of its own."""
    of_more = isinstance(module, nn.DenseGeneral) and not _is_one_to_one(module)
    own = module.variables
    nested = any(isinstance(value, Mapping) for value in own["params"].values())
    return set(own) == {"params"} and not nested and not of_more and len(kernel.shape) == 2


def _by_code(module: Any, kernel: Any, args: Any, kwargs: Any) -> Any:
    """What a module's own code computes with an operator [N, K] in place of its kernel [K, N]."""
    layout = Layout("KN", kernel.shape[::-1], jnp.dtype(getattr(module, "param_dtype", jnp.float32)).name)
    params = meta.unbox({**module.variables["params"], "kernel": contraction(kernel, layout)})
    alone = module.clone(parent=None, name=None)
    own = DenyList("params")  # collections that it makes, as by `sow`
    y, new = with_kernels(lambda floats: alone.apply(floats, *args, **kwargs, mutable=own), {"params": params})
    for collection in filter(module.is_mutable_collection, new):
        for name, value in new[collection].items():
            module.put_variable(collection, name, value)
    return y


class Layers(NamedTuple):
    """The dense layers of a model, by path: the nested keys of the layer in "params".

    Attributes:
      plain: those that can take an operator, and whether their float kernel is [K, N]; FlaxConv1D has [N, K].
      special: those that can't because they compute something else than nn.Dense, and why, in words.
    """

    plain: dict[Path, bool]
    special: dict[Path, str]


def _why_special(module: Any) -> str | None:
    """Why a layer of one input and one output axis can't take an operator although it is an nn.Dense or DenseGeneral
    or derives from one, in words; None for all other modules."""
    if not isinstance(module, nn.Dense | nn.DenseGeneral) or _kernel_is_kn(module) is not None:
        return None
    if isinstance(module, nn.DenseGeneral) and not _is_one_to_one(module):
        return None
    base = "nn.Dense" if isinstance(module, nn.Dense) else "nn.DenseGeneral"
    if type(module) not in (nn.Dense, nn.DenseGeneral):
        return f"a {type(module).__name__}, a subclass of {base}"
    return f"an {base} with its own dot_general or promote_dtype"


def _is_one_to_one(module: Any) -> bool:
    """Whether an nn.DenseGeneral maps the last axis to one axis, without batch axes."""
    one = isinstance(module.features, int) or len(module.features) == 1
    return one and module.axis in (-1, (-1,), [-1]) and not module.batch_dims


def _kernel_is_kn(module: Any) -> bool | None:
    """True where a dense layer's float kernel is [K, N], False where it is [N, K], None where it is no dense layer.

    A class is recognised by its __call__: subclasses that only add to nn.Dense count, and those that compute something
    else don't. A layer with a product of its own doesn't count either.
    """
    cls: Any = type(module)
    if cls.__name__ == "FlaxConv1D":
        return False
    if cls.__call__ is nn.DenseGeneral.__call__:
        if not _is_one_to_one(module):
            return None
    elif cls.__call__ is not nn.Dense.__call__:
        return None
    plain = module.dot_general is None and module.dot_general_cls is None and module.promote_dtype is promote_dtype
    return True if plain else None


def _input(args: Any, kwargs: Any) -> jax.Array:
    return (*args, *kwargs.values())[0]


@dataclasses.dataclass(frozen=True)
class Intercepted:
    """A Linen module whose functions run under interceptors; everything else is the module's own.

    Two of them are equal, with equal hashes, where their modules and interceptors are, so one can be a static argument
    of jit just as a module can. It is not an nn.Module: it stands for a whole model, and can't be part of one.

    Attributes:
      inner: the module.
      interceptors: each wraps those before it.
      recipe: how the parameters that belong to it were quantized (any4_jax.surgery.Recipe), or None; ignored when two
        are compared.
    """

    inner: Any
    interceptors: tuple[Interceptor, ...]
    recipe: Any = dataclasses.field(default=None, compare=False)

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """nn.Module.apply. Kernels of any rank (`any4_jax.weights.Contraction`) are read where products read them."""
        return with_kernels(lambda floats: self._run(self.inner.apply, floats, *args, **kwargs), variables)

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """nn.Module.init: it gives the parameters of the module itself, with float kernels."""
        return self._run(self.inner.init, rngs, *args, **kwargs)

    def init_with_output(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """nn.Module.init_with_output."""
        return self._run(self.inner.init_with_output, rngs, *args, **kwargs)

    def tabulate(self, rngs: Any, *args: Any, **kwargs: Any) -> str:
        """nn.Module.tabulate."""
        return self._run(self.inner.tabulate, rngs, *args, **kwargs)

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        """Raises TypeError: calls of a bound module would not go through the interceptors."""
        raise TypeError(
            "got bind on a module under interceptors, which would not see the bound module's calls; use apply, with "
            "method= for another function than __call__"
        )

    def clone(self, **updates: Any) -> "Intercepted":
        """nn.Module.clone, under the same interceptors."""
        return dataclasses.replace(self, inner=self.inner.clone(**updates))

    def copy(self, **updates: Any) -> "Intercepted":
        """nn.Module.copy, under the same interceptors."""
        return dataclasses.replace(self, inner=self.inner.copy(**updates))

    def _run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for interceptor in reversed(self.interceptors):  # Flax takes the outermost first
                stack.enter_context(nn.intercept_methods(interceptor))
            return function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # copy and pickle look up dunders before `inner` is set.
        if name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        return getattr(self.inner, name)


def intercepted(module: Any, *interceptors: Interceptor) -> Intercepted:
    """`module` under `interceptors`, and under those it has already if it is an Intercepted. Each is applied once, and
    later ones wrap earlier ones."""
    wrapped = module if isinstance(module, Intercepted) else Intercepted(module, ())
    return dataclasses.replace(wrapped, interceptors=tuple(dict.fromkeys((*wrapped.interceptors, *interceptors))))


def layers_of(trace: Callable[[], Any]) -> Layers:
    """The dense layers that run in `trace()`, which is traced and not computed.

    A layer that is applied to its caller's parameters, such as a tied head, owns none and isn't listed. Layers inside a
    function that jit has traced before are not seen.
    """
    found = Layers({}, {})

    def record(module: nn.Module, x: jax.Array) -> None:
        special = _why_special(module)
        if special is None:
            found.plain[module.path] = bool(_kernel_is_kn(module))
        else:
            found.special[module.path] = special

    with nn.intercept_methods(_visiting(_is_layer, record)):
        jax.eval_shape(lambda: trace())  # a new function: jax would take the result for a known one from its cache
    return found


def dense_layers(trace: Callable[[], Any]) -> dict[Path, bool]:
    """The plain layers of `layers_of`."""
    return layers_of(trace).plain


def _is_layer(module: Any) -> bool:
    return _kernel_is_kn(module) is not None or _why_special(module) is not None


def _visiting(takes: Callable[[Any], bool], visit: Callable[[nn.Module, jax.Array], None]) -> Interceptor:
    """Calls visit(module, x) for the modules that takes(module) and that own a "kernel" in the tree of the outermost
    module."""
    calls = threading.local()

    def interceptor(next_fun, args, kwargs, context):
        stack = calls.__dict__.setdefault("stack", [])
        module = context.module
        stack.append((module, not stack or (stack[-1][1] and not _is_applied_within(stack[0][0], module))))
        try:
            y = next_fun(*args, **kwargs)
            own = stack[-1][1]
        finally:
            stack.pop()
        if own and context.method_name == "__call__" and takes(module) and module.has_variable("params", "kernel"):
            visit(module, _input(args, kwargs))
        return y

    return interceptor


def _is_applied_within(root: Any, module: Any) -> bool:
    """Whether `module` is the root of another `apply` inside that of `root`: its path is empty, and it is neither root,
    nor a clone of root that a lifted transform made, nor a module that shares root's scope."""
    if module.scope is None or module.path:
        return False
    return module.scope is not root.scope and type(module) is not type(root)
