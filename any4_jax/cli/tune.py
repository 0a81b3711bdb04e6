"""`any4 tune`: trains a checkpoint's tables, scales and offsets on the predictions of the float model."""

import argparse
import math
import time
from collections.abc import Mapping
from typing import Any

from any4_jax import checkpoint
from any4_jax.checkpoint.partial import PartialStore
from any4_jax.cli.errors import WorkError
from any4_jax.cli.interrupts import Interrupted, going_on
from any4_jax.cli.numbers import between, count, natural
from any4_jax.cli.output import progress, tell
from any4_jax.cli.quantize import partial_of
from any4_jax.cli.sources import MODEL_HELP, calibration_text, check_output, is_checkpoint, open_model
from any4_jax.data import pieces
from any4_jax.surgery import recipe_of
from any4_jax.tuning import tune

SEQLEN = 512


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "tune",
        parents=[common],
        help="train a checkpoint's tables and scales on the float model's predictions",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint of any4 quantize")
    parser.add_argument(
        "out", metavar="OUT", help="folder of the new checkpoint; an older one there is replaced at the end"
    )
    parser.add_argument(
        "--teacher", metavar="MODEL", required=True, help=f"the float model that CKPT was made from: {MODEL_HELP}"
    )
    parser.add_argument(
        "--data",
        metavar="essays|FILE",
        required=True,
        help="text to train on, best of the domain where the model is used; essays are 6,000 bundled words; any4 eval "
        "refuses to measure the model on it later",
    )
    parser.add_argument(
        "--samples",
        type=count,
        metavar="N",
        help="train on N pieces of --seqlen tokens, spread evenly over the text (default: on all of it)",
    )
    parser.add_argument(
        "--seqlen",
        type=count,
        metavar="T",
        help=f"tokens in a row (default: {SEQLEN}, or the model's context if that is shorter)",
    )
    parser.add_argument("--steps", type=count, default=100, metavar="N", help="steps (default: 100)")
    parser.add_argument("--batch-size", type=count, default=8, metavar="N", help="rows in a step (default: 8)")
    parser.add_argument(
        "--learning-rate",
        type=between(0, math.inf, open_low=True),
        default=1e-3,
        metavar="X",
        help="in steps of the table (default: 0.001, a gentle pass)",
    )
    parser.add_argument("--norms", action="store_true", help="train the scales of norms, and biases, too")
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="of the order of the rows (default: 0)")
    parser.add_argument(
        "--no-resume",
        dest="resume",
        action="store_false",
        help="begin anew; by default, a run with the same arguments goes on from what an interrupted one left in "
        "OUT.partial",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    check_output(args.out)
    if not is_checkpoint(args.checkpoint):
        raise WorkError(f"{args.checkpoint} is no checkpoint; make one of the float model with any4 quantize")
    text = calibration_text(args.data)
    begin, partial = time.perf_counter(), partial_of(args.out)
    try:
        with PartialStore(partial, resume=args.resume) as finished:
            model, teacher = open_model(args.checkpoint), open_model(args.teacher)
            seqlen = min(args.seqlen or SEQLEN, model.config.max_position_embeddings)
            data: Any = text if args.samples is None else pieces(model.tokenizer.encode(text), args.samples, seqlen)
            with progress("tune", "step") as bar:
                model = tune(
                    model,
                    teacher,
                    data,
                    steps=args.steps,
                    batch_size=args.batch_size,
                    seqlen=seqlen,
                    learning_rate=args.learning_rate,
                    norms=args.norms,
                    seed=args.seed,
                    progress=bar,
                    finished=finished,
                )
            checkpoint.save(args.out, model)
            finished.clear()
    except KeyboardInterrupt:
        raise Interrupted(going_on(args.out, partial, resume=args.resume)) from None
    recipe = recipe_of(model)
    assert recipe is not None  # tune records what it did
    training = recipe.training[-1]
    told, seconds = dict(training.settings), time.perf_counter() - begin
    print(
        f"KL from the float model on held-out rows: {told['kl_before']:.4f} nats per token before, {reached(told)}; "
        f"trained on {training.tokens} tokens, {seconds:.1f} s; wrote {args.out}"
    )
    names = {"checkpoint": args.checkpoint, "teacher": args.teacher, "out": args.out}
    tell(lambda: names | told | {"tokens": training.tokens, "seconds": seconds})
    return 0


def reached(told: Mapping[str, Any]) -> str:
    """What a training came to, by the settings that its record tells."""
    if told["best_step"] == 0:
        return f"and no less in {told['steps']} steps, so that all weights stay as they were"
    return f"{told['kl_after']:.4f} after {told['best_step']} of {told['steps']} steps"
