"""Models of Tunix, Gemma and MaxText, in their own code: `make test-peers`. Skipped where a package is missing."""

import enum
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
    "num_layers": 2, "vocab_size": 96, "embed_dim": 64, "hidden_dim": 64, "num_heads": 4, "head_dim": 32,
    "num_kv_heads": 2, "rope_theta": 10_000, "norm_eps": 1e-5,
}  # fmt: skip
TOKENS = jnp.arange(6)[None] % 50
CALL = (TOKENS, jnp.arange(6)[None], None, jnp.tril(jnp.ones((1, 6, 6), bool)))


def drawn(model):
    """The model with random numbers in place of the zeros that some of its kernels start from."""
    state, keys = nnx.state(model), iter(jax.random.split(jax.random.key(0), 1000))
    nnx.update(model, jax.tree.map(lambda a: jax.random.normal(next(keys), a.shape, a.dtype) / 8, state))
    return model


def of_tunix(family: str, **more):
    """A tiny model of Tunix: its module, its class and more of its configuration, by family."""
    name, cls = {"llama3": ("llama3", "Llama3"), "qwen2": ("qwen2", "Qwen2")}.get(family, ("qwen3", "Qwen3"))
    module = pytest.importorskip(f"tunix.models.{name}.model")
    return drawn(getattr(module, cls)(module.ModelConfig(**SIZES, **more), rngs=nnx.Rngs(0)))


def gemma3(**more):
    module = pytest.importorskip("tunix.models.gemma3.model")
    sizes = {name: size for name, size in SIZES.items() if name not in ("vocab_size", "rope_theta", "norm_eps")}
    config = module.ModelConfig(
        **sizes | more, num_embed=SIZES["vocab_size"], param_dtype=jnp.float32, sliding_window_size=4
    )
    return drawn(module.Gemma3(config, rngs=nnx.Rngs(0)))


TUNIX = {
    "llama3": lambda: of_tunix("llama3"),
    "qwen2": lambda: of_tunix("qwen2"),
    "qwen3": lambda: of_tunix("qwen3"),
    "qwen3_moe": lambda: of_tunix("qwen3", num_experts=4, num_experts_per_tok=2, use_tied_embedding=True),
    "gemma3": gemma3,
    "gemma3_without_groups": lambda: gemma3(num_kv_heads=4),
}


class Numbers:
    """A tokenizer of texts that are token ids, with what Tunix and Gemma ask of one."""

    VERSION = 0
    FORBIDDEN_TOKENS = ()
    special_tokens = enum.IntEnum("SpecialTokens", {"PAD": 0, "BOS": 1, "EOS": 2, "END_OF_TURN": 3})

    def encode(self, text: str, **_) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids, **_) -> str:
        return " ".join(str(int(token)) for token in ids)

    def bos_id(self) -> int:
        return 1

    def eos_id(self) -> int:
        return 2

    def pad_id(self) -> int:
        return 0


def sampled(model):
    """What Tunix's Sampler makes of two prompts: the tokens and the logarithms of their probabilities."""
    sampler = pytest.importorskip("tunix.generate.sampler")
    config = model.config
    cache = sampler.CacheConfig(32, config.num_layers, config.num_kv_heads, config.head_dim)
    made = sampler.Sampler(model, Numbers(), cache)(["5 6 7 8", "9 10"], max_generation_steps=6, return_logprobs=True)
    return np.asarray(made.tokens), np.asarray(made.logprobs)


def floats(model, small):
    """The float model with the dequantized kernels."""
    container = container_of(model)

    def one(leaf):
        if isinstance(leaf, Contraction):
            return leaf.layout.kernel(a4.dequantize(leaf)).astype(leaf.dtype)
        return a4.dequantize(leaf).T if is_operator(leaf) else leaf

    return container.fill(model, jax.tree.map(one, container.tree(small), is_leaf=is_operator), None)


@pytest.mark.parametrize("family", TUNIX)
def test_a_model_of_tunix(family: str, tmp_path) -> None:
    model = TUNIX[family]()
    small = a4.quantize_model(model, NF, inputs=CALL, rules=[(r"(?!.*router).*", NF)], strict=True)
    assert not coverage(small).left
    run = nnx.jit(lambda model: model(*CALL)[0])
    expected, got = run(floats(model, small)), run(small)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * float(jnp.abs(expected).max()))
    a4.save(tmp_path / "model", small)
    np.testing.assert_array_equal(run(a4.load(tmp_path / "model", into=model)), got)


@pytest.mark.parametrize("family", TUNIX)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_sampler_of_tunix_gives_the_tokens_of_the_dequantized_model(family: str) -> None:
    model = TUNIX[family]()
    small = a4.quantize_model(model, NF, inputs=CALL, rules=[(r"(?!.*(router|embed)).*", NF)], strict=True)
    assert all(left.embedding for left in coverage(small).left.values())
    (expected, before), (got, after) = sampled(floats(model, small)), sampled(small)
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_allclose(after, before, atol=1e-5)


