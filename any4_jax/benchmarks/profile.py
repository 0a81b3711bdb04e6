"""Where a decoding step's time goes on a GPU: milliseconds and launches a token, by class of kernel.

Classes: "products" with weights in the blocks, "head", "attention" (with its rotations and its cache), and the "rest"
(norms, activations, sums, ...).
XLA names a kernel of its own after its HLO instruction, whose metadata hold the model's named scopes. A library's
kernel (this project's products, cuBLAS) has the name of its code, and is a product unless that says otherwise. Inside a
CUDA graph nothing else is known of it, and the head is then found as the last product of each step.
"""

import glob
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from any4_jax.benchmarks.timing import significant

PLATFORMS = ("cuda", "rocm")
CLASSES = ("products", "head", "attention", "rest")

# Names of libraries' kernels, by class.
_LIBRARY = {
    "attention": re.compile(r"attend|attention|fmha|flash", re.I),
    "products": re.compile(r"(Lut|Byte)(Turns|Wide|General)|nvjet|cublas|cutlass|gemv|gemm|splitK", re.I),
}
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*metadata=\{[^}]*op_name="([^"]*)"', re.M)


@dataclass(frozen=True)
class Kernel:
    """A run of a kernel or a copy on the device.

    Attributes:
      name: of its code.
      start_ns, duration_ns: when it ran.
      instruction: the HLO instruction that the trace gives, "" if none. A kernel in a CUDA graph has the graph's.
      module: the name of its HLO module; "" if none.
    """

    name: str
    start_ns: float
    duration_ns: float
    instruction: str = ""
    module: str = ""


def decoding(chunks: Iterator[Any], tokens: int, wall_ms: float) -> dict[str, float | None]:
    """Columns of a row: milliseconds and launches a step of each class, and the milliseconds in which none runs.

    Args:
      chunks: of new tokens. What counts are the kernels of the program that launches most, the loop of steps.
      tokens: how many are decoded; a loop may run a few steps more.
      wall_ms: milliseconds that decoding them takes without a profiler. The gaps are what kernels leave of it.

    Raises:
      RuntimeError: the trace has no kernel of a GPU, or none that ran in each step.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in chunks:
                pass
        found = kernels(folder)
    module = Counter(kernel.module for kernel in found).most_common(1)[0][0]
    found = [kernel for kernel in found if kernel.module == module]
    return columns(found, scopes(found, _programs(module), _steps(found, tokens)), tokens, wall_ms)


def kernels(folder: str) -> list[Kernel]:
    """What ran on the first GPU in the trace in a folder, by time.

    Raises:
      RuntimeError: nothing did.
    """
    found = [
        _kernel(event)
        for path in glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        for plane in ProfileData.from_serialized_xspace(Path(path).read_bytes()).planes
        if plane.name == "/device:GPU:0"
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
    if not found:
        raise RuntimeError("the profiler saw no kernel of a GPU, and at least one is needed; leave --profile out")
    return sorted(found, key=lambda kernel: kernel.start_ns)


def _kernel(event: Any) -> Kernel:
    facts = dict(event.stats)
    told = (str(facts.get(key, "")) for key in ("hlo_op", "hlo_module"))
    return Kernel(event.name, event.start_ns, event.duration_ns, *told)


def scopes(found: Sequence[Kernel], texts: Iterable[str], steps: int) -> dict[str, str]:
    """The path of scopes of each HLO instruction, by its name as a kernel's, in the program that ran the kernels.

    Several programs may have one name, and hold instructions of one name: so do the loops of two models. So the program
    is the one that has most of the kernels' names, and of those the one with as many fusions as were launched in a
    step. Equal fusions share one kernel and its name, so that most fusions of a program have no kernel of theirs.

    Args:
      found: the kernels.
      texts: the HLO of programs that may have run them.
      steps: how often the program's loop ran.
    """
    names = {_plain(kernel.name) for kernel in found} | {_plain(kernel.instruction) for kernel in found}
    launched = sum("fusion" in kernel.name for kernel in found) / steps
    programs = [{_plain(name): path for name, path in _INSTRUCTION.findall(text)} for text in texts]

    def alike(program: Mapping[str, str]) -> tuple[int, float]:
        return len(names & program.keys()), -abs(launched - sum("fusion" in name for name in program))

    return max(programs, key=alike, default={})


def _programs(name: str) -> Iterator[str]:
    """The HLO of the compiled programs with this name."""
    for executable in jax.devices()[0].client.live_executables():
        for module in executable.hlo_modules():
            if module.name == name:
                yield module.to_string()


def columns(found: Sequence[Kernel], paths: Mapping[str, str], tokens: int, wall_ms: float) -> dict[str, float | None]:
    """See `decoding`.

    Time in which kernels overlap counts for the one that began first.

    Args:
      found: kernels by time.
      paths: see `scopes`.
      tokens, wall_ms: see `decoding`.

    Raises:
      RuntimeError: no kernel ran as often as there are tokens.
    """
    steps = _steps(found, tokens)
    classes = [_class(kernel, paths) for kernel in found]
    products = [i for i, kind in enumerate(classes) if kind == "products"]
    of_step, surplus = divmod(len(products), steps)
    known = "head" in classes
    if not known and of_step > 1 and not surplus:
        known = True
        for i in products[of_step - 1 :: of_step]:
            classes[i] = "head"
    ms, launches = dict.fromkeys(CLASSES, 0.0), dict.fromkeys(CLASSES, 0)
    until = 0.0
    for kernel, kind in zip(found, classes, strict=True):
        end = kernel.start_ns + kernel.duration_ns
        ms[kind] += max(end - max(kernel.start_ns, until), 0.0) / 1e6 / steps
        launches[kind] += 1
        until = max(until, end)
    row: dict[str, float | None] = {f"{kind}_ms": significant(ms[kind]) for kind in CLASSES}
    row |= {f"{kind}_launches": significant(launches[kind] / steps) for kind in CLASSES}
    if not known:
        row["head_ms"] = row["head_launches"] = None
    return row | {
        "gaps_ms": significant(wall_ms / steps - sum(ms.values())),
        "launches_per_token": significant(len(found) / steps),
    }


def _steps(found: Sequence[Kernel], tokens: int) -> int:
    """How many steps the loop ran: as many as the runs of a kernel of which each step has one, such as that which looks
    the token up. Kernels outside of the steps run less often, and others more often."""
    counts = [count for count in Counter(kernel.name for kernel in found).values() if count >= tokens]
    if not counts:
        raise RuntimeError(
            f"no kernel ran {tokens} times in the trace of so many steps, and one is needed; leave --profile out"
        )
    return min(counts)


def _class(kernel: Kernel, paths: Mapping[str, str]) -> str:
    path = paths.get(_plain(kernel.name)) or paths.get(_plain(kernel.instruction))
    if path is None:
        return next((kind for kind, names in _LIBRARY.items() if names.search(kernel.name)), "rest")
    parts = path.split("/")
    return next((kind for kind in ("attention", "head") if kind in parts), None) or (
        "products" if parts[-1] == "dot_general" else "rest"
    )


def _plain(name: str) -> str:
    """The name of an instruction as XLA writes it in a kernel's."""
    return re.sub(r"\W", "_", name)
