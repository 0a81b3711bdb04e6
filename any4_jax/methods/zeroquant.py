"""ZeroQuant (arXiv 2206.01861): integers for weights and inputs, and blocks trained on the float model's outputs."""

import dataclasses
import re
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from any4_jax import formats, scaling
from any4_jax.methods.base import Block, BlockResult
from any4_jax.methods.fields import Fields
from any4_jax.methods.rtn import RoundToNearest
from any4_jax.methods.smoothquant import WHOLE_ROW
from any4_jax.methods.tune import refuse_no_inputs, tuned
from any4_jax.methods.tune_loop import Settings
from any4_jax.schema import Count, Positive
from any4_jax.statistics import Statistic
from any4_jax.weights import QuantizeInput

Bits = Literal[2, 3, 4, 5, 6, 8]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullRange(RoundToNearest):
    """Symmetric integers whose range is used to its negative end: scale = max|w| / 2^(bits - 1).

    The largest magnitude is exact where it is negative, and loses a step where it is positive.
    """

    name: ClassVar[str] = "full-range"
    bits: Bits = 8

    def format(self, k: int) -> formats.Format:
        return formats.integer(self.bits, rule="absmax")

    def scale_groups(self, w: jax.Array, importance: jax.Array, lut: jax.Array) -> scaling.GroupScales:
        largest, _ = super().scale_groups(w, importance, lut)
        # By a power of two, which is exact.
        return scaling.GroupScales((largest.astype(jnp.float32) / 2 ** (self.bits - 1)).astype(largest.dtype), None)


@dataclasses.dataclass(frozen=True)
class ZeroQuant(Fields):
    """Symmetric integers in groups within rows, of one width for attention and another for the MLP, and inputs rounded
    token by token, so that products are of integers. With `lkd`, layer-by-layer knowledge distillation follows: a
    block's scales and rounding are trained until its outputs are close to those of the float block.

    Published code differs. Its groups are of the flattened matrix, and cross rows. Its distillation runs blocks without
    a causal mask, trains the last one alone, and hands float inputs to both (sequential=False); the weights that it
    trains in bfloat16 lose most steps. It scales inputs by max|x| / 128, which clips the largest; here it is / 127.

    Attributes:
      bits: width of a weight, outside of the attention.
      attention_bits: width of an attention's weight.
      attention: a regular expression that matches the whole paths, within a block, of the attention's linears.
      group_size: G; larger than K means the whole row.
      input_bits: width of an input; None leaves inputs as they are.
      lkd: which blocks are trained: none, the last one, or all.
      steps, batch, learning_rate: of the training, as in `Tune` with rounding.
      sequential: train with inputs of the model as quantized so far, or with those of the float model.
      scale_dtype: stored dtype of scales.
    """

    name: ClassVar[str] = "zeroquant"
    scope: ClassVar[Literal["block"]] = "block"
    needs: ClassVar[tuple[Statistic, ...]] = ()
    bits: Bits = 4
    attention_bits: Bits = 8
    attention: str = r"self_attn\..*"
    group_size: Count = WHOLE_ROW
    input_bits: Literal[2, 3, 4, 5, 6, 7, 8] | None = 8
    lkd: Literal["none", "last", "all"] = "none"
    steps: Count = 200
    batch: Count = 8
    learning_rate: Positive | None = None
    sequential: bool = True
    scale_dtype: scaling.StoredDtype = "bfloat16"

    @property
    def targets(self) -> bool:
        """See `BlockMethod`."""
        return self.lkd != "none"

    def check(self, gathered: bool) -> None:
        if self.lkd != "none" and not gathered:
            raise ValueError(
                f"got lkd={self.lkd!r} without data, which blocks are trained on; pass data, or lkd='none'"
            )
        try:
            re.compile(self.attention)
        except re.error as error:
            raise ValueError(
                f"got attention={self.attention!r}, which is no regular expression ({error}); correct it"
            ) from None

    def apply(self, block: Block) -> BlockResult:
        """See `BlockMethod.apply`."""
        if self.lkd == "none" or (self.lkd == "last" and not block.last):
            return self._quantized(block)
        refuse_no_inputs(block, self)
        return tuned(block, self._quantized(block), Settings.of(self, rounding=True), self)

    def _quantized(self, block: Block) -> BlockResult:
        contents, notes = dict(block.contents), dict[str, Any]()
        for bits, paths in self._by_width(block).items():
            weights = FullRange(bits=bits, group_size=self.group_size, scale_dtype=self.scale_dtype)
            made = block.reassigned(weights).quantize(contents, paths, {})
            contents, notes = dict(made.contents), {**notes, **made.notes}
        if self.input_bits is not None:
            for name in (f"{path}.kernel" for path in block.assigned):
                contents[name] = QuantizeInput(contents[name], None, self.input_bits, True, "token")
        return BlockResult(contents, notes)

    def _by_width(self, block: Block) -> dict[Bits, list[str]]:
        """The assigned linears by the width of their weights.

        Raises:
          ValueError: the widths differ, and `attention` matches no linear of the block.
        """
        if self.bits == self.attention_bits:
            return {self.bits: list(block.assigned)}
        matches = re.compile(self.attention).fullmatch
        linears = dict.fromkeys([*(path for site in block.sites for path in site.linears), *block.assigned])
        if not any(map(matches, linears)):
            raise ValueError(
                f"got attention={self.attention!r}, which matches none of {', '.join(linears)}; pass an expression for "
                "the attention's linears, or equal widths"
            )
        found: dict[Bits, list[str]] = {}
        for path in block.assigned:
            found.setdefault(self.attention_bits if matches(path) else self.bits, []).append(path)
        return found
