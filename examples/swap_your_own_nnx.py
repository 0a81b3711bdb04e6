"""Your own Flax NNX model in 4 bits: train it, quantize it with one call, then train the tables as well.

Run: python examples/swap_your_own_nnx.py (needs optax; less than a minute on two cores)
"""

import jax
import numpy as np
import optax
from flax import nnx

import any4_jax as a4
from any4_jax.nn.nnx import Tables

CONTEXT, WIDTH = 16, 256  # characters read, features


class NextCharacter(nnx.Module):
    def __init__(self, vocabulary: int, *, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(vocabulary, WIDTH // CONTEXT, rngs=rngs)
        self.hidden = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(2)])
        self.out = nnx.Linear(WIDTH, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens).reshape(-1, WIDTH)
        for layer in self.hidden:
            x = x + nnx.gelu(layer(x))
        return self.out(x)


@nnx.jit
def loss_of(model: nnx.Module, windows: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(windows[:, :-1]), windows[:, -1]).mean()


@nnx.jit
def step(model: nnx.Module, optimizer: nnx.Optimizer, batch: jax.Array) -> None:
    optimizer.update(model, nnx.grad(loss_of, argnums=nnx.DiffState(0, optimizer.wrt))(model, batch))


def train(model: nnx.Module, optimizer: nnx.Optimizer, steps: int) -> None:
    for rows in np.random.default_rng(0).integers(len(windows), size=(steps, 256)):
        step(model, optimizer, windows[rows])


def show(name: str, model: nnx.Module) -> None:
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    print(f"{name:20} {size / 1e3:6.1f} kB   {loss_of(model, windows):.4f} nats per character")


letters, tokens = np.unique(list(a4.data.stories()), return_inverse=True)
windows = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.int32), CONTEXT + 1)
model = NextCharacter(len(letters), rngs=nnx.Rngs(0))
train(model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param), 300)
show("float32", model)
# Float32 tables, because bfloat16 would round small steps away; adafactor's steps are proportional to the values.
small = a4.quantize_model(model, a4.methods.Any4(group_size=32, table_dtype="float32", scale_dtype="float32"))
show("any4", small)
train(small, nnx.Optimizer(small, optax.adafactor(1e-3), wrt=Tables), 50)
show("any4, tables trained", small)
