"""What a row of the kernel benchmark holds, and that no contender can stop the others."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loras_bench.attention.backend import Backend
from loras_bench.attention.dense import SdpaBackend
from loras_bench.attention.patterns import BigBird, Dense, PatternBase, Window
from loras_bench.attention.reference import ReferenceBackend
from loras_bench.benchmarking.bench import Call, CudaBench, Drawn, Quartiles
from loras_bench.benchmarking.cases import Case, Shape
from loras_bench.benchmarking.contenders import (
    SWEEP,
    BackwardOptions,
    Contender,
    DefaultSdpa,
    ForwardOptions,
    Speed,
    TunedFlex,
    contenders,
    tune_flex,
)
from loras_bench.benchmarking.inputs import bind, random_inputs, reference_of, relative_errors
from loras_bench.benchmarking.longformer import LongformerChunks
from loras_bench.benchmarking.measuring import CaseRunner, Result
from loras_bench.benchmarking.report import print_result, to_json
from loras_bench.errors import UserError

CPU = torch.device("cpu")
SHAPE = Shape(2, 4, 2, 24, 16)
WINDOW = Case(SHAPE, Window(window=5, global_tokens=2), True)


class ScriptedBench:
    """On the CPU: a call takes 2 ms, 4 MiB and 3 J."""

    device = CPU

    def __init__(self, captures: bool = True) -> None:
        self.captures, self.timed = captures, 0

    def captured(self, call: Call) -> Call | None:
        return (lambda: call()) if self.captures else None

    def times(self, call: Call, thorough: bool = True) -> Quartiles:
        self.timed += 1
        call()
        return Quartiles(1.5, 2.0, 2.25)

    def peak_bytes(self, call: Call) -> int:
        return 4 * 2**20

    def energy(self, call: Call, call_ms: float) -> Drawn:
        return Drawn(3.0, 600.0)

    def release(self) -> None:
        pass


class Broken(ReferenceBackend):
    """Fails as it is told to."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def attend(self, *arguments: object) -> tuple[Tensor, Tensor]:
        raise self.error


class Skewed(ReferenceBackend):
    """Right but for one value of one head."""

    def attend(self, *arguments: object) -> tuple[Tensor, Tensor]:
        out, lse = super().attend(*arguments)
        changed = torch.zeros_like(out)
        changed[0, 1, 3, 7] = 0.5
        return out + changed, lse


def run(case: Case, *taking_part: Contender, captures: bool = True) -> Result:
    return CaseRunner(taking_part, ScriptedBench(captures), lambda line: None).run(case)


def plain(name: str, backend: Backend, **facts: bool) -> Contender:
    return Contender(name, lambda trial: backend, **facts)


@pytest.mark.parametrize(
    "case",
    [
        WINDOW,
        Case(SHAPE, BigBird(block=4, random_blocks=1), True),
        Case(SHAPE, Window(half_width=3, global_tokens=1), False),
        Case(Shape(1, 2, 2, 7, 16), Dense(), False),
    ],
)
def test_the_reference_in_bands_is_the_reference_at_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, bound = random_inputs(case.shape, CPU, torch.float32), bind(case, CPU)
    out, _ = ReferenceBackend().attend(*inputs.leaves, bound, inputs.scale)
    grads = torch.autograd.grad(out, inputs.leaves, inputs.grad_bhsd)
    monkeypatch.setattr("loras_bench.benchmarking.inputs.SCORES_AT_ONCE", 5 * case.shape.length * 2)
    exact = reference_of(inputs, bound)
    for name, whole in zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True):
        torch.testing.assert_close(exact[name], whole[:1, : exact[name].shape[1]].detach(), rtol=1e-5, atol=1e-5)
    assert exact["dq"].shape[1] == case.shape.heads // case.shape.key_heads and exact["dk"].shape[1] == 1


def test_errors_are_relative_to_the_largest_exact_value() -> None:
    exact = {"out": torch.tensor([[[[1.0, -4.0]]]])}
    found = {"out": torch.tensor([[[[1.5, -4.0]], [[9.0, 9.0]]]])}  # the second head is not looked at
    assert relative_errors(found, exact) == {"out": 0.125}


def test_a_row_holds_everything() -> None:
    result = run(WINDOW, plain("right", ReferenceBackend()))
    (row,) = result.rows
    assert row.reason is None
    assert row.forward == row.both == Quartiles(1.5, 2.0, 2.25)
    assert row.executed_pairs == 2 * 24**2
    assert row.drawn == Drawn(3.0, 600.0) and row.peak_bytes == 4 * 2**20
    assert set(row.errors) == {"out", "dq", "dk", "dv"} and max(row.errors.values()) < 0.02  # bf16
    # 4 * pairs * 16 * 4 heads FLOPs in 2 ms; the backward pass adds 2.5 times as many
    assert result.tflop_per_s(row, 1000, both=False) == pytest.approx(4 * 1000 * 16 * 4 / 2e-3 / 1e12)
    assert result.tflop_per_s(row, 1000, both=True) == pytest.approx(3.5 * 4 * 1000 * 16 * 4 / 2e-3 / 1e12)


