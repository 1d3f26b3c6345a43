"""What a run leaves of its weights, and runs that go on from it: whole models, merged adapters, joules of the chain."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from saved_checks import going_on, logits, run
from training_fixtures import (
    LORA,
    MOODS,
    NOTES,
    WINDOW,
    build_run,
    experiment,
    request,
    set_places,
)
from transformers import AutoModelForCausalLM

from loras_bench.errors import ConfigError
from loras_bench.experiment import Run
from loras_bench.models.objective import unwrapped
from loras_bench.models.saved import open_run, save_weights
from loras_bench.results.record import Record

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("places")
        set_places(patch, folder)
        pairs = [json.dumps({"text": text, "label": number % 2}) for number, text in enumerate(["a b", "c d"] * 6)]
        (folder / "pairs").mkdir()
        for split in ("train", "test"):
            (folder / "pairs" / f"{split}.jsonl").write_text("\n".join(pairs) + "\n")
        yield


@pytest.fixture(scope="module")
def full(results: Path) -> tuple[Path, Record]:
    """A whole model, trained."""
    return run("full", results)


@pytest.fixture(scope="module")
def adapter(results: Path, full: tuple[Path, Record]) -> tuple[Path, Record]:
    """Adapters trained on that model, under another seed."""
    return run("adapter", results, seed=1, model={"run": str(full[0])}, methods=[LORA])


@pytest.fixture(scope="module")
def second_adapter(results: Path, adapter: tuple[Path, Record]) -> tuple[Path, Record]:
    """Adapters trained on the model with the first adapters merged."""
    return run("second", results, seed=2, model={"run": str(adapter[0])}, methods=[LORA])


def test_a_run_leaves_safetensors_and_its_tokenizer(full: Any, adapter: Any) -> None:
    whole, parts = full[0], adapter[0]
    assert (whole / "model" / "model.safetensors").is_file() and not (whole / "adapter").exists()
    assert (parts / "adapter" / "adapter_model.safetensors").is_file() and not (parts / "model").exists()
    for folder in (whole, parts):
        assert (folder / "tokenizer" / "tokenizer.json").is_file()
        assert not [*folder.rglob("*.bin"), *folder.rglob("*.pt"), *folder.rglob("*.pkl")]


def test_going_on_from_a_whole_model(full: Any) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(full[0] / "model")
    went_on = going_on(full[0])
    assert torch.equal(logits(went_on.model), logits(theirs))
    assert " + full " in went_on.loaded.label
    assert all(p.requires_grad for p in went_on.model.parameters())


def test_adapters_reload_with_plain_peft_and_merge_for_the_next_run(full: Any, adapter: Any) -> None:
    base = AutoModelForCausalLM.from_pretrained(full[0] / "model")
    without = logits(base).clone()
    plain = PeftModel.from_pretrained(base, str(adapter[0] / "adapter"))
    expected = logits(plain)
    assert (expected - without).abs().max() > 1e-3, "the adapters learned something"
    went_on = going_on(adapter[0])
    torch.testing.assert_close(logits(went_on.model), expected, rtol=0, atol=1e-5)
    assert not hasattr(went_on.model, "peft_config")
    assert all(p.requires_grad for p in went_on.model.parameters()), "full fine-tuning trains all of it"
    assert not [name for name, _ in went_on.model.named_parameters() if "lora" in name]


def test_adapters_on_adapters_find_the_merged_base(full: Any, adapter: Any, second_adapter: Any) -> None:
    """The base of the second adapters lies in no file: it is the first run's model with its adapters merged."""
    base = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(full[0] / "model"), str(adapter[0] / "adapter")
    ).merge_and_unload()
    expected = logits(PeftModel.from_pretrained(base, str(second_adapter[0] / "adapter")))
    torch.testing.assert_close(logits(going_on(second_adapter[0]).model), expected, rtol=0, atol=1e-5)


def test_adapters_on_a_model_from_scratch_find_its_random_weights(results: Path) -> None:
    """The weights depend on the seed of that run, not on the seed of the run that goes on."""
    made = experiment("scratch", methods=[LORA])
    asked = request(made, results, 4)
    trained = build_run(made, 4)
    for step in range(3):
        trained.loop.step(step)
    record = Run(asked, lambda event: None).execute()
    assert record.status == "completed"
    save_weights(asked.folder, trained.model, trained.tokenizer)
    torch.testing.assert_close(logits(going_on(asked.folder).model), logits(trained.model), rtol=0, atol=1e-5)


