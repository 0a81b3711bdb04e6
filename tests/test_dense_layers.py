"""The Dense layers of Linen models: listed by the paths of their parameters."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from linen_trees import KEY, NF4, Child, floats, normal

import any4_jax as a4
from any4_jax.nn.swapping import dense_layers, intercepted, quantized_dense


class Stack(nn.Module):
    """Layers in every place a path may come from: a scan, a remat, a child that is handed a layer, a tied head."""

    def setup(self):
        self.shared = nn.Dense(32)
        self.blocks = nn.scan(FloatBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()
        self.user = User(self.shared)
        self.again = nn.remat(Child)()
        self.embed = nn.Embed(10, 32)
        self.head = nn.Dense(10, use_bias=False)

    def __call__(self, tokens):
        x = self.again(self.user(self.blocks(self.embed(tokens))[0]))
        return self.head.apply({"params": {"kernel": self.embed.embedding.T}}, x)


class FloatBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.Dense(32, name="dense")(x), None


class User(nn.Module):
    layer: nn.Module

    def __call__(self, x):
        return self.layer(x)


STACK = {("blocks", "dense"): True, ("again", "up"): True}


def test_dense_layers_are_listed_under_the_keys_of_their_parameters():
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = Stack().init(KEY, tokens)["params"]

    def trace():
        return Stack().apply({"params": params}, tokens)

    assert dense_layers(trace) == {**STACK, ("shared",): True}
    assert dense_layers(trace) == {**STACK, ("shared",): True}, "not answered from jax's cache of traces"
    assert dense_layers(lambda: Stack().init(KEY, tokens)) == {**STACK, ("shared",): True}
    assert params["blocks"]["dense"]["kernel"].shape == (2, 32, 32)
    assert {"kernel", "bias"} == set(params["shared"]) == set(params["again"]["up"])


HF_SIZES = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 40}
HF_TOKENS = np.arange(6).reshape(1, 6)


def hugging_face(model, config, **fields):
    """A small model of transformers with seeded parameters."""
    transformers = pytest.importorskip("transformers", reason="needs the hf-flax extra")
    hf = getattr(transformers, model)(getattr(transformers, config)(**HF_SIZES, **fields), _do_init=False)
    return hf, jax.tree.map(lambda leaf: 0.1 * normal(leaf.shape), flax.core.unfreeze(hf.params_shape_tree))


def test_gpt2_keeps_kernels_untransposed_and_has_a_tied_head():
    hf, params = hugging_face("FlaxGPT2LMHeadModel", "GPT2Config", n_inner=32, n_positions=16)
    layers = {("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj")}
    listed = dense_layers(lambda: hf(HF_TOKENS, params=params))
    assert listed == {("transformer", "h", "0", *layer): False for layer in layers}

    def swap(path, leaf):
        layer = tuple(key.key for key in path[:-1])
        return a4.quantize(leaf, NF4) if path[-1].key == "kernel" and layer in listed else leaf

    quantized = jax.tree_util.tree_map_with_path(swap, params)

    def logits(params):
        return hf(HF_TOKENS, params=params).logits

    dense = jax.jit(logits)(floats(quantized, transposed=False))
    hf._module = intercepted(hf._module, quantized_dense)
    np.testing.assert_allclose(jax.jit(logits)(quantized), dense, rtol=1e-5, atol=1e-5)


def test_bert_lists_its_layers_without_the_tied_decoder():
    hf, params = hugging_face("FlaxBertForMaskedLM", "BertConfig", intermediate_size=64, max_position_embeddings=16)
    layers = [("attention", "self", name) for name in ("query", "key", "value")]
    layers += [("attention", "output", "dense"), ("intermediate", "dense"), ("output", "dense")]
    expected = {("bert", "encoder", "layer", "0", *layer): True for layer in layers}
    expected["cls", "predictions", "transform", "dense"] = True
    assert dense_layers(lambda: hf(HF_TOKENS, params=params)) == expected
