"""Command lines with changed words, whose models may be changed too."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random

from fuzz.judge import Case, command

# M is a GGUF file, C a checkpoint, T a text, F a folder of Hugging Face.
_LINES = tuple(
    line.split(" ")
    for line in (
        "generate M --prompt the --max-new-tokens 2",
        "generate C --prompt - --raw --max-new-tokens 2 --temperature 0.5 --top-k 3 --seed 1",
        "generate F --prompt-file T --system be --max-new-tokens 2 --stop x --top-p 0.5 --temperature 1",
        "generate C --prompt the --max-new-tokens 2 --n 2 --temperature 1 --min-p 0.1 --frequency-penalty 1",
        "generate M --prompt the --max-new-tokens 2 --repetition-penalty 1.1 --presence-penalty 1",
        "quantize M out --calibrate none --method int --bits 4 --group-size 8",
        "quantize M out --calibrate T --method any4 --group-size 8",
        "quantize F out --method nf4 --calibrate none --rules .*o_proj=none --no-resume",
        "quantize F out --calibrate T --method int --group-size 8 --scale-dtype float16 --rules embed_tokens=int8",
        "eval M --text T --seqlen 16 --windows 1 --out out.json",
        "eval C --text T --seqlen 8",
        "inspect C",
        "inspect C --debug",
        "explain C --rows 2",
        "explain M",
        "chat F --system be --max-new-tokens 2",
        "bench decode M --tokens 2 --contexts 3 --rounds 1",
        "bench gemm --shapes 16x32 --m 1 --bits 4 --group-size 16 --rounds 1 --rotate-mb 1",
        "bench quantize --shape smollm2-135m --matrices x --rounds 1",
        "completion bash",
        "--version",
        "--import json inspect C",
    )
)
# Letter -> the kind of case that changes it, and the original.
_ORIGINALS = {
    "M": ("gguf", "ggufs/gguf_llama.gguf"),
    "F": ("folder", "folders/llama"),
    "C": ("checkpoint", "checkpoints/decoder"),
}
_WORDS = (
    *("", " ", "x", "-1", "0", "1", "2", "7", "64", "100000", "2147483647", "2147483648", "9" * 400, "1e308", "1e-400"),
    *("nan", "inf", "-inf", "-0.0", "0x10", "1_0", "None", "none", "True", "[]", "{}", "a\nb", "\udcff", "\u0663"),
    *("\0", "/", ".", "..", "/dev/null", "/dev/zero", "missing", "missing.gguf", "y" * 5000, "=", "--", "-", "--x"),
    *("-h", "%s", "%(x)s", "(", "*=int", "a=b", ".*=int4", "int", "any4", "tiny", "org/name", "bfloat16", "int8", "T"),
    *("M", "C", "F", "T/x", "C/any4.json", "F/config.json", "out", "decode", "float64", "S32", "object", "prompt"),
)


def case(
    draw: Random,
    originals: Path,
    folder: Path,
    changes: Mapping[str, Callable[[Random, Path, Path], Case]],
) -> Case:
    """A command line with up to two changes, or a right one about a changed model."""
    (folder / "T").write_text("the hat is in the sea, and that is it. " * 8)
    line = list(draw.choice(_LINES))
    words = ""
    changed = draw.choice([word for word in line if word in _ORIGINALS] or [None]) if draw.random() < 0.4 else None
    for letter, (kind, original) in _ORIGINALS.items():
        if letter == changed:
            inner = changes[kind](draw, originals, folder)
            words = inner.words
            for path in {*folder.iterdir()} - {folder / name for name in (*_ORIGINALS, "T")}:
                path.rename(folder / letter)
        elif (originals / original).is_dir():
            shutil.copytree(originals / original, folder / letter, copy_function=os.link)
        else:
            shutil.copy(originals / original, folder / letter)
    if os.path.lexists(folder / "M"):
        (folder / "M").rename(folder / "M.gguf")
    if not words or draw.random() < 0.3:
        for _ in range(draw.choice((1, 1, 2))):
            line = change_line(line, draw)
    line = ["M.gguf" if word == "M" else word for word in line]
    return Case(f"any4 {' '.join(line)}"[:300] + f" ({words})" * bool(words), folder, (), lambda: command(line, folder))


def change_line(line: list[str], draw: Random) -> list[str]:
    """A command line with one word more, less, other or elsewhere."""
    line = list(line)
    at = draw.randrange(len(line))
    kind = draw.choice(("put", "put", "put", "put", "put", "delete", "double", "swap", "insert"))
    if kind == "put":
        line[at] = draw.choice(_WORDS)
    elif kind == "delete":
        del line[at]
    elif kind == "double":
        line.insert(at, line[at])
    elif kind == "swap":
        other = draw.randrange(len(line))
        line[at], line[other] = line[other], line[at]
    else:
        line.insert(at, draw.choice(_WORDS))
    return line or ["x"]
