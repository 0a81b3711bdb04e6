"""Write the golden logits of `tests/test_llama.py` with torch and transformers, which no test needs.

    python tests/golden/make_llama.py

Each file holds config.json as text, the weights under their Hugging Face names, tokens, and logits. Weights
are float16 numbers, computed with in float32; they are far larger than a fresh initialisation's, so that
attention is sharp and a wrong angle, mask or bias moves the logits by more than rounding does.
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parent
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# name -> (what differs from SMALL, rows, tokens)
VARIANTS = {
    "llama2": ({}, 2, 24),
    "llama3": ({"num_key_value_heads": 2, "rope_theta": 500000.0}, 2, 24),
    # 160 positions are 2.5 times the original context: the stretched frequencies differ by whole turns.
    "llama31": (
        {
            "num_key_value_heads": 2,
            "rope_theta": 10000.0,
            "rope_scaling": LLAMA31,
            "max_position_embeddings": 512,
        },
        1,
        160,
    ),
    "tied": ({"num_key_value_heads": 1, "tie_word_embeddings": True}, 2, 24),
    "biases": ({"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}, 2, 24),
    "head_dim": ({"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16}, 2, 24),
}


def main() -> None:
    """Write one .npz a variant."""
    for seed, (name, (changes, rows, length)) in enumerate(VARIANTS.items()):
        rng = np.random.default_rng(seed)
        config = LlamaConfig(**(SMALL | changes), attn_implementation="eager")
        model = LlamaForCausalLM(config).eval()
        tensors = {}
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                shape = tuple(parameter.shape)
                if len(shape) == 2:
                    value = rng.normal(size=shape) * 1.5 / np.sqrt(shape[1])
                else:
                    value = key.endswith("norm.weight") + 0.3 * rng.normal(size=shape)
                tensors[key] = value.astype(np.float16)
                parameter.copy_(torch.from_numpy(tensors[key].astype(np.float32)))
            tokens = rng.integers(0, config.vocab_size, (rows, length)).astype(np.int32)
            logits = model(torch.from_numpy(tokens).long()).logits.numpy()
        text = json.dumps(config.to_dict(), default=str)
        np.savez_compressed(FOLDER / f"llama_{name}.npz", config=text, tokens=tokens, logits=logits, **tensors)


if __name__ == "__main__":
    main()
