"""What a checkpoint says of a Hugging Face Flax model besides its parameters, and the model that it says."""

import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from any4_jax.models import flax_llama, hf_flax


def identity(hf: Any) -> dict[str, Any]:
    """JSON of the model's config, dtype of activations, class, generation config and whether it is one of
    `load_hf_flax`, repaired."""
    generation = json.loads(hf.generation_config.to_json_string(use_diff=False))
    # Tells transformers that it may derive it from the config again, which would lose what was saved.
    generation.pop("_from_model_config", None)
    return {
        "config": json.loads(hf.config.to_json_string(use_diff=False)),
        "dtype": jnp.dtype(hf.dtype).name,
        "model": {
            "class": type(hf).__name__,
            "generation": generation,
            "repaired": flax_llama.is_repaired(hf),
        },
    }


def model_for(known: Mapping[str, Any], into: Any) -> Any:
    """The model that takes the parameters of one of this identity: `into` or, where that is None, the model of
    `load_hf_flax` without weights; None for a model of the user's, which nothing here can rebuild.

    Raises:
        ImportError: transformers is absent, or of a version without Flax models.
        ValueError: a repaired model's parameters are to go into a Hugging Face model without the repairs.
        KeyError, TypeError: `known` is not what `identity` gives.
    """
    repaired = known["model"]["repaired"]
    if into is None and repaired:
        into = flax_llama.abstract_flax_llama(known["config"], known["dtype"])
        into.generation_config = type(into.generation_config).from_dict(known["model"]["generation"])
        into.tokenizer = None
    elif repaired and hf_flax.is_hf_flax(into) and not flax_llama.is_repaired(into):
        raise ValueError(
            "it was made by a FlaxLlama of any4_jax.models.load_hf_flax, and `into`, which lacks its repairs, "
            "might compute something else; leave `into` out, or pass one of load_hf_flax"
        )
    return into
