"""How the channels of the layers of one model are scored in a step: by estimates, by true outputs, or at random.

Scores are the criteria of criteria.py; here is what they are taken from, in few and small operations: they run in every
layer of every step, before the products that they make smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loras_bench.graphed import pinned
from loras_bench.sparsity.criteria import Heads, feed_forward_scores, has_kernels, query_key_scores, value_scores
from loras_bench.sparsity.estimator import Factors

LARGEST_FUSED_RANK = 32
"""Of estimators whose scores our kernels compute: beyond it their tiles would not fit into registers."""


@dataclass(frozen=True)
class ScoredTokens:
    """The tokens (t) of a batch that have a say."""

    real_t: Tensor | None
    """bool, False for padding; None where every token is real."""
    mean_mt: Tensor
    """What makes the mean token of each sample m: 1 / its real tokens at each of them, else 0; the model's format."""


class Criterion(Protocol):
    """Scores of channels: the higher, the more a channel matters."""

    def feed_forward(self, layer: int, x_td: Tensor, tokens: ScoredTokens) -> Tensor:
        """Of hidden channels (f,), from the input of gate and up."""
        ...

    def attention(self, layer: int, x_td: Tensor, tokens: ScoredTokens) -> tuple[Tensor, Tensor]:
        """Of rotary pairs of q and k, and of value channels, from the input of q, k and v."""
        ...


class Outputs(Protocol):
    """Outputs of linear layers that read the same input, or what stands for them."""

    def __call__(self, x_td: Tensor) -> Sequence[Tensor]:
        """Of each layer (t, n)."""
        ...

    def norms(self, x_td: Tensor, real_t: Tensor | None) -> Sequence[Tensor]:
        """Over all real tokens, of each layer (1, n): one row that has the norms of all."""
        ...


class Estimates:
    """By low-rank factors W ~ up @ down of all layers, one below the other: `up` is block-diagonal, few zeros."""

    def __init__(self, factors: Sequence[Factors]) -> None:
        self._widths = [len(one.up_nr) for one in factors]
        self._down_rd = torch.cat([one.down_rk for one in factors])
        self._own_up_nr = torch.cat([one.up_nr for one in factors])
        self._up_nr = torch.block_diag(*(one.up_nr for one in factors))
        self._exact_up_nr = self._up_nr.float()

    def __call__(self, x_td: Tensor) -> Sequence[Tensor]:
        return torch.split(F.linear(self._low(x_td), self._up_nr), self._widths, dim=1)

    def norms(self, x_td: Tensor, real_t: Tensor | None) -> Sequence[Tensor]:
        """With z = x @ down.T, the norms of z @ up.T are the roots of the diagonal of up (z.T z) up.T: no (t, n)."""
        z_tr = self._low(x_td).float()
        if real_t is not None:
            z_tr = z_tr.masked_fill(~real_t[:, None], 0)
        squares_n = ((self._exact_up_nr @ (z_tr.t() @ z_tr)) * self._exact_up_nr).sum(1)
        return torch.split(squares_n.clamp(min=0).sqrt()[None], self._widths, dim=1)

    def fuse(self, x_td: Tensor) -> bool:
        """Whether the scores of gate and up, or of q, k and v, can be computed by our kernels."""
        return has_kernels(x_td.device.type) and self._own_up_nr.shape[1] <= LARGEST_FUSED_RANK

    def feed_forward_scores(self, x_td: Tensor, mean_mt: Tensor) -> Tensor:
        """`criteria.feed_forward_scores` of the mean tokens, where these are gate and up; without rounding in between.

        The mean of x down^T over tokens is that of x times down^T, and much smaller to make.
        """
        from loras_bench.kernels.channel_scores import feed_forward_scores as fused

        scores_f: Tensor = fused(self._low(x_td), mean_mt, self._own_up_nr)
        return scores_f

    def attention_scores(self, x_td: Tensor, real_t: Tensor | None, heads: Heads) -> tuple[Tensor, Tensor]:
        """`criteria.query_key_scores` and `criteria.value_scores`, where these are q, k and v."""
        from loras_bench.kernels.channel_scores import attention_scores as fused

        scores_p, scores_c = fused(self._low(x_td), real_t, self._own_up_nr, heads.query, heads.key)
        return scores_p, scores_c

    def _low(self, x_td: Tensor) -> Tensor:
        if (self._down_rd.device, self._down_rd.dtype) != (x_td.device, x_td.dtype):  # in the first pass only
            matrices = self._down_rd, self._own_up_nr, self._up_nr
            self._down_rd, self._own_up_nr, self._up_nr = (matrix.to(x_td) for matrix in matrices)
            self._exact_up_nr = self._exact_up_nr.to(x_td.device)
        return F.linear(x_td, self._down_rd)


