"""What is refused before anything runs, by configurations alone; and that no weights are read for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_fixtures import BERT, CPU, GPT2, LLAMA, LORA, MOODS, experiment, request, tiny

from loras_bench.errors import UserError
from loras_bench.experiment import Run
from loras_bench.feasibility import check_experiments
from loras_bench.models import loading

pytestmark = pytest.mark.usefixtures("places")
FOLD = {"kind": "fold", "initialisation": "svd"}
PRUNE = {"kind": "prune", "sparsity": 0.5}


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """A function that saves a tiny model of a family, without its weights; its folder."""

    def save(family: str, **options: Any) -> str:
        folder = tmp_path / family
        tiny(family, **options).save_pretrained(folder)
        (folder / "model.safetensors").write_bytes(b"")
        return str(folder)

    return save


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"methods": [FOLD | {"rank": 3}]}, "fold: rank 3 does not divide"),
        ({"methods": [FOLD | {"layers": ["7"]}]}, "fold"),
        ({"methods": [FOLD, {"kind": "svd"}]}, "`svd` and `fold`"),
        ({"methods": [{"kind": "svd", "rank": 1000}]}, "svd: a matrix of this model has rank"),
        ({"methods": [PRUNE | {"sparsity": 1e-6}]}, "prune: a sparsity of 1e-06 prunes 0"),
        ({"methods": [LORA | {"targets": ["no_such"]}]}, "lora cannot be attached"),
        (
            {
                "model": BERT,
                "data": MOODS,
                "methods": [{"kind": "sparse_lora", "layers": {"0": {"feed_forward": 0.5}}}, LORA],
            },
            "Llama",
        ),
        ({"model": GPT2 | {"architecture": {"model_type": "gpt2", "n_layr": 1}}}, "unknown key `n_layr`"),
        ({"model": BERT}, "cannot do language modelling"),
        ({"model": GPT2 | {"dense_attention": "cudnn"}}, "cudnn"),
    ],
)
def test_what_no_run_could_do_is_refused(sections: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        check_experiments([experiment("fine", methods=[LORA]), experiment("wrong", **sections)], CPU)
    assert refused.value.message.count("experiment `wrong`: ") == 1


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_of_a_saved_model_the_configuration_is_enough(saved: Any, family: str) -> None:
    model, data = {"name": saved(family)}, MOODS if family == "bert" else None
    sections = {"model": model} | ({"data": data} if data else {})
    check_experiments([experiment(**sections, methods=[PRUNE, FOLD, LORA])], CPU)
    with pytest.raises(UserError, match="rank 3 does not divide"):
        check_experiments([experiment(**sections, methods=[FOLD | {"rank": 3}])], CPU)


@pytest.mark.parametrize("criterion", ["svd", "measured", "oracle", "random"])
def test_what_reads_values_is_left_to_the_run(criterion: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Estimators are made of weights: none are made, nor kept, and the methods around them are looked at."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sparse = {"kind": "sparse_lora", "rank": 2, "criterion": criterion, "layers": {"0": {"feed_forward": 0.5}}}
    check_experiments([experiment(model=LLAMA, methods=[LORA, sparse])], CPU)
    assert not list(tmp_path.rglob("*.safetensors"))
    with pytest.raises(UserError, match="lora cannot be attached"):
        check_experiments([experiment(model=LLAMA, methods=[LORA | {"targets": ["no_such"]}, sparse])], CPU)


def test_a_first_conversion_reads_real_weights(monkeypatch: pytest.MonkeyPatch, saved: Any) -> None:
    """A GGUF file is dequantised when its configuration is first asked for: not on the meta device."""
    devices = []
    monkeypatch.setattr(
        "loras_bench.feasibility.as_safetensors", lambda found: devices.append(torch.empty(0).device.type) or found
    )
    check_experiments([experiment(model={"name": saved("llama")}, methods=[LORA])], CPU)
    assert devices == ["cpu"]


def test_dropout_of_a_checkpoint_is_no_obstacle(saved: Any) -> None:
    """It is taken out when a model is loaded."""
    name = saved("bert", attention_probs_dropout_prob=0.1)
    check_experiments([experiment(model={"name": name}, data=MOODS)], CPU)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([FOLD], [FOLD], "`fold` comes twice"),
        ([FOLD, LORA], [{"kind": "svd"}], "`svd` and `fold`"),
        ([LORA], [FOLD | {"rank": 3}], "rank 3 does not divide"),
        ([LORA], [PRUNE | {"scope": ["feed_forward"]}], None),
        ([FOLD, LORA], [LORA | {"targets": "all-linear"}], None),
        ([{"kind": "svd", "rank": 2}], [PRUNE | {"scope": ["attention"]}], None),
    ],
)
def test_a_run_to_go_on_from(tmp_path: Path, before: Any, after: Any, message: str | None) -> None:
    made = request(experiment("first", methods=before), tmp_path)
    assert Run(made, lambda event: None).execute().status == "completed"
    second = experiment("second", model={"run": str(made.folder)}, methods=after)
    if message is None:
        check_experiments([second], CPU)
    else:
        with pytest.raises(UserError, match=message):
            check_experiments([second], CPU)


def test_large_models_take_no_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """70 billion parameters."""
    tiny("llama").config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    large = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    read = loading._read_config

    def larger(location: Any) -> Any:
        config = read(location)
        for key, value in (large | {"head_dim": 128, "vocab_size": 128256}).items():
            setattr(config, key, value)
        return config

    monkeypatch.setattr("loras_bench.feasibility._read_config", larger)
    before = torch.random.get_rng_state()
    check_experiments([experiment(model={"name": str(tmp_path)}, methods=[PRUNE, FOLD | {"heads": "shared"}])], CPU)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_combination_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr("loras_bench.feasibility._check", lambda made, device: seen.append(made.name))
    check_experiments([experiment("a", model=LLAMA), experiment("b", model=LLAMA), experiment("c")], CPU)
    assert seen == ["a", "c"]
