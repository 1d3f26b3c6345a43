"""SparseLoRA: its YAML form and refusals, its tokens, and that its steps are those of a network masked by hand."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from sparse_lora_checks import (
    ADAPTED,
    SCHEDULE,
    adapted,
    assert_close,
    batch_of,
    mask_bases,
    method,
    outcome,
    sparsity_of,
    watched,
    with_tensors,
)
from torch import nn
from torch.nn.functional import cross_entropy
from training_fixtures import LAYERS
from transformers import GPT2Config, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from loras_bench.errors import ConfigError
from loras_bench.methods.lora import Lora, LoraConfig
from loras_bench.models.objective import unwrapped
from loras_bench.sparsity.criteria import LayerSparsity

pytestmark = pytest.mark.usefixtures("places")

IMPLEMENTATIONS = ["transformers", "fused"]


def lora(**fields: Any) -> Lora:
    return Lora(LoraConfig.model_validate({"kind": "lora"} | fields))


def implement(model: nn.Module, implementation: str) -> nn.Module:
    if implementation == "fused":
        pytest.importorskip("triton")
        from loras_bench.models.fused_llama import FusedLlama

        FusedLlama.install(unwrapped(model).base_model)
    return model


def test_layers_and_ranges_may_name_the_parts_apart() -> None:
    config = method(layers=SCHEDULE).config
    expected = [LayerSparsity(0.9, 0.75), LayerSparsity(0.5, 0.75), LayerSparsity(0.0, 0.0)]
    assert config.schedule(3) == expected


@pytest.mark.parametrize(
    ("layers", "fault"),
    [
        ({"4": {"attention": 0.5}}, "has 4 layers"),
        ({"3-1": {"attention": 0.5}}, "names no layers"),
        ({"0-2": {"attention": 0.5}, "1": {"attention": 0.2}}, "attention: layer 1 is named by `0-2` and by `1`"),
    ],
)
def test_wrong_layers_are_refused_before_any_work(layers: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        method(layers=layers).check([lora()], LlamaConfig(num_hidden_layers=4))


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": {"0": {"attention": 1.0}}},
        {"layers": {"0": {"feed_forward": -0.1}}},
        {"layers": {"0": {"k_proj": 0.5}}},
        {"layers": {}},
        {"layers": {"0": {}}},
        {"start": 1.0},
        {"rank": 0},
        {"tokens": "all", "dense_tokens": "random"},
    ],
)
def test_wrong_settings_are_refused_where_they_are_read(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        method(**fields)


@pytest.mark.parametrize(
    ("others", "config", "fault"),
    [
        ([], LlamaConfig(), "beside adapters"),
        ([lora(variant="dora")], LlamaConfig(), "DoRA"),
        ([lora(dropout=0.1)], LlamaConfig(), "dropout"),
        ([lora(), method()], LlamaConfig(), "twice"),
        ([lora()], GPT2Config(), "gpt2"),
        ([lora()], LlamaConfig(hidden_act="gelu"), "gelu"),
    ],
)
def test_what_it_cannot_slice_is_refused_with_the_reason(others: Any, config: Any, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        method().check(others, config)


def test_the_configuration_is_read_without_torch() -> None:
    heavy = "{'torch', 'transformers', 'numpy'}"
    code = f"import sys, loras_bench.methods.sparse_lora; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("multiple", [1, 4, 128])
def test_dense_rows_are_those_with_labels_and_the_last_of_the_others(multiple: int) -> None:
    """Row 0 has labels at 9 to 15, row 1 at 6 to 11 and padding after: flat 9 to 15 and 22 to 27."""
    found = with_tensors(method(), batch_of(), multiple)
    labels = [*range(9, 16), *range(22, 28)]
    fill = {1: [], 4: [29, 30, 31], 128: [*range(9), *range(16, 22), *range(28, 32)]}[multiple]
    assert found["dense_rows"].tolist() == sorted(labels + fill)
    assert sorted([*found["dense_rows"].tolist(), *found["sparse_rows"].tolist()]) == list(range(32))


def test_a_batch_without_labels_is_context_and_one_of_labels_is_refused() -> None:
    empty = with_tensors(method(), batch_of(prompts=(16, 16)))
    assert empty["dense_rows"].shape == (0,) and len(empty["sparse_rows"]) == 32
    every = batch_of() | {"targets": torch.ones(2, 16, dtype=torch.int64)}
    with pytest.raises(ConfigError, match="every token"):
        method().batch_tensors(every)
    with pytest.raises(ConfigError, match="not tokens'"):
        method().batch_tensors(every | {"targets": torch.ones(2, dtype=torch.int64)})
    assert method(tokens="all").batch_tensors(every) == {}


def test_random_dense_tokens_are_as_many_real_ones_and_the_same_when_asked_again() -> None:
    one, batch = method(dense_tokens="random"), batch_of()
    found = with_tensors(one, batch, 1)["dense_rows"]
    assert len(found) == 13 and batch["attention_mask"].flatten()[found].all()
    assert found.tolist() != with_tensors(method(), batch, 1)["dense_rows"].tolist()
    assert torch.equal(found, with_tensors(one, batch, 1)["dense_rows"])


def test_documents_of_a_packed_batch_are_numbered_without_its_fill() -> None:
    packed = {
        "input_ids": torch.zeros(1, 16),
        "document_ids": torch.tensor([[0] * 5 + [1] * 4 + [2] * 3 + [3] * 4]),
        "attention_mask": torch.tensor([[True] * 12 + [False] * 4]),
    }
    assert method(tokens="all").batch_tensors(packed)["samples"].tolist() == [0, 1, 2]
    whole = {name: tensor[:, :12] for name, tensor in packed.items()}
    assert method(tokens="all").batch_tensors(whole)["samples"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(("start", "steps", "dense"), [(0.05, 100, 5), (0.05, 101, 6), (0.1, 30, 3), (0.0, 9, 0)])
def test_the_first_steps_are_dense(start: float, steps: int, dense: int) -> None:
    one, model = method(start=start), adapted()
    one.prepare(model)
    one.plan(steps)
    keys = [one.graph_key(step) for step in range(steps)]
    assert keys == [False] * dense + [True] * (steps - dense)
    one.before_step(0)
    assert sparsity_of(model).active == (dense == 0)
    one.before_step(dense)
    assert sparsity_of(model).active


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ["sparsity 0", "labels everywhere", "dense steps", "no rows given", "evaluation"])
def test_dense_it_is_lora_bit_for_bit(case: str, implementation: str) -> None:
    """Loss and gradients."""
    batch = batch_of()
    expected = outcome(implement(adapted(), implementation), batch)
    zero = {"layers": {f"0-{LAYERS - 1}": {"attention": 0.0, "feed_forward": 0}}}
    one, model = method(**zero if case == "sparsity 0" else {}), adapted()
    one.prepare(model)
    implement(model, implementation)
    if case == "sparsity 0":
        batch = with_tensors(one, batch)
    elif case == "labels everywhere":
        batch |= {"dense_rows": torch.arange(32), "sparse_rows": torch.arange(0)}
    elif case == "dense steps":
        one.plan(1000)
        one.before_step(49)
        batch = with_tensors(one, batch)
    elif case == "evaluation":
        batch = with_tensors(one, batch)
        model.eval()
    got = outcome(model, batch)
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", ["all", "context"])
@pytest.mark.parametrize("targets", ADAPTED, ids=str)
def test_a_step_is_that_of_a_network_masked_by_token(targets: Any, tokens: str, implementation: str) -> None:
    """Zeros in the frozen layers' channels that are not kept, for context tokens alone, at the channels chosen."""
    one, model = method(tokens=tokens), adapted(targets)
    one.prepare(model)
    batch = with_tensors(one, batch_of())
    context_bs = torch.ones(2, 16, dtype=torch.bool)
    if tokens == "context":
        context_bs.view(-1)[batch["dense_rows"]] = False
        assert 0 < int(context_bs.sum()) < 32
    with watched(implement(model, implementation)) as chosen:
        got = outcome(model, batch)
    assert sorted(chosen[0]) == sorted(chosen[1]) == [0, 1]
    masked = adapted(targets)
    mask_bases(masked, context_bs, *chosen)
    assert_close(got, outcome(masked, batch_of()), forward=1e-5, gradients=1e-4)
    assert not torch.allclose(got["loss"], outcome(adapted(targets), batch_of())["loss"], rtol=1e-4)


