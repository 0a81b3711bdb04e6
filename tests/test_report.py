"""`any4 bench report`: a page of what was recorded, drawn to scale."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from any4_jax.benchmarks import schema
from any4_jax.benchmarks.bars import Bar, bar_plot
from any4_jax.benchmarks.report import drawings, report
from any4_jax.cli import main

RESULTS = Path(__file__).resolve().parent.parent / "examples" / "benchmarks" / "results"
FILES = sorted(RESULTS.glob("*.json"))
SVG = "{http://www.w3.org/2000/svg}"


def lengths(svg: str) -> list[float]:
    """The lengths of the bars, without the white ground."""
    return [float(rect.get("width")) for rect in ElementTree.fromstring(svg).iter(f"{SVG}rect")][1:]


def words(svg: str) -> list[str]:
    return [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_bars_are_to_scale_and_say_their_values() -> None:
    svg = bar_plot(
        [Bar("a & b", 2.0, 0.5), Bar("half", 1.0), Bar("none", 0.0), Bar("x" * 80, 0.25)], "units", "<title>"
    )
    first, half, none, _ = lengths(svg)
    assert first == pytest.approx(2 * half, rel=1e-3) and none == 0.5
    assert words(svg)[:2] == ["<title>", "units"] and {"a & b", "2 ± 0.5", "half", "1"} <= set(words(svg))
    assert "x" * 61 + "..." in words(svg)
    width = float(ElementTree.fromstring(svg).get("viewBox").split()[2])
    error = re.search(r"M([\d.]+) [\d.]+H([\d.]+)", svg)
    assert float(error[2]) - float(error[1]) == pytest.approx(half, rel=1e-3) and float(error[2]) < width
    for bars in ([], [Bar("a", -1.0)]):
        with pytest.raises(ValueError, match="needs bars from 0 up"):
            bar_plot(bars, "", "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recorded_file_is_drawn(path: Path) -> None:
    drawn = drawings(schema.read(path))
    assert drawn
    for svg in drawn:
        box = [float(size) for size in ElementTree.fromstring(svg).get("viewBox").split()]
        for text in ElementTree.fromstring(svg).iter(f"{SVG}text"):
            assert 0 <= float(text.get("x")) < box[2] and 0 < float(text.get("y")) < box[3]
        assert all(length > 0 for length in lengths(svg))


def test_a_decode_without_prompts_has_a_bar_for_each_row() -> None:
    result = schema.read(RESULTS / "decode_cpu.json")
    (svg,) = drawings(result)
    speeds = [row["decode_tokens_per_s"] for row in result.rows]
    assert [length / lengths(svg)[0] for length in lengths(svg)] == pytest.approx(
        [v / speeds[0] for v in speeds], rel=0.01
    )


class Page(HTMLParser):
    """Counts the elements of a page, and refuses what would come from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []

    def handle_starttag(self, tag, attributes) -> None:
        self.opened.append(tag)
        for name, value in attributes:
            assert name not in ("src", "href") or value.startswith(("#", "data:"))


def test_the_page_holds_everything(tmp_path, capsys) -> None:
    out = tmp_path / "report.html"
    files = [str(RESULTS / name) for name in ("decode_cpu.json", "smollm2_bits_kl.json")]
    assert main(["bench", "report", *files, "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["results"]
    assert told == {"decode_cpu.json": {"drawings": 1}, "smollm2_bits_kl.json": {"drawings": 2}}
    page, text = Page(), out.read_text(encoding="utf-8")
    page.feed(text)
    assert page.opened.count("svg") == 3 and page.opened.count("section") == page.opened.count("table") == 2
    assert page.opened.count("tr") == 3 + 1 + 54 + 1 and "script" not in page.opened


def test_what_is_written_by_hand_is_escaped_and_unknown_benchmarks_have_rows_alone() -> None:
    result = schema.read(RESULTS / "decode_cpu.json")
    other = dataclasses.replace(result, benchmark="weather", command="<script>", rows=({"a": "<b>", "x_ms": 1.23456},))
    assert drawings(other) == []
    text = report({"<name>": other})
    assert "<script>" not in text and "&lt;b&gt;" in text and "1.235" in text and "&lt;name&gt;" in text


def test_refusals(tmp_path, capsys) -> None:
    for path, said in ((tmp_path, "holds no .json file"), (tmp_path / "no.json", "no.json")):
        assert main(["bench", "report", str(path), "--out", str(tmp_path / "r.html")]) == 1
        assert said in capsys.readouterr().err
    assert main(["bench", "report", str(FILES[0]), "--out", str(tmp_path / "no" / "r.html")]) == 1
    assert "its folder is missing" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
