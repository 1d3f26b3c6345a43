"""The output layer with its cross-entropy: the chunked torch path and the fused one against the formula."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loras_bench.kernels import cross_entropy
from loras_bench.kernels.cross_entropy import IGNORED, linear_cross_entropy
from loras_bench.metering.flops import MatmulCounter


def draw(batch: int, length: int, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_bsd = torch.randn(batch, length, 8, generator=generator)
    weight_vd = torch.randn(11, 8, generator=generator)
    targets_bs = torch.randint(0, 11, (batch, length), generator=generator)
    targets_bs[torch.rand(batch, length, generator=generator) < 0.3] = IGNORED
    return hidden_bsd.to(device), weight_vd.to(device), targets_bs.to(device)


def reference(hidden_bsd: Tensor, weight_vd: Tensor, targets_bs: Tensor) -> Tensor:
    """Sum of log-sum-exp minus the target's logit, term by term."""
    total = hidden_bsd.new_zeros(())
    for hidden_d, target in zip(hidden_bsd.flatten(0, 1), targets_bs.flatten().tolist(), strict=True):
        if target != IGNORED:
            logits_v = weight_vd @ hidden_d
            total = total + logits_v.logsumexp(0) - logits_v[target]
    return total


@settings(deadline=None, max_examples=25)
@given(length=st.integers(1, 13), seed=st.integers(0, 99))
def test_chunks_give_the_plain_sum_and_its_gradients(length: int, seed: int) -> None:
    """Chunks of 5 tokens: lengths below, at and past their borders, and chunks without a single target."""
    hidden_bsd, weight_vd, targets_bs = draw(2, length, seed)
    inputs = (hidden_bsd.requires_grad_(), weight_vd.requires_grad_())
    expected = reference(*inputs, targets_bs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "CHUNK_TOKENS", 5)
        loss = linear_cross_entropy(*inputs, targets_bs, "torch")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    wanted = (
        torch.autograd.grad(expected, inputs, allow_unused=True, materialize_grads=True)
        if expected.requires_grad
        else None
    )
    got = torch.autograd.grad(loss, inputs)
    for ours, theirs in zip(got, wanted or [torch.zeros_like(x) for x in inputs], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_batch_without_targets_has_no_loss_and_no_gradient() -> None:
    hidden_bsd, weight_vd, targets_bs = draw(2, 4)
    hidden_bsd.requires_grad_()
    loss = linear_cross_entropy(hidden_bsd, weight_vd, targets_bs.fill_(IGNORED), "torch")
    assert loss == 0
    (gradient,) = torch.autograd.grad(loss, hidden_bsd)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_the_sum_is_float32_also_for_a_bfloat16_model() -> None:
    """bfloat16 holds no integer above 256 exactly: a sum of 2,000 losses of log 11 would be off by whole units."""
    hidden_bsd, targets_bs = torch.zeros(1, 2000, 8, dtype=torch.bfloat16), torch.zeros(1, 2000, dtype=torch.int64)
    loss = linear_cross_entropy(hidden_bsd, torch.zeros(11, 8, dtype=torch.bfloat16), targets_bs, "torch")
    assert loss.dtype is torch.float32
    assert float(loss) == pytest.approx(2000 * float(torch.tensor(11.0).log()), rel=1e-5)


def test_a_frozen_output_layer_gets_no_gradient() -> None:
    hidden_bsd, weight_vd, targets_bs = draw(2, 6)
    linear_cross_entropy(hidden_bsd.requires_grad_(), weight_vd, targets_bs, "torch").backward()
    assert weight_vd.grad is None and hidden_bsd.grad is not None


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def fused_module() -> Any:
    pytest.importorskip("triton")
    return importlib.import_module("loras_bench.kernels.fused_cross_entropy")


@pytest.mark.parametrize("trains", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("tile, tokens_at_once", [(4, 5), (16, 1000)])
def test_fused_equals_the_formula_with_its_gradients(
    trains: tuple[bool, bool], tile: int, tokens_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row in several tiles, or one with masked lanes; tokens in several chunks, the last one shorter, or in one."""
    fused = fused_module()
    monkeypatch.setattr(fused, "TILE", tile)
    monkeypatch.setattr(fused, "_chunk", lambda tokens, size: min(tokens, tokens_at_once))
    hidden_bsd, weight_vd, targets_bs = draw(2, 9, 3)
    hidden_bsd.requires_grad_(trains[0]), weight_vd.requires_grad_(trains[1])
    inputs = [tensor for tensor in (hidden_bsd, weight_vd) if tensor.requires_grad]
    expected = reference(hidden_bsd, weight_vd, targets_bs)
    loss = linear_cross_entropy(hidden_bsd, weight_vd, targets_bs, "fused")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(expected * 0.25, inputs)
    for ours, theirs in zip(torch.autograd.grad(loss * 0.25, inputs), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_fused_holds_for_large_logits_and_rows_without_targets() -> None:
    """Logits of +-1e4 overflow no exponential; -100 costs nothing and leaves no gradient."""
    fused_module()
    hidden_bsd = torch.tensor([[[1e4], [-1e4], [1.0]]], requires_grad=True)
    weight_vd = torch.tensor([[1.0], [-1.0]])
    loss = linear_cross_entropy(hidden_bsd, weight_vd, torch.tensor([[1, 1, IGNORED]]), "fused")
    assert loss.item() == 2e4  # token 0 has the wrong answer by 2e4, token 1 the right one
    loss.backward()
    assert hidden_bsd.grad is not None
    assert hidden_bsd.grad.flatten().tolist() == [2.0, 0.0, 0.0]


def test_fused_computes_no_gradient_where_none_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One product with the weights in evaluation, two with a frozen output layer, three with a trained one."""
    fused_module()
    hidden_bsd, weight_vd, targets_bs = draw(2, 6)
    with MatmulCounter() as plain, torch.no_grad():
        linear_cross_entropy(hidden_bsd.requires_grad_(), weight_vd.requires_grad_(), targets_bs, "fused")
    with MatmulCounter() as frozen:
        linear_cross_entropy(hidden_bsd, weight_vd.detach(), targets_bs, "fused").backward()
    with MatmulCounter() as trained:
        linear_cross_entropy(hidden_bsd, weight_vd, targets_bs, "fused").backward()
    product = 2 * 12 * 8 * 11
    assert [counter.flops for counter in (plain, frozen, trained)] == [product, 2 * product, 3 * product]
    assert not (plain.unknown or frozen.unknown or trained.unknown)


@pytest.mark.parametrize(
    "tokens, bytes_per_token, chunk",
    [
        (32768, 2 * 49152, 11008),
        (32768, 2 * 128256, 4096),
        (100, 2 * 49152, 100),
        (1, 2 * 49152, 1),
        (5000, 2 * 49152, 5000),
    ],
)
def test_chunks_are_few_equal_and_of_whole_tiles(tokens: int, bytes_per_token: int, chunk: int) -> None:
    assert fused_module()._chunk(tokens, bytes_per_token) == chunk


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype, tokens, vocabulary", [("float32", 1024, 1000), ("bfloat16", 24576, 50257)])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_fused_equals_torch_on_cuda(device: str, dtype: str, tokens: int, vocabulary: int, frozen: bool) -> None:
    """GPT-2's vocabulary is odd: rows of logits have spare columns."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, tokens // 4, 256, generator=generator)
    weight = torch.randn(vocabulary, 256, generator=generator) / 8
    targets_bs = torch.randint(0, vocabulary, hidden.shape[:2], generator=generator)
    targets_bs[:, -20:] = IGNORED
    results = []
    for backend in ("torch", "fused"):
        hidden_bsd = hidden.to(device, getattr(torch, dtype)).requires_grad_()
        weight_vd = weight.to(device, getattr(torch, dtype)).requires_grad_(not frozen)
        loss = linear_cross_entropy(hidden_bsd, weight_vd, targets_bs.to(device), backend)  # type: ignore[arg-type]
        (loss / (tokens - 80)).backward()
        results.append((loss.detach(), hidden_bsd.grad, weight_vd.grad))
    (loss, dx, dw), (fused_loss, fused_dx, fused_dw) = results
    tolerance = 1e-4 if dtype == "float32" else 1e-2
    torch.testing.assert_close(fused_loss, loss, rtol=tolerance, atol=0)
    assert dx is not None and fused_dx is not None
    assert float((fused_dx.float() - dx.float()).norm() / dx.float().norm()) < tolerance
    if frozen:
        assert dw is None and fused_dw is None
    else:
        assert dw is not None and fused_dw is not None
        assert float((fused_dw.float() - dw.float()).norm() / dw.float().norm()) < tolerance
