"""Plots: what they draw, where, and what they refuse."""

from xml.etree import ElementTree

import pytest

from any4_jax.benchmarks.plot import decode_plot, quality_plot, speed_plot


def test_the_plot_has_a_line_for_each_shape() -> None:
    rows = [
        {"n": n, "k": 64, "m": m, "product": product, "ratio": None if n == 3 else n / m}
        for n in (1, 2, 3)
        for m in (1, 2, 8)
        for product in ("few", "dense")
    ]
    drawing = ElementTree.fromstring(speed_plot(rows, "few", "ratio", "fast & few"))
    texts = [element.text for element in drawing if element.tag.endswith("text")]
    assert "fast & few" in texts and "1 x 64" in texts and "2 x 64" in texts and "3 x 64" not in texts
    lines = [e.get("points", "") for e in drawing if e.tag.endswith("polyline") and e.get("stroke-width") == "2"]
    assert sorted(len(line.split()) for line in lines) == [2, 2, 3, 3]
    with pytest.raises(ValueError, match="no row of 'other' has a ratio"):
        speed_plot(rows, "other", "ratio", "")


def test_the_quality_plot_has_a_line_for_each_method_and_a_dot_for_each_size() -> None:
    rows = [
        {"case": f"{name}{groups}", "bits_per_weight": bits + extra, "kl_nats": kl * (1 - extra)}
        for name, bits, kl in (("any4", 4, 0.05), ("GPTQ any4", 3, 0.4), ("one alone", 2, 1.8))
        for groups, extra in ((", groups of 32", 0.7), (", whole rows", 0.1))[: 1 if bits == 2 else 2]
    ]
    drawing = ElementTree.fromstring(
        quality_plot([*rows, {"case": "far", "bits_per_weight": 1.0, "kl_nats": 9.0}], "KL")
    )
    texts = [element.text for element in drawing if element.tag.endswith("text")]
    assert {"any4", "GPTQ any4", "one alone", "bits per weight", "2.5", "0.01", "1"} <= set(texts)
    assert not {"far", "1.5"} & set(texts)
    circles = [element for element in drawing if element.tag.endswith("circle")]
    frame = [e.get("points", "").split() for e in drawing if e.get("stroke-width") == "1"]
    corners = [tuple(map(float, corner.split(","))) for line in frame for corner in line]
    (left, right), (top, bottom) = ((min(axis), max(axis)) for axis in zip(*corners, strict=True))
    by_name: dict[str, list[tuple[float, float]]] = {}
    names = [name for name in texts if name in ("any4", "GPTQ any4", "one alone")]
    for circle in circles:
        x, y = float(circle.get("cx", "")), float(circle.get("cy", ""))
        if left <= x <= right and top <= y <= bottom:
            by_name.setdefault(names[0], []).append((x, y))
        else:  # the one of the legend, after those of its line
            names.pop(0)
    assert {name: len(dots) for name, dots in by_name.items()} == {"GPTQ any4": 2, "any4": 2, "one alone": 1}
    # More bits are to the right, a larger KL is above; equal ratios are equal distances.
    (x_small, y_small), (x_big, y_big) = by_name["any4"]
    assert x_small < x_big and y_small < y_big
    (_, above_small), (_, above_big) = by_name["GPTQ any4"]
    assert abs((y_small - above_small) - (y_big - above_big)) < 0.2
    # One colour for a table, and the two kinds of codes apart.
    compensated, nearest, alone = (circles[at] for at in (0, 3, 6))
    assert compensated.get("stroke") == nearest.get("stroke") != alone.get("stroke")
    assert compensated.get("fill") == compensated.get("stroke") and nearest.get("fill") == "white"
    lines = [e.get("stroke-dasharray") for e in drawing if e.get("stroke-width") == "2"]
    assert lines == ["", "", "5 4", "5 4", "5 4", "5 4"]


def test_the_quality_plot_refuses_rows_without_a_place() -> None:
    for rows in ([], [{"case": "far", "bits_per_weight": 1.0, "kl_nats": 9.0}]):
        with pytest.raises(ValueError, match="got no row to plot, need at least one with a KL of at most 2"):
            quality_plot(rows, "")
    with pytest.raises(ValueError, match="any4 has a KL of 0"):
        quality_plot([{"case": "any4", "bits_per_weight": 4.0, "kl_nats": 0.0}], "")


def test_many_lines_with_long_names_are_told_apart_and_fit() -> None:
    kind = {"model": "m", "method": "any4", "head": "float", "dtype": "bfloat16", "prompt_tokens": 8}
    rows = [{**kind, "model": f"{i} " + "m" * 40, "batch": 1, "decode_tokens_per_s": 9.0} for i in range(21)]
    drawing = ElementTree.fromstring(decode_plot([*rows, {**rows[0], "batch": 2}], "title " * 30))
    width, height = map(float, drawing.get("viewBox", "").split()[2:])
    styles = [(e.get("stroke"), e.get("stroke-dasharray")) for e in drawing if e.get("stroke-width") == "2"]
    assert len(set(styles)) == 21
    for text in (element for element in drawing if element.get("text-anchor") == "start"):
        assert float(text.get("x", "")) + 6 * len(text.text or "") <= width and float(text.get("y", "")) < height