def test_adapters_on_a_pretrained_model_find_it(results: Path, full: Any) -> None:
    pretrain = {"data": NOTES, "training": {"tokens": 128, "tokens_per_step": 128, "learning_rate": 1e-3}}
    folder, record = run("on_pretrained", results, pretrained=full[0], pretrain=pretrain, methods=[LORA])
    base = AutoModelForCausalLM.from_pretrained(full[0] / "model")
    expected = logits(PeftModel.from_pretrained(base, str(folder / "adapter")))
    torch.testing.assert_close(logits(going_on(folder).model), expected, rtol=0, atol=1e-5)
    assert record.chain_energy_j == record.run_energy_j + full[1].chain_energy_j


def test_adapters_on_a_named_model_find_it(results: Path, full: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from another working directory, as the name alone counts."""
    monkeypatch.setenv("LORAS_BENCH_MODELS", str(results / "models"))
    open_run(full[0]).tokenizer.save_pretrained(results / "models" / "mine")
    AutoModelForCausalLM.from_pretrained(full[0] / "model").save_pretrained(results / "models" / "mine")
    folder, _ = run("on_named", results, model={"name": "mine"}, methods=[LORA])
    expected = logits(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(full[0] / "model"), str(folder / "adapter"))
    )
    monkeypatch.chdir("/")
    torch.testing.assert_close(logits(going_on(folder).model), expected, rtol=0, atol=1e-5)


def test_joules_of_the_chain_add_up(full: Any, adapter: Any, second_adapter: Any) -> None:
    first, second, third = (record for _, record in (full, adapter, second_adapter))
    assert first.run_energy_j > 0 and first.chain_energy_j == first.run_energy_j
    assert second.chain_energy_j == pytest.approx(first.run_energy_j + second.run_energy_j)
    assert third.chain_energy_j == pytest.approx(first.run_energy_j + second.run_energy_j + third.run_energy_j)


def rewritten(folder: Path, target: Path, **fields: Any) -> Path:
    """A copy of a run whose record says something else."""
    target.mkdir()
    for part in folder.iterdir():
        if part.name != "result.json":
            os.symlink(part, target / part.name)
    record = json.loads((folder / "result.json").read_text()) | fields
    (target / "result.json").write_text(json.dumps(record))
    return target


def test_an_unknown_energy_stays_unknown_in_the_chain(full: Any, results: Path, tmp_path: Path) -> None:
    unmeasured = rewritten(full[0], tmp_path / "unmeasured", chain_energy_j=None)
    _, record = run("after_unmeasured", results, model={"run": str(unmeasured)}, save=False)
    assert record.run_energy_j > 0 and record.chain_energy_j is None


def test_a_whole_model_gets_a_new_head_for_another_task(full: Any) -> None:
    went_on = going_on(full[0], data=MOODS, methods=[LORA])
    assert unwrapped(went_on.model).config.num_labels == 3
    body = dict(AutoModelForCausalLM.from_pretrained(full[0] / "model").named_parameters())
    mine = dict(unwrapped(went_on.model).named_parameters())
    assert torch.equal(mine["transformer.h.0.ln_1.weight"], body["transformer.h.0.ln_1.weight"])
    assert torch.equal(mine["transformer.wte.weight"], body["transformer.wte.weight"])


def test_a_classifier_goes_on_with_its_head(results: Path) -> None:
    whole, _ = run("moods", results, data=MOODS)
    parts, _ = run("moods_lora", results, data=MOODS, model={"run": str(whole)}, methods=[LORA], seed=3)
    went_on = going_on(parts, data=MOODS)
    head = PeftModel.from_pretrained(going_on(whole, data=MOODS).model, str(parts / "adapter")).merge_and_unload()
    assert torch.equal(went_on.model.classifier.weight, head.classifier.weight), "from the adapters' file"
    with pytest.raises(ConfigError, match="do not fit pairs"):
        going_on(parts, data=MOODS | {"name": "pairs"})
    with pytest.raises(ConfigError, match="cannot do language modelling"):
        going_on(whole)
    with pytest.raises(ConfigError, match="adapters of classification do not fit language_modeling"):
        going_on(parts)


def test_what_cannot_be_gone_on_from_is_refused(full: Any, results: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finished run in"):
        going_on(tmp_path)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        going_on(tmp_path)
    failed = rewritten(full[0], tmp_path / "failed", status="failed", reason="out of GPU memory")
    with pytest.raises(ConfigError, match=r"did not finish \(failed: out of GPU memory\)"):
        going_on(failed)
    light, _ = run("light", results, save=False)
    with pytest.raises(ConfigError, match="holds no weights") as raised:
        going_on(light)
    assert raised.value.hint == "run it again with `save: true`"


def test_a_sparse_run_goes_on_dense_unless_it_is_asked_again(results: Path) -> None:
    """A pattern is no weight: it belongs to an experiment, not to the model that it leaves."""
    folder, _ = run("sparse", results, methods=[WINDOW])
    assert [p.kind for p in going_on(folder).attention.patterns] == ["dense"] * 2
    assert [p.kind for p in going_on(folder, methods=[WINDOW]).attention.patterns] == ["window"] * 2
