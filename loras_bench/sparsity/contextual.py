"""The contextual sparsity of one model: which tokens of a batch are context, and which channels of a layer they use.

One set of channels a layer and batch, for all its context tokens (SparseLoRA, Khaki et al. 2025, arXiv 2506.16500,
section 3). Everything is computed on the device and has sizes that the host knows, so that captured steps choose anew
in every replay. Forward passes (models/fused_llama.py, models/sliced_llama.py) ask for it; methods/sparse_lora.py makes
it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loras_bench.attention.binding import AttentionBatch
from loras_bench.sparsity.criteria import Heads, LayerSparsity, kept, select
from loras_bench.sparsity.scoring import Criterion, ScoredTokens

BATCH_TENSORS = ("dense_rows", "sparse_rows", "samples")
"""What `SparseLora.batch_tensors` puts into a batch, and the model's own forward pass does not know."""


@dataclass(frozen=True)
class BatchTokens:
    """The tokens (t) of a batch laid one after the other, dense ones first, then context."""

    dense: int
    """How many are dense."""
    order_t: Tensor | None
    """int64, where each stands in the batch; None where all are context, in the order of the batch."""
    place_t: Tensor | None
    """Its inverse."""
    scored: ScoredTokens
    """Those that have a say in what is kept, in the same order."""


