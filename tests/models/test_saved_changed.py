"""Runs that change the model itself: what they leave, and what a run that goes on from them finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from saved_checks import going_on, logits, run
from training_fixtures import BERT, GPT2, LLAMA, LORA, MOODS, NOTES, WINDOW, assemble_run, build_run, experiment, tiny

from loras_bench.errors import ConfigError
from loras_bench.folding.attention import FoldedAttention
from loras_bench.methods.lora import Lora, LoraConfig
from loras_bench.models.low_rank import LowRankLinear
from loras_bench.models.saved import _pruned_under_adapters

pytestmark = pytest.mark.usefixtures("places")

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"data": NOTES, "model": GPT2},
    "llama": {"data": NOTES, "model": LLAMA},
    "bert": {"data": MOODS, "model": BERT},
}
FOLD = {"kind": "fold", "calibration_tokens": 64}
SHARED = {"kind": "fold", "heads": "shared", "rank": 2, "values": "dense", "layers": [1], "initialisation": "svd"}
SVD = {"kind": "svd"}
PRUNE = {"kind": "prune", "sparsity": 0.5, "end": 0}


def last_logits(name: str, **sections: Any) -> Any:
    """What a run's model computed at its end: the same steps again."""
    again = build_run(experiment(name, **sections))
    for step in range(again.plan.steps):
        again.loop.step(step)
    return logits(again.model)


@pytest.mark.parametrize("others", [(), (LORA,)], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("family", "method"),
    [("gpt2", FOLD), ("llama", FOLD), ("bert", FOLD), ("llama", SHARED), ("gpt2", SVD), ("bert", SVD)],
    ids=["gpt2-fold", "llama-fold", "bert-fold", "llama-shared", "gpt2-svd", "bert-svd"],
)
def test_smaller_modules_are_read_back_as_such(
    family: str, method: Any, others: Any, results: Path, request: pytest.FixtureRequest
) -> None:
    name, sections = request.node.callspec.id, FAMILIES[family] | {"methods": [method, *others]}
    folder, _ = run(name, results, **sections)
    went_on = going_on(folder, data=FAMILIES[family]["data"])
    torch.testing.assert_close(logits(went_on.model), last_logits(name, **sections), rtol=0, atol=1e-5)
    kind = LowRankLinear if method is SVD else FoldedAttention
    made = [module for module in went_on.model.modules() if isinstance(module, kind)]
    assert len(made) == {("bert", "svd"): 6, ("llama", "fold"): len(method.get("layers", [0, 1]))}.get(
        (family, method["kind"]), 2
    )
    alone = assemble_run(experiment(name, **(sections | {"methods": [method]})))
    assert went_on.parameter_counts() == alone.parameter_counts(), "and all of it trains"
    assert (folder / "base").exists() is bool(others)


def test_a_base_that_did_not_change_is_not_saved(results: Path) -> None:
    folder, _ = run("plain", results, methods=[LORA])
    assert not (folder / "base").exists()


def test_a_folded_model_gets_a_new_head_for_another_task(results: Path) -> None:
    folder, _ = run("folded_lm", results, methods=[FOLD])
    went_on = going_on(folder, data=MOODS, methods=[LORA])
    blocks = [module for module in went_on.model.modules() if isinstance(module, FoldedAttention)]
    saved = load_file(folder / "model" / "model.safetensors")
    assert len(blocks) == 2
    assert torch.equal(blocks[0].query, saved["transformer.h.0.attn.query"])
    assert not went_on.attention.equal_widths


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (FOLD, FOLD, "`fold` comes twice"),
        (FOLD, SVD, "`svd` and `fold` both replace"),
        (FOLD, WINDOW, "`sparse_attention` does not go with `fold`"),
        (SVD, SVD, "`svd` comes twice"),
        (SVD, FOLD, "`svd` and `fold` both replace"),
    ],
    ids=["fold-fold", "fold-svd", "fold-window", "svd-svd", "svd-fold"],
)
def test_what_a_smaller_model_cannot_do_is_refused_in_later_runs_too(
    first: Any, second: Any, words: str, results: Path
) -> None:
    folder, _ = run(f"{first['kind']}_before_{second['kind']}", results, methods=[first])
    with pytest.raises(ConfigError, match=words):
        going_on(folder, methods=[second])


def zeros(model: Any) -> dict[str, int]:
    return {name: int((p == 0).sum()) for name, p in model.named_parameters() if p.ndim == 2}


def test_adapters_on_pruned_layers_are_not_merged(results: Path) -> None:
    folder, _ = run("pruned_lora", results, methods=[PRUNE, LORA])
    base = load_file(folder / "base" / "model.safetensors")
    weight = base["transformer.h.0.mlp.c_fc.weight"]
    assert int((weight == 0).sum()) == weight.numel() // 2
    assert not [name for name in base if "lora" in name or "base_layer" in name]
    with pytest.raises(ConfigError, match=r"fill the zeros of 4 pruned layers, transformer\.h\.0\.mlp\.c_fc first"):
        going_on(folder)


