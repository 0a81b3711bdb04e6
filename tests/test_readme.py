"""README.md is run as a reader would run it: Python blocks in one namespace, `any4` commands, top to bottom.

Its table of kernels is checked against what the kernels say, its figures against the page of measurements.
A line `<!-- no-test: reason -->` right above a block skips that block and shows the reason.
"""

from __future__ import annotations

import importlib
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from short_models import shorten

REPOSITORY = Path(__file__).resolve().parent.parent
README = REPOSITORY / "README.md"

SKIP_MARK = re.compile(r"<!--\s*no-test:\s*(\S.*?)\s*-->\s*$")
SHELL = frozenset({"bash", "console"})
# Commands run in this process through the entry point, not in a shell: what only a shell can do is refused.
SHELL_WORDS = frozenset({"|", "||", "&", "&&", ";", ">", ">>", "<"})


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the number of its first line of code, the code, the reason to skip it."""

    language: str
    line: int
    code: str
    skip: str | None

    def commands(self) -> list[list[str]]:
        """The words after `any4` of each such command, its backslash-continued lines joined."""
        lines = self.code.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        split = [shlex.split(line, comments=True) for line in lines if line.strip().startswith("any4 ")]
        return [words[1:] for words in split]


def fenced_blocks(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text in order; an unclosed one is a ValueError."""
    blocks, lines, at = [], text.splitlines(), 0
    while at < len(lines):
        fence = re.match(r"```(\w+)\s*$", lines[at])
        if not fence:
            at += 1
            continue
        try:
            end = lines.index("```", at + 1)
        except ValueError as error:
            raise ValueError(f"line {at + 1} opens a block that no line ``` closes") from error
        mark = SKIP_MARK.match(lines[at - 1]) if at else None
        blocks.append(Block(fence[1], at + 2, "\n".join(lines[at + 1 : end]) + "\n", mark and mark[1]))
        at = end + 1
    return blocks


def runnable(block: Block) -> bool:
    return block.language == "python" or (block.language in SHELL and bool(block.commands()))


