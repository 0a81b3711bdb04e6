"""Edited manifests with right digests: each gives a model, or one sentence; none hangs, and none allocates much."""

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from float_models import NNXNet

import any4_jax as a4
from any4_jax.checkpoint import manifest as manifests
from any4_jax.checkpoint.contents import abstract, build, current
from any4_jax.methods import Any4, Int, quantize
from any4_jax.models.config import LlamaConfig, RopeScaling
from any4_jax.models.llama import Llama
from any4_jax.weights import LowRank, PermuteInput, QuantizeInput, ScaleInput, Sum, nonzeros

GOLDEN = Path(__file__).parent / "golden"
LENGTH = 400
VALUES = {repr(v): v for v in (None, True, -1, 0, 1e308, "NaN", "x", [], {}, 10**30, 100_000, 0.5, "any4", [[]])}


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = {"terms": [value], "operator": "Sum"}
    return value


LARGE = {"a long list": list(range(20_000)), "30 sums": nested(30), "200 sums": nested(200)}


def places_in(value: Any, at: tuple = ()) -> list[tuple]:
    """The path of every value within a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in pairs for place in [(*at, key), *places_in(inner, (*at, key))]]


def within(value: Any, place: tuple) -> Any:
    for key in place:
        value = value[key]
    return value


def mutated(value: Any, rng: random.Random) -> tuple[Any, str]:
    """A copy with one change, and the change in words."""
    value = copy.deepcopy(value)
    places = places_in(value)
    # A manifest is mostly digests, so the kinds of places are drawn before the places.
    kinds = sorted({str(place[-1]) for place in places})
    kind = rng.choice(kinds)
    place = rng.choice([place for place in places if str(place[-1]) == kind])
    parent, key = within(value, place[:-1]), place[-1]
    change = rng.choice(("replace", "replace", "replace", "delete", "rename", "swap"))
    if change == "delete":
        del parent[key]
    elif change == "rename" and isinstance(parent, dict):
        parent[rng.choice(("x", "", "0", "..", "a.b"))] = parent.pop(key)
    elif change == "swap":
        apart = [other for other in places if other[: len(place)] != place and place[: len(other)] != other]
        other = rng.choice(apart or [place])
        upper, name = within(value, other[:-1]), other[-1]
        parent[key], upper[name] = upper[name], parent[key]
    else:
        change, parent[key] = rng.choice(list((LARGE if rng.random() < 0.1 else VALUES).items()))
    return value, f"{change} at {'.'.join(map(str, place))}"


def weights(w: jax.Array) -> dict[str, Any]:
    """A tree of every operator."""
    leaf = quantize(w, Int(3, group_size=8))
    n, k = w.shape
    return {
        "kernel": Sum((leaf, LowRank(jnp.ones((2, k)), jnp.ones((n, 2)), jnp.float32(1)))),
        "list": [ScaleInput(leaf, jnp.ones(k)), PermuteInput(leaf, jnp.arange(k))],
        "few": nonzeros(w * (w > 2), blocks=2),
        "stack": jax.tree.map(lambda a: jnp.stack([a, a]), QuantizeInput(leaf, jnp.ones(16), 4, True, "token")),
        "bias": jnp.ones(n),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Name -> a checkpoint, and the model to load it into."""
    folder = tmp_path_factory.mktemp("mutations")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    config = LlamaConfig(**sizes, **heads, rope_scaling=scaling, eos_token_ids=(2,))
    decoder = a4.quantize_model(Llama(config, rngs=nnx.Rngs(0)), Any4(group_size=8), rules=[(".*o_proj", None)])
    decoder.tokenizer = a4.models.load("tiny").tokenizer
    a4.save(folder / "decoder", decoder)
    a4.save(folder / "tree", weights(jnp.asarray(np.random.default_rng(0).normal(size=(6, 20)), jnp.float32)))
    for name in ("own", "nnx_lora"):
        shutil.unpack_archive(GOLDEN / f"schema1_{name}.zip", folder / name)
    into = {"nnx_lora": nnx.eval_shape(lambda: NNXNet(nnx.Rngs(1)))}
    return {name: (folder / name, into.get(name)) for name in ("decoder", "tree", "own", "nnx_lora")}


def loaded_abstractly(body: dict[str, Any], into: Any) -> Any:
    """What `load` does with a manifest that has a right digest, except for reading arrays and files."""
    body = body | {"sha256": manifests._digest({key: value for key, value in body.items() if key != "sha256"})}
    manifest = manifests.decode(manifests._text(body))
    return build(current(manifest.content), abstract(manifest), into)


@pytest.mark.parametrize("name, count", [("decoder", 60), ("tree", 120), ("own", 30), ("nnx_lora", 90)])
def test_a_mutated_manifest_gives_a_model_or_one_sentence(
    name: str, count: int, saved: dict[str, tuple[Path, Any]]
) -> None:
    path, into = saved[name]
    whole = json.loads((path / "any4.json").read_bytes())
    assert loaded_abstractly(whole, into) is not None
    rng, refused = random.Random(name), 0
    for _ in range(count):
        body = copy.deepcopy(whole)
        # Half of the changes are in the description of the model.
        key = "content" if rng.random() < 0.7 else rng.choice(("arrays", "files", "library", "data", "schema"))
        changed, said = mutated({key: body[key]}, rng)
        body = {k: v for k, v in body.items() if k != key} | changed
        try:
            loaded_abstractly(body, into)
        except (ValueError, TypeError) as error:
            assert str(error) and "\n" not in str(error) and len(str(error)) <= LENGTH, f"{said}: {error}"
            refused += 1
        except Exception as error:
            pytest.fail(f"{said}: {type(error).__name__}: {error}")
    assert count / 2 < refused < count
