"""The right inputs that the cases are made from: folders of every kind, written once for all processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from family_goldens import GOLDEN, VARIANTS, golden
from safetensors.numpy import save_file

import any4_jax as a4
from any4_jax.models import from_tensors, read_config
from any4_jax.models.tiny import random_tensors
from any4_jax.weights import LowRank, PermuteInput, QuantizeInput, ScaleInput, Sum, nonzeros
from fuzz.containers import quantized

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": [2],
}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] | trim }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_TOKEN = {"content": "<s>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
JSONS: dict[str, Any] = {
    "config.json": LLAMA,
    "generation_config.json": {"bos_token_id": 1, "eos_token_id": [2, 3], "temperature": 0.6},
    "tokenizer_config.json": {
        "tokenizer_class": "LlamaTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": _TOKEN,
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
        "additional_special_tokens": ["<|im_end|>"],
        "extra_special_tokens": {"image_token": "<image>"},
        "added_tokens_decoder": {"512": _TOKEN | {"content": "<|im_end|>", "special": True}},
        "chat_template": [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "x"}],
        "model_max_length": 1e30,
    },
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": _TOKEN | {"content": "</s>"}, "unk_token": "<unk>"},
    "added_tokens.json": {"<|im_end|>": 512, "<image>": 513},
    "chat_template.json": {"chat_template": TEMPLATE},
}
GPT2 = {
    "vocab.json": {"<s>": 0, "</s>": 1, "t": 2, "h": 3, "e": 4, "th": 5, "the": 6, "\u0120": 7, "\u0120the": 8},
    "tokenizer_config.json": {
        "tokenizer_class": "GPT2Tokenizer",
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "</s>",
    },
}


_ADDED = {**_TOKEN, "id": 1, "content": "</s>", "special": True}
UNIGRAM: dict[str, Any] = {
    "version": "1.0",
    "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    },
    "added_tokens": [_ADDED],
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "NFKC"},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
            {"type": "Strip", "strip_left": True, "strip_right": True},
            {"type": "Prepend", "prepend": "\u2581"},
        ],
    },
    "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
    },
    "decoder": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
    "model": {
        "type": "Unigram",
        "unk_id": 0,
        "byte_fallback": False,
        "vocab": [["<unk>", 0.0], ["</s>", 0.0], ["\u2581the", -1.5], ["\u2581", -2.0], ["h", -3.0], ["at", -3.5]],
    },
}
WORD_PIECES: dict[str, Any] = UNIGRAM | {
    "truncation": None,
    "padding": None,
    "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True},
    "pre_tokenizer": {"type": "BertPreTokenizer"},
    "post_processor": {"type": "BertProcessing", "sep": ["</s>", 1], "cls": ["[UNK]", 0]},
    "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    "model": {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {"[UNK]": 0, "</s>": 1, "the": 2, "h": 3, "##at": 4},
    },
}


def write_all(folder: Path) -> None:
    """Writes configs/, folders/, ggufs/ and checkpoints/."""
    for variant in VARIANTS:
        _write_variant(folder / "configs" / variant, variant)
    _write_folders(folder / "folders")
    (folder / "ggufs").mkdir()
    for path in GOLDEN.glob("gguf_*.gguf"):
        shutil.copy(path, folder / "ggufs")
    (folder / "ggufs" / "quantized.gguf").write_bytes(quantized((GOLDEN / "gguf_llama.gguf").read_bytes()))
    _write_checkpoints(folder / "checkpoints")


def _write_variant(folder: Path, variant: str) -> None:
    wanted = golden(variant)
    for version, config in zip((4, 5), wanted.configs, strict=True):
        inner = folder / f"transformers{version}"
        inner.mkdir(parents=True)
        (inner / "config.json").write_text(json.dumps(config))
        save_file(wanted.tensors, inner / "model.safetensors")


def _write_folders(folder: Path) -> None:
    tensors = random_tensors(read_config(LLAMA))
    shards = {f"model-0000{i + 1}-of-00002.safetensors": sorted(tensors)[i::2] for i in range(2)}
    index = {"metadata": {"total_size": 1}, "weight_map": {name: at for at, names in shards.items() for name in names}}
    for inner in ("llama", "gpt2", "bytes", "unigram", "pieces"):
        (folder / inner).mkdir(parents=True)
        for name, content in (JSONS | {"model.safetensors.index.json": index}).items():
            (folder / inner / name).write_text(json.dumps(content))
        for name, names in shards.items():
            save_file({one: tensors[one] for one in names}, folder / inner / name)
    with a4.data.bundled("stories260k") as stories:
        shutil.copy(stories / "tokenizer.json", folder / "llama")
    (folder / "llama" / "chat_template.jinja").write_text(TEMPLATE)
    for inner in ("gpt2", "bytes", "unigram", "pieces"):
        for name in ("special_tokens_map.json", "added_tokens.json"):
            (folder / inner / name).unlink()
    plain = {"tokenizer_class": "PreTrainedTokenizerFast"}
    tokenizers = {"bytes": _byte_level(), "unigram": UNIGRAM, "pieces": WORD_PIECES}
    for inner, content in tokenizers.items():
        (folder / inner / "tokenizer.json").write_text(json.dumps(content))
        (folder / inner / "tokenizer_config.json").write_text(json.dumps(plain))
    for name, content in GPT2.items():
        (folder / "gpt2" / name).write_text(json.dumps(content))
    (folder / "gpt2" / "merges.txt").write_text("#version: 0.2\nt h\nth e\n\u0120 the\n")


def _byte_level() -> dict[str, Any]:
    """tokenizer.json as a GGUF file of Qwen has it: pieces cut by regular expressions, then bytes."""
    tokenizer = a4.models.load(GOLDEN / "gguf_qwen3.gguf").tokenizer
    content: dict[str, Any] = json.loads(tokenizer.files["tokenizer.json"])
    return content


def _write_checkpoints(folder: Path) -> None:
    folder.mkdir()
    config = read_config(LLAMA)
    model = a4.quantize_model(from_tensors(config, random_tensors(config)), a4.methods.Int(4, group_size=8))
    model.tokenizer = a4.models.load("tiny").tokenizer
    a4.save(folder / "decoder", model)
    rng = np.random.default_rng(0)
    leaf = a4.quantize(rng.normal(size=(6, 20)).astype(np.float32), a4.methods.NF4(group_size=8))
    ones = np.ones(20, np.float32)
    parts = {
        "kernel": Sum((leaf, LowRank(np.ones((2, 20), np.float32), np.ones((6, 2), np.float32), np.float32(1)))),
        "list": [ScaleInput(leaf, ones), PermuteInput(leaf, np.arange(20, dtype=np.int32))],
        "few": jax.tree.map(np.asarray, nonzeros(jnp.eye(6, 20), blocks=2)),
        "input": QuantizeInput(leaf, np.ones(16, np.float32), 4, True, "token"),
        "bias": ones,
    }
    a4.save(folder / "tree", parts)
    for name in ("own", "nnx_lora"):
        shutil.unpack_archive(GOLDEN / f"schema1_{name}.zip", folder / name)
