"""`loras-bench kernels`: what it refuses, what it prints and writes; the measuring itself is in tests/benchmarking."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loras_bench.attention.dense import SdpaBackend
from loras_bench.attention.reference import ReferenceBackend
from loras_bench.benchmarking import bench, contenders
from loras_bench.benchmarking.bench import Call, Drawn, Quartiles
from loras_bench.benchmarking.contenders import Contender
from loras_bench.commands.kernels import PATTERNS, SHAPES


class CpuBench:
    """Takes the place of the GPU's."""

    device = torch.device("cpu")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> CpuBench:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def captured(self, call: Call) -> Call | None:
        return None

    def times(self, call: Call, thorough: bool = True) -> Quartiles:
        return Quartiles(1.0, 2.0, 3.0)

    def peak_bytes(self, call: Call) -> int:
        return 2**20

    def energy(self, call: Call, call_ms: float) -> Drawn | None:
        return Drawn(1.0, 500.0) if self.seconds else None

    def release(self) -> None:
        pass


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command with a bench and contenders that a CPU has."""
    taking_part = [
        Contender("cuDNN dense", lambda trial: SdpaBackend("math"), dense=True),
        Contender("reference", lambda trial: ReferenceBackend()),
        Contender("absent", lambda trial: 1 / 0),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "CudaBench", CpuBench)
    monkeypatch.setattr(contenders, "contenders", lambda: taking_part)


def test_help_tells_the_defaults(invoke: Callable[..., object]) -> None:
    text = " ".join(invoke("kernels", "--help").out.split())
    assert " ".join(SHAPES) in text and " ".join(PATTERNS) in text


def test_without_a_gpu_it_says_so(invoke: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    called = invoke("kernels")
    assert called.status == 2 and called.out == ""
    assert called.err.splitlines()[0].startswith("error: no CUDA device") and "doctor" in called.err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--shapes", "8192"), "--shapes `8192`"),
        (("--patterns", "thin"), "--patterns `thin`"),
        (("--json", "/nowhere/at/all.json"), "--json /nowhere/at/all.json"),
        (("--json", "/"), "is a folder"),
        (("--seconds", "-1"), "--seconds"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(
    invoke: Callable[..., object], words: tuple[str, ...], named: str
) -> None:
    called = invoke("kernels", *words)
    assert called.status == 2 and named in called.err.splitlines()[0]


@pytest.mark.usefixtures("on_cpu")
def test_tables_go_to_stdout_and_numbers_to_the_file(invoke: Callable[..., object], tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    called = invoke("kernels", "--shapes", "1x2x16x8 1x4/2x16x8", "--patterns", "window:4", "--json", file)
    assert called.status == 0
    assert called.out.count("window: window 4, causal") == 2 and "ZeroDivisionError" in called.out
    assert "1x2x16x8  window: window 4, causal  reference" in called.err
    content = json.loads(file.read_text())
    assert [case["shape"]["key_heads"] for case in content["cases"]] == [2, 2]
    rows = content["cases"][1]["rows"]
    assert [row["backend"] for row in rows] == ["cuDNN dense", "reference", "absent"]
    assert rows[1]["energy_j"] == 1.0 and rows[2]["reason"] == "ZeroDivisionError: division by zero"
    assert content["environment"]["packages"]["torch"] and "energy counter" in content["protocol"]
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.json"]


@pytest.mark.usefixtures("on_cpu")
def test_no_seconds_leave_joules_out(invoke: Callable[..., object], tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    words = ("--shapes", "1x2x16x8", "--patterns", "window:4", "--seconds", 0, "--json", file)
    assert invoke("kernels", *words).status == 0
    assert [row["energy_j"] for row in json.loads(file.read_text())["cases"][0]["rows"]] == [None] * 3
