"""Every example runs, in a folder of its own, and stays short."""

import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
from short_models import shorten

FOLDER = Path(__file__).resolve().parent.parent / "examples"
EXAMPLES = sorted(path.name for path in FOLDER.glob("*.py"))


@pytest.fixture(scope="module", autouse=True)
def short_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch, tmp_path_factory.mktemp("short"), blocks=1)
        yield


def test_there_are_examples() -> None:
    assert {"swap_hf_llama.py", "swap_your_own_linen.py", "swap_your_own_nnx.py", "lora.py"} <= set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    monkeypatch.chdir(tmp_path)
    # Those that train a language model train one that is named for fewer steps; "tiny" is what they take by default.
    monkeypatch.setattr("sys.argv", [name, "tiny"] if f"{name} [MODEL]" in text else [name])
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) >= 2 and "nan" not in printed.lower()
