"""GGUF llama files against the same weights under Hugging Face names."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest

from any4_jax import models
from any4_jax.data import bundled
from any4_jax.models import hf
from any4_jax.models.config import LlamaConfig, RopeScaling
from any4_jax.models.gguf_config import scaling_of_factors
from any4_jax.models.gguf_reader import read_gguf
from any4_jax.models.llama_family import LLAMA
from any4_jax.models.rope import Rope
from any4_jax.models.tiny import random_tensors
from any4_jax.models.tokenizer import VOCABULARY, Tokenizer

# Sizes are multiples of 32, the block of the quantized types.
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    tie_word_embeddings=True,
)
NAMES = [
    f"blk.{i}.{part}.{leaf}"
    for i in range(2)
    for leaf in ("weight", "bias")
    for part in (
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_output",
        "ffn_gate",
        "ffn_up",
        "ffn_down",
        "attn_norm",
        "ffn_norm",
    )
]
STORED = {
    LLAMA.gguf.hf_name(name): name for name in [*NAMES, "token_embd.weight", "output_norm.weight", "output.weight"]
}
KINDS = gguf.GGMLQuantizationType


def interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in the order of GGUF: channels i and i + D/2 of a head become neighbours."""
    size = array.shape[0] // heads
    order = [
        head * size + pair + half * size // 2 for head in range(heads) for pair in range(size // 2) for half in (0, 1)
    ]
    return array[order]


