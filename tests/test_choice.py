"""Choosing among implementations: by name, by platform, for arrays at hand and for traced ones."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any4_jax import choice
from any4_jax.choice import PLATFORMS, Backend, Choice, default_platform, platform_of


def only_on(*platforms: str):
    """supports(size, platform) of a backend for problems of at most 8."""

    def supports(size: int, platform: str) -> str | None:
        if platform not in platforms:
            return f"it doesn't run on {platform}"
        return None if size <= 8 else f"size {size} is above 8"

    return supports


def adds(number: float):
    return lambda x: x + number


FAST = Backend("fast", only_on("cuda"), adds(1))
NATIVE = Backend("native", only_on("cpu", "cuda"), adds(2))
PLAIN = Backend("plain", lambda size, platform: None, adds(3))
CHOICE = Choice((FAST, NATIVE, PLAIN))


def test_an_option_by_name() -> None:
    assert CHOICE.named("native") is NATIVE
    with pytest.raises(
        ValueError, match="got backend='best', need one of 'fast', 'native', 'plain'; pass one of these"
    ):
        CHOICE.named("best")


def test_a_required_option_that_cannot_gives_its_reason() -> None:
    assert CHOICE.required("fast", 8, platform="cuda") is FAST
    with pytest.raises(ValueError, match="backend 'fast' can't do this: it doesn't run on cpu; pass another backend"):
        CHOICE.required("fast", 8, platform="cpu")
    with pytest.raises(ValueError, match="size 9 is above 8"):
        CHOICE.required("fast", 9, platform="cuda")


@pytest.mark.parametrize(
    ("size", "platform", "name"),
    [(8, "cuda", "fast"), (8, "cpu", "native"), (9, "cuda", "plain"), (8, "rocm", "plain"), (8, "tpu", "plain")],
)
def test_the_first_that_works(size: int, platform: str, name: str) -> None:
    assert CHOICE.first(size, platform=platform).name == name


def test_a_problem_that_no_option_solves_gives_the_last_ones_reason() -> None:
    partial = Choice((FAST, NATIVE))
    words = "none of the backends 'fast', 'native' can solve on cpu, the last because size 9 is above 8; change"
    for call in (
        lambda: partial.first(9, platform="cpu"),
        lambda: partial.choose(None, 9, arrays=(jax.device_put(np.ones(3), jax.devices("cpu")[0]),)),
        lambda: partial.lowered(lambda option: option.run, 9),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_arrays_at_hand_are_chosen_for_where_they_lie() -> None:
    here = CHOICE.first(8, platform=default_platform()).name
    placed = jax.device_put(np.ones(3), jax.devices()[0])
    for arrays in [(np.ones(3),), (jnp.ones(3), None), (None, placed)]:
        assert CHOICE.choose(None, 8, arrays=arrays) == here
    assert CHOICE.choose(None, 9, arrays=(placed,)) == "plain"
    assert CHOICE.choose("plain", 8, arrays=(placed,)) == "plain"
    with pytest.raises(ValueError, match="size 9 is above 8"):
        CHOICE.choose(here, 9, arrays=(placed,))


def test_traced_arrays_leave_the_choice_to_the_lowering() -> None:
    seen = []

    @jax.jit
    def traced(x):
        seen.append((CHOICE.choose(None, 8, arrays=(np.ones(3), x)), CHOICE.choose("plain", 8, arrays=(x,))))
        return x

    traced(1.0)
    assert seen == [(None, "plain")]


def lowered(size: int, platform: str, name: str | None = None) -> str:
    """The number that the option lowered for a platform adds."""
    run = CHOICE.lowered(lambda option: option.run, size, name=name)
    text = jax.jit(run).trace(jnp.float32(0)).lower(lowering_platforms=(platform,)).as_text()
    return next(number for number in ("1", "2", "3") if f"dense<{number}.0" in text)


@pytest.mark.parametrize(("platform", "added"), [("cpu", "2"), ("cuda", "1"), ("rocm", "3"), ("tpu", "3")])
def test_each_platform_is_lowered_to_its_own_option(platform: str, added: str) -> None:
    assert platform in PLATFORMS
    assert lowered(8, platform) == added
    assert lowered(9, platform) == "3"
    assert lowered(8, platform, name="native") == "2"


def test_where_the_last_option_is_everyones_no_other_is_traced() -> None:
    asked = []
    CHOICE.lowered(lambda option: asked.append(option.name), 9)
    assert asked == ["plain"]
    CHOICE.lowered(lambda option: asked.append(option.name), 8, name="fast")
    assert asked == ["plain", "fast"]


def counted() -> tuple[Choice, list[str]]:
    """A late Choice, and the names of its options as they are traced."""
    traced: list[str] = []

    def named(option: Backend) -> Backend:
        def run(x):
            traced.append(option.name)
            return {"sum": option.run(x)}

        return Backend(option.name, option.supports, run)

    return Choice(tuple(map(named, CHOICE.options)), late=True), traced


@pytest.mark.parametrize(("platform", "added"), [("cpu", "2"), ("cuda", "1"), ("rocm", "3"), ("tpu", "3")])
def test_a_late_last_option_is_traced_where_it_is_lowered(platform: str, added: str) -> None:
    late, names = counted()
    traced = jax.jit(late.lowered(lambda option: option.run, 8)).trace(jnp.float32(0))
    assert set(names) == {"fast", "native"}
    assert f"dense<{added}.0" in traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("plain" in names) == (added == "3")


def test_a_late_option_computes_in_a_program_alone_under_vmap_and_without_jit() -> None:
    late, _ = counted()
    # On this platform the last option is everyone's but the GPU's.
    run = Choice((late.options[0], late.options[2]), late=True).lowered(lambda option: option.run, 8)
    x = jnp.arange(4.0)
    for call in (run, jax.jit(run), jax.vmap(run), jax.jit(jax.vmap(run)), jax.vmap(jax.jit(run))):
        np.testing.assert_array_equal(call(x)["sum"], x + PLAIN.run(0.0))
    with jax.disable_jit():
        np.testing.assert_array_equal(run(x)["sum"], x + PLAIN.run(0.0))
    text = jax.jit(run).trace(x).lower(lowering_platforms=("cpu", "cuda")).as_text()
    assert "dense<1.0" in text and "dense<3.0" in text


def device(platform: str, version: str = "") -> SimpleNamespace:
    return SimpleNamespace(platform=platform, client=SimpleNamespace(platform_version=version))


def test_gpus_of_either_make_have_names_of_their_own() -> None:
    assert choice._platform(device("gpu", "PJRT C API\ncuda 12090")) == "cuda"
    assert choice._platform(device("gpu", "PJRT C API\nROCm 6.2")) == "rocm"
    assert choice._platform(device("tpu")) == "tpu"


def test_where_arrays_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine whose default device is a GPU, arrays that were put on the CPU stay there."""
    on_cpu = jax.device_put(np.ones(3), jax.devices("cpu")[0])
    loose = jnp.ones(3)
    expected = default_platform()
    assert platform_of() == platform_of(np.ones(3)) == platform_of(loose, None) == expected
    monkeypatch.setattr(choice, "default_platform", lambda: "cuda")
    assert platform_of(on_cpu) == platform_of(np.ones(3), on_cpu) == "cpu"
    # A program of arrays that are tied to no device runs on the default one.
    assert platform_of(np.ones(3)) == platform_of(loose) == "cuda"
    traced = []
    jax.jit(lambda x: traced.append(platform_of(x)))(on_cpu)
    assert traced == ["cuda"]


def test_a_constant_of_a_program_does_not_decide_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = jax.device_put(np.ones(3), jax.devices("cpu")[0])
    monkeypatch.setattr(choice, "default_platform", lambda: "cuda")
    seen = []

    def ask(x):
        seen.append(platform_of(x, on_cpu))
        return x.sum()

    jax.jit(ask)(on_cpu)
    jax.jit(jax.vmap(ask))(on_cpu[None])
    assert seen == ["cuda", "cuda"]
    # These two run each operation on the arrays themselves.
    jax.grad(ask)(on_cpu)
    jax.vmap(ask)(on_cpu[None])
    assert seen[2:] == ["cpu", "cpu"]


def test_the_default_device_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "devices", lambda name=None: [device("gpu", "cuda") if name is None else device(name)])
    assert default_platform() == "cuda"
    with jax.default_device("cpu"):
        assert default_platform() == "cpu"
    monkeypatch.undo()
    with jax.default_device(jax.devices("cpu")[0]):
        assert default_platform() == "cpu"
