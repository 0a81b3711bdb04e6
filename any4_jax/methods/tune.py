"""Training what a method has quantized, block by block, on the outputs of the float model."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np

from any4_jax.methods.any4 import Any4
from any4_jax.methods.base import AnyMethod, Block, BlockResult, scope_of
from any4_jax.methods.fields import Fields
from any4_jax.methods.lifts import on_block
from any4_jax.methods.tune_leaf import is_leaf
from any4_jax.methods.tune_loop import Settings, train_block
from any4_jax.schema import Count, Index, Portion, Positive
from any4_jax.statistics import Statistic
from any4_jax.weights import QuantizeInput, is_operator


@dataclasses.dataclass(frozen=True)
class Tune(Fields):
    """Another method's result, trained until each block's outputs are closest to those of the float model's block.

    The blocks get the inputs of the model as quantized so far, so that each makes up for errors of those before it. The
    tables, scales and offsets are trained by Adam, and with `rounding` the codes as in SignRound (arXiv 2309.05516), on
    learned tables too. What is trained is computed as it would be stored, so the result has not a bit more. Rows of
    tokens that are held out tell when it is best; where nothing is gained on them, a block stays as the method made it.
    Tables of fixed ramps (integers), tables of more than 16 entries, exponents of 8 bits and scales that are coded
    themselves stay as they are; where that leaves nothing to train, it is an error.

    Attributes:
      start: what quantizes: any method.
      steps: of training, for each block.
      batch: rows of tokens in a step.
      learning_rate: of tables and offsets, in steps of the table; that of scales, which are relative, is 0.15 of it.
        None is 0.008 for fixed codes, 0.002 with `rounding`. It rises over the first twentieth, and falls to zero.
      rounding: whether codes are trained. A weight starts between the codes where the float weight is, and moves by at
        most half a step. The start must give the codes of the weights themselves: methods that scale or permute the
        inputs don't.
      norms: whether the scales of norms, and biases, are trained too.
      held_out: the share of rows that is not trained on; at least one row.
      seed: for the order of the rows.
    """

    name: ClassVar[str] = "tune"
    scope: ClassVar[Literal["block"]] = "block"
    targets: ClassVar[bool] = True
    sequential: ClassVar[bool] = True
    start: AnyMethod = Any4()
    steps: Count = 200
    batch: Count = 8
    learning_rate: Positive | None = None
    rounding: bool = False
    norms: bool = False
    held_out: Portion = 0.125
    seed: Index = 0

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return self.start.needs

    def check(self, gathered: bool) -> None:
        if not gathered:
            raise ValueError("got no data, tune trains each block on its inputs; pass data")
        self.start.check(gathered)

    def apply(self, block: Block) -> BlockResult:
        """See `BlockMethod.apply`."""
        refuse_no_inputs(block, self)
        if scope_of(self.start) == "block":
            begun = self.start.apply(block.reassigned(self.start))  # type: ignore[attr-defined]
        else:
            begun = on_block(self.start).apply(block)  # type: ignore[arg-type]
        settings = Settings.of(self, self.rounding, norms=self.norms, held_out=self.held_out, seed=self.seed)
        return tuned(block, begun, settings, self)


def refuse_no_inputs(block: Block, method: AnyMethod) -> None:
    """Raises ValueError where the block has nothing to be trained on."""
    if not block.inputs:
        raise ValueError(f"got statistics in the place of data, {method.name} trains on data; pass data")


def tuned(block: Block, begun: BlockResult, settings: Settings, method: AnyMethod) -> BlockResult:
    """A block's result, trained; the notes tell the held-out error before and after, and at which step it was least.

    Args:
      block: the block, of which `begun` is the result.
      begun: what a method made of it.
      settings: how to train.
      method: who asks, for messages.

    Raises:
      ValueError: there is too little data, nothing can be trained, the codes to be trained stand for no weights of the
        block, or its outputs are not finite.
    """
    if settings.rounding:
        _refuse_other_weights(block, begun.contents)
    made = train_block(block, begun.contents, settings)
    if not np.isfinite(made.before):
        raise ValueError(
            f"got an error of {float(made.before)} before any step, and training needs outputs that are finite; "
            "float16 overflows that way, so load the model with dtype='bfloat16' or 'float32'"
        )
    told = {"error_before": made.before, "error_after": made.after, "best_step": made.step}
    return BlockResult(made.contents, {path: {**begun.notes.get(path, {}), **told} for path in block.assigned})


def _refuse_other_weights(block: Block, contents: Mapping[str, Any]) -> None:
    """Refuses results whose codes stand for other matrices than the block's own kernels."""
    kernels = {f"{path}.kernel" for path in block.assigned}
    folded = [name for name in contents if name not in kernels and contents[name] is not block.contents[name]]
    for path in block.assigned:
        operator = contents[f"{path}.kernel"]
        inner = operator.inner if isinstance(operator, QuantizeInput) else operator
        if folded or (is_operator(operator) and not is_leaf(inner)):
            raise ValueError(
                f"got rounding=True for {path}, which the start makes of scaled or permuted inputs or of a sum, and "
                "rounding starts from codes of the weights themselves; pass rounding=False, or another start"
            )
