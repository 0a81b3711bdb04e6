"""Small models for tests and for machines without a network."""

from typing import Any, cast

import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from any4_jax.data import bundled
from any4_jax.models.config import LlamaConfig
from any4_jax.models.families import family_of_config
from any4_jax.models.hf import from_tensors, load_folder
from any4_jax.models.llama import Llama
from any4_jax.models.stored import Stored


def tiny(dtype: DTypeLike | None = None) -> Llama:
    """The bundled stories260K (MIT): 5 layers, hidden size 64, trained on TinyStories, with its tokenizer.

    Its weights are float32, as trained, unless another dtype is given. Its MLPs are 172 wide and its heads 8, so short
    last groups and unusual sizes occur naturally.
    """
    with bundled("stories260k") as folder:
        return cast(Llama, load_folder(folder, dtype))


def random_llama(config: LlamaConfig | None = None, seed: int = 0) -> Llama:
    """A float32 Llama with random weights and no tokenizer; without a config, it has about 50,000 parameters."""
    if config is None:
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=48,
            intermediate_size=88,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=128,
        )
    return cast(Llama, from_tensors(config, random_tensors(config, seed)))


def random_tensors(config: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors under Hugging Face names, linears [N, K] of variance 1 / K, norms about 1.

    numpy draws them: nothing is compiled, and a seed gives the same weights with every version of jax.

    Args:
        config: of any family.
        seed: of the draws.
    """
    rng, family = np.random.default_rng(seed), family_of_config(config)
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(family.abstract(config, np.float32))):
        for name, shape in Stored.of(family, path, variable.get_value().shape).parts():
            centre, spread = (1.0, 0.1) if path[-1] == "scale" else (0.0, shape[-1] ** -0.5)
            tensors[name] = rng.normal(centre, spread, shape).astype(np.float32)
    return tensors
