"""Files that the package contains, and one that is fetched on demand (`any4_jax.data.assets`)."""

import contextlib
import importlib.resources
from pathlib import Path

from any4_jax.data.pieces import pieces
from any4_jax.data.texts import essays, prompt, prose, stories

__all__ = ["bundled", "essays", "pieces", "prompt", "prose", "stories"]


def bundled(name: str) -> contextlib.AbstractContextManager[Path]:
    """A context manager around the path of a bundled file or folder, such as "stories260k".

    Raises:
        FileNotFoundError: the package has no such file or folder.
    """
    resource = importlib.resources.files(__name__) / name
    if not (resource.is_dir() or resource.is_file()):
        raise FileNotFoundError(f"{__name__} has no bundled data named {name!r}; reinstall the package")
    return importlib.resources.as_file(resource)
