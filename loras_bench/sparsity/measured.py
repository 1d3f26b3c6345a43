"""Channels that were scored once, by the true outputs of the model before its training.

SparseLoRA (Khaki et al. 2025, arXiv 2506.16500) estimates them anew for each batch. Which channels are large depends
far less on the batch than on the model and the kind of text (docs/sparse_lora.md), so that norms over a few serve
all, and nothing is estimated in a step. This criterion is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loras_bench.data.batches import inputs_of, real_tokens
from loras_bench.graphed import to_device
from loras_bench.sparsity.criteria import Heads, feed_forward_scores, query_key_scores
from loras_bench.sparsity.scoring import ScoredTokens, TrueOutputs


class MeasuredNorms:
    """Scores of channels that stay what `measure` found.

    Args:
        gate_up: By layer, the projections of its feed-forward part.
        qkv: By layer, those of its attention.
        heads: How attention's channels are numbered.
    """

    def __init__(self, gate_up: Mapping[int, TrueOutputs], qkv: Mapping[int, TrueOutputs], heads: Heads) -> None:
        self._gate_up, self._qkv, self._heads = gate_up, qkv, heads
        self._scores: dict[str, Tensor] = {}

    @torch.no_grad()
    def measure(self, base: Any, batches: Iterable[Mapping[str, Tensor]], tokens: int) -> None:
        """Read batches until there are enough tokens.

        Args:
            base: A Llama-like base model on its device, with transformers' forward pass.
            batches: On the CPU.
            tokens: Real ones.
        """
        squares: dict[str, Tensor] = {}
        real: dict[str, Tensor | None] = {}
        hooks = [
            module.register_forward_pre_hook(partial(self._read, layer, part, real, squares))
            for layer in self._gate_up
            for part, module in _readers(base.layers[layer])
        ]
        read, device = 0, next(base.parameters()).device
        for batch in batches:
            real_bs = real_tokens(batch)
            real["t"] = None if real_bs.all() else real_bs.flatten().to(device)
            base(**to_device(inputs_of(batch), device), use_cache=False)
            read += int(real_bs.sum())
            if read >= tokens:
                break
        for hook in hooks:
            hook.remove()
        for layer in self._gate_up:
            q_1n, k_1c, v_1c = (squares[f"{layer}.{name}"].sqrt()[None] for name in "qkv")
            self._scores[f"{layer}.pairs"] = query_key_scores(q_1n, k_1c, self._heads)
            self._scores[f"{layer}.values"] = v_1c[0]
            self._scores[f"{layer}.hidden"] = squares[f"{layer}.hidden"].sqrt()

    def _read(
        self, layer: int, part: str, real: Mapping[str, Any], squares: dict[str, Tensor], module: nn.Module, x: Any
    ) -> None:
        """Add the squares of what the projections make of a batch."""
        x_td, real_t = x[0].flatten(0, 1), real["t"]
        if part == "attention":
            norms = dict(zip("qkv", (one[0] for one in self._qkv[layer].norms(x_td, real_t)), strict=True))
        else:
            gate_tf, up_tf = self._gate_up[layer](x_td)
            norms = {"hidden": feed_forward_scores(gate_tf, up_tf, real_t)}
        for name, norm_c in norms.items():
            key = f"{layer}.{name}"
            squares[key] = norm_c.square() + squares[key] if key in squares else norm_c.square()

    def feed_forward(self, layer: int, x_td: Tensor, tokens: ScoredTokens) -> Tensor:
        return self._found(f"{layer}.hidden", x_td, self._gate_up[layer].width)

    def attention(self, layer: int, x_td: Tensor, tokens: ScoredTokens) -> tuple[Tensor, Tensor]:
        channels = self._heads.key * self._heads.size
        return self._found(f"{layer}.pairs", x_td, channels // 2), self._found(f"{layer}.values", x_td, channels)

    def _found(self, name: str, x_td: Tensor, count: int) -> Tensor:
        """What was measured; where only operations are counted, on the meta device, any scores will do.

        Raises:
            RuntimeError: Nothing was.
        """
        if x_td.device.type == "meta":
            return x_td.new_empty(count, dtype=torch.float32)
        if name not in self._scores:
            raise RuntimeError("criterion `measured`: `measure` comes before the first step")
        return self._scores[name]

    def state_dict(self) -> dict[str, Tensor]:
        """The scores, by layer and kind of channel."""
        return dict(self._scores)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put scores where those are that were measured: captured steps read them there."""
        for name, score_c in self._scores.items():
            score_c.copy_(state[name])


def _readers(layer: Any) -> list[tuple[str, nn.Module]]:
    """The parts of a decoder layer, and what reads the input of each first."""
    return [("attention", layer.self_attn.q_proj), ("feed_forward", layer.mlp)]
