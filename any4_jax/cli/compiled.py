"""Keeps compiled programs in the user's cache folder, so that a command doesn't compile what an earlier one did."""

import hashlib
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import jax

from any4_jax.data.assets import cache_dir

OFF = "ANY4_NO_COMPILATION_CACHE"
MOST_BYTES = 512 * 2**20
"""Beyond this, what was used least recently is removed."""


def keep() -> None:
    """Turns on jax's persistent cache for this process.

    It stays off if the environment variable ANY4_NO_COMPILATION_CACHE is set, if jax was given a folder or told to have
    none, and where the folder can't be written: a command runs without it too.
    """
    given: Any = jax.config
    if os.environ.get(OFF) or given.jax_compilation_cache_dir or not given.jax_enable_compilation_cache:
        return
    folder = cache_dir() / "compiled" / _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(folder, os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    # By default, programs that compile within a second are left out: for a small model, all of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # As on a full disk: the program is compiled, as it would be without the cache.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")


def _processor() -> str:
    """A name for the instructions that the processor has: programs for one may not run on another that shares the
    folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        flags = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:12]}"
