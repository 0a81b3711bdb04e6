"""The texts of published tables: each protocol by hand, on data sets in the layout of the real ones."""

import hashlib
import json
import random
import sys
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest

from any4_jax.cli import main
from any4_jax.cli.errors import WorkError
from any4_jax.cli.token_files import read_tokens
from any4_jax.data import stories
from any4_jax.evaluation import CORPORA, Corpus, bos_rule, read_corpus

COMMIT = "0123456789abcdef" * 2 + "01234567"
BOS = 1


class Letters:
    """A tokenizer with a token for each letter, and a BOS before each text."""

    bos_id = BOS

    def encode(self, text: str) -> list[int]:
        return [BOS, *(2 + ord(letter) for letter in text)]


TEXTS = ["first document", "the second, which is longer than the others are", "", "third one here", "x"]


@pytest.fixture
def hub(monkeypatch):
    """A package `datasets` that gives TEXTS for any data set; what it was asked for, and whether offline."""
    asked = []
    config = SimpleNamespace(HF_HUB_OFFLINE=False)

    def load_dataset(path, name, **given):
        asked.append((path, name, given, config.HF_HUB_OFFLINE))
        field = next((c.field for c in CORPORA.values() if path.endswith(c.path)), "text")
        return [{field: text, "other": 3} for text in TEXTS]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, config=config))
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, path, revision: SimpleNamespace(sha=COMMIT))
    return asked


@pytest.mark.parametrize("name", CORPORA)
def test_every_corpus_has_the_tokens_of_its_protocol(name: str, hub) -> None:
    corpus, encode = CORPORA[name], Letters().encode
    found = read_corpus(name, Letters(), 12)
    if corpus.rule == "joined":
        expected = encode(corpus.separator.join(TEXTS))
    elif corpus.rule == "documents":
        expected = [token for text in TEXTS for token in encode(text)]
    else:
        draw, expected = random.Random(0), []
        while len(expected) < 256 * 12:
            tokens = encode(TEXTS[draw.randint(0, 4)])
            if len(tokens) > 12:
                first = draw.randint(0, len(tokens) - 13)
                expected += tokens[first : first + 12]
    np.testing.assert_array_equal(found.ids, np.asarray(expected, np.int32))
    assert found.ids.dtype == np.int32
    source = found.source
    assert (source["dataset"], source["split"], source["revision"]) == (corpus.path, corpus.split, COMMIT)
    assert source["tokens"] == len(expected) and source["documents"] == len(TEXTS)
    assert source["tokens_sha256"] == hashlib.sha256(np.asarray(expected, "<i4").tobytes()).hexdigest()
    ((path, config, given, offline),) = hub
    assert (path, config, given["split"], given["revision"]) == (corpus.path, corpus.config, corpus.split, COMMIT)
    assert given.get("data_files") == (None if corpus.files is None else {corpus.split: corpus.files}) and not offline


def test_no_more_is_read_than_is_needed(hub) -> None:
    found = read_corpus("pile", Letters(), 5, windows=3)
    assert len(found.ids) == 15 and found.source["documents"] == 1 and hub[0][2]["streaming"]
    assert len(read_corpus("c4", Letters(), 5, windows=3).ids) == 15
    few = read_corpus(Corpus("a/b", "test", documents=2), Letters(), 5)
    assert few.ids.tolist() == Letters().encode("\n\n".join(TEXTS[:2])) and few.source["documents"] == 2


def test_what_is_kept_serves_without_a_network(hub, monkeypatch) -> None:
    def gone(self, path, revision):
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", gone)
    assert read_corpus("wikitext-2", Letters(), 5).source["revision"] is None
    assert hub[0][3] and not sys.modules["datasets"].config.HF_HUB_OFFLINE

    def load_dataset(path, name, **given):
        raise RuntimeError("of its own kind")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", load_dataset)
    with pytest.raises(OSError, match="Salesforce/wikitext can't be had .RuntimeError.; connect to the network"):
        read_corpus("wikitext-2", Letters(), 5)


