"""What the readers of `config.json` of several families share; transformers 4 and 5 write it in different forms."""

from collections.abc import Iterable, Mapping
from typing import Any

from any4_jax.models.config import RopeScaling

_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def refuse_missing(config: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raises ValueError that names the keys which config.json lacks."""
    missing = [key for key in keys if config.get(key) is None]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}; take the file that belongs to the weights")


def rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """The base of the rotary frequencies and their scaling.

    Raises:
        ValueError: a rope type other than "default" and "llama3", or a number of it is missing.
    """
    # Transformers 5 keeps all of it in rope_parameters, 4 has rope_theta beside rope_scaling.
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
    """The tokens that end a text; generation_config.json wins where it names any.

    Args:
        config, generation: the content of config.json and generation_config.json.
        default: what transformers' config class takes where config.json has no eos_token_id.
    """
    ids = (generation or {}).get("eos_token_id")
    if ids is None:
        ids = config.get("eos_token_id", default)
    if ids is None:
        return ()
    return tuple(int(i) for i in ids) if isinstance(ids, list | tuple) else (int(ids),)
