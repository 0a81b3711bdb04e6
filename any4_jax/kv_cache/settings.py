"""The settings in which the attention of models and blocks differs."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSettings:
    """How one block of a model attends; hashable, so it can be static under jit.

    A query q weights the values of the tokens that it sees by a softmax over the scores of their keys k:

        score = softcap * tanh(scale * q @ k / softcap)

    Attributes:
        scale: factor of q @ k; None means D**-0.5.
        softcap: bound on the magnitude of a score (Gemma 2, arXiv:2408.00118, section 2); None means no bound, and
            a score is scale * q @ k.
        window: a query sees the last `window` tokens, its own included (Mistral, arXiv:2310.06825, section 2); None
            means all tokens up to its own.

    Raises:
        ValueError: scale isn't finite, softcap isn't finite and above 0, or window is below 1.
    """

    scale: float | None = None
    softcap: float | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        if self.scale is not None and not math.isfinite(self.scale):
            raise ValueError(f"scale is {self.scale}, and a finite number is needed; pass None for D**-0.5")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(
                f"softcap is {self.softcap}, and a finite number above 0 is needed; pass None for no bound"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}, and at least 1 token is needed; pass None for all tokens")


PLAIN = AttentionSettings()
"""Causal attention as in most families: no softcap, no window."""
