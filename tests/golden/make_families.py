"""Write the golden logits of every family of decoders with torch and transformers 5, which no test needs.

    python tests/golden/make_families.py [VARIANT ...]

Each family_<variant>.npz holds config.json twice (`config`: flat, as transformers 4 and the model hub write it;
`config_5`: as transformers 5 saves it), the weights under the names that checkpoints have, tokens int32 [B, T], and
logits float32 [B, T, V]. Weights are float16 numbers, computed with in float32; they are far larger than a fresh
initialisation's, so that attention is sharp and a wrong angle, mask, scale or bias moves the logits by more than
rounding does. `lengths`, where it is there, says that the logits of each row are those of its first tokens only.
"""

import json
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

FOLDER = Path(__file__).parent
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
LLAMA = COMMON | GATED | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
MISTRAL = COMMON | GATED | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
QWEN2 = (
    COMMON
    | GATED
    | {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "sliding_window": 8,
        "max_window_layers": 2,
    }
)
QWEN3 = (
    COMMON
    | GATED
    | {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "rope_theta": 1000000.0,
        "head_dim": 16,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 2,
    }
)
GEMMA = COMMON | {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 8,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GEMMA2 = GEMMA | {
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "cache_implementation": "hybrid",
}
GEMMA3 = GEMMA | {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "num_hidden_layers": 7,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "sliding_window_pattern": 6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
OPT = {
    "model_type": "opt",
    "architectures": ["OPTForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
    "do_layer_norm_before": True,
    "activation_function": "relu",
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "layerdrop": 0.0,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
MIXTRAL = (
    COMMON
    | GATED
    | {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
)
QWEN3_MOE = QWEN3 | {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_attention_heads": 2,
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
# Heads of 8 channels have few frequencies: with the usual 32 and 1 turns the ramp would end within the first of them.
BETAS = {"beta_fast": 4.0, "beta_slow": 0.5}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.2, 2.5, 6.0, 16.0],
    "original_max_position_embeddings": 32,
}
LONGROPE = LLAMA | {"rope_scaling": LONG, "original_max_position_embeddings": 32}

# name -> (config.json, number of tokens of each row)
VARIANTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "mistral": (MISTRAL | {"sliding_window": 8}, (40,)),
    "mistral_no_window": (MISTRAL | {"sliding_window": None, "head_dim": 16}, (40,)),
    "qwen2": (QWEN2, (32,)),
    "qwen2_window": (
        QWEN2 | {"use_sliding_window": True, "max_window_layers": 1, "tie_word_embeddings": True},
        (40,),
    ),
    "qwen3": (QWEN3, (32,)),
    "gemma2": (GEMMA2, (40,)),
    "gemma3": (GEMMA3, (40,)),
    # The form of later files, which name each layer's attention.
    "gemma3_layer_types": (
        GEMMA3
        | {
            "num_hidden_layers": 3,
            "sliding_window_pattern": 3,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_scaling": None,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 16,
        },
        (40,),
    ),
    "opt": (OPT, (32,)),
    "opt_post_norm": (OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16}, (32,)),
    "mixtral": (MIXTRAL, (32,)),
    "mixtral_window": (MIXTRAL | {"sliding_window": 8, "num_hidden_layers": 1}, (40,)),
    "qwen3_moe": (QWEN3_MOE, (32,)),
    # Layer 0 is dense by the step, layer 1 has experts, layer 2 is dense by the step, layer 3 by its list.
    "qwen3_moe_mixed": (
        QWEN3_MOE | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": False},
        (32,),
    ),
    "rope_linear": (LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}}, (48,)),
    # The second row fits the original context of 32 tokens, the first does not.
    "rope_dynamic": (
        LLAMA | {"max_position_embeddings": 32, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
        (48, 24),
    ),
    "rope_yarn": (LLAMA | {"rope_scaling": YARN | BETAS}, (48,)),
    "rope_yarn_factor": (LLAMA | {"rope_scaling": YARN | BETAS | {"attention_factor": 1.5, "truncate": False}}, (48,)),
    "rope_yarn_mscale": (LLAMA | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}, (48,)),
    "rope_longrope": (LONGROPE, (48, 24)),
}


def random_value(rng: np.random.Generator, name: str, shape: tuple[int, ...], neutral: float) -> np.ndarray:
    """A float16 weight: norms near their neutral value, biases near 0, matrices that keep the size of their input."""
    if len(shape) > 1:
        return (rng.normal(size=shape) * 1.5 / np.sqrt(shape[-1])).astype(np.float16)
    return (neutral * name.endswith("weight") + 0.3 * rng.normal(size=shape)).astype(np.float16)


def build(config: dict[str, Any], seed: int) -> tuple[Any, dict[str, np.ndarray], str]:
    """A model with random weights, its tensors under the names of a checkpoint, and transformers' config.json."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        read = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(read, attn_implementation="eager", dtype=torch.float32).eval()
        # Gemma's norms multiply by 1 + weight.
        neutral = 0.0 if config["model_type"].startswith("gemma") else 1.0
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                value = random_value(rng, name, tuple(parameter.shape), neutral)
                parameter.copy_(torch.from_numpy(value.astype(np.float32)))
        # Saved and read, because models in memory have other names than checkpoints: the experts are one tensor.
        model.save_pretrained(folder)
        tensors = {name: value.astype(np.float16) for name, value in load_file(f"{folder}/model.safetensors").items()}
        text = (Path(folder) / "config.json").read_text()
    return model, tensors, text


def logits_of(model: Any, tokens: np.ndarray, lengths: tuple[int, ...]) -> np.ndarray:
    """The logits of each row's first tokens, float32 [B, T, V]; 0 past them."""
    logits = np.zeros((*tokens.shape, model.config.vocab_size), np.float32)
    for row, length in enumerate(lengths):
        with torch.no_grad():
            logits[row, :length] = model(torch.from_numpy(tokens[row : row + 1, :length]).long()).logits.numpy()
    return logits


def main(names: list[str]) -> None:
    """Write one .npz a variant."""
    logging.disable_progress_bar()
    for name, (config, lengths) in VARIANTS.items():
        if names and name not in names:
            continue
        # Of the name alone, so that a new variant leaves the files of the others as they are.
        seed = zlib.crc32(name.encode())
        model, tensors, text = build(config, seed)
        rng = np.random.default_rng(seed + 1)
        tokens = rng.integers(0, config["vocab_size"], (len(lengths), max(lengths))).astype(np.int32)
        logits = logits_of(model, tokens, lengths)
        path = FOLDER / f"family_{name}.npz"
        np.savez_compressed(
            path,
            config=json.dumps(config),
            config_5=text,
            tokens=tokens,
            logits=logits,
            **(dict(lengths=np.array(lengths, np.int32)) if len(lengths) > 1 else {}),
            **tensors,
        )
        print(f"{path.name}: {path.stat().st_size} bytes, largest logit {np.abs(logits).max():.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
