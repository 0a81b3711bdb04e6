"""Shared by the families' readers of `config.json`, which transformers 4 and 5 write in different forms."""

from collections.abc import Iterable, Mapping
from typing import Any

from any4_jax.models.config import RopeScaling

_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def refuse_missing(config: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raises ValueError, which names the keys that config.json lacks."""
    missing = [key for key in keys if config.get(key) is None]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}; take the file that belongs to the weights")


def rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """The base of the rotary frequencies and their scaling.

    Raises:
        ValueError: the rope type is neither "default" nor "llama3", or one of its numbers is missing.
    """
    # transformers 5 keeps everything in rope_parameters; transformers 4 has rope_theta beside rope_scaling.
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"rope type {kind!r} is not supported, only 'default' and 'llama3'; take another model")
    missing = [key for key in _SCALING if parameters.get(key) is None]
    if missing:
        raise ValueError(f"the llama3 rope scaling of config.json lacks {', '.join(missing)}; add what is missing")
    return theta, RopeScaling(
        factor=float(parameters["factor"]),
        low_freq_factor=float(parameters["low_freq_factor"]),
        high_freq_factor=float(parameters["high_freq_factor"]),
        original_max_position_embeddings=int(parameters["original_max_position_embeddings"]),
    )


def eos_ids(
    config: Mapping[str, Any], generation: Mapping[str, Any] | None, default: int | None = 2
) -> tuple[int, ...]:
    """The ids of the tokens that end a text; those in generation_config.json, if any, take precedence.

    Args:
        config, generation: the content of config.json and generation_config.json.
        default: the eos_token_id of transformers' config class, for a config.json without one.
    """
    ids = (generation or {}).get("eos_token_id")
    if ids is None:
        ids = config.get("eos_token_id", default)
    if ids is None:
        return ()
    return tuple(int(i) for i in ids) if isinstance(ids, list | tuple) else (int(ids),)
