"""Builds the native libraries where any4_jax is installed without them, or where their sources were edited.

    python -m cuda_ffi.build          both kinds, as far as there are compilers
    python -m cuda_ffi.build cpu      one kind; not being able to is an error

A library's file name holds the hash of its sources, so a library of other sources is never loaded by mistake. This
module builds into `cache_folder()`; `pip install` (CMakeLists.txt, with the same flags) builds into the package.
"""

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

KINDS = ("cpu", "cuda")
SOURCES = Path(__file__).resolve().parent / "csrc"
# What holds no code for a GPU is C++ for the CUDA library too: nvcc hands it to the host's compiler as it is.
SUFFIXES = {"cpu": (".cc",), "cuda": (".cu", ".cc")}

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-pthread", "-Wall", "-Wextra")
# By the end of a file's name; the first for x86-64. Other machines compile these files without the flags, to nothing.
_AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"),
    # GCC 12's own header of intrinsics deliberately reads uninitialized variables.
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
)
ISA_FLAGS = {
    "_avx512.cc": _AVX512,
    "_avx512vnni.cc": (*_AVX512, "-mavx512vnni"),
    "_avx512vbmi.cc": (*_AVX512, "-mavx512vnni", "-mavx512vbmi"),
    "_avx2.cc": ("-mavx2", "-mfma"),
    "_avxvnni.cc": ("-mavx2", "-mfma", "-mavxvnni"),
}
ARM_FLAGS = {"_dotprod.cc": ("-march=armv8.2-a+dotprod",)}
# What a compiler may be too old for, such as GCC 10. Its files hold nothing where the flag is missing.
RECENT_FLAG = "-mavxvnni"
# The two numbers are nvcc's warnings about XLA's headers.
CUDA_FLAGS = ("-std=c++17", "-O3", "--cudart=static", "-Xcompiler=-fPIC,-pthread", "-diag-suppress=940,2473")
# Later GPUs compile Hopper's PTX.
CUDA_PTX = "-gencode=arch=compute_90,code=compute_90"
# Machine code for Ampere, which 8.6 and Ada's 8.9 run too, for Hopper, and for Blackwell where nvcc knows it.
CUDA_MACHINES = (80, 90, 100)
# Files with this ending use instructions that only Hopper has, so they are compiled for it alone.
HOPPER_FILES = "_sm90a.cu"
HOPPER_ONLY = "-gencode=arch=compute_90a,code=sm_90a"


def source_files(kind: str) -> list[Path]:
    """All files that the library of a kind is built from, sorted by name."""
    files = [*(SOURCES / kind).glob("*"), *(SOURCES / "xla" / "ffi" / "api").glob("*.h")]
    return sorted((f for f in files if f.suffix in (".h", ".cc", ".cu", ".cuh")), key=lambda f: f.as_posix())


def source_hash(kind: str) -> str:
    """16 hexadecimal digits of the names and contents of `source_files`; CMakeLists.txt computes the same."""
    listing = ""
    for file in source_files(kind):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        listing += f"{file.relative_to(SOURCES).as_posix()} {digest}\n"
    return hashlib.sha256(listing.encode()).hexdigest()[:16]


def library_name(kind: str) -> str:
    """The file name of a library built from the present sources."""
    return f"libany4_{kind}-{source_hash(kind)}.so"


def cache_folder() -> Path:
    """The folder of this user's builds: any4_jax/<processor> in `$XDG_CACHE_HOME` or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "any4_jax" / platform.machine()


def find_compiler(kind: str) -> str | None:
    """The compiler's path: $CXX, c++, g++ or clang++; for cuda nvcc on PATH or under $CUDA_HOME or /usr/local/cuda."""
    if kind == "cuda":
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    candidates = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def flags(kind: str, source: Path) -> tuple[str, ...]:
    """The compiler's flags for one file."""
    if kind == "cuda":
        target = HOPPER_ONLY if source.name.endswith(HOPPER_FILES) else CUDA_PTX
        return (*CUDA_FLAGS, target, f"-I{SOURCES}", f"-I{SOURCES / 'cuda'}")
    machine = platform.machine().lower()
    known = ISA_FLAGS if machine in ("x86_64", "amd64") else ARM_FLAGS if machine in ("aarch64", "arm64") else {}
    special = [isa for end, isa in known.items() if source.name.endswith(end)]
    # XLA's headers are not clean under -Wextra.
    return (*FLAGS, *(special[0] if special else ()), "-isystem", str(SOURCES), f"-I{SOURCES / 'cpu'}")


