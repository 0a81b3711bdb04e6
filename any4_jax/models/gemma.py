"""Gemma 2 (arXiv:2408.00118) and Gemma 3 (arXiv:2503.19786), text: norms before and after, a scaled embedding."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from any4_jax.kv_cache import AttentionSettings, Cache
from any4_jax.models.attention import Attention
from any4_jax.models.base import PRECISION, Site, Tap, no_tap
from any4_jax.models.config import WindowedConfig
from any4_jax.models.fold import Rescale, scale_outputs
from any4_jax.models.layers import Layers
from any4_jax.models.llama import Llama
from any4_jax.models.mlp import MLP
from any4_jax.models.norms import OffsetRMSNorm
from any4_jax.models.rope import Rope
from any4_jax.schema import Positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig(WindowedConfig):
    """What Gemma 2 and 3 add to the config of Llama.

    Attributes:
        query_pre_attn_scalar: scores are divided by its square root.
        attn_logit_softcapping, final_logit_softcapping: bounds on the scores of attention and on logits; None means no
            bound.
    """

    query_pre_attn_scalar: Positive
    attn_logit_softcapping: Positive | None = None
    final_logit_softcapping: Positive | None = None

    def attention(self, index: int) -> AttentionSettings:
        return AttentionSettings(
            scale=self.query_pre_attn_scalar**-0.5, softcap=self.attn_logit_softcapping, window=self.window(index)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma2Config(GemmaConfig):
    """The config of a Gemma 2."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Config(GemmaConfig):
    """The config of a Gemma 3: queries and keys are normalized, and blocks with a window have a rope of their own.

    Attributes:
        rope_local_base_freq: the base of the rotary frequencies in blocks with a window, which no scaling stretches.
    """

    rope_local_base_freq: Positive = 10000.0

    @property
    def qk_norm(self) -> bool:
        return True

    def rope(self, index: int) -> Rope:
        if self.window(index) is not None:
            return Rope(self.head_dim, self.rope_local_base_freq)
        return super().rope(index)


def gelu(x: jax.Array) -> jax.Array:
    """The tanh approximation of GELU (arXiv:1606.08415)."""
    return jax.nn.gelu(x, approximate=True)


class GemmaBlock(nnx.Module):
    """A block whose attention and MLP are normalized before and after."""

    def __init__(self, config: GemmaConfig, attention: Attention, mlp: MLP, layers: Layers) -> None:
        def norm() -> OffsetRMSNorm:
            return OffsetRMSNorm(config.hidden_size, eps=config.rms_norm_eps, param_dtype=layers.param_dtype)

        self.input_layernorm, self.self_attn, self.post_attention_layernorm = norm(), attention, norm()
        self.pre_feedforward_layernorm, self.mlp, self.post_feedforward_layernorm = norm(), mlp, norm()

    def sites(self) -> tuple[Site, ...]:
        """The sites of the block, in the order in which they run."""
        attention = self.self_attn.sites("self_attn", "input_layernorm")
        return attention + self.mlp.sites("mlp", "pre_feedforward_layernorm")

    def __call__(
        self, x: jax.Array, cache: Cache, positions: jax.Array, tap: Tap | None = None
    ) -> tuple[jax.Array, Cache]:
        """x [B, T, E] and positions int32 [B, T] -> ([B, T, E], the cache with these tokens added)."""
        tap = tap or no_tap
        with jax.default_matmul_precision(PRECISION):
            mixed, cache = self.self_attn(self.input_layernorm(x), cache, positions, tap)
            x = x + self.post_attention_layernorm(mixed)
            inner = self.mlp(self.pre_feedforward_layernorm(x), tap)
            return x + self.post_feedforward_layernorm(inner), cache


class Gemma(Llama):
    """A Gemma 2 or 3; see `Llama`."""

    config: GemmaConfig

    def new_norm(self, size: int, layers: Layers) -> nnx.Module:
        return OffsetRMSNorm(size, eps=self.config.rms_norm_eps, param_dtype=layers.param_dtype)

    def new_block(self, index: int, layers: Layers) -> nnx.Module:
        attention = Attention(self.config, index, layers, lambda size: self.new_norm(size, layers))
        return GemmaBlock(self.config, attention, MLP(self.config, layers, gelu), layers)

    def embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """The embedding times sqrt(E), a factor that is rounded to the dtype of activations."""
        x = self.embed_tokens(tokens)
        return x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)

    def head(self, x: jax.Array) -> jax.Array:
        logits, cap = super().head(x), self.config.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)


@scale_outputs.register(OffsetRMSNorm)
def _(layer: OffsetRMSNorm, rescale: Rescale) -> None:
    scale = layer.scale.get_value()
    layer.scale.set_value((rescale(1 + scale.astype(jnp.float32)) - 1).astype(scale.dtype))
