"""Shapes and schedules of the paper's experiments, from z-lab/sparselora's `configs/sparsity/*.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loras_bench.methods.sparse_lora import SparseLoraConfig
from loras_bench.sparsity.criteria import Heads, LayerSparsity
from loras_bench.sparsity.flops import Shape

Layers = Mapping[str, Mapping[str, float]]

LLAMA2_7B = Shape(4096, 11008, Heads(32, 32, 128))
LLAMA2_13B = Shape(5120, 13824, Heads(40, 40, 128))
LLAMA3_8B = Shape(4096, 14336, Heads(32, 8, 128))


def feed_forward(sparsity: float, *ranges: str) -> dict[str, dict[str, float]]:
    return {key: {"feed_forward": sparsity} for key in ranges}


def attention(sparsity: float, *ranges: str) -> dict[str, dict[str, float]]:
    return {key: {"attention": sparsity} for key in ranges}


A11, A14 = ("17-19", "21-23", "25-29"), ("14-19", "21-23", "25-29")


@dataclass(frozen=True)
class Setting:
    """An experiment of the paper: its model, schedule and tokens, and the share of FLOPs that its tables print."""

    shape: Shape
    layer_count: int
    start: float
    layers: Layers
    context: int
    output: int
    printed: float

    def schedule(self) -> list[LayerSparsity]:
        """As our method reads it."""
        config = SparseLoraConfig.model_validate({"kind": "sparse_lora", "layers": self.layers, "start": self.start})
        return config.schedule(self.layer_count)


SETTINGS = {
    "llama2-7b-csr": Setting(LLAMA2_7B, 32, 0.05, feed_forward(0.9, "13-29") | attention(0.5, *A11), 509, 3, 0.65),
    "llama2-7b-math10k": Setting(
        LLAMA2_7B, 32, 0.05, feed_forward(0.9, "13-29") | attention(0.6, *A11), 384, 128, 0.73
    ),
    "llama2-7b-codefeedback": Setting(
        LLAMA2_7B, 32, 0.05, feed_forward(0.99, "3-30") | attention(0.25, *A14), 512, 512, 0.73
    ),
    "llama2-13b-csr": Setting(
        LLAMA2_13B, 40, 0.10, feed_forward(0.97, "13-36") | attention(0.2, "17-36"), 509, 3, 0.61
    ),
    "llama2-13b-math10k": Setting(
        LLAMA2_13B, 40, 0.05, feed_forward(0.97, "13-36") | attention(0.25, "17-36"), 384, 128, 0.70
    ),
    "llama3-8b-csr": Setting(LLAMA3_8B, 32, 0.05, feed_forward(0.97, "17-30") | attention(0.2, *A11), 509, 3, 0.65),
    "llama3-8b-math10k": Setting(
        LLAMA3_8B, 32, 0.05, feed_forward(0.99, "3-30") | attention(0.75, *A14), 384, 128, 0.46
    ),
    "llama3-8b-glue": Setting(
        LLAMA3_8B,
        32,
        0.05,
        feed_forward(0.95, "17-30") | feed_forward(0.5, "31") | attention(0.75, "17-29"),
        128,
        0,
        0.61,
    ),
    "llama3.1-8b-codefeedback": Setting(
        LLAMA3_8B, 32, 0.05, feed_forward(0.99, "3-30") | attention(0.4, *A14), 512, 512, 0.66
    ),
    "llama3.1-8b-wizardlm": Setting(
        LLAMA3_8B, 32, 0.05, feed_forward(0.99, "3-30") | attention(0.4, *A14), 1536, 512, 0.53
    ),
}
"""ARC-AGI's is left out: no table prints its FLOPs."""