def machine_flags(nvcc: str, source: Path) -> list[str]:
    """Flags for machine code of those CUDA_MACHINES that this nvcc knows; none for HOPPER_FILES."""
    if source.name.endswith(HOPPER_FILES):
        return []
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False).stdout.split()
    return [f"-gencode=arch=compute_{n},code=sm_{n}" for n in CUDA_MACHINES if f"sm_{n}" in known]


def _known(compiler: str, options: Sequence[str]) -> list[str]:
    """The flags without RECENT_FLAG if the compiler doesn't know it."""
    if RECENT_FLAG not in options:
        return list(options)
    probe = [compiler, RECENT_FLAG, "-x", "c++", "-E", os.devnull]
    known = subprocess.run(probe, capture_output=True, check=False).returncode == 0
    return [option for option in options if known or option != RECENT_FLAG]


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the compiler failed ({' '.join(command)}): {(done.stderr or done.stdout).strip()}")


def build(kind: str, folder: Path | None = None) -> Path:
    """Builds the library of a kind from the present sources, unless it exists already.

    Args:
      kind: "cpu" or "cuda".
      folder: where to put it; None for `cache_folder()`.

    Returns:
      The library's path.

    Raises:
      RuntimeError: there are no sources or no compiler, or the compiler failed; the sentence quotes it.
    """
    sources = [f for f in source_files(kind) if f.suffix in SUFFIXES[kind]]
    if not sources:
        raise RuntimeError(f"got kind {kind!r}, for which this version has no sources; build another kind")
    folder = cache_folder() if folder is None else folder
    target = folder / library_name(kind)
    if target.exists():
        return target
    compiler = find_compiler(kind)
    if compiler is None:
        what = "nvcc" if kind == "cuda" else "C++ compiler"
        raise RuntimeError(f"found no {what} to build the {kind} library; install one, or name it in $CXX")
    folder.mkdir(parents=True, exist_ok=True)
    # Renamed into place when complete, since another process may look for it meanwhile.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects = [Path(scratch) / (f.stem + ".o") for f in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            commands = [
                [
                    compiler,
                    *_known(compiler, flags(kind, source)),
                    *(machine_flags(compiler, source) if kind == "cuda" else ()),
                ]
                + ["-c", str(source), "-o", str(made)]
                for source, made in zip(sources, objects, strict=True)
            ]
            list(pool.map(_run, commands))
        linked = Path(scratch) / target.name
        threads = ["-Xcompiler=-pthread", "--cudart=static"] if kind == "cuda" else ["-pthread"]
        _run([compiler, "-shared", *threads, *map(str, objects), "-o", str(linked)])
        os.replace(linked, target)
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. It prints a line for each kind, and returns 1 if a compiler failed or the kind that the user
    named couldn't be built."""
    parser = argparse.ArgumentParser(prog="python -m cuda_ffi.build", description="Build any4_jax's native libraries.")
    parser.add_argument("kind", nargs="?", choices=KINDS, help="which library; both if left out")
    named = parser.parse_args(arguments).kind
    failed = False
    for kind in [named] if named else KINDS:
        there = (cache_folder() / library_name(kind)).exists()
        start = time.monotonic()
        try:
            path = build(kind)
        except RuntimeError as error:
            print(f"{kind}: {error}")
            failed = failed or named is not None or find_compiler(kind) is not None
        else:
            print(f"{kind}: {path} {'is up to date' if there else f'built in {time.monotonic() - start:.0f} s'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
