"""A run from its first phase to its record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training_fixtures import LORA, WINDOW, experiment, request, set_places

from loras_bench.experiment import Run


@pytest.mark.parametrize("methods", [[LORA, WINDOW], [LORA]], ids=["sparse", "dense"])
def test_the_order_of_evaluations_does_not_matter(
    methods: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each evaluation is read with its own attention; a dense model gives the same in both."""
    set_places(monkeypatch, tmp_path)
    readings = []
    for order in (["same", "dense"], ["dense", "same"]):
        arm = experiment("arm", methods=methods, evaluation={"attention": order})
        record = Run(request(arm, tmp_path / order[0]), lambda event: None).execute()
        assert record.status == "completed", record.reason
        assert [quality.attention for quality in record.quality] == order
        readings.append({quality.attention: quality.metrics["perplexity"] for quality in record.quality})
    assert readings[0] == readings[1]
    assert (readings[0]["same"] == readings[0]["dense"]) == (methods == [LORA])
