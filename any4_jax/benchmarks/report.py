"""Recorded results as one page of HTML that needs nothing from the network: drawings, tables, how they came about."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from any4_jax.benchmarks.bars import Bar, bar_plot
from any4_jax.benchmarks.plot import WORST, cache_plot, decode_plot, quality_plot, speed_plot
from any4_jax.benchmarks.schema import Result

Rows = Sequence[Mapping[str, Any]]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #1a1a1a; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2.5em; border-top: 1px solid #ccc; padding-top: 1em; }
svg { width: 100%; height: auto; margin: 1em 0; } code { background: #f3f3f3; padding: 0.1em 0.3em; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; white-space: nowrap; }
td, th { padding: 0.2em 0.7em; border-bottom: 1px solid #e3e3e3; text-align: right; }
td:first-child, th:first-child { text-align: left; } .facts { color: #555; } summary { cursor: pointer; }
"""
_DIGITS = 4


def report(results: Mapping[str, Result]) -> str:
    """A page with a section for each result, by the name of its file."""
    contents = "".join(f'<li><a href="#{number}">{escape(name)}</a></li>' for number, name in enumerate(results))
    sections = "\n".join(_section(number, *item) for number, item in enumerate(results.items()))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Measurements of any4_jax</title>'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head>\n<body><h1>Measurements of any4_jax</h1>\n'
        f"<ul>{contents}</ul>\n{sections}\n</body></html>\n"
    )


def drawings(result: Result) -> list[str]:
    """The SVG drawings of a result; none if there is no way to draw its benchmark."""
    draw = _DRAWN.get(result.benchmark)
    return [] if draw is None else draw(result.rows, result.device.name)


def _gemm(rows: Rows, device: str) -> list[str]:
    """Where it is known, the speed against cuBLAS by rows of x; and bars of the products for the fewest rows."""
    ratios = ("speed_ratio_to_cublas", "speed_ratio_to_xla", "speed_ratio_to_dense_float32")
    ratio = next((name for name in ratios if any(row.get(name) for row in rows)), None)
    if ratio is None:
        return []
    beside = ratio.removeprefix("speed_ratio_to_").replace("_", " ").replace("cublas", "cuBLAS").replace("xla", "XLA")
    counts, product = {row["m"] for row in rows}, rows[0]["product"]
    drawn = []
    # On a CPU a product has a row for each dtype, too many for a line.
    if len(counts) > 2 and "dtype" not in rows[0] and any(row["product"] == product and row.get(ratio) for row in rows):
        drawn.append(speed_plot(rows, product, ratio, f"{device}: {product}, times the speed of {beside}"))
    for shape in list(dict.fromkeys((row["n"], row["k"]) for row in rows))[:2]:
        least = min(row["m"] for row in rows if (row["n"], row["k"]) == shape)
        chosen = [row for row in rows if (row["n"], row["k"], row["m"]) == (*shape, least) and row.get(ratio)]
        bars = [Bar(_words(row, "product", "dtype"), row[ratio]) for row in chosen]
        if bars:
            title = f"{device}: weights {shape[0]} x {shape[1]}, {least} row{'s' if least > 1 else ''} of x"
            drawn.append(bar_plot(bars, f"times the speed of {beside}", title))
    return drawn


def _decode(rows: Rows, device: str) -> list[str]:
    models = list(dict.fromkeys(row["model"] for row in rows if row.get("model")))
    title = f"{device}: decoding" + (f", {models[0]}" if len(models) == 1 else "")
    if len({row.get("prompt_tokens") for row in rows}) > 1:
        return [decode_plot(rows, title)]
    names = ("engine", "model", "method", "head", "dtype", "batch")
    differing = [name for name in names if len({row.get(name) for row in rows}) > 1] or ["method"]
    bars = [Bar(_words(row, *differing), row["decode_tokens_per_s"]) for row in rows]
    return [bar_plot(bars, "tokens per second, of all rows of a batch together", title)]


def _cache(rows: Rows, device: str) -> list[str]:
    return [cache_plot(rows, f"{device}: a step against the context, by cache")]


