"""Fixtures that every test file may ask for: seeded numbers, shared files, a counter of compiled programs."""

from __future__ import annotations

import ctypes
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
import pytest
from at_length import AT_LENGTH

from cuda_ffi import registration

REPOSITORY = Path(__file__).resolve().parent.parent

# One event a program, sent where a persistent compilation cache supplies the program too.
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@dataclass
class Compiles:
    """The programs compiled within one `count_compiles()` block, by the names of the jitted functions."""

    names: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.names)


# The files that take longest, which begin first: else one of them runs alone at the end, on one worker of several.
LONGEST = (
    "matmul",
    "family_goldens",
    "walk",
    "interrupt",
    "methods",
    "examples",
    "gptq",
    "hf_flax",
    "clustering",
    "readme",
    "walk_resumed",
    "cli",
    "checkpoint_kill_quantize",
    "fuzz",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--at-length", action="store_true", help="also run what tests/at_length.py names")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--at-length"):
        longer = [item for item in items if f"{item.path.stem}::{item.name}".startswith(AT_LENGTH)]
        config.hook.pytest_deselected(items=longer)
        items[:] = [item for item in items if item not in longer]
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_configure() -> None:
    """Garbage is collected between files alone (`_frozen`), and where a test asks for it: Python's own collections, and
    those that jax adds to each, take a tenth of the time. Processes that tests start collect as users' do."""
    gc.disable()


def pytest_report_header() -> str:
    return f"jax {jax.__version__}, numpy {np.__version__}"


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """Garbage collections don't look at what was there before a file's tests: millions of objects, most of them traced
    and compiled programs that jax keeps, which take seconds each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def rng() -> np.random.Generator:
    """A numpy Generator that starts from the same seed in every test."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the repository: reference texts and models. Skips the test without it."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the reference files of ../shared, which is not beside this repository")
    return folder


@pytest.fixture
def count_compiles() -> Callable[[], AbstractContextManager[Compiles]]:
    """Gives `with count_compiles() as compiles: ...`; `compiles.count` programs were compiled in the block.

    Operations outside of jit count as well: each new (operation, shape) is a program of its own.
    """

    @contextmanager
    def counting() -> Iterator[Compiles]:
        compiles = Compiles()

        def listen(event: str, duration_seconds: float, **details: str | int) -> None:
            if event == COMPILE_EVENT:
                compiles.names.append(str(details.get("fun_name", "")))

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield compiles
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    return counting


@pytest.fixture
def library() -> ctypes.CDLL:
    """The loaded C++ library; the test is skipped where there is none."""
    reason = registration.why_not("cpu")
    if reason is not None:
        pytest.skip(reason)
    return registration.register("cpu")


@pytest.fixture(params=("portable", "avx2", "avx512"))
def isa(request: pytest.FixtureRequest, library: ctypes.CDLL) -> str:
    """Each instruction set that the library's code is compiled for and this processor has."""
    if not library.any4_cpu_has_isa(request.param.encode()):
        pytest.skip(f"this processor has no {request.param}")
    return request.param


@pytest.fixture
def one_thread(library: ctypes.CDLL) -> Iterator[None]:
    """The library's handlers work on one thread, until the test lets them have more."""
    library.any4_cpu_limit_threads(1)
    yield
    library.any4_cpu_limit_threads(0)


@pytest.fixture
def runs(monkeypatch):
    """Counts (block's path, whether its output was asked for) of each run of a block in a walk."""
    from any4_jax.walk import blocks

    counted: Counter = Counter()
    real = blocks.WalkedBlock._run

    def counting(self, contents, inputs, seen, outputs):
        counted[self.path, outputs] += len(inputs)
        return real(self, contents, inputs, seen, outputs)

    monkeypatch.setattr(blocks.WalkedBlock, "_run", counting)
    return counted
