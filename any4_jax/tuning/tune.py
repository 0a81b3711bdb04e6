"""`tune`: trains a quantized model on the float model's predictions."""

import dataclasses
import hashlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from any4_jax.data.passages import sketch
from any4_jax.methods.base import Note
from any4_jax.methods.fields import Fields
from any4_jax.methods.matrices import Finished, Progress, digest_arrays
from any4_jax.methods.tune_leaf import NOTHING_TO_TRAIN
from any4_jax.methods.tune_steps import drawn
from any4_jax.models.base import Decoder
from any4_jax.schema import Count, Index, Portion, Positive
from any4_jax.surgery import Recipe, Training, copy_module, quantized_leaves, recipe_of, replace_module
from any4_jax.tuning.loop import Keeping, Rows, targets_of, train
from any4_jax.tuning.student import at_rest, blocks_of, stacks_of
from any4_jax.walk.batches import token_batches
from any4_jax.walk.calibrate import Data


@dataclasses.dataclass(frozen=True)
class EndToEnd(Fields):
    """The numbers of a training; see `tune` for what they mean."""

    steps: Count
    batch_size: Count
    seqlen: Count
    learning_rate: Positive
    norms: bool
    held_out: Portion
    seed: Index


def tune(
    model: Decoder,
    teacher: Decoder,
    data: Data,
    *,
    steps: int = 100,
    batch_size: int = 8,
    seqlen: int = 512,
    learning_rate: float = 1e-3,
    norms: bool = False,
    held_out: float = 0.125,
    seed: int = 0,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
    finished: Finished | None = None,
) -> Decoder:
    """The model with tables, scales and offsets trained end to end, so that it predicts what the float model does.

    The loss is the mean over tokens of KL(float || quantized), by Adam. Codes stay as they are, and what is trained is
    rounded as it is stored in every step, so the new model takes not a bit more and nothing is lost at the end. Rows of
    tokens that are held out tell when it is best; where they gain nothing, the model stays as it was. Tables of fixed
    ramps (integers) and of more than 16 entries, exponents of 8 bits, and scales that are coded themselves, are not
    trained, nor is anything outside of the blocks.

    The default is a gentle pass. With larger steps, the loss on the training text falls further, and the model drifts
    away from the float one on other texts.

    On the device are both models, a second copy of the blocks' codes, what is trained five times in float32 (with the
    gradient, Adam's moments and the best so far), and the inputs of all blocks for a batch, which a backward pass runs
    again block by block. On a mesh every device has all of that but the blocks as they are in the two models. What
    enters the float model's head is computed once for all rows, and is kept on the host: R * T * E numbers.

    Args:
      model: a quantized decoder.
      teacher: the float decoder that it was made from.
      data: texts or token ids, as in `calibrate`.
      steps: how many.
      batch_size: rows of tokens in a step.
      seqlen: tokens in a row.
      learning_rate: of tables and offsets, in steps of the table; that of scales, which are relative, is 0.15 of it. It
        rises over the first twentieth of the steps and falls to zero.
      norms: whether the scales of norms, and biases, are trained too.
      held_out: the share of rows that is not trained on; at least one row.
      seed: of the order of the rows.
      mesh: devices among which the rows of a step are split, along the first axis; None takes one device.
      progress: called with (steps done, steps, a text with the divergence) after each step.
      finished: where the state is kept eight times on the way, for a run that was killed; see `quantize_model`.

    Returns:
      A new model. The last entry of its recipe's `training` has the settings, the held-out divergence before and after
      ("kl_before", "kl_after", in nats per token), the step at which it was least ("best_step"), and a sketch of the
      text, by which `any4_jax.evaluation` refuses to judge the model on it.

    Raises:
      TypeError: one of the models is no decoder, or `mesh` no mesh.
      ValueError: the two don't belong together; nothing of the model can be trained; there are fewer than two rows;
        predictions are not finite; or a number is out of its range.
    """
    settings = EndToEnd(steps, batch_size, seqlen, learning_rate, norms, held_out, seed)
    _check(model, teacher)
    if mesh is not None and not isinstance(mesh, Mesh):
        raise TypeError(f"got a {type(mesh).__name__} as the mesh; pass a jax.sharding.Mesh, as jax.make_mesh gives it")
    tokens, counted = _rows(token_batches(model, data, batch_size, seqlen))
    draw = drawn(len(tokens), steps, batch_size, held_out, seed)
    batch = draw.order.shape[1]
    if mesh is not None and batch % (devices := mesh.shape[mesh.axis_names[0]]):
        raise ValueError(
            f"got {batch} rows in a step for {devices} devices, and a multiple is needed; pass another batch_size"
            + ("" if batch == batch_size else f", or more data: only {batch} rows are not held out")
        )
    stacks = stacks_of(model, teacher, batch, tokens.shape[1], norms=norms)
    moves = [at_rest(stack.run, stack.contents) for stack in stacks]
    if not jax.tree.leaves(moves):
        raise ValueError(f"got a model {NOTHING_TO_TRAIN}")
    kept = None
    if finished is not None:
        digest = hashlib.sha256(repr((model.config, settings)).encode())
        digest_arrays(digest, (model, teacher, tokens, counted, draw))
        kept = Keeping(finished, digest.hexdigest())
    rows = Rows(tokens, counted, targets_of(teacher, tokens, batch))
    best = train(model, teacher, stacks, moves, rows, draw, learning_rate, mesh=mesh, progress=progress, kept=kept)
    new: Any = copy_module(model)
    if int(best.step):
        for path, block in blocks_of(model, stacks, best.moves).items():
            replace_module(new, path, block)
    used = dataclasses.replace(settings, batch_size=batch, seqlen=tokens.shape[1])
    reached = {"kl_before": float(best.start), "kl_after": float(best.error), "best_step": int(best.step)}
    new.recipe = _recorded(
        model, dataclasses.asdict(used) | reached, [row[counts] for row, counts in zip(tokens, counted, strict=True)]
    )
    return new


