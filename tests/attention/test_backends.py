"""Backends against a loop over rows that a reader can check: outputs, log-sum-exp and gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from attention_checks import BIDIRECTIONAL, CASES, CAUSAL, CPU, LENGTH, case_name, documents, inputs, padding, results
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from loras_bench.attention.backend import Backend
from loras_bench.attention.binding import AttentionBatch
from loras_bench.attention.dense import SdpaBackend
from loras_bench.attention.flex import FlexBackend
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
from loras_bench.attention.reference import ReferenceBackend
from loras_bench.attention.triton import TritonBackend
from loras_bench.errors import UserError


def row_by_row(q: Tensor, k: Tensor, v: Tensor, mask_bqk: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of one row at a time, on its allowed keys only; rows without keys are 0 and -inf."""
    outs, lses = [], []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys, values = (x[b, h * k.shape[1] // q.shape[1]] for x in (k, v))
            for i in range(q.shape[2]):
                allowed = mask_bqk[b if len(mask_bqk) > 1 else 0, i].nonzero()[:, 0]
                scores = keys[allowed] @ q[b, h, i] * scale
                outs.append(scores.softmax(0) @ values[allowed])
                lses.append(scores.logsumexp(0) if len(allowed) else torch.tensor(-math.inf))
    return torch.stack(outs).view(q.shape), torch.stack(lses).view(q.shape[:3])


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other, tolerance in zip(found, expected, (1e-5, 1e-5, 1e-4, 1e-4, 1e-4), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.fixture
def eager_flex(monkeypatch: pytest.MonkeyPatch) -> Iterator[FlexBackend]:
    """Torch's eager emulation of FlexAttention, with the gradients that torch refuses on the CPU."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    yield FlexBackend(compiled=False)


@pytest.mark.parametrize(("pattern", "causal"), CASES, ids=case_name)
def test_reference_is_attention_on_the_allowed_keys(pattern: PatternBase, causal: bool) -> None:
    bound = AttentionBatch(LENGTH, causal, CPU, padding_bs=padding(LENGTH, 120)).bound(pattern)
    q, k, v = inputs()
    with torch.no_grad():
        out, lse = ReferenceBackend().attend(q, k, v, bound, 0.3)
        expected_out, expected_lse = row_by_row(q, k, v, bound.mask_bqk, 0.3)
    torch.testing.assert_close(out, expected_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_reference_gradients_numerically() -> None:
    """In float64, through the output and the log-sum-exp, with an empty row and grouped heads."""
    batch = AttentionBatch(7, True, CPU, padding_bs=padding(7, 5, length=7))
    bound = batch.bound(Window(window=3, global_tokens=1))
    tensors = inputs(length=7, dtype=torch.float64)

    def core(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = ReferenceBackend().attend(q, k, v, bound, 0.3)
        return out, lse.masked_fill(lse.isinf(), 0)

    assert torch.autograd.gradcheck(core, tensors)


@pytest.mark.parametrize(("pattern", "causal"), CASES, ids=case_name)
@torch.no_grad()
def test_a_packed_row_is_its_documents_in_rows_of_their_own(pattern: PatternBase, causal: bool) -> None:
    """Positions count from the start of the document, and nothing crosses its ends.

    The rows are padded to one length: a bidirectional BigBird draws its blocks from those of the row.
    """
    packed = AttentionBatch(LENGTH, causal, CPU, document_bs=documents(*(lengths := (50, 1, 106))))
    tensors = inputs(batch=1)
    out, lse = ReferenceBackend().attend(*tensors, packed.bound(pattern), 0.3)  # type: ignore[call-arg,misc]
    first = 0
    for length in lengths:
        row = AttentionBatch(LENGTH, causal, CPU, padding_bs=padding(length))
        moved = [tensor.roll(-first, dims=2) for tensor in tensors]
        alone, alone_lse = ReferenceBackend().attend(*moved, row.bound(pattern), 0.3)  # type: ignore[call-arg,misc]
        torch.testing.assert_close(out[:, :, first : first + length], alone[:, :, :length], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[:, :, first : first + length], alone_lse[:, :, :length], rtol=1e-5, atol=1e-5)
        first += length


@pytest.mark.parametrize(("pattern", "causal"), CASES, ids=case_name)
@pytest.mark.parametrize("lengths", [None, (LENGTH, 100)], ids=["full", "padded"])
def test_flex_is_the_reference(
    pattern: PatternBase, causal: bool, lengths: tuple[int, int] | None, eager_flex: FlexBackend
) -> None:
    batch = AttentionBatch(LENGTH, causal, CPU, padding_bs=padding(*lengths) if lengths else None)
    bound = batch.bound(pattern)
    tensors = inputs()
    assert_same(results(eager_flex, bound, tensors), results(ReferenceBackend(), bound, tensors))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("pattern", "causal", "lengths"),
    [
        *((pattern, True, None) for pattern in CAUSAL),
        (CAUSAL[2], True, (LENGTH, 100)),
        (BIDIRECTIONAL[1], False, (LENGTH, 100)),
    ],
    ids=case_name,
)
def test_compiled_flex_is_the_reference(pattern: PatternBase, causal: bool, lengths: tuple[int, int] | None) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    mask = padding(*lengths).cuda() if lengths else None
    bound = AttentionBatch(LENGTH, causal, torch.device("cuda", 0), padding_bs=mask).bound(pattern)
    tensors = [x.detach().cuda().requires_grad_() for x in inputs(heads=6)]

    def run(backend: Backend) -> tuple[Tensor, ...]:
        out, lse = backend.attend(*tensors, bound, 0.3)  # type: ignore[call-arg,misc]
        assert lse is not None
        loss = (out * out.detach().cos()).sum() + lse.masked_fill(lse.isinf(), 0).sin().sum()
        return out, lse, *torch.autograd.grad(loss, tensors)

    for found, expected in zip(run(FlexBackend()), run(ReferenceBackend()), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)  # TF32 products


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["auto", "cudnn", "flash"])
def test_dense_kernels_are_the_reference_on_cuda(kernel: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    backend = SdpaBackend(kernel)  # type: ignore[arg-type]
    bound = AttentionBatch(LENGTH, True, torch.device("cuda", 0)).bound(Dense())
    tensors = [x.detach().cuda().bfloat16().requires_grad_() for x in inputs(heads=6)]
    out, _ = backend.attend(*tensors, bound, 0.3)  # type: ignore[call-arg,misc]
    out.sum().backward()
    expected, _ = ReferenceBackend().attend(*tensors, bound, 0.3)  # type: ignore[call-arg,misc]
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    assert set(backend.kernels_used.values()) == {"cudnn" if kernel == "auto" else kernel}


def test_flex_trains_on_cuda_only_and_compiled_only() -> None:
    assert "backward" in (FlexBackend().refusal(Dense(), CPU, 64) or "")
    assert FlexBackend().refusal(Dense(), torch.device("cuda"), 64) is None
    assert "emulation" in (FlexBackend(compiled=False).refusal(Dense(), torch.device("cuda"), 64) or "")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("case", ["full", "padded", "documents"])
def test_dense_sdpa_is_the_reference(causal: bool, case: str) -> None:
    batch = AttentionBatch(
        LENGTH,
        causal,
        CPU,
        padding_bs=padding(LENGTH, 100) if case == "padded" else None,
        document_bs=(torch.arange(LENGTH) // 60).expand(2, -1) if case == "documents" else None,
    )
    bound, tensors = batch.bound(Dense()), inputs()
    found, expected = results(SdpaBackend(), bound, tensors), list(results(ReferenceBackend(), bound, tensors))
    # SDPA gives no log-sum-exp: compare without its gradient
    out, _ = ReferenceBackend().attend(*tensors, bound, 0.3)  # type: ignore[call-arg,misc]
    loss = (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum()
    expected[1:] = [torch.zeros(()), *torch.autograd.grad(loss, tensors)]
    assert_same(found, tuple(expected))


def test_dense_causal_attention_refuses_padding_on_the_left() -> None:
    bound = AttentionBatch(LENGTH, True, CPU, padding_bs=padding(LENGTH, 100).flip(1)).bound(Dense())
    with pytest.raises(UserError, match="padding before real tokens"):
        SdpaBackend().attend(*inputs(), bound, 0.3)  # type: ignore[call-arg,misc]


def test_a_kernel_that_needs_cuda_is_refused_elsewhere() -> None:
    assert "needs CUDA" in (SdpaBackend("cudnn").refusal(Dense(), CPU, 64) or "")
    assert SdpaBackend("math").refusal(Dense(), CPU, 64) is None
    assert "every pair" in (SdpaBackend().refusal(Window(window=4), CPU, 64) or "")


@pytest.mark.parametrize("pattern", [Dense(), Window(half_width=3)], ids=case_name)
def test_a_sample_of_padding_alone_gives_zeros_and_finite_gradients(
    pattern: PatternBase, eager_flex: FlexBackend
) -> None:
    bound = AttentionBatch(LENGTH, False, CPU, padding_bs=padding(0, 50)).bound(pattern)
    pytest.importorskip("triton")
    backends: list[Backend] = [ReferenceBackend(), eager_flex, TritonBackend()]
    for backend in [*backends, SdpaBackend()] if isinstance(pattern, Dense) else backends:
        out, lse, *grads = results(backend, bound, tensors := inputs())
        assert (out[0] == 0).all() and (out[1, :, 50:] == 0).all()
        assert backend.name == "sdpa" or (lse[0] == -math.inf).all()
        assert len(grads) == len(tensors) and all((grad[0] == 0).all() and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(
    ("pattern", "causal"),
    [
        (Window(window=LENGTH), True),
        (Window(half_width=LENGTH), False),
        (Longformer(window=1, global_tokens=LENGTH), True),
        (Dilated(window=LENGTH, dilation=1), True),
        (Strided(stride=1), True),
        (Strided(stride=LENGTH), False),
        (Fixed(stride=LENGTH, summary=1), True),
        (Fixed(stride=5, summary=5), False),
        (BlockLocal(block=LENGTH, overlap=False), True),
        (BigBird(block=16, random_blocks=99), True),
        (BigBird(block=16, global_blocks=99), False),
    ],
    ids=case_name,
)
def test_degenerate_settings_are_dense(pattern: PatternBase, causal: bool) -> None:
    batch = AttentionBatch(LENGTH, causal, CPU)
    assert torch.equal(batch.bound(pattern).mask_bqk, batch.bound(Dense()).mask_bqk)
    assert pattern.count_pairs(LENGTH, causal) == Dense().count_pairs(LENGTH, causal)
