"""`load`: one entry point for every kind of model source."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from jax.typing import DTypeLike

from any4_jax.data import assets
from any4_jax.models.base import Decoder
from any4_jax.models.gguf_reader import read_gguf
from any4_jax.models.hf import from_tensors, load_folder
from any4_jax.models.tiny import tiny
from any4_jax.one_line import one_line

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def load(source: str | Path, *, dtype: DTypeLike | None = None) -> Decoder:
    """A decoder on the default device, with its tokenizer in `.tokenizer` (None if the source has none).

    Args:
        source: a Hugging Face folder (config.json, safetensors), a .gguf file, a hub id "org/name", "tiny" for the
            bundled model of 260,000 parameters, or "smollm2" for SmolLM2-135M-Instruct, which is fetched once (93 MB,
            said on stderr) and checked by its hash each time. A path that exists takes precedence over a name of the
            same spelling.
        dtype: of all weights and activations; None keeps the stored float32, float16 or bfloat16, and dequantizes
            quantized GGUF tensors to float32.

    Raises:
        FileNotFoundError: nothing is there, or one of its files is missing.
        ConnectionError: the source is a hub id, and the hub didn't provide it.
        any4_jax.data.assets.AssetUnavailable: the source is "smollm2", and it can't be fetched.
        ValueError: the model is damaged, or of an unsupported kind; the message says what.
    """
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return load_folder(path, dtype)
    if path.is_file():
        return _load_file(path, dtype)
    if str(source) in NAMED:
        return NAMED[str(source)](dtype)
    if isinstance(source, str) and _HUB_ID.fullmatch(source) and path.suffix != ".gguf":
        return load_folder(_snapshot(source), dtype)
    raise FileNotFoundError(
        f"{source} is not a file or folder here; give a Hugging Face folder, a .gguf file, a hub id org/name, "
        f"or {' or '.join(NAMED)}"
    )


def _load_file(path: Path, dtype: DTypeLike | None) -> Decoder:
    if path.suffix.lower() != ".gguf":
        raise ValueError(f"{path} is not a .gguf file; give the folder that holds config.json and the safetensors")
    config, tensors, tokenizer = read_gguf(path)
    model = from_tensors(config, tensors, dtype)
    model.tokenizer = tokenizer
    return model


def _smollm2(dtype: DTypeLike | None) -> Decoder:
    return _load_file(assets.fetch_smollm2(), dtype)


NAMED: dict[str, Callable[[DTypeLike | None], Decoder]] = {"tiny": tiny, "smollm2": _smollm2}
"""Models that have a name instead of a place."""


def _snapshot(repository: str) -> Path:
    """The local copy of a hub repository's JSON, safetensors and template files, downloaded if needed."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConnectionError(
            f"{repository} is not a folder here, and a hub id needs the huggingface_hub package; install it"
        ) from error
    try:
        # Subfolders hold other formats of the same weights, and code files are never wanted.
        return Path(
            huggingface_hub.snapshot_download(
                repository, allow_patterns=["*.safetensors", "*.json", "*.jinja", "merges.txt"], ignore_patterns=["*/*"]
            )
        )
    except Exception as error:  # the hub's client lets its HTTP library's own exceptions through
        reason = one_line(str(error).strip().partition("\n")[0]) or type(error).__name__
        raise ConnectionError(
            f"{repository} is not a folder here, and the hub did not provide it ({reason}); "
            "check the name and the network, or give a local folder"
        ) from error
