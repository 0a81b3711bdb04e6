"""The time of a decoding step by class of kernel, from lists of kernels and from traces in text. No GPU is needed."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from any4_jax.benchmarks import profile
from any4_jax.benchmarks.profile import Kernel

PATHS = {
    "loop_add_fusion_3": "jit(_decode)/while/body/add",
    "gemm_fusion_dot_7": "jit(_decode)/while/body/attention/dot_general",
    "input_reduce_fusion_1": "jit(_decode)/while/body/attention/reduce_max",
    "gemm_fusion_dot_9": "jit(_decode)/while/body/dot_general",
    "gemm_fusion_dot_11": "jit(_decode)/while/body/head/dot_general",
    "custom_call_5_0": "jit(_decode)/while/body/head/ffi_call",
    "custom_call_6_0": "jit(_decode)/while/body/attention/ffi_call",
}


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        (Kernel("loop_add_fusion_3", 0, 1), "rest"),
        (Kernel("gemm_fusion_dot_7", 0, 1), "attention"),
        (Kernel("input_reduce_fusion_1", 0, 1, "command_buffer"), "attention"),
        (Kernel("gemm_fusion_dot_9", 0, 1), "products"),
        (Kernel("gemm_fusion_dot_11", 0, 1), "head"),
        (Kernel("void any4::LutTurns<__nv_bfloat16>(...)", 0, 1, "custom-call.5.0"), "head"),
        (Kernel("void any4::LutTurns<__nv_bfloat16>(...)", 0, 1, "command_buffer"), "products"),
        (Kernel("void any4::LutWide<__nv_bfloat16>(...)", 0, 1), "products"),
        (Kernel("nvjet_tst_128x8_64x12_1x2_h_bz_NNT", 0, 1), "products"),
        (Kernel("void gemvNSP_kernel<float>", 0, 1), "products"),
        (Kernel("void any4::DecodeAttention<128>(...)", 0, 1), "attention"),
        (Kernel("AnyName", 0, 1, "custom-call.6.0"), "attention"),
        (Kernel("gemm_fusion_dot_12", 0, 1), "products"),
        (Kernel("MemcpyD2D", 0, 1), "rest"),
        (Kernel("wrapped_slice", 0, 1), "rest"),
    ],
)
def test_a_kernel_is_of_its_class(kernel: Kernel, kind: str) -> None:
    assert profile._class(kernel, PATHS) == kind


def steps(*names: str, count: int = 2, each: float = 1e6, every: float = 2e6) -> list[Kernel]:
    return [Kernel(name, i * every, each) for i, name in enumerate(names * count)]


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        # The head by its scope.
        (
            steps("LutTurns", "gemm_fusion_dot_7", "loop_add_fusion_3", "gemm_fusion_dot_11"),
            dict(products_ms=1, attention_ms=1, rest_ms=1, head_ms=1, head_launches=1, launches_per_token=4),
        ),
        # The head by its order: the last product of each step.
        (
            steps("LutTurns", "LutTurns", "loop_add_fusion_3", "nvjet"),
            dict(products_ms=2, products_launches=2, head_ms=1, rest_ms=1, attention_ms=0, gaps_ms=6),
        ),
        # A number of products that isn't the steps', or one alone, doesn't tell which is the head.
        ([*steps("LutTurns", "nvjet"), Kernel("nvjet", 1e9, 1e6)], dict(head_ms=None, products_ms=2.5)),
        # The loop ran a step more than tokens were wanted, and a copy before them.
        (
            [Kernel("MemcpyD2D", 0, 1e6), *steps("LutTurns", "wrapped_slice", "LutTurns", "nvjet", count=3)],
            dict(products_launches=2, head_launches=1, head_ms=1, rest_launches=4 / 3, launches_per_token=13 / 3),
        ),
        (steps("ByteTurns", "loop_add_fusion_3"), dict(head_ms=None, head_launches=None, products_ms=1)),
        # What overlaps counts once, for what began first.
        (
            steps("LutTurns", "gemm_fusion_dot_11", each=3e6),
            dict(products_ms=2.5, head_ms=2, gaps_ms=10 - 4.5),
        ),
    ],
)
def test_times_and_launches_of_a_token(found: list[Kernel], wanted: dict) -> None:
    row = profile.columns(found, PATHS, 2, wall_ms=20)
    for name, value in wanted.items():
        assert row[name] == (value if value is None else pytest.approx(value, rel=1e-3)), name
    sums = [sum(row[f"{kind}_{unit}"] or 0 for kind in profile.CLASSES) for unit in ("ms", "launches")]
    steps_run = round(len(found) / row["launches_per_token"])
    assert [sums[0] + row["gaps_ms"], sums[1]] == pytest.approx([20 / steps_run, len(found) / steps_run], rel=1e-3)


def test_kernels_that_no_step_explains_are_refused() -> None:
    with pytest.raises(RuntimeError, match="no kernel ran 3 times"):
        profile.columns(steps("LutTurns", "nvjet"), PATHS, 3, wall_ms=1)


def test_instructions_are_those_of_the_program_that_ran() -> None:
    other, own = (
        f"""  %loop_add_fusion.3 = f32[8]{{0}} fusion(%x), kind=kLoop, metadata={{op_name="jit(f)/{scope}/add" line=1}}
  ROOT %dot.{number} = f32[8]{{0}} fusion(%x), metadata={{op_type="a" op_name="jit(f)/{scope}/dot_general"}}
  %bare = f32[8]{{0}} add(%x, %y)
