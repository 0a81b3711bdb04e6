"""The kinds of cases. A case is known by its kind and number: the same pair makes the same case."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from flax import nnx
from float_models import NNXNet

import any4_jax as a4
from any4_jax.checkpoint import manifest as manifests
from any4_jax.models import Decoder
from fuzz import commands
from fuzz.containers import change_gguf, change_safetensors
from fuzz.judge import Case, Finding, load_and_run, use
from fuzz.mutations import Changed, change_bytes, change_json, change_value, to_json
from fuzz.originals import TEMPLATE

FORWARD = 0.25
"""The share of the models that are run; the others are only loaded."""
_INSERTED = (
    *("{{ messages }}", "{{ 10**10**10 }}", "{% for i in range(10**9) %}{% endfor %}", "{{ x.y.z }}", "{% if %}"),
    *("{{ raise_exception('no\nway') }}", "{{ ''.__class__ }}", "{{ 1/0 }}", "{{", "{{ messages[7] }}", "\0"),
    *("{{ 'a' * 10**9 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages | tojson }}", "(" * 3000),
    *("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "{% include 'x' %}", "{{ strftime_now(1) }}", "{{ bos_token() }}"),
)
# Messages repeat a path as it is given, so these can be printed.
_PIECES = ("", "/", "//", "..", "/..", "~", "~x/", " ", "y" * 300, ".gguf", "a/b", "%", "/dev/null")
_NESTED_IFS = "{% if true %}" * 500 + "{% endif %}" * 500


def copied(original: Path, folder: Path) -> Path:
    """A copy whose unchanged files are links."""
    target = folder / original.name
    shutil.copytree(original, target, copy_function=os.link)
    return target


def put(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def change_file(path: Path, draw: Random, change: Callable[[bytes, Random], Changed]) -> tuple[str, tuple[str, ...]]:
    """Changes a file; returns the words, and the names that a refusal may use."""
    if draw.random() < 0.03:
        words = draw.choice(("missing", "a folder", "a pipe", "empty", "a loop"))
        path.unlink()
        if words == "a folder":
            path.mkdir()
        elif words == "a pipe":
            os.mkfifo(path)
        elif words == "empty":
            path.touch()
        elif words == "a loop":
            path.symlink_to(path.name)
        return f"{path.name} is {words}", (path.name,)
    changed = change(path.read_bytes(), draw)
    if draw.random() < 0.3:
        with contextlib.suppress(Exception):  # the first change left nothing that can be taken apart
            second = change(changed.content, draw)
            changed = Changed(second.content, f"{changed.words}; {second.words}", changed.keys + second.keys)
    put(path, changed.content)
    keys = [key for key in changed.keys if not key.isdigit() and len(key) > 3]
    return f"{path.name}: {changed.words}", (path.name, str(path.parent), *keys)


def config(draw: Random, originals: Path, folder: Path) -> Case:
    """config.json of a family."""
    variant = draw.choice(sorted((originals / "configs").iterdir()))
    place = copied(draw.choice(sorted(variant.iterdir())), folder)
    words, names = change_file(place / "config.json", draw, change_json)
    # These are the words of config.json, which messages use instead of its name.
    names = (*names, "config", "architecture", "hidden_act", "rope", "quantized", "num_", "head_dim", "activation")
    forward = draw.random() < FORWARD
    return Case(f"{variant.name}: {words}", folder, names, lambda: load_and_run(place, forward, folder))


def folder(draw: Random, originals: Path, folder: Path) -> Case:
    """The other files of a Hugging Face folder."""
    original = draw.choice(sorted((originals / "folders").iterdir()))
    place = copied(original, folder)
    name = draw.choice(sorted(path.name for path in place.iterdir() if path.suffix != ".safetensors"))
    change = {".json": change_json, ".jinja": change_template}.get(Path(name).suffix, change_bytes)
    if name == "chat_template.json" and (place / "chat_template.jinja").exists():
        (place / "chat_template.jinja").unlink()
    words, names = change_file(place / name, draw, change)
    forward = draw.random() < FORWARD / 4
    return Case(f"{original.name}: {words}", folder, names, lambda: load_and_run(place, forward, folder))


def change_template(content: bytes, draw: Random) -> Changed:
    """A chat template with another piece, or changed bytes."""
    if draw.random() < 0.3:
        return change_bytes(content, draw)
    at = draw.choice([0, len(TEMPLATE), draw.randrange(len(TEMPLATE))])
    piece = draw.choice((*_INSERTED, _NESTED_IFS))
    return Changed((TEMPLATE[:at] + piece + TEMPLATE[at:]).encode(), f"{piece[:40]!r} at {at}")


def safetensors(draw: Random, originals: Path, folder: Path) -> Case:
    """The weights of a Hugging Face folder: the header, or any byte."""
    if draw.random() < 0.5:
        original = originals / "folders" / "llama"
    else:
        original = draw.choice(sorted((originals / "configs").iterdir())) / "transformers4"
    place = copied(original, folder)
    path = draw.choice(sorted(place.glob("*.safetensors")))
    words, names = change_file(path, draw, change_safetensors)
    forward = draw.random() < 2 * FORWARD
    return Case(words, folder, (*names, "tensor"), lambda: load_and_run(place, forward, folder))


def gguf(draw: Random, originals: Path, folder: Path) -> Case:
    """A GGUF file: a value of the header, or any byte."""
    original = draw.choice(sorted((originals / "ggufs").iterdir()))
    path = folder / original.name
    shutil.copy(original, path)
    words, names = change_file(path, draw, change_gguf)
    forward = draw.random() < FORWARD
    names = (*names, "tensor", "tokenizer", "GGUF", "num_", "config")
    return Case(f"{original.name}: {words}", folder, names, lambda: load_and_run(path, forward, folder))


def checkpoint(draw: Random, originals: Path, folder: Path) -> Case:
    """A checkpoint: its manifest, with a right digest most often, or any byte of any file."""
    original = draw.choice(sorted((originals / "checkpoints").iterdir()))
    place = copied(original, folder)
    if draw.random() < 0.7:
        words, _ = change_file(place / "any4.json", draw, change_manifest)
    else:
        path = draw.choice(sorted(path for path in place.rglob("*") if path.is_file()))
        words, _ = change_file(path, draw, change_bytes)
    into = nnx.eval_shape(lambda: NNXNet(nnx.Rngs(1))) if original.name == "nnx_lora" and draw.random() < 0.7 else None
    forward = draw.random() < FORWARD

    def run() -> str:
        loaded = a4.load(place, into=into)
        if into is not None and not isinstance(loaded, NNXNet) or original.name == "own" and loaded is None:
            raise Finding(f"load gave a {type(loaded).__name__}")
        return use(loaded, forward, folder) if isinstance(loaded, Decoder) else "contents"

    return Case(f"{original.name}: {words}", folder, (), run)


def change_manifest(content: bytes, draw: Random) -> Changed:
    """A manifest with one changed value, and with the digest that it would have."""
    body = json.loads(content)
    if draw.random() < 0.1:
        return change_json(content, draw)
    del body["sha256"]
    # Most of a manifest are digests of files.
    key = draw.choice(("content",) * 6 + tuple(sorted(body)))
    changed = change_value({key: body[key]}, draw)
    body = {other: value for other, value in body.items() if other != key} | changed.content
    try:
        digest = manifests._digest(body)
        return changed._replace(content=to_json(body | {"sha256": digest}, manifests._text))
    except ValueError:  # NaN or infinite
        return changed._replace(content=to_json(body))


def path(draw: Random, originals: Path, folder: Path) -> Case:
    """What is given as a path."""
    for name in ("folders/llama", "checkpoints/decoder", "ggufs", "configs/opt/transformers4"):
        shutil.copytree(originals / name, folder / Path(name).name, copy_function=os.link)
    os.mkfifo(folder / "pipe.gguf")
    (folder / "empty.gguf").touch()
    (folder / "loop.gguf").symlink_to("loop.gguf")
    inside = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    text = str(draw.choice(inside))
    at = draw.randrange(len(text))
    piece = draw.choice((*_PIECES, text[::-1]))
    words = draw.choice([text, text[:at] + piece + text[at:], piece, text[:at]])
    given: Any = draw.choice([words, str(folder / words), None, 7, b"x", [], Path(words), folder / words, folder])
    load = draw.choice([a4.load, a4.models.load])

    def run() -> str:
        with contextlib.chdir(folder):
            loaded = load(given)
        return use(loaded, False, folder) if isinstance(loaded, Decoder) else "contents"

    return Case(f"{load.__module__}.load of {given!r}"[:200], folder, (), run)


def cli(draw: Random, originals: Path, folder: Path) -> Case:
    """A command line, whose model may be changed too."""
    return commands.case(draw, originals, folder, {"gguf": gguf, "folder": folder_of, "checkpoint": checkpoint})


folder_of = folder

KINDS: dict[str, Callable[[Random, Path, Path], Case]] = {
    "config": config,
    "folder": folder,
    "safetensors": safetensors,
    "gguf": gguf,
    "checkpoint": checkpoint,
    "path": path,
    "cli": cli,
}


def case(kind: str, number: int, originals: Path, folder: Path) -> Case:
    """The case of a kind and number, its files in the folder."""
    return KINDS[kind](Random(f"{kind} {number}"), originals, folder)
