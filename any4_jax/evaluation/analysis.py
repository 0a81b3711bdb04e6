"""What quantization methods do to each layer of a model, side by side.

Letters: N and K outputs and inputs of a linear, L leading axes of stacks, S sampled tokens.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from any4_jax.evaluation.weight_stats import WeightStats, code_entropy
from any4_jax.methods import Int, Method, quantize
from any4_jax.methods.base import scope_of
from any4_jax.methods.matrices import Matrix, quantize_matrix
from any4_jax.models.base import Decoder
from any4_jax.statistics import Gathered, Sample
from any4_jax.surgery import container_of, resolve
from any4_jax.surgery.rules import matching
from any4_jax.walk.calibrate import Data, calibrate
from any4_jax.weights import QuantizedTensor, dequantize, from_codes

SAMPLE = Sample(512)
"""The inputs that calibrated errors are measured on: of so many tokens of the text."""


@dataclasses.dataclass(frozen=True)
class Loss:
    """What an error costs beside the signal: both are means of squares.

    Attributes:
      mse: of the error.
      power: of what it is an error of.
    """

    mse: float
    power: float

    @property
    def sqnr(self) -> float:
        """10 log10(power / mse) in decibels; infinite without an error."""
        if self.mse == 0:
            return math.inf
        return 10 * math.log10(self.power / self.mse) if self.power else -math.inf


@dataclasses.dataclass(frozen=True)
class MethodLoss:
    """A layer as a method quantizes it.

    Attributes:
      bits_per_weight: of all stored arrays.
      code_entropy: the bits that its codes carry; NaN where there is more than one table-coded matrix.
      weights: of the weights.
      uniform, normal: of the layer's outputs, where its inputs are independent and uniform from 0 to 1, or normal with
        mean 0 and variance 1. They are expectations, computed without drawing any.
      calibrated: of the layer's outputs for inputs that it has in the float model; None without data.
    """

    bits_per_weight: float
    code_entropy: float
    weights: Loss
    uniform: Loss
    normal: Loss
    calibrated: Loss | None

    @property
    def output(self) -> Loss:
        """Of the outputs: `calibrated` where there is data, else `normal`."""
        return self.normal if self.calibrated is None else self.calibrated


@dataclasses.dataclass(frozen=True)
class LayerAnalysis:
    """A layer: its weights, and what each method makes of them, by the method's label."""

    path: str
    weights: WeightStats
    methods: Mapping[str, MethodLoss]


@dataclasses.dataclass(frozen=True, eq=False)
class RowLevels:
    """A row of a matrix, and the values that its weights can take.

    Attributes:
      path, index: of the layer, and of the row in it.
      weights: float32 [K].
      levels: float64 [2**bits], ascending, by the label of each method that gives a table and has a group size; the
        whole row is one group.
    """

    path: str
    index: int
    weights: np.ndarray
    levels: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What `analyze` found: the layers, and the row that it was asked for, if any."""

    layers: tuple[LayerAnalysis, ...]
    row: RowLevels | None


def analyze(
    model: Any,
    methods: Mapping[str, Method],
    data: Data | None = None,
    *,
    layers: str = r".*",
    row: tuple[str | None, int] | None = None,
    seqlen: int = 2048,
    progress: Callable[[int, int, str], None] | None = None,
) -> Analysis:
    """Quantizes each layer of a float model by each method, apart from the others, and measures what is lost.

    Args:
      model: any that `quantize_model` takes.
      methods: methods of one matrix, by the labels that they get.
      data: what the model is calibrated on, as in `calibrate`; None for methods that need no data.
      layers: a regex of paths; others are passed over.
      row: the path of a layer (None for the first), and the index of a row in it, whose levels are to be found. A stack
        counts the rows of all its matrices.
      seqlen: the longest sequence, in tokens.
      progress: called with (layers done, layers in total, path).

    Raises:
      ValueError: there is no method, one of them sees more than a matrix, or it needs data and there is none; layers of
        the model are quantized; no layer matches, or there is no such row.
    """
    if not methods:
        raise ValueError("got no method, and at least one is needed; name one")
    for label, method in methods.items():
        if scope_of(method) != "matrix":
            raise ValueError(
                f"got {label}, which quantizes the matrices of a {scope_of(method)} together, and a method of one "
                "matrix is needed; compare the models with layer_errors"
            )
        method.check(data is not None)
    chosen = linears_of(model, layers)
    at = None if row is None else (next(iter(chosen)) if row[0] is None else row[0], row[1])
    if at is not None and (at[0] not in chosen or not 0 <= at[1] < math.prod(chosen[at[0]].shape[:-1])):
        raise ValueError(f"got row {at[1]} of {at[0]}, and there is no such row of a layer here; name another")
    stats: dict[str, Gathered] = {}
    if data is not None:
        needs = (SAMPLE, *(statistic for method in methods.values() for statistic in method.needs))
        stats = calibrate(model, data, also=needs, sequential=False, seqlen=seqlen)
    found = []
    for path, matrix in chosen.items():
        w, gathered = _rows(matrix), stats.get(path)
        losses = {}
        for label, method in methods.items():
            operator = quantize_matrix(matrix, method, gathered, path).operator
            losses[label] = _loss(w, operator, gathered)
        found.append(LayerAnalysis(path, WeightStats.of(w), losses))
        if progress is not None:
            progress(len(found), len(chosen), path)
    return Analysis(tuple(found), None if at is None else _levels(*at, chosen[at[0]], methods, stats.get(at[0])))


def linears_of(model: Any, layers: str = r".*") -> dict[str, Matrix]:
    """The float linears of a model by path, of those that the regex matches; an embedding only if nothing else does.

    Raises:
      ValueError: there is none, or some are quantized.
    """
    container = container_of(model)
    if done := container.operators(model):
        raise ValueError(
            f"got a {type(model).__name__} with {len(done)} of its layers quantized already; pass the float model"
        )
    matrices = container.matrices(model, None, ())
    if not matrices:
        raise ValueError(f"got a {type(model).__name__} without float linears, and one is needed; pass the float model")
    paths = matching(matrices, layers)
    by_name = {path for path in paths if matrices[path].by_name}
    # Which layers are taken doesn't depend on the method.
    linears = list(resolve(paths, Int(), None, by_name)) or paths
    places = {path: place for place, path in enumerate(_in_order(model))}
    return {path: matrices[path] for path in sorted(linears, key=lambda path: places.get(path, len(places)))}


def _in_order(model: Any) -> list[str]:
    """The linears of a decoder's blocks in the order in which they run; none of other models."""
    count = len(model.blocks) if isinstance(model, Decoder) else 0
    sites = ((model.block_path(index), site) for index in range(count) for site in model.sites(index))
    return [f"{path}.{linear}" for path, site in sites for linear in site.linears]


