"""Teach a 4-bit model a new kind of text: low-rank updates (LoRA, arXiv:2106.09685) over frozen NF4 weights, as in
QLoRA (arXiv:2305.14314).

Run: python examples/lora.py [MODEL]

MODEL is a Hugging Face folder, a hub id or a GGUF file. By default, the bundled model, which knows only stories for
small children, learns to read essays.
"""

import sys

import jax
import numpy as np
import optax
from flax import nnx

import any4_jax as a4

RANK, LENGTH, HELD_OUT = 8, 128, 5 * 256
name, steps, batch_size = (sys.argv[1], 12, 2) if len(sys.argv) > 1 else ("tiny", 60, 8)

model = a4.models.load(name)
tokens = np.asarray(model.tokenizer.encode(a4.data.essays()), np.int32)
train, test = tokens[:-HELD_OUT], tokens[-HELD_OUT:]

small = a4.quantize_model(model, a4.methods.NF4(group_size=32))
tuned = a4.add_lora(small, RANK)
optimizer = nnx.Optimizer(tuned, optax.adam(1e-3), wrt=nnx.LoRAParam)


def loss(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(model(batch)[:, :-1], batch[:, 1:]).mean()


@nnx.jit
def step(model, optimizer, batch):
    value, slope = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, batch)
    optimizer.update(model, slope)
    return value


rng = np.random.default_rng(0)
for i in range(steps):
    starts = rng.integers(0, len(train) - LENGTH, batch_size)
    value = step(tuned, optimizer, np.stack([train[s : s + LENGTH] for s in starts]))
    if i % (steps // 6) == 0 or i == steps - 1:
        print(f"step {i:2}  {float(value):.3f} nats per token")

for path, before in a4.surgery.quantized_leaves(small).items():
    after = a4.surgery.quantized_leaves(tuned)[path].terms[0]
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
added = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(tuned, nnx.LoRAParam)))
print(f"trained {added:,} numbers; not one bit of the 4-bit weights changed")
for name, net in (("float", model), ("nf4", small), ("nf4 + lora", tuned)):
    nll = a4.evaluation.perplexity(net, test, seqlen=256).nll
    print(f"{name:10}  {nll:.3f} nats per token on text it was not trained on")