class AttentionChannels(NamedTuple):
    """Kept outputs of q, k and v, and kept inputs of o: int64 indices, each once."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    qkv: Tensor
    """Kept outputs of q, k and v side by side, in any order."""


class ContextualSparsity:
    """What the forward passes of one model ask: `tokens` of the batch under way, and the channels of each layer.

    Args:
        schedule: The sparsity of each layer.
        heads: How attention's channels are numbered.
        criterion: Scores channels.
        all_tokens: Every token is context; else `dense_rows` and `sparse_rows` come with each batch.
    """

    def __init__(self, schedule: Sequence[LayerSparsity], heads: Heads, criterion: Criterion, all_tokens: bool) -> None:
        self.schedule, self.heads, self.criterion, self.all_tokens = list(schedule), heads, criterion, all_tokens
        self._hidden: dict[torch.device, Tensor] = {}
        self._belonging: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.active = True
        """Whether training steps are sparse now."""
        self.tokens: BatchTokens | None = None
        """Of the batch under way; None where all its tokens are dense. It stays until the next forward pass, for layers
        that are computed again in the backward pass."""

    def install(self, base: Any) -> Callable[[], None]:
        """Listen to a base model with `ModelAttention`; returns what ends it."""
        base.model_sparsity = self
        handle = base.register_forward_pre_hook(self._announce, with_kwargs=True)

        def remove() -> None:
            handle.remove()
            del base.model_sparsity

        return remove

    @staticmethod
    def of(base: nn.Module) -> ContextualSparsity | None:
        """The sparsity that was installed in a base model, if any."""
        return getattr(base, "model_sparsity", None)

    @torch.no_grad()
    def feed_forward(self, layer: int, x_td: Tensor, tokens: BatchTokens) -> Tensor | None:
        """Kept hidden channels for the input of gate and up, in ascending order; None: all.

        Returns:
            int64 (2, c): outputs of gate, and the same of up behind all those of gate.
        """
        if not (sparsity := self.schedule[layer].feed_forward):
            return None
        scores_f = self.criterion.feed_forward(layer, x_td.detach(), tokens.scored)
        if x_td.device not in self._hidden:
            self._hidden[x_td.device] = torch.arange(2 * len(scores_f), device=x_td.device).view(2, -1)
        return select([scores_f], [kept(len(scores_f), sparsity)], [self._hidden[x_td.device]]).view(2, -1)

    @torch.no_grad()
    def attention(self, layer: int, x_td: Tensor, tokens: BatchTokens) -> AttentionChannels | None:
        """Kept channels for the input of q, k and v; None: all."""
        if not (sparsity := self.schedule[layer].attention):
            return None
        scores = self.criterion.attention(layer, x_td.detach(), tokens.scored)
        pairs, values = self.heads.kept_pairs(sparsity), kept(len(scores[1]), sparsity)
        if x_td.device not in self._belonging:
            self._belonging[x_td.device] = self._tables(x_td.device)
        chosen = select(scores[::-1], [values, pairs], self._belonging[x_td.device])
        group = self.heads.group
        value_c, output_c, _, query_c, _, key_c = chosen.split(
            [values, group * values, values, 2 * group * pairs, 2 * pairs, 2 * pairs]
        )
        qkv_c = chosen[(1 + group) * values : len(chosen) - 2 * pairs]
        return AttentionChannels(query_c, key_c, value_c, output_c, qkv_c)

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """What belongs to each value channel (G + 2, c) and to each rotary pair (2 G + 4, p), in the order of `select`.

        Of a value channel: itself, inputs of o, itself behind all outputs of q and k; of a pair: outputs of q, those of
        k behind them, those of k. So what is kept of q, k and v side by side is one piece of what is selected.
        """
        heads, channels = self.heads, self.heads.key * self.heads.size
        value_c = torch.arange(channels, device=device)
        key_c = heads.pair_channels(torch.arange(channels // 2, device=device))
        behind_q = heads.query * heads.size
        of_values = [value_c, heads.query_channels(value_c), value_c + behind_q + channels]
        of_pairs = [heads.query_channels(key_c), key_c + behind_q, key_c]
        return torch.cat(of_values).view(-1, channels), torch.cat(of_pairs).view(-1, channels // 2)

    def _announce(
        self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of the base model, after that of `ModelAttention`: reads and removes what is not its own."""
        rows = {name: kwargs.get(name) for name in BATCH_TENSORS}
        kwargs = {name: value for name, value in kwargs.items() if name not in BATCH_TENSORS}
        self.tokens = None
        if self.active and base.training and any(map(any, self.schedule)):
            count = (kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]).shape[0]
            self.tokens = self._tokens(kwargs["attention_batch"], count, next(base.parameters()).dtype, **rows)
        return args, kwargs

    def _tokens(
        self,
        batch: AttentionBatch,
        rows: int,
        dtype: torch.dtype,
        dense_rows: Tensor | None,
        sparse_rows: Tensor | None,
        samples: Tensor | None,
    ) -> BatchTokens | None:
        """The tokens of a batch of so many rows; None where all are dense."""
        if not self.all_tokens and (dense_rows is None or sparse_rows is None or not len(sparse_rows)):
            return None
        order_t = place_t = None
        count_t = torch.arange(rows * batch.length, device=batch.device)
        if dense_rows is not None and sparse_rows is not None and len(dense_rows) and not self.all_tokens:
            order_t = torch.cat([dense_rows, sparse_rows])
            place_t = torch.empty_like(order_t).scatter_(0, order_t, count_t)
        sample_t = count_t // batch.length
        if samples is None:
            samples = torch.arange(rows, device=batch.device)
        elif batch.document_bs is not None:
            sample_t = batch.document_bs.flatten()
        real_t = None if batch.padding_bs is None else batch.padding_bs.flatten()
        if order_t is not None:
            sample_t = sample_t.index_select(0, order_t)
            real_t = None if real_t is None else real_t.index_select(0, order_t)
        scored = ScoredTokens(real_t, _mean_weights(sample_t, samples, real_t).to(dtype))
        return BatchTokens(0 if order_t is None or dense_rows is None else len(dense_rows), order_t, place_t, scored)


@torch.no_grad()
def _mean_weights(sample_t: Tensor, samples: Tensor, real_t: Tensor | None) -> Tensor:
    """(samples, tokens): 1 / count at the real tokens of each sample, 0 elsewhere."""
    member_mt = sample_t == samples[:, None]
    if real_t is not None:
        member_mt = member_mt & real_t
    return member_mt / member_mt.sum(1, keepdim=True).clamp(min=1)