def test_an_error_shows_in_the_head_that_is_checked() -> None:
    right, skewed = run(WINDOW, plain("right", ReferenceBackend()), plain("skewed", Skewed())).rows
    assert skewed.errors["out"] > 10 * right.errors["out"]


def test_results_that_are_no_numbers_are_not_timed() -> None:
    class Overflowing(ReferenceBackend):
        def attend(self, *arguments: object) -> tuple[Tensor, Tensor]:
            out, lse = super().attend(*arguments)
            return out / 0 * 0, lse

    (row,) = run(WINDOW, plain("overflowing", Overflowing())).rows
    assert row.reason is not None and row.reason.startswith("NaN or infinite values in out") and row.both is None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory"),
        (UserError("it cannot do this", "hint"), "it cannot do this"),
        (RuntimeError("illegal memory access\nCUDA kernel errors"), "RuntimeError: illegal memory access"),
    ],
)
def test_a_failure_is_a_row_with_its_reason(error: Exception, reason: str) -> None:
    broken, right = run(WINDOW, plain("broken", Broken(error)), plain("right", ReferenceBackend())).rows
    assert (broken.reason, broken.forward) == (reason, None)
    assert right.reason is None


def test_a_call_that_no_graph_holds_is_timed_without_one_and_says_so() -> None:
    taking_part = [plain("right", ReferenceBackend()), plain("eager", ReferenceBackend(), capturable=False)]
    assert [row.note for row in run(WINDOW, *taking_part).rows] == ["", "timed without a CUDA graph"]
    assert [row.note for row in run(WINDOW, *taking_part, captures=False).rows] == 2 * ["timed without a CUDA graph"]
    default = plain("default", DefaultSdpa(), dense=True)
    (row,) = run(Case(SHAPE, Dense(), True), default, captures=False).rows
    assert row.note.endswith(", timed without a CUDA graph")


def test_a_failure_before_the_first_call_is_a_row_too() -> None:
    def fail(trial: object) -> Backend:
        raise ImportError("no module named triton")

    (row,) = run(WINDOW, Contender("absent", fail)).rows
    assert row.reason == "ImportError: no module named triton"


def test_a_refusal_is_a_row() -> None:
    class Refusing(ReferenceBackend):
        def refusal(self, pattern: PatternBase, device: torch.device, head_dim: int) -> str:
            return f"no {pattern.kind} on {device.type}"

    (row,) = run(WINDOW, plain("refusing", Refusing())).rows
    assert row.reason == "no window on cpu"


def test_dense_contenders_compute_every_pair_once_for_each_shape_and_direction() -> None:
    bench = ScriptedBench()
    runner = CaseRunner([plain("dense", SdpaBackend("math"), dense=True)], bench, lambda line: None)
    first, second = runner.run(WINDOW), runner.run(Case(SHAPE, Window(window=3), True))
    assert first.rows[0] is second.rows[0] and bench.timed == 2
    assert first.rows[0].errors["dq"] < 0.02  # held to dense attention
    assert first.allowed_pairs == WINDOW.allowed_pairs() and second.allowed_pairs == 2 * (1 + 2 + 22 * 3)
    runner.run(Case(SHAPE, Window(half_width=3), False))
    assert bench.timed == 4


def test_default_sdpa_names_its_kernel() -> None:
    (row,) = run(Case(SHAPE, Dense(), True), plain("default", DefaultSdpa(), dense=True)).rows
    assert row.reason is None and row.note in ("math", "flash")


