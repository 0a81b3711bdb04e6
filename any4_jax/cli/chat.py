"""`any4 chat`: a conversation with a model that has a chat template."""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from any4_jax.cli.caches import add_cache, cache_for, cache_from
from any4_jax.cli.errors import WorkError
from any4_jax.cli.numbers import count
from any4_jax.cli.output import tell
from any4_jax.cli.sampling import add_sampling, as_found, check_sampling, write
from any4_jax.cli.sources import MODEL_HELP, add_inputs, decoded, given_text, open_model
from any4_jax.generate import Chat
from any4_jax.generate.session import MOST_SLOTS

RESET, QUIT = "/reset", "/quit"


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "chat",
        parents=[common],
        help="talk to a model that has a chat template",
        description="A line of stdin is a message. What was said stays in the cache, so each answer reads the new "
        f"message alone. {RESET} forgets what was said, but for the system message; {QUIT} ends, as does Ctrl-D. With "
        "--json, each answer is an object on a line of its own.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="CKPT_OR_MODEL", help=f"a checkpoint, {MODEL_HELP}")
    parser.add_argument("--system", metavar="TEXT", help="a system message that comes first")
    parser.add_argument(
        "--context",
        type=count,
        metavar="N",
        help=f"the most tokens of a conversation (default: the model's context, at most {MOST_SLOTS})",
    )
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
    chat, refused = Chat(model, system=system, slots=args.context, cache=cache_for(model, args, cache)), 0
    for line in _lines():
        if line == QUIT:
            break
        if line == RESET:
            chat.reset()
        else:
            refused += not _answered(chat, line, args)
    return min(refused, 1)


def _answered(chat: Chat, line: str, args: argparse.Namespace) -> bool:
    """Writes the answer to a message; says so and returns False if there is no room for one."""
    session, ids = chat.session, chat.new_tokens(line)
    used, room = len(session.tokens), session.slots - len(session.tokens) - len(ids)
    if room < 1:
        print(
            f"any4: the conversation has {used} tokens and the message {len(ids)}, and the context of {session.slots} "
            f"holds no answer to it; {RESET} forgets what was said",
            file=sys.stderr,
        )
        return False

    def tokens(**settings: Any) -> Iterator[list[list[int]]]:
        # What follows a stop string would stay in the cache.
        settings |= {"chunk": 1} if args.stop else {}
        return (chunk.tokens for chunk in session.extend(ids, **settings))

    limit = min(args.max_new_tokens, room)
    written = write(session.model, ids, argparse.Namespace(**vars(args) | {"max_new_tokens": limit}), tokens=tokens)
    chat.said(line, written.texts[0])
    tell(lambda: {"message": line} | as_found(written), indent=None)
    if written.tokens == room < args.max_new_tokens:
        print(
            f"any4: the answer ends where the context of {session.slots} tokens is full; {RESET} forgets what was said",
            file=sys.stderr,
        )
    return True


def _lines() -> Iterator[str]:
    """The lines of stdin that aren't blank, until it ends; a prompt is shown where someone types them."""
    typed = sys.stdin.isatty()
    if typed:
        print(f"A line is a message; {RESET} forgets what was said, {QUIT} or Ctrl-D ends.", file=sys.stderr)
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