def test_an_adapter_on_the_other_end_of_a_tied_weight_is_not_merged(results: Path) -> None:
    """The output layer is the pruned embedding under another name."""
    folder, _ = run("pruned_tied", results, methods=[PRUNE, LORA | {"targets": ["lm_head"]}])
    with pytest.raises(ConfigError, match=r"fill the zeros of 1 pruned layers, lm_head first"):
        going_on(folder)


def test_zeros_of_a_model_that_was_named_are_not_filled_either(results: Path) -> None:
    """No record tells of what made them."""
    pruned, _ = run("pruned_named", results, methods=[PRUNE])
    later, _ = run("named_lora", results, model={"name": str(pruned / "model")}, methods=[LORA])
    with pytest.raises(ConfigError, match="fill the zeros of 4 pruned layers"):
        going_on(later)


@pytest.mark.parametrize(("share", "pruned"), [(0.04, 0), (0.06, 8)])
def test_a_few_zeros_are_no_pruning(share: float, pruned: int) -> None:
    """As quantisation leaves them."""
    model = tiny("gpt2")
    for weight in model.parameters():
        weight.data.flatten()[: round(share * weight.numel())] = 0
    adapted = Lora(LoraConfig(kind="lora")).prepare(model)
    assert len(_pruned_under_adapters(adapted)) == pruned


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folded_model_is_read_by_the_name_of_its_folder(family: str, results: Path) -> None:
    """With its tokenizer."""
    sections = FAMILIES[family] | {"methods": [FOLD]}
    folder, _ = run(f"folded_{family}", results, **sections)
    named = assemble_run(experiment("named", data=FAMILIES[family]["data"], model={"name": str(folder / "model")}))
    assert len([module for module in named.model.modules() if isinstance(module, FoldedAttention)]) == 2
    expected = going_on(folder, data=FAMILIES[family]["data"])
    torch.testing.assert_close(logits(named.model), logits(expected.model), rtol=0, atol=0)
    assert named.tokenizer.get_vocab() == expected.tokenizer.get_vocab()


def test_folded_rows_never_decay_in_later_runs_either(results: Path) -> None:
    """Without `fold` in their methods."""
    folder, _ = run("folded_to_go_on", results, methods=[FOLD])
    went_on = build_run(experiment("next", model={"run": str(folder)}, training={"weight_decay": 0.1}))
    decay = {id(p): group.weight_decay for group in went_on.optimizer.groups for p in group.params}
    found = {name: decay[id(p)] for name, p in went_on.model.named_parameters() if ".h.0.attn." in name}
    rows = ("query", "query_bias", "key", "value_scale", "c_proj.bias")
    assert found == {f"transformer.h.0.attn.{name}": 0.0 for name in rows} | {"transformer.h.0.attn.c_proj.weight": 0.1}


def test_adapters_elsewhere_are_merged_and_the_zeros_stay(results: Path) -> None:
    methods = [PRUNE, LORA | {"targets": "attention"}]
    folder, _ = run("pruned_elsewhere", results, methods=methods)
    went_on = going_on(folder)
    torch.testing.assert_close(
        logits(went_on.model), last_logits("pruned_elsewhere", methods=methods), rtol=0, atol=1e-5
    )
    found = zeros(went_on.model)
    pruned = {name for name in found if ".mlp." in name or "wte" in name}
    assert all(found[name] == went_on.model.get_parameter(name).numel() // 2 for name in pruned)
    assert len(pruned) == 5


def test_zeros_of_an_earlier_run_are_not_filled_either(results: Path) -> None:
    pruned, _ = run("pruned_whole", results, methods=[PRUNE])
    later, _ = run("later_lora", results, model={"run": str(pruned)}, methods=[LORA])
    with pytest.raises(ConfigError, match="fill the zeros of 4 pruned layers"):
        going_on(later)
    trained, _ = run("later_full", results, model={"run": str(pruned)})
    last, _ = run("last_lora", results, model={"run": str(trained)}, methods=[LORA])
    assert not any(zeros(going_on(last).model).values()), "full training has filled them before"


def test_pruning_again_takes_the_weights_that_are_zero(results: Path) -> None:
    """Of every score of weights: a run that goes on keeps the zeros by listing the method again."""
    folder, _ = run("pruned_first", results, methods=[PRUNE | {"score": "random"}])
    before = {name: p == 0 for name, p in going_on(folder).model.named_parameters() if p.ndim == 2}
    for score in ("fpp", "magnitude"):
        again = build_run(experiment("again", model={"run": str(folder)}, methods=[PRUNE | {"score": score}]))
        for name, parameter in again.model.named_parameters():
            assert parameter.ndim != 2 or torch.equal(parameter == 0, before[name])