def write(path: Path, tensors: dict[str, np.ndarray], kind: Any = KINDS.F32, **metadata: Any) -> dict[str, np.ndarray]:
    """A GGUF file of Hugging Face tensors, matrices of one type; returns what they are after rounding.

    parts_of: how many tensors each part holds at most; 0 writes one file.
    """
    architecture = metadata.pop("architecture", "llama")
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=metadata.pop("parts_of", 0))
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_dimension_count(CONFIG.head_dim)
    writer.add_vocab_size(CONFIG.vocab_size)
    for key, value in metadata.items():
        name = key.replace("__", ".")
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            add = {
                str: writer.add_string,
                float: writer.add_float32,
                bool: writer.add_bool,
                int: writer.add_uint32,
            }
            add[type(value)](name, value)
    rounded = {}
    for name, array in tensors.items():
        stored = STORED.get(name, name)
        heads = {"attn_q": 4, "attn_k": 2}.get(stored.split(".")[-2])
        used = kind if array.ndim == 2 else KINDS.F32
        data = gguf.quants.quantize(array, used)
        rounded[name] = gguf.quants.dequantize(data, used)
        data = data if heads is None else interleave(data, heads)
        writer.add_tensor(stored, data, raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return rounded


@pytest.mark.parametrize(
    "kind, dtype",
    [
        (KINDS.F32, np.float32),
        (KINDS.F16, np.float16),
        (KINDS.BF16, ml_dtypes.bfloat16),
        (KINDS.Q8_0, np.float32),
        (KINDS.Q4_0, np.float32),
        (KINDS.Q4_1, np.float32),
        (KINDS.Q5_0, np.float32),
        (KINDS.Q5_1, np.float32),
    ],
)
def test_gguf_equals_the_same_weights_from_hugging_face(tmp_path: Path, kind: Any, dtype: type) -> None:
    rounded = write(tmp_path / "m.gguf", random_tensors(CONFIG), kind)
    config, tensors, tokenizer = read_gguf(tmp_path / "m.gguf")
    assert (config, tokenizer) == (CONFIG, None)
    assert tensors.keys() == rounded.keys()
    assert all(tensors[name].dtype == dtype for name in tensors if tensors[name].ndim == 2)
    model = models.load(tmp_path / "m.gguf")
    back = hf.tensors_of(model)
    assert model.dtype == dtype
    assert all(np.array_equal(back[name], rounded[name].astype(dtype)) for name in rounded)


def test_untied_head_and_biases(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, tie_word_embeddings=False, attention_bias=True, mlp_bias=True)
    expected = random_tensors(config)
    write(tmp_path / "m.gguf", expected)
    got, tensors, _ = read_gguf(tmp_path / "m.gguf")
    assert got == config
    assert all(np.array_equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "metadata, words",
    [
        ({"architecture": "phi2"}, "architecture 'phi2'"),
        ({"llama__expert_count": 8}, "lacks llama.expert_used_count"),
        ({"llama__rope__scaling__type": "longrope"}, "'longrope'"),
        ({"llama__rope__scaling__type": "yarn"}, "lacks llama.rope.scaling.factor"),
        ({"llama__attention__key_length": 16}, "rope.dimension_count"),
        ({"tokenizer__ggml__model": "bert"}, "'bert'"),
        ({"tokenizer__ggml__model": "gpt2", "tokenizer__ggml__tokens": ["a"]}, "pre None has unknown rules"),
        ({"tokenizer__ggml__model": "llama"}, "lacks tokenizer.ggml.tokens"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, metadata: dict, words: str) -> None:
    write(tmp_path / "m.gguf", random_tensors(CONFIG), **metadata)
    with pytest.raises(ValueError, match=words):
        read_gguf(tmp_path / "m.gguf")


def test_damage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, random_tensors(CONFIG))
    whole = path.read_bytes()
    for cut, words in (
        (len(whole) - 40, "truncated"),
        (300, "truncated in its header"),
        (2, "doesn't begin"),
    ):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=words):
            models.load(path)


def test_a_split_model_is_that_of_the_whole_file(tmp_path: Path) -> None:
    expected = write(tmp_path / "whole.gguf", random_tensors(CONFIG))
    write(tmp_path / "m.gguf", random_tensors(CONFIG), parts_of=7)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 3
    for part in parts:
        model = models.load(part)
        back = hf.tensors_of(model)
        assert model.config == CONFIG
        assert all(np.array_equal(back[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "scaling, theta, size",
    [
        (
            RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
            5e5,
            128,
        ),
        (
            RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
            5e5,
            64,
        ),
    ],
)
def test_rope_factors_give_back_the_scaling(scaling: RopeScaling, theta: float, size: int) -> None:
    plain = Rope(size, theta)
    factors = (plain.frequencies() / Rope(size, theta, scaling).frequencies()).astype(np.float32)
    assert scaling_of_factors(factors, plain) == scaling
    assert scaling_of_factors(np.ones_like(factors), plain) is None
    odd = factors.copy()
    odd[3] = 1.5
    assert scaling_of_factors(odd, plain) is None


@pytest.mark.parametrize("factor, refused", [(1.0, False), (2.0, True)])
def test_stored_rope_factors(tmp_path: Path, factor: float, refused: bool) -> None:
    tensors = {**random_tensors(CONFIG), "rope_freqs.weight": np.full(4, factor, np.float32)}
    write(tmp_path / "m.gguf", tensors)
    if refused:
        with pytest.raises(ValueError, match="rope_freqs.weight .* holds factors that Llama 3.1's rule doesn't give"):
            models.load(tmp_path / "m.gguf")
    else:
        assert models.load(tmp_path / "m.gguf").config == CONFIG


def vocabulary() -> tuple[Tokenizer, list[str], list[list[str]]]:
    """The bundled tokenizer, its tokens in order of id, and its merges."""
    with bundled("stories260k") as folder:
        tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    model = json.loads(tokenizer.files[VOCABULARY])["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return tokenizer, sorted(model["vocab"], key=model["vocab"].get), merges


def test_sentencepiece_tokens_and_scores_give_the_ids_of_tokenizer_json(tmp_path: Path) -> None:
    expected, tokens, merges = vocabulary()
    scores = dict.fromkeys(tokens, -1e6)
    for rank, (left, right) in enumerate(merges):
        scores[left + right] = max(scores[left + right], -float(rank))
    kinds = [3 if index < 3 else 1 for index in range(len(tokens))]
    write(
        tmp_path / "m.gguf",
        random_tensors(CONFIG),
        tokenizer__ggml__model="llama",
        tokenizer__ggml__tokens=tokens,
        tokenizer__ggml__scores=[scores[token] for token in tokens],
        tokenizer__ggml__token_type=kinds,
        tokenizer__ggml__bos_token_id=1,
        tokenizer__ggml__eos_token_id=2,
        tokenizer__ggml__unknown_token_id=0,
    )
    config, _, tokenizer = read_gguf(tmp_path / "m.gguf")
    assert tokenizer is not None
    assert (config.bos_token_id, config.eos_token_ids, tokenizer.eos_ids) == (1, (2,), (2,))
    for text in (
        "Once upon a time, there was a little girl named Lily.\nShe said: caf\u00e9!",
        "<s> a",
        "  two",
    ):
        ids = tokenizer.encode(text)
        assert ids == expected.encode(text)
        assert tokenizer.decode(ids) == expected.decode(ids)


@pytest.mark.parametrize(
    "pre, expected",
    [
        ("gpt-2", ["ab", " ", " ab", " 1234", "!"]),
        ("smollm", ["ab", " ", " ab", " ", "1", "2", "3", "4", "!"]),
        ("llama-bpe", ["ab", " ", " ab", " ", "123", "4", "!"]),
        ("default", ["ab", " ", " ab", " ", "123", "4", "!"]),
    ],
)
def test_byte_level_cuts(tmp_path: Path, pre: str, expected: list[str]) -> None:
    """Merges join everything that the cut leaves together, so tokens show where the text was cut."""
    merges = ["a b", "\u0120 ab", "1 2", "12 3", "123 4", "\u0120 1234", "\u0120 1", "4 !", "\u0120 \u0120"]
    tokens = [*"ab1234!\u0120", *(merge.replace(" ", "") for merge in merges), "<s>"]
    write(
        tmp_path / "m.gguf",
        random_tensors(CONFIG),
        tokenizer__ggml__model="gpt2",
        tokenizer__ggml__pre=pre,
        tokenizer__ggml__tokens=tokens,
        tokenizer__ggml__merges=merges,
        tokenizer__ggml__token_type=[1] * (len(tokens) - 1) + [3],
        tokenizer__ggml__bos_token_id=len(tokens) - 1,
    )
    _, _, tokenizer = read_gguf(tmp_path / "m.gguf")
    assert tokenizer is not None
    ids = tokenizer.encode("ab  ab 1234!")
    if pre == "llama-bpe":
        assert ids.pop(0) == tokenizer.bos_id
    assert [tokens[i].replace("\u0120", " ") for i in ids] == expected
    assert tokenizer.decode(ids) == "ab  ab 1234!"
