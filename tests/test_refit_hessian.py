"""The refit under a Hessian: least squares against float64, codes against all codes, and what must not move.

A few configurations of one shape: each compiles for a second.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equality import assert_same

from any4_jax import formats, scaling
from any4_jax.methods.integer_tables import stored
from any4_jax.refit import Fit
from any4_jax.refit.descent import Grid, descend
from any4_jax.refit.hessian import improve

N, K, G, BITS = 8, 40, 16, 3
GROUPS = scaling.group_count(K, G)


def hessian(k: int = K) -> np.ndarray:
    """Of inputs that depend on each other, of different sizes."""
    rng = np.random.default_rng(7)
    x = rng.normal(0.3, 1, (4 * k, k)) @ (np.eye(k) + rng.normal(size=(k, k)) / np.sqrt(k))
    x *= 10.0 ** rng.uniform(-0.5, 0.5, k)
    return (x.T @ x / len(x)).astype(np.float32)


H = hessian()


def layer(n: int = N, k: int = K) -> np.ndarray:
    return np.random.default_rng(3).standard_t(5, (n, k)).astype(np.float32)


def started(w: np.ndarray, group_size: int = G, bits: int = BITS, *, offsets=True, dtype="bfloat16", exponents=False):
    """A table for each row, and the nearest codes, as round-to-nearest gives them; scales may be exponents."""
    rule = "asymmetric" if offsets else "symmetric"
    made = scaling.group_scales(jnp.asarray(w), group_size, rule=rule, bits=bits, dtype=jnp.dtype(dtype))
    if exponents:
        made = scaling.group_scales(jnp.asarray(w), group_size, rule="e8m0_round", bits=bits, dtype=None)
    table = np.sort(np.random.default_rng(4).uniform(-1, 1, (len(w), 2**bits)), axis=1) * 2 ** (bits - 1)
    lut = jnp.asarray(table, jnp.dtype(dtype))
    u = scaling.normalize(jnp.asarray(w), made.scales, made.offsets, group_size)
    return Fit(lut, made.scales, made.offsets), formats.nearest(u, lut)


def values(fit: Fit, codes, group_size: int = G) -> np.ndarray:
    """lut[codes] s + o in float64, from the stored arrays alone."""
    n, k = codes.shape
    table = np.broadcast_to(np.asarray(fit.lut, np.float64), (n, fit.lut.shape[1]))
    found = np.take_along_axis(table, np.asarray(codes, np.int64), axis=1)
    found = found * np.asarray(scaling.scale_values(fit.scales), np.float64).repeat(group_size, axis=1)[:, :k]
    if fit.offsets is None:
        return found
    return found + np.asarray(fit.offsets, np.float64).repeat(group_size, axis=1)[:, :k]


def errors(w, h, fit: Fit, codes, group_size: int = G) -> np.ndarray:
    """(w - q) H (w - q)^T of each row in float64."""
    gap = np.asarray(w, np.float64) - values(fit, codes, group_size)
    return ((gap @ np.asarray(h, np.float64)) * gap).sum(axis=1)


def run(w, start: Fit, codes, h=H, group_size: int = G, *, rounds=1, sweeps=2, **options):
    return improve(jnp.asarray(w), jnp.asarray(h), start, codes, group_size, rounds=rounds, sweeps=sweeps, **options)


def least(w, h, columns: np.ndarray) -> np.ndarray:
    """The values B x that are nearest to a row w under H, for the columns B [K, n]."""
    root = np.linalg.cholesky(np.asarray(h, np.float64)).T
    x = np.linalg.lstsq(root @ columns, root @ np.asarray(w, np.float64), rcond=None)[0]
    return columns @ x


def test_tables_are_those_of_numpys_least_squares() -> None:
    """Also where they have to be sorted afterwards: the codes are any."""
    w, (start, _) = layer(), started(layer(), offsets=False, dtype="float32", exponents=True)
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 2**BITS, (N, K)), jnp.uint8)
    fit, new = run(w, start, codes, sweeps=0)
    scales = np.asarray(scaling.scale_values(start.scales), np.float64).repeat(G, axis=1)[:, :K]
    best = [
        least(w[i], H, (np.asarray(codes[i])[:, None] == np.arange(2**BITS)) * scales[i, :, None]) for i in range(N)
    ]
    np.testing.assert_allclose(values(fit, new), best, rtol=1e-3, atol=1e-3)
    assert (np.diff(fit.lut, axis=1) >= 0).all() and not np.array_equal(new, codes)
    assert_same(fit.scales, start.scales)


@pytest.mark.parametrize("offsets", [True, False], ids=["with offsets", "without"])
def test_scales_and_offsets_are_those_of_numpys_least_squares(offsets) -> None:
    """All groups at once, the last one short."""
    w, (start, codes) = layer(), started(layer(), offsets=offsets, dtype="float32")
    fit, new = run(w, start, codes, sweeps=0, entries=slice(0))
    mine = np.arange(K)[:, None] // G == np.arange(GROUPS)
    for i in range(N):
        levels = np.asarray(start.lut, np.float64)[i, np.asarray(codes[i])][:, None]
        columns = np.concatenate([mine * levels, mine], axis=1) if offsets else mine * levels
        np.testing.assert_allclose(values(fit, codes)[i], least(w[i], H, columns), rtol=1e-3, atol=1e-3)
    assert_same((fit.lut, new), (start.lut, codes))
    assert (fit.offsets is not None) == offsets


@pytest.mark.parametrize(("mean", "table"), [(0.0, jnp.bfloat16), (100.0, jnp.bfloat16), (0.0, jnp.int8)])
def test_no_round_raises_a_rows_error_in_stored_dtypes(mean, table) -> None:
    """Far from zero, bfloat16 offsets are coarse, and what is best before rounding is often worse after it."""
    w = layer() + np.float32(mean)
    start, codes = started(w)
    if table == jnp.int8:
        start = stored(start._replace(lut=start.lut.astype(jnp.float32)), table)
    reached = [errors(w, H, start, codes)]
    for rounds in (1, 2, 3, 4, 5, 6, 8):
        fit, new = run(w, start, codes, rounds=rounds)
        assert [a.dtype for a in fit] == [table, jnp.bfloat16, jnp.bfloat16] and new.dtype == jnp.uint8
        assert (np.diff(np.asarray(fit.lut, np.float32), axis=1) >= 0).all()
        reached.append(errors(w, H, fit, new))
        assert (reached[-1] <= reached[-2] * (1 + 1e-6)).all()
    assert reached[1].sum() < 0.5 * reached[0].sum() and reached[4].sum() < 0.9 * reached[1].sum()


def test_each_step_lowers_the_error() -> None:
    w, (start, codes) = layer(), started(layer())
    no_codes = run(w, start, codes, rounds=1, sweeps=0)
    all_three = run(w, start, codes, rounds=1, sweeps=2)
    reached = [errors(w, H, *made).sum() for made in ((start, codes), no_codes, all_three)]
    assert reached[1] < 0.8 * reached[0] and reached[2] < 0.8 * reached[1]


def test_what_is_exact_or_settled_stays() -> None:
    start, codes = started(layer())
    exact = values(start, codes).astype(np.float32)
    assert_same(run(exact, start, codes, rounds=3), (start, codes))
    settled = run(layer(), start, codes, rounds=60)
    assert_same(run(layer(), *settled, rounds=3), settled)


def coded(w: np.ndarray) -> tuple[Fit, jax.Array]:
    """Where nothing but codes of 2 bits can move, and the nearest codes."""
    return started(w, bits=2, offsets=False, exponents=True)


def test_independent_inputs_take_the_nearest_codes() -> None:
    """From any codes, in one sweep."""
    w, (start, nearest) = layer(), coded(layer())
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 4, (N, K)), jnp.uint8)
    assert_same(run(w, start, codes, np.diag(np.diagonal(H)), sweeps=1, entries=slice(0)), (start, nearest))


def test_no_other_code_lowers_the_error() -> None:
    """Of all combinations of four codes: coordinate descent ends where changing a single code lowers nothing. The
    Hessian is ten of 4 x 4, so each row is ten such problems."""
    few = np.arange(K) // 4
    w, h = layer(), np.where(few[:, None] == few, H, 0)
    start, codes = coded(w)
    fit, found = run(w, start, codes, h, sweeps=20, entries=slice(0))

    def each(codes):
        """The error of each problem, [N, 10]."""
        gap = w - values(start, codes)
        return ((gap @ h.astype(np.float64)) * gap).reshape(N, -1, 4).sum(axis=2)

    reached, found = each(found), np.asarray(found)
    every = {four: each(np.tile(np.uint8(four), (N, K // 4))) for four in itertools.product(range(4), repeat=4)}
    assert (reached <= each(codes)).all() and not np.array_equal(found, codes)
    assert (reached >= np.min(list(every.values()), axis=0) * (1 - 1e-6)).all()
    for row, first, column, code in itertools.product(range(N), range(0, K, 4), range(4), range(4)):
        other = found[row, first : first + 4].copy()
        other[column] = code
        assert every[tuple(other.tolist())][row, first // 4] >= reached[row, first // 4] * (1 - 1e-5)


def test_the_block_size_changes_no_code() -> None:
    """Also where it divides the row into unequal blocks."""
    w, (start, codes) = layer(), coded(layer())
    pull = jnp.asarray((w - values(start, codes)) @ H, jnp.float32)
    grid = Grid(start.lut.astype(jnp.float32), scaling.scale_values(start.scales), None)
    arguments = jnp.asarray(w), jnp.asarray(H), grid, codes, pull, G
    whole, blocks = (descend(*arguments, sweeps=3, uniform=False, block=block) for block in (128, 12))
    np.testing.assert_array_equal(whole, blocks)
    assert not np.array_equal(whole, codes)


def test_codes_of_equal_entries_stay() -> None:
    start, codes = coded(layer())
    table = jnp.broadcast_to(jnp.asarray([0.0, 1.0, 1.0, 1.0]), start.lut.shape)
    grid = Grid(table, scaling.scale_values(start.scales), None)
    target = grid.values(codes, G)
    zero = jnp.zeros_like(target)
    np.testing.assert_array_equal(descend(target, jnp.asarray(H), grid, codes, zero, G, sweeps=1, uniform=False), codes)


def test_a_rows_bits_depend_on_no_other_row() -> None:
    """Neither on their order nor on their number: here there are two chunks of rows."""
    w = layer(300)
    start, codes = started(w)
    whole = run(w, start, codes, rounds=3)
    order = np.random.default_rng(1).permutation(300)
    rows = jax.tree.map(lambda a: a[order], (w, start, codes))
    assert_same(run(*rows, rounds=3), jax.tree.map(lambda a: a[order], whole))
    last = jax.tree.map(lambda a: a[-N:], (w, start, codes))
    assert_same(run(*last, rounds=3), jax.tree.map(lambda a: a[-N:], whole))


def test_a_shared_table_stays() -> None:
    w = layer()
    made = scaling.group_scales(jnp.asarray(w), G, rule="absmax", bits=4, dtype=jnp.bfloat16)
    start = Fit(jnp.asarray([formats.NF4_LEVELS], jnp.bfloat16), *made)
    codes = formats.nearest(scaling.normalize(jnp.asarray(w), *made, G), start.lut)
    fit, new = run(w, start, codes, entries=slice(0))
    assert_same(fit.lut, start.lut)
    assert fit.offsets is None
    assert errors(w, H, fit, new).sum() < 0.7 * errors(w, H, start, codes).sum()


@pytest.mark.parametrize(
    ("lut", "uniform", "words"),
    [
        (jnp.zeros((1, 8)), False, "that is shared by 8 rows, it must stay as it is; pass entries=slice"),
        (jnp.zeros((N, 8)), True, "that is a ramp, it must stay as it is; pass entries=slice"),
    ],
)
def test_tables_that_must_stay_are_not_asked_to_move(lut, uniform, words) -> None:
    start, codes = started(layer())
    with pytest.raises(ValueError, match=words):
        run(layer(), start._replace(lut=lut), codes, uniform=uniform)


def test_a_ramp_stays() -> None:
    w, (start, _) = layer(), started(layer())
    start = start._replace(lut=jnp.asarray([formats.ramp(BITS)], jnp.bfloat16))
    codes = formats.nearest(scaling.normalize(jnp.asarray(w), start.scales, start.offsets, G), start.lut)
    fit, new = run(w, start, codes, uniform=True, entries=slice(0))
    assert_same(fit.lut, start.lut)
    assert errors(w, H, fit, new).sum() < 0.7 * errors(w, H, start, codes).sum()


def test_an_entry_without_codes_stays() -> None:
    """The first row has none of its entry 3, and the second row has one code alone."""
    w, (start, codes) = layer(), started(layer())
    codes = codes.at[0].set(jnp.where(codes[0] == 3, 2, codes[0])).at[1].set(5)
    fit, new = run(w, start, codes, sweeps=0)
    assert start.lut[0, 3] in fit.lut[0]
    assert (np.isin(start.lut[1], fit.lut[1])).sum() >= 2**BITS - 1
    assert (errors(w, H, fit, new) < errors(w, H, start, codes)).all()


def test_ends_may_be_held_and_bound_the_others() -> None:
    """Any codes would put the entries anywhere."""
    w, (start, _) = layer(), started(layer())
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 2**BITS, (N, K)), jnp.uint8)
    fit, _ = run(w, start, codes, entries=slice(1, -1))
    np.testing.assert_array_equal(fit.lut[:, [0, -1]], start.lut[:, [0, -1]])
    assert (np.diff(np.asarray(fit.lut, np.float32), axis=1) >= 0).all()
    assert not np.array_equal(fit.lut, start.lut)


@pytest.mark.parametrize("power", [-90, 7, 90])
def test_powers_of_two_scale_exactly(power) -> None:
    """Weights of any size, squared or not, and any Hessian."""
    w, (start, codes) = layer(), started(layer())
    factor = np.float32(2.0**power)
    larger = Fit(start.lut, start.scales * factor.astype(jnp.bfloat16), start.offsets * factor.astype(jnp.bfloat16))
    plain, its_codes = run(w, start, codes, rounds=3)
    fit, new = run(w * factor, larger, codes, H * 2.0**-power, rounds=3)
    assert_same((fit.lut, new), (plain.lut, its_codes))
    for ours, theirs in zip(fit[1:], plain[1:], strict=True):
        np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(theirs, np.float32) * factor)


def test_rows_and_groups_without_extent_stay() -> None:
    w = layer()
    w[2], w[5, :G], w[6, G : 2 * G] = 0, 0, 0.75
    start, codes = started(w)
    fit, new = run(w, start, codes, rounds=3)
    back = values(fit, new)
    assert not back[2].any() and not back[5, :G].any() and (back[6, G : 2 * G] == 0.75).all()
    assert np.isfinite(back).all()
    assert (errors(w, H, fit, new) <= errors(w, H, start, codes)).all()