def _caches(rows: Rows, device: str) -> list[str]:
    bars = [Bar(f"{row['cache']}, {row['weights']} weights", row["kl_nats"], row["kl_nats_error"]) for row in rows]
    return [bar_plot(bars, "KL from the float model, nats per token", f"Caches of few bits, computed on {device}")]


def _quantize(rows: Rows, device: str) -> list[str]:
    bars = [Bar(f"{row['matrices']} of {row['n']} x {row['k']}", row["seconds_in_all"]) for row in rows]
    return [bar_plot(bars, "seconds for all matrices of a shape", f"{device}: quantizing a model's linears")]


def _tune_cost(rows: Rows, device: str) -> list[str]:
    units = {"s": "seconds", "peak_gb": "GB at most"}
    return [
        bar_plot([Bar(row["trained"], row[key]) for row in rows], unit, f"{device}: training")
        for key, unit in units.items()
    ]


def _ablations(rows: Rows, device: str) -> list[str]:
    """Bars of the KL, or of the nats lost where that wasn't measured; and the KL against the bits where they differ."""
    known = [row for row in rows if row.get("kl_nats") is not None]
    key, unit = ("kl_nats", "KL from the float model") if known else ("nats_lost", "lost against the float model")
    shown = [row for row in rows if row.get(key) is not None and 0 <= row[key] <= WORST]
    cases = [row["case"] for row in shown]
    # A case may have been run with several calibration texts.
    names = [f"{row['case']}, {row['calibration']}" if cases.count(row["case"]) > 1 else row["case"] for row in shown]
    bars = [
        Bar(f"{name} ({row['bits_per_weight']:.2f} bits)", row[key], row.get(f"{key}_error"))
        for name, row in zip(names, shown, strict=True)
    ]
    left = len(rows) - len(bars)
    note = f"; without {left} of the {len(rows)} rows, which have none from 0 to {WORST:g}" if left else ""
    drawn = [bar_plot(bars, f"{unit}, nats per token{note}", f"Quality by case, computed on {device}")] if bars else []
    positive = [row for row in known if 0 < row["kl_nats"] <= WORST]
    if len({round(row["bits_per_weight"]) for row in positive}) > 2:
        drawn.insert(0, quality_plot(positive, "KL from the float model against bits per weight"))
    return drawn


def _solver(rows: Rows, device: str) -> list[str]:
    bars = [Bar(row["solver"], row["ms_per_row"]) for row in rows]
    return [bar_plot(bars, "milliseconds per row", f"{device}: solvers of tables")]


_DRAWN: Mapping[str, Callable[[Rows, str], list[str]]] = {
    "gemm": _gemm,
    "pallas_product": _gemm,
    "decode": _decode,
    "hf_flax_decode": _decode,
    "against_llama_cpp": _decode,
    "cache": _cache,
    "caches": _caches,
    "quantize": _quantize,
    "ablations": _ablations,
    "tune_cost": _tune_cost,
    "solver": _solver,
}


def _words(row: Mapping[str, Any], *names: str) -> str:
    """What a row says under these names, those that it has."""
    labelled = ("batch", "head")
    found = (
        f"{name} {row[name]}" if name in labelled else str(row[name]) for name in names if row.get(name) is not None
    )
    return ", ".join(found)


def _section(number: int, name: str, result: Result) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in result.versions.items())
    device = f"{result.device.name}, {result.device.platform}, {result.device.cores} cores"
    notes = "".join(f"<li>{escape(note)}</li>" for note in result.notes)
    return (
        f'<section id="{number}"><h2>{escape(name)}</h2>\n<p><code>{escape(result.command)}</code></p>\n'
        f'<p class="facts">{escape(result.date)}; {escape(device)}; {escape(versions)}</p>\n'
        + "\n".join(drawings(result))
        + (f"<ul>{notes}</ul>\n" if notes else "")
        + f"<details><summary>{len(result.rows)} rows</summary>{_table(result.rows)}</details></section>"
    )


def _table(rows: Rows) -> str:
    def line(tag: str, cells: Iterable[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(_cell(cell))}</{tag}>" for cell in cells) + "</tr>"

    names = list(rows[0])
    body = "\n".join(line("td", (row[name] for name in names)) for row in rows)
    return f'<div class="wide"><table>\n{line("th", names)}\n{body}\n</table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.{_DIGITS}g}"
    text = "" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
