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
        ({"architectures": ["PhiForCausalLM"]}, "PhiForCausalLM is not supported"),
        ({"architectures": None, "model_type": "gemma"}, "'gemma'"),
        ({"hidden_act": "gelu"}, "'gelu' is not supported"),
        ({"rope_scaling": {"type": "mrope", "factor": 2.0}}, "rope type 'mrope' is not supported"),
        ({"rope_parameters": {"rope_type": ["yarn"], "factor": 2.0}}, "rope type .'yarn'. is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "the linear rope scaling of config.json lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0, and greater than 0 is needed"),
        ({"rope_scaling": {**LLAMA3, "type": "llama3", "low_freq_factor": 4.0}}, "low_freq_factor is 4.0, and less"),
        ({"rope_scaling": {**LLAMA3, "type": "llama3", "factor": float("nan")}}, "factor is nan"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}, "lacks factor"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "factor": 2.0}},
            "longrope rope scaling has 1 and 1 factors, and",
        ),
        ({"architectures": ["y" * 200]}, "a name of 1 to 100 printable characters is needed"),
        ({"hidden_act": "a\nb"}, "a name of 1 to 100 printable characters is needed"),
        ({"rope_scaling": "dynamic"}, "rope_scaling is 'dynamic'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, and only 1 is supported"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None, and a valid number is needed"),
        ({"rms_norm_eps": "8"}, "rms_norm_eps is '8'"),
        ({"rms_norm_eps": True}, "rms_norm_eps is True"),
        ({"rope_theta": -1}, "rope_theta is -1, and greater than 0 is needed"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"vocab_size": [1]}, "vocab_size is .1."),
        ({"head_dim": 3}, "head_dim is 3, and an even number is needed"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM'"),
        ({"quantization_config": "gptq"}, "quantization_config is 'gptq'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple"),
        ({"vocab_size": None}, "vocab_size is None, and a valid integer is needed"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ],
)
def test_config_refuses_by_name(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read_config({**BASE, **change})
    assert "\n" not in str(caught.value)


MOE = {**BASE, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 2}


@pytest.mark.parametrize(
    "change, windows",
    [
        ({"use_sliding_window": True, "sliding_window": 6}, (6, 6)),
        ({"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}, (6, 6)),
        ({"use_sliding_window": False, "sliding_window": 6}, ()),
    ],
)
def test_qwen3_moe_has_its_window_in_every_block(change: dict, windows: tuple[int, ...]) -> None:
    assert read_config({**MOE, **change}).windows == windows


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "max_window_layers", "mlp_only_layers"])
def test_a_negative_id_or_layer_of_qwen_is_refused(key: str) -> None:
    config = {**MOE, key: [-1] if key == "mlp_only_layers" else -1}
    if key == "max_window_layers":
        config = {**config, "architectures": ["Qwen2ForCausalLM"]}
    with pytest.raises(ValueError, match=f"{key}.* -1"):
        read_config(config)
