"""Whole runs that leave their weights, metered by a GPU that draws 50 W, and runs that go on from them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from training_fixtures import assemble_run, experiment, request, token_ids

from loras_bench.experiment import Run
from loras_bench.metering.sources import NullSource, Reading
from loras_bench.models.objective import unwrapped
from loras_bench.results.record import Record


class ConstantGpu:
    """50 W by the wall clock, in ticks of 0.1 s."""

    kind, name, power_kind = "gpu", "GPU-constant", "instant"
    flags: dict[str, str] = {}  # noqa: RUF012 (never written)

    def read(self, with_power: bool = True) -> Reading:
        now_s = time.monotonic()
        return Reading(now_s, int(now_s * 10) * 5.0, 50.0)

    def state(self) -> None:
        return None


def run(
    name: str, results: Path, seed: int = 0, pretrained: Path | None = None, **sections: Any
) -> tuple[Path, Record]:
    """Execute a run to its end; its folder and record."""
    made = request(experiment(name, **sections), results, seed, pretrained=pretrained)
    with pytest.MonkeyPatch.context() as patch:
        sources = [ConstantGpu(), NullSource("cpu", "none")]
        patch.setattr("loras_bench.experiment.open_sources", lambda gpus, clock: sources)
        record = Run(made, lambda event: None).execute()
    assert record.status == "completed", record.reason
    return made.folder, record


def logits(model: nn.Module) -> Tensor:
    return unwrapped(model).eval()(input_ids=token_ids(2, 16)).logits


def going_on(folder: Path, **sections: Any) -> Any:
    return assemble_run(experiment("next", model={"run": str(folder)}, **sections), 5)
