"""The CUDA kernels under compute-sanitizer, driven without JAX, whose own launches would be watched too."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cuda_ffi import build

NATIVE = Path(__file__).parent / "native"
SANITIZER = shutil.which("compute-sanitizer")

pytestmark = pytest.mark.sanitize


def objects_of(sources: list[Path], folder: Path) -> list[str]:
    compiler = build.find_compiler("cuda")
    assert compiler is not None
    made = [str(folder / f"{file.stem}.o") for file in sources]
    jobs = [
        [compiler, *build.flags("cuda", file), *build.machine_flags(compiler, file), "-c", str(file), "-o", object_]
        for file, object_ in zip(sources, made, strict=True)
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(build._run, jobs))
    return made


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The objects of all that isn't XLA's."""
    if build.find_compiler("cuda") is None or SANITIZER is None:
        pytest.skip("needs nvcc and compute-sanitizer, which come with the CUDA toolkit")
    # Not asked of jax, which may be installed without CUDA: the drivers do without it.
    if shutil.which("nvidia-smi") is None or subprocess.run(["nvidia-smi", "-L"], check=False).returncode != 0:
        pytest.skip("needs an NVIDIA GPU")
    sources = [
        file
        for file in build.source_files("cuda")
        if file.suffix in build.SUFFIXES["cuda"] and "handler" not in file.name
    ]
    return objects_of(sources, tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module", params=sorted(path.name for path in NATIVE.glob("*_driver.cu")))
def driver(request: pytest.FixtureRequest, kernels: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    made = folder / "driver"
    build._run(
        [
            build.find_compiler("cuda"),
            "--cudart=static",
            *kernels,
            *objects_of([NATIVE / request.param], folder),
            "-o",
            str(made),
        ]
    )
    return made


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_no_finding(driver: Path, tool: str) -> None:
    done = subprocess.run(
        [SANITIZER, "--tool", tool, "--error-exitcode=99", str(driver)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " cases" in done.stdout
