"""What a command line names: models, checkpoints, texts, output folders."""

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
    """What a checkpoint holds, or the float model of anything else that `models.load` takes."""
    return checkpoint.load(name) if is_checkpoint(name) else models.load(name)


def open_model(name: str) -> models.Decoder:
    """The same, for commands that run a decoder of this library."""
    model = open_any(name)
    if not isinstance(model, models.Decoder):
        raise WorkError(
            f"{name} holds a {type(model).__name__}, and this command runs a decoder of this library; load it in "
            "Python, with any4_jax.load"
        )
    return model


def calibration_text(source: str) -> str:
    """The text of a file, or the bundled one for "prompt"."""
    if source == "prompt":
        return texts.prompt()
    return read_text(source)


def read_text(path: str) -> str:
    """The UTF-8 text of a file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise WorkError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start}); convert it first") from error
    if not text.strip():
        raise WorkError(f"{path} holds no text; give a file with at least a few sentences")
    return text


def check_output(path: str) -> None:
    """Refuses an output folder that the save at the end would refuse, before the work is done.

    Raises:
      OSError: it holds other things, is a file, or can't be made.
    """
    out = Path(path)
    made = not out.exists()
    with directory.locked(out):
        pass
    if made:
        out.rmdir()
