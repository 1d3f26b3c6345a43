"""What the tests of the row-wise kernels share: marks, random matrices, and gradients against float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def randn(seed: int, *shape: int, like: tuple[str, torch.dtype] = ("cpu", torch.float32)) -> Tensor:
    """Standard normal numbers that depend on the seed alone, on a device and in a number format."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(*like)


def gradients(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a fixed random weighting of the outputs, for each input."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = function(*leaves)
    weights = [randn(99 + n, *out.shape).to(out) for n, out in enumerate(outputs)]
    return list(torch.autograd.grad(outputs, leaves, weights))


def assert_near(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Equal to float32 references: to 1e-5 of the largest element, in bfloat16 to two of its steps."""
    for mine, theirs in zip(got, expected, strict=True):
        tolerance = 1e-5 if mine.dtype is torch.float32 else 2**-7
        scale = theirs.abs().max()
        torch.testing.assert_close(mine.float() / scale, theirs.float() / scale, rtol=tolerance, atol=tolerance)


def check_gradients(
    ours: Callable[..., Sequence[Tensor]], reference: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]
) -> None:
    """Our gradients against those of the reference in float32."""
    assert_near(gradients(ours, inputs), gradients(reference, [tensor.float() for tensor in inputs]))
