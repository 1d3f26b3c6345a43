"""The FLOPs of a whole training: attention three ways against the formulas, and the same in a dry run as in a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training_fixtures import (
    BERT,
    CPU,
    GPT2,
    HALF_WINDOW,
    LAYERS,
    LORA,
    MOODS,
    NOTES,
    WIDTH,
    WINDOW,
    assemble_run,
    build_run,
    experiment,
)

from loras_bench.build import Assembly
from loras_bench.counting import count_training
from loras_bench.metering.flops import MatmulCounter
from loras_bench.training import plan_batches
from loras_bench.worker import facts_of

pytestmark = pytest.mark.usefixtures("places")

PACKED = MOODS | {"packing": "packed"}
ARMS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"methods": [LORA]},
    "lora_s": {"methods": [LORA, WINDOW]},
    "checkpointed": {"methods": [LORA, WINDOW], "training": {"gradient_checkpointing": True}},
    "bfloat16": {"model": GPT2 | {"dtype": "bfloat16"}, "training": {"micro_batch_size": 2}},
    "classes": {"data": MOODS},
    "classes_lora_s": {"data": MOODS, "methods": [LORA, HALF_WINDOW], "training": {"micro_batch_size": 4}},
    "packed_lora_s": {"data": PACKED, "methods": [LORA, HALF_WINDOW], "training": {"micro_batch_size": 4}},
}
BLOCKS = 3 * 4
"""Of 32 tokens: a budget of 384 tokens, in steps of 4 blocks."""


def assembled(**sections: Any) -> Assembly:
    return assemble_run(experiment(**sections))


def window_pairs(length: int, window: int, prefix: int) -> int:
    """Pairs k <= q with q - k < window or k < prefix, by counting each."""
    return sum(q - k < window or k < prefix for q in range(length) for k in range(q + 1))


@pytest.mark.parametrize("arm", ARMS)
def test_a_dry_run_counts_what_the_run_counts(arm: str) -> None:
    """The dry run holds no weights on a device; the run counts on its own device, in its own number format."""
    made = experiment(**ARMS[arm])
    facts = facts_of(made, 0, CPU, None)
    run = build_run(made)
    flops, tokens = count_training(run, torch.device("cpu"))
    total, trainable = run.parameter_counts()
    assert facts == {
        "steps": run.plan.steps, "total_parameters": total, "trainable_parameters": trainable, "flops": flops
    }  # fmt: skip
    assert flops.linear > 0 and not flops.incomplete
    assert tokens >= sum(run.data.real_tokens("train", run.plan.indices(step)) for step in range(run.plan.steps))
    assert all(parameter.grad is None for parameter in run.model.parameters())


@pytest.mark.parametrize("arm", ["lora_s", "classes_lora_s", "packed_lora_s"])
def test_products_are_those_of_every_step_executed(arm: str) -> None:
    """Batches of one shape cost the same, so one of each is executed: here every one is."""
    run = assembled(**ARMS[arm])
    executed = 0.0
    with run.attention.counting(), MatmulCounter() as counter:
        for step in range(run.plan.steps):
            for batch in plan_batches(run.data, run.plan, step):
                run.objective(**batch)[0].backward()
        executed = counter.flops
    assert count_training(run, torch.device("cpu"))[0].linear == executed


@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_three_ways_by_formula(checkpointing: bool) -> None:
    """Forward 4 d FLOPs a pair and layer (two products over all heads), backward 2.5 times that in a fused kernel, and
    a second forward under checkpointing. The reference, which runs here, computes every pair and keeps its weights:
    2 times.
    """
    run = assembled(methods=[WINDOW], training={"gradient_checkpointing": checkpointing})
    flops, _ = count_training(run, torch.device("cpu"))
    once = 1 + checkpointing
    a_pair = 4 * WIDTH * LAYERS * BLOCKS
    assert flops.attention_dense == a_pair * (once + 2.5) * 32 * 33 / 2
    assert flops.attention_allowed == a_pair * (once + 2.5) * window_pairs(32, 8, 2)
    assert flops.attention_executed == a_pair * (once + 2.0) * 32 * 32


def test_dense_attention_executes_the_tiles_of_a_fused_kernel() -> None:
    """At 32 tokens all of a causal model's pairs lie in one tile: half of the work is masked away."""
    flops, _ = count_training(assembled(), torch.device("cpu"))
    a_pair = 4 * WIDTH * LAYERS * BLOCKS * 3.5
    assert flops.attention_allowed == flops.attention_dense == a_pair * 32 * 33 / 2
    assert flops.attention_executed == a_pair * 32 * 32


def test_products_by_formula() -> None:
    """F = 8 n d^2 L + 16 n d^2 L + 2 n d V forward (inner width 4 d), three times that with both gradients."""
    run = assembled()
    flops, tokens = count_training(run, torch.device("cpu"))
    vocabulary = run.model.config.vocab_size
    assert tokens == 32 * BLOCKS
    assert flops.linear == 3 * (24 * tokens * WIDTH**2 * LAYERS + 2 * tokens * WIDTH * vocabulary)
    assert flops.total == flops.linear + flops.attention_executed


