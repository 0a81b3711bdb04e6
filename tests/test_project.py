"""The project around the code: packaging facts, what importing does, how make finds a Python, fixtures."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import any4_jax

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ["any4_jax", "pallas_kernels", "cuda_ffi"]
FOLDERS = {*PACKAGES, "examples", "tests"}
SOURCE_SUFFIXES = {".py", ".cc", ".cu", ".cuh", ".h"}
VENDORED = REPOSITORY / "cuda_ffi" / "csrc" / "xla"
MOST_LINES = 300

# Run where the only platform allowed doesn't exist, so that any use of a device fails.
IMPORT_ALL = """
import importlib, pkgutil, sys
for package in sys.argv[1:]:
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if not module.name.endswith(".__main__"):
            importlib.import_module(module.name)
"""


def git(*arguments: str) -> list[str]:
    """The lines that git prints about this repository; the test is skipped where that can't be had."""
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("needs git and a clone of the repository")
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


def test_version_is_stated_once_in_each_place(pyproject: dict[str, Any]) -> None:
    assert any4_jax.__version__ == pyproject["project"]["version"]


def test_packaging_table(pyproject: dict[str, Any]) -> None:
    assert pyproject["tool"]["scikit-build"]["wheel"]["packages"] == PACKAGES
    assert pyproject["tool"]["mypy"]["files"] == PACKAGES
    assert set(pyproject["project"]["optional-dependencies"]) == {"cuda", "hf-flax", "eval", "plot", "dev"}
    assert pyproject["project"]["scripts"] == {"any4": "any4_jax.cli:main"}


@pytest.mark.parametrize(
    "name, text",
    [("LICENSE", "Apache License"), ("CHANGELOG.md", "## [Unreleased]"), ("CONTRIBUTING.md", "make test")],
)
def test_root_file_says(name: str, text: str) -> None:
    assert text in (REPOSITORY / name).read_text(encoding="utf-8")


def test_top_level_folders() -> None:
    folders = {line.split("/")[0] for line in git("ls-files") if "/" in line}
    assert {name for name in folders if not name.startswith(".")} <= FOLDERS


def test_sources_are_short_and_named_by_what_they_hold() -> None:
    paths = [path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*") if path.suffix in SOURCE_SUFFIXES]
    assert paths
    assert [path for path in paths if "utils" in (path.stem, path.parent.name)] == []
    lengths = {path: path.read_text(encoding="utf-8").count("\n") for path in paths if VENDORED not in path.parents}
    assert {path: lines for path, lines in lengths.items() if lines > MOST_LINES} == {}


def test_no_packaged_file_is_ignored_by_git() -> None:
    # The build backend leaves out of the wheel whatever git ignores.
    ignored = git("ls-files", "--others", "--ignored", "--exclude-standard", "--", *PACKAGES)
    assert [path for path in ignored if "__pycache__" not in path] == []


def test_data_files_are_found_as_resources() -> None:
    names = [path.name for path in (REPOSITORY / "any4_jax" / "data").iterdir() if path.is_file()]
    assert names
    assert all((files("any4_jax.data") / name).is_file() for name in names)


def test_importing_uses_no_device_and_prints_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *PACKAGES],
        cwd=REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "no_such_platform"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.fixture
def makefile(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs make on a copy of the Makefile in an empty folder whose path has a space."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    folder = tmp_path / "a folder"
    folder.mkdir()
    shutil.copy(REPOSITORY / "Makefile", folder)
    for name in ("pyproject.toml", "CMakeLists.txt"):
        shutil.copy(REPOSITORY / name, folder)

    def run(*arguments: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess[str]:
        # Variables of a make around this test would make the inner one a part of it.
        env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "MFLAGS"}
        command = [str(shutil.which("make")), *arguments]
        return subprocess.run(
            command, cwd=folder, env={**env, "PATH": path}, capture_output=True, text=True, timeout=120
        )

    return run


def test_make_without_a_target_names_the_targets(makefile) -> None:
    done = makefile()
    assert done.returncode == 0
    assert [line.split()[1] for line in done.stdout.splitlines()] == [
        "demo",
        "test",
        "test-all",
        "test-peers",
        "lint",
        "sanitize",
        "fuzz",
        "clean",
    ]


def test_make_clean_removes_what_make_made(makefile, tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    for made in (".venv/bin", ".venv-newest", ".mypy_cache", "tests/__pycache__"):
        (folder / made).mkdir(parents=True)
    assert makefile("clean").returncode == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "CMakeLists.txt",
        "Makefile",
        "pyproject.toml",
        "tests",
    ]
    assert not any((folder / "tests").iterdir())


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder to serve as the whole PATH: the tools that make calls, and a shim that refuses to run."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("ls", "sort", "mkdir", "touch"):
        (folder / tool).symlink_to(str(shutil.which(tool)))
    shim = folder / "python3"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    return folder


def test_make_without_a_python_says_so(makefile, tools: Path) -> None:
    done = makefile(".venv/bin/python", path=str(tools))
    assert done.returncode != 0
    assert "found no Python 3.11 or newer" in done.stderr


def test_make_passes_over_a_python_that_does_not_run(makefile, tools: Path, tmp_path: Path) -> None:
    python = tools / "python3.12"
    # Stands in for `-m venv`, which takes ten seconds; everything else is asked of a real interpreter.
    python.write_text(
        '#!/bin/sh\nif [ "$1" = -m ]; then mkdir -p .venv/bin && touch .venv/bin/python\n'
        f'else exec "{sys.executable}" "$@"; fi\n'
    )
    python.chmod(0o755)
    done = makefile(".venv/bin/python", path=str(tools))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a folder" / ".venv" / "bin" / "python").exists()


def test_count_compiles_counts_programs(count_compiles: Callable[[], AbstractContextManager[Any]]) -> None:
    x, y = jnp.ones(3), jnp.ones(4)
    twice = jax.jit(lambda v: v * 2)
    with count_compiles() as first:
        twice(x)
        twice(y)
    with count_compiles() as again:
        twice(x)
    assert (first.count, again.count) == (2, 0)
