"""FPQ of LLM-FP4 (arXiv 2310.16836): weights and inputs as floats of 4 or 8 bits, whose formats and biases are searched
for the least error of the outputs."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from any4_jax import formats, scaling, weights
from any4_jax.methods import float_search
from any4_jax.methods.base import Order, Result, Scope, SiteResult, SiteWeights
from any4_jax.methods.fields import Fields
from any4_jax.methods.float_search import Coded, Inputs, Problem
from any4_jax.methods.searched import Searched
from any4_jax.methods.units import put_back
from any4_jax.schema import Count, Index, Positive
from any4_jax.statistics import AbsMax, Gathered, Largest, Sample, Statistic
from any4_jax.statistics.largest import sizes
from any4_jax.weights import QuantizedTensor, QuantizeInput, ScaleInput

_TABLE = jnp.bfloat16
"""The dtype of tables: levels have 7 significant bits at most."""
_LARGEST = 32
"""How many of the largest tokens errors are measured on too: to clip these few can cost more than all else."""


@dataclasses.dataclass(frozen=True)
class FPQ(Fields):
    """Floats of E exponent and M mantissa bits under a real-valued bias: one for each row of weights, and one for all
    inputs of a matrix, which is static, so that no token's result depends on the others.

    The largest magnitudes of inputs differ by channel, which one bias serves badly. So each input has a shift of its
    own, an integer from 0 to 2^E - 1 by which its bias exceeds the common one. That is the same as multiplying the
    input by 2^shift before it is rounded, exactly, and 2^-shift is multiplied back before the product.

    A round tries all candidates for weights (for each format and row, then the best format of each matrix), then all
    for inputs. What counts is the squared error of the outputs on a sample of tokens, for the other side as it is, so
    no round makes it worse; published FPQ chooses both formats at the end of a round, and then one may. Matrices that
    share their shifts count alike: the error of each is over its own outputs. Candidates are
    multiples of the bias, as published, but of the bias modulo 1 minus 6: published multiples reach the farther the
    larger the bias, and nowhere if it is 0.

    Attributes:
      bits: of a weight: 4 (E1M2, E2M1, E3M0) or 8 (E1M6 to E5M2).
      input_bits: of an input; None leaves inputs as they are, as for an embedding, whose rows are looked up.
      exponent_bits: E of all formats; None searches them. 1 makes them symmetric integers, of -7 to 7 for 4 bits.
      shifts: with "folded", the matrices that read one input share its shifts, which are folded into the norm or linear
        before them. With "kept", each matrix has its own, and the layer multiplies by them: this serves heads, and
        models without blocks. "none" is the paper's baseline, of one bias for all inputs.
      shift_rounding: of a shift. With "down" no input is clipped that the common bias doesn't clip. Published FPQ
        rounds both biases to the "nearest" integers, which clips an input's largest magnitudes to half of them at
        worst: on channels of unequal sizes that loses more.
      rounds: of the search. With 0 the largest level is the largest magnitude, in E2M1 for 4 bits and E4M3 for 8 unless
        `exponent_bits` tells another: the paper's MinMax.
      low, high, steps: what multiplies the bias: 1, and low + i * (high - low) / steps for i < steps.
      tokens: S, how many are sampled to measure errors, beside the 32 largest.
      scale_dtype: stored dtype of the scales of weights.
      sequential: gather statistics from the model as quantized so far.
      given: take formats, biases and shifts from an earlier search, which are passed as statistics (see
        `any4_jax.walk.load_search_results`), and search nothing.
    """

    name: ClassVar[str] = "fpq"
    table_dtype: ClassVar[str] = "bfloat16"
    bits: Literal[4, 8] = 4
    input_bits: Literal[4, 8] | None = 4
    exponent_bits: Literal[1, 2, 3, 4, 5] | None = None
    shifts: Literal["folded", "kept", "none"] = "folded"
    shift_rounding: Literal["down", "nearest"] = "down"
    rounds: Index = 3
    low: Positive = 0.01
    high: Positive = 1.2
    steps: Count = 100
    tokens: Count = 256
    scale_dtype: scaling.StoredDtype = "bfloat16"
    sequential: bool = False
    given: bool = False

    @property
    def scope(self) -> Scope:
        """Only shifts that are folded concern all matrices of a site."""
        return "site" if self.shifts == "folded" and self.input_bits is not None else "matrix"

    @property
    def order(self) -> Order:
        """Before a linear of the block is quantized, shifts can be folded into it."""
        return "at_once" if self.scope == "site" else "by_site"

    @property
    def needs(self) -> tuple[Statistic, ...]:
        if self.given:
            return (Searched(),)
        return (Sample(self.tokens), *(() if self.input_bits is None else (Largest(_LARGEST), AbsMax())))

    def check(self, gathered: bool) -> None:
        for field, bits in (("bits", self.bits), ("input_bits", self.input_bits)):
            known = [] if bits is None else [exponent for exponent, _ in formats.float_formats(bits)]
            if known and self.exponent_bits is not None and self.exponent_bits not in known:
                raise ValueError(
                    f"got exponent_bits={self.exponent_bits} with {field}={bits}, which has formats of {known[0]} to "
                    f"{known[-1]} exponent bits; choose one of these, or None"
                )
        if self.high <= self.low:
            raise ValueError(f"got low={self.low} and high={self.high}, need a larger high; exchange them")
        if self.given and not gathered:
            raise ValueError(
                "got no search results, fpq with given=True takes what an earlier search found; pass "
                "stats=load_search_results(FILE), or given=False"
            )
        if self.input_bits is not None and not gathered:
            raise ValueError(
                f"got no statistics, fpq with input_bits={self.input_bits} needs the size of each layer's inputs; pass "
                "data, or input_bits=None"
            )

    def apply(self, w: Any, gathered: Gathered | None) -> Any:
        """The result for a matrix float32 [N, K], or for the matrices of a site."""
        if isinstance(w, SiteWeights):
            return self._site(w, gathered)
        made = self._site(SiteWeights({"": w}, foldable=False), gathered)
        one = made.results[""]
        if made.input_scale is None:
            return one
        return dataclasses.replace(one, operator=ScaleInput(one.operator, made.input_scale.astype(_TABLE)))

    def _site(self, site: SiteWeights, gathered: Gathered | None) -> SiteResult:
        problem, units = self._problem(site, gathered)
        notes: dict[str, Any] = {}
        faults: dict[str, tuple[Any, ...]] = {}
        if self.given:
            assert gathered is not None  # `check` refuses to go on without
            found = gathered[Searched()]
            coded, inputs = self._given(site, found, units)
            faults = self._faults(found)
        else:
            first = float_search.from_extremes(problem, self._start(self.bits), self._start(self.input_bits))
            coded, inputs = self._searched(problem, *first)
            notes = {"minmax_error": self._error(problem, *first), "error": self._error(problem, coded, inputs)}
        table = float_search.tables(self.bits, self.exponent_bits).astype(_TABLE)
        scales = scaling.rounded(coded.scales[:, None], jnp.dtype(self.scale_dtype))
        codes = formats.nearest(scaling.normalize(problem.w, scales, None, problem.w.shape[1]), table[coded.format])
        results, begin = {}, 0
        for index, (path, w) in enumerate(site.weights.items()):
            rows = slice(begin, begin := begin + w.shape[0])
            told = {name: errors[index] for name, errors in notes.items()}
            told["exponent_bits"] = problem.weights.exponent[coded.format[rows][0]]
            if inputs is not None:
                told["input_exponent_bits"] = problem.inputs.exponent[inputs.format]
            lut = table[coded.format[rows][0]][None]
            leaf = weights.from_codes(codes[rows], lut, scales[rows], None, bits=self.bits, group_size=w.shape[1])
            operator = self._behind(put_back(leaf, w, units[rows], "absmax"), inputs)
            results[path] = Result(operator, told, faults)
        if inputs is None or self.shifts == "none":
            return SiteResult(results)
        return SiteResult(results, formats.exact_power(inputs.shifts))

    def _problem(self, site: SiteWeights, gathered: Gathered | None) -> tuple[Problem, jax.Array]:
        """What to search, and the power of two that each row of all matrices is over, float32 [N, 1]."""
        parts = list(site.weights.values())
        w = jnp.concatenate(parts)
        units = scaling.unit(w, jnp.dtype(self.scale_dtype))
        matrix = jnp.concatenate([jnp.full(part.shape[0], i, jnp.int32) for i, part in enumerate(parts)])
        known: Any = {} if gathered is None else gathered
        x, counts = self._tokens(known)
        largest = known[AbsMax()] if self.input_bits is not None and AbsMax() in known else None
        if largest is not None and site.foldable:
            # What repeats of a channel share can be folded.
            runs = largest.reshape(-1, site.repeat, site.width)
            largest = jnp.broadcast_to(runs.max(axis=1, keepdims=True), runs.shape).reshape(-1)
        y = None if x is None else float_search.outputs(x, w / units)
        energy = None if y is None else float_search.energies(y, counts)
        grid = [self.low + i * (self.high - self.low) / self.steps for i in range(self.steps)]
        problem = Problem(
            w=w / units,
            shares=float_search.shares_of(w / units, energy, units, matrix, len(parts)),
            matrix=matrix,
            matrices=len(parts),
            x=x,
            counts=counts,
            y=y,
            largest=largest,
            weights=float_search.floats(self.bits, self.exponent_bits),
            inputs=float_search.floats(self.input_bits or 4, self.exponent_bits),
            multipliers=jnp.asarray([1.0, *grid], jnp.float32),
            shifted=self.shifts != "none",
            nearest=self.shift_rounding == "nearest",
            dtype=jnp.dtype(self.scale_dtype),
        )
        return problem, units

    def _tokens(self, known: Any) -> tuple[jax.Array | None, jax.Array | None]:
        """Tokens [T, K] on which errors are measured, and for how many each stands, [T]."""
        if Sample(self.tokens) not in known:
            return None, None
        drawn = known[Sample(self.tokens)]
        if Largest(_LARGEST) not in known:
            return drawn.x, None
        largest = known[Largest(_LARGEST)]
        # What is drawn and among the largest stands for itself, there. Two programs may add up its squares differently.
        others = sizes(drawn.x) < sizes(largest.x).min() * (1 - 1e-5)
        others &= jnp.arange(self.tokens) < drawn.count
        stood_for, few = jnp.maximum(drawn.count - _LARGEST, 0), jnp.maximum(others.sum(dtype=jnp.int32), 1)
        share = stood_for.astype(jnp.float32) / few.astype(jnp.float32)
        counts = jnp.concatenate([jnp.ones(_LARGEST, jnp.float32), jnp.where(others, share, 0.0)])
        return jnp.concatenate([largest.x, drawn.x]), counts

    def _searched(self, problem: Problem, coded: Coded, inputs: Inputs | None) -> tuple[Coded, Inputs | None]:
        def search(_: Any, found: tuple[Coded, Inputs | None]) -> tuple[Coded, Inputs | None]:
            coded = float_search.search_weights(problem, found[1])
            return coded, float_search.search_inputs(problem, coded)

        # Where inputs stay as they are, the second round would find what the first did.
        return jax.lax.fori_loop(0, self.rounds if inputs is not None else min(self.rounds, 1), search, (coded, inputs))

    def _start(self, bits: int | None) -> int:
        """The index of the format of which there is no search."""
        exponents = [exponent for exponent, _ in formats.float_formats(bits or 4)]
        return 0 if self.exponent_bits is not None else exponents.index(4 if bits == 8 else 2)

    def _given(self, site: SiteWeights, found: Any, units: jax.Array) -> tuple[Coded, Inputs | None]:
        """What an earlier search found, as this one would."""
        for path, w in site.weights.items():
            if path not in found["weights"]:
                alone = "each layer by itself"
                raise ValueError(
                    f"got search results of {alone if '' in found['weights'] else 'the layers of a site together'}, "
                    f"need those of {alone if path == '' else f'{path} in its site'}; pass the shifts, input_bits and "
                    "rules of the search"
                )
            rows = found["weights"][path]["scales"].shape[0]
            if rows != w.shape[0]:
                raise ValueError(
                    f"got search results of {rows} rows for {path or 'a matrix'} of {w.shape[0]}; pass those of this "
                    "model"
                )
        if (self.input_bits is None) != ("inputs" not in found):
            kind = "without those of inputs" if "inputs" not in found else "for inputs that are rounded"
            raise ValueError(f"got search results {kind}, with input_bits={self.input_bits}; pass that of the search")
        exponents = float_search.floats(self.bits, self.exponent_bits).exponent
        parts = [(found["weights"][path], w.shape[0]) for path, w in site.weights.items()]
        index = jnp.concatenate([jnp.full(n, _place(exponents, part["exponent"])) for part, n in parts])
        coded = Coded(index, jnp.concatenate([part["scales"] for part, _ in parts]) / units[:, 0])
        if self.input_bits is None:
            return coded, None
        inputs = found["inputs"]
        exponents = float_search.floats(self.input_bits, self.exponent_bits).exponent
        return coded, Inputs(_place(exponents, inputs["exponent"]), inputs["scale"], inputs["shifts"])

    def _faults(self, found: Any) -> dict[str, tuple[Any, ...]]:
        """That search results are of formats which the fields don't allow."""
        sides = [(self.bits, one) for one in found["weights"].values()]
        if self.input_bits is not None:
            sides.append((self.input_bits, found["inputs"]))
        known = [
            (float_search.floats(bits, self.exponent_bits).exponent == one["exponent"]) & (one["bits"] == bits)
            for bits, one in sides
        ]
        text = (
            "got search results of formats that these fields don't allow; pass the bits and exponent_bits of the search"
        )
        return {text: (~jnp.stack([same.any() for same in known]).all(),)}

    def _behind(self, leaf: QuantizedTensor, inputs: Inputs | None) -> Any:
        """The operator for inputs that are multiplied by 2^shift."""
        if inputs is None or self.input_bits is None:
            return leaf
        levels = float_search.tables(self.input_bits, self.exponent_bits)[inputs.format].astype(_TABLE)
        inner = leaf if self.shifts == "none" else ScaleInput(leaf, formats.exact_power(-inputs.shifts).astype(_TABLE))
        return QuantizeInput(inner, levels, self.input_bits, True, "tensor", inputs.scale)

    def _error(self, problem: Problem, coded: Coded, inputs: Inputs | None) -> jax.Array:
        """The share of each matrix's squared outputs that is lost, or of its squares without a sample: [matrices]."""
        return problem.of_matrices(problem.errors(problem.decoded(coded), problem.rounded(inputs)))


def _place(exponents: jax.Array, exponent: jax.Array) -> jax.Array:
    return jnp.argmax(exponents == exponent).astype(jnp.int32)
