"""Measures what each choice in `Any4` is worth on a real model, by the loss that quantizing its linears adds.

    python examples/benchmarks/ablations.py --only bits initialisation
    python examples/benchmarks/ablations.py --text wiki.test.raw --calibration-text wiki.valid.txt --out ablations.json

The model is SmolLM2-135M (fetched once), moved off the 4-bit grid on which it is stored. Without --text the loss is
measured on the bundled essays; published figures use windows of 2048 tokens of WikiText-2. Every case is measured with
weights that are dequantized to float32, so that one program serves all; --windows N takes N windows, spread evenly over
the text. Tables are learned on the CPU, by the C++ solver if it is built. The model runs on jax's default device, and
the "gradient" solver trains tables there.

"recovered": nf4 (float32 scales, groups of --group-size) loses some nats against the float model; this is the share of
them that a case does not lose. "learn_seconds": from the first layer to the last, with all cores busy, after compiling.
"rows_above_paper", for learned tables: the number of rows of all linears whose error sum_k E[x_k^2] (w_k - w^_k)^2,
computed in float64 from the arrays as stored, is above that of the published recipe; "worst_row_ratio" is the largest
ratio of the two.
"""

import argparse
import dataclasses
import functools
import re
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ablation_cases import NONE, STUDIES, Case, paper, reference
from ablation_model import Runner, inputs
from flax import nnx

