"""Our Triton kernels compiled: real and random shapes against the masked reference in float32, repeats, CUDA graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_checks import BIDIRECTIONAL, CAUSAL, CPU, batches, case_name, documents, inputs, padding, results
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loras_bench.attention.binding import AttentionBatch, BoundPattern
from loras_bench.attention.patterns import (
    BigBird,
    BlockLocal,
    Dense,
    Dilated,
    Fixed,
    Longformer,
    PatternBase,
    Strided,
    Window,
)
from loras_bench.attention.reference import ReferenceBackend, masked_attention
from loras_bench.attention.triton import TritonBackend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda", 0)
REAL = [  # pattern, causal, length, query heads, key heads, head dim
    (Dense(), True, 4096, 8, 4, 128),
    (Dense(), False, 2048, 4, 4, 64),
    (Window(window=512, global_tokens=64), True, 8192, 9, 3, 64),
    (Window(half_width=128, global_tokens=1), False, 4000, 4, 4, 32),
    (Longformer(half_width=256, global_positions=(0, 3000)), False, 4097, 2, 2, 96),
    (Dilated(window=128, dilation=4), True, 4096, 6, 2, 64),
    (Strided(stride=64), True, 4096, 6, 2, 64),
    (Strided(stride=45), False, 2001, 2, 2, 128),
    (Fixed(stride=64, summary=4), True, 4096, 4, 4, 64),
    (BlockLocal(block=256), True, 4096, 4, 2, 96),
    (BigBird(block=64, window_blocks=5, global_blocks=1), True, 4096, 6, 2, 64),
]


def drawn(batch: int, heads: int, groups: int, length: int, head_dim: int) -> list[Tensor]:
    """bfloat16 inputs on the GPU, laid out (batch, length, heads, head_dim)."""
    torch.manual_seed(0)
    shapes = [(batch, length, count, head_dim) for count in (heads, groups, groups)]
    return [
        torch.randn(shape, device=CUDA, dtype=torch.bfloat16).transpose(1, 2).detach().requires_grad_()
        for shape in shapes
    ]


def results_in_slices(bound: BoundPattern, tensors: list[Tensor], scale: float) -> tuple[Tensor, ...]:
    """What `real_results` should be: in float32, a key head of a sample at a time."""
    q, k, v = tensors
    found: list[list[Tensor]] = [[], [], [], [], []]
    for b in range(q.shape[0]):
        mask = bound.mask_bqk[b if bound.samples > 1 else 0][None]
        heads = zip(q[b].split(q.shape[1] // k.shape[1]), k[b].split(1), v[b].split(1), strict=True)
        for index, parts in enumerate(heads):
            own = [part[None].detach().float().requires_grad_() for part in parts]
            out, lse = masked_attention(*own, mask, scale)  # type: ignore[call-arg]
            own_grads = torch.autograd.grad(loss_of(out, lse), own)
            assert index < k.shape[1]
            for kept, one in zip(found, (out, lse, *own_grads), strict=True):
                kept.append(one[0].detach())
    return tuple(torch.stack(kept).view(q.shape[0], -1, *kept[0].shape[1:]) for kept in found)


def loss_of(out: Tensor, lse: Tensor) -> Tensor:
    """Weights that depend on the place alone, so that slices add up to the whole."""
    place = torch.arange(out.shape[2], device=out.device, dtype=torch.float32)
    weights = torch.cos(place[:, None] * 0.7 + torch.arange(out.shape[3], device=out.device) * 1.3).bfloat16()
    return (out.float() * weights).sum() + (torch.sin(place) * lse.masked_fill(lse.isinf(), 0)).sum()


def real_results(bound: BoundPattern, tensors: list[Tensor], scale: float) -> tuple[Tensor, ...]:
    out, lse = TritonBackend().attend(*tensors, bound, scale)  # type: ignore[call-arg]
    return out.detach(), lse.detach(), *torch.autograd.grad(loss_of(out, lse), tensors)


def check_real(bound: BoundPattern, tensors: list[Tensor]) -> None:
    """To 1 % of the whole, and no row far off; rows without a key are 0 and -inf."""
    scale = tensors[0].shape[3] ** -0.5
    found, expected = real_results(bound, tensors, scale), results_in_slices(bound, tensors, scale)
    assert torch.equal(found[1].isinf(), expected[1].isinf())
    for one, other in zip(found, expected, strict=True):
        one, other = one.float().masked_fill(one.isinf(), 0), other.masked_fill(other.isinf(), 0)
        one, other = (x[..., None] if x.dim() == 3 else x for x in (one, other))
        assert one.isfinite().all()
        assert (one - other).norm() <= 1e-2 * other.norm()
        size = other.norm(dim=-1)
        typical = size.square().mean().sqrt()
        assert ((one - other).norm(dim=-1) <= 2e-2 * (size + typical)).all()


def on_gpu(batch: AttentionBatch) -> AttentionBatch:
    facts = {name: getattr(batch, name) for name in ("padding_bs", "document_bs", "global_bs")}
    return replace(batch, device=CUDA, **{name: fact if fact is None else fact.cuda() for name, fact in facts.items()})


@pytest.mark.parametrize("case", REAL, ids=lambda case: case[0].kind)
def test_real_shapes(case: tuple[PatternBase, bool, int, int, int, int]) -> None:
    pattern, causal, length, heads, groups, head_dim = case
    bound = AttentionBatch(length, causal, CUDA).bound(pattern)
    check_real(bound, drawn(2, heads, groups, length, head_dim))


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("pattern", [CAUSAL[1], CAUSAL[7]], ids=case_name)
def test_float32_on_the_gpu(pattern: PatternBase, head_dim: int) -> None:
    """With the tiles that were tuned for bfloat16: they must fit into shared memory twice over."""
    bound = AttentionBatch(1000, True, CUDA).bound(pattern)
    tensors = [x.detach().cuda().requires_grad_() for x in inputs(length=1000, head_dim=head_dim)]
    found, expected = results(TritonBackend(), bound, tensors), results(ReferenceBackend(), bound, tensors)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("index", range(8))
def test_real_packed_rows(index: int, causal: bool) -> None:
    """Documents of 1 to 1900 tokens, and padding at the end."""
    lengths = [700, 1, 1900, 64, 333, 1000]
    facts = {"document_bs": documents(*lengths, 98), "padding_bs": padding(sum(lengths), length=4096)}
    batch = on_gpu(AttentionBatch(4096, causal, CPU, **facts))  # type: ignore[arg-type]
    check_real(batch.bound((CAUSAL if causal else BIDIRECTIONAL)[index]), drawn(1, 4, 2, 4096, 64))


@given(
    data=st.data(),
    causal=st.booleans(),
    index=st.integers(0, 7),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    head_dim=st.sampled_from([32, 64, 96, 128]),
)
@settings(max_examples=12, deadline=None)  # each compiles its kernels anew
def test_random_shapes(data: st.DataObject, causal: bool, index: int, heads: tuple[int, int], head_dim: int) -> None:
    batch = on_gpu(data.draw(batches(causal, 600)))
    bound = batch.bound((CAUSAL if causal else BIDIRECTIONAL)[index])
    check_real(bound, drawn(2, *heads, batch.length, head_dim))


@pytest.mark.parametrize(
    "pattern", [Window(window=256, global_tokens=64), Strided(stride=90), BigBird()], ids=case_name
)
def test_runs_agree_to_the_bit(pattern: PatternBase) -> None:
    bound, tensors = AttentionBatch(8192, True, CUDA).bound(pattern), drawn(2, 9, 3, 8192, 64)
    if pattern.kind == "window":
        assert TritonBackend().launches(bound, 64, 3)["keys"][0].parts > 1
    first = real_results(bound, tensors, 0.125)
    for _ in range(5):
        assert all(map(torch.equal, real_results(bound, tensors, 0.125), first))


@pytest.mark.parametrize("index", range(8))
def test_a_captured_step_serves_other_documents(index: int) -> None:
    """Forward and backward in one CUDA graph that is replayed after the documents have changed."""
    tensors, document_bs = drawn(1, 4, 2, 1024, 64), documents(300, 724).cuda()
    shared: dict[Any, BoundPattern] = {}

    def step() -> tuple[Tensor, ...]:
        batch = AttentionBatch(1024, True, CUDA, document_bs=document_bs, static_bindings=shared)
        return real_results(batch.bound(CAUSAL[index]), tensors, 0.125)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles the kernels and builds the tables that all batches share
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for lengths in ((1024,), (10, 500, 514), (1, 1022, 1), (300, 724)):
        document_bs.copy_(documents(*lengths))
        graph.replay()
        assert all(map(torch.equal, captured, step()))
