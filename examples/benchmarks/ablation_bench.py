"""The float model of ablations.py, how a case quantizes it, and how far that takes it from the float model."""

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ablation_case import OTHER, PROMPT, Case, paper
from ablation_model import Runner, inputs

import any4_jax as a4
from any4_jax import surgery
from any4_jax.data import assets, texts
from any4_jax.evaluation import divergence, paired_difference, perplexity
from any4_jax.methods import Any4
from any4_jax.methods.base import scope_of
from any4_jax.models import degrid
from any4_jax.statistics import Moments
from any4_jax.weights import QuantizedTensor, QuantizeInput, is_operator, parts

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ERROR_TOKENS = 2048


def data(case: Case, encode: Callable[[str], Sequence[int]], text: np.ndarray | None) -> Any:
    """The calibration data of a case: the prompt's text, or token ids [pieces, length].

    Args:
      case: one that is calibrated.
      encode: text -> token ids.
      text: int32 [tokens], the calibration text; None if there is none.
    """
    if case.source == PROMPT:
        return texts.prompt()
    if case.source == OTHER:
        ids = np.asarray(encode(texts.prose()), np.int32)
        return ids[: len(ids) // case.length * case.length].reshape(-1, case.length)
    assert text is not None  # cases without their text are skipped
    return a4.data.pieces(text, case.samples, case.length)


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
        self.text = (
            None
            if args.calibration_text is None
            else np.asarray(encode(args.calibration_text.read_text(encoding="utf-8")), np.int32)
        )
        self.runner = Runner(self.model)
        self.float = perplexity(self.runner, self.ids, seqlen=self.seqlen)
        # The window after the middle one, which is not among 16 that are spread evenly.
        self.seen = dict(inputs(self.model, found[min(len(found) // 2 + 1, len(found) - 1)][:ERROR_TOKENS]))
        self._stats: dict[tuple, Any] = {}
        self._last: tuple[Any, Any, float] | None = None
        self.published = paper(args.group_size)

    def row(self, case: Case, first: Mapping[str, Any] | None) -> dict[str, Any]:
        """Quantizes and measures one case; `first` is the row of the reference, None for the reference itself."""
        model, seconds = self._quantized(case)
        operators = surgery.quantized_leaves(model)
        dense = self._dense(model)
        apart = scope_of(case.method) == "site" or bool(surgery.quantized_leaves(dense))
        measured = divergence(self.runner, Runner(dense), self.ids, seqlen=self.seqlen)
        lost = paired_difference(measured.model, measured.reference)
        stored = sum(q.nbytes for q in operators.values())
        weights = sum(math.prod(q.shape) for q in operators.values())
        row = {
            "case": case.name,
            "method": case.described,
            "calibration": case.calibration,
            "bits_per_weight": 8 * stored / weights,
            "perplexity": measured.model.value,
            "nats_lost": lost.mean,
            "nats_lost_error": lost.error,
            "share_recovered": 0.0 if first is None else 1 - lost.mean / first["nats_lost"],
            "kl_nats": measured.kl,
            "kl_nats_error": measured.bootstrap(),
            "kl_share_recovered": 0.0 if first is None else 1 - measured.kl / first["kl_nats"],
            "top1_share": measured.top1,
            "window_kl_nats": " ".join(f"{value:.6f}" for value in measured.window_kl),
            "learn_seconds": seconds,
            "rows_above_paper": None,
            "worst_row_ratio": None,
            # Neither what a site's method folds into a norm is among the inputs that were seen, nor what rounds them.
            **{f"error_{kind}": None if apart else self._output_error(kind, dense) for kind in KINDS},
        }
        if isinstance(case.method, Any4):
            ratios = self._row_errors(operators) / self._published_errors
            row |= {"rows_above_paper": int((ratios > 1).sum()), "worst_row_ratio": float(ratios.max())}
        return row

    def _quantized(self, case: Case) -> tuple[Any, float]:
        """The quantized model, and the seconds that it took: after compiling and calibrating, or all of a walk."""
        if case.walked:
            model, seconds = self._walked(case)
            if case.tuned is None:
                return model, seconds
            found, begin = data(case, self.model.tokenizer.encode, self.text), time.perf_counter()
            model = a4.tune(model, self.model, found, seqlen=case.length, **dict(case.tuned))
            jax.block_until_ready(surgery.quantized_leaves(model))
            return model, seconds + time.perf_counter() - begin
        operators, seconds = self._learn(case, self._statistics(case))
        return surgery.container_of(self.model).replace(self.model, operators, None), seconds

    def _walked(self, case: Case) -> tuple[Any, float]:
        """The model as a walk quantizes it, and the seconds; the last one is at hand for training that follows."""
        key = (case.quantized, case.calibration)
        if self._last is None or self._last[0] != key:
            self._last = None  # before the next one takes memory
            found = data(case, self.model.tokenizer.encode, self.text) if case.calibrated else None
            begin = time.perf_counter()
            model = a4.quantize_model(self.model, case.method, data=found, seqlen=case.length, rules=case.rules)
            jax.block_until_ready(surgery.quantized_leaves(model))
            self._last = key, model, time.perf_counter() - begin
        return self._last[1:]

    def _dense(self, model: Any) -> Any:
        """The quantized model as one of the float model's form, so that one program runs all of them. Where inputs are
        rounded, they still are, before dense matrices."""

        def dense(leaf: Any) -> Any:
            return jnp.asarray(np.asarray(_dense(leaf)).T) if is_operator(leaf) else leaf

        def behind_rounding(path: str, operator: Any) -> Any:
            is_coded = lambda node: isinstance(node, QuantizedTensor)  # noqa: E731
            return jax.tree.map(lambda node: _dense(node) if is_coded(node) else node, operator, is_leaf=is_coded)

        operators = surgery.quantized_leaves(model).values()
        if any(isinstance(part, QuantizeInput) for operator in operators for part in parts(operator)):
            return surgery.map_operators(model, behind_rounding)
        container = surgery.container_of(model)
        return container.fill(self.model, jax.tree.map(dense, container.tree(model), is_leaf=is_operator), None)

    def _statistics(self, case: Case) -> Mapping[str, Any]:
        """The statistics for a case, on the CPU."""
        if not case.calibrated:
            return {}
        key = (case.calibration, case.method.needs)
        if key not in self._stats:
            found = a4.calibrate(
                self.model, data(case, self.model.tokenizer.encode, self.text), case.method, seqlen=case.length
            )
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
        return self._row_errors(surgery.quantized_leaves(self._quantized(self.published)[0]))

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

    def _output_error(self, kind: str, dense: Any) -> float:
        """The mean over the layers of |X dW|^2 / |X W|^2, where X are the float model's inputs."""
        before, nodes = surgery.linears(self.model), surgery.linears(dense)
        paths = [path for path in self.kernels if path.endswith(kind)]
        return float(np.mean([_relative(self.seen[p], before[p].kernel[...], nodes[p].kernel[...]) for p in paths]))


_dense = jax.jit(a4.dequantize)


@jax.jit
def _relative(x: jax.Array, before: jax.Array, after: jax.Array) -> jax.Array:
    def size(kernel):
        return jnp.square(jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST)).sum()

    return size(after - before) / size(before)
