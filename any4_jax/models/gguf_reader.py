"""Llama models in GGUF files, as the parts that a Hugging Face folder would give."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from any4_jax.models.config import LlamaConfig, RopeScaling
from any4_jax.models.gguf_file import GGUFFile
from any4_jax.models.gguf_tokenizer import read_tokenizer
from any4_jax.models.rope import Rope
from any4_jax.models.tokenizer import Tokenizer

# GGUF name -> Hugging Face name.
_LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_GLOBALS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"


class HFTensors(Mapping[str, np.ndarray]):
    """The tensors of a llama GGUF file under Hugging Face names and in their row order, read at each access.

    GGUF rotates neighbouring channels (2i, 2i+1) and Hugging Face rotates halves (i, i + D/2), so the rows of
    q and k are put back in that order. Names that no Llama has stay as they are, for the caller to refuse.
    """

    def __init__(self, file: GGUFFile, config: LlamaConfig) -> None:
        self._file = file
        self._heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        self._names = {hf_name(name): name for name in file if name != _ROPE_FACTORS}

    def __getitem__(self, name: str) -> np.ndarray:
        stored = self._names[name]
        array = self._file[stored]
        block = _BLOCK.fullmatch(stored)
        heads = self._heads.get(block[2]) if block else None
        if heads is None or array.shape[0] % (2 * heads):
            return array
        return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF llama tensor; a name that is none comes back as it is."""
    block = _BLOCK.fullmatch(name)
    if block and block[2] in _LINEARS:
        return f"model.layers.{block[1]}.{_LINEARS[block[2]]}.{block[3]}"
    return _GLOBALS.get(name, name)


def read_gguf(path: Path) -> tuple[LlamaConfig, Mapping[str, np.ndarray], Tokenizer | None]:
    """Shape, tensors (read one at a time) and tokenizer of a GGUF file of architecture llama.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or of another architecture, tensor type, rope scaling or tokenizer than is
            supported; the sentence names which.
        ImportError: the gguf package is missing.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{path} can't be read without the gguf package; install it with pip") from error
    file = GGUFFile(path)
    config = _config(file)
    return config, HFTensors(file, config), read_tokenizer(file.metadata)


def _config(file: GGUFFile) -> LlamaConfig:
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{file.path} is of architecture {architecture!r}, and only 'llama' is supported")

    def number(key: str, default: Any = None) -> Any:
        value = metadata.get(f"llama.{key}", default)
        if value is None:
            raise ValueError(f"{file.path} lacks llama.{key}; convert the model again")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise ValueError(
                    f"llama.{key} of {file.path} differs from layer to layer, and one for all is supported"
                )
            value = value[0]
        return value

    if number("expert_count", 0):
        raise ValueError(f"{file.path} has {number('expert_count')} experts, and only dense models are supported")
    hidden, heads = number("embedding_length"), number("attention.head_count")
    size = number("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if number(key, size) != size:
            raise ValueError(f"llama.{key} of {file.path} is {number(key)}, and only the head size {size} is supported")
    theta = float(number("rope.freq_base", 10000.0))
    token = metadata.get("tokenizer.ggml.bos_token_id")
    ends = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    return LlamaConfig(
        vocab_size=int(number("vocab_size", len(metadata.get("tokenizer.ggml.tokens", [])))),
        hidden_size=hidden,
        intermediate_size=number("feed_forward_length"),
        num_hidden_layers=number("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=number("attention.head_count_kv", heads),
        head_dim=size,
        max_position_embeddings=number("context_length"),
        rms_norm_eps=number("attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, Rope(size, theta)),
        tie_word_embeddings="output.weight" not in file,
        attention_bias="blk.0.attn_q.bias" in file,
        mlp_bias="blk.0.ffn_up.bias" in file,
        bos_token_id=token,
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
    )


def _rope_scaling(file: GGUFFile, rope: Rope) -> RopeScaling | None:
    kind = file.metadata.get("llama.rope.scaling.type", "none")
    linear = float(file.metadata.get("llama.rope.scale_linear", 1.0))
    if kind != "none" or linear != 1.0:
        kind = "linear" if kind == "none" else kind
        raise ValueError(f"rope scaling {kind!r} of {file.path} is not supported, only that of Llama 3.1 is")
    if _ROPE_FACTORS not in file:
        return None
    scaling = scaling_of_factors(file[_ROPE_FACTORS].astype(np.float64), rope)
    if scaling is None and np.any(file[_ROPE_FACTORS] != 1):
        raise ValueError(
            f"{_ROPE_FACTORS} of {file.path} holds other factors than Llama 3.1's rule makes; that is not supported"
        )
    return scaling


def scaling_of_factors(factors: np.ndarray, rope: Rope) -> RopeScaling | None:
    """The Llama 3.1 scaling that divides the frequencies of a rope by these factors; None if there is none.

    With c the original context, a frequency f makes n = c f / 2 pi turns in it, and 1 / factor is linear in n
    between low and high turns. So the blended entries give c / (high - low) and low / (high - low), which
    determine the function; low = 1, as in all published models, picks one of its equivalent spellings.

    Args:
        factors: [D/2], what `rope_freqs.weight` holds.
        rope: the unscaled rope.
    """
    if factors.shape != (rope.head_dim // 2,):
        return None
    frequencies = rope.frequencies().astype(np.float64)
    largest = float(factors.max())
    blended = (factors > 1 + 1e-6) & (factors < largest * (1 - 1e-6))
    if largest <= 1 or blended.sum() < 2:
        return None
    kept = (1 / factors[blended] - 1 / largest) / (1 - 1 / largest)
    slope, intercept = np.polyfit(frequencies[blended] / (2 * np.pi), kept, 1)
    if slope <= 0 or intercept >= 0:
        return None
    low, high = 1.0, round(1 - 1 / intercept, 3)
    context = round(slope * (high - low))
    scaling = RopeScaling(
        factor=largest, low_freq_factor=low, high_freq_factor=high, original_max_position_embeddings=context
    )
    scaled = Rope(rope.head_dim, rope.theta, scaling).frequencies()
    return scaling if np.allclose(frequencies / scaled, factors, rtol=1e-4, atol=0) else None
