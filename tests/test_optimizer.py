"""AdamW on float32 masters: equal to torch's, exact to resume, and no update lost in bfloat16."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from loras_bench.optimizer import MasterAdamW, cosine_with_warmup

BETAS = (0.9, 0.99)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def inputs(seed: int, rows: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=generator), torch.randn(rows, 3, generator=generator)


def backward(model: nn.Module, seed: int) -> Tensor:
    x, y = inputs(seed)
    dtype = next(model.parameters()).dtype
    loss = (model(x.to(dtype)).float() - y).square().mean()
    loss.backward()
    return loss.detach()


def cast(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def optimizer_of(
    model: nn.Module, dtype: torch.dtype = torch.float32, decay: float = 0.1, rate: float = 0.01
) -> MasterAdamW:
    return MasterAdamW(model, [], rate, decay, BETAS, dtype)


def test_in_float32_it_is_torchs_adamw_with_clipping_and_schedule() -> None:
    model = network()
    twin = copy.deepcopy(model)
    ours = optimizer_of(model)
    matrices = [p for p in twin.parameters() if p.ndim == 2]
    vectors = [p for p in twin.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=0.01, betas=BETAS, fused=True)
    for step in range(20):
        backward(model, step)
        ours.collect_gradients()
        norm = ours.step(cosine_with_warmup(step, 20, 0.2), 0.5)
        backward(twin, step)
        expected_norm = torch.nn.utils.clip_grad_norm_([*matrices, *vectors], 0.5)
        for group in theirs.param_groups:
            group["lr"] = 0.01 * cosine_with_warmup(step, 20, 0.2)
        theirs.step()
        theirs.zero_grad()
        assert torch.equal(norm, expected_norm)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert ours.masters[0] is ours.parameters[0], "in float32 the masters are the parameters: no copy"


def test_first_step_by_hand() -> None:
    """The first update of Adam is the learning rate times the sign of the gradient; decay shrinks the matrix first."""
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(2.0)
    optimizer = optimizer_of(model, decay=0.5, rate=0.1)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0]]), torch.tensor([-4.0])
    assert float(optimizer.step(1.0, 100.0)) == pytest.approx(5.0)
    assert model.weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1, abs=1e-6)
    assert model.bias.item() == pytest.approx(2.0 + 0.1, abs=1e-6), "vectors do not decay"
    assert model.weight.grad is None


def test_clipping_scales_all_gradients_together() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = MasterAdamW(model, [], 0.1, 0.0, (0.0, 0.0), torch.bfloat16)
    cast(model)
    model.weight.grad = torch.tensor([[6.0, 8.0]], dtype=torch.bfloat16)
    optimizer.collect_gradients()
    assert float(optimizer.step(1.0, 5.0)) == pytest.approx(10.0)
    # betas of 0: the first moment is the clipped gradient itself
    torch.testing.assert_close(optimizer.adam.state[optimizer.masters[0]]["exp_avg"], torch.tensor([[3.0, 4.0]]))


def test_small_updates_are_not_lost_in_bfloat16() -> None:
    """An update of 1e-4 of a weight of 1 is below bfloat16's half unit of 1/512; 100 of them are 1 %."""

    def train(optimizer: MasterAdamW | torch.optim.AdamW, model: nn.Linear) -> float:
        for _ in range(100):
            model.weight.grad = torch.ones_like(model.weight)
            if isinstance(optimizer, MasterAdamW):
                optimizer.collect_gradients()
                optimizer.step(1.0, 10.0)
            else:
                optimizer.step()
        return model.weight.item()

    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    ours = MasterAdamW(model, [], 1e-4, 0.0, BETAS, torch.bfloat16)
    cast(model)
    naive = copy.deepcopy(model)
    assert train(torch.optim.AdamW(naive.parameters(), lr=1e-4, weight_decay=0.0), naive) == 1.0
    assert train(ours, model) == pytest.approx(0.99, abs=1 / 256)
    assert ours.masters[0].item() == pytest.approx(0.99, abs=1e-5)


