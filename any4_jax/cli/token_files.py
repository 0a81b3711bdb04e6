"""Local files as streams of tokens: texts, texts in JSON lines, token ids."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from any4_jax.cli.errors import WorkError
from any4_jax.cli.sources import read_text
from any4_jax.evaluation import Tokens, bos_rule

FILES_HELP = (
    "a text in UTF-8; or, if its name ends in .jsonl, a document a line, which are joined by blank lines; or in .npy, "
    "a row of token ids"
)


def read_tokens(path: str, tokenizer: Any, field: str) -> Tokens:
    """The tokens of a file; see FILES_HELP. A text is tokenized once, as a whole.

    Args:
      path: of the file.
      tokenizer: of the model, or None.
      field: of each line of a .jsonl file, that holds its text.

    Raises:
      OSError: it can't be read.
      WorkError: it doesn't hold what its name says, or there is no tokenizer for a text.
    """
    if path.endswith(".npy"):
        return Tokens.of(_ids(path), file=path, rule="tokens", bos="as in the file")
    if tokenizer is None:
        raise WorkError(f"{path} is a text, and the model has no tokenizer; give token ids in a .npy file")
    text, facts = read_text(path), {}
    if path.endswith(".jsonl"):
        documents = _documents(text, path, field)
        text, facts = "\n\n".join(documents), {"field": field, "documents": len(documents)}
    return Tokens.of(tokenizer.encode(text), file=path, rule="joined", bos=bos_rule(tokenizer), **facts)


def _ids(path: str) -> np.ndarray:
    with open(path, "rb") as file:
        try:
            ids = np.load(file, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise WorkError(f"{path} can't be read ({error}); write it with numpy.save, without objects") from error
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        found = f"{ids.dtype} of shape {ids.shape}" if isinstance(ids, np.ndarray) else "an archive"
        raise WorkError(f"{path} holds {found}, and one row of integer token ids is needed; save such a row")
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < 2**31:
        raise WorkError(f"{path} holds ids from {ids.min()} to {ids.max()}, and token ids are needed; save such")
    return ids


def _documents(text: str, path: str, field: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except ValueError as error:
            raise WorkError(f"{Path(path).name}, line {number}, is not JSON ({error}); fix it") from error
        if not isinstance(document, dict) or not isinstance(document.get(field), str):
            raise WorkError(
                f"{Path(path).name}, line {number}, has no text {field!r}; write objects that have it, or name another "
                "with --field"
            )
        documents.append(document[field])
    return documents
