"""Training of quantized blocks: what moves, what stays, what is judged, and that nothing gets worse."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equality import assert_same
from one_linear import Linears, summed

from any4_jax.methods import FP4, GPTQ, MX4, NF4, Any4, Int, SmoothQuant, Tune, on_block
from any4_jax.methods.apply import apply_block
from any4_jax.methods.tune_leaf import Start, at_rest
from any4_jax.models.tiny import random_llama
from any4_jax.surgery import quantized_leaves
from any4_jax.walk import quantize_model
from any4_jax.weights import QuantizedTensor, dequantize, encode, from_codes, parts

RNG = np.random.default_rng(3)
MATRICES = {path: RNG.standard_t(4, (6, 40)).astype(np.float32) for path in ("a", "b")}
# Inputs that occur together, so that errors can make up for each other.
X = RNG.normal(size=(6, 12, 8)).astype(np.float32) @ RNG.normal(size=(8, 40)).astype(np.float32)
MASK = np.arange(12) < np.array([[12], [12], [9], [12], [5], [12]])


def block(method, **fields) -> Linears:
    return Linears.of(method, MATRICES, X, MASK, **fields)


def held_error(contents, method) -> float:
    """The held-out error of contents, in numpy: the mean square relative to that of all targets."""
    rows = np.random.default_rng(method.seed).permutation(len(X))[: max(1, round(method.held_out * len(X)))]
    wanted, got = (np.asarray(summed(c, jnp.asarray(X)), np.float64) for c in (block(method).contents, contents))
    off = np.square(got - wanted)[rows][MASK[rows]].mean()
    return off / np.square(wanted)[MASK].mean()


def leaves(contents) -> dict[str, QuantizedTensor]:
    found = {path: parts(contents[f"{path}.kernel"]) for path in MATRICES}
    return {path: next(part for part in each if isinstance(part, QuantizedTensor)) for path, each in found.items()}


ANY3 = Any4(bits=3, group_size=16)
CASES = [
    (Tune(ANY3, steps=60, rounding=True, learning_rate=0.01), "lut scales offsets codes"),
    (Tune(Int(bits=3, group_size=16), steps=60, batch=3, rounding=True, held_out=0.4), "scales offsets codes"),
    (Tune(FP4(group_size=16), steps=40, norms=True), "lut scales norm"),
    (Tune(SmoothQuant(MX4(group_size=16)), steps=40, learning_rate=0.02), "lut"),
]


@pytest.mark.parametrize(("method", "moved"), CASES, ids=[type(method.start).__name__ for method, _ in CASES])
def test_what_is_trained_moves_and_the_held_out_error_falls(method, moved: str) -> None:
    """It is that of what is stored, and takes not a bit more."""
    ours = block(method)
    rest, made = on_block(method.start).apply(ours), apply_block(ours, method, "a")
    notes = made.notes["b"]
    assert notes["error_after"] < 0.8 * notes["error_before"] and 0 < notes["best_step"] <= method.steps
    for contents, told in ((rest.contents, notes["error_before"]), (made.contents, notes["error_after"])):
        np.testing.assert_allclose(told, held_error(contents, method), rtol=2e-3)
    for old, new in zip(leaves(rest.contents).values(), leaves(made.contents).values(), strict=True):
        for name in ("lut", "scales", "offsets", "codes"):
            pairs = zip(*(jax.tree.leaves(getattr(q, name)) for q in (old, new)), strict=True)
            assert any((np.asarray(a) != np.asarray(b)).any() for a, b in pairs) == (name in moved), name
        new.check()
        assert (np.diff(np.asarray(new.lut, np.float32)) >= 0).all()
        assert jax.tree.map(lambda a: (a.shape, a.dtype), new) == jax.tree.map(lambda a: (a.shape, a.dtype), old)
    assert (made.contents["norm.scale"] is rest.contents["norm.scale"]) == ("norm" not in moved)


def test_tables_of_integers_lose_nothing_at_their_rounding() -> None:
    """They are trained as float32 and rounded in each step, so that the best is the best of what is stored."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(24, 12, 20)) @ rng.normal(size=(20, 40)) + rng.normal(size=(24, 12, 40))
    after = {}
    for dtype in ("int8", "float32"):
        method = Tune(dataclasses.replace(ANY3, table_dtype=dtype), steps=60)
        made = apply_block(Linears.of(method, MATRICES, x), method, "a")
        assert {str(leaf.lut.dtype) for leaf in leaves(made.contents).values()} == {dtype}
        assert made.notes["a"]["error_after"] < 0.5 * made.notes["a"]["error_before"]
        after[dtype] = made.notes["a"]["error_after"]
    assert after["int8"] < 1.1 * after["float32"]


