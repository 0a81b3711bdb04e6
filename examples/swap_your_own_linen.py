"""Your own Flax Linen model in 4 bits: train it, then quantize its Dense layers with one call.

Run: python examples/swap_your_own_linen.py

The model predicts the next character of some essays from the eight before it. Its code doesn't mention any4.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import any4_jax as a4

CONTEXT, BATCH, STEPS = 8, 256, 300


class NextCharacter(nn.Module):
    vocabulary: int

    @nn.compact
    def __call__(self, characters):
        x = nn.Embed(self.vocabulary, 32)(characters).reshape(*characters.shape[:-1], -1)
        x = nn.gelu(nn.Dense(256, name="read")(x))
        x = x + nn.gelu(nn.Dense(256, name="think")(x))
        return nn.Dense(self.vocabulary, name="lm_head")(x)


text = a4.data.essays()
alphabet, codes = np.unique(list(text), return_inverse=True)
windows = np.lib.stride_tricks.sliding_window_view(codes, CONTEXT + 1)
train, test = windows[: -len(windows) // 10], windows[-len(windows) // 10 :]

module, optimizer = NextCharacter(len(alphabet)), optax.adam(3e-3)
params = module.init(jax.random.key(0), train[:1, :-1])


def loss(apply, params, batch):
    logits = apply(params, batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, -1]).mean()


@jax.jit
def step(params, state, batch):
    updates, state = optimizer.update(jax.grad(loss, argnums=1)(module.apply, params, batch), state)
    return optax.apply_updates(params, updates), state


state, rng = optimizer.init(params), np.random.default_rng(0)
for _ in range(STEPS):
    params, state = step(params, state, jnp.asarray(rng.choice(train, BATCH)))

small, small_params = a4.quantize_model((module, params), a4.methods.Any4(group_size=32))

for name, net, tree in (("float", module, params), ("any4", small, small_params)):
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    nats = loss(jax.jit(net.apply), tree, test)
    print(f"{name:6} {size:8,} bytes  {nats:.4f} nats per character it was not trained on")
