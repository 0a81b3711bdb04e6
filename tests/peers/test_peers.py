"""Models of Tunix and Gemma, in their own code: `make test-peers`. Skipped where these packages aren't installed."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import any4_jax as a4
from any4_jax.surgery import container_of, coverage, quantized_leaves
from any4_jax.weights import Contraction, is_operator

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples" / "peers"
NF = a4.methods.NF4(group_size=16)
SIZES = {
    "num_layers": 2, "vocab_size": 96, "embed_dim": 64, "hidden_dim": 64, "num_heads": 4, "head_dim": 16,
    "num_kv_heads": 2, "rope_theta": 10_000, "norm_eps": 1e-5,
}  # fmt: skip
TOKENS = jnp.arange(6)[None] % 50
CALL = (TOKENS, jnp.arange(6)[None], None, jnp.tril(jnp.ones((1, 6, 6), bool)))


def drawn(model):
    """The model with random numbers in place of the zeros that some of its kernels start from."""
    state, keys = nnx.state(model), iter(jax.random.split(jax.random.key(0), 1000))
    nnx.update(model, jax.tree.map(lambda a: jax.random.normal(next(keys), a.shape, a.dtype) / 8, state))
    return model


def llama3():
    llama = pytest.importorskip("tunix.models.llama3.model")
    return drawn(llama.Llama3(llama.ModelConfig(**SIZES), rngs=nnx.Rngs(0)))


def qwen3_moe():
    qwen = pytest.importorskip("tunix.models.qwen3.model")
    config = qwen.ModelConfig(**SIZES, num_experts=4, num_experts_per_tok=2, use_tied_embedding=True)
    return drawn(qwen.Qwen3(config, rngs=nnx.Rngs(0)))


def floats(model, small):
    """The float model with the dequantized kernels."""
    container = container_of(model)

    def one(leaf):
        if isinstance(leaf, Contraction):
            return leaf.layout.kernel(a4.dequantize(leaf)).astype(leaf.dtype)
        return a4.dequantize(leaf).T if is_operator(leaf) else leaf

    return container.fill(model, jax.tree.map(one, container.tree(small), is_leaf=is_operator), None)


@pytest.mark.parametrize("make,left", [(llama3, 1), (qwen3_moe, 1)])
def test_a_model_of_tunix(make, left: int, tmp_path) -> None:
    model = make()
    small = a4.quantize_model(model, NF, inputs=CALL, rules=[(r"(?!.*router).*", NF)], strict=True)
    assert len(coverage(small).left) <= left
    run = nnx.jit(lambda model: model(*CALL)[0])
    expected, got = run(floats(model, small)), run(small)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * float(jnp.abs(expected).max()))
    a4.save(tmp_path / "model", small)
    np.testing.assert_array_equal(run(a4.load(tmp_path / "model", into=model)), got)


def test_an_adapter_of_qwix_is_refused_or_kept() -> None:
    qwix = pytest.importorskip("qwix")
    provider = qwix.LoraProvider(module_path=".*(q_proj|gate_proj)", rank=2, alpha=2.0)
    model = qwix.apply_lora_to_model(llama3(), provider, *CALL, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=r"w_lora_a and w_lora_b beside its kernel"):
        a4.quantize_model(model, NF, inputs=CALL)
    small = a4.quantize_model(model, NF, inputs=CALL, rules=[(r".*(q_proj|gate_proj).*", None)])
    assert quantized_leaves(small) and not any("q_proj" in path for path in quantized_leaves(small))
    assert jnp.isfinite(small(*CALL)[0]).all()


@pytest.mark.parametrize("name,package", [("tunix_llama.py", "tunix"), ("gemma_linen.py", "gemma")])
def test_an_example_is_short_and_runs(name: str, package: str, tmp_path, monkeypatch, capsys) -> None:
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < 30
    pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    except ImportError as error:
        pytest.skip(f"{package} lacks a package here: {error}")
    assert capsys.readouterr().out.splitlines()[-1] == "loaded: True"
