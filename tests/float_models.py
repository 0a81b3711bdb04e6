"""Models of the kinds that checkpoints are loaded into: a Linen pair, an NNX module, a Hugging Face FlaxLlama."""

import jax
import jax.numpy as jnp
import numpy as np
from equality import assert_same
from flax import linen, nnx

from any4_jax.methods import NF4
from any4_jax.models import flax_llama
from any4_jax.models.hf_flax import with_params
from any4_jax.surgery import container_of

NF = NF4(group_size=16)
X = np.random.default_rng(0).normal(size=(2, 24)).astype(np.float32)
IDS = np.arange(1, 6, dtype=np.int32)[None]
CONFIG = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
    "rope_theta": 5e5,
    "pad_token_id": 0,
}


class LinenNet(linen.Module):
    """The kernel of `first` has names for its axes."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = linen.with_partitioning(linen.initializers.lecun_normal(), ("embed", "mlp"))
        x = linen.Dense(24, kernel_init=init, name="first")(x)
        x = linen.BatchNorm(use_running_average=True, name="norm")(x)
        return linen.Dense(7, use_bias=False, name="last")(linen.relu(x))


class NNXNet(nnx.Module):
    """A layer in two places, a variable that is no parameter, and random numbers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(24, 24, rngs=rngs)
        self.rest = nnx.List([self.first, nnx.Linear(24, 7, use_bias=False, rngs=rngs)])
        self.norm = nnx.BatchNorm(24, use_running_average=True, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.norm(self.first(x))
        for layer in self.rest:
            x = layer(nnx.relu(x))
        return x


def linen_pair() -> tuple:
    net = LinenNet()
    return net, net.init(jax.random.key(0), X)


def abstract_linen() -> tuple:
    net = LinenNet()
    return net, jax.eval_shape(net.init, jax.random.key(0), X)


def abstract_nnx() -> nnx.Module:
    return nnx.eval_shape(lambda: NNXNet(nnx.Rngs(1)))


def hf_model():
    """A random FlaxLlama as load_hf_flax makes them, with a base of its rotations that transformers would ignore."""
    abstract = flax_llama.abstract_flax_llama(CONFIG, jnp.float32)
    rng = np.random.default_rng(1)
    draw = lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32)  # noqa: E731
    return with_params(abstract, jax.tree.map(draw, abstract.params))


def run(model) -> np.ndarray:
    if isinstance(model, tuple):
        return np.asarray(jax.jit(model[0].apply)(model[1], X))
    if isinstance(model, nnx.Module):
        return np.asarray(model(X))
    return np.asarray(model.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=None).sequences)


def assert_same_contents(model, other) -> None:
    """The same structure, dtypes, shapes and bits."""
    assert_same(*(container_of(m).tree(m) for m in (model, other)))


FLOAT = {"linen": linen_pair, "nnx": lambda: NNXNet(nnx.Rngs(0)), "hf": hf_model}
ABSTRACT = {
    "linen": abstract_linen,
    "nnx": abstract_nnx,
    "hf": lambda: flax_llama.abstract_flax_llama(CONFIG, jnp.float32),
}
