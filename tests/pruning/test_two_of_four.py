"""Two-of-four sparse layers: which they are, and that the sparse tensor cores give what dense products give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from training_fixtures import tiny, token_ids

from loras_bench.models.loading import LoadedModel
from loras_bench.pruning.blocks import linears_of
from loras_bench.pruning.masks import lowest
from loras_bench.pruning.savings import CudaBench, SavingsRunner
from loras_bench.pruning.semi_structured import is_two_of_four, two_of_four_linears, use_sparse_tensor_cores

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 256, "intermediate_size": 512},
    "gpt2": {"n_embd": 256, "n_inner": 512},
    "bert": {"hidden_size": 256, "intermediate_size": 512},
}
LINEARS = {"llama": 14, "gpt2": 8, "bert": 13}
"""Of two layers, and a pooler."""


def halved(model: Any) -> Any:
    """The two lowest of each four neighbours in all linear layers of the body are zero."""
    for matrix in linears_of(model, r"[^.]+"):
        weight_oi = matrix.by_outputs(matrix.weight.data)
        weight_oi[lowest(weight_oi.abs().reshape(-1, 4), 2).view_as(weight_oi)] = 0
    return model


@pytest.mark.parametrize(
    ("weight", "sparse"),
    [
        ([[1.0, 0, 2, 0], [0, 0, 3, 4]], True),
        ([[1.0, 0, 0, 0], [0, 0, 0, 0]], True),
        ([[1.0, 0, 2, 0], [0, 1, 3, 4]], False),
        ([[0.0, 1, 1, 1, 0, 0, 0, 1]], False),
        ([[0.0, 0, 0]], False),
    ],
)
def test_two_of_four_by_hand(weight: list[list[float]], sparse: bool) -> None:
    assert is_two_of_four(torch.tensor(weight)) is sparse


@pytest.mark.parametrize("family", SIZES)
def test_they_are_found_along_the_inputs_in_every_layout(family: str) -> None:
    model = tiny(family)
    assert two_of_four_linears(model) == []
    assert len(two_of_four_linears(halved(model))) == LINEARS[family]
    first = two_of_four_linears(model)[0]
    first.by_outputs(first.weight.data)[0, :3] = 1
    assert len(two_of_four_linears(model)) == LINEARS[family] - 1


def test_without_a_gpu_torch_refuses() -> None:
    model = halved(tiny("llama")).bfloat16()
    with pytest.raises(RuntimeError):
        use_sparse_tensor_cores(model, two_of_four_linears(model))


class TestOnGpu:
    pytestmark = ON_GPU

    @pytest.mark.parametrize("family", SIZES)
    def test_a_sparse_product_is_the_dense_one(self, family: str) -> None:
        model = halved(tiny(family, **SIZES[family])).to("cuda", torch.bfloat16)
        for matrix in two_of_four_linears(model):
            x_ni = torch.randn(3, 17, matrix.by_outputs(matrix.weight).shape[1], device="cuda", dtype=torch.bfloat16)
            dense, exact = matrix.module(x_ni), matrix.module.double()(x_ni.double())
            matrix.module.to(torch.bfloat16)
            use_sparse_tensor_cores(model, [matrix])
            sparse = model.get_submodule(matrix.name)(x_ni)
            assert (sparse - exact).norm() <= 1.5 * (dense - exact).norm() + 1e-3 * exact.norm()

    @pytest.mark.parametrize("family", SIZES)
    def test_a_sparse_model_is_the_masked_one(self, family: str) -> None:
        model, ids = halved(tiny(family, **SIZES[family])).to("cuda", torch.bfloat16).eval(), token_ids(4, 32).cuda()

        def logits() -> Tensor:
            with torch.no_grad():
                found: Tensor = model(input_ids=ids).logits.float()
            return found

        expected = logits()
        use_sparse_tensor_cores(model, two_of_four_linears(model))
        assert (logits() - expected).norm() < 0.02 * expected.norm()

    def test_its_latency_stands_beside_the_dense_one(self) -> None:
        model = halved(tiny("llama", **SIZES["llama"]))
        loaded = LoadedModel(model, "tiny", True, {}, None, {})
        with CudaBench(0) as bench:
            rows = {row.form: row for row in SavingsRunner(bench, 4, 64).run(loaded, None, print)}
        for form in ("dense", "masked", "2:4"):
            assert rows[form].reason is None and rows[form].times is not None, rows[form]
            assert rows[form].times.median_ms > 0
        assert rows["2:4"].flops < rows["masked"].flops == rows["dense"].flops
