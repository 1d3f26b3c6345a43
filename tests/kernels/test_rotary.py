"""The rotary embedding in the projection's output: transformers' function and torch's gradients."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import GPU, check_gradients, randn
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

pytest.importorskip("triton")
from loras_bench.kernels.bordered import with_border
from loras_bench.kernels.rotary import head_split, rotary_split

CASES = [  # device, dtype, batch, length, heads, key heads, head_dim, whether each sample has positions of its own
    ("cpu", torch.float32, 2, 5, 4, 2, 8, False),
    ("cpu", torch.float32, 3, 7, 2, 1, 12, True),
    ("cpu", torch.float32, 1, 1, 1, 1, 2, True),
    *[
        pytest.param("cuda", dtype, *shape, packed, marks=GPU)
        for shape in [(4, 8192, 9, 3, 64), (2, 1000, 32, 8, 128), (3, 77, 4, 2, 96)]
        for dtype, packed in ((torch.float32, True), (torch.bfloat16, False))
    ],
]


def angles(batch: int, length: int, dim: int, like: tuple[str, torch.dtype]) -> tuple[Tensor, Tensor]:
    """Cosines and sines with two different halves: nothing may rely on their being the same."""
    angle_bsd = 3 * randn(7, batch, length, dim)
    return angle_bsd.cos().to(*like), angle_bsd.sin().to(*like)


def reference(qkv_nd: Tensor, cos_bsd: Tensor, sin_bsd: Tensor, heads: int, key_heads: int) -> tuple[Tensor, ...]:
    length, dim = cos_bsd.shape[1:]
    x_bhsd = qkv_nd.view(-1, length, heads + 2 * key_heads, dim).transpose(1, 2)
    q_bhsd, k_bgsd, v_bgsd = x_bhsd.split([heads, key_heads, key_heads], dim=1)
    return *apply_rotary_pos_emb(q_bhsd, k_bgsd, cos_bsd.to(qkv_nd), sin_bsd.to(qkv_nd)), v_bgsd


@pytest.mark.parametrize("device, dtype, batch, length, heads, key_heads, dim, packed", CASES)
def test_equals_transformers_with_its_gradient(
    device: str, dtype: torch.dtype, batch: int, length: int, heads: int, key_heads: int, dim: int, packed: bool
) -> None:
    qkv_nd = randn(0, batch * length, (heads + 2 * key_heads) * dim, like=(device, dtype))
    facts = (*angles(batch if packed else 1, length, dim, (device, dtype)), heads, key_heads)
    exact = [fact.float() if isinstance(fact, Tensor) else fact for fact in facts]
    tolerance = 2**-6 if dtype is torch.bfloat16 else 1e-6  # transformers rounds both products and their sum
    for mine, theirs in zip(rotary_split(qkv_nd.clone(), *facts), reference(qkv_nd.float(), *exact), strict=True):
        torch.testing.assert_close(mine.float(), theirs, rtol=tolerance, atol=tolerance)
    check_gradients(lambda x: rotary_split(x * 1, *facts), lambda x: reference(x, *facts), [qkv_nd])


@pytest.mark.parametrize("device, dtype, batch, length, heads, key_heads, dim, packed", CASES)
def test_rows_in_another_order_come_into_that_of_the_batch(
    device: str, dtype: torch.dtype, batch: int, length: int, heads: int, key_heads: int, dim: int, packed: bool
) -> None:
    """And their gradients back, bit for bit those of rows that were in order; what was given is not overwritten."""
    qkv_nd = randn(0, batch * length, (heads + 2 * key_heads) * dim, like=(device, dtype))
    facts = (*angles(batch if packed else 1, length, dim, (device, dtype)), heads, key_heads, 16)
    order_n = torch.randperm(batch * length, generator=torch.Generator().manual_seed(0)).to(device)
    weights = [randn(1, *t.shape, like=(device, dtype)) for t in rotary_split(qkv_nd.clone(), *facts)]
    results = []
    for order, rows_nd in ((None, qkv_nd), (order_n, qkv_nd[order_n])):
        leaf = rows_nd.clone().requires_grad_()
        outputs = rotary_split(leaf * 1 if order is None else leaf, *facts, order)
        results.append([*outputs, torch.autograd.grad(outputs, leaf, weights)[0]])
        assert order is None or torch.equal(leaf, rows_nd)
    results[0][3] = results[0][3][order_n]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


def test_a_quarter_turn_by_hand() -> None:
    """(x1, x2) -> (-x2, x1) for q and k; v stays."""
    q_bhsd, k_bgsd, v_bgsd = rotary_split(
        torch.arange(1.0, 7.0)[None], torch.zeros(1, 1, 2), torch.ones(1, 1, 2), heads=1, key_heads=1
    )
    assert [t.flatten().tolist() for t in (q_bhsd, k_bgsd, v_bgsd)] == [[-2, 1], [-4, 3], [5, 6]]


def test_outputs_are_views_of_the_projection_and_its_gradient_has_a_border() -> None:
    qkv_nd = randn(0, 6, 4 * 8).requires_grad_()
    projected_nd = qkv_nd * 1
    received = []
    projected_nd.register_hook(lambda gradient: received.append(gradient))
    outputs = rotary_split(projected_nd, *angles(1, 3, 8, ("cpu", torch.float32)), 2, 1, grad_border=16)
    storages = {tensor.untyped_storage().data_ptr() for tensor in (projected_nd, *outputs)}
    assert len(storages) == 1
    assert [tuple(t.shape) for t in outputs] == [(2, 2, 3, 8), (2, 1, 3, 8), (2, 1, 3, 8)]
    sum(t.square().sum() for t in outputs).backward()
    assert with_border(received[0], 16) is not None


@pytest.mark.parametrize("device, dtype", [("cpu", torch.float32), pytest.param("cuda", torch.bfloat16, marks=GPU)])
def test_a_split_without_rotation_moves_nothing(device: str, dtype: torch.dtype) -> None:
    qkv_nd = randn(0, 2 * 7, 5 * 12, like=(device, dtype))
    outputs = head_split(qkv_nd, 7, 3, 1)
    for mine, theirs in zip(outputs, plain_split(qkv_nd), strict=True):
        assert torch.equal(mine, theirs) and mine.untyped_storage().data_ptr() == qkv_nd.untyped_storage().data_ptr()
    check_gradients(lambda x: head_split(x, 7, 3, 1, grad_border=16), plain_split, [qkv_nd])


def plain_split(qkv_nd: Tensor) -> tuple[Tensor, ...]:
    return qkv_nd.view(2, 7, 5, 12).transpose(1, 2).split([3, 1, 1], dim=1)


def test_gradients_may_lie_in_memory_as_they_like() -> None:
    """(b, s, h, d)-contiguous, sliced from wider rows, and expanded from one number."""
    facts = (*angles(2, 3, 8, ("cpu", torch.float32)), 2, 1)
    qkv_nd = randn(0, 6, 4 * 8)
    weights = [
        randn(1, 2, 3, 2, 8).transpose(1, 2),
        randn(2, 2, 1, 3, 24)[..., ::3],
        torch.ones(()).expand(2, 1, 3, 8),
    ]
    results = []
    for function in (rotary_split, reference):
        leaf = qkv_nd.clone().requires_grad_()
        outputs = function(leaf * 1, *facts)
        results.append(torch.autograd.grad(outputs, leaf, weights)[0])
    torch.testing.assert_close(*results)
