"""The ways in which models stretch the frequencies of their rotary embedding, to see longer texts.

Each is a frozen dataclass with the keys of Hugging Face's `rope_scaling`; results are those of transformers. Letters:
D head size.
"""

import dataclasses
import math
from typing import Annotated, Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Discriminator, Tag

from any4_jax.schema import Count, Finite, Positive


class Scaling(Protocol):
    """One way to stretch.

    Attributes:
        by_length: whether the frequencies depend on the length of the text.
        amplitude: the factor of the rotated channels.
        made_for: the numbers of frequencies for which it has factors of their own; empty if it fits any number.
    """

    by_length: bool

    @property
    def made_for(self) -> tuple[int, ...]: ...

    @property
    def amplitude(self) -> float: ...

    def frequencies(self, theta: float, size: int, length: jax.Array | None) -> Any:
        """Radians per position, float32 [D/2], or [B, D/2] if `by_length`.

        Args:
            theta: the base of the frequencies.
            size: D.
            length: int32 [B], the tokens in each text so far, if `by_length`; None means within the original context,
                and a result [1, D/2].
        """
        ...


def plain_frequencies(theta: float, size: int) -> np.ndarray:
    """theta ** (-2 i / D), float32 [D/2] (RoFormer, arXiv:2104.09864, section 3.2.2)."""
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    return np.float32(1) / np.float32(theta) ** exponents


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's frequency scaling (`rope_type: "llama3"`).

    Wavelengths longer than `original_max_position_embeddings / low_freq_factor` are stretched by `factor`, those
    shorter than `original_max_position_embeddings / high_freq_factor` are kept, and those in between are blended.
    """

    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Count
    rope_type: Literal["llama3"] = "llama3"

    by_length = False
    made_for = ()
    amplitude = 1.0

    def __post_init__(self) -> None:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor is {self.low_freq_factor}, and less than high_freq_factor={self.high_freq_factor} "
                "is needed"
            )

    def frequencies(self, theta: float, size: int, length: jax.Array | None = None) -> np.ndarray:
        frequencies = plain_frequencies(theta, size)
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return ((1 - kept) * frequencies / self.factor + kept * frequencies).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """All frequencies are divided by `factor` (arXiv:2306.15595)."""

    factor: Positive
    rope_type: Literal["linear"] = "linear"

    by_length = False
    made_for = ()
    amplitude = 1.0

    def frequencies(self, theta: float, size: int, length: jax.Array | None = None) -> np.ndarray:
        return plain_frequencies(theta, size) / np.float32(self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    """The base grows with the text once it is longer than the original context ("dynamic NTK").

    Keys keep the rotation of the time when they were cached, as in transformers; so a text that grows past the original
    context token by token differs from the same text in one piece.
    """

    factor: Positive
    original_max_position_embeddings: Count
    rope_type: Literal["dynamic"] = "dynamic"

    by_length = True
    made_for = ()
    amplitude = 1.0

    def frequencies(self, theta: float, size: int, length: jax.Array | None = None) -> jax.Array:
        context = self.original_max_position_embeddings
        seen = jnp.maximum(_column(length), context).astype(jnp.float32)
        grown = theta * (self.factor * seen / context - (self.factor - 1)) ** (size / (size - 2))
        return 1.0 / grown ** (jnp.arange(0, size, 2, dtype=jnp.float32)[None] / size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv:2309.00071, section 3): long wavelengths are stretched, short ones kept, and the rotated channels
    grow by `attention_factor`.

    Attributes:
        beta_fast, beta_slow: turns within the original context from which, and up to which, a frequency is kept or
            stretched.
        mscale, mscale_all_dim: give the attention factor where it is None.
        truncate: round the channels between which frequencies are blended to whole ones.
    """

    factor: Positive
    original_max_position_embeddings: Count
    attention_factor: Positive | None = None
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    mscale: Finite | None = None
    mscale_all_dim: Finite | None = None
    truncate: bool = True
    rope_type: Literal["yarn"] = "yarn"

    by_length = False
    made_for = ()

    @property
    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._growth(self.mscale) / self._growth(self.mscale_all_dim)
        return self._growth(1.0)

    def _growth(self, scale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * scale * math.log(self.factor) + 1.0

    def frequencies(self, theta: float, size: int, length: jax.Array | None = None) -> np.ndarray:
        def channel(turns: float) -> float:
            context = self.original_max_position_embeddings
            return size * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        # transformers widens an empty ramp by the same number.
        high = high + 0.001 if low == high else high
        stretched = np.clip((np.arange(size // 2, dtype=np.float32) - low) / (high - low), 0, 1)
        frequencies = plain_frequencies(theta, size)
        return (frequencies / self.factor * stretched + frequencies * (1 - stretched)).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """LongRoPE (arXiv:2402.13753): a factor for each frequency, of which there are two sets, for texts within the
    original context and for longer ones.

    Keys keep the rotation of the time when they were cached, as in transformers.

    Attributes:
        short_factor, long_factor: D/2 divisors of the frequencies.
        attention_factor: the factor of the rotated channels.
    """

    short_factor: tuple[Positive, ...]
    long_factor: tuple[Positive, ...]
    original_max_position_embeddings: Count
    attention_factor: Positive
    rope_type: Literal["longrope"] = "longrope"

    by_length = True

    @property
    def made_for(self) -> tuple[int, ...]:
        return len(self.short_factor), len(self.long_factor)

    @property
    def amplitude(self) -> float:
        return self.attention_factor

    def frequencies(self, theta: float, size: int, length: jax.Array | None = None) -> jax.Array:
        short, long = (np.asarray([f], np.float32) for f in (self.short_factor, self.long_factor))
        is_long = _column(length) > self.original_max_position_embeddings
        return jnp.asarray(plain_frequencies(theta, size))[None] / jnp.where(is_long, long, short)


def _column(length: jax.Array | None) -> jax.Array:
    """Lengths as int32 [B, 1]; None is one text of no tokens."""
    return jnp.zeros((1, 1), jnp.int32) if length is None else length[:, None]


def _kind(value: Any) -> str:
    # Configs that were saved before there were other kinds don't name theirs.
    return value.get("rope_type", "llama3") if isinstance(value, dict) else getattr(value, "rope_type", "llama3")


AnyScaling = Annotated[
    Annotated[RopeScaling, Tag("llama3")]
    | Annotated[LinearScaling, Tag("linear")]
    | Annotated[DynamicScaling, Tag("dynamic")]
    | Annotated[YarnScaling, Tag("yarn")]
    | Annotated[LongRopeScaling, Tag("longrope")],
    Discriminator(_kind),
]
"""A field that holds one of the scalings."""

KINDS: dict[str, type] = {
    "llama3": RopeScaling,
    "linear": LinearScaling,
    "dynamic": DynamicScaling,
    "yarn": YarnScaling,
    "longrope": LongRopeScaling,
}
"""`rope_type` -> class."""
