"""The flags of sampling, and writing tokens as text while they come."""

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from any4_jax.cli.errors import CommandLineError
from any4_jax.cli.numbers import between, count, natural
from any4_jax.generate import generate_tokens
from any4_jax.generate.streaming import TextStream
from any4_jax.generate.text import STREAM_CHUNK
from any4_jax.kv_cache import CacheFactory
from any4_jax.models import Decoder

_OF_SAMPLING = ("top_k", "top_p", "min_p", "seed", "n")


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
    parser.add_argument(
        "--min-p",
        type=between(0, 1),
        metavar="P",
        help="sample among the tokens that have at least this share of the likeliest one's probability",
    )
    parser.add_argument("--seed", type=natural, metavar="N", help="of the sampling (default: 0)")
    parser.add_argument(
        "--repetition-penalty",
        type=between(0, math.inf, open_low=True),
        default=1.0,
        metavar="R",
        help="above 1, tokens of the prompt and of the new text become less likely (default: 1)",
    )
    for name, words in (("frequency", "for each time that it is"), ("presence", "if it is")):
        parser.add_argument(
            f"--{name}-penalty",
            type=between(-2, 2),
            default=0.0,
            metavar="R",
            help=f"subtracted from a token's logit {words} in the new text (default: 0)",
        )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )


def check_sampling(args: argparse.Namespace) -> None:
    """Refuses flags that change nothing as long as the likeliest token is taken.

    Raises:
      CommandLineError: one was given without a temperature.
    """
    given = [name for name in _OF_SAMPLING if getattr(args, name, None) is not None]
    if given and args.temperature == 0:
        raise CommandLineError(
            f"got --{given[0].replace('_', '-')} without a temperature, at which the likeliest token is always taken; "
            "add --temperature 1, or leave it out"
        )
    if "" in args.stop:
        raise CommandLineError("got an empty --stop, which would end every text at once; leave it out")


@dataclass(frozen=True)
class Written:
    """What `write` wrote.

    Attributes:
      texts: the continuations.
      tokens: of all of them together.
      seconds: in all.
      rate: tokens per second after the programs were compiled; None if that is unknown, since there were too few.
    """

    texts: tuple[str, ...]
    tokens: int
    seconds: float
    rate: float | None


def as_found(written: Written) -> dict[str, Any]:
    """What was written, for --json."""
    return {
        "texts": written.texts,
        "tokens": written.tokens,
        "seconds": written.seconds,
        "tokens_per_s": written.rate,
    }


def write(
    model: Decoder,
    prompt: list[int],
    args: argparse.Namespace,
    cache: CacheFactory | None = None,
    n: int = 1,
    tokens: Callable[..., Iterator[list[list[int]]]] | None = None,
) -> Written:
    """Generates `n` texts after the prompt, and prints them to stdout, a single one as it comes.

    The speed goes to stderr at the end.

    Args:
      model, prompt, args, n: what is continued, and how often; see `add_sampling` for args.
      cache: creates the caches; None for the model's own.
      tokens: in place of `generate_tokens` for the model, the prompts and the cache: from its settings to chunks.
    """
    if tokens is None:
        tokens = functools.partial(generate_tokens, model, [prompt] * n, cache=cache)
    emit = (lambda piece: print(piece, end="", flush=True)) if n == 1 else (lambda piece: None)
    texts = [TextStream(model.tokenizer.decode, prompt, emit, args.stop) for _ in range(n)]
    clock, warm = [time.perf_counter()], 0
    try:
        for chunk in tokens(
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
            frequency_penalty=args.frequency_penalty,
            presence_penalty=args.presence_penalty,
            seed=args.seed,
            chunk=STREAM_CHUNK,
        ):
            for text, new in zip(texts, chunk, strict=True):
                text.extend(new)
            clock.append(time.perf_counter())
            if len(clock) == 3:
                warm = _tokens(texts)
            if all(text.stopped for text in texts):
                break
    except KeyboardInterrupt:
        print(flush=True)  # what comes next begins its own line
        raise
    whole = [text.finish() for text in texts]
    print("" if n == 1 else "\n".join(f"--- {i}\n{text}" for i, text in enumerate(whole, 1)))
    # The first two chunks include compiling the prefill and the loop, so the rate is that of the others.
    total, seconds, rate = _tokens(texts), clock[-1] - clock[0], None
    line = f"{total} tokens in {seconds:.1f} s"
    if len(clock) > 3 and total > warm:
        rate = (total - warm) / (clock[-1] - clock[2])
        line += f": {clock[2] - clock[0]:.1f} s to compile and read the prompt, then {rate:.1f} tokens/s"
    print(line, file=sys.stderr)
    return Written(tuple(whole), total, seconds, rate)


def _tokens(texts: Sequence[TextStream]) -> int:
    return sum(len(text.tokens) for text in texts)
