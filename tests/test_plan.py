"""Which runs a command means, in which order, and where each stands; torch stays out of it."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from loras_bench.config_file import load_experiment
from loras_bench.errors import ConfigError
from loras_bench.plan import (
    KERNEL_VERSION,
    claim_run,
    occasion_of,
    plan_blocks,
    plan_run,
    pretraining_of,
    resolve,
    run_id,
)
from loras_bench.requests import Device, RunRequest
from loras_bench.results.record import Record
from loras_bench.results.store import RunLockedError, write_record

CPU = Device("cpu", "A CPU", triton=False)
GPU = Device("cuda", "A GPU", triton=True)
BARE_GPU = Device("cuda", "A GPU", triton=False)
LORA = {"kind": "lora", "rank": 4}


@pytest.fixture
def experiment(write_config):
    def make(name="tiny", *overrides, **sections):
        return load_experiment(write_config(name, **sections), overrides)

    return make


def record_of(run, **changes):
    values = {
        "run_id": run.run_id,
        "name": run.experiment.name,
        "seed": run.seed,
        "status": "completed",
        "started_at": "2026-01-01T00:00:00Z",
        "finished_at": "2026-01-01T00:01:00Z",
        "task": "language_modeling",
        "dataset": "python-topics",
        "model": "gpt2",
        "sequence_length": 64,
        "methods": [],
        "device": CPU.name,
        "config": {},
        "kernel_version": KERNEL_VERSION,
        "environment": {},
    }
    return Record(**(values | changes))


# --- what a run is called


def test_auto_is_replaced_by_what_runs_on_the_device(experiment):
    resolved = [resolve(experiment(), device) for device in (CPU, GPU, BARE_GPU)]
    assert [arm.training.loss for arm in resolved] == ["torch", "fused", "torch"]
    assert [arm.model.implementation for arm in resolved] == ["transformers", "fused", "transformers"]
    assert [arm.training.cuda_graph for arm in resolved] == [False, True, True]
    for arm, device in zip(resolved, (CPU, GPU, BARE_GPU), strict=True):
        assert resolve(arm, device) == arm
    assert len({run_id(arm, 0, GPU) for arm in resolved}) == 3  # the id is taken after it


def test_what_compile_and_several_processes_rule_out_is_not_chosen(experiment):
    compiled = resolve(experiment("tiny", "training.compile=true"), GPU)
    assert (compiled.model.implementation, compiled.training.cuda_graph) == ("transformers", False)
    assert compiled.training.loss == "torch"
    shared = resolve(experiment(), replace(GPU, processes=2))
    assert (shared.model.implementation, shared.training.cuda_graph) == ("fused", False)
    assert shared.training.loss == "fused"


CLASSES = ("training.batch_size=8", "training.tokens_per_step=null")


@pytest.mark.parametrize(("device", "packing"), [(CPU, "padded"), (GPU, "packed"), (BARE_GPU, "padded")])
def test_texts_to_classify_are_packed_where_our_kernels_run(experiment, device, packing):
    resolved = resolve(experiment("tiny", *CLASSES), device)
    assert resolved.data.packing == packing
    assert resolve(resolved, device) == resolved


@pytest.mark.parametrize(
    "override", ["training.compile=true", "model.dense_attention=cudnn", "model.dense_attention=math"]
)
def test_texts_are_not_packed_where_other_kernels_would_run(experiment, override):
    """Other kernels of dense layers would need the mask of the whole packed row."""
    assert resolve(experiment("tiny", *CLASSES, override), GPU).data.packing == "padded"


@pytest.mark.parametrize("device", [CPU, GPU, BARE_GPU])
def test_packing_is_a_choice_for_texts_to_classify_and_none_for_blocks(experiment, device):
    assert resolve(experiment(), device).data.packing is None
    for packing in ("packed", "padded"):
        chosen = experiment("tiny", *CLASSES, f"data.packing={packing}")
        assert resolve(chosen, device).data.packing == packing
        with pytest.raises(ConfigError, match=f"data.packing `{packing}`: it is for classification"):
            resolve(experiment("tiny", f"data.packing={packing}"), device)


@pytest.mark.parametrize("choice", ["training.loss=fused", "model.implementation=fused"])
@pytest.mark.parametrize(("device", "reason"), [(CPU, "CUDA only"), (BARE_GPU, "triton is not installed")])
def test_fused_where_it_cannot_run_is_refused(experiment, choice, device, reason):
    with pytest.raises(ConfigError, match=reason) as error:
        resolve(experiment("tiny", choice), device)
    assert choice.partition("=")[0] in error.value.message
    assert error.value.hint


@pytest.mark.parametrize(
    ("overrides", "device", "reason"),
    [
        (["training.cuda_graph=true"], CPU, "cuda_graph: it runs on CUDA only"),
        (["training.cuda_graph=true"], replace(GPU, processes=2), "cuda_graph: .* other processes"),
        (["training.cuda_graph=true", "training.compile=true"], GPU, "cuda_graph: .* training.compile"),
        (["model.implementation=fused", "training.compile=true"], GPU, "implementation `fused`: .* training.compile"),
        (["training.loss=fused", "training.compile=true"], GPU, "loss `fused`: .* training.compile"),
    ],
)
def test_a_choice_that_another_rules_out_is_refused(experiment, overrides, device, reason):
    with pytest.raises(ConfigError, match=reason):
        resolve(experiment("tiny", *overrides), device)


def test_the_id_changes_with_all_that_can_change_a_number_but_the_name(experiment):
    base = run_id(experiment(), 0, CPU)
    assert base.startswith("tiny/seed0-")
    assert run_id(experiment(), 0, CPU) == base
    assert run_id(experiment("other"), 0, CPU).partition("-")[2] == base.partition("-")[2]
    changed = [
        run_id(experiment("tiny", override), 0, CPU)
        for override in (
            "training.learning_rate=2e-3",
            "training.tokens=4096",
            "data.sequence_length=32",
            "model.dtype=bfloat16",
            "evaluation.attention=[same, dense]",
            "methods=[{kind: lora}]",
            "energy.steady_seconds=1",
        )
    ]
    assert len({base, *changed}) == 8
    assert run_id(experiment(), 0, GPU) != base, "runs on two devices never share a folder"


def test_explicit_defaults_give_the_same_id(experiment):
    assert run_id(experiment(), 0, CPU) == run_id(
        experiment("tiny", "training.weight_decay=0.01", "methods=[]"), 0, CPU
    )


# --- where a run stands


def test_a_run_is_finished_only_by_a_completed_record_of_this_device_and_these_kernels(experiment, tmp_path):
    results = tmp_path / "results"

    def finished(**changes):
        run = plan_run(experiment(), 0, results, CPU)
        write_record(record_of(run, **changes), run.folder)
        return plan_run(experiment(), 0, results, CPU).finished

    assert not plan_run(experiment(), 0, results, CPU).finished
    assert finished()
    assert not plan_run(experiment(), 1, results, CPU).finished
    assert not finished(status="failed", reason="x")
    assert not finished(status="interrupted", reason="x")
    assert not finished(device="Another CPU")
    assert not finished(kernel_version="0")


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"schema_version": 99}', '{"schema_version": 1}', "\xff"])
def test_a_damaged_record_counts_as_none(experiment, tmp_path, damage):
    run = plan_run(experiment(), 0, tmp_path, CPU)
    run.folder.mkdir(parents=True)
    (run.folder / "result.json").write_bytes(damage.encode("latin-1"))
    assert not plan_run(experiment(), 0, tmp_path, CPU).finished


def test_a_checkpoint_makes_an_unfinished_run_resumable(experiment, tmp_path):
    run = plan_run(experiment(), 0, tmp_path, CPU)
    assert not run.resumable
    run.folder.mkdir(parents=True)
    (run.folder / "checkpoint.json").write_text(json.dumps({}))
    assert plan_run(experiment(), 0, tmp_path, CPU).resumable
    write_record(record_of(run), run.folder)
    assert not plan_run(experiment(), 0, tmp_path, CPU).resumable


def test_a_run_is_claimed_once_and_not_when_it_was_finished_since(experiment, tmp_path):
    run = plan_run(experiment(), 0, tmp_path, CPU)
    request = RunRequest(run.experiment, 0, run.run_id, run.folder, CPU)
    with claim_run(request), pytest.raises(RunLockedError, match="in use by process"), claim_run(request):
        pass
    write_record(record_of(run), run.folder)
    with pytest.raises(RunLockedError, match="finished it meanwhile"), claim_run(request):
        pass
    with claim_run(replace(request, fresh=True)):
        pass


def test_generation_needs_responses_with_a_final_number(experiment):
    evaluation = {"generation": {"rows": 10}}
    with pytest.raises(ConfigError, match=r"evaluation\.generation: the responses of `python-topics`"):
        resolve(experiment(evaluation=evaluation), CPU)
    problems = experiment(data={"name": "gsm8k"}, evaluation=evaluation)
    assert resolve(problems, CPU).evaluation.generation.new_tokens == 256


def test_the_hash_of_a_run_that_generates_nothing_knows_nothing_of_generation(experiment):
    assert "generation" not in experiment().model_dump()["evaluation"]
    problems = experiment(data={"name": "gsm8k"}, evaluation={"generation": {"rows": 10}})
    assert problems.model_dump()["evaluation"]["generation"] == {"rows": 10, "new_tokens": 256}
    assert type(problems).model_validate(problems.model_dump(mode="json")) == problems


# --- blocks


def names(blocks):
    return [[run.experiment.name for run in block] for block in blocks]


def test_a_block_holds_every_arm_once_with_one_seed(experiment, tmp_path):
    arms = [experiment(f"arm{number}", f"methods=[{{kind: lora, rank: {number + 1}}}]") for number in range(4)]
    blocks = plan_blocks(arms, [3, 1, 2], tmp_path, CPU)
    assert [{run.seed for run in block} for block in blocks] == [{3}, {1}, {2}]
    assert [sorted(block) for block in names(blocks)] == [["arm0", "arm1", "arm2", "arm3"]] * 3


def test_the_order_is_shuffled_but_depends_on_seed_and_arms_alone(experiment, tmp_path):
    arms = [experiment(f"arm{number}", f"methods=[{{kind: lora, rank: {number + 1}}}]") for number in range(4)]
    seeds = list(range(20))
    order = names(plan_blocks(arms, seeds, tmp_path, CPU))
    assert names(plan_blocks(arms, seeds, tmp_path, CPU)) == order
    assert names(plan_blocks(random.sample(arms, 4), seeds, tmp_path / "elsewhere", CPU)) == order
    assert names(plan_blocks(arms, [7], tmp_path, CPU)) == [order[7]]
    assert len({block[0] for block in order}) == 4  # every arm is first in some block
    assert len({tuple(block) for block in order}) > 10


def test_two_identical_experiments_are_refused(experiment, tmp_path):
    with pytest.raises(ConfigError, match=r"given twice: tiny/seed0-") as error:
        plan_blocks([experiment(), experiment("tiny", "training.weight_decay=0.01")], [0], tmp_path, CPU)
    assert error.value.hint == "name each file once"


def test_the_same_content_under_two_names_is_allowed(experiment, tmp_path):
    """An A/A comparison shows the noise of a measurement."""
    assert len(plan_blocks([experiment("a"), experiment("b")], [0], tmp_path, CPU)[0]) == 2


def test_a_block_gets_a_new_name_each_time_it_starts(experiment, tmp_path):
    (block,) = plan_blocks([experiment()], [5], tmp_path, CPU)
    assert occasion_of(block).startswith("seed5-")
    assert occasion_of(block) != occasion_of(block)


# --- pretraining

PRETRAIN = {"data": {"name": "python-topics", "sequence_length": 64}, "training": {}}


def test_pretraining_is_shared_by_arms_and_seeds_and_hidden_from_comparisons(experiment, tmp_path):
    training = {"tokens": 1024, "tokens_per_step": 256, "learning_rate": 1e-3}
    pretrain = PRETRAIN | {"training": training}
    arms = [experiment("full", pretrain=pretrain), experiment("lora", pretrain=pretrain, methods=[LORA])]
    first, second = (pretraining_of(arm, tmp_path, CPU) for arm in arms)
    assert first == second
    assert first.folder.parent.parent == tmp_path / ".pretrained"
    assert first.seed == 0
    assert first.experiment.methods == ()
    assert first.experiment.evaluation.splits == (), "not every data set has a validation split"
    other = experiment("full", pretrain=PRETRAIN | {"training": training | {"tokens": 2048}})
    assert pretraining_of(other, tmp_path, CPU).run_id != first.run_id
    assert pretraining_of(experiment(), tmp_path, CPU) is None
