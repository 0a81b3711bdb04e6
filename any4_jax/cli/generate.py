"""`any4 generate`: text from a model or checkpoint, printed as it is generated."""

import argparse
import sys
import time
from typing import Any

from any4_jax.cli.errors import WorkError
from any4_jax.cli.sources import MODEL_HELP, open_model
from any4_jax.generate import generate_tokens
from any4_jax.generate.streaming import TextStream
from any4_jax.generate.text import STREAM_CHUNK


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "generate", parents=[common], help="text from a model or checkpoint", allow_abbrev=False
    )
    parser.add_argument("model", metavar="CKPT_OR_MODEL", help=f"a checkpoint, {MODEL_HELP}")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="(default: 64)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default)"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="sample among the likeliest tokens that together have this probability"
    )
    parser.add_argument("--seed", type=int, help="of the sampling (default: 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    model = open_model(args.model)
    if model.tokenizer is None:
        raise WorkError(f"{args.model} has no tokenizer, and a text prompt needs one; add its tokenizer.json")
    prompt = model.tokenizer.encode(args.prompt)
    text = TextStream(model.tokenizer.decode, prompt, lambda piece: print(piece, end="", flush=True))
    count, clock = 0, [time.perf_counter()]
    for chunk in generate_tokens(
        model,
        [prompt],
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        chunk=STREAM_CHUNK,
    ):
        text.extend(chunk[0])
        count += len(chunk[0])
        clock.append(time.perf_counter())
        if len(clock) == 3:
            warm_count = count
    text.finish()
    print()
    # The first two chunks include compiling the prefill and the loop, so the rate is that of the others.
    line = f"{count} tokens in {clock[-1] - clock[0]:.1f} s"
    if len(clock) > 3 and count > warm_count:
        rate = (count - warm_count) / (clock[-1] - clock[2])
        line += f": {clock[2] - clock[0]:.1f} s to compile and read the prompt, then {rate:.1f} tokens/s"
    print(line, file=sys.stderr)
    return 0
