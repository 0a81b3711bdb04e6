"""Walks that start again: killed runs of methods of every scope, and what their results are kept under."""

import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
from equality import assert_same
from flax import nnx
from toy_methods import EvenInputs, FitNorms, Nested

from any4_jax.checkpoint import load, save
from any4_jax.checkpoint.partial import PartialStore
from any4_jax.cli import main
from any4_jax.methods import CATALOGUE, GPTQ, NF4, Int, Result, on_block, on_site
from any4_jax.methods.matrices import plain_note
from any4_jax.models.tiny import random_llama
from any4_jax.walk import calibrate, quantize_model

NF = NF4(group_size=16)
SEQUENTIAL = Nested(inner=Int(4, group_size=16))
TOKENS = np.random.default_rng(0).integers(0, 128, (3, 12), dtype=np.int32)


@pytest.fixture(scope="module")
def model():
    """Its linears have one shape: what is quantized compiles once a method, rather than once a shape too."""
    return random_llama(dataclasses.replace(random_llama().config, intermediate_size=48, num_key_value_heads=6))


class Killed(BaseException):
    """Stands for the end of a process: nothing catches it."""


# Rules may give two methods of a site, or of a block, to linears of the same one.
TWO = {
    "sites": (EvenInputs(Int(8, group_size=16)), [(r".*\.(q|up)_proj", EvenInputs(Int(4, group_size=16)))]),
    "lifted": (on_site(NF), [(r".*\.(q|up)_proj", on_site(Int(4, group_size=16)))]),
    "blocks": (FitNorms(NF, 2), [(r".*\.(q|up)_proj", FitNorms(Int(4, group_size=16), 2))]),
}


@pytest.mark.parametrize("data", [TOKENS, None], ids=["data", "no data"])
@pytest.mark.parametrize("case", TWO)
def test_two_methods_within_a_site_or_block_are_kept_apart(case, data, model, tmp_path) -> None:
    method, rules = TWO[case]
    if case == "blocks" and data is None:
        method, rules = on_block(NF), [(rules[0][0], on_block(Int(4, group_size=16)))]
    whole = quantize_model(model, method, rules=rules, data=data)
    for _ in range(2):
        with PartialStore(tmp_path / "partial") as store:
            again = quantize_model(model, method, rules=rules, data=data, finished=store)
        assert_same(nnx.state(again), nnx.state(whole))
        assert again.recipe == whole.recipe
    assert store.reused > 0


def test_statistics_in_hand_are_part_of_what_is_kept(model, tmp_path) -> None:
    method, stats = EvenInputs(Int(8, group_size=16)), calibrate(model, TOKENS)
    for data, reused in ((TOKENS, False), (TOKENS, True), (TOKENS[:1], False)):
        with PartialStore(tmp_path / "partial") as store:
            quantize_model(model, method, stats=stats if data is TOKENS else calibrate(model, data), finished=store)
        assert (store.reused > 0) == reused


WALKS = [(SEQUENTIAL, limit) for limit in (0, 3, 8, 13)]
WALKS += [(GPTQ(NF, static_groups=False), 9)]
# A site and a block are kept whole: one place in each of the two blocks will do.
WALKS += [
    (method, limit) for method in (EvenInputs(Int(8, group_size=16)), FitNorms(Nested(NF), 2)) for limit in (0, 8)
]


@pytest.fixture(scope="module")
def walked(model):
    """Method -> what a walk makes that nothing kills."""
    return functools.cache(lambda method: quantize_model(model, method, data=TOKENS))


def killed_walk(model, method, limit, folder) -> None:
    def kill(done: int, total: int, path: str) -> None:
        if done > limit:
            raise Killed

    with pytest.raises(Killed), PartialStore(folder) as store:
        quantize_model(model, method, data=TOKENS, finished=store, progress=kill)


@pytest.mark.parametrize(("method", "limit"), WALKS, ids=lambda of: getattr(of, "name", of))
def test_a_killed_walk_continues_with_equal_bytes(method, limit, model, walked, tmp_path) -> None:
    killed_walk(model, method, limit, tmp_path / "partial")
    whole = walked(method)
    with PartialStore(tmp_path / "partial") as store:
        again = quantize_model(model, method, data=TOKENS, finished=store)
    assert store.reused > 0
    assert_same(nnx.state(again), nnx.state(whole))
    assert again.recipe == whole.recipe


