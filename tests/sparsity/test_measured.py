"""Channels scored once: norms over all real tokens of the batches read, the same for every batch afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sparse_lora_checks import adapted, batch_of, method, outcome, watched, with_tensors
from torch import Tensor, nn

from loras_bench.methods.sparse_lora import SparseLora
from loras_bench.models.objective import Objective, unwrapped
from loras_bench.sparsity.criteria import feed_forward_scores, query_key_scores, value_scores

pytestmark = pytest.mark.usefixtures("places")

FIELDS: dict[str, Any] = {"criterion": "measured", "layers": {"0": {"attention": 0.5, "feed_forward": 0.5}}}


def started(*batches: dict[str, Tensor], **fields: Any) -> tuple[SparseLora, nn.Module]:
    one, model = method(**FIELDS | fields), adapted(num_key_value_heads=2)
    one.prepare(model)
    one.start(Objective(model, "language_modeling", "torch").train(), None, iter(batches))  # type: ignore[arg-type]
    return one, model


def scores_of(one: SparseLora) -> dict[str, Tensor]:
    return one.state_dict()


def true_scores(model: nn.Module, *batches: dict[str, Tensor]) -> dict[str, Tensor]:
    """The criteria over all real tokens of some batches, from outputs of the frozen layers in dense forward passes."""
    base: Any = unwrapped(model).base_model
    outputs: dict[str, list[Tensor]] = {name: [] for name in ("q", "k", "v", "gate", "up")}
    hooks = [
        module.base_layer.register_forward_hook(lambda _, x, y, name=name: outputs[name].append(y.flatten(0, 1)))
        for name in outputs
        for module in [base.layers[0].get_submodule(f"{'self_attn' if name in 'qkv' else 'mlp'}.{name}_proj")]
    ]
    with torch.no_grad():
        for batch in batches:
            Objective(model.eval(), "language_modeling", "torch")(**batch)
    for hook in hooks:
        hook.remove()
    model.train()
    real_t = torch.cat([batch.get("attention_mask", torch.ones(2, 16)).bool().flatten() for batch in batches])
    q, k, v, gate, up = (torch.cat(found) for found in outputs.values())
    return {
        "0.hidden": feed_forward_scores(gate, up, real_t),
        "0.pairs": query_key_scores(q, k, base.model_sparsity.heads, real_t),
        "0.values": value_scores(v, real_t),
    }


def test_scores_are_norms_over_the_real_tokens_of_all_batches() -> None:
    batches = [batch_of(lengths=(16, 12)), batch_of(lengths=(7, 16))]
    one, model = started(*batches)
    found, expected = scores_of(one), true_scores(model, *batches)
    assert set(found) == set(expected)
    for name, score_c in found.items():
        torch.testing.assert_close(score_c, expected[name])


def test_reading_ends_with_enough_tokens_and_leaves_no_hook() -> None:
    first, second = batch_of(lengths=(16, 12)), batch_of(lengths=(16, 16))
    one, model = started(first, second, calibration_tokens=28)
    torch.testing.assert_close(scores_of(one), true_scores(model, first))
    assert model.training
    assert not any(module._forward_pre_hooks for module in unwrapped(model).base_model.layers.modules())


def test_all_batches_use_the_channels_that_were_measured() -> None:
    one, model = started(batch_of())
    expected = {name: set(score.topk(len(score) // 2).indices.tolist()) for name, score in scores_of(one).items()}
    one.before_step(5)
    for prompts in ((9, 6), (4, 12)):
        with watched(model) as (attention, feed_forward):
            outcome(model, with_tensors(one, batch_of(prompts)))
        assert set(feed_forward[0].tolist()) == expected["0.hidden"]
        assert set(attention[0][2].tolist()) == expected["0.values"]
        assert len(attention[0][1]) == 2 * len(expected["0.pairs"])


def test_a_resumed_run_goes_on_with_the_scores_of_the_first_in_their_place() -> None:
    first, _ = started(batch_of())
    second, _ = started(batch_of(lengths=(5, 3)))
    places = {name: squares.data_ptr() for name, squares in second.state_dict().items()}
    assert not torch.equal(first.state_dict()["0.hidden"], second.state_dict()["0.hidden"])
    second.load_state_dict({name: squares.clone() for name, squares in first.state_dict().items()})
    assert {name: squares.data_ptr() for name, squares in second.state_dict().items()} == places
    assert all(torch.equal(squares, first.state_dict()[name]) for name, squares in second.state_dict().items())


def test_nothing_is_chosen_before_something_was_measured() -> None:
    one, model = method(**FIELDS), adapted(num_key_value_heads=2)
    one.prepare(model)
    one.before_step(5)
    with pytest.raises(RuntimeError, match="comes before the first step"):
        outcome(model, with_tensors(one, batch_of()))
    one.load_state_dict({})
    assert one.state_dict() == {}


def test_on_the_meta_device_there_are_channels_to_count() -> None:
    one, model = method(**FIELDS), adapted(num_key_value_heads=2)
    one.prepare(model)
    sparsity, x_td = unwrapped(model).base_model.model_sparsity, torch.empty(8, 32, device="meta")
    tokens = sparsity.criterion.feed_forward(0, x_td, None)
    assert tokens.shape == (unwrapped(model).config.intermediate_size,)
    assert [score_c.shape[0] for score_c in sparsity.criterion.attention(0, x_td, None)] == [8, 16]