def test_nothing_gets_worse_and_an_exact_start_stays() -> None:
    """With steps that lead astray, and where no error is left."""
    method = Tune(Int(bits=3, group_size=16), steps=9, learning_rate=1e6)
    made, start = apply_block(block(method), method, "a"), on_block(method.start).apply(block(method))
    assert made.notes["a"]["best_step"] == 0 and made.notes["a"]["error_after"] == made.notes["a"]["error_before"] > 0
    assert_same(made.contents, start.contents)
    held = [
        apply_block(block(m), m, "a").notes["a"]["error_before"] for m in (method, dataclasses.replace(method, seed=1))
    ]
    assert held[0] == made.notes["a"]["error_before"] != held[1]
    few = {path: np.round(4 * np.tanh(w)).clip(-3, 4).astype(np.float32) for path, w in MATRICES.items()}
    for w in few.values():
        w[:, ::16], w[:, 1::16] = -3, 4
    made = apply_block(Linears.of(method, few, X, MASK), method, "a")
    assert made.notes["a"]["best_step"] == 0 and made.notes["a"]["error_after"] < 1e-12
    assert all((dequantize(leaf) == few[path]).all() for path, leaf in leaves(made.contents).items())


def test_the_gradient_of_rounding_is_that_of_the_weight_times_its_step() -> None:
    """Also where the code is the last one and could go no further."""
    w, slope = RNG.normal(size=(2, 3, 20)).astype(np.float32), RNG.normal(size=(2, 3, 20)).astype(np.float32)
    table = np.array([-5, -3, -1, 0, 0.5, 1, 2.5, 4])
    lut = jnp.broadcast_to(jnp.asarray(table, jnp.float32), (2, 3, 8))
    scales = jnp.asarray(RNG.uniform(0.3, 0.6, (2, 3, 3)), jnp.float32)
    leaf = jax.vmap(lambda *a: encode(*a, None, bits=3, group_size=8))(jnp.asarray(w), lut, scales)
    start = Start.of(leaf, jnp.swapaxes(jnp.asarray(w), -1, -2))
    moves = at_rest(leaf, rounding=True)
    np.testing.assert_array_equal(start.matrix(moves), dequantize(leaf))
    found = jax.grad(lambda moves: (jnp.asarray(slope) * start.matrix(moves)).sum())(moves)
    codes, wide = np.asarray(leaf.unpacked_codes()), np.repeat(np.asarray(scales), 8, axis=-1)[..., :20]
    gaps = np.diff(table)
    steps = (np.append(gaps[0], gaps) + np.append(gaps, gaps[-1])) / 2
    np.testing.assert_allclose(found["rounding"], slope * wide * steps[codes], rtol=1e-5)
    assert (codes == 7).any() and (codes == 0).any()
    entries = [[(slope * wide)[i][n][codes[i, n] == e].sum() for e in range(8)] for i in range(2) for n in range(3)]
    # In steps of the table.
    np.testing.assert_allclose(found["table"].reshape(6, 8), np.array(entries) * 9 / 7, rtol=1e-4, atol=1e-5)
    # A weight moves to the next code once it is half a step from its own.
    place = np.asarray(start.place)
    for turn in (-0.5, 0.5):
        moved = start.moved(moves | {"rounding": jnp.full(w.shape, turn)})
        wanted = np.clip(codes + np.round(place + turn), 0, 7)
        np.testing.assert_array_equal(moved.unpacked_codes(), wanted)
        assert (wanted != codes).any() and (wanted == codes).any()


