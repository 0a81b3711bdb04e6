"""Measures what each choice in a method is worth on a real model: how far quantizing its linears takes it from float.

    python examples/benchmarks/ablations.py --only bits initialisation
    python examples/benchmarks/ablations.py --text wiki.test.raw --calibration-text wiki.valid.txt --out ablations.json

The model is SmolLM2-135M (fetched once), moved off the 4-bit grid on which it is stored. Without --text the loss is
measured on the bundled essays; published figures use windows of 2048 tokens of WikiText-2. Every case is measured with
weights that are dequantized to float32, so that one program serves all, and with its inputs rounded where the method
rounds them; --windows N takes N windows, spread evenly over the text.

Tables are learned on the CPU, by the C++ solver if it is built. Methods that need a walk over the model (sequential
ones, those with a Hessian, and those of sites or blocks) run where the model does, on jax's default device, and so does
the "gradient" solver. Cases calibrate on the bundled prompt, on pieces of --calibration-text, or on the bundled essays
and stories, which are of another domain than --text.

With --out the file is written after each case. The same command goes on where an earlier one stopped: what the file has
is not measured again, and neither is a case that another study has measured.

"kl_nats": the mean of KL(float || quantized) over the predicted tokens, in nats; "top1_share": the share of them on
which both models' likeliest token is the same; "window_kl_nats": the KL of each window, for paired differences.
"share_recovered", "kl_share_recovered": nf4 (float32 scales, groups of --group-size) loses some nats against the float
model, and has a KL from it; these are the shares of the two that a case does not lose. "bits_per_weight": of the arrays
as stored. "learn_seconds": from the first layer to the last, with all cores busy, after compiling; for a walk, of all
of it, compiling and calibrating included. "rows_above_paper", for learned tables: the number of rows of all linears
whose error sum_k E[x_k^2] (w_k - w^_k)^2, computed in float64 from the arrays as stored, is above that of the published
recipe; "worst_row_ratio" is the largest ratio of the two.
"""

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ablation_bench import Bench
from ablation_case import OTHER, TEXT, Case, reference
from ablation_cases import STUDIES

from any4_jax import benchmarks
from any4_jax.benchmarks import machine
from any4_jax.benchmarks.files import check_target
from any4_jax.cli.numbers import at_least, count, natural
from any4_jax.cli.output import table
from any4_jax.data.passages import in_common, sketch

SHOWN = ("study", "case", "calibration", "bits_per_weight", "perplexity", "nats_lost", "nats_lost_error")
SHOWN += ("share_recovered", "kl_nats", "kl_nats_error", "kl_share_recovered", "top1_share", "rows_above_paper")
SHOWN += ("learn_seconds",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=STUDIES,
        default=list(STUDIES),
        metavar="STUDY",
        help=f"some of {', '.join(STUDIES)}",
    )
    parser.add_argument("--cases", type=_pattern, metavar="REGEX", default="", help="only the cases whose names match")
    parser.add_argument(
        "--model", metavar="MODEL", help="any source that any4_jax.models.load takes; 'tiny' for a quick look"
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="measure on the text of this file (default: the bundled essays)"
    )
    parser.add_argument(
        "--calibration-text",
        type=Path,
        metavar="FILE",
        help="the text for cases that calibrate on one; without it they are skipped",
    )
    parser.add_argument(
        "--windows",
        type=natural,
        default=16,
        metavar="N",
        help="measure on N windows, spread evenly; 0 for all (default: 16)",
    )
    parser.add_argument("--seqlen", type=at_least(2), default=2048, help="tokens in a window (default: 2048)")
    parser.add_argument(
        "--group-size", type=count, default=64, metavar="G", help="for studies that don't vary it (default: 64)"
    )
    parser.add_argument(
        "--workers", type=count, default=machine.cores(), help="layers learned at once (default: one per core)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the results here as JSON, as they come; a file with the same settings is continued",
    )
    args = parser.parse_args()
    for file in (args.text, args.calibration_text):
        if file is not None and not file.is_file():
            parser.error(f"got {file}, and a file of text is needed; give one that exists")
    if args.out is not None:
        try:
            check_target(args.out)
        except OSError as error:
            parser.error(str(error))
    # A GPU's default, TF32, adds to every figure what no method is to blame for.
    jax.config.update("jax_default_matmul_precision", "highest")

    bench = Bench(args)
    if bench.text is not None and in_common(sketch([bench.text]), bench.ids):
        sys.exit(f"{args.calibration_text} has passages of what is measured on; give texts that have none in common")
    every = [(study, case) for study in args.only for case in STUDIES[study](args.group_size)]
    every = [("reference", reference(args.group_size)), *(c for c in every if args.cases.search(c[1].name))]
    lacking = {TEXT: args.calibration_text is None, OTHER: args.text is None}
    reasons = {
        TEXT: "it calibrates on a text and none was given",
        OTHER: "it calibrates on the bundled essays, and without --text they are what is measured",
    }
    notes = [
        f"{study}, {case.name}: skipped, because {reasons[case.source]}"
        for study, case in every
        if lacking.get(case.source)
    ]
    settings = {
        "text": args.text.name if args.text else "essays",
        "calibration_text": args.calibration_text.name if args.calibration_text else None,
        "seqlen": args.seqlen,
        "windows": len(bench.ids) // args.seqlen,
        "group_size": args.group_size,
        "model": bench.name,
    }
    rows = _measured(args.out, settings)
    for study, case in every:
        if lacking.get(case.source) or any(row["study"] == study and _same(row, case) for row in rows):
            continue
        # Studies share cases: one that another study has measured isn't measured again.
        known = next((row for row in rows if _same(row, case, named=False)), None)
        found = bench.row(case, rows[0] if rows else None) if known is None else known
        rows.append({"study": study} | found | {"study": study, "case": case.name})
        print("  ".join(_text(rows[-1].get(key)) for key in SHOWN), file=sys.stderr, flush=True)
        if args.out:
            result = benchmarks.result(
                "ablations",
                ["python", *sys.argv],
                settings=settings | {"float_perplexity": bench.float.value},
                rows=rows,
                notes=notes,
            )
            benchmarks.write(args.out, result)
    print(f"float: perplexity {bench.float.value:.3f}")
    print(table(SHOWN, [[_text(row.get(key)) for key in SHOWN] for row in rows]))
    for note in notes:
        print(f"note: {note}")


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, need a regular expression ({error})") from None


def _measured(out: Path | None, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that a file already has; exits if they were measured with other settings."""
    if out is None or not out.exists():
        return []
    earlier = benchmarks.read(out)
    differing = [name for name, value in settings.items() if earlier.settings.get(name, value) != value]
    differing += [name for name in settings if name not in earlier.settings]
    if differing:
        sys.exit(
            f"{out} was measured with another {', '.join(differing)}, and is continued only with the same; move it"
        )
    return [dict(row) for row in earlier.rows]


def _same(row: Mapping[str, Any], case: Case, named: bool = True) -> bool:
    """Whether a row measures a case; with `named`, whether it also has its name."""
    same = (row["method"], row["calibration"]) == (case.described, case.calibration)
    return same and (not named or row["case"] == case.name)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
