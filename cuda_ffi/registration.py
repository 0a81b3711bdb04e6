"""Finds the native libraries, checks them, and registers their handlers with XLA when the first is needed.

To add a handler:
- Put its source into csrc/cpu/*.cc (csrc/cuda/*.cu, or *.cc without code for a GPU); all such files make up the one
  library of their kind. A file whose name ends like one of build.py's ISA_FLAGS, such as *_avx2.cc, is compiled with
  that instruction set's flags (build.py, CMakeLists.txt), so it must hold nothing that runs on other processors;
  csrc/cpu/isa.h chooses at run time. A file named *_sm90a.cu is compiled for Hopper alone, so its kernels must be
  launched nowhere else.
- Define it by XLA_FFI_DEFINE_HANDLER_SYMBOL, and give it a row in `TARGETS`: symbol -> target name.
- Let its Python wrapper call `register(kind)` before `jax.ffi.ffi_call(target, ...)`; whoever may fall back asks
  `why_not(kind, platform)` first. Both are cheap after their first call.
"""

import ctypes
import functools
import importlib.metadata
import re
import warnings
from pathlib import Path

import jax

from cuda_ffi import build

TARGETS: dict[str, dict[str, str]] = {
    "cpu": {
        "any4_cpu_lut_product": "any4_cpu_lut_product",
        "any4_cpu_byte_product": "any4_cpu_byte_product",
        "any4_cpu_binary_product": "any4_cpu_binary_product",
        "any4_cpu_sparse_product": "any4_cpu_sparse_product",
        "any4_cpu_coded_product": "any4_cpu_coded_product",
        "any4_cpu_kmeans": "any4_cpu_kmeans",
        "any4_cpu_refit": "any4_cpu_refit",
        "any4_cpu_compensation": "any4_cpu_compensation",
        "any4_cpu_attention": "any4_cpu_attention",
        "any4_cpu_kivi_attention": "any4_cpu_kivi_attention",
        "any4_cpu_kvquant_attention": "any4_cpu_kvquant_attention",
    },
    "cuda": {
        "any4_cuda_lut_product": "any4_cuda_lut_product",
        "any4_cuda_lut_dequantize": "any4_cuda_lut_dequantize",
        "any4_cuda_byte_product": "any4_cuda_byte_product",
        "any4_cuda_binary_product": "any4_cuda_binary_product",
        "any4_cuda_sparse_product": "any4_cuda_sparse_product",
        "any4_cuda_coded_product": "any4_cuda_coded_product",
        "any4_cuda_kmeans": "any4_cuda_kmeans",
        "any4_cuda_refit": "any4_cuda_refit",
        "any4_cuda_compensation": "any4_cuda_compensation",
        "any4_cuda_attention": "any4_cuda_attention",
        "any4_cuda_kivi_attention": "any4_cuda_kivi_attention",
        "any4_cuda_kvquant_attention": "any4_cuda_kvquant_attention",
    },
}
"""The handlers in each kind of library: symbol -> name of XLA's target."""

PLATFORMS = {"cpu": "cpu", "cuda": "CUDA"}


def installed() -> list[Path]:
    """The libraries that came with the package, wherever an editable or a plain installation put them."""
    try:
        files = importlib.metadata.files("any4_jax") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())) for file in files if re.fullmatch(r"libany4_\w+-\w+\.so", file.name)]


def find(kind: str) -> Path | None:
    """The library built from the present sources, or None, with a warning if one of other sources exists."""
    name = build.library_name(kind)
    libraries = [*installed(), *build.cache_folder().glob("libany4_*.so")]
    for library in libraries:
        if library.name == name and library.exists():
            return library
    if any(library.name.startswith(f"libany4_{kind}-") for library in libraries):
        warnings.warn(
            f"the {kind} library was built from other sources than {build.SOURCES / kind} now holds, so it isn't used; "
            f"run `python -m cuda_ffi.build {kind}`",
            stacklevel=2,
        )
    return None


def jaxlib_ffi_version() -> tuple[int, int]:
    """(major, minor) version of XLA's FFI in the running jaxlib, read from the header that it ships."""
    text = (Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h").read_text(encoding="utf-8")
    major, minor = (re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR"))
    assert major and minor
    return int(major[1]), int(minor[1])


@functools.cache
def _register(kind: str) -> ctypes.CDLL | str:
    """The loaded library with its handlers registered, or one sentence that says why there is none."""
    path = find(kind)
    if path is None:
        return f"no {kind} library is built; run `python -m cuda_ffi.build {kind}`, which needs a compiler"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path} can't be loaded ({error}); remove it and run `python -m cuda_ffi.build {kind}`"
    # XLA refuses handlers of a newer interface, and if its backend isn't up yet, the whole backend fails with them.
    library_version = divmod(library.any4_ffi_abi(), 1000)
    version = jaxlib_ffi_version()
    if library_version[0] != version[0] or library_version > version:
        got, has = (".".join(map(str, v)) for v in (library_version, version))
        return f"{path} was built for XLA FFI {got}, this jaxlib has {has}; upgrade jaxlib to use it"
    for symbol, target in TARGETS[kind].items():
        capsule = jax.ffi.pycapsule(getattr(library, symbol))
        jax.ffi.register_ffi_target(target, capsule, platform=PLATFORMS[kind])
    return library


def why_not(kind: str, platform: str | None = None) -> str | None:
    """None if programs can call the library of a kind, else the reason in one sentence. It loads the library.

    Args:
      kind: "cpu" or "cuda".
      platform: the one that a program is lowered for, as `jax.lax.platform_dependent` names it; None for the library's.
    """
    if platform not in (None, kind):
        return f"it runs on {kind}, not on {platform}"
    found = _register(kind)
    return found if isinstance(found, str) else None


def register(kind: str) -> ctypes.CDLL:
    """The loaded library of a kind, whose handlers XLA knows.

    Raises:
      RuntimeError: with `why_not`'s sentence.
    """
    found = _register(kind)
    if isinstance(found, str):
        raise RuntimeError(found)
    return found
