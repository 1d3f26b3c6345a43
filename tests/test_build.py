"""From an experiment to a run that can step: order of methods, seeds, number formats, gradient checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from training_fixtures import GPT2, LORA, MOODS, NOTES, WINDOW, assemble_run, build_run, digests, experiment

from loras_bench.build import Build, build_methods
from loras_bench.errors import ConfigError
from loras_bench.training import plan_batches

pytestmark = pytest.mark.usefixtures("places")

CPU = torch.device("cpu")


def built(seed: int = 0, **sections: Any) -> Build:
    return build_run(experiment(**sections), seed)


def weights(run: Any) -> dict[str, str]:
    return digests(dict(run.model.named_parameters()))


@pytest.mark.parametrize("methods", [[LORA, WINDOW], [WINDOW, LORA]])
def test_methods_are_prepared_in_stage_order(methods: list[Any]) -> None:
    run = assemble_run(experiment(methods=methods), 0)
    assert [method.config.kind for method in run.methods] == ["lora", "sparse_attention"]
    assert [pattern.kind for pattern in run.attention.patterns] == ["window", "window"]


def test_methods_are_checked_against_each_other_and_the_model() -> None:
    config = assemble_run(experiment(), 0).model.config
    with pytest.raises(ConfigError, match="`lora` is listed twice"):
        build_methods(experiment(methods=[LORA, LORA | {"rank": 2}]), config)
    with pytest.raises(ConfigError, match="causal"):
        build_methods(experiment(methods=[WINDOW | {"pattern": {"kind": "window", "half_width": 3}}]), config)


def test_parameters_are_counted_with_tied_weights_once() -> None:
    full, lora = (assemble_run(experiment(methods=methods), 0) for methods in ([], [LORA]))
    total, trained = full.parameter_counts()
    assert total == trained == sum({p.data_ptr(): p.numel() for p in full.model.parameters()}.values())
    adapters = 2 * 4 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32))
    assert lora.parameter_counts() == (total + adapters, adapters)


def test_the_same_seed_gives_the_same_start_and_another_seed_another() -> None:
    one, again, other = (assemble_run(experiment(methods=[LORA]), seed) for seed in (0, 0, 1))
    assert weights(one) == weights(again)
    base = {name for name in weights(one) if "lora_B" not in name}  # B starts at zero, norms at one
    changed = {name for name in base if weights(one)[name] != weights(other)[name]}
    assert {name for name in base if "lora_A" in name or "wte" in name} <= changed


def test_arms_of_one_seed_start_from_the_same_base_and_see_the_same_rows() -> None:
    full, lora, lora_s = (assemble_run(experiment(methods=methods), 3) for methods in ([], [LORA], [LORA, WINDOW]))
    assert [full.plan.indices(s) for s in range(4)] == [lora_s.plan.indices(s) for s in range(4)]
    start = sorted(weights(full).values())
    assert weights(lora) == weights(lora_s)
    assert sorted(value for name, value in weights(lora).items() if "lora_" not in name) == start


def test_masters_are_exact_and_buffers_keep_their_precision() -> None:
    model = {"init": "scratch", "tokenizer": {"vocabulary": 300}, "dtype": "bfloat16"} | {
        "architecture": {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4,
                         "intermediate_size": 48, "num_key_value_heads": 2}
    }  # fmt: skip
    exact = assemble_run(experiment(model=model), 0)
    run = built(model=model)
    assert {p.dtype for p in run.model.parameters()} == {torch.bfloat16}
    assert run.model.model.rotary_emb.inv_freq.dtype is torch.float32
    loaded = {id(p): q for p, q in zip(run.model.parameters(), exact.model.parameters(), strict=True)}
    for parameter, master in zip(run.optimizer.parameters, run.optimizer.masters, strict=True):
        assert torch.equal(master, loaded[id(parameter)])
        assert torch.equal(parameter, master.bfloat16())
    assert torch.isfinite(run.loop.step(0))


def gradients(run: Build) -> dict[str, Tensor]:
    for batch in plan_batches(run.data, run.plan, 0):
        run.objective(**batch)[0].backward()
    return {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("methods", [[], [LORA], [LORA, WINDOW]], ids=["full", "lora", "lora_s"])
@pytest.mark.parametrize("data", [NOTES, MOODS], ids=["gpt2", "bert"])
def test_gradient_checkpointing_gives_the_same_gradients(methods: list[Any], data: dict[str, Any]) -> None:
    if data is MOODS:
        methods = [m if m is LORA else m | {"pattern": {"kind": "window", "half_width": 4}} for m in methods]
    plain = gradients(built(data=data, methods=methods))
    run = built(data=data, methods=methods, training={"gradient_checkpointing": True})
    recomputed = gradients(run)
    assert plain.keys() == recomputed.keys() and len(plain) > 0
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    assert any(
        module.gradient_checkpointing for module in run.model.modules() if hasattr(module, "gradient_checkpointing")
    )


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not divide the 4 rows"):
        built(training={"micro_batch_size": 3})
    with pytest.raises(ConfigError, match="no validation split") as raised:
        built(data=NOTES | {"name": "lines"}, evaluation={"splits": ["validation"]})
    assert raised.value.hint and "validation_rows" in raised.value.hint


@pytest.fixture(autouse=True, scope="module")
def lines_without_validation(places: None) -> None:
    import os
    import shutil
    from pathlib import Path

    root = Path(os.environ["LORAS_BENCH_DATA"])
    (root / "lines").mkdir()
    for split in ("train", "test"):
        shutil.copy(root / "notes" / f"{split}.txt", root / "lines")


def test_periodic_evaluation_needs_a_validation_split() -> None:
    with pytest.raises(ConfigError, match="no validation split"):
        built(data=NOTES | {"name": "lines"}, evaluation={"every_tokens": 128})


def test_taps_are_collected_only_where_a_method_asks() -> None:
    assert built(model=GPT2).attention.taps is None


@pytest.mark.parametrize("process", [0, 1])
def test_rows_must_divide_over_processes(process: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is refused before any process waits for another."""
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 3))
    monkeypatch.setattr(Accelerator, "process_index", property(lambda self: process))
    with pytest.raises(ConfigError, match="4 rows of a forward pass do not divide over 3 processes"):
        built()
