"""What weights are worth, and the norms of inputs that forward passes find."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from training_fixtures import LAYERS, VOCABULARY, WIDTH, Rows, attended, task_of, token_ids

from loras_bench.models.objective import Objective
from loras_bench.pruning.blocks import embedding_of, hidden_units_of, linears_of
from loras_bench.pruning.scores import UNUSED, input_norms, movement, random_scores, unit_scores, weight_scores

WEIGHT = torch.tensor([[3.0, -1.0], [-4.0, 0.5]])


def test_scores_by_hand() -> None:
    norm = torch.tensor([0.5, 10.0])
    assert weight_scores(WEIGHT).tolist() == [[3, 1], [4, 0.5]]
    assert weight_scores(WEIGHT, norm).tolist() == [[1.5, 10], [2, 5]]
    assert unit_scores(WEIGHT).tolist() == pytest.approx([5, 1.25**0.5])
    assert unit_scores(WEIGHT, norm).tolist() == pytest.approx([2.5, 10 * 1.25**0.5])
    assert weight_scores(WEIGHT.bfloat16()).dtype == torch.float32


def test_movement_by_hand() -> None:
    """A gradient of the weight's own sign takes it towards zero: negative."""
    gradient = torch.tensor([[1.0, 2.0], [0.0, -2.0]])
    assert movement(gradient, WEIGHT, (2, 2)).tolist() == [[-3, 2], [0, 1]]
    assert movement(gradient, WEIGHT, (1, 2)).tolist() == [[-3, 3]]
    assert movement(gradient, WEIGHT, (2, 1)).tolist() == [[-1], [1]]


def test_random_scores_are_those_of_the_seed() -> None:
    one, again, other = (random_scores((5, 3), seed, torch.device("cpu")) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def batches_of(family: str, lengths: list[int]) -> list[dict[str, Tensor]]:
    labels = [0, 1, 2, 0] if task_of(family) == "classification" else None
    data = Rows(token_ids(4, 12), lengths=lengths, labels=labels)
    return [data.collate("train", rows) for rows in ([0, 1], [2, 3])]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_inputs_of_the_first_layer_are_measured_without_padding(family: str) -> None:
    model = attended(family)
    batches = batches_of(family, [12, 7, 12, 3] if family == "bert" else [12] * 4)
    (matrix,) = (m for m in linears_of(model, "(q_proj|query)") if ".0." in m.name)
    (norm_i,) = input_norms(Objective(model, task_of(family), "torch").train(), [matrix], batches, 10_000)
    rows = []
    for batch in batches:
        if family == "llama":
            x_bsd = model.model.layers[0].input_layernorm(model.model.embed_tokens(batch["input_ids"]))
        else:
            x_bsd = model.bert.eval().embeddings(batch["input_ids"])
        rows.append(x_bsd[batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()])
    torch.testing.assert_close(norm_i, torch.cat(rows).norm(dim=0))


def test_tokens_are_counted_in_all_batches_and_forward_passes_end_after_some() -> None:
    model, batches = attended("llama"), batches_of("llama", [12] * 4)
    matrices = [embedding_of(model), *linears_of(model, "gate_proj")]
    objective = Objective(model, "language_modeling", "torch").train()
    use, *norms = input_norms(objective, matrices, batches, 24)
    counts = torch.bincount(token_ids(4, 12).flatten(), minlength=VOCABULARY)
    assert counts[0] == 0
    torch.testing.assert_close(use, counts.float().sqrt().clamp(min=UNUSED))
    assert use[0] == pytest.approx(UNUSED)
    for norm, first in zip(norms, input_norms(objective, matrices[1:], batches[:1], 10_000), strict=True):
        assert torch.equal(norm, first)
    assert objective.training
    assert not any(module._forward_pre_hooks for module in model.modules() if type(module) is torch.nn.Linear)


def test_forward_passes_are_not_run_for_embeddings_alone() -> None:
    model = attended("gpt2")
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    (use,) = input_norms(
        Objective(model, "language_modeling", "torch"), [embedding_of(model)], batches_of("gpt2", [12] * 4), 1
    )
    assert not calls and int(use.square().round().sum()) == 48


@pytest.mark.parametrize(
    ("family", "reader", "writers"),
    [("llama", "down_proj", 2), ("gpt2", "c_proj", 1), ("bert", "output.dense", 1), ("roberta", "output.dense", 1)],
)
def test_hidden_units_are_found_in_every_family(family: str, reader: str, writers: int) -> None:
    found = hidden_units_of(attended(family))
    assert len(found) == LAYERS
    for matrix, others in found:
        assert matrix.name.endswith(reader) and "attention" not in matrix.name and len(others) == writers
        units = matrix.by_outputs(matrix.weight).shape[1]
        assert matrix.by_outputs(matrix.weight).shape[0] == WIDTH
        assert [other.by_outputs(other.weight).shape for other in others] == [(units, WIDTH)] * writers
