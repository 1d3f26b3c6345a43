"""FLOPs of a SparseLoRA step in closed form: the model behind the #FLOPs columns of the paper's tables.

Khaki et al. 2025 (arXiv 2506.16500) print shares of dense LoRA's FLOPs and no formula. The one here gives each of them
within 0.025 (tests/sparsity/test_step_flops.py). What a run reports is counted from executed operations instead
(loras_bench/metering/flops.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loras_bench.sparsity.criteria import DENSE, Heads, LayerSparsity, kept

ATTENTION = ("q", "k", "v", "o")
ESTIMATED = ("q", "k", "v", "gate", "up")


@dataclass(frozen=True)
class Shape:
    """The sizes of a layer of a Llama-like decoder."""

    hidden: int
    inner: int
    """Hidden width of the feed-forward layer."""
    heads: Heads

    def linears(self, sparsity: LayerSparsity = DENSE) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each projection of a layer, without the channels that are left out."""
        heads = self.heads
        inner = kept(self.inner, sparsity.feed_forward)
        k = 2 * heads.kept_pairs(sparsity.attention)
        v = kept(heads.key * heads.size, sparsity.attention)
        return {
            "q": (self.hidden, heads.group * k),
            "k": (self.hidden, k),
            "v": (self.hidden, v),
            "o": (heads.group * v, self.hidden),
            "gate": (self.hidden, inner),
            "up": (self.hidden, inner),
            "down": (inner, self.hidden),
        }


def step_flops(
    shape: Shape,
    layers: Sequence[LayerSparsity],
    context: int,
    output: int,
    lora_rank: int = 32,
    adapted: Sequence[str] = ATTENTION,
) -> float:
    """Forward and backward FLOPs of one sequence through the decoder layers.

    A token costs 2 with each weight, 2 more for the gradient of the layer's input, and with adapters' weights another 2
    for their own gradient. Causal attention runs over all tokens and all channels; its backward pass costs 2.5 times
    its forward pass (fused kernels recompute the scores). Estimators, norms and the output layer are left out.

    Args:
        shape: Of each layer.
        layers: The sparsities of each layer, as `SparseLoraConfig.schedule` gives them.
        context: Tokens that go through the sliced projections.
        output: Tokens that go through the dense ones.
        lora_rank: r; the paper's by default.
        adapted: The projections with adapters; the paper's by default.
    """
    tokens = context + output
    dense = shape.linears()
    adapters = tokens * 6 * lora_rank * sum(sum(dense[name]) for name in adapted)
    core = 3.5 * 4 * shape.heads.query * shape.heads.size * tokens * (tokens + 1) / 2
    sliced = sum(_weights(shape.linears(sparsity)) for sparsity in layers)
    return 4 * (context * sliced + output * len(layers) * _weights(dense)) + len(layers) * (adapters + core)


def training_ratio(shape: Shape, layers: Sequence[LayerSparsity], start: float, context: int, output: int) -> float:
    """FLOPs of a whole training as a share of dense LoRA's; the first `start` of its steps are dense.

    The arguments are those of `step_flops`; adapters are the paper's.
    """
    dense = step_flops(shape, [DENSE] * len(layers), context, output)
    return start + (1 - start) * step_flops(shape, layers, context, output) / dense


def estimator_weights(shape: Shape, rank: int) -> int:
    """Parameters of the estimators of one layer; a token that is estimated costs each of them 2 FLOPs."""
    linears = shape.linears()
    return rank * sum(sum(linears[name]) for name in ESTIMATED)


def _weights(linears: dict[str, tuple[int, int]]) -> int:
    return sum(inputs * outputs for inputs, outputs in linears.values())