def test_padding_is_left_out_of_pairs_but_not_of_products() -> None:
    run = assembled(data=MOODS)
    flops, tokens = count_training(run, torch.device("cpu"))
    batches = [batch for step in range(run.plan.steps) for batch in plan_batches(run.data, run.plan, step)]
    real = [int(n) for batch in batches for n in batch["attention_mask"].sum(1)]
    assert tokens == sum(batch["input_ids"].numel() for batch in batches) > sum(real)
    assert flops.attention_dense == 4 * WIDTH * LAYERS * 3.5 * sum(n**2 for n in real)
    assert flops.attention_allowed == flops.attention_dense


def half_window_pairs(length: int, half_width: int, prefix: int) -> int:
    """Pairs with |q - k| <= half_width or one of the two in the prefix, by counting each."""
    return sum(abs(q - k) <= half_width or min(q, k) < prefix for q in range(length) for k in range(length))


def test_packed_documents_are_counted_each_by_itself() -> None:
    """The same rows, the same pairs as padded ones; the fill of the row is in the products and in no pair."""
    sections: dict[str, Any] = {"methods": [HALF_WINDOW], "training": {"micro_batch_size": 4}}
    run, padded = assembled(data=PACKED, **sections), assembled(data=MOODS, **sections)
    flops, tokens = count_training(run, torch.device("cpu"))
    rows = [row for step in range(run.plan.steps) for row in run.plan.indices(step)]
    real = [run.data.real_tokens("train", [row]) for row in rows]
    assert tokens % 256 == 0 and sum(real) < tokens < sum(real) + 256 * len(rows) // 4
    a_pair = 4 * WIDTH * LAYERS * 3.5
    assert flops.attention_dense == a_pair * sum(n**2 for n in real)
    assert flops.attention_allowed == a_pair * sum(half_window_pairs(n, 4, 1) for n in real)
    theirs, their_tokens = count_training(padded, torch.device("cpu"))
    assert (flops.attention_dense, flops.attention_allowed) == (theirs.attention_dense, theirs.attention_allowed)
    head = 2 * 3 * WIDTH * (WIDTH + 3) * len(rows)  # pooler and classifier
    batch_head = 2 * WIDTH**2 * len(rows) // 4  # a packed row runs BERT's own pooler once, whose result is not used
    assert (flops.linear - head - batch_head) / tokens == (theirs.linear - head) / their_tokens


def test_lora_changes_neither_pairs_nor_forward() -> None:
    full, lora = (count_training(assembled(**ARMS[arm]), torch.device("cpu"))[0] for arm in ("full", "lora"))
    assert lora.attention_executed == full.attention_executed
    assert 2 / 3 < lora.linear / full.linear < 1


def test_the_tokenizer_and_data_decide_the_rest() -> None:
    sparse, dense = assembled(methods=[WINDOW]), assembled()
    both = [count_training(run, torch.device("cpu"))[0] for run in (sparse, dense)]
    assert both[0].linear == both[1].linear, "sparse attention leaves every product as it is"
    assert both[0].attention_dense == both[1].attention_dense


@pytest.mark.parametrize("data", [NOTES, MOODS], ids=["language", "classes"])
def test_processes_share_the_work_and_the_count_is_of_all(data: dict[str, Any]) -> None:
    model = GPT2 if data is NOTES else BERT
    alone = count_training(assembled(data=data, model=model), torch.device("cpu"))
    shared = count_training(assembled(data=data, model=model), torch.device("cpu"), processes=2)
    assert shared == alone


def test_each_process_packs_its_own_share() -> None:
    """As if its rows were a micro-batch of their own, but for which rows go together."""
    alone, tokens = count_training(assembled(data=PACKED), torch.device("cpu"))
    shared, more_tokens = count_training(assembled(data=PACKED), torch.device("cpu"), processes=2)
    assert shared.attention_dense == alone.attention_dense
    assert more_tokens >= tokens and more_tokens % 256 == 0
    assert shared.linear > alone.linear


def test_layers_are_counted_each_with_its_own_pattern() -> None:
    mixed = WINDOW | {"layers": {"1": {"kind": "dense"}}}
    flops, _ = count_training(assembled(methods=[mixed]), torch.device("cpu"))
    pairs = window_pairs(32, 8, 2) + 32 * 33 // 2
    assert flops.attention_allowed == 4 * WIDTH * BLOCKS * 3.5 * pairs


def test_the_first_layers_core_needs_a_backward_pass_only_if_something_before_it_is_trained() -> None:
    """LoRA on the feed-forward layers: the first core's inputs are frozen, and its backward pass never runs."""
    run = assembled(methods=[LORA | {"targets": "feed-forward"}])
    flops, _ = count_training(run, torch.device("cpu"))
    assert flops.attention_allowed == 4 * WIDTH * BLOCKS * (1 + 3.5) * 32 * 33 / 2


def test_checkpointing_of_lora_adds_a_forward_pass_and_nothing_else() -> None:
    """Not the gradient of the first layer's input, for which transformers would prepare; see test_flops.py."""
    lora = {"methods": [LORA]}
    plain, recomputed = (
        count_training(assembled(**lora, training={"gradient_checkpointing": on}), torch.device("cpu"))[0].linear
        for on in (False, True)
    )
    adapters = 4 * ((WIDTH + 3 * WIDTH) + 2 * WIDTH + 2 * 5 * WIDTH)
    last = 4 * WIDTH  # the last B of a layer is not computed again
    assert recomputed - plain == 2 * 32 * BLOCKS * LAYERS * (12 * WIDTH**2 + adapters - last)
