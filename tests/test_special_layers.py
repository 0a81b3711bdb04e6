"""Layers that compute something else than a quantized one would: refused by name, and left alone by a rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import any4_jax as a4
from any4_jax.methods import NF4
from any4_jax.models import Site
from any4_jax.models.fold import fold, is_foldable, scale_outputs
from any4_jax.surgery import around, quantized_leaves

NF = NF4(group_size=8)
K = 8


class Same(nnx.Linear):
    """A subclass that adds nothing, which no code can know."""


class Doubled(nnx.Embed):
    def __call__(self, tokens):
        return 2 * super().__call__(tokens)


def as_they_are(arrays, dtype=None, **_):
    return arrays


def each_as_it_is(*arrays, dtype=None):
    return arrays


def dot(*arguments, **fields):
    return jax.lax.dot_general(*arguments, **fields)


def linear(cls=nnx.Linear, **fields):
    return cls(K, K, rngs=nnx.Rngs(0), **fields)


def with_adapter(layer):
    """The layer as adapters are added from outside, whose code then runs in place of the layer's product."""
    layer.kernel_lora_a, layer.kernel_lora_b = nnx.LoRAParam(jnp.ones((K, 2))), nnx.LoRAParam(jnp.ones((2, K)))
    return layer


def scaled(layer):
    layer.scale = nnx.Param(jnp.ones(()))
    return layer


SPECIAL = {
    "a Same, a subclass of nnx.Linear": lambda: linear(Same),
    "an nnx.Linear with its own promote_dtype": lambda: linear(promote_dtype=as_they_are),
    "an nnx.Linear with its own dot_general": lambda: linear(dot_general=dot),
    "an nnx.Linear with its own preferred_element_type": lambda: linear(
        preferred_element_type=jnp.float32, dtype=jnp.bfloat16
    ),
    "a Doubled, a subclass of nnx.Embed": lambda: linear(Doubled),
    "an nnx.Embed with its own promote_dtype": lambda: linear(nnx.Embed, promote_dtype=as_they_are),
    "an nnx.Linear with kernel_lora_a and kernel_lora_b beside its kernel": lambda: with_adapter(linear()),
    "an nnx.Embed with scale beside its kernel": lambda: scaled(linear(nnx.Embed)),
    "within an nnx.WeightNorm, which rewrites it": lambda: nnx.WeightNorm(linear(), rngs=nnx.Rngs(0)),
    "within an nnx.SpectralNorm, which rewrites it": lambda: nnx.SpectralNorm(linear(), rngs=nnx.Rngs(0)),
}
PLAIN = {
    "precision": {"precision": "high"},
    "dtypes": {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16},
    "the product's dtype is the layer's": {"dtype": jnp.float32, "preferred_element_type": jnp.float32},
}


class Net(nnx.Module):
    def __init__(self, layer) -> None:
        self.layer, self.out = layer, linear()


@pytest.mark.parametrize("reason", SPECIAL)
def test_an_nnx_layer_is_refused_by_name_and_stays_where_a_rule_says_so(reason: str) -> None:
    net = Net(SPECIAL[reason]())
    named = [(r"layer.*", NF)] if "Embed" in reason else None
    with pytest.raises(ValueError, match=rf"layer\S* \({reason}\); leave each as it is with a rule such as \('layer"):
        a4.quantize_model(net, NF, rules=named)
    new = a4.quantize_model(net, NF, rules=[(r"layer.*", None)])
    assert set(quantized_leaves(new)) == {"out"} and type(new.layer) is type(net.layer)
    if "within" not in reason:
        with pytest.raises(ValueError, match=f"got {reason}, whose place"):
            around(net.layer, quantized_leaves(new)["out"])


@pytest.mark.parametrize("fields", PLAIN.values(), ids=PLAIN)
def test_settings_that_a_quantized_layer_keeps_are_no_reason(fields) -> None:
    net = Net(linear(**fields))
    new = a4.quantize_model(net, NF)
    assert set(quantized_leaves(new)) == {"layer", "out"}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, K)), jnp.float32)
    dense = linear(**fields)
    dense.kernel[...] = a4.dequantize(new.layer.weight).T.astype(dense.kernel.dtype)
    assert new.layer(x).dtype == dense(x).dtype
    np.testing.assert_allclose(*(np.asarray(each(x), np.float32) for each in (new.layer, dense)), atol=0.05)


