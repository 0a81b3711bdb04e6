"""`any4 generate`: text from a model or checkpoint, printed as it is generated."""

import argparse
import sys
from typing import Any

from any4_jax.cli.caches import add_cache, cache_for, cache_from
from any4_jax.cli.errors import CommandLineError, WorkError
from any4_jax.cli.numbers import count
from any4_jax.cli.output import tell
from any4_jax.cli.sampling import add_sampling, as_found, check_sampling, write
from any4_jax.cli.sources import MODEL_HELP, add_inputs, given_text, open_model, prompt_text
from any4_jax.models import Decoder


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "generate", parents=[common], help="text from a model or checkpoint", allow_abbrev=False
    )
    parser.add_argument("model", metavar="CKPT_OR_MODEL", help=f"a checkpoint, {MODEL_HELP}")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="what to answer, or to continue; - reads it from stdin")
    prompt.add_argument("--prompt-file", metavar="FILE", help="read it from a file, without the newline at its end")
    parser.add_argument(
        "--raw",
        action="store_true",
        help="continue the text as it is; by default, a model that has a chat template answers it",
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message before the prompt, for a chat template")
    add_sampling(parser)
    add_inputs(parser, "the model's")
    add_cache(parser)
    parser.add_argument("--n", type=count, metavar="N", help="so many texts, each sampled on its own (default: 1)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    check_sampling(args)
    cache = cache_from(args)
    if args.raw and args.system is not None:
        raise CommandLineError("got --system with --raw, which continues text without messages; leave one out")
    text = prompt_text(args.prompt, args.prompt_file)
    system = None if args.system is None else given_text(args.system, "the system message")
    model = open_model(args.model, args.inputs)
    answers = model.tokenizer is not None and model.tokenizer.chat_template is not None and not args.raw
    ids = _ids(model, args.model, text, system, answers)
    written = write(model, ids, args, cache_for(model, args, cache), args.n or 1)
    tell(lambda: {"model": args.model, "prompt": text} | as_found(written))
    if not written.tokens:
        advice = "try --raw, which continues the text" if answers else "try another prompt"
        print(f"any4: the model ended at once, without a word; {advice}", file=sys.stderr)
    return 0


def _ids(model: Decoder, name: str, text: str, system: str | None, answers: bool) -> list[int]:
    if model.tokenizer is None:
        raise WorkError(f"{name} has no tokenizer, and a text prompt needs one; add its tokenizer.json")
    if answers:
        before = [] if system is None else [{"role": "system", "content": system}]
        return model.tokenizer.encode_chat([*before, {"role": "user", "content": text}])
    if system is not None:
        raise WorkError(f"{name} has no chat template, and --system needs one; write it into the prompt")
    return model.tokenizer.encode(text)
