"""Checkpoints: Orbax arrays and a JSON manifest in one directory, which is replaced as a whole or not at all."""

from any4_jax.checkpoint.manifest import Manifest
from any4_jax.checkpoint.model import load, save
from any4_jax.checkpoint.nested import from_arrays, to_arrays
from any4_jax.checkpoint.store import read, read_manifest, verify, write

__all__ = ["Manifest", "from_arrays", "load", "read", "read_manifest", "save", "to_arrays", "verify", "write"]
