"""Write the golden checkpoints of `tests/test_golden_checkpoints.py`; kept as the record of how they came to be.

    git worktree add ../schema1 c5f471e && cd ../schema1
    PYTHONPATH=. python PATH_OF_THIS_FILE

It needs any4_jax as of that commit, the last one that wrote schema 1 of the manifest, and for the Hugging Face model
transformers 4. Later versions write other schemas: made by them, these files would show nothing.

Each schema1_<name>.zip is the directory that `any4_jax.save` wrote; schema1_outputs.npz holds what that version
computed with the models it had saved: greedy tokens of the two language models, outputs of the network.
"""

import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import any4_jax as a4
from any4_jax.checkpoint import store
from any4_jax.methods import NF4, Any4, Int
from any4_jax.surgery import map_operators
from any4_jax.weights import LowRank, Sum

FOLDER = Path(__file__).parent
PROMPT = "Once upon a time, there was a little dog"
NEW_TOKENS = 32


class Net(nnx.Module):
    """A layer in two places, a variable that is no parameter, and random numbers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(24, 24, rngs=rngs)
        self.rest = nnx.List([self.first, nnx.Linear(24, 7, use_bias=False, rngs=rngs)])
        self.norm = nnx.BatchNorm(24, use_running_average=True, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [M, 24] -> [M, 7]."""
        x = self.norm(self.first(x))
        for layer in self.rest:
            x = layer(nnx.relu(x))
        return x


def own():
    """A decoder of this library, most of it any4 with calibration; a quantized embedding, a layer left alone."""
    model = a4.models.load("tiny")
    method = Any4(group_size=32)
    rules = [
        (r"embed_tokens", Int(8, group_size=64)),
        (r"layers\.2\.mlp\.down_proj", None),
        (r"layers\.\d\.mlp\.up_proj", Int(3, group_size=32)),
    ]
    stats = a4.calibrate(model, a4.data.stories(), method, rules=rules)
    return a4.quantize_model(model, method, stats=stats, rules=rules)


def hf_flax():
    """A FlaxLlama as `load_hf_flax` makes them."""
    model = a4.models.load_hf_flax("tiny")
    rules = [(r".*(gate|up)_proj", NF4(group_size=32)), (r"model\.layers\.0\.self_attn\.o_proj", None)]
    stats = a4.calibrate(model, a4.data.stories())
    return a4.quantize_model(model, Any4(group_size=32), stats=stats, rules=rules)


def nnx_lora():
    """An NNX module with low-rank updates that aren't zero."""
    model = a4.add_lora(a4.quantize_model(Net(nnx.Rngs(0)), NF4(group_size=16)), 3, alpha=6.0)
    rng = np.random.default_rng(3)

    def trained(path: str, operator: Sum) -> Sum:
        leaf, update = operator.terms
        b = jnp.asarray(rng.normal(0, 0.1, update.b.shape), update.b.dtype)
        return Sum((leaf, LowRank(update.a, b, update.scale)))

    return map_operators(model, trained)


def keep(name: str, model: object, folder: Path) -> None:
    """Save `model` and pack what was written into one file."""
    a4.save(folder / name, model)
    assert store.verify(folder / name) and '"schema": 1,' in (folder / name / "any4.json").read_text()
    shutil.make_archive(str(FOLDER / f"schema1_{name}"), "zip", folder / name)


def main() -> None:
    """Write the three checkpoints and the outputs."""
    models = {"own": own(), "hf_flax": hf_flax(), "nnx_lora": nnx_lora()}
    prompt = np.asarray(models["own"].tokenizer.encode(PROMPT), np.int32)
    x = np.random.default_rng(4).normal(size=(5, 24)).astype(np.float32)
    tokens = a4.generate(models["own"], prompt, max_new_tokens=NEW_TOKENS, eos=())
    sequences = (
        models["hf_flax"]
        .generate(prompt[None], max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
        .sequences
    )
    outputs = {
        "prompt": prompt,
        "own": np.asarray(tokens, np.int32),
        "hf_flax": np.asarray(sequences)[0, len(prompt) :],
        "nnx_lora_x": x,
        "nnx_lora": np.asarray(models["nnx_lora"](x)),
    }
    np.savez(FOLDER / "schema1_outputs.npz", **outputs)
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            keep(name, model, Path(folder))


if __name__ == "__main__":
    main()
