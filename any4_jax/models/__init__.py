"""Models: the Llama family, and how to load one."""

from any4_jax.models.config import LlamaConfig, RopeScaling
from any4_jax.models.flax_llama import load_hf_flax
from any4_jax.models.hf import llama_from_tensors, tensors_of
from any4_jax.models.hf_config import read_config
from any4_jax.models.llama import Llama
from any4_jax.models.loading import load
from any4_jax.models.tokenizer import Tokenizer

__all__ = [
    "Llama",
    "LlamaConfig",
    "RopeScaling",
    "Tokenizer",
    "llama_from_tensors",
    "load",
    "load_hf_flax",
    "read_config",
    "tensors_of",
]
