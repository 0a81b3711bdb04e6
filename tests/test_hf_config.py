"""Hugging Face configs: what transformers 4 and 5 wrote, what is assumed, what is refused."""

import pytest
from hf_folders import BASE

from any4_jax.models.config import RopeScaling
from any4_jax.models.hf import read_config

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_config_of_transformers_4_and_5_are_one() -> None:
    old = {
        **BASE,
        "rope_theta": 5e5,
        "rope_scaling": {**LLAMA3, "rope_type": "llama3"},
        "torch_dtype": "bfloat16",
    }
    older = {**BASE, "rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}}
    new = {
        **BASE,
        "rope_parameters": {**LLAMA3, "rope_type": "llama3", "rope_theta": 5e5},
        "dtype": "bfloat16",
    }
    assert read_config(old) == read_config(older) == read_config(new)
    assert read_config(new).rope_theta == 5e5
    assert read_config(new).rope_scaling == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )


@pytest.mark.parametrize(
    "change, generation, field, expected",
    [
        ({"head_dim": None}, None, "head_dim", 6),
        ({"num_key_value_heads": None}, None, "num_key_value_heads", 4),
        ({"eos_token_id": 7}, None, "eos_token_ids", (7,)),
        ({"eos_token_id": [7, 8]}, None, "eos_token_ids", (7, 8)),
        ({"eos_token_id": None}, None, "eos_token_ids", ()),
        ({"eos_token_id": 7}, {"eos_token_id": [9, 7]}, "eos_token_ids", (9, 7)),
        ({"eos_token_id": 7}, {}, "eos_token_ids", (7,)),
        ({"rope_scaling": {"rope_type": "default"}}, None, "rope_scaling", None),
        ({"rope_scaling": None}, None, "rope_theta", 10000.0),
        ({}, None, "rms_norm_eps", 1e-6),
    ],
)
def test_config_defaults(change: dict, generation: dict | None, field: str, expected: object) -> None:
    assert getattr(read_config({**BASE, **change}, generation), field) == expected


@pytest.mark.parametrize(
    "change, words",
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM is not supported"),
        ({"architectures": None, "model_type": "gemma"}, "'gemma'"),
        ({"hidden_act": "gelu"}, "'gelu' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ],
)
def test_config_refuses_by_name(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_config({**BASE, **change})