def _rows(matrix: Matrix) -> jax.Array:
    """[*L, N, K]."""
    array = matrix.arranged()
    return jnp.swapaxes(array, -1, -2) if matrix.transposed else array


def _levels(
    path: str, index: int, matrix: Matrix, methods: Mapping[str, Method], gathered: Gathered | None
) -> RowLevels:
    w = _rows(matrix)
    which, row = divmod(index, w.shape[-2])
    one = w.reshape(-1, *w.shape[-2:])[which, row : row + 1]
    own = gathered.of_expert(which) if gathered is not None and gathered.stack else gathered
    levels = {}
    for label, method in methods.items():
        if not hasattr(method, "group_size"):
            continue
        whole: Any = dataclasses.replace(method, group_size=w.shape[-1])  # type: ignore[type-var]
        leaf = quantize(one, whole, own, path=path)
        if isinstance(leaf, QuantizedTensor):
            levels[label] = np.sort(_values(leaf))
    return RowLevels(path, index, np.asarray(one[0], np.float32), levels)


def _values(leaf: QuantizedTensor) -> np.ndarray:
    """The values of a leaf [1, K] of one group, float64 [2**bits]: what it gives for each of its codes."""
    codes = jnp.arange(2**leaf.bits, dtype=jnp.uint8)[None]
    every = from_codes(codes, leaf.lut, leaf.scales, leaf.offsets, bits=leaf.bits, group_size=codes.shape[-1])
    return np.asarray(dequantize(every)[0], np.float64)


def _loss(w: jax.Array, operator: Any, gathered: Gathered | None) -> MethodLoss:
    n, k = w.shape[-2:]
    stack = w.reshape(-1, n, k)
    parts = jax.tree.map(lambda array: array.reshape(-1, *array.shape[w.ndim - 2 :]), operator)
    sums, outputs = np.zeros((2, 2)), np.zeros(2)
    tokens = 0
    for index, one in enumerate(stack):
        leaf = jax.tree.map(lambda array, at=index: array[at], parts)
        d = dequantize(leaf) - one.astype(jnp.float32)
        sums += np.asarray(_moments(jnp.stack([d, one.astype(jnp.float32)])), np.float64).sum(axis=-1)
        if gathered is not None:
            seen = gathered.of_expert(index)[SAMPLE] if gathered.stack else gathered[SAMPLE]
            outputs += np.asarray(_products(d, one, seen.x), np.float64)
            tokens += min(int(seen.count), SAMPLE.tokens)
    values = len(stack) * n
    squares, squared_sums = (sums / values).T
    return MethodLoss(
        operator.bits_per_weight,
        code_entropy(operator),
        Loss(*(squares / k)),
        Loss(*(squares / 12 + squared_sums / 4)),
        Loss(*squares),
        None if gathered is None or not tokens else Loss(*(outputs / (tokens * n))),
    )


@jax.jit
def _moments(w: jax.Array) -> jax.Array:
    """For each row of w [2, N, K]: sum w^2 and (sum w)^2, as [2, 2, N]. With independent inputs of mean m and variance
    v, the expectation of (w x)^2 is v sum w^2 + m^2 (sum w)^2."""
    return jnp.stack([jnp.square(w).sum(axis=-1), jnp.square(w.sum(axis=-1))], axis=1)


@jax.jit
def _products(d: jax.Array, w: jax.Array, x: jax.Array) -> jax.Array:
    """The sums of squares of x d^T and of x w^T, for x [S, K] whose rows beyond the tokens are zeros."""

    def total(rows: jax.Array) -> jax.Array:
        y = jnp.matmul(x, rows.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST)
        return jnp.square(y).sum(axis=1).sum()

    return jnp.stack([total(d), total(w)])
