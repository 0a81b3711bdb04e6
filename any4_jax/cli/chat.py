"""`any4 chat`: a conversation with a model that has a chat template."""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from any4_jax.cli.caches import add_cache, cache_for, cache_from
from any4_jax.cli.errors import WorkError
from any4_jax.cli.sampling import add_sampling, check_sampling, write
from any4_jax.cli.sources import MODEL_HELP, add_inputs, decoded, given_text, open_model


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "chat", parents=[common], help="talk to a model that has a chat template", allow_abbrev=False
    )
    parser.add_argument("model", metavar="CKPT_OR_MODEL", help=f"a checkpoint, {MODEL_HELP}")
    parser.add_argument("--system", metavar="TEXT", help="a system message that comes first")
    add_sampling(parser, new_tokens=512)
    add_inputs(parser, "the model's")
    add_cache(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    check_sampling(args)
    cache = cache_from(args)
    system = None if args.system is None else given_text(args.system, "the system message")
    model = open_model(args.model, args.inputs)
    if model.tokenizer is None or model.tokenizer.chat_template is None:
        raise WorkError(f"{args.model} has no chat template, which says who speaks; use any4 generate to continue text")
    cache = cache_for(model, args, cache)
    said = [] if system is None else [{"role": "system", "content": system}]
    for line in _lines():
        said.append({"role": "user", "content": line})
        answer = write(model, model.tokenizer.encode_chat(said), args, cache)
        said.append({"role": "assistant", "content": answer.text})
    return 0


def _lines() -> Iterator[str]:
    """The lines of stdin that aren't blank, until it ends; a prompt is shown where someone types them."""
    typed = sys.stdin.isatty()
    if typed:
        print("A line is a message; Ctrl-D ends.", file=sys.stderr)
    while True:
        if typed:
            print("> ", end="", file=sys.stderr, flush=True)
        raw = sys.stdin.buffer.readline()
        if not raw:
            if typed:
                print(file=sys.stderr)
            return
        if line := decoded(raw, "the message").strip():
            yield line
