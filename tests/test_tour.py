"""The tour in examples/ is run as its reader would run it, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from short_models import shorten
from test_readme import fenced_blocks

from any4_jax import data
from any4_jax.cli import main
from any4_jax.cli.commands import parser_of
from any4_jax.models import tiny

TOUR = Path(__file__).resolve().parent.parent / "examples" / "tour" / "README.md"
TEXT = TOUR.read_text(encoding="utf-8")
BLOCKS = fenced_blocks(TEXT)
COMMANDS = [words for block in BLOCKS if block.language == "console" for words in block.commands()]


def test_what_it_names_exists() -> None:
    linked = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert len(linked) >= 6 and [name for name in linked if not (TOUR.parent / name).is_file()] == []


def test_its_pictures_are_made_by_its_commands() -> None:
    shown = re.findall(r"!\[[^]]+\]\((\S+)\)", TEXT)
    assert sorted(shown) == sorted(word for words in COMMANDS for word in words if word.endswith(".png"))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_line_is_right(words: list[str]) -> None:
    assert parser_of(words).parse_args(words).run


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    with monkeypatch.context() as patch:
        shorten(patch, tmp_path / "short", blocks=1)
        patch.setattr(data, "bundled", tiny.bundled)
        patch.chdir(tmp_path)
        for block in BLOCKS:
            if block.language == "python":
                exec(compile(block.code, str(TOUR), "exec"), {})
        for words in COMMANDS:
            assert main(words) == 0, words
    shown = capsys.readouterr().out
    assert "| int5 | int | 6.1" in shown and (tmp_path / "errors.png").stat().st_size > 10_000
