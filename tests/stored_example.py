"""A checkpoint for tests of the store: arrays of every dtype and shape, a manifest's content, files."""

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax import checkpoint

DTYPES = [
    *("bool", "int8", "int16", "int32", "uint8", "uint16", "uint32", "float16", "float32", "bfloat16"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "int4", "uint4"),
]
SHAPES = {"matrix": (5, 3), "scalar": (), "empty": (0, 3), "stack": (2, 1, 7)}
CONTENT = {"model": {"layers": 2, "eps": 1e-5, "name": "é"}, "rules": [[".*", None]]}
FILES = {"tokenizer.json": b'{"a": 1}\n', "deep/er/merges.txt": b"", "raw.bin": bytes(range(256))}


def example(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        f"layers.0.q_proj/{dtype}/{label}": rng.integers(0, 7, shape).astype(jnp.dtype(dtype))
        for dtype in DTYPES
        for label, shape in SHAPES.items()
    }


def assert_equal(found, wanted):
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert np.asarray(found[name]).tobytes() == np.asarray(array).tobytes(), name


def data_directory(root: Path) -> Path:
    (data,) = root.glob("data-*")
    return data


@pytest.fixture(name="saved", scope="module")
def saved_checkpoint(tmp_path_factory):
    """A checkpoint that tests only read, or copy before they damage it."""
    root = tmp_path_factory.mktemp("saved") / "ckpt"
    checkpoint.write(root, example(), CONTENT, FILES)
    return root


@pytest.fixture(name="copied")
def copied_checkpoint(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "ckpt"))
