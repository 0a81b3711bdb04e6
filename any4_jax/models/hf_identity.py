"""Describes a Hugging Face Flax model, except its parameters, in a checkpoint, and rebuilds it."""

import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from any4_jax.models import flax_llama, hf_flax


def identity(hf: Any) -> dict[str, Any]:
    """JSON that holds the model's config, dtype of activations, class and generation config (null if it has none), and
    whether it is a repaired model of `load_hf_flax`."""
    generation = None
    # Models that don't generate, such as encoders, have none.
    if getattr(hf, "generation_config", None) is not None:
        generation = json.loads(hf.generation_config.to_json_string(use_diff=False))
        # This key lets transformers derive the generation config from the config again, which would lose what was
        # saved.
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
    """The model that receives the parameters of a model with this identity.

    Args:
        known: what `identity` returned.
        into: the user's model, or None.

    Returns:
        `into`, unless it is None. Then, for a repaired model, the model of `load_hf_flax` without weights; for any
        other, None, because nothing here can rebuild it.

    Raises:
        ImportError: transformers is absent, or has no Flax models.
        ValueError: `into` is a Hugging Face model without the repairs that the parameters need.
        KeyError, TypeError: `known` is not what `identity` returns.
    """
    repaired = known["model"]["repaired"]
    if into is None and repaired:
        into = flax_llama.abstract_flax_llama(known["config"], known["dtype"])
        if known["model"]["generation"] is not None:
            into.generation_config = type(into.generation_config).from_dict(known["model"]["generation"])
        into.tokenizer = None
    elif repaired and hf_flax.is_hf_flax(into) and not flax_llama.is_repaired(into):
        raise ValueError(
            "it holds a FlaxLlama of any4_jax.models.load_hf_flax, and `into`, which lacks its repairs, might compute "
            "something else; omit `into`, or pass a model of load_hf_flax"
        )
    return into
