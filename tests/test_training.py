"""The step loop: which rows a step takes, budgets, accumulation, the loss log, hooks of methods."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from training_fixtures import Rows, attended, make_loop, token_ids

from loras_bench.config import TrainingConfig
from loras_bench.errors import ConfigError
from loras_bench.methods.base import Method, MethodConfig, Stage
from loras_bench.training import LossLog, NonFiniteLossError, StepPlan, plan_batches, plan_steps

CPU = torch.device("cpu")


def config(**fields: Any) -> TrainingConfig:
    return TrainingConfig.model_validate({"learning_rate": 0.01} | fields)


@given(rows=st.integers(1, 40), per_step=st.integers(1, 40), seed=st.integers(0, 5))
def test_each_row_comes_exactly_once_a_pass(rows: int, per_step: int, seed: int) -> None:
    plan = StepPlan(rows, min(per_step, rows), 1, 1, seed)
    taken = [row for step in range(3 * rows) for row in plan.indices(step)]
    passes = [taken[at : at + rows] for at in range(0, 3 * rows, rows)]
    assert all(sorted(one) == list(range(rows)) for one in passes)


def test_the_order_depends_on_the_seed_alone() -> None:
    order = [StepPlan(50, 10, 10, 5, 0).indices(step) for step in range(5)]
    assert order == [StepPlan(50, 10, 2, 99, 0).indices(step) for step in range(5)], "not on micro-batches or length"
    assert order != [StepPlan(50, 10, 10, 5, 1).indices(step) for step in range(5)]
    assert order[0] != [row - 50 for row in range(50, 60)]
    second_pass = [StepPlan(50, 10, 10, 5, 0).indices(step) for step in range(5, 10)]
    assert second_pass != order, "each pass has an order of its own"


def test_budgets_are_rounded_up_to_whole_steps() -> None:
    text = Rows(token_ids(10, 8))
    for tokens, steps in ((1, 1), (32, 1), (33, 2), (96, 3), (97, 4)):
        assert plan_steps(config(tokens=tokens, tokens_per_step=32), text, 8, 0).steps == steps
    for epochs, steps in ((1, 3), (2, 5), (0.4, 1), (0.41, 2)):
        assert plan_steps(config(epochs=epochs, tokens_per_step=32), text, 8, 0).steps == steps


def test_a_budget_in_tokens_leaves_padding_out() -> None:
    """Rows of 2 and 6 real tokens, 4 on average: 64 tokens are 16 rows, 8 steps of 2 rows."""
    padded = Rows(token_ids(6, 8), lengths=[2, 6] * 3, labels=[0, 1] * 3)
    assert plan_steps(config(tokens=64, batch_size=2), padded, 8, 0).steps == 8


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"tokens": 9, "tokens_per_step": 12}, "multiple of the sequence length 8"),
        ({"tokens": 9, "tokens_per_step": 4}, "multiple of the sequence length 8"),
        ({"tokens": 9, "tokens_per_step": 32, "micro_batch_size": 3}, "does not divide the 4 rows"),
        ({"tokens": 9, "tokens_per_step": 88}, "a step takes 11 rows, the training set has 10"),
        ({"tokens": 9, "batch_size": 4}, "for classification"),
    ],
)
def test_impossible_steps_are_refused(fields: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        plan_steps(config(**fields), Rows(token_ids(10, 8)), 8, 0)


def test_a_hint_names_sizes_that_work() -> None:
    with pytest.raises(ConfigError) as raised:
        plan_steps(config(tokens=9, tokens_per_step=12), Rows(token_ids(10, 8)), 8, 0)
    assert raised.value.hint == "the nearest are 8 and 16"


def test_token_budget_for_classification_is_refused() -> None:
    with pytest.raises(ConfigError, match="language modelling"):
        plan_steps(config(epochs=1, tokens_per_step=8), Rows(token_ids(4, 8), labels=[0] * 4), 8, 0)


def test_micro_batches_are_the_step_in_order() -> None:
    data, plan = Rows(token_ids(10, 8)), StepPlan(10, 6, 2, 3, 0)
    batches = plan_batches(data, plan, 1)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 2]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), data.ids_ns[plan.indices(1)])


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_the_rows_of_each_micro_batch(processes: int) -> None:
    data, plan = Rows(token_ids(14, 8)), StepPlan(14, 12, 6, 3, 0)
    shares = [plan_batches(data, plan, 1, rank, processes) for rank in range(processes)]
    for number, whole in enumerate(plan_batches(data, plan, 1)):
        rows = [share[number]["input_ids"] for share in shares]
        assert {len(part) for part in rows} == {6 // processes}
        together = {tuple(row.tolist()) for part in rows for row in part}
        assert together == {tuple(row.tolist()) for row in whole["input_ids"]}


@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("labelled", [False, True], ids=["language", "classes"])
def test_accumulated_micro_batches_equal_one_batch(micro: int, labelled: bool) -> None:
    """Rows of unequal length: the mean is over the targets of the whole step, not over means of micro-batches."""
    labels = [0, 1, 2, 0, 1, 2, 1, 0] if labelled else None
    data = Rows(token_ids(8, 12), lengths=[12, 3, 7, 12, 5, 9, 2, 12], labels=labels)
    family = "gpt2-classifier" if labelled else "gpt2"
    whole, parts = attended(family), attended(family)
    one = make_loop(whole, data, StepPlan(8, 4, 4, 6, 0))
    many = make_loop(parts, data, StepPlan(8, 4, micro, 6, 0))
    for step in range(6):
        torch.testing.assert_close(many.step(step), one.step(step), rtol=1e-5, atol=1e-6)
    for ours, expected in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_the_loss_of_a_step_is_the_mean_over_its_targets() -> None:
    model = attended("llama")
    data = Rows(token_ids(4, 10), lengths=[10, 4, 10, 7])
    batch = data.collate("train", range(4))
    logits = model(input_ids=batch["input_ids"]).logits.log_softmax(-1)
    losses = [
        -logits[row, at, target]
        for row, line in enumerate(batch["targets"])
        for at, target in enumerate(line)
        if target >= 0
    ]
    expected = torch.stack(losses).mean()
    assert len(losses) == 31
    torch.testing.assert_close(make_loop(model, data, StepPlan(4, 4, 2, 1, 0)).step(0), expected, rtol=1e-5, atol=1e-6)


def test_training_learns_a_sequence() -> None:
    data = Rows(token_ids(4, 12))
    loop = make_loop(attended("llama"), data, StepPlan(4, 4, 4, 40, 0), max_grad_norm=1.0)
    log = LossLog(40, CPU)
    assert loop.run(0, 40, log, lambda step: False) == 40
    log.check(settled=True)
    assert log.values[-1] < 0.3 * log.values[0]


def test_resuming_needs_nothing_but_the_number_of_the_step() -> None:
    data, plan = Rows(token_ids(9, 8)), StepPlan(9, 4, 2, 8, 3)
    straight, broken = make_loop(attended("gpt2"), data, plan), make_loop(attended("gpt2"), data, plan)
    all_at_once, in_parts = LossLog(8, CPU), LossLog(8, CPU)
    straight.run(0, 8, all_at_once, lambda step: False)
    assert broken.run(0, 8, in_parts, lambda step: step == 4) == 5, "on_step ends the run after its step"
    assert broken.run(5, 8, in_parts, lambda step: False) == 8
    assert torch.equal(in_parts.values, all_at_once.values)


def test_loss_log() -> None:
    log = LossLog(12, CPU)
    assert log.latest() is None
    log.write(0, torch.tensor(2.0))
    log.write(1, torch.tensor(1.5))
    assert log.latest() == 1.5
    log.check()
    log.values[2], log.last = math.inf, 2  # on its way from the device
    log.check()
    assert log.latest() == 1.5
    with pytest.raises(NonFiniteLossError, match="inf in step 3"):
        log.check(settled=True)
    log.write(3, torch.tensor(math.nan))
    with pytest.raises(NonFiniteLossError, match="nan in step 4"):
        log.check()


def test_a_diverging_run_stops_within_ten_steps() -> None:
    loop = make_loop(attended("gpt2"), Rows(token_ids(4, 8)), StepPlan(4, 4, 4, 30, 0), learning_rate=1e30)
    log = LossLog(30, CPU)
    with pytest.raises(NonFiniteLossError):
        loop.run(0, 30, log, lambda step: False)
    assert log.last == 9


class _RecorderConfig(MethodConfig):
    kind: Literal["recorder"] = "recorder"


class _Recorder(Method[_RecorderConfig]):
    """Notes each hook, and adds a term to the loss that pulls one weight."""

    stage: ClassVar[Stage] = Stage.SPARSIFY

    def __init__(self, weight: Tensor, calls: list[str]) -> None:
        super().__init__(_RecorderConfig())
        self.weight, self.calls = weight, calls

    def before_step(self, step: int) -> None:
        self.calls.append(f"before {step}")

    def loss_terms(self, taps: Any) -> dict[str, Tensor]:
        self.calls.append(f"terms with {sorted(taps.attention)}")
        return {"pull": 3.0 * self.weight.sum()}

    def after_step(self, step: int) -> None:
        assert self.weight.grad is None, "the update is done"
        self.calls.append(f"after {step}")


def test_hooks_of_methods_and_their_loss_terms() -> None:
    from loras_bench.attention.dispatch import ModelAttention
    from loras_bench.methods.base import Taps

    model = attended("gpt2")
    calls: list[str] = []
    data, plan = Rows(token_ids(4, 8)), StepPlan(4, 4, 2, 1, 0)
    bias = model.transformer.ln_f.bias
    loop = make_loop(model, data, plan, [_Recorder(bias, calls)], max_grad_norm=1e9)
    loop.taps = ModelAttention.of(model).taps = Taps()
    seen: list[Tensor] = []
    bias.register_hook(lambda gradient: seen.append(gradient))
    reported = loop.step(0)
    assert calls == ["before 0", "terms with [0, 1]", "terms with [0, 1]", "after 0"]
    assert not loop.taps.attention, "nothing of a step is kept alive"
    plain_model = attended("gpt2")
    plain: list[Tensor] = []
    plain_model.transformer.ln_f.bias.register_hook(lambda gradient: plain.append(gradient))
    expected = make_loop(plain_model, data, plan).step(0)
    torch.testing.assert_close(sum(seen), sum(plain) + 3.0, msg="the term counts once a step, not once a micro-batch")
    torch.testing.assert_close(reported, expected, msg="the log holds the task's loss alone")


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(1, 500), per_step=st.integers(1, 10))
def test_a_token_budget_is_reached_and_not_passed_by_a_step(tokens: int, per_step: int) -> None:
    data = Rows(token_ids(10, 8))
    plan = plan_steps(config(tokens=tokens, tokens_per_step=8 * per_step), data, 8, 0)
    trained = plan.steps * per_step * 8
    assert trained >= tokens > trained - per_step * 8
