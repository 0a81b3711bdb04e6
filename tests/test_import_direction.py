"""Who may import whom, and what no module may do, read off the syntax trees of the three packages."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from any4_jax.weights import operator_types

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("any4_jax", "pallas_kernels", "cuda_ffi")

# From the bottom up. A module imports modules of lower rows, and of its own package; never its own row.
LAYERS = (
    ("one_line", "late", "pytree"),
    ("formats", "choice", "schema", "regular_file", "whole_file"),
    ("scaling", "packing", "partition"),
    ("weights",),
    ("clustering", "refit", "compensation", "statistics", "product"),
    ("methods",),
    ("kv_cache",),
    ("nn",),
    ("data",),
    ("models",),
    ("surgery", "generate"),
    ("walk", "training"),
    ("tuning",),
    ("checkpoint", "evaluation", "benchmarks"),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, row in enumerate(LAYERS) for name in row}
# The package itself re-exports the public names of nearly every row, so only the top may import it.
TOP = LEVEL["cli"]

KERNEL_PACKAGES = ("pallas_kernels", "cuda_ffi")
KERNEL_USERS = ("product", "clustering", "refit", "compensation", "kv_cache")
KERNEL_IMPORTS = frozenset(sys.stdlib_module_names) | {"jax", "numpy"}

FORBIDDEN_MODULES = frozenset({"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve"})
FORBIDDEN_CALLS = frozenset({"eval", "exec"})
# What would do work, or depend on the machine, as soon as a module is imported.
FORBIDDEN_AT_IMPORT = frozenset(
    {"os.environ", "os.getenv", "print", "open", "subprocess.run", "subprocess.Popen", "jax.devices"}
    | {"jax.local_devices", "jax.device_count", "jax.local_device_count", "jax.default_backend"}
)

# Code that may depend on one family of models. Everything else is written for a Decoder and a Family.
OF_FAMILIES = ("any4_jax/models/", "any4_jax/data/", "any4_jax/benchmarks/")

# A list of operators in an isinstance is closed to those registered elsewhere.
MAY_LIST_OPERATORS = "any4_jax/weights/operator.py"
FEW_OPERATORS = 2
OPERATORS = frozenset({"Operator", *operator_types()})

SOURCES = {
    path.relative_to(REPOSITORY).as_posix(): ast.parse(path.read_text(encoding="utf-8"), str(path))
    for package in PACKAGES
    for path in sorted((REPOSITORY / package).rglob("*.py"))
}


def module_name(source: str) -> str:
    parts = source.removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str:
    """The name in LAYERS of a module: `methods` for `any4_jax.methods.rtn`, "" for the package itself."""
    return (module.split(".") + [""])[1]


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below `node` that run at import: no bodies of functions, no `__main__` guard."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Lambda):
            continue
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            for part in (*child.decorator_list, *child.args.defaults, *filter(None, child.args.kw_defaults)):
                yield part
                yield from at_import(part)
            continue
        if isinstance(child, ast.If) and "__name__" in ast.unparse(child.test):
            continue
        yield child
        yield from at_import(child)


def is_module(name: str) -> bool:
    """Whether `from any4_jax import name` reads a module rather than one of the public names."""
    return name in LEVEL or f"any4_jax/{name}.py" in SOURCES or f"any4_jax/{name}/__init__.py" in SOURCES


def imports(tree: ast.AST, source: str) -> Iterator[tuple[ast.stmt, str]]:
    """Every import statement, lazy ones too, with the absolute name of the module that it reads."""
    folder = source.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node, f"{name}.{alias.name}" if name == "any4_jax" and is_module(alias.name) else name


def direction_faults(source: str, tree: ast.AST) -> list[str]:
    """One line for each import of an any4_jax module that goes up, sideways, or eagerly to a kernel."""
    own = layer_of(module_name(source))
    if own == "":
        return []
    if own not in LEVEL:
        return [f"{source}: any4_jax.{own} has no row in LAYERS; add it where it belongs"]
    eager = {id(node) for node in at_import(tree)}
    faults = []
    for node, name in imports(tree, source):
        top, target = name.split(".")[0], layer_of(name)
        where = f"{source}:{node.lineno}"
        if top in KERNEL_PACKAGES:
            if own not in KERNEL_USERS:
                faults.append(f"{where}: only {', '.join(KERNEL_USERS)} import {top}")
            elif id(node) in eager:
                faults.append(f"{where}: {top} is to be imported inside the function that needs it")
        elif top == "any4_jax" and target == "":
            if LEVEL[own] < TOP:
                faults.append(f"{where}: imports the package itself; import the module that defines the name")
        elif top == "any4_jax" and target != own and LEVEL.get(target, len(LAYERS)) >= LEVEL[own]:
            faults.append(f"{where}: {own} may not import any4_jax.{target}")
    return faults


def kernel_faults(source: str, tree: ast.AST) -> list[str]:
    """One line for each import of a kernel package beyond jax, numpy, the standard library and itself."""
    own = source.split("/")[0]
    return [
        f"{source}:{node.lineno}: {own} imports {name}; it may import jax, numpy and the standard library"
        for node, name in imports(tree, source)
        if name.split(".")[0] not in KERNEL_IMPORTS | {own}
    ]


def forbidden_faults(source: str, tree: ast.AST) -> list[str]:
    """One line for each way to run code from data (pickle, eval, ...) and each piece of work at import."""
    faults = [
        f"{source}:{node.lineno}: imports {name}"
        for node, name in imports(tree, source)
        if name.split(".")[0] in FORBIDDEN_MODULES
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            faults.append(f"{source}:{node.lineno}: calls {node.func.id}()")
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            faults.append(f"{source}:{node.value.lineno}: passes trust_remote_code")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            faults.append(f"{source}:{node.value.lineno}: passes allow_pickle={ast.unparse(node.value)}")
    for node in at_import(tree):
        if isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node) in FORBIDDEN_AT_IMPORT:
            faults.append(f"{source}:{node.lineno}: {ast.unparse(node)} at import")
    return faults


def family_faults(source: str, tree: ast.AST) -> list[str]:
    """One line for each name, message or docstring that says Llama. (Lower-case text may: shapes are called so.)"""
    faults = []
    for node in ast.walk(tree):
        names = [value for _, value in ast.iter_fields(node) if isinstance(value, str)]
        named = [name for name in names if "llama" in name.lower() and not isinstance(node, ast.Constant)]
        if named or (isinstance(node, ast.Constant) and "Llama" in str(node.value)):
            faults.append(f"{source}:{getattr(node, 'lineno', 0)}: says {named or 'Llama'}; use Decoder and Family")
    return faults


def operator_faults(source: str, tree: ast.AST) -> list[str]:
    """One line for each isinstance that lists operators, in a tuple or a union."""
    faults = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
            classes = {ast.unparse(name).split(".")[-1] for name in ast.walk(node.args[1])}
            if len(classes & OPERATORS) > FEW_OPERATORS and source != MAY_LIST_OPERATORS:
                faults.append(f"{source}:{node.lineno}: {ast.unparse(node)}; dispatch on the type instead")
    return faults


@pytest.mark.parametrize(
    "code, faults",
    [
        ("isinstance(w, Sum)", 0),
        ("isinstance(w, QuantizedTensor | Slice | jax.Array)", 0),
        ("isinstance(w, QuantizedTensor | Slice | Sum)", 1),
        ("isinstance(w, (weights.Sum, weights.Sparse, weights.LowRank))", 1),
    ],
)
def test_operator_rule_itself(code: str, faults: int) -> None:
    assert len(operator_faults("any4_jax/product/plan.py", ast.parse(code))) == faults
    assert operator_faults(MAY_LIST_OPERATORS, ast.parse(code)) == []


@pytest.mark.parametrize("source", [s for s in SOURCES if s.startswith("any4_jax/")])
def test_no_module_but_the_models_names_a_family(source: str) -> None:
    assert source.startswith(OF_FAMILIES) or family_faults(source, SOURCES[source]) == []


@pytest.mark.parametrize(
    "code, faults",
    [
        ("from any4_jax.models.llama import Llama", 2),
        ("from any4_jax.models import flax_llama", 1),
        ("def f(llama): return g(llama=1)", 2),
        ("raise ValueError('pass a Llama')", 1),
        ("SHAPE = 'llama-3.1-8b'", 0),
        ("from any4_jax.models.base import Decoder", 0),
    ],
)
def test_family_rule_itself(code: str, faults: int) -> None:
    assert len(family_faults("any4_jax/generate/loop.py", ast.parse(code))) == faults


@pytest.mark.parametrize("source", SOURCES)
def test_module_keeps_the_rules(source: str) -> None:
    tree = SOURCES[source]
    rule = direction_faults if source.startswith("any4_jax/") else kernel_faults
    assert rule(source, tree) + forbidden_faults(source, tree) + operator_faults(source, tree) == []


def test_package_init_holds_public_names_only() -> None:
    tree = SOURCES["any4_jax/__init__.py"]
    assert ast.get_docstring(tree)
    for node in tree.body[1:]:
        named = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("__all__", "__version__")
        assert named or isinstance(node, ast.Import | ast.ImportFrom), f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize(
    "source, code, faults",
    [
        ("any4_jax/weights/sum.py", "from any4_jax import packing\nfrom .formats import FORMATS", 0),
        ("any4_jax/weights/sum.py", "from any4_jax.methods import rtn", 1),
        ("any4_jax/weights/sum.py", "def f():\n    from ..product import matmul", 1),
        ("any4_jax/product/plan.py", "from any4_jax import statistics", 1),
        ("any4_jax/methods/any4.py", "from any4_jax.methods.base import Method\nfrom . import rtn", 0),
        ("any4_jax/methods/any4.py", "from ..nn import linen", 1),
        ("any4_jax/methods/any4.py", "import any4_jax as a4", 1),
        ("any4_jax/cli/demo.py", "import any4_jax as a4", 0),
        ("any4_jax/helpers.py", "", 1),
        ("any4_jax/product/plan.py", "def f():\n    import pallas_kernels.gemv", 0),
        ("any4_jax/product/plan.py", "import pallas_kernels.gemv", 1),
        ("any4_jax/nn/linen.py", "def f():\n    import cuda_ffi", 1),
    ],
)
def test_direction_rule_itself(source: str, code: str, faults: int) -> None:
    assert len(direction_faults(source, ast.parse(code))) == faults


@pytest.mark.parametrize(
    "code, faults",
    [
        ("import os\nHOME = os.environ['HOME']", 1),
        ("import os\ndef home(): return os.environ['HOME']", 0),
        ("import os\ndef home(x=os.environ): return x", 1),
        ("class A:\n    n = jax.device_count()", 1),
        ("if __name__ == '__main__':\n    print(1)", 0),
        ("print(1)", 1),
        ("def f(): return eval('1')", 1),
        ("def f(model): return model.eval()", 0),
        ("def f(): import pickle", 1),
        ("def f(x): return load(x, trust_remote_code=True)", 1),
        ("def f(x): return np.load(x, allow_pickle=False)", 0),
        ("def f(x): return np.load(x, allow_pickle=True)", 1),
    ],
)
def test_forbidden_rule_itself(code: str, faults: int) -> None:
    assert len(forbidden_faults("any4_jax/formats.py", ast.parse(code))) == faults


@pytest.mark.parametrize("code, faults", [("import jax, numpy, ctypes", 0), ("from any4_jax import packing", 1)])
def test_kernel_rule_itself(code: str, faults: int) -> None:
    assert len(kernel_faults("cuda_ffi/layout.py", ast.parse(code))) == faults