class TrueOutputs:
    """Those of the frozen layers themselves: the paper's oracle."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._layers = layers

    @property
    def width(self) -> int:
        """Outputs of the first layer."""
        return self._layers[0].out_features

    def __call__(self, x_td: Tensor) -> Sequence[Tensor]:
        return [F.linear(x_td, layer.weight, layer.bias) for layer in self._layers]

    def norms(self, x_td: Tensor, real_t: Tensor | None) -> Sequence[Tensor]:
        return [value_scores(y_tn, real_t)[None] for y_tn in self(x_td)]


class OutputNorms:
    """The paper's criteria: L2 norms of the outputs of projections.

    Args:
        gate_up: By layer, of gate and up.
        qkv: By layer, of q, k and v.
        heads: How attention's channels are numbered.
        mean_token: Score the feed-forward layer by the mean token of each sample.
    """

    def __init__(
        self, gate_up: Mapping[int, Outputs], qkv: Mapping[int, Outputs], heads: Heads, mean_token: bool
    ) -> None:
        self._gate_up, self._qkv, self._heads, self._mean_token = gate_up, qkv, heads, mean_token

    def feed_forward(self, layer: int, x_td: Tensor, tokens: ScoredTokens) -> Tensor:
        real_t, outputs = tokens.real_t, self._gate_up[layer]
        if self._mean_token and isinstance(outputs, Estimates) and outputs.fuse(x_td):
            return outputs.feed_forward_scores(x_td, tokens.mean_mt)
        if self._mean_token:
            x_td, real_t = tokens.mean_mt @ x_td, None
        gate_tf, up_tf = outputs(x_td)
        return feed_forward_scores(gate_tf, up_tf, real_t)

    def attention(self, layer: int, x_td: Tensor, tokens: ScoredTokens) -> tuple[Tensor, Tensor]:
        outputs = self._qkv[layer]
        if isinstance(outputs, Estimates) and outputs.fuse(x_td):
            return outputs.attention_scores(x_td, tokens.real_t, self._heads)
        q_1n, k_1c, v_1c = outputs.norms(x_td, tokens.real_t)
        return query_key_scores(q_1n, k_1c, self._heads), v_1c[0]


class RandomScores:
    """Random channels, new ones in every step: a function of the step alone. For comparison.

    Args:
        sizes: Number of scores of each layer: hidden channels, rotary pairs, value channels.
        device: Where they are needed, asked for in each step.
    """

    def __init__(self, sizes: Mapping[int, tuple[int, int, int]], device: Callable[[], torch.device]) -> None:
        self._sizes, self._device = dict(sizes), device
        self._flat, self._scores = torch.empty(0), dict[int, tuple[Tensor, ...]]()

    def draw(self, step: int) -> None:
        """Write the scores of a step where those of the last one were: a captured step reads them there."""
        generator = torch.Generator().manual_seed(step)
        drawn = torch.rand(sum(map(sum, self._sizes.values())), generator=generator)
        if not self._scores or self._flat.device != self._device():
            self._flat = torch.empty_like(drawn, device=self._device())
            parts = self._flat.split([sum(sizes) for sizes in self._sizes.values()])
            self._scores = {
                layer: part.split(self._sizes[layer]) for layer, part in zip(self._sizes, parts, strict=True)
            }
        self._flat.copy_(pinned(drawn, self._flat.device), non_blocking=True)

    def feed_forward(self, layer: int, x_td: Tensor, tokens: ScoredTokens) -> Tensor:
        return self._scores[layer][0]

    def attention(self, layer: int, x_td: Tensor, tokens: ScoredTokens) -> tuple[Tensor, Tensor]:
        _, pairs, values = self._scores[layer]
        return pairs, values
