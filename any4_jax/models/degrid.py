"""Move dequantized weights off their storage grid without changing what the model computes."""

from collections.abc import Mapping

import numpy as np

from any4_jax.models.config import LlamaConfig
from any4_jax.models.hf import llama_from_tensors, tensors_of
from any4_jax.models.llama import Llama

_FED_BY_NORM = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def degrid(model: Llama, *, scale_range: float = 1.2, seed: int = 0) -> Llama:
    """A new model of the same function; see `degrid_tensors`. The given one is unchanged."""
    moved = degrid_tensors(tensors_of(model), model.config, scale_range=scale_range, seed=seed)
    result = llama_from_tensors(model.config, moved, model.dtype)
    result.tokenizer = model.tokenizer
    return result


def degrid_tensors(
    tensors: Mapping[str, np.ndarray], config: LlamaConfig, *, scale_range: float = 1.2, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random factors per channel, folded into neighbouring maps so that they cancel.

    Why: weights dequantized from a 4-bit file already lie on a 4-bit grid, which any 4-bit method reproduces
    without error, so that comparing methods on them would prove nothing.

    With factors s, t, u per channel, drawn log-uniformly from [1 / scale_range, scale_range], in every block:
    norm gain / s and columns of the linears that it feeds * s; rows of v * t and columns of o / t, one factor
    for all query heads that share a kv head; rows of up * u and columns of down / u. Biases go with their
    rows.

    Args:
        tensors: Hugging Face name -> array, linears [N, K]; not modified.
        config: the shape.
        scale_range: the largest factor, > 1.
        seed: of the factors; one seed gives the same factors on every machine.

    Returns:
        All tensors, each in its own dtype (float32 keeps the function to rounding; 16-bit ones round it
        again).

    Raises:
        ValueError: scale_range is not above 1.
    """
    if not scale_range > 1:
        raise ValueError(f"scale_range={scale_range} would draw no factors; pass one above 1, such as 1.2")
    rng = np.random.default_rng(seed)
    limit = np.log(scale_range)
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    moved = dict(tensors)

    def factors(count: int) -> np.ndarray:
        return np.exp(rng.uniform(-limit, limit, count)).astype(np.float32)

    def multiply(name: str, factor: np.ndarray) -> None:
        moved[name] = (moved[name].astype(np.float32) * factor).astype(tensors[name].dtype)

    def divide(name: str, factor: np.ndarray) -> None:
        moved[name] = (moved[name].astype(np.float32) / factor).astype(tensors[name].dtype)

    def multiply_rows(linear: str, factor: np.ndarray) -> None:
        multiply(f"{linear}.weight", factor[:, None])
        if f"{linear}.bias" in moved:
            multiply(f"{linear}.bias", factor)

    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        for norm, linears in _FED_BY_NORM.items():
            s = factors(config.hidden_size)
            divide(f"{layer}.{norm}.weight", s)
            for linear in linears:
                multiply(f"{layer}.{linear}.weight", s)
        t = factors(kv_heads * size)
        multiply_rows(f"{layer}.self_attn.v_proj", t)
        per_query_head = np.repeat(t.reshape(kv_heads, size), heads // kv_heads, axis=0).reshape(-1)
        divide(f"{layer}.self_attn.o_proj.weight", per_query_head)
        u = factors(config.intermediate_size)
        multiply_rows(f"{layer}.mlp.up_proj", u)
        divide(f"{layer}.mlp.down_proj.weight", u)
    return moved
