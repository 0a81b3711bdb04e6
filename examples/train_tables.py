"""Train all of a low-bit weight except its codes, that is tables, scales and offsets, to match the float model.

Run: python examples/train_tables.py [MODEL]

MODEL is a Hugging Face folder, a hub id or a GGUF file; by default, the bundled model. The text serves only as input to
both models: the loss is the divergence of the 4-bit model's next-token distribution from the float model's.
"""

import sys

import jax
import numpy as np
import optax
from flax import nnx

import any4_jax as a4
from any4_jax.nn.nnx import Tables

LENGTH, HELD_OUT = 128, 5 * 256
name, steps, batch_size = (sys.argv[1], 12, 2) if len(sys.argv) > 1 else ("tiny", 40, 8)

model = a4.models.load(name)
tokens = np.asarray(model.tokenizer.encode(a4.data.essays()), np.int32)
train, test = tokens[:-HELD_OUT], tokens[-HELD_OUT:]

# In bfloat16, the default, most of the optimizer's steps would round to nothing.
method = a4.methods.NF4(group_size=32, table_dtype="float32", scale_dtype="float32")
small = a4.quantize_model(model, method)
tuned = nnx.clone(small)
optimizer = nnx.Optimizer(tuned, optax.adam(1e-3), wrt=Tables)


def loss(small, batch, target):
    return optax.losses.kl_divergence_with_log_targets(jax.nn.log_softmax(small(batch)), target).mean()


@nnx.jit
def step(small, optimizer, model, batch):
    target = jax.nn.log_softmax(model(batch))
    value, slope = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, Tables))(small, batch, target)
    optimizer.update(small, slope)
    return value


rng = np.random.default_rng(0)
for i in range(steps):
    starts = rng.integers(0, len(train) - LENGTH, batch_size)
    value = step(tuned, optimizer, model, np.stack([train[s : s + LENGTH] for s in starts]))
    if i % (steps // 4) == 0 or i == steps - 1:
        print(f"step {i:2}  {float(value):.3f} nats per token from the float model")

for name, net in (("float", model), ("nf4", small), ("nf4, tables trained", tuned)):
    nll = a4.evaluation.perplexity(net, test, seqlen=256).nll
    print(f"{name:20}  {nll:.3f} nats per token on text it was not trained on")
