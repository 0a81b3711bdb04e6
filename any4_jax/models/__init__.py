"""Models: the decoders of registered families, and how to load one."""

from any4_jax.models.base import Decoder, Site, Tap
from any4_jax.models.config import LlamaConfig, RopeScaling
from any4_jax.models.families import Family, register
from any4_jax.models.flax_llama import load_hf_flax
from any4_jax.models.hf import from_tensors, read_config, tensors_of
from any4_jax.models.llama import Llama
from any4_jax.models.loading import load
from any4_jax.models.tokenizer import Tokenizer

__all__ = [
    "Decoder",
    "Family",
    "Llama",
    "LlamaConfig",
    "RopeScaling",
    "Site",
    "Tap",
    "Tokenizer",
    "from_tensors",
    "load",
    "load_hf_flax",
    "read_config",
    "register",
    "tensors_of",
]
