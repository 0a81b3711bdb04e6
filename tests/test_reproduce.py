"""`any4 reproduce`: every published row can be built, and what is measured is what the pieces measure."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from short_models import shorten

import any4_jax as a4
from any4_jax.cli import main, reproduce
from any4_jax.cli.reproduced import Figure, chosen_tasks, compared
from any4_jax.data import stories
from any4_jax.evaluation import CORPORA
from any4_jax.evaluation.published import Source, find_rows, published_rows
from any4_jax.kv_cache import CATALOGUE
from any4_jax.methods.spec import method_to_json

ROWS = published_rows()
NF4 = "any4/llama-3.2-1b/nf4"


@pytest.fixture(scope="module", autouse=True)
def one_block(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch, tmp_path_factory.mktemp("short"), blocks=1)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text(stories())
    return path


@pytest.mark.parametrize("name", ROWS)
def test_a_row_can_be_built(name: str) -> None:
    row = ROWS[name]
    method, values = row.build(), row.values
    assert values and all(value > 0 for value in values.values()) and row.source
    assert all(value <= 100 for task, value in values.items() if task not in CORPORA)
    assert set(row.tasks) <= set(row.metrics) and set(row.texts) <= set(CORPORA) and set(row.windows) <= set(CORPORA)
    if row.cache is not None:
        CATALOGUE[row.cache["name"]](**row.cache["fields"])
    if method is not None:
        method.check(row.learns is not None)
        needs = [need for each in (method, getattr(method, "inner", method)) for need in each.needs]
        assert not needs or row.learns is not None
        assert method_to_json(method)["method"] == row.method["method"]
        paths = ["embed_tokens", "lm_head", "layers.0.mlp.down_proj", "layers.0.self_attn.q_proj"]
        assert len(row.build_rules(paths)) == len(row.rules) and not row.build_rules(["layers.0.mlp.up_proj"])


def test_values_are_those_of_their_table() -> None:
    assert ROWS["any4/llama-3.2-1b/any4"].values["c4"] == 13.95
    assert ROWS["any4/llama-3-70b/any4"].build() == a4.methods.Any4.paper(symmetric=True, table_dtype="bfloat16")
    assert ROWS["any4/ablation-term/weights"].learns is None
    assert isinstance(ROWS["any4/ablation-calibration/pile"].learns, Source)
    assert ROWS["any4/ablation-groups/nf4-64"].build().group_size == 64
    assert ROWS["qllm-infer/smoothquant/w6a6"].build().inner.bits == 6
    down = dict(ROWS["qllm-infer/smoothquant/w6a6"].build_rules(["layers.0.mlp.down_proj"])).popitem()[1]
    assert down.alpha is None and down.input_bits == 6
    spqr = ROWS["qllm-infer/spqr/spqr-3.99"]
    assert spqr.build() == a4.methods.SpQR.paper() and spqr.values["wikitext-2"] == 7.73
    kept = dict(ROWS["llm-fp4/llama-7b/fpq"].build_rules(["lm_head", "embed_tokens"]))
    assert kept["lm_head"].shifts == "kept" and kept["embed_tokens"].input_bits is None
    assert len(find_rows("any4/llama-3.2-1b")) == 5 and find_rows("llm-fp4")[0].name.startswith("llm-fp4/")


def test_it_lists_tables_and_rows(capsys) -> None:
    assert main(["reproduce"]) == 0
    listed = capsys.readouterr().out
    assert all(row.rpartition("/")[0] in listed for row in ROWS)
    assert main(["reproduce", "any4/ablation-init"]) == 0
    assert "wikitext-2 10.83, c4 14.21, ptb 18.69" in capsys.readouterr().out
    assert main(["reproduce", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["rows"]] == list(ROWS)


def test_a_row_measures_what_its_pieces_do(text, tmp_path, capsys) -> None:
    argv = ["reproduce", "any4/llama-3.2-1b", "--model", "tiny", "--text", f"wikitext-2={text}", "--windows", "2"]
    argv += ["--out", str(tmp_path / "runs")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce, "find_rows", lambda name: [ROWS["any4/llama-3.2-1b/float"], ROWS[NF4]])
        assert main(argv) == 0
        shown = capsys.readouterr().out
        assert main([*argv, "--json"]) == 0
    told = capsys.readouterr()
    assert f"{NF4.rpartition('/')[2]}" in shown and "is another model (1 layers of 64" in shown
    assert "measured before" in told.err
    made = json.loads(told.out)["rows"]
    model = a4.models.load("tiny")
    nf4 = a4.quantize_model(model, a4.methods.NF4(scale_dtype="float32"))
    for row, expected in zip(made, (model, nf4), strict=True):
        (figure,) = row["figures"]
        value = a4.evaluation.perplexity(expected, stories(), seqlen=512, windows=2).value
        assert figure["measured"] == pytest.approx(value, rel=1e-6) and not row["same_shape"]
    assert made[1]["figures"][0]["published"] == 10.99
    (loss,) = json.loads(told.out)["lost"]
    assert (loss["row"], loss["text"]) == (NF4, "wikitext-2") and loss["error"] > 0
    assert loss["value"] == pytest.approx(np.log(made[1]["figures"][0]["measured"] / made[0]["figures"][0]["measured"]))
    assert loss["published"] == pytest.approx(np.log(10.99 / 9.76)) and "nats per token lost" in shown
    written = json.loads((tmp_path / "runs" / NF4 / "results.json").read_text())
    assert written["published"] == ROWS[NF4].values and written["method"] == "nf4"
    assert main(["tables", str(tmp_path / "runs")]) == 0
    assert "| nf4 | nf4 | 4.5" in capsys.readouterr().out


def test_a_method_learns_from_the_data_set_of_its_row(text, monkeypatch, capsys) -> None:
    asked = []

    def load_dataset(path, name, **given):
        asked.append((path, given["split"]))
        return [{"text": stories()}]

    config = SimpleNamespace(HF_HUB_OFFLINE=False)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, config=config))
    c4 = ROWS["any4/ablation-calibration/c4"]
    assert isinstance(c4.learns, Source) and c4.learns.samples == 128
    clipped = {"method": "int", "fields": {"clip": True}}
    row = dataclasses.replace(c4, method=clipped, learns=dataclasses.replace(c4.learns, samples=2, seqlen=64))
    monkeypatch.setattr(reproduce, "find_rows", lambda name: [row])
    argv = ["reproduce", row.name, "--model", "tiny", "--text", str(text), "--windows", "2", "--json"]
    assert main(argv) == 0 and asked == [("allenai/c4", "train")]
    found = json.loads(capsys.readouterr().out)["rows"][0]
    assert found["figures"][0]["task"] == str(text) and found["figures"][0]["published"] is None
    assert main([*argv, "--calibrate", "prompt"]) == 0 and len(asked) == 1
    notes = json.loads(capsys.readouterr().out)["rows"][0]["notes"]
    assert any("learned from prompt; published, from 2 x 64" in note for note in notes)


def test_rows_of_a_group_take_what_they_have_of_the_tasks() -> None:
    rows = find_rows("any4/llama-3-8b")
    args = SimpleNamespace(name="any4/llama-3-8b", tasks=["wikitext-2", "mmlu"], allow_code=False)
    chosen = chosen_tasks(args, rows, {"c4": "c4.txt"})
    assert chosen["any4/llama-3-8b/fp4"] == ["c4"] and chosen["any4/llama-3-8b/nf4"] == ["c4", "wikitext-2", "mmlu"]
    args.tasks = None
    assert "humaneval" not in chosen_tasks(args, rows, {})["any4/llama-3-8b/nf4"]
    args.allow_code = True
    assert "humaneval" in chosen_tasks(args, rows, {})["any4/llama-3-8b/nf4"]


def test_figures_of_tasks_are_percents_with_their_means() -> None:
    row = ROWS["qllm-infer/spqr/spqr-3.99"]
    result = {"metrics": {"acc_norm": {"value": 0.1, "error": 0.1}, "acc": {"value": 0.5, "error": 0.03}}}
    results = dict.fromkeys(row.tasks, result)
    found = {figure.task: figure for figure in compared(row, results)}
    assert found["piqa"] == Figure("piqa", "acc", 50.0, 3.0, 80.09)
    assert found["mean of 5"] == Figure("mean of 5", "mean acc", 50.0, pytest.approx(3 / np.sqrt(5)), 68.72)
    part = compared(row, {"piqa": results["piqa"]})
    assert [figure.task for figure in part] == ["piqa"]
    code = {"humaneval": {"metrics": {"pass@1,create_test": {"value": 0.25, "error": None}}}}
    (figure,) = compared(ROWS[NF4], code)
    assert figure == Figure("humaneval", "pass@1,create_test", 25.0, None, 13.4)


@pytest.mark.parametrize(
    "argv, code, words",
    [
        ([f"{NF4}x"], 2, "did you mean any4/llama-3.2-1b/nf4"),
        ([NF4, "--model", "/nowhere"], 1, "/nowhere"),
        ([NF4, "--text", "t.txt"], 2, "without --model"),
        ([NF4, "--model", "tiny", "--tasks", "boolq"], 2, "lacks; it has wikitext-2"),
        ([NF4, "--model", "tiny", "--tasks", "humaneval"], 2, "--allow-code"),
        (["--model", "tiny"], 2, "NAME"),
        ([NF4, "--model", "tiny", "--text", "/nowhere.txt"], 1, "/nowhere.txt"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(argv, code: int, words: str, capsys) -> None:
    assert main(["reproduce", *argv]) == code
    shown = capsys.readouterr()
    assert words in shown.err and len(shown.err.splitlines()) == 1 and not shown.out
