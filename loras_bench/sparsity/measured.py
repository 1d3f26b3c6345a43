"""Channels that were scored once, by the true outputs of the model before its training.

SparseLoRA (Khaki et al. 2025, arXiv 2506.16500) estimates them anew for each batch. Which channels are large depends
far less on the batch than on the model and the kind of text (docs/sparse_lora.md), so that norms over a few serve
all, and nothing is estimated in a step. This criterion is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loras_bench.data.batches import real_tokens
from loras_bench.graphed import to_device
from loras_bench.sparsity.scoring import OutputNorms, ScoredTokens

SCORES = ("hidden", "pairs", "values")


class MeasuredNorms:
    """Scores of channels that stay what `measure` found.

    Args:
        true: Scores by true outputs, all real tokens.
        layers: Those whose channels are asked for.
        sizes: Numbers of hidden channels, rotary pairs and value channels of a layer.
    """

    def __init__(self, true: OutputNorms, layers: Iterable[int], sizes: tuple[int, int, int]) -> None:
        self._true, self._layers = true, list(layers)
        self._sizes = dict(zip(SCORES, sizes, strict=True))
        self._squares: dict[str, Tensor] = {}

    @torch.no_grad()
    def measure(self, base: Any, run: Callable[[Mapping[str, Tensor]], Any], batches: Iterable[Mapping[str, Tensor]],
                tokens: int) -> None:  # fmt: skip
        """Read batches until there are enough tokens.

        Args:
            base: A Llama-like base model on its device, with transformers' forward pass.
            run: A forward pass of a batch on that device.
            batches: On the CPU.
            tokens: Real ones.
        """
        self._squares, real = {}, dict[str, Tensor | None]()
        hooks = [
            module.register_forward_pre_hook(partial(self._read, layer, part, real))
            for layer in self._layers
            for part, module in _readers(base.layers[layer])
        ]
        read, device = 0, next(base.parameters()).device
        for batch in batches:
            real_bs = real_tokens(batch)
            real["t"] = None if real_bs.all() else real_bs.flatten().to(device)
            run(to_device(dict(batch), device))
            read += int(real_bs.sum())
            if read >= tokens:
                break
        for hook in hooks:
            hook.remove()

    def _read(self, layer: int, part: str, real: Mapping[str, Any], module: nn.Module, inputs: tuple[Tensor]) -> None:
        tokens = ScoredTokens(real["t"], inputs[0].new_empty(0))
        x_td = inputs[0].flatten(0, 1)
        if part == "attention":
            pairs_p, values_c = self._true.attention(layer, x_td, tokens)
            found = {"pairs": pairs_p, "values": values_c}
        else:
            found = {"hidden": self._true.feed_forward(layer, x_td, tokens)}
        for name, scores_c in found.items():
            self._squares[f"{layer}.{name}"] = self._scores(layer, name, scores_c) + scores_c.square()

    def feed_forward(self, layer: int, x_td: Tensor, tokens: ScoredTokens) -> Tensor:
        return self._scores(layer, "hidden", x_td)

    def attention(self, layer: int, x_td: Tensor, tokens: ScoredTokens) -> tuple[Tensor, Tensor]:
        return self._scores(layer, "pairs", x_td), self._scores(layer, "values", x_td)

    def _scores(self, layer: int, name: str, like: Tensor) -> Tensor:
        """What was measured, or nothing: a dry run counts channels without a look at data."""
        found = self._squares.get(f"{layer}.{name}")
        return torch.zeros(self._sizes[name], device=like.device) if found is None else found

    def state_dict(self) -> dict[str, Tensor]:
        """The scores, by layer and part."""
        return dict(self._squares)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put scores where those are that were measured: captured steps read them there."""
        for name, squares_c in self._squares.items():
            squares_c.copy_(state[name])


def _readers(layer: Any) -> list[tuple[str, nn.Module]]:
    """The parts of a decoder layer, and what reads the input of each first."""
    return [("attention", layer.self_attn.q_proj), ("feed_forward", layer.mlp)]