@pytest.mark.parametrize("prefix", [0, 3])
def test_longformers_chunks_are_the_bidirectional_window(prefix: int) -> None:
    case = Case(Shape(2, 3, 3, 32, 16), Window(half_width=4, global_tokens=prefix), False)
    inputs, bound = random_inputs(case.shape, CPU, torch.float32), bind(case, CPU)
    backend = LongformerChunks()
    out, _ = backend.attend(*inputs.leaves, bound, inputs.scale)
    dq, dk, dv = torch.autograd.grad(out, inputs.leaves, inputs.grad_bhsd)
    errors = relative_errors({"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}, reference_of(inputs, bound))
    assert max(errors.values()) < 1e-5
    # scores: 7 chunks of 8 x 8; weights: 32 x 12; each global token a column and a row
    assert backend.executed_pairs(bound, 2, 16) == 2 * ((7 * 64 + 32 * 12) // 2 + 2 * prefix * 32)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (WINDOW, "bidirectional windows only"),
        (Case(SHAPE, Dense(), False), "bidirectional windows only"),
        (Case(SHAPE, Window(half_width=3), False), "no grouped-query heads"),
        (Case(Shape(1, 2, 2, 24, 16), Window(half_width=5), False), "24 is no multiple of its chunks of 10"),
    ],
)
def test_longformer_says_what_it_cannot_do(case: Case, reason: str) -> None:
    (row,) = run(case, plain("longformer", LongformerChunks(), capturable=False)).rows
    assert row.reason is not None and reason in row.reason


# --- FlexAttention's options


def trial_of(speeds: dict[object, Speed]) -> Callable[[Backend], Speed]:
    def trial(backend: Backend) -> Speed:
        assert isinstance(backend, TunedFlex)
        return speeds[(backend.forward, backend.backward)]

    return trial


def test_the_fastest_forward_and_the_fastest_backward_are_put_together() -> None:
    speeds = {options: Speed(5.0, 15.0) for options in SWEEP}
    speeds[SWEEP[1]] = Speed(3.0, 14.0)
    speeds[SWEEP[3]] = Speed(9.0, 15.0)  # a backward pass of 6 ms
    tuned = tune_flex(trial_of(speeds))
    assert (tuned.forward, tuned.backward) == (SWEEP[1][0], SWEEP[3][1])
    assert tuned.note == "forward 64x64, 4 warps, 3 stages; backward 64x128x128x64, 8 warps, 2 stages"


def test_options_that_do_not_run_are_passed_over() -> None:
    found = {SWEEP[0]: Speed(1.0, 2.0)}
    tuned = tune_flex(trial_of(found))  # the others raise KeyError
    assert (tuned.forward, tuned.backward) == (None, None)
    with pytest.raises(UserError, match="no option of the sweep ran"):
        tune_flex(trial_of({}))


def test_options_reach_the_kernel_beside_those_of_the_backend() -> None:
    tuned = TunedFlex(ForwardOptions(64, 32, 4, 3), BackwardOptions(16, 32, 64, 128, 8, 2))
    seen = {}
    tuned._compiled = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "loras_bench.attention.flex.flex_attention", lambda *tensors, **arguments: seen.update(arguments) or "out"
        )
        assert tuned._kernel("q", "k", "v", kernel_options={"BACKEND": "TRITON"}, scale=1.0) == "out"
    assert seen == {
        "scale": 1.0,
        "kernel_options": {
            "BACKEND": "TRITON",
            "fwd_BLOCK_M": 64, "fwd_BLOCK_N": 32, "fwd_num_warps": 4, "fwd_num_stages": 3,
            "bwd_BLOCK_M1": 16, "bwd_BLOCK_N1": 32, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 128,
            "bwd_num_warps": 8, "bwd_num_stages": 2,
        },
    }  # fmt: skip


# --- the report


def test_a_table_has_a_line_for_every_contender(capsys: pytest.CaptureFixture[str]) -> None:
    failed = plain("broken", Broken(RuntimeError("no such kernel")))
    result = run(
        WINDOW, plain("cuDNN dense", SdpaBackend("math"), dense=True), plain("right", ReferenceBackend()), failed
    )
    print_result(result)
    out = capsys.readouterr().out
    lines = {line.split("│")[1].strip(): line for line in out.splitlines() if "│" in line}
    assert "window: window 5, global_tokens 2, causal" in out
    assert f"({WINDOW.allowed_pairs() / (2 * 300):.1%} of the dense pairs)" in out
    assert "2 (0.8)" in lines["right"] and "1.000" not in lines["broken"]
    assert "RuntimeError: no such kernel" in lines["broken"]


def test_json_has_the_units_in_the_names_and_the_reasons() -> None:
    result = run(WINDOW, plain("right", ReferenceBackend()), plain("broken", Broken(RuntimeError("no"))))
    content = json.loads(json.dumps(to_json([result], {"python": "3"}), allow_nan=False))
    right, broken = content["cases"][0]["rows"]
    assert content["cases"][0]["shape"] == {"batch": 2, "heads": 4, "key_heads": 2, "length": 24, "head_dim": 16}
    assert right["forward_backward_ms"] == {"low_ms": 1.5, "median_ms": 2.0, "high_ms": 2.25}
    assert (right["energy_j"], right["power_w"], right["peak_bytes"]) == (3.0, 600.0, 4 * 2**20)
    assert right["forward_tflop_per_s_executed"] > 0 and right["reason"] is None
    assert (broken["forward_ms"], broken["energy_j"], broken["reason"]) == (None, None, "RuntimeError: no")


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("case", [
    Case(Shape(1, 4, 2, 512, 64), Window(window=128, global_tokens=16), True),
    Case(Shape(1, 4, 4, 512, 64), Window(half_width=64, global_tokens=16), False),
])  # fmt: skip
def test_all_contenders_on_a_gpu(case: Case) -> None:
    with CudaBench(0.3) as bench:
        result = CaseRunner(contenders(), bench, lambda line: None).run(case)
    rows = {row.backend: row for row in result.rows}
    assert len(rows) == 7
    for name in ("default SDPA", "Flex", "Flex tuned", "ours (Triton)"):
        row = rows[name]
        assert row.reason is None, (name, row.reason)
        assert row.forward is not None and row.both is not None and row.drawn is not None and row.peak_bytes
        assert 0 < row.forward.low_ms <= row.forward.median_ms <= row.forward.high_ms
        assert max(row.errors.values()) < 0.05
    longformer = rows["HF Longformer"]
    assert (longformer.reason is None) == (not case.causal), longformer.reason
