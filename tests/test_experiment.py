"""A run from its first phase to its record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_fixtures import LORA, WINDOW, experiment, request, set_places

from loras_bench.config import Experiment
from loras_bench.experiment import Run
from loras_bench.results.render import render
from loras_bench.results.tables import build_tables


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


SMALL_LLAMA = {
    "init": "scratch",
    "architecture": {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    },
    "tokenizer": {"vocabulary": 300},
}


def write_commonsense(folder: Path) -> None:
    """Eight questions to train on and five to be asked, four of them answered by 2."""
    folder = folder / "llm-adapters-commonsense"
    folder.mkdir()
    for split, rows in (("train", 8), ("test", 5)):
        lines = [
            json.dumps(
                {
                    "instruction": f"Is it {row}? Answer1: no Answer2: yes\n\nAnswer format: answer1/answer2",
                    "output": f"the correct answer is answer{1 if row == 3 else 2}",
                }
            )
            for row in range(rows)
        ]
        (folder / f"arc-easy_{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_a_run_on_choices_records_its_accuracy_and_what_it_is_worth(
    packing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_places(monkeypatch, tmp_path)
    write_commonsense(tmp_path)
    arm = Experiment.model_validate(
        {
            "name": "arm",
            "data": {"name": "arc-e", "sequence_length": 256, "packing": packing},
            "model": SMALL_LLAMA,
            "methods": [LORA],
            "training": {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "loss": "torch"},
            "energy": {"steady_seconds": 0, "idle_seconds": 0},
            "save": False,
        }
    )
    record = Run(request(arm, tmp_path / "results"), lambda event: None).execute()
    assert record.status == "completed", record.reason
    assert (record.task, record.steps, record.dataset) == ("instruction", 4, "arc-e")
    (quality,) = record.quality
    assert quality.metrics.keys() == {"loss", "perplexity", "accuracy", "accuracy_normalized"}
    assert quality.metrics["accuracy"] in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    assert (quality.protocol["rows"], quality.protocol["majority_share"]) == (5, 0.8)
    assert record.trained_tokens is not None and record.padded_tokens is not None
    assert record.trained_tokens < record.padded_tokens
    text = render(build_tables([record]))
    assert "test accuracy" in text
    assert "The most frequent answer is right in 0.8000 of 5 test rows" in text


def test_a_run_on_problems_answers_some_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_places(monkeypatch, tmp_path)
    (tmp_path / "gsm8k").mkdir()
    line = json.dumps({"question": "How many?", "answer": "One.\n#### 1"}) + "\n"
    for split in ("train", "test"):
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text(line * 4, encoding="utf-8")
    arm = Experiment.model_validate(
        {
            "name": "arm",
            "data": {"name": "gsm8k", "sequence_length": 64},
            "model": SMALL_LLAMA,
            "training": {"epochs": 60, "batch_size": 4, "learning_rate": 2e-2, "loss": "torch"},
            "evaluation": {"generation": {"rows": 3, "new_tokens": 20}},
            "energy": {"steady_seconds": 0, "idle_seconds": 0},
            "save": False,
        }
    )
    record = Run(request(arm, tmp_path / "results"), lambda event: None).execute()
    assert record.status == "completed", record.reason
    (quality,) = record.quality
    assert quality.metrics["exact_match"] == 1.0, "60 steps on one answer"
    assert quality.metrics["perplexity"] < 1.2
    assert quality.protocol["generation"] == {"rows": 3, "new_tokens": 20}
    text = render(build_tables([record]))
    assert "test perplexity" in text and "test exact match" in text
