"""The output layer with its cross-entropy: the chunked torch path against the formula, Liger against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loras_bench.kernels import cross_entropy
from loras_bench.kernels.cross_entropy import linear_cross_entropy

IGNORED = -100


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_liger_equals_torch(dtype: torch.dtype, frozen: bool) -> None:
    pytest.importorskip("liger_kernel")
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 256, 128, generator=generator)
    weight = torch.randn(1000, 128, generator=generator) / 8
    targets_bs = torch.randint(0, 1000, (4, 256), generator=generator)
    targets_bs[:, -20:] = IGNORED
    results = []
    for backend in ("torch", "liger"):
        hidden_bsd = hidden.to("cuda", dtype).requires_grad_()
        weight_vd = weight.to("cuda", dtype).requires_grad_(not frozen)
        loss = linear_cross_entropy(hidden_bsd, weight_vd, targets_bs.cuda(), backend)  # type: ignore[arg-type]
        (loss / 944).backward()
        results.append((loss.detach(), hidden_bsd.grad, weight_vd.grad))
    (loss, dx, dw), (liger_loss, liger_dx, liger_dw) = results
    tolerance = 1e-4 if dtype is torch.float32 else 2e-2
    assert liger_loss.dtype is torch.float32
    torch.testing.assert_close(liger_loss, loss, rtol=tolerance, atol=0)
    assert float(F.cosine_similarity(liger_dx.flatten().float(), dx.flatten().float(), dim=0)) > 1 - tolerance
    if frozen:
        assert dw is None and liger_dw is None
    else:
        assert float(F.cosine_similarity(liger_dw.flatten().float(), dw.flatten().float(), dim=0)) > 1 - tolerance
