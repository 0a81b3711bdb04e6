"""A family of decoders that any4_jax doesn't know, made of its public parts: learned positions, a scaled embedding,
blocks whose attention and MLP read one LayerNorm, and weights under names of its own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from any4_jax.models import Decoder, Family, Site
from any4_jax.models.tiny import random_tensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    count: int
    size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig:
    vocab_size: int
    width: int
    depth: int
    heads: Heads | None
    max_position_embeddings: int
    embed_scale: float
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_hidden_layers(self) -> int:
        return self.depth

    @property
    def num_key_value_heads(self) -> int:
        return self.heads.count

    @property
    def head_dim(self) -> int:
        return self.heads.size


class ToyBlock(nnx.Module):
    def __init__(self, config: ToyConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, dtype=dtype, param_dtype=dtype, rngs=rngs)

        width, inner = config.width, config.heads.count * config.heads.size
        self.heads = config.heads
        self.ln = nnx.LayerNorm(width, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.query, self.key, self.value = (linear(width, inner) for _ in range(3))
        self.out, self.up, self.down = linear(inner, width), linear(width, 2 * width), linear(2 * width, width)

    def __call__(self, x, cache, positions, tap=None):
        tap = tap or (lambda name, value: None)
        y = self.ln(x)
        tap("in", y)
        tap("seen by nobody", y)
        heads = [f(y).reshape(*y.shape[:2], self.heads.count, -1) for f in (self.query, self.key, self.value)]
        cache = cache.append(*heads[1:], positions, None)
        mixed = cache.attend(heads[0], positions, None).reshape(*y.shape[:2], -1)
        tap("mixed", mixed)
        inner = jnp.square(jax.nn.relu(self.up(y)))
        tap("inner", inner)
        return x + self.out(mixed) + self.down(inner), cache


class Toy(Decoder):
    """The blocks are at `h`; the embedding is the head."""

    def __init__(self, config: ToyConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs) -> None:
        super().__init__(config, dtype=dtype)
        options = dict(dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.wte = nnx.Embed(config.vocab_size, config.width, **options)
        self.wpe = nnx.Embed(config.max_position_embeddings, config.width, **options)
        self.h = nnx.List(ToyBlock(config, dtype, rngs) for _ in range(config.depth))
        self.ln_f = nnx.LayerNorm(config.width, **options)

    @property
    def blocks(self):
        return self.h

    def block_path(self, index: int) -> str:
        return f"h.{index}"

    def sites(self, index: int) -> tuple[Site, ...]:
        return (
            Site("in", ("query", "key", "value", "up"), "ln"),
            Site("mixed", ("out",), "value"),
            Site("inner", ("down",), None),
        )

    @property
    def head_site(self) -> Site:
        return Site("head_in", ("wte",), None)

    def embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        return self.config.embed_scale * self.wte(tokens) + self.wpe(jnp.maximum(positions, 0))

    def head_input(self, x: jax.Array) -> jax.Array:
        return self.ln_f(x)

    def head(self, x: jax.Array) -> jax.Array:
        return self.wte.attend(self.head_input(x)).astype(jnp.float32)


def read_config(config: Mapping[str, Any], generation: Mapping[str, Any] | None) -> ToyConfig:
    return ToyConfig(
        vocab_size=config["vocab_size"],
        width=config["n_embd"],
        depth=config["n_layer"],
        heads=Heads(count=config["n_head"], size=config["n_embd"] // config["n_head"]),
        max_position_embeddings=config["n_positions"],
        embed_scale=config["embed_scale"],
    )


TOY = Family(
    name="toy",
    module=Toy,
    config=ToyConfig,
    architectures=("ToyLMHeadModel",),
    model_types=("toy",),
    read_config=read_config,
    names=(
        ("{table}.embedding", "transformer.{table}.weight"),
        ("h.{i}.ln.scale", "transformer.h.{i}.ln.weight"),
        ("h.{i}.ln.bias", "transformer.h.{i}.ln.bias"),
        ("h.{i}.{linear}.kernel", "transformer.h.{i}.{linear}.weight"),
        ("h.{i}.{linear}.bias", "transformer.h.{i}.{linear}.bias"),
        ("ln_f.scale", "transformer.ln_f.weight"),
        ("ln_f.bias", "transformer.ln_f.bias"),
    ),
    embedding="transformer.wte.weight",
    ignored=("transformer.h.{i}.mask",),
)

CONFIG_JSON = {
    "architectures": ["ToyLMHeadModel"],
    "model_type": "toy",
    "vocab_size": 512,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 96,
    "embed_scale": 3.0,
}


def write_folder(folder: Path, tokenizer: bytes) -> dict[str, np.ndarray]:
    """A Hugging Face folder of random weights; returns the tensors under their names there."""
    tensors = random_tensors(read_config(CONFIG_JSON, None))
    (folder / "config.json").write_text(json.dumps(CONFIG_JSON))
    (folder / "tokenizer.json").write_bytes(tokenizer)
    stored = {**tensors, "transformer.h.0.mask": np.ones((4, 4), np.float32)}
    save_file(stored, folder / "model.safetensors")
    return tensors


def logits_of(tensors: Mapping[str, np.ndarray], tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The toy in numpy and float64: tokens [T] -> logits [T, V], and what enters the first block's linears [T, K]."""
    t = {name.removeprefix("transformer."): array.astype(np.float64) for name, array in tensors.items()}
    count, scale = CONFIG_JSON["n_head"], CONFIG_JSON["embed_scale"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)
        return x * t[f"{name}.weight"] + t[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    x = scale * t["wte.weight"][tokens] + t["wpe.weight"][: len(tokens)]
    first = norm(x, "h.0.ln")
    for i in range(CONFIG_JSON["n_layer"]):
        y = norm(x, f"h.{i}.ln")
        q, k, v = (linear(y, f"h.{i}.{n}").reshape(len(y), count, -1) for n in ("query", "key", "value"))
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True)) * np.tri(len(y))
        mixed = np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), v).reshape(len(y), -1)
        inner = np.maximum(linear(y, f"h.{i}.up"), 0) ** 2
        x = x + linear(mixed, f"h.{i}.out") + linear(inner, f"h.{i}.down")
    return norm(x, "ln_f") @ t["wte.weight"].T, first
