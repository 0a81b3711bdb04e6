"""Opens what a command line names: models, checkpoints, texts, output folders."""

from pathlib import Path
from typing import Any

from any4_jax import checkpoint, models
from any4_jax.checkpoint import directory
from any4_jax.cli.errors import WorkError
from any4_jax.data import texts

MODEL_HELP = "a Hugging Face folder or hub id, a GGUF file, or 'tiny' (bundled)"


def is_checkpoint(path: str | Path) -> bool:
    """Whether a path is a checkpoint of this library."""
    return (Path(path) / "any4.json").is_file()


def open_any(name: str) -> Any:
    """The model of a checkpoint, or the float model of any other source that `models.load` takes."""
    return checkpoint.load(name) if is_checkpoint(name) else models.load(name)


def open_model(name: str) -> models.Decoder:
    """As `open_any`, for commands that run a decoder of this library.

    Raises:
      WorkError: it holds another model.
    """
    model = open_any(name)
    if not isinstance(model, models.Decoder):
        raise WorkError(
            f"{name} holds a {type(model).__name__}, and this command needs a decoder of this library; load it in "
            "Python with any4_jax.load"
        )
    return model


def calibration_text(source: str) -> str:
    """The text of a file, or the bundled one for "prompt"."""
    if source == "prompt":
        return texts.prompt()
    return read_text(source)


def read_text(path: str) -> str:
    """The UTF-8 text of a file.

    Raises:
      OSError: it can't be read.
      WorkError: it is not UTF-8, or is empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise WorkError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from error
    if not text.strip():
        raise WorkError(f"{path} holds no text; give a file with at least a few sentences")
    return text


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