def test_a_bfloat16_model_tracks_float32_training() -> None:
    exact, rounded = network(), network()
    first, second = optimizer_of(exact), optimizer_of(rounded, torch.bfloat16)
    cast(rounded)
    losses = []
    for step in range(100):
        losses.append(float(backward(exact, step % 4)))
        first.step(1.0, 1.0)
        loss = float(backward(rounded, step % 4))
        second.collect_gradients()
        second.step(1.0, 1.0)
        assert loss == pytest.approx(losses[-1], rel=0.05)
    assert losses[-1] < 0.75 * losses[3], "it learned something"
    assert all(torch.equal(p, m.bfloat16()) for p, m in zip(second.parameters, second.masters, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_micro_batches_add_up(dtype: torch.dtype) -> None:
    """Gradients that bfloat16 holds exactly, in sums that it cannot hold: they are added in float32."""
    model = nn.Linear(2, 1, bias=False)
    optimizer = MasterAdamW(model, [], 0.1, 0.0, (0.0, 0.0), dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for gradient in (256.0, 1.0, 1.0):
        part = torch.full((1, 2), gradient, dtype=dtype)
        model.weight.grad = part if model.weight.grad is None else model.weight.grad + part
        optimizer.collect_gradients()
    assert model.weight.grad is None or dtype is torch.float32
    assert torch.equal(optimizer.masters[0].grad, torch.full((1, 2), 258.0))


def test_masters_hold_what_was_loaded_not_its_rounding() -> None:
    model = network()
    loaded = [p.detach().clone() for p in model.parameters()]
    optimizer = optimizer_of(model, torch.bfloat16)
    cast(model)
    held = {id(p): m for p, m in zip(optimizer.parameters, optimizer.masters, strict=True)}
    assert all(torch.equal(held[id(p)], before) for p, before in zip(model.parameters(), loaded, strict=True))
    assert all(m.dtype is torch.float32 for m in optimizer.masters)


def test_frozen_parameters_are_left_out_and_tied_ones_taken_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    model[1].weight.requires_grad_(False)
    assert [id(p) for p in optimizer_of(model).parameters] == [id(model[0].weight)]


def test_groups_of_methods_keep_their_own_settings() -> None:
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.zero_(), model.bias.zero_()
    optimizer = MasterAdamW(
        model, [{"params": [model.bias], "lr": 0.5, "weight_decay": 0.0}], 0.1, 0.0, BETAS, torch.float32
    )
    model.weight.grad, model.bias.grad = torch.ones(1, 1), torch.ones(1)
    optimizer.step(0.5, 100.0)
    assert model.weight.item() == pytest.approx(-0.05)
    assert model.bias.item() == pytest.approx(-0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("before", [0, 3])
def test_state_is_restored_exactly(dtype: torch.dtype, before: int) -> None:
    """Also when there are no moments yet: a snapshot before the first step gives the first step again."""
    model = network()
    optimizer = optimizer_of(model, dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)

    def steps(count: int, start: int) -> list[Tensor]:
        for step in range(start, start + count):
            backward(model, step)
            optimizer.collect_gradients()
            optimizer.step(1.0, 1.0)
        return [p.detach().clone() for p in (*model.parameters(), *optimizer.masters)]

    steps(before, 0)
    saved = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    assert any("exp_avg" in name for name in saved) == (before > 0)
    expected = steps(4, before)
    optimizer.load_state_dict(saved)
    now = optimizer.state_dict()
    assert now.keys() == saved.keys() and all(torch.equal(now[name], saved[name]) for name in saved)
    assert all(torch.equal(a, b) for a, b in zip(steps(4, before), expected, strict=True))

    fresh_model = network()
    for parameter in fresh_model.parameters():
        parameter.data = parameter.data.to(dtype)
    fresh = optimizer_of(fresh_model, dtype)
    fresh.load_state_dict(saved)
    model, optimizer = fresh_model, fresh
    assert all(torch.equal(a, b) for a, b in zip(steps(4, before), expected, strict=True)), "in another process too"


def test_schedule_by_hand() -> None:
    assert [cosine_with_warmup(step, 10, 0.2) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert cosine_with_warmup(6, 10, 0.2) == pytest.approx(0.5)
    assert cosine_with_warmup(4, 10, 0.2) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert cosine_with_warmup(10, 10, 0.2) == pytest.approx(0.0)
    assert cosine_with_warmup(0, 10, 0.0) == 1.0, "without warm-up the first step is taken at the peak"
    assert cosine_with_warmup(0, 1, 0.5) == 1.0


@given(steps=st.integers(1, 400), fraction=st.floats(0, 0.99))
def test_schedule_rises_then_falls_within_bounds(steps: int, fraction: float) -> None:
    factors = [cosine_with_warmup(step, steps, fraction) for step in range(steps)]
    peak = factors.index(max(factors))
    assert max(factors) == 1.0 and min(factors) > 0
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