def _recorded(model: Decoder, settings: dict[str, Note], rows: list[np.ndarray]) -> Recipe:
    """How the model was quantized, and that it was trained."""
    earlier = recipe_of(model) or Recipe((), ())
    training = Training("end to end", tuple(sorted(settings.items())), sum(map(len, rows)), sketch(rows))
    return dataclasses.replace(earlier, training=(*earlier.training, training))


def _rows(batches: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [R, T] of all batches, padded to the longest, and bool [R, T] that is False on padding."""
    longest = max(tokens.shape[1] for tokens, _ in batches)
    tokens, counted = (
        np.concatenate([np.pad(a, ((0, 0), (0, longest - a.shape[1]))) for a in arrays])
        for arrays in zip(*batches, strict=True)
    )
    return tokens, counted


def _check(model: Any, teacher: Any) -> None:
    for name, one in (("model", model), ("teacher", teacher)):
        if not isinstance(one, Decoder):
            raise TypeError(
                f"got a {type(one).__name__} as the {name}, and tune needs decoders of any4_jax.models, which have "
                "blocks; load it with any4_jax.models.load"
            )
    if type(model) is not type(teacher) or model.config != teacher.config:
        raise ValueError(
            f"got a {type(model).__name__} and a {type(teacher).__name__} of different configs, and the teacher has to "
            "be the float form of the model; pass the one that it was quantized from"
        )
    if model.dtype != teacher.dtype:
        raise ValueError(
            f"got a model of {model.dtype} and a teacher of {teacher.dtype}, and blocks of both run as one program; "
            f"load the float model with dtype={str(model.dtype)!r}"
        )
    if quantized_leaves(teacher):
        raise ValueError("got a teacher that is quantized, and a float one is needed; load the float model")
    if not quantized_leaves(model):
        raise ValueError("got a model without quantized layers, which tune trains; quantize it first")