def gemma():
    """The package gemma.gm, whose parts are imported where they are first used."""
    pytest.importorskip("gemma")
    try:
        from gemma import gm

        _ = gm.nn.Transformer, gm.text.Sampler
    except ImportError as error:
        pytest.skip(f"gemma lacks a package here: {error}")
    return gm


def gemma_linen(**more):
    """A tiny Gemma 3 of gemma, with its variables: a Linen module whose kernels are those of einsums."""
    gm = gemma()
    kinds = (gm.nn.config.AttentionType.LOCAL_SLIDING, gm.nn.config.AttentionType.GLOBAL)
    sizes = {name: SIZES[name] for name in ("embed_dim", "hidden_dim", "num_heads", "head_dim", "num_kv_heads")}
    config = gm.nn.config.TransformerConfig(
        **sizes | more, num_embed=SIZES["vocab_size"], final_logit_softcap=None, use_post_attn_norm=True,
        use_post_ffw_norm=True, use_qk_norm=True, attention_types=kinds, sliding_window_size=4,
    )  # fmt: skip
    model = gm.nn.Transformer(config=config, dtype=jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(1), TOKENS)
    keys = iter(jax.random.split(jax.random.key(0), 1000))
    return model, jax.tree.map(lambda a: jax.random.normal(next(keys), a.shape, a.dtype) / 8, variables)


@pytest.mark.parametrize("heads", [2, 4])
def test_a_gemma_in_linen(heads: int, tmp_path) -> None:
    model = gemma_linen(num_kv_heads=heads)
    module, small = a4.quantize_model(model, NF, inputs=TOKENS, rules=[(r"(?!.*embed).*", NF)], strict=True)
    assert all(left.embedding for left in coverage((module, small)).left.values())
    run = jax.jit(lambda module, variables: module.apply(variables, TOKENS).logits, static_argnums=0)
    floating = floats(model, (module, small))[1]
    expected, got = run(model[0], floating), run(module, small)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * float(jnp.abs(expected).max()))
    a4.save(tmp_path / "model", (module, small))
    np.testing.assert_array_equal(run(*a4.load(tmp_path / "model", into=model)), got)


def test_the_sampler_of_gemma_gives_the_tokens_of_the_dequantized_model() -> None:
    model = gemma_linen()
    gm = gemma()
    module, small = a4.quantize_model(model, NF, inputs=TOKENS, rules=[(r"(?!.*embed).*", NF)])

    def tokens(module, variables):
        sampler = gm.text.Sampler(
            model=module,
            params=variables["params"],
            tokenizer=Numbers(),
            cache_length=32,
            max_out_length=6,
            pad_length=8,
        )
        return sampler.sample("5 6 7 8", max_new_tokens=6)

    assert tokens(module, small) == tokens(model[0], floats(model, (module, small))[1])


def maxtext_llama(scanned: bool):
    """A tiny Llama of MaxText, whose layers are one stack along axis 1 if they are scanned."""
    models = pytest.importorskip("maxtext.models.models", exc_type=ImportError)
    from maxtext.configs import pyconfig
    from maxtext.utils import maxtext_utils

    base = Path(pyconfig.__file__).parent / "base.yml"
    config = pyconfig.initialize(
        ["", str(base)], run_name="tiny", base_output_directory="", enable_checkpointing=False, model_name="default",
        decoder_block="llama2", base_emb_dim=64, base_num_query_heads=4, base_num_kv_heads=2, base_mlp_dim=64,
        base_num_decoder_layers=2, head_dim=32, vocab_size=96, max_target_length=6, max_prefill_predict_length=4,
        per_device_batch_size=1.0, dtype="float32", weight_dtype="float32", scan_layers=scanned,
        attention="dot_product", matmul_precision="highest", skip_jax_distributed_system=True, hardware="cpu",
    )  # fmt: skip
    mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    return models.Transformer(config, mesh, None, rngs=nnx.Rngs(params=0, dropout=1))


@pytest.mark.parametrize("scanned", [False, True])
def test_a_llama_of_maxtext(scanned: bool, tmp_path) -> None:
    model = maxtext_llama(scanned)
    named = {"decoder_input_tokens": TOKENS, "decoder_positions": CALL[1], "enable_dropout": False}
    small = a4.quantize_model(model, NF, inputs=named, rules=[(r"(?!.*embed).*", NF)], strict=True)
    assert all(left.embedding for left in coverage(small).left.values())
    run = nnx.jit(lambda model: model(**named))
    expected, got = run(floats(model, small)), run(small)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * float(jnp.abs(expected).max()))
    np.testing.assert_array_equal(run(small), got)
    a4.save(tmp_path / "model", small)
    np.testing.assert_array_equal(run(a4.load(tmp_path / "model", into=model)), got)


def test_an_adapter_of_qwix_is_refused_or_kept() -> None:
    qwix = pytest.importorskip("qwix")
    provider = qwix.LoraProvider(module_path=".*(q_proj|gate_proj)", rank=2, alpha=2.0)
    model = qwix.apply_lora_to_model(TUNIX["llama3"](), provider, *CALL, rngs=nnx.Rngs(1))
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
