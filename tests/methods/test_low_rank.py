"""Thin products in the place of matrices: the nearest ones, of the size that folding leaves, in models that train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from test_composition import MODELS
from torch import Tensor
from training_fixtures import LORA, WIDTH, attended, build_run, experiment, token_ids
from transformers import AutoConfig, AutoModel

from loras_bench.errors import ConfigError
from loras_bench.folding.counts import folded_rows
from loras_bench.methods.low_rank import TARGETS, LowRank, LowRankConfig
from loras_bench.models.low_rank import LowRankLinear
from loras_bench.pruning.blocks import linears_of

pytestmark = pytest.mark.usefixtures("places")

FAMILIES = ("gpt2", "bert", "roberta", "llama")
SVD = {"kind": "svd"}


def method(**fields: Any) -> LowRank:
    return LowRank(LowRankConfig.model_validate(SVD | fields))


def products(model: Any) -> dict[str, LowRankLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def weights(model: Any, targets: str) -> dict[str, Tensor]:
    return {m.name: m.by_outputs(m.weight).detach().clone() for m in linears_of(model, TARGETS[targets])}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_product_of_this_rank_is_nearer(family: str, targets: str) -> None:
    """The squared error is the sum of the squared singular values that were cut, whatever the layout of the layer."""
    model = attended(family)
    dense = weights(model, targets)
    assert method(targets=targets, rank=3).prepare(model) is model
    made = products(model)
    assert made.keys() == dense.keys() and len(made) >= 2
    for name, product in made.items():
        error = (dense[name] - product.up @ product.down).square().sum()
        torch.testing.assert_close(error, torch.linalg.svdvals(dense[name])[3:].square().sum(), rtol=1e-4, atol=1e-6)
    assert not linears_of(model, TARGETS[targets])


@pytest.mark.parametrize("family", FAMILIES)
def test_at_full_rank_a_model_keeps_its_outputs(family: str) -> None:
    """Biases included."""
    model = attended(family, **({"num_key_value_heads": 4} if family == "llama" else {})).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1
    before = model(token_ids(2, 12)).logits
    method(rank=WIDTH).prepare(model)
    torch.testing.assert_close(model(token_ids(2, 12)).logits, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "rank", "kept"), [("bert", 4, 18_432), ("gpt2", 6, 18_432), ("llama", 5, 17_920)])
def test_the_default_has_the_weights_of_folded_rows_of_each_head(family: str, rank: int, kept: int) -> None:
    """By hand: 2 * 768 * 12 + 768 = 19,200 of a layer's 1,769,472 at 12 heads of 64; never more, and the most."""
    grouped = {"hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 4}  # keys, values: 256 x 768
    sizes: dict[str, Any] = {"num_hidden_layers": 2} | (grouped if family == "llama" else {})
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(family, **sizes))
    assert folded_rows(768, 12, 1) == 19_200
    assert method()._rank_of_fold(model) == rank
    one = sum(sum(m.weight.shape) for m in linears_of(model, TARGETS["query-key-value"])) // 2
    assert one * rank == kept <= 19_200 < one * (rank + 1)


@pytest.mark.parametrize("family", MODELS)
def test_a_model_is_really_smaller_and_trains(family: str) -> None:
    dense, run = (build_run(experiment(**MODELS[family], methods=made)) for made in ([], [SVD]))
    made = products(run.model)
    cut = sum(w.numel() for w in weights(dense.model, "query-key-value").values())
    thin = sum(p.up.numel() + p.down.numel() for p in made.values())
    assert run.parameter_counts()[0] == dense.parameter_counts()[0] - cut + thin
    assert run.model.config.low_rank == {"targets": "query-key-value", "rank": len(next(iter(made.values())).down)}  # type: ignore[union-attr]
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    losses = [float(run.loop.step(step)) for step in range(8)]
    assert losses[-1] < losses[0]
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert {f"{name}.{part}" for name in made for part in ("up", "down")} <= moved


@pytest.mark.parametrize(("family", "others"), [("llama", []), ("gpt2", [LORA]), ("bert", [])], ids=str)
def test_the_fused_forward_pass_takes_them_as_they_are(family: str, others: list[Any]) -> None:
    pytest.importorskip("triton")
    fused, plain = (
        build_run(
            experiment(
                **MODELS[family]
                | {"model": experiment(**MODELS[family]).model.model_dump() | {"implementation": implementation}},
                methods=[SVD, *others],
            )
        )
        for implementation in ("fused", "transformers")
    )
    assert fused.fused is not None
    (reason,) = fused.fused.describe()["separate_groups"]
    assert reason == "LowRankLinear is not a plain linear layer"
    for step in range(2):
        torch.testing.assert_close(fused.loop.step(step), plain.loop.step(step), rtol=1e-3, atol=1e-4)


def test_adapters_go_on_what_stays_dense() -> None:
    run = build_run(experiment(**MODELS["llama"], methods=[SVD, LORA]))
    adapted = {name.split(".lora_")[0].split(".")[-1] for name, _ in run.model.named_parameters() if ".lora_" in name}
    assert adapted == {"o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not [name for name, p in run.model.named_parameters() if p.requires_grad and "lora" not in name]
    with pytest.raises(ConfigError, match="lora cannot be attached: Target module LowRankLinear"):
        build_run(experiment(**MODELS["llama"], methods=[SVD, LORA | {"targets": "attention"}]))


def test_impossible_ranks_are_refused() -> None:
    with pytest.raises(ValidationError, match="needs a `rank`"):
        method(targets="all-linear")
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        method(rank=0)
    with pytest.raises(ConfigError, match="has rank 16, not 17"):  # two key heads of 8
        method(rank=17).prepare(attended("llama"))