@pytest.mark.parametrize("method", dict.fromkeys(method for method, _ in WALKS), ids=lambda method: method.name)
def test_results_of_other_tokens_are_not_taken(method, model, tmp_path) -> None:
    killed_walk(model, method, 0, tmp_path / "partial")
    with PartialStore(tmp_path / "partial") as store:
        quantize_model(model, method, data=TOKENS + 1 - 2 * (TOKENS == 127), finished=store)
    assert store.reused == 0


def test_a_continued_run_captures_nothing_for_finished_sites(model, runs, tmp_path) -> None:
    with PartialStore(tmp_path / "partial") as store:
        quantize_model(model, SEQUENTIAL, data=TOKENS, finished=store)
        runs.clear()
        quantize_model(model, SEQUENTIAL, data=TOKENS, finished=store)
    assert runs == {("layers.0", True): 1, ("layers.1", True): 1}


def test_the_command_counts_the_linears_that_a_site_has(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(CATALOGUE, EvenInputs.name, EvenInputs)
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl who had a red ball.")
    rules = ["--rules", r"layers\.[1-4].*=none"]
    command = ["quantize", "tiny", str(tmp_path / "out"), "--method", EvenInputs.name, "--calibrate", str(text), *rules]
    put, kept = PartialStore.put, []

    def killing(self, path, key, result):
        if len(kept) == 2:
            raise Killed
        kept.append(len(result.notes))
        put(self, path, key, result)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(PartialStore, "put", killing)
        main(command)
    assert sum(kept) > 2
    capsys.readouterr()
    assert main(command) == 0
    assert f"resuming: {sum(kept)} of 7 layers were done before" in capsys.readouterr().err.splitlines()


@dataclasses.dataclass(frozen=True)
class Telling:
    """A method with notes of every kind."""

    name: ClassVar[str] = "toy-telling"
    sequential: ClassVar[bool] = False
    needs: ClassVar[tuple] = ()
    inner: NF4 = NF

    def check(self, gathered: bool) -> None: ...

    def apply(self, w, gathered) -> Result:
        said = {"words": ("a", "b"), "sizes": w.shape, "ends": (w.min(), w.max()), "nested": ((1, 2), (w[0, 0],))}
        return Result(self.inner.apply(w, None).operator, said | {"row": w[0, :2], "whether": True})


def test_a_site_keeps_what_it_changed_and_nothing_else(model) -> None:
    """Also where the linears that feed it are operators already."""
    kept = {}

    class Store:
        def get(self, path, key):
            return None

        def put(self, path, key, result):
            kept[path] = result

    quantize_model(model, EvenInputs(Int(8, group_size=16)), data=TOKENS, finished=Store())
    names = {path.split("(")[0]: set(result.operator) for path, result in kept.items()}
    assert names["layers.0.mlp_in"] == {
        "mlp.gate_proj.kernel", "mlp.up_proj.kernel", "post_attention_layernorm.scale", "/folded"
    }  # fmt: skip
    assert names["layers.0.attn_out"] == {"self_attn.o_proj.kernel", "self_attn.v_proj.kernel", "/folded"}


def test_notes_may_be_tuples(model, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(CATALOGUE, "toy-telling", Telling)
    new = quantize_model(model, Telling())
    notes = dict(next(noted for path, _, noted in new.recipe.linears if path == "layers.1.mlp.up_proj"))
    kernel = np.asarray(model.layers[1].mlp.up_proj.kernel.get_value())
    assert notes["words"] == ("a", "b") and notes["sizes"] == kernel.shape[::-1] and notes["whether"] is True
    assert notes["ends"] == (kernel.min(), kernel.max()) and notes["nested"] == ((1, 2), (kernel[0, 0],))
    assert notes["row"] == tuple(kernel[:2, 0])
    hash(new.recipe)
    assert plain_note((jnp.float32(jnp.nan), 1.5, [jnp.inf])) == ("nan", 1.5, ("inf",))
    for _ in range(2):
        with PartialStore(tmp_path / "partial") as store:
            assert quantize_model(model, Telling(), finished=store).recipe == new.recipe
    assert store.reused
    save(tmp_path / "checkpoint", new)
    assert load(tmp_path / "checkpoint").recipe == new.recipe
