"""`any4 completion`: a script with which a shell completes commands and flags."""

import argparse
from collections.abc import Iterator
from typing import Any

from any4_jax.cli.output import tell
from any4_jax.methods import CATALOGUE

_BASH = """\
# Completion of any4: source <(any4 completion SHELL)
_any4() {
  local words="${COMP_WORDS[*]:1:COMP_CWORD-1} " word="${COMP_WORDS[COMP_CWORD]}" found= files=-f
  case "$words" in
%(cases)s
  esac
  case "${COMP_WORDS[COMP_CWORD-1]}" in
%(values)s
  esac
  [[ "$word" == -* || "$words" == " " ]] && files=
  [[ "$word" == -* ]] || found=" $(tr ' ' '\n' <<<"$found" | grep -v '^-' | tr '\n' ' ')"
  COMPREPLY=($(compgen $files -W "$found" -- "$word"))
}
complete -o filenames -F _any4 any4
"""
_ZSH = "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n"


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "completion",
        parents=[common],
        help="a script with which a shell completes commands and flags",
        epilog='In ~/.bashrc or ~/.zshrc: eval "$(any4 completion bash)", or zsh. It starts Python once per shell; to '
        "avoid this, write its output to a file and source that.",
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    text = (_ZSH if args.shell == "zsh" else "") + script()
    print(text, end="")
    tell(lambda: {"shell": args.shell, "script": text})
    return 0


def script() -> str:
    """The script for bash, with the flags that commands have for any method of the catalogue."""
    from any4_jax.cli.commands import parser_of

    offered: dict[str, dict[str, None]] = {}
    values: dict[str, dict[str, None]] = {}
    for method in sorted(CATALOGUE):
        for words, parser in _parsers(parser_of(["--method", method])):
            for action in parser._actions:
                names = offered.setdefault(words, {})
                if isinstance(action, argparse._SubParsersAction):
                    names.update(dict.fromkeys(action.choices))
                names.update(dict.fromkeys(action.option_strings))
                for flag in action.option_strings:
                    if action.choices:
                        values.setdefault(flag, {}).update(dict.fromkeys(map(str, action.choices)))
    # The longest first: "bench gemm" before "bench", and the bare command last.
    cases = (f'    {_pattern(words)}) found="{" ".join(offered[words])}" ;;' for words in sorted(offered, key=_depth))
    chosen = (f'    {flag}) found="{" ".join(names)}" files= ;;' for flag, names in sorted(values.items()))
    return _BASH % {"cases": "\n".join(cases), "values": "\n".join(chosen)}


def _parsers(parser: argparse.ArgumentParser, words: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Each parser below this one, with the words that lead to it."""
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from _parsers(inner, f"{words} {name}".strip())


def _depth(words: str) -> int:
    return -len(words.split())


def _pattern(words: str) -> str:
    return f'"{words} "*' if words else "*"