"""
        for scope, number in (("head", 1), ("attention", 2))
    )
    found = [Kernel("loop_add_fusion_3", 0, 1), Kernel("dot_2", 1, 1)]
    assert profile.scopes(found, [other, own], 1) == {
        "loop_add_fusion_3": "jit(f)/attention/add",
        "dot_2": "jit(f)/attention/dot_general",
    }
    assert profile.scopes(found, [], 1) == {}
    # Another model's loop may have instructions of all these names, and more that didn't run.
    longer = own.replace("attention", "head") + own.replace("dot.2", "gemm_fusion.7").replace(
        "add_fusion.3", "fusion.9"
    )
    assert profile.scopes(found, [longer, own], 1) == profile.scopes(found, [own], 1)
    # Of equal fusions only one has a kernel, which runs for all of them.
    fusions = "".join(
        f"""  %add_fusion.{i} = f32[8]{{0}} fusion(%x), metadata={{op_name="jit(f)/rest/add"}}\n""" for i in range(8)
    )
    often = [*found, *[Kernel("add_fusion_0", 2, 1)] * 8]
    shorter = other.replace("dot.1", "add_fusion.0")
    assert profile.scopes(often, [shorter, own + fusions], 1) == profile.scopes(often, [own + fusions], 1)


def test_named_scopes_are_in_compiled_programs() -> None:
    @jax.jit
    def scoped_program(x):
        with jax.named_scope("attention"):
            x = jnp.sin(x) @ x
        return jnp.cos(x)

    scoped_program(jnp.ones((8, 8)))
    (text,) = profile._programs("jit_scoped_program")
    paths = profile.scopes([], [text], 1).values()
    assert any("attention" in path.split("/") and path.endswith("dot_general") for path in paths)
    assert any(path.endswith("cos") and "attention" not in path for path in paths)


TRACE = """
planes {
  name: "/device:GPU:0"
  lines { name: "Stream #7(Compute)" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 5000000 duration_ps: 2000000 stats { metadata_id: 1 str_value: "fusion.1" }
      stats { metadata_id: 2 str_value: "jit__decode" } }
    events { metadata_id: 2 offset_ps: 1000000 duration_ps: 3000000 } }
  lines { name: "XLA Ops" events { metadata_id: 1 offset_ps: 0 duration_ps: 9000000 } }
  event_metadata { key: 1 value { id: 1 name: "fusion_1" } }
  event_metadata { key: 2 value { id: 2 name: "nvjet" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
  stat_metadata { key: 2 value { id: 2 name: "hlo_module" } }
}
planes { name: "/host:CPU" lines { name: "Stream" events { metadata_id: 1 } }
  event_metadata { key: 1 value { id: 1 name: "host" } } }
"""


def test_kernels_are_those_on_the_streams_of_the_first_gpu(tmp_path: Path) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "host.xplane.pb").write_bytes(ProfileData.text_proto_to_serialized_xspace(TRACE))
    assert profile.kernels(str(tmp_path)) == [
        Kernel("nvjet", 2000, 3000),
        Kernel("fusion_1", 6000, 2000, "fusion.1", "jit__decode"),
    ]


def test_a_trace_without_kernels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="saw no kernel of a GPU"):
        profile.kernels(str(tmp_path))
