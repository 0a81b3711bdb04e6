"""generate: greedy and sampled, ragged, stopped, streamed, and compiled once."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from any4_jax.generate import generate, generate_tokens
from any4_jax.generate.sampling import Sampler
from any4_jax.generate.streaming import TextStream
from any4_jax.kv_cache import PLAIN, AttentionSettings, DenseCache, Rope, attention, rotated
from any4_jax.models.llama import Llama
from any4_jax.models.tiny import random_llama
from any4_jax.pytree import register_dataclass

ROWS = [[5, 9, 2], [100, 3, 3, 7, 64, 2, 8], [1]]


@dataclasses.dataclass(frozen=True)
class Bytes:
    """A tokenizer whose tokens are bytes; like many it drops a leading space when it decodes."""

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Any) -> str:
        return bytes(int(i) for i in ids).decode(errors="replace").removeprefix(" ")


@pytest.fixture(scope="module")
def model() -> Llama:
    """Random weights, with a spread head: the likeliest token varies along a text."""
    model = random_llama()
    model.tokenizer = Bytes()
    model.lm_head.kernel.set_value(model.lm_head.kernel.get_value() * 4)
    return model


def test_greedy_equals_the_argmax_of_the_whole_forward(model: Llama) -> None:
    new = generate(model, ROWS[1], max_new_tokens=20)
    text = np.asarray([ROWS[1] + new])
    # One forward over the result checks every step: causal logits at i only depend on tokens up to i.
    likeliest = np.argmax(np.asarray(model(text)), axis=-1)[0]
    assert likeliest[len(ROWS[1]) - 1 : -1].tolist() == new
    assert len(set(new)) > 3


def test_rows_of_a_ragged_batch_equal_their_single_runs(model: Llama) -> None:
    together = generate(model, ROWS, max_new_tokens=20)
    assert together == [generate(model, row, max_new_tokens=20) for row in ROWS]


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_chunks_change_nothing(model: Llama, chunk: int) -> None:
    chunks = list(generate_tokens(model, ROWS, max_new_tokens=20, chunk=chunk))
    assert [len(row) for row in chunks[0]] == [1, 1, 1]
    assert max(len(row) for piece in chunks for row in piece) <= chunk
    joined = [sum((piece[b] for piece in chunks), []) for b in range(3)]
    assert joined == generate(model, ROWS, max_new_tokens=20)


def test_programs_are_shared_by_prompts_settings_and_lengths_of_one_bucket(model: Llama, count_compiles: Any) -> None:
    with count_compiles() as compiles:
        generate(model, [ROWS[0], ROWS[1]], max_new_tokens=20)
    assert sorted(compiles.names) == ["jit(_decode)", "jit(_prefill)"]
    with count_compiles() as compiles:
        generate(model, [ROWS[0], ROWS[1]], max_new_tokens=20)
        generate(model, [list(range(30)), ROWS[2]], max_new_tokens=31, eos=[4, 5])
    assert compiles.count == 0
    with count_compiles() as compiles:
        generate(model, ROWS[:2], temperature=0.7, max_new_tokens=20)
    assert sorted(compiles.names) == ["jit(_decode)", "jit(_prefill)"]
    with count_compiles() as compiles:
        generate(model, ROWS[:2], temperature=1.3, top_k=3, top_p=0.5, seed=3, max_new_tokens=3)
    assert compiles.count == 0


def test_a_row_stops_before_its_end_token_and_others_go_on(model: Llama) -> None:
    free = generate(model, ROWS, max_new_tokens=20)
    end = free[0][6]
    stopped = generate(model, ROWS, max_new_tokens=20, eos=end)
    for row, full in zip(stopped, free, strict=True):
        assert row == (full[: full.index(end)] if end in full else full)
    assert len(stopped[0]) <= 6 < max(map(len, stopped))


def test_the_end_tokens_of_model_and_tokenizer_are_the_default(model: Llama) -> None:
    free = generate(model, ROWS[1], max_new_tokens=12)
    of_config, of_tokenizer = free[7], free[4]
    config = dataclasses.replace(model.config, eos_token_ids=(of_config,))
    graphdef = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))[0]
    other: Llama = nnx.merge(graphdef, nnx.state(model))
    other.tokenizer = Bytes(eos_ids=(of_tokenizer,))
    ends = [i for i, token in enumerate(free) if token in (of_config, of_tokenizer)]
    assert generate(other, ROWS[1], max_new_tokens=12) == free[: ends[0]]
    assert generate(other, ROWS[1], max_new_tokens=12, eos=()) == free
    assert generate(other, ROWS[1], max_new_tokens=12, eos=of_config) == free[: free.index(of_config)]


def test_decoding_ends_once_all_rows_did(model: Llama) -> None:
    first = generate(model, ROWS[0], max_new_tokens=1)[0]
    assert list(generate_tokens(model, [ROWS[0]], max_new_tokens=20, eos=first)) == [[[]]]


@pytest.mark.parametrize("limits", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_narrow_sampling_is_greedy(model: Llama, limits: dict[str, Any]) -> None:
    settings = {"temperature": 1.5} | limits
    assert generate(model, ROWS, max_new_tokens=12, **settings) == generate(model, ROWS, max_new_tokens=12)


def test_seeds_reproduce_and_differ(model: Llama) -> None:
    def sampled(seed: int) -> list[list[int]]:
        return generate(model, ROWS, max_new_tokens=12, temperature=1.0, seed=seed)

    assert sampled(7) == sampled(7)
    assert sampled(7) != sampled(8)
    # Rows of one batch draw independently, even where their prompts are equal.
    twins = generate(model, [ROWS[0], ROWS[0]], max_new_tokens=12, temperature=1.0)
    assert twins[0] != twins[1]


SAMPLE = jax.jit(Sampler.sample)
PROBABILITY = np.asarray([0.4, 0.3, 0.15, 0.1, 0.05])


@pytest.mark.parametrize(
    "temperature, top_k, top_p, wanted",
    [
        (1.0, None, None, PROBABILITY),
        (0.5, None, None, PROBABILITY**2 / np.sum(PROBABILITY**2)),
        (2.0, None, None, PROBABILITY**0.5 / np.sum(PROBABILITY**0.5)),
        (1.0, 2, None, np.asarray([4, 3, 0, 0, 0]) / 7),
        (1.0, None, 0.75, np.asarray([0.4, 0.3, 0.15, 0, 0]) / 0.85),
        # top_p looks at what top_k left: 4/9, 3/9, 2/9 hold less than 0.8 with two and more with three.
        (1.0, 3, 0.7, np.asarray([4, 3, 0, 0, 0]) / 7),
    ],
)
def test_sampled_frequencies(temperature: float, top_k: int | None, top_p: float | None, wanted: np.ndarray) -> None:
    draws = 20000
    shuffle = np.asarray([3, 0, 4, 1, 2])
    logits = jnp.broadcast_to(jnp.log(PROBABILITY[shuffle]).astype(jnp.float32), (draws, 5))
    sampler = Sampler.of(5, temperature, top_k, top_p, seed=0)
    tokens = np.asarray(SAMPLE(sampler, logits, 0))
    frequency = np.bincount(shuffle[tokens], minlength=5) / draws
    # Five standard errors of a frequency; a token that was cut off must never come.
    np.testing.assert_array_less(np.abs(frequency - wanted), 5 * np.sqrt(wanted * (1 - wanted) / draws) + 1e-9)


def test_prompts_come_back_in_their_own_form(model: Llama) -> None:
    one = generate(model, "ab", max_new_tokens=6)
    assert isinstance(one, str)
    assert generate(model, ["ab", "abc", "a b"], max_new_tokens=6)[0] == one
    ids = generate(model, np.asarray([97, 98]), max_new_tokens=6)
    assert generate(model, np.asarray([[97, 98]]), max_new_tokens=6) == [ids]
    assert Bytes().decode([97, 98, *ids]) == "ab" + one
    assert generate(model, "ab", max_new_tokens=0) == ""


def test_streamed_pieces_are_the_text(model: Llama) -> None:
    pieces: list[str] = []
    text = generate(model, "ab", max_new_tokens=20, stream=pieces.append)
    assert text == "".join(pieces) == generate(model, "ab", max_new_tokens=20)
    assert len(pieces) > 2


def test_a_character_left_incomplete_is_handed_over_at_the_end() -> None:
    pieces: list[str] = []
    text = TextStream(Bytes().decode, list(b"a"), pieces.append)
    text.extend("€".encode()[:2])
    assert pieces == []
    assert text.finish() == "\N{REPLACEMENT CHARACTER}" == "".join(pieces)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class UnrotatedCache(DenseCache):
    """Keys stored as they come and rotated when read: what the protocol is made for."""

    def append(self, keys: jax.Array, values: jax.Array, positions: jax.Array, rope: Rope | None) -> Self:
        return super().append(keys, values, positions, None)

    def attend(
        self, queries: jax.Array, positions: jax.Array, rope: Rope | None, settings: AttentionSettings = PLAIN
    ) -> jax.Array:
        rows, (heads, size, length) = len(self.start), self.keys.shape
        slots = jnp.arange(length) - self.start[:, None]
        keys = self.keys.reshape(rows, heads // rows, size, length).transpose(0, 3, 1, 2)
        keys = rotated(keys, slots, rope).transpose(0, 2, 3, 1).reshape(self.keys.shape)
        queries = rotated(queries, positions, rope)
        return attention(queries, keys, self.values, positions, self.start, settings)


def test_another_cache_gives_the_same_tokens(model: Llama) -> None:
    assert generate(model, ROWS, cache=UnrotatedCache) == generate(model, ROWS)


@pytest.mark.parametrize(
    "prompt, settings, kind, words",
    [
        ([], {}, ValueError, "prompt is empty"),
        ([[]], {}, ValueError, r"shape \(0,\)"),
        ("", {}, ValueError, "prompt is empty"),
        (["a", ""], {}, ValueError, "prompt is empty"),
        (7, {}, TypeError, "int"),
        ([1.5, 2.0], {}, TypeError, "float64"),
        ([1, 128], {}, ValueError, r"1\.\.128.*0\.\.127"),
        ([1, -1], {}, ValueError, r"-1\.\.1"),
        (list(range(120)), {"max_new_tokens": 9}, ValueError, "120 tokens and 9 new.* context of 128"),
        ([1] * 129, {"max_new_tokens": 0}, ValueError, "129 tokens"),
        ([1], {"max_new_tokens": -1}, ValueError, "-1"),
        ([1], {"temperature": -0.1}, ValueError, "-0.1"),
        ([1], {"temperature": float("nan")}, ValueError, "nan"),
        ([1], {"top_k": 0, "temperature": 1.0}, ValueError, "top_k is 0"),
        ([1], {"top_p": 1.1}, ValueError, "top_p is 1.1"),
        ([1], {"stream": print}, ValueError, "one text prompt"),
    ],
)
def test_bad_requests_are_refused(
    model: Llama, prompt: Any, settings: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        generate(model, prompt, **settings)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="no tokenizer"):
        generate(random_llama(), "a")
