"""Building the native libraries, finding the right one, and refusing the wrong one in one sentence."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from any4_jax import packing
from cuda_ffi import build, layout, registration

REPOSITORY = Path(__file__).resolve().parent.parent
NATIVE = REPOSITORY / "tests" / "native"

SMALL = 'extern "C" int any4_ffi_abi() { return %d; }\n'

needs_compiler = pytest.mark.skipif(build.find_compiler("cpu") is None, reason="needs a C++ compiler")


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty csrc/cpu in place of the real one, and an empty cache."""
    monkeypatch.setattr(build, "SOURCES", tmp_path / "csrc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # What is installed is of the real sources.
    monkeypatch.setattr(registration, "installed", list)
    folder = tmp_path / "csrc" / "cpu"
    folder.mkdir(parents=True)
    return folder


@needs_compiler
def test_builds_once_for_each_state_of_the_sources(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sources / "one.cc").write_text(SMALL % 3)
    (sources / "two_avx2.cc").write_text("int two() { return 2; }\n")
    assert build.main(["cpu"]) == 0
    first = build.cache_folder() / build.library_name("cpu")
    assert capsys.readouterr().out.startswith(f"cpu: {first} built in ")
    assert list(build.cache_folder().iterdir()) == [first]
    assert build.main(["cpu"]) == 0
    assert capsys.readouterr().out == f"cpu: {first} is up to date\n"
    assert registration.find("cpu") == first
    (sources / "one.cc").write_text(SMALL % 4)
    assert build.library_name("cpu") != first.name
    with pytest.warns(UserWarning, match="built from other sources.*run `python -m cuda_ffi.build cpu`"):
        assert registration.find("cpu") is None
    assert build.build("cpu") == registration.find("cpu") != first


def test_machine_code_is_made_of_what_nvcc_knows(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho sm_75 sm_80 sm_86 sm_90\n")
    nvcc.chmod(0o755)
    assert build.machine_flags(str(nvcc), Path("lut.cu")) == [
        f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90)
    ]


@needs_compiler
def test_a_compiler_that_fails_is_quoted(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sources / "bad.cc").write_text("int f() { return nothing; }\n")
    assert build.main(["cpu"]) == 1
    assert "cpu: the compiler failed" in (said := capsys.readouterr().out) and "nothing" in said
    assert list(build.cache_folder().iterdir()) == []


def test_without_a_compiler_or_sources(
    sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda kind: None)
    assert build.main([]) == 0
    assert "cpu: got kind 'cpu', for which this version has no sources" in capsys.readouterr().out
    (sources / "one.cc").write_text(SMALL % 3)
    assert build.main(["cpu"]) == 1 and build.main([]) == 0
    assert "cpu: found no C++ compiler to build the cpu library; install one" in capsys.readouterr().out
    assert registration._register.__wrapped__("cpu").startswith("no cpu library is built; run `python -m")


@needs_compiler
@pytest.mark.parametrize("version", [1003, 999])
def test_a_library_for_a_newer_jaxlib_is_not_registered(sources: Path, version: int) -> None:
    (sources / "one.cc").write_text(SMALL % version)
    build.build("cpu")
    reason = registration._register.__wrapped__("cpu")
    major, minor = divmod(version, 1000)
    assert f"was built for XLA FFI {major}.{minor}, this jaxlib has 0." in reason and "upgrade jaxlib" in reason


def test_a_file_that_is_no_library(sources: Path) -> None:
    (sources / "one.cc").write_text(SMALL % 3)
    build.cache_folder().mkdir(parents=True)
    (build.cache_folder() / build.library_name("cpu")).write_text("no library")
    assert "can't be loaded" in registration._register.__wrapped__("cpu")


def test_vendored_headers_are_no_newer_than_any_supported_jaxlib() -> None:
    text = (build.SOURCES / "xla" / "ffi" / "api" / "c_api.h").read_text(encoding="utf-8")
    assert "#define XLA_FFI_API_MAJOR 0\n" in text and "#define XLA_FFI_API_MINOR 3\n" in text
    assert registration.jaxlib_ffi_version() >= (0, 3)


def test_both_builds_use_the_same_flags() -> None:
    text = (REPOSITORY / "CMakeLists.txt").read_text(encoding="utf-8")
    for ending, flags in (build.ISA_FLAGS | build.ARM_FLAGS).items():
        (given,) = re.findall(rf'any4_isa_flags\({ending.removeprefix("_").removesuffix(".cc")} "(.*)"\)', text)
        for name in ("avx512", "header_warnings"):
            (value,) = re.findall(rf'set\({name} "(.*)"\)', text)
            given = given.replace(f"${{{name}}}", value)
        assert sorted(given.split(";")) == sorted(flags)
    assert all(flag in text for flag in ("-O3", "-Wall", "-Wextra", "-diag-suppress=940,2473"))


def test_an_installed_library_is_of_these_sources() -> None:
    names = [path.name for path in registration.installed() if path.name.startswith("libany4_cpu-")]
    if not names:
        pytest.skip("this installation was made without a compiler")
    # CMake and Python compute the name independently.
    assert build.library_name("cpu") in names


def test_layout_is_that_of_packing() -> None:
    assert layout.PLANES == packing.PLANES
    golden = np.load(REPOSITORY / "tests" / "golden" / "packing.npz")
    for name in (n for n in golden.files if n.startswith("codes_")):
        _, bits, length = name.split("_")
        planes = tuple(golden[f"plane_{bits}_{length}_{i}"] for i in range(len(layout.PLANES[int(bits)])))
        np.testing.assert_array_equal(layout.unpack(planes, int(bits), int(length)), golden[name])


def test_every_handler_has_its_row() -> None:
    defined = {
        line.split("(")[1].split(",")[0]
        for path in (build.SOURCES / "cpu").glob("*.cc")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("XLA_FFI_DEFINE_HANDLER_SYMBOL(")
    }
    assert defined == set(registration.TARGETS["cpu"])
    if registration.why_not("cpu") is None:
        library = registration.register("cpu")
        assert library is registration.register("cpu")
        assert {symbol for symbol in defined if hasattr(library, symbol)} == defined


def sanitized(name: str, sanitizer: str, folder: Path) -> Path:
    """Builds tests/native/<name>_driver.cc with the files of csrc/cpu that begin with <name>_."""
    compiler = build.find_compiler("cpu")
    assert compiler is not None
    cpu = build.SOURCES / "cpu"
    files = [f for f in cpu.glob(f"{name}_*.cc") if not f.name.endswith("_handler.cc")]
    jobs = []
    for file in [*files, cpu / "threads.cc", cpu / "isa.cc", NATIVE / f"{name}_driver.cc"]:
        # Of intrinsics GCC takes minutes to compile some checks: there addresses alone are watched. How threads share
        # the work is the same for all, so that the portable code stands for the others.
        vectors = file.name.endswith(tuple(build.ISA_FLAGS))
        checks = {"address": "address" if vectors else "address,undefined", "thread": "" if vectors else "thread"}
        flags = [f for f in build.flags("cpu", file) if f != "-O3"]
        watched = [f"-fsanitize={checks[sanitizer]}", "-fno-sanitize-recover=all"] if checks[sanitizer] else []
        made = folder / f"{file.stem}.o"
        # Full debug information and variables' scopes double the time that GCC takes.
        cheaper = ["-O1", "-g1", "-fno-sanitize-address-use-after-scope"]
        jobs.append([compiler, *flags, *watched, *cheaper, "-c", str(file), "-o", str(made)])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(build._run, jobs))
    driver = folder / "driver"
    objects = [job[-1] for job in jobs]
    links = f"-fsanitize={sanitizer}" + (",undefined" if sanitizer == "address" else "")
    build._run([compiler, links, "-pthread", *objects, "-o", str(driver)])
    return driver


@pytest.mark.sanitize
@needs_compiler
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("name", sorted(path.stem.removesuffix("_driver") for path in NATIVE.glob("*_driver.cc")))
def test_kernels_under_sanitizers(name: str, sanitizer: str, tmp_path: Path) -> None:
    (tmp_path / "probe.cc").write_text("int main() {}\n")
    compiler = build.find_compiler("cpu")
    probe = [compiler, f"-fsanitize={sanitizer}", str(tmp_path / "probe.cc"), "-o", str(tmp_path / "probe")]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        pytest.skip(f"{compiler} has no {sanitizer} sanitizer here")
    done = subprocess.run([sanitized(name, sanitizer, tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 0


def test_jax_ffi_headers_of_this_jaxlib_are_where_the_check_looks() -> None:
    assert (Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h").is_file()