@pytest.mark.parametrize("heads", [4, 2, 1])
def test_kept_channels_belong_together(heads: int) -> None:
    """Rotary pairs whole, every query head of a key head, and so many as the schedule says: G = 1, 2, 4."""
    one, model = method(layers={"0": {"attention": 0.75, "feed_forward": 0.9}}), adapted(num_key_value_heads=heads)
    one.prepare(model)
    with watched(model) as (attention, feed_forward):
        outcome(model, with_tensors(one, batch_of()))
    size, group, width = 8, 4 // heads, heads * 8
    query, key, value, output = (set(part.tolist()) for part in attention[0])
    assert len(key) == width // 4 and len(value) == width // 4 and len(feed_forward[0]) == 8  # 80 * 0.1
    assert all((channel + 4) % 8 + channel // 8 * 8 in key for channel in key), "pairs (e, e + size / 2)"
    for small, large in ((key, query), (value, output)):
        assert large == {((c // size) * group + m) * size + c % size for c in small for m in range(group)}


def test_padding_has_no_say() -> None:
    """Other tokens in the padding choose the same channels; other prompts do not."""
    for mean_token in (True, False):
        one, model = method(mean_token=mean_token), adapted()
        one.prepare(model)
        chosen = []
        for place in (None, 30, 2):
            batch = with_tensors(one, batch_of())
            if place is not None:
                batch["input_ids"].view(-1)[place] = 40
            with watched(model) as (attention, feed_forward):
                outcome(model, batch)
            chosen.append([t.tolist() for layer in (0, 1) for t in (*attention[layer], feed_forward[layer])])
        assert chosen[0] == chosen[1] != chosen[2]


def in_float64(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """LlamaRMSNorm without its casts to float32."""
    return norm.weight * x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()  # type: ignore[no-any-return]


@pytest.mark.parametrize("targets", ADAPTED, ids=str)
def test_gradients_are_finite_differences(targets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the whole model in float64, along a random direction, at fixed channels."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", in_float64)
    one, model = method(criterion="random"), adapted(targets, torch.float64)
    one.prepare(model)
    one.before_step(3)
    batch = with_tensors(one, batch_of())
    targets_bs = batch.pop("targets")

    def loss() -> torch.Tensor:
        return cross_entropy(unwrapped(model)(**batch).logits.flatten(0, 1), targets_bs.flatten())

    torch.manual_seed(4)
    trained = [(p, torch.randn_like(p)) for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss(), [parameter for parameter, _ in trained])
    slope = sum(float((found * way).sum()) for found, (_, way) in zip(gradients, trained, strict=True))
    losses = []
    for size in (1e-5, -2e-5):
        with torch.no_grad():
            for parameter, way in trained:
                parameter += size * way
            losses.append(float(loss()))
    assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(slope, rel=1e-6)


def test_criteria_choose_differently_and_the_oracle_sees_the_weights() -> None:
    """An estimator of full rank is the oracle (of rank 4 it is not); random channels change with the step."""
    full = {"layers": {"0": {"attention": 0.5, "feed_forward": 0.5}}, "mean_token": False}
    chosen = {}
    for name, fields in {
        "full": {"rank": 16},
        "rank 1": {"rank": 1},
        "oracle": {"criterion": "oracle"},
        "random": {"criterion": "random"},
    }.items():
        one, model = method(**full | fields), adapted(num_key_value_heads=2)
        one.prepare(model)
        for step in (7, 8, 7):
            one.before_step(step)
            with watched(model) as (attention, feed_forward):
                outcome(model, with_tensors(one, batch_of()))
            found = [set(t.tolist()) for t in (*attention[0], feed_forward[0])]
            chosen.setdefault(name, []).append(found)
    assert chosen["full"][0][1:3] == chosen["oracle"][0][1:3], "k and v have 16 outputs"
    assert chosen["rank 1"][0] != chosen["oracle"][0]
    assert chosen["oracle"][0] == chosen["oracle"][1]
    assert chosen["random"][0] == chosen["random"][2] != chosen["random"][1]


def test_it_leaves_the_model_as_it_found_it() -> None:
    one, model = method(), adapted()
    base = unwrapped(model).base_model
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    names, hooks = [name for name, _ in model.named_parameters()] + list(model.state_dict()), base._forward_pre_hooks
    known = set(hooks)
    one.prepare(model)
    assert [name for name, _ in model.named_parameters()] + list(model.state_dict()) == names
    assert one.finish(model) is model
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert set(hooks) == known