BLOCKS = [b for b in fenced_blocks(README.read_text(encoding="utf-8")) if runnable(b)] if README.exists() else []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory that all blocks share: a later one may read what an earlier one wrote."""
    return tmp_path_factory.mktemp("readme")


@pytest.fixture(scope="module")
def namespace() -> dict[str, Any]:
    return {"__name__": "readme"}


@pytest.fixture(scope="module")
def any4() -> Callable[[list[str]], int]:
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    module, function = scripts["any4"].split(":")
    return getattr(importlib.import_module(module), function)


@pytest.fixture(scope="module", autouse=True)
def short_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch, tmp_path_factory.mktemp("short"), blocks=2)
        yield


def test_readme_has_blocks_to_run() -> None:
    assert README.exists(), "README.md is missing; write it, with at least one ```python block to run"
    assert any(b.language == "python" and not b.skip for b in BLOCKS), "README.md has no ```python block to run"


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: f"{b.language}-line-{b.line}")
def test_readme_block(
    block: Block,
    folder: Path,
    namespace: dict[str, Any],
    any4: Callable[[list[str]], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if block.skip:
        pytest.skip(block.skip)
    monkeypatch.chdir(folder)
    if block.language == "python":
        # The blank lines make a traceback point at the line of README.md.
        exec(compile("\n" * (block.line - 1) + block.code, str(README), "exec"), namespace)
        return
    for words in block.commands():
        shell_only = SHELL_WORDS.intersection(words)
        assert not shell_only, f"line {block.line}: 'any4 {shlex.join(words)}' needs a shell; mark it no-test"
        assert any4(words) == 0, f"line {block.line}: 'any4 {shlex.join(words)}' did not exit with 0"


def test_the_first_screen_installs_shows_a_result_and_compares() -> None:
    screen = README.read_text(encoding="utf-8").split("\n## ")[0]
    assert len(screen.splitlines()) <= 50
    (first,) = [block for block in fenced_blocks(screen) if block.language == "python"]
    assert len([line for line in first.code.splitlines() if line]) <= 6
    assert screen.index("pip install") < screen.index(first.code)
    header = next(line for line in screen.splitlines() if line.startswith("|"))
    assert [cell.strip() for cell in header.split("|")[-5:-1]] == ["CUDA", "Pallas", "CPU (C++)", "XLA"]
    assert all(f"`{name}(" in screen for name in ("Any4", "Int", "NF4", "FP4", "AF4", "MX4"))


def test_the_yes_and_no_of_the_first_table_is_what_the_kernels_say() -> None:
    import jax
    import jax.numpy as jnp

    import any4_jax as a4
    from any4_jax.product.backends.base import dtypes_of
    from cuda_ffi import lut_product_cuda
    from pallas_kernels import lut_product

    rows = [line.strip("| ").split(" | ") for line in README.read_text(encoding="utf-8").splitlines()[:40]]
    table = {cells[0]: cells[2:] for cells in rows if len(cells) == 6 and cells[0].startswith("`")}
    cases = {
        "`Any4()`": [a4.methods.Any4()],
        "`Any4(bits=3)`, `Any4(bits=2)`": [a4.methods.Any4(bits=3), a4.methods.Any4(bits=2)],
        "`Int(bits)` of 2, 3, 4 and 8 bits": [a4.methods.Int(bits=bits) for bits in (2, 3, 4, 8)],
        "`Int(bits)` of 5 and 6 bits": [a4.methods.Int(bits=bits) for bits in (5, 6)],
        "`NF4()`, `FP4()`, `AF4()`": [a4.methods.NF4(), a4.methods.FP4(), a4.methods.AF4()],
        "`MX4()`": [a4.methods.MX4()],
    }
    assert table.keys() == cases.keys()
    for name, methods in cases.items():
        for method in methods:
            q = jax.eval_shape(lambda w, m=method: a4.quantize(w, m), jax.ShapeDtypeStruct((256, 256), jnp.float32))
            operands = (jnp.bfloat16, q.bits, q.group_size, 256, *dtypes_of(q))
            able = [kernel.why_not(*operands) is None for kernel in (lut_product_cuda, lut_product)]
            assert table[name] == ["yes" if can else "-" for can in able] + ["yes", "yes"], method


BENCHMARKS = REPOSITORY / "examples" / "benchmarks"


@pytest.mark.parametrize("page", ["README.md", "examples/benchmarks/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", (REPOSITORY / page).read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not ((REPOSITORY / page).parent / link).exists()] == []


def test_every_recorded_file_is_explained() -> None:
    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in (BENCHMARKS / "results").iterdir() if f"(results/{path.name})" not in page] == []


def test_the_headline_figures_are_those_of_the_page_of_measurements() -> None:
    section = README.read_text(encoding="utf-8").split("## How good, how fast")[1].split("\n## ")[0]
    figures = [line.split("|")[2] for line in section.splitlines() if line.startswith("| ")][1:]
    numbers = {number for cell in figures for number in re.findall(r"\d+\.\d+|\d{2,}", cell)}
    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    known = set(re.findall(r"\d+(?:\.\d+)?", page)) | {f"{float(n):.2f}" for n in re.findall(r"(\d\.\d+)x", page)}
    assert len(numbers) > 8 and numbers <= known


SAMPLE = """\
# Title
```python
x = 1
```
<!-- no-test: needs a GPU -->
```python
x = 2
```
```console
$ any4 inspect ckpt  # sizes
any4 output
```

```bash
make demo
any4 generate ckpt \\
  --prompt "a b"
```
```text
any4 demo
```
"""


def test_blocks_of_a_sample() -> None:
    blocks = fenced_blocks(SAMPLE)
    assert [(b.language, b.line) for b in blocks] == [
        ("python", 3),
        ("python", 7),
        ("console", 10),
        ("bash", 15),
        ("text", 20),
    ]
    assert [b.skip for b in blocks] == [None, "needs a GPU", None, None, None]
    assert [runnable(b) for b in blocks] == [True, True, True, True, False]
    assert blocks[2].commands() == [["inspect", "ckpt"]]
    assert blocks[3].commands() == [["generate", "ckpt", "--prompt", "a b"]]


def test_unclosed_block_is_named() -> None:
    with pytest.raises(ValueError, match="line 2 opens"):
        fenced_blocks("text\n```python\nx = 1\n")