import any4_jax as a4
from any4_jax import benchmarks, surgery
from any4_jax.benchmarks import machine
from any4_jax.cli.output import table
from any4_jax.data import assets, texts
from any4_jax.evaluation import Perplexity, paired_difference, perplexity
from any4_jax.methods import Any4
from any4_jax.models import degrid
from any4_jax.statistics import Moments

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ERROR_TOKENS = 2048
SHOWN = ("study", "case", "calibration", "bits_per_weight", "perplexity", "nats_lost", "nats_lost_error")
SHOWN += ("share_recovered", "rows_above_paper", "learn_seconds")


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
    parser.add_argument("--cases", metavar="REGEX", default="", help="only the cases whose names match")
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
        type=int,
        default=16,
        metavar="N",
        help="measure on N windows, spread evenly; 0 for all (default: 16)",
    )
    parser.add_argument("--seqlen", type=int, default=2048, help="tokens in a window (default: 2048)")
    parser.add_argument(
        "--group-size", type=int, default=64, metavar="G", help="for studies that don't vary it (default: 64)"
    )
    parser.add_argument(
        "--workers", type=int, default=machine.cores(), help="layers learned at once (default: one per core)"
    )
    parser.add_argument("--out", metavar="FILE", help="write the results here as JSON")
    args = parser.parse_args()

    bench = Bench(args)
    every = [(study, case) for study in args.only for case in STUDIES[study](args.group_size)]
    every = [(study, case) for study, case in every if re.search(args.cases, case.name)]
    without = [(study, case) for study, case in every if case.samples and args.calibration_text is None]
    notes = [
        f"{study}, {case.name}: skipped, because it calibrates on a text and none was given" for study, case in without
    ]
    rows: list[dict[str, Any]] = []
    for study, case in [("reference", reference(args.group_size)), *(c for c in every if c not in without)]:
        rows.append({"study": study} | bench.row(case, rows[0] if rows else None))
        print("  ".join(_text(rows[-1].get(key)) for key in SHOWN), file=sys.stderr, flush=True)
        if args.out:
            settings = {
                "text": args.text.name if args.text else "essays",
                "seqlen": args.seqlen,
                "windows": len(bench.ids) // args.seqlen,
            }
            settings |= {"float_perplexity": bench.float.value, "model": bench.name}
            benchmarks.write(
                args.out,
                benchmarks.result("ablations", ["python", *sys.argv], settings=settings, rows=rows, notes=notes),
            )
    print(f"float: perplexity {bench.float.value:.3f}")
    print(table(SHOWN, [[_text(row.get(key)) for key in SHOWN] for row in rows]))
    for note in notes:
        print(f"note: {note}")


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Bench:
    """The float model on the device that runs it, its kernels on the CPU, where tables are learned, and its loss."""

    def __init__(self, args: argparse.Namespace) -> None:
        source = args.model or str(assets.fetch_smollm2())
        self.name, self.workers = Path(source).name, args.workers
        self.model = degrid.degrid(a4.models.load(source))
        self.cpu = jax.devices("cpu")[0]
        self.kernels = {
            path: jax.device_put(node.kernel[...], self.cpu) for path, node in surgery.linears(self.model).items()
        }
        self.kernels = {path: kernel for path, kernel in self.kernels.items() if path.endswith(KINDS)}
        encode = self.model.tokenizer.encode
        ids = np.asarray(encode(args.text.read_text(encoding="utf-8") if args.text else texts.essays()), np.int32)
        found = ids[: len(ids) // args.seqlen * args.seqlen].reshape(-1, args.seqlen)
        wanted = args.windows or len(found)
        self.ids = found[:: max(1, len(found) // wanted)][:wanted].reshape(-1)
        self.seqlen = args.seqlen
        graphdef, state = nnx.split(self.model)
        self.on_cpu = nnx.merge(graphdef, jax.device_put(state, self.cpu))
        self.text = (
            None
            if args.calibration_text is None
            else np.asarray(encode(args.calibration_text.read_text(encoding="utf-8")), np.int32)
        )
        self.float = self._measure(self.model)
        # The window after the middle one, which is not among 16 that are spread evenly.
        self.seen = dict(inputs(self.model, found[min(len(found) // 2 + 1, len(found) - 1)][:ERROR_TOKENS]))
        self._stats: dict[tuple, Any] = {}
        self.published = paper(args.group_size)

    def row(self, case: Case, first: Mapping[str, Any] | None) -> dict[str, Any]:
        """Learns and measures one case; `first` is the row of the reference, None for the reference itself."""
        stats = self._statistics(case)
        operators, seconds = self._learn(case, stats)
        quantized = surgery.copy_module(self.model)
        nodes = surgery.linears(quantized)
        for path, operator in operators.items():
            nodes[path].kernel = nnx.Param(jnp.asarray(np.asarray(_dense(operator)).T, nodes[path].kernel[...].dtype))
        measured = self._measure(quantized)
        lost = paired_difference(measured, self.float)
        stored = sum(operator.nbytes for operator in operators.values())
        row = {
            "case": case.name,
            "calibration": case.calibration,
            "bits_per_weight": 8 * stored / sum(kernel.size for kernel in self.kernels.values()),
            "perplexity": measured.value,
            "nats_lost": lost.mean,
            "nats_lost_error": lost.error,
            "share_recovered": 0.0 if first is None else 1 - lost.mean / first["nats_lost"],
            "learn_seconds": seconds,
            **{f"error_{kind}": self._output_error(kind, nodes) for kind in KINDS},
        }
        if isinstance(case.method, Any4):
            ratios = self._row_errors(operators) / self._published_errors
            row |= {"rows_above_paper": int((ratios > 1).sum()), "worst_row_ratio": float(ratios.max())}
        return row

    def _measure(self, model: Any) -> Perplexity:
        return perplexity(Runner(model), self.ids, seqlen=self.seqlen)

    def _statistics(self, case: Case) -> Mapping[str, Any]:
        """The statistics for a case, on the CPU."""
        if case.calibration == NONE:
            return {}
        key = (case.samples, case.length, case.method.needs, case.method if case.method.sequential else None)
        if key not in self._stats:
            data: Any = texts.prompt()
            if case.samples:
                starts = np.linspace(0, len(self.text) - case.length, case.samples).astype(int)
                data = np.stack([self.text[i : i + case.length] for i in starts])
            # A sequential method quantizes while it calibrates, so it runs where tables are learned.
            model = self.on_cpu if case.method.sequential else self.model
            found = a4.calibrate(model, data, case.method, seqlen=case.length)
            self._stats[key] = jax.device_put(found, self.cpu)
        return self._stats[key]

    def _learn(self, case: Case, stats: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
        """The operators by path, and the seconds that they took after compiling."""

        device = jax.devices()[0] if getattr(case.method, "solver", None) == "gradient" else self.cpu

        def learn(path: str) -> tuple[str, Any]:
            given = jax.device_put((self.kernels[path], stats.get(path)), device)
            found = a4.quantize(given[0], case.method, given[1], transposed=True, path=path)
            return path, jax.block_until_ready(found)

        one_of_each = {kernel.shape: path for path, kernel in self.kernels.items()}
        with ThreadPoolExecutor(self.workers) as pool:
            list(pool.map(learn, one_of_each.values()))
            begin = time.perf_counter()
            return dict(pool.map(learn, self.kernels)), time.perf_counter() - begin

    @functools.cached_property
    def _published_errors(self) -> np.ndarray:
        return self._row_errors(self._learn(self.published, self._statistics(self.published))[0])

    def _row_errors(self, operators: Mapping[str, Any]) -> np.ndarray:
        """The error of each row under the prompt's second moments: float64 [rows of all linears]."""
        stats = self._statistics(dataclasses.replace(self.published, method=Any4()))
        found = []
        for path, q in operators.items():
            back = np.take_along_axis(
                np.broadcast_to(np.asarray(q.lut, np.float64), (q.shape[0], q.lut.shape[1])),
                np.asarray(q.unpacked_codes(), np.int64),
                axis=1,
            )
            for stored, combine in ((q.scales, np.multiply), (q.offsets, np.add)):
                if stored is not None:
                    values = np.asarray(stored, np.float64).repeat(q.group_size, axis=1)
                    combine(back, values[:, : q.shape[1]], out=back)
            back -= np.asarray(self.kernels[path], np.float64).T
            found.append(np.square(back, out=back) @ np.asarray(stats[path][Moments()].second_moment, np.float64))
        return np.concatenate(found)

    def _output_error(self, kind: str, nodes: Mapping[str, Any]) -> float:
        """The mean over the layers of |X dW|^2 / |X W|^2, where X are the float model's inputs."""
        before = surgery.linears(self.model)
        paths = [path for path in self.kernels if path.endswith(kind)]
        return float(np.mean([_relative(self.seen[p], before[p].kernel[...], nodes[p].kernel[...]) for p in paths]))


_dense = jax.jit(a4.dequantize)


@jax.jit
def _relative(x: jax.Array, before: jax.Array, after: jax.Array) -> jax.Array:
    def size(kernel):
        return jnp.square(jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST)).sum()

    return size(after - before) / size(before)


if __name__ == "__main__":
    main()
