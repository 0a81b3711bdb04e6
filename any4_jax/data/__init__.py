"""Files that travel inside the package, and one that is fetched on demand (`any4_jax.data.assets`)."""

import contextlib
import importlib.resources
from pathlib import Path

from any4_jax.data.texts import essays, prompt, stories

__all__ = ["bundled", "essays", "prompt", "stories"]


def bundled(name: str) -> contextlib.AbstractContextManager[Path]:
    """A context manager around the path of a bundled file or folder, such as "stories260k".

    Raises:
        FileNotFoundError: the package holds nothing of this name.
    """
    resource = importlib.resources.files(__name__) / name
    if not (resource.is_dir() or resource.is_file()):
        raise FileNotFoundError(f"no bundled data named {name!r} is in {__name__}; reinstall the package")
    return importlib.resources.as_file(resource)
