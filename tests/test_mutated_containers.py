"""Cut and mutated GGUF and safetensors files: each is read, or refused in one sentence, in little memory."""

import json
import random
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from any4_jax.models.gguf_file import GGUFFile
from any4_jax.models.safetensors_reader import INDEX, SafetensorsFolder

MUTATIONS = 100
FIRST, SECOND = "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"


def write_gguf(folder: Path) -> list[str]:
    """A small model in two parts, with values of most types; returns its files."""
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=2)
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.eps", 1e-5)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "a", "\u00e9"])
    writer.add_array("tokenizer.ggml.token_type", [3, 1, 1])
    rows = np.ones((2, 32), np.float32)
    for name, kind in (("a", "Q4_0"), ("b", "F16"), ("c", "F32")):
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(rows, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]


def write_safetensors(folder: Path) -> list[str]:
    save_file({"a": np.ones((2, 4), np.float32), "b": np.ones(4, np.float16)}, folder / FIRST)
    save_file({"c": np.ones(4, np.int8)}, folder / SECOND)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": FIRST, "b": FIRST, "c": SECOND}}))
    return [FIRST, SECOND, INDEX]


def cuts(content: bytes) -> Iterator[bytes]:
    return (content[:size] for size in range(len(content)))


def mutations(content: bytes) -> Iterator[bytes]:
    """Of each file; one byte becomes another, most often one that matters to a number, a length or to JSON."""
    draw = random.Random(0)
    for _ in range(MUTATIONS):
        at = draw.randrange(len(content))
        old = content[at]
        new = draw.choice([0, 1, 255, old ^ 1 << draw.randrange(8), draw.randrange(256), draw.choice(b'"{}[]:,-0e')])
        yield content[:at] + bytes([new]) + content[at + 1 :]


def outcome(read: Callable[[], Mapping[str, np.ndarray]]) -> str | None:
    """The sentence with which the tensors are refused; None if all of them are read."""
    try:
        for array in read().values():
            assert isinstance(array, np.ndarray)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("change", [cuts, mutations])
@pytest.mark.parametrize(
    "write, read",
    [
        (write_gguf, lambda folder: GGUFFile(folder / "m-00001-of-00002.gguf")),
        (write_safetensors, SafetensorsFolder),
    ],
    ids=["gguf", "safetensors"],
)
def test_changed_bytes_give_tensors_or_one_sentence(
    tmp_path: Path, write: Callable[[Path], list[str]], read: Callable[[Path], Mapping], change: Callable
) -> None:
    names = write(tmp_path)
    assert outcome(lambda: read(tmp_path)) is None
    size = sum((tmp_path / name).stat().st_size for name in names)
    refused = 0
    if change is mutations:
        tracemalloc.start()
    for name in names:
        whole = (tmp_path / name).read_bytes()
        for content in change(whole):
            (tmp_path / name).write_bytes(content)
            sentence = outcome(lambda: read(tmp_path))
            if sentence is None:
                assert change is mutations, f"a file cut to {len(content)} of {len(whole)} bytes is taken for whole"
                continue
            refused += 1
            assert sentence
            assert sentence.isprintable()
            assert len(sentence) < 1000
            assert str(tmp_path) in sentence
        (tmp_path / name).write_bytes(whole)
    if change is mutations:
        _, peak = tracemalloc.get_traced_memory()
        # The buffers and messages of any opened file come on top of what is read.
        assert peak < 2 * size + 2**20
    tracemalloc.stop()
    assert refused
