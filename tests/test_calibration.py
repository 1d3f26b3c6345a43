"""What is measured is what the method does in training: against direct evaluations, in both implementations."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_fixtures import LORA, Rows, experiment, token_ids

from loras_bench.build import Build, build, read
from loras_bench.calibration import (
    Calibration,
    CalibrationSet,
    _loss_and_divergence,
    calibration_set,
    load_adapters,
    rise,
)
from loras_bench.errors import ConfigError
from loras_bench.methods import sparse_lora
from loras_bench.methods.sparse_lora import SparseLora, SparseLoraConfig
from loras_bench.models.objective import Objective
from loras_bench.models.saved import save_weights
from loras_bench.sparsity.criteria import DENSE, LayerSparsity

pytestmark = pytest.mark.usefixtures("places")

LLAMA = {
    "init": "scratch",
    "architecture": {"model_type": "llama", "num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4,
                     "num_key_value_heads": 2, "intermediate_size": 80, "initializer_range": 0.2},
    "tokenizer": {"vocabulary": 300},
}  # fmt: skip
QUESTIONS = {"name": "questions", "task": "instruction", "sequence_length": 128}
ALL = {"kind": "sparse_lora", "rank": 4, "start": 0.0, "layers": {"0-2": {"feed_forward": 0.9, "attention": 0.75}}}
BOTH = pytest.mark.parametrize("implementation", ["transformers", "fused"])
SCHEDULES = [
    [LayerSparsity(0.9), DENSE, DENSE],
    [DENSE, LayerSparsity(attention=0.75), DENSE],
    [DENSE, LayerSparsity(0.5, 0.5), LayerSparsity(0.9)],
]


@pytest.fixture(autouse=True)
def questions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Twelve prompts of several lengths; dense tokens in multiples of few, else all would be dense."""
    monkeypatch.setattr(sparse_lora, "ROW_MULTIPLE", 4)
    monkeypatch.setenv("LORAS_BENCH_DATA", str(tmp_path))
    (tmp_path / "questions").mkdir()
    pairs = [{"prompt": "so " * (3 + row % 4) + f"what is {row}?", "response": f"it is {7 * row}"} for row in range(12)]
    for split in ("train", "test"):
        (tmp_path / "questions" / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def built(sparse: dict[str, Any] | None = None, implementation: str = "transformers", packing: str = "padded") -> Build:
    """A run on questions, with adapters that do something."""
    if implementation == "fused":
        pytest.importorskip("triton")
    made = experiment(
        data=QUESTIONS | {"packing": packing},
        model=LLAMA | {"implementation": implementation},
        methods=[LORA] + ([sparse] if sparse else []),
    )
    run = build(made, 0, "cpu", read(made, 0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if ".lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return run


def drawn(run: Build, rows: int, micro_rows: int) -> CalibrationSet:
    return calibration_set(run.data, sparse_of(run), rows, micro_rows, seed=0)


def sparse_of(run: Build) -> SparseLora:
    return next(one for one in run.methods if isinstance(one, SparseLora))


def direct(rows: CalibrationSet, layers: Sequence[LayerSparsity], packing: str) -> float:
    """The summed loss of a model whose only schedule this is, by the objective that training has."""
    named = {
        str(number): {part: share for part, share in shares._asdict().items() if share}
        for number, shares in enumerate(layers)
        if any(shares)
    }
    run = built(ALL | {"layers": named} if named else None, packing=packing)
    if named:
        sparse_of(run).plan(1)
        sparse_of(run).before_step(0)
    objective = Objective(run.model, "language_modeling", "torch").train()
    extra = ("dense_rows", "sparse_rows", "samples")
    with torch.no_grad():
        batches = [{name: t for name, t in batch.items() if named or name not in extra} for batch in rows.batches]
        return sum(float(objective(**batch)[0]) for batch in batches)


@pytest.mark.parametrize(
    ("implementation", "packing"), [("transformers", "padded"), ("transformers", "packed"), ("fused", "packed")]
)
def test_a_measurement_is_a_direct_evaluation(implementation: str, packing: str) -> None:
    """One model whose schedule changes and changes back, against one model for each schedule."""
    run = built(ALL, implementation, packing)
    rows = drawn(run, rows=3, micro_rows=2 if implementation == "transformers" else 3)
    calibration = Calibration(run, rows)
    expected = {number: direct(rows, layers, packing) for number, layers in enumerate([*SCHEDULES, [DENSE] * 3])}
    labels = rows.labels_r.sum()
    assert calibration.dense_loss == pytest.approx(expected[3] / labels, rel=1e-5)
    for number in (1, 2):
        got = calibration.reading(SCHEDULES[number])
        assert got.increase == pytest.approx((expected[number] - expected[3]) / labels, abs=2e-5)
        assert abs(got.increase) > 1e-3 and got.error > 0 and got.divergence > 1e-4
    assert calibration.reading([DENSE] * 3).divergence == 0


@pytest.mark.parametrize("packing", ["padded", "packed"])
def test_the_tokens_of_a_row(packing: str) -> None:
    """Those of the data, padding excluded; dense are those with labels, filled up by context."""
    run = built(ALL, packing=packing)
    rows = drawn(run, rows=12, micro_rows=6)
    context, dense = rows.mean_tokens
    assert rows.rows == 12 and rows.labels_r.sum() == run.data.target_count("train", range(12))
    assert context + dense == round(run.data.real_tokens("train", range(12)) / 12)
    assert dense * 12 == pytest.approx(rows.labels_r.sum(), abs=2 * 4 + 12)


def test_rows_are_those_of_the_seed() -> None:
    run = built(ALL)
    some, same, other = (calibration_set(run.data, sparse_of(run), 4, 4, seed) for seed in (0, 0, 1))
    assert torch.equal(some.batches[0]["input_ids"], same.batches[0]["input_ids"])
    assert not torch.equal(some.batches[0]["input_ids"], other.batches[0]["input_ids"])
    assert calibration_set(run.data, sparse_of(run), 99, 5, 0).rows == 12, "all there are"


def test_blocks_of_text_are_context_throughout() -> None:
    config = SparseLoraConfig.model_validate(ALL | {"tokens": "all"})
    rows = calibration_set(Rows(token_ids(4, 16)), SparseLora(config), 4, 2, 0)
    assert rows.mean_tokens == (16, 0) and rows.labels_r.tolist() == [16] * 4


def test_classes_are_refused() -> None:
    method = SparseLora(SparseLoraConfig.model_validate(ALL | {"tokens": "all"}))
    with pytest.raises(ConfigError, match="predictions of tokens"):
        calibration_set(Rows(token_ids(4, 16), labels=[0, 1, 2, 0]), method, 4, 2, 0)


@BOTH
def test_adapters_of_a_run_take_the_place_of_fresh_ones(implementation: str, tmp_path: Path) -> None:
    """In place: the fused layers, which hold the same memory, see them."""
    theirs, ours = built(), built(ALL, implementation)
    with torch.no_grad():
        for name, parameter in theirs.model.named_parameters():
            if ".lora_" in name:
                parameter.mul_(3)
    save_weights(tmp_path / "run", theirs.model, theirs.tokenizer)
    load_adapters(ours.model, tmp_path / "run")
    rows = drawn(ours, rows=3, micro_rows=3)
    expected = Objective(theirs.model, "language_modeling", "torch").train()
    plain = [{k: v for k, v in batch.items() if not k.endswith("_rows")} for batch in rows.batches]
    with torch.no_grad():
        loss = sum(float(expected(**batch)[0]) for batch in plain)
    assert Calibration(ours, rows).dense_loss == pytest.approx(loss / rows.labels_r.sum(), rel=1e-5)


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    run = built()
    with pytest.raises(ConfigError, match="holds no adapters"):
        load_adapters(run.model, tmp_path / "nothing")
    for lora, named in ((LORA | {"rank": 2}, "do not fit"), (LORA | {"targets": ["q_proj"]}, "other layers")):
        made = experiment(data=QUESTIONS, model=LLAMA, methods=[lora])
        other = build(made, 0, "cpu", read(made, 0))
        save_weights(tmp_path / named, other.model, other.tokenizer)
        with pytest.raises(ConfigError, match=named):
            load_adapters(run.model, tmp_path / named)


def test_the_divergence_of_predictions_by_hand() -> None:
    """Of (1/2, 1/2) where (1/4, 3/4) is the dense prediction; none where both are the same."""
    logits_nv, dense_nv = torch.tensor([[0.0, 0.0], [1.0, 3.0]]), torch.tensor([[1.0, 3.0], [1.0, 3.0]]).log()
    dense_nv[1] = logits_nv[1] + 5
    loss_n, divergence_n = _loss_and_divergence(logits_nv, dense_nv, torch.tensor([0, 1]))
    assert divergence_n.tolist() == pytest.approx([0.25 * math.log(0.5) + 0.75 * math.log(1.5), 0.0], abs=1e-6)
    assert loss_n.tolist() == pytest.approx([math.log(2), math.log(1 + math.exp(-2))])


def test_the_error_of_an_increase() -> None:
    """With one label a row, the mean and its standard error; in general that of a ratio, by hand."""
    rises = np.array([1.0, 2.0, 6.0, 3.0])
    even = rise(np.zeros(4), rises, np.ones(4))
    assert (even.increase, even.error) == pytest.approx((3.0, rises.std(ddof=1) / 2))
    uneven = rise(np.ones(2), np.array([3.0, 5.0]), np.array([1, 3]))
    assert uneven.increase == pytest.approx(6 / 4)
    assert uneven.error == pytest.approx(math.sqrt((0.5**2 + 0.5**2) / 1 / 2) / 2)
