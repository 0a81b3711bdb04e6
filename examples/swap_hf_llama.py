"""Hugging Face's FlaxLlama in 4 bits: one call, and generate() works as before.

pip install ".[hf-flax]"
python examples/swap_hf_llama.py                # the bundled model of 260,000 parameters
python examples/swap_hf_llama.py path/to/llama  # a Hugging Face folder, a hub id or a GGUF file
"""

import sys

import jax
import jax.numpy as jnp

import any4_jax as a4

source = sys.argv[1] if len(sys.argv) > 1 else "tiny"
method = a4.methods.Any4(group_size=32)
PROMPT = "Once upon a time, there was a little"


def size(tree) -> int:
    """The bytes of a tree's arrays; codes and tables count as they are stored."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def continued(model) -> str:
    """The prompt continued by 32 tokens, the likeliest each time."""
    prompt = jnp.asarray([model.tokenizer.encode(PROMPT)])
    end = model.generation_config.eos_token_id
    end = end[0] if isinstance(end, list) else end  # transformers' Flax generate() stops only at a single token
    made = model.generate(prompt, max_new_tokens=32, do_sample=False, eos_token_id=end, pad_token_id=end)
    return model.tokenizer.decode(made.sequences[0].tolist())


hf = a4.models.load_hf_flax(source)  # or any Flax model of transformers that you have
small = a4.quantize_model(hf, method)  # the head and the embedding stay as they are

print(a4.explain(small))
print()
for name, model in (("float", hf), (method.name, small)):
    print(f"{name:<6}{size(model.params) / 1e6:8.2f} MB  {continued(model)}")