def test_many_are_counted() -> None:
    net = nnx.List([linear(Same) for _ in range(5)])
    with pytest.raises(ValueError, match=r"2 \(a Same, a subclass of nnx.Linear\) and 2 more; leave"):
        a4.quantize_model(nnx.Sequential(*net), NF)


class Twice(linen.Dense):
    @linen.compact
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


LINEN = {
    "a Twice, a subclass of nn.Dense": Twice(K),
    "an nn.Dense with its own dot_general or promote_dtype": linen.Dense(K, dot_general=dot),
    "an nn.DenseGeneral with its own dot_general or promote_dtype": linen.DenseGeneral(K, promote_dtype=each_as_it_is),
    "within an nn.WeightNorm, which rewrites its kernel": linen.WeightNorm(linen.Dense(K)),
    "within an nn.SpectralNorm, which rewrites its kernel": linen.SpectralNorm(linen.Dense(K)),
}


@pytest.mark.parametrize("given", [True, False], ids=["given", "setup"])
@pytest.mark.parametrize("reason", LINEN)
def test_a_linen_layer_is_refused_by_name_before_it_runs(reason: str, given: bool) -> None:
    layer, x = LINEN[reason], jnp.ones((2, K))
    fields = {"update_stats": False} if "Spectral" in reason else {}

    class Given(linen.Module):
        layer: linen.Module

        @linen.compact
        def __call__(self, x):
            return linen.Dense(4, name="out")(self.layer(x, **fields))

    class Setup(linen.Module):
        def setup(self):
            self.layer, self.out = layer.copy(), linen.Dense(4)

        def __call__(self, x):
            return self.out(self.layer(x, **fields))

    net = Given(layer) if given else Setup()
    variables = net.init(jax.random.key(0), x)
    ways = [(x,), None] if "within" in reason else [(x,)]  # without inputs, the kernels' own names say nothing
    for inputs in ways:
        with pytest.raises(ValueError, match=rf" \({reason}\); leave each as it is"):
            a4.quantize_model((net, variables), NF, inputs=inputs)
        module, new = a4.quantize_model((net, variables), NF, inputs=inputs, rules=[("(?!out).*", None)])
        assert set(quantized_leaves((module, new))) == {"out"}
        assert module.apply(new, x).shape == (2, 4)


@pytest.mark.parametrize("special", [linear(Same), linear(dot_general=dot)], ids=["subclass", "dot_general"])
def test_fold_takes_plain_layers_only(special: nnx.Linear) -> None:
    class Pair(nnx.Module):
        def __init__(self, first, second) -> None:
            self.first, self.second = first, second

    site = Site("in", ("second",), "first")
    pair, factor = Pair(special, linear()), np.full(K, 2.0, np.float32)
    assert is_foldable(Pair(linear(), linear()), site) and not is_foldable(pair, site)
    new, leftover = fold(pair, site, factor)
    assert new is pair and leftover is not None
    with pytest.raises(TypeError, match="which has no scale_outputs"):
        scale_outputs(special, lambda array: array)
    with pytest.raises(ValueError, match="second is an? .*, and fold divides the kernel of a plain nnx.Linear"):
        fold(Pair(linear(), special), site, factor)


class Norm(nnx.LayerNorm):
    """Registered classes have no say over those that derive from them."""


def test_a_norm_of_a_subclass_holds_no_factor() -> None:
    with pytest.raises(TypeError, match="got layer Norm, which has no scale_outputs"):
        scale_outputs(Norm(K, rngs=nnx.Rngs(0)), lambda array: array)


def test_quantizing_twice_is_said() -> None:
    once = a4.quantize_model(Net(linear()), NF)
    with pytest.raises(ValueError, match="2 layers are quantized already .*, and the rules leave the other 0 alone"):
        a4.quantize_model(once, NF)
    with pytest.raises(ValueError, match="'out' matches only linears that are quantized already"):
        a4.quantize_model(once, NF, rules=[("out", NF)])
