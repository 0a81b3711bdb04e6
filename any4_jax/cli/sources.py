"""Opens what a command line names: models, checkpoints, texts, output folders."""

import argparse
import os
import stat
import sys
from pathlib import Path
from typing import Any

from any4_jax import checkpoint, models
from any4_jax.checkpoint import directory
from any4_jax.cli.errors import CommandLineError, WorkError
from any4_jax.data import texts
from any4_jax.surgery import quantize_inputs

MODEL_HELP = "a Hugging Face folder or hub id, a GGUF file, 'tiny' (bundled), or 'smollm2' (93 MB, fetched once)"


def is_checkpoint(path: str | Path) -> bool:
    """Whether a path is a checkpoint of this library."""
    return (Path(path) / "any4.json").is_file()


def open_any(name: str) -> Any:
    """The model of a checkpoint, or the float model of any other source that `models.load` takes."""
    return checkpoint.load(name) if is_checkpoint(name) else models.load(name)


def add_inputs(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds --inputs; `what` says what the command does with it."""
    parser.add_argument(
        "--inputs",
        choices=("int8",),
        help=f"{what} layers of int8 tables or integers round their inputs to 8 bits, a scale for each 32, which a CPU "
        "multiplies faster (default: as it was saved)",
    )


def open_model(name: str, inputs: str | None = None) -> models.Decoder:
    """As `open_any`, for commands that run a decoder of this library.

    Args:
      name: see `open_any`.
      inputs: the value of --inputs.

    Raises:
      WorkError: it holds another model.
      ValueError: its layers can't round their inputs.
    """
    model = open_any(name)
    if not isinstance(model, models.Decoder):
        raise WorkError(
            f"{name} holds a {type(model).__name__}, and this command needs a decoder of this library; load it in "
            "Python with any4_jax.load"
        )
    return model if inputs is None else quantize_inputs(model)


def calibration_text(source: str) -> str:
    """The text of a file, the bundled prompt for "prompt", or the bundled essays and stories for "essays"."""
    if source == "prompt":
        return texts.prompt()
    if source == "essays":
        return texts.prose()
    return read_text(source)


def read_text(path: str) -> str:
    """The UTF-8 text of a file.

    Raises:
      OSError: it can't be read.
      WorkError: it is not UTF-8, or is empty.
    """
    text = decoded(_content(path), path)
    if not text.strip():
        raise WorkError(f"{path} holds no text; give a file with at least a few sentences")
    return text


def prompt_text(given: str | None, file: str | None) -> str:
    """The text of --prompt, or of stdin if that is "-", or of --prompt-file; those two without a newline at the end.

    Raises:
      OSError: the file can't be read.
      WorkError: it is not UTF-8.
      CommandLineError: it is empty.
    """
    if file is not None:
        text = decoded(_content(file), file).removesuffix("\n")
    elif given == "-":
        text = decoded(sys.stdin.buffer.read(), "the prompt on stdin").removesuffix("\n")
    else:
        text = given_text(given or "", "the prompt")
    if not text:
        raise CommandLineError("the prompt is empty; pass at least one character")
    return text


def given_text(text: str, name: str) -> str:
    """A text of the command line, if it is UTF-8: Python passes other bytes on as surrogates, which no tokenizer takes.

    Raises:
      WorkError: it is not.
    """
    decoded(text.encode("utf-8", "surrogateescape"), name)
    return text


def _content(path: str) -> bytes:
    """The bytes of a file or of a pipe, but of no device other than a terminal: /dev/zero has no end."""
    with open(path, "rb") as file:
        if stat.S_ISCHR(os.fstat(file.fileno()).st_mode) and not file.isatty():
            raise WorkError(f"{path} is a device, and a file or a pipe is needed; give one that holds text")
        return file.read()


def decoded(raw: bytes, name: str) -> str:
    """The text of UTF-8 bytes, with each end of a line as "\\n".

    Raises:
      WorkError: they are not UTF-8.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise WorkError(f"{name} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def check_output(path: str) -> None:
    """Refuses, before the work, an output folder that the save at the end would refuse.

    Raises:
      OSError: it holds something other than a checkpoint, is a file, or can't be created.
    """
    out = Path(path)
    made = not out.exists()
    with directory.locked(out):
        pass
    if made:
        out.rmdir()