def test_tables_that_are_long_and_scales_that_are_coded_stay() -> None:
    codes = RNG.integers(0, 64, (4, 32)).astype(np.uint8)
    lut = jnp.sort(jnp.asarray(RNG.normal(size=(1, 64)), jnp.float32))
    scales = from_codes(codes[:, :2] % 4, lut[:, :4] + 3, jnp.ones((4, 1)), None, bits=2, group_size=2)
    leaf = from_codes(codes, lut, scales, None, bits=6, group_size=16)
    assert set(at_rest(leaf, rounding=True)) == {"rounding"}
    assert not at_rest(leaf, rounding=False)


@dataclasses.dataclass(frozen=True)
class Ramps(MX4):
    """Fixed tables with scales that are exponents."""

    def apply(self, w, gathered):
        made = super().apply(w, gathered)
        return dataclasses.replace(made, operator=dataclasses.replace(made.operator, uniform=True))


@pytest.mark.parametrize(
    ("method", "x", "words"),
    [
        (Tune(NF4()), None, "got statistics in the place of data, tune trains on data; pass data"),
        (Tune(NF4()), X[:1], "got one row of tokens, and at least 2 are needed, one of which is held out; pass more"),
        (
            Tune(SmoothQuant(MX4(group_size=16)), rounding=True),
            X,
            "got rounding=True for a, which the start makes of scaled or permuted inputs or of a sum",
        ),
        (
            Tune(GPTQ(NF4(group_size=16), static_groups=False), rounding=True),
            X,
            "got rounding=True for a, which the start makes of",
        ),
        (Tune(Ramps(group_size=16)), X, "got a block of which nothing can be trained: its tables are fixed, and its"),
    ],
    ids=range(5),
)
def test_what_can_not_be_trained_is_refused(method, x, words: str) -> None:
    refused = Linears.of(method, MATRICES, X)
    if x is None:
        refused = dataclasses.replace(refused, inputs=[])
    elif len(x) < len(X):
        refused = Linears.of(method, MATRICES, x)
    with pytest.raises(ValueError, match=words):
        method.apply(refused)


def test_outputs_that_are_not_finite_are_refused() -> None:
    method, ours = CASES[2][0], block(CASES[2][0])
    ours = dataclasses.replace(ours, wanted=[jnp.full_like(y, jnp.nan) for y in ours.wanted])
    with pytest.raises(ValueError, match="got an error of nan before any step, and training needs outputs that are"):
        method.apply(ours)


def test_data_is_needed_before_anything_is_done() -> None:
    with pytest.raises(ValueError, match="got no data, tune trains each block on its inputs; pass data"):
        quantize_model(random_llama(), Tune())


def test_the_blocks_of_a_decoder_are_trained_by_one_program(count_compiles: Any) -> None:
    """Each block's error falls, and the model comes closer to the float one."""
    model = random_llama()
    tokens = np.random.default_rng(0).integers(0, 128, (32, 24), dtype=np.int32)
    start = Int(bits=3, group_size=16)
    method = Tune(start, steps=60, batch=4, learning_rate=0.004, rounding=True)
    with count_compiles() as compiles:
        new = quantize_model(model, method, data=tokens, batch_size=4)
    assert compiles.names.count("jit(_train)") == 1
    notes = {path: dict(notes) for path, _, notes in new.recipe.linears}
    assert len(notes) == 14 and all(found["error_after"] < 0.9 * found["error_before"] for found in notes.values())
    assert not np.isclose(notes["layers.0.mlp.up_proj"]["error_after"], notes["layers.1.mlp.up_proj"]["error_after"])
    (record,) = new.recipe.training
    assert (record.by, record.tokens) == ("tune", tokens.size)
    plain = quantize_model(model, start)
    errors = [np.square(np.asarray(one(tokens)) - np.asarray(model(tokens))).mean() for one in (new, plain)]
    assert errors[0] < 0.8 * errors[1]
    sizes = [{path: w.nbytes for path, w in quantized_leaves(one).items()} for one in (new, plain)]
    assert sizes[0] == sizes[1]
