"""SwiGLU and GELU: hand-computed values, torch's functions and gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import GPU, assert_near, check_gradients, randn
from torch import Tensor
from transformers.activations import ACT2FN

pytest.importorskip("triton")
from loras_bench.kernels.activations import gelu, swiglu
from loras_bench.kernels.bordered import with_border

CASES = [
    *[("cpu", torch.float32, *shape) for shape in [(1, 1), (5, 40), (3, 1030)]],
    *[
        pytest.param("cuda", dtype, *shape, marks=GPU)
        for shape in [(32768, 1536), (1001, 14336), (7, 30)]
        for dtype in (torch.float32, torch.bfloat16)
    ],
]


def silu_product(gate_up_nf: Tensor) -> tuple[Tensor]:
    gate_nf, up_nf = gate_up_nf.chunk(2, dim=1)
    return (F.silu(gate_nf) * up_nf,)


@pytest.mark.parametrize("device, dtype, rows, width", CASES)
def test_swiglu_equals_torch_with_its_gradient(device: str, dtype: torch.dtype, rows: int, width: int) -> None:
    gate_up_nf = 3 * randn(0, rows, 2 * width, like=(device, dtype))
    assert_near([swiglu(gate_up_nf)], silu_product(gate_up_nf))
    check_gradients(lambda x: (swiglu(x, border=16, grad_border=32),), silu_product, [gate_up_nf])


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("device, dtype, rows, width", CASES)
def test_gelu_equals_transformers_with_its_gradient(
    device: str, dtype: torch.dtype, rows: int, width: int, tanh: bool
) -> None:
    x_nf = 3 * randn(0, rows, width, like=(device, dtype))
    function = ACT2FN["gelu_new" if tanh else "gelu"]
    assert_near([gelu(x_nf, tanh)], [function(x_nf.float())])
    check_gradients(lambda x: (gelu(x, tanh, border=16, grad_border=32),), lambda x: (function(x),), [x_nf])


def test_single_numbers_by_hand() -> None:
    gate_up_nf = torch.tensor([[0.0, 1.0, 5.0, 3.0]])
    assert swiglu(gate_up_nf)[0].tolist() == pytest.approx([0.0, 3 / (1 + math.exp(-1))])
    assert gelu(torch.tensor([[1.0, -1.0]]), tanh=False)[0].tolist() == pytest.approx([0.8413447, -0.1586553], rel=1e-6)
    assert gelu(torch.tensor([[1.0, -1.0]]), tanh=True)[0].tolist() == pytest.approx([0.8411920, -0.1588080], rel=1e-6)


@pytest.mark.parametrize("large", [-60.0, 60.0])
def test_large_numbers_overflow_nowhere(large: float) -> None:
    for function in (swiglu, lambda x: gelu(x, tanh=False), lambda x: gelu(x, tanh=True)):
        x_nf = torch.full((1, 2), large, requires_grad=True)
        function(x_nf).sum().backward()
        assert torch.isfinite(x_nf.grad).all()


def test_results_and_gradients_have_the_borders_asked_for() -> None:
    for function in (swiglu, lambda x, *borders: gelu(x, False, *borders)):
        leaf, received = randn(0, 4, 24).requires_grad_(), []
        x_nf = leaf * 1
        x_nf.register_hook(lambda gradient, received=received: received.append(gradient))
        hidden_nf = function(x_nf, 16, 32)
        assert with_border(hidden_nf, 16) is not None
        hidden_nf.sum().backward()
        assert with_border(received[0], 32) is not None
