"""What a case may end in: a sound result, or one sentence. All else is a finding."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

import any4_jax as a4
from any4_jax.cli import main
from any4_jax.models import Decoder

LENGTH = 700
"""Characters of the longest sentence. The path of the file is not counted."""
TOKENS = np.array([[0, 1, 2]], np.int32)
LARGE = 1e3
"""Products of larger weights may overflow float16."""


class Finding(Exception):
    """What no input may lead to."""


class Refused(Exception):
    """A command refused its input as it should."""


class Case(NamedTuple):
    """One input.

    Attributes:
        words: what was changed.
        folder: its files.
        names: texts of which a refusal holds one; none needed if empty.
        run: returns the result in words; raises what the library raises, or a `Finding`.
    """

    words: str
    folder: Path
    names: tuple[str, ...]
    run: Callable[[], str]


def judged(case: Case) -> tuple[str, str]:
    """("result", "refused" or "finding", in words)."""
    try:
        return "result", case.run()
    except Finding as finding:
        return "finding", str(finding)
    except Refused as refused:
        return "refused", str(refused)
    except (ValueError, TypeError, OSError) as error:
        wrong = fault(error, case.folder)
        if wrong is None and case.names and not any(name in str(error) for name in case.names):
            wrong = f"names none of {', '.join(case.names)[:200]}"
        said = f"{type(error).__name__}: {error}"
        return ("refused", said) if wrong is None else ("finding", f"{wrong}: {said[:1500]!r}")
    except Exception as error:
        return "finding", f"{type(error).__name__}: {str(error)[:1500]!r}"


def fault(error: BaseException, folder: Path) -> str | None:
    """What is wrong with a refusal."""
    text = str(error).replace(str(folder), "")
    if not text:
        return "says nothing"
    if not text.isprintable():
        return "is not one printable line"
    if len(text) > LENGTH:
        return f"has {len(text)} characters"
    return None


def refusals(*attempts: Callable[[], Any], folder: Path) -> None:
    """Each attempt works or is refused in one sentence."""
    for attempt in attempts:
        try:
            attempt()
        except (ValueError, TypeError) as error:
            if wrong := fault(error, folder):
                raise Finding(f"{wrong}: {type(error).__name__}: {str(error)[:1500]!r}") from error


def load_and_run(path: Path, forward: bool, folder: Path) -> str:
    """Loads a model and uses all of it."""
    model = a4.models.load(path)
    if not isinstance(model, Decoder):
        raise Finding(f"load gave a {type(model).__name__}")
    return use(model, forward, folder)


def use(model: Decoder, forward: bool, folder: Path) -> str:
    """Uses the tokenizer and, if asked for, the model."""
    if model.tokenizer is not None:
        use_tokenizer(model.tokenizer, folder)
    if not forward:
        return "a model"
    logits = np.asarray(model(TOKENS))
    if logits.shape != (1, 3, model.config.vocab_size) or logits.dtype != np.float32:
        raise Finding(f"logits are {logits.dtype} {logits.shape}, and vocab_size is {model.config.vocab_size}")
    if np.isfinite(logits).all():
        return "finite logits"
    if not extreme(model):
        raise Finding(f"logits aren't finite, and the weights are tame; config {model.config}")
    # One token that can't be taken, at -infinity, leaves the others.
    if np.isfinite(logits[0, -1].max()):
        return "logits of extreme weights"
    try:
        a4.generate(model, [TOKENS[0].tolist()], max_new_tokens=1)
    except ValueError as error:
        if wrong := fault(error, folder):
            raise Finding(f"generate: {wrong}: {error}") from error
        return "generate says that the logits aren't finite"
    raise Finding("generate takes a token from logits that aren't finite")


def extreme(model: Decoder) -> bool:
    """Whether a weight is NaN, infinite, or so large that products of several overflow."""
    for leaf in jax.tree.leaves(nnx.state(model)):
        values = np.asarray(leaf)
        if values.dtype.kind not in "iub" and not (np.abs(values.astype(np.float32)) < LARGE).all():
            return True
    return False


def use_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Text to ids and back, and a chat."""

    def there_and_back(**options: Any) -> None:
        ids = tokenizer.encode("the hat", **options)
        if not all(type(index) is int and index >= 0 for index in ids):
            raise Finding(f"ids are {ids}")
        if not isinstance(tokenizer.decode(ids), str):
            raise Finding("decode gave no text")

    def chat() -> None:
        if not all(type(i) is int for i in tokenizer.encode_chat([{"role": "user", "content": "hi"}])):
            raise Finding("ids of a chat are no ints")

    refusals(there_and_back, lambda: there_and_back(add_bos=True), folder=folder)
    if tokenizer.chat_template is not None:
        refusals(chat, folder=folder)
    if not all(type(index) is int for index in tokenizer.eos_ids):
        raise Finding(f"eos_ids are {tokenizer.eos_ids}")


def command(arguments: Sequence[str], folder: Path) -> str:
    """Runs a command in this process.

    Raises:
        Refused: it failed, with one line on stderr and its exit code.
        Finding: all else that is not success.
    """
    out, err = io.StringIO(), io.StringIO()
    stdin = sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(b"the hat\n"))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(folder):
            code = main(list(arguments))
    finally:
        sys.stdin = stdin
    text = err.getvalue().replace("\r", "\n")
    lines = text.split("\n")[:-1]
    errors = [line for line in lines if line.startswith("any4: error: ")]
    shown = f"exit {code}, stderr {text[-1200:]!r}"
    if "Traceback" in text and "--debug" not in arguments or "--debug for the traceback" in text:
        raise Finding(f"an exception without a sentence: {shown}")
    if code == 0:
        if errors:
            raise Finding(f"an error and no exit code: {shown}")
        return "exit 0"
    if code not in (1, 2):
        raise Finding(shown)
    if len(errors) != 1 or lines[-1] != errors[0]:
        raise Finding(f"not one line of error at the end: {shown}")
    if wrong := fault(ValueError(errors[0]), folder):
        raise Finding(f"{wrong}: {shown}")
    raise Refused(f"exit {code}: {errors[0]}")
