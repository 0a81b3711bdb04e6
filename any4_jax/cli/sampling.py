"""The flags of sampling, and writing tokens as text while they come."""

import argparse
import math
import sys
import time
from dataclasses import dataclass

from any4_jax.cli.errors import CommandLineError
from any4_jax.cli.numbers import between, count, natural
from any4_jax.generate import generate_tokens
from any4_jax.generate.streaming import TextStream
from any4_jax.generate.text import STREAM_CHUNK
from any4_jax.models import Decoder

_OF_SAMPLING = ("top_k", "top_p", "seed")


def add_sampling(parser: argparse.ArgumentParser, new_tokens: int = 64) -> None:
    """Adds the flags; `check_sampling` refuses those that would have no effect."""
    parser.add_argument(
        "--max-new-tokens", type=count, default=new_tokens, metavar="N", help=f"(default: {new_tokens})"
    )
    parser.add_argument(
        "--temperature",
        type=between(0, math.inf),
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token (default)",
    )
    parser.add_argument("--top-k", type=count, metavar="K", help="sample among the K likeliest tokens")
    parser.add_argument(
        "--top-p",
        type=between(0, 1, open_low=True),
        metavar="P",
        help="sample among the likeliest tokens that together have this probability",
    )
    parser.add_argument("--seed", type=natural, metavar="N", help="of the sampling (default: 0)")


def check_sampling(args: argparse.Namespace) -> None:
    """Refuses flags that change nothing as long as the likeliest token is taken.

    Raises:
      CommandLineError: one was given without a temperature.
    """
    given = [name for name in _OF_SAMPLING if getattr(args, name) is not None]
    if given and args.temperature == 0:
        raise CommandLineError(
            f"got --{given[0].replace('_', '-')} without a temperature, at which the likeliest token is always taken; "
            "add --temperature 1, or leave it out"
        )


@dataclass(frozen=True)
class Written:
    """What `write` wrote."""

    text: str
    tokens: int


def write(model: Decoder, prompt: list[int], args: argparse.Namespace) -> Written:
    """Generates after the prompt, and prints the text to stdout as it comes, the speed to stderr at the end."""
    text = TextStream(model.tokenizer.decode, prompt, lambda piece: print(piece, end="", flush=True))
    tokens, clock = 0, [time.perf_counter()]
    try:
        for chunk in generate_tokens(
            model,
            [prompt],
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed or 0,
            chunk=STREAM_CHUNK,
        ):
            text.extend(chunk[0])
            tokens += len(chunk[0])
            clock.append(time.perf_counter())
            if len(clock) == 3:
                warm = tokens
    except KeyboardInterrupt:
        print(flush=True)  # what comes next begins its own line
        raise
    whole = text.finish()
    print()
    # The first two chunks include compiling the prefill and the loop, so the rate is that of the others.
    line = f"{tokens} tokens in {clock[-1] - clock[0]:.1f} s"
    if len(clock) > 3 and tokens > warm:
        rate = (tokens - warm) / (clock[-1] - clock[2])
        line += f": {clock[2] - clock[0]:.1f} s to compile and read the prompt, then {rate:.1f} tokens/s"
    print(line, file=sys.stderr)
    return Written(whole, tokens)