def test_refusals(hub, tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="got the corpus 'c5', and one of wikitext-2, c4"):
        read_corpus("c5", Letters(), 5)
    with pytest.raises(ValueError, match="no document has more than 100 tokens"):
        read_corpus("c4", Letters(), 100)
    with pytest.raises(OSError, match="Salesforce/wikitext is missing"):
        read_corpus("wikitext-2", Letters(), 5, folder=tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install 'any4_jax.eval.'"):
        read_corpus("c4", Letters(), 5)


def test_a_copy_in_a_folder_is_read_by_the_real_package(tmp_path) -> None:
    pytest.importorskip("datasets", reason="needs the extra eval")
    folder = tmp_path / "Salesforce" / "wikitext"
    (folder / "wikitext-2-raw-v1").mkdir(parents=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "wikitext-2-raw-v1" / "test-00000-of-00001.jsonl").write_text(lines)
    names = "{config_name: wikitext-2-raw-v1, data_files: [{split: test, path: wikitext-2-raw-v1/test-*}]}"
    (folder / "README.md").write_text(f"---\nconfigs: [{names}]\n---\n")
    found = read_corpus("wikitext-2", Letters(), 5, folder=tmp_path)
    assert found.ids.tolist() == Letters().encode("\n\n".join(TEXTS)) and found.source["revision"] is None


def test_the_bos_is_told_as_it_is() -> None:
    plain = SimpleNamespace(encode=lambda text: [5], bos_id=BOS)
    assert (bos_rule(plain), bos_rule(SimpleNamespace(encode=lambda text: [5]))) == ("none", "none")
    assert bos_rule(Letters()) == "once, before the text"
    assert bos_rule(Letters(), "documents") == "before each document"


def test_local_files(tmp_path) -> None:
    names = [str(tmp_path / name) for name in ("a.txt", "a.jsonl", "a.npy")]
    text, lines, ids = names
    (tmp_path / "a.txt").write_text("ab\n\ncd")
    (tmp_path / "a.jsonl").write_text('{"body": "ab"}\n\n{"body": "cd"}\n')
    np.save(ids, np.asarray(Letters().encode("ab\n\ncd"), np.int64))
    first, second, third = (read_tokens(name, Letters(), "body") for name in names)
    np.testing.assert_array_equal(first.ids, Letters().encode("ab\n\ncd"))
    assert first.source["tokens_sha256"] == second.source["tokens_sha256"] == third.source["tokens_sha256"]
    assert second.source["documents"] == 2 and first.source["bos"] == "once, before the text"
    assert read_tokens(ids, None, "body").source["bos"] == "as in the file"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "ab"}\n{"text"', "a.jsonl, line 2, is not JSON"),
        ("a.jsonl", b'{"body": "ab"}', "a.jsonl, line 1, has no text 'text'"),
        ("a.jsonl", b'["ab"]', "line 1, has no text"),
        ("a.jsonl", b"\n", "holds no text"),
        ("a.npy", b"no array", "can't be read"),
        ("a.npy", np.zeros((2, 3), int), "int64 of shape .2, 3., and one row of integer"),
        ("a.npy", np.zeros(3), "float64 of shape"),
        ("a.npy", np.asarray([3, -1]), "ids from -1 to 3"),
        ("a.npy", np.asarray([None, 3]), "can't be read"),
    ],
)
def test_files_that_hold_something_else(name: str, content, words: str, tmp_path) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(WorkError, match=words):
        read_tokens(str(path), Letters(), "text")
    with pytest.raises(WorkError, match="has no tokenizer" if name != "a.npy" else "a.npy"):
        read_tokens(str(path), None, "text")


def test_results_tell_what_was_measured(hub, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "TEXTS", [stories()])
    out = tmp_path / "run"
    argv = ["eval", "tiny", "--tasks", "ptb", "--seqlen", "128", "--windows", "2", "--out", str(out)]
    assert main(argv) == 0, capsys.readouterr().err
    source = json.loads((out / "results.json").read_text())["results"]["ptb"]["source"]
    assert (source["revision"], source["field"], source["bos"]) == (COMMIT, "sentence", "once, before the text")
    assert source["tokens"] > 256
