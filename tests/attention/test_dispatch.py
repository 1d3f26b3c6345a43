"""Which backend computes a layer, by pattern, device, head and batch; models as a whole: test_model_attention.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loras_bench.attention.dense import DenseKernel
from loras_bench.attention.dispatch import ModelAttention
from loras_bench.attention.patterns import Dense, Strided, Window
from loras_bench.errors import ConfigError
from loras_bench.methods.base import Taps

pytest.importorskip("triton")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTH, HEAD_DIM = 24, 8


def planned(head_dim: int = HEAD_DIM, causal: bool = True, dense_kernel: DenseKernel = "auto") -> ModelAttention:
    """The attention of a model of one layer that will run on CUDA."""
    return ModelAttention(1, causal, head_dim, CUDA, dense_kernel)


def backend_after(attention: ModelAttention, **facts: Tensor) -> str:
    """What is said of the layer after a batch of these facts was attended; counted, so that nothing is computed."""
    batch = attention.batch(LENGTH, CPU, **facts)
    q_bhsd = torch.empty(1, 4, LENGTH, HEAD_DIM, device="meta")
    with attention.counting() as calls:
        attention.attend(0, q_bhsd, q_bhsd, q_bhsd, batch, 1.0)
    (layer,) = attention.describe()["layers"]
    assert calls[0].backward_factor == (3.5 if layer["backend"] == "triton" else 2.5)  # it is what was costed
    return str(layer["backend"])


def test_dense_layers_are_said_to_be_ours_after_a_packed_batch() -> None:
    documents = {"document_bs": (torch.arange(LENGTH) >= 9).int()[None]}
    padding = {"padding_bs": (torch.arange(LENGTH) < 9)[None]}
    attention = planned()
    assert attention.describe()["layers"][0]["backend"] == "sdpa"
    assert backend_after(attention, **documents) == "triton"
    assert attention.describe()["layers"][0]["reason"] == "first choice on cuda"
    assert backend_after(attention, **padding) == "sdpa", "the latest batch decides"
    assert backend_after(planned(causal=False), **padding) == "triton"
    assert backend_after(planned(dense_kernel="cudnn"), **documents) == "sdpa"


@pytest.mark.parametrize("pattern", [Window(window=4), Strided(stride=4), Dense()], ids=lambda p: p.kind)
def test_heads_too_large_for_our_kernels_go_to_flex(pattern: Window | Strided | Dense) -> None:
    for head_dim, backend in ((128, "triton"), (129, "flex"), (256, "flex")):
        attention = planned(head_dim)
        attention.taps = Taps()  # dense layers too: SDPA has no log-sum-exp
        attention.set_patterns([pattern])
        (layer,) = attention.describe()["layers"]
        assert layer["backend"] == backend
        assert (f"heads of at most 128 dimensions, not {head_dim}" in layer["reason"]) == (backend == "flex")


def test_heads_too_large_for_our_kernels_are_refused_where_those_are_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"triton: .* at most 128 dimensions, not 160") as refused:
        planned(160).set_patterns([Window(window=4)], "triton")
    assert refused.value.hint == "use backend: auto"


def test_packed_dense_layers_with_heads_too_large_for_our_kernels_stay_with_sdpa() -> None:
    documents = (torch.arange(LENGTH) >= 9).int()[None]
    assert backend_after(planned(160), document_bs=documents) == "sdpa"
