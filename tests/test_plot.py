"""Plots: what they draw, where, and what they refuse."""

from xml.etree import ElementTree

import pytest

from any4_jax.benchmarks.plot import quality_plot, speed_plot


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
        for name, bits, kl in (("any4", 4, 0.05), ("GPTQ any3", 3, 0.4), ("one alone", 2, 3.0))
        for groups, extra in ((", groups of 32", 0.7), (", whole rows", 0.1))[: 1 if bits == 2 else 2]
    ]
    drawing = ElementTree.fromstring(quality_plot(rows, "KL"))
    texts = [element.text for element in drawing if element.tag.endswith("text")]
    assert {"any4", "GPTQ any3", "one alone", "bits per weight", "2.5", "0.01", "1"} <= set(texts)
    dots = [(float(e.get("cx", "")), float(e.get("cy", ""))) for e in drawing if e.tag.endswith("circle")]
    frame = [e.get("points", "").split() for e in drawing if e.get("stroke-width") == "1"]
    corners = [tuple(map(float, corner.split(","))) for line in frame for corner in line]
    (left, right), (top, bottom) = ((min(axis), max(axis)) for axis in zip(*corners, strict=True))
    assert len(dots) == 5 and all(left <= x <= right and top <= y <= bottom for x, y in dots)
    # More bits are to the right, a larger KL is above; equal ratios are equal distances.
    (x_small, y_small), (x_big, y_big) = sorted(dots[:2])
    assert x_small < x_big and y_small < y_big
    assert abs((dots[0][1] - dots[2][1]) - (dots[1][1] - dots[3][1])) < 0.2
    with pytest.raises(ValueError, match="got no row to plot"):
        quality_plot([], "")
    with pytest.raises(ValueError, match="any4 has a KL of 0"):
        quality_plot([{"case": "any4", "bits_per_weight": 4.0, "kl_nats": 0.0}], "")
