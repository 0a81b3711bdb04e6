"""Every example runs, in a folder of its own, and stays short."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from any4_jax.data import bundled

FOLDER = Path(__file__).resolve().parent.parent / "examples"
EXAMPLES = sorted(path.name for path in FOLDER.glob("*.py"))


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model without all blocks but the first: a step of its training compiles in a fifth of the time."""
    folder = tmp_path_factory.mktemp("models") / "short"
    with bundled("stories260k") as whole:
        shutil.copytree(whole, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    tensors = load_file(folder / "model.safetensors")
    cut = {name: tensor for name, tensor in tensors.items() if ".layers." not in name or ".layers.0." in name}
    save_file(cut, folder / "model.safetensors")
    return folder


def test_there_are_examples() -> None:
    assert {"swap_hf_llama.py", "swap_your_own_linen.py", "swap_your_own_nnx.py", "lora.py"} <= set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(
    name: str, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    monkeypatch.chdir(tmp_path)
    # Those that train a language model train one that is named for fewer steps.
    monkeypatch.setattr("sys.argv", [name, str(short)] if f"{name} [MODEL]" in text else [name])
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) >= 2 and "nan" not in printed.lower()
