"""A pattern bound to the facts of a batch: the mask in the forms that backends need, each built once for all layers.

Shapes: b batch, q query position, k key position, s length, t number of 128 x 128 tiles along the length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from operator import or_
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loras_bench.attention.patterns import Dense, PatternBase
from loras_bench.errors import UserError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from loras_bench.attention.pattern import IntervalPart, Rule
    from loras_bench.attention.schedule import Part

TILE = 128
"""Edge of a tile: the granularity at which FlexAttention and fused dense kernels skip work."""
ELEMENTS_AT_ONCE = 2**24
"""Largest piece of a mask that is evaluated at once, in elements: bounds the memory of binding at long lengths."""


@dataclass(eq=False)
class AttentionBatch:
    """The facts of one batch that decide who attends to whom.

    A token attends within its document and never to padding; a padded query attends to nothing and yields 0. All
    tensors are (batch, length) on `device`.
    """

    length: int
    causal: bool
    device: torch.device
    padding_bs: Tensor | None = None
    """True at real tokens; None where nothing is padded."""
    document_bs: Tensor | None = None
    """Document number of each token, each document in one piece; None where each row is one document."""
    global_bs: Tensor | None = None
    """True at tokens that patterns with global tokens must treat as global."""
    input_ids_bs: Tensor | None = None
    """Token ids, for patterns that name their global tokens by id."""
    static_bindings: dict[tuple[PatternBase, int, torch.device], BoundPattern] = field(default_factory=dict, repr=False)
    """Bindings that depend on no sample; shared by all batches of one model."""
    _bindings: dict[PatternBase, BoundPattern] = field(default_factory=dict, init=False, repr=False)

    def bound(self, pattern: PatternBase) -> BoundPattern:
        """The pattern bound to this batch; bound once, whatever the number of layers."""
        if self.is_static(pattern):
            return self.bound_without_samples(pattern)
        if pattern not in self._bindings:
            self._bindings[pattern] = BoundPattern(pattern, self)
        return self._bindings[pattern]

    def bound_without_samples(self, pattern: PatternBase) -> BoundPattern:
        """The pattern bound to the length alone; bound once for the model."""
        key = (pattern, self.length, self.device)
        if key not in self.static_bindings:
            bare = replace(self, padding_bs=None, document_bs=None, global_bs=None, input_ids_bs=None)
            self.static_bindings[key] = BoundPattern(pattern, bare)
        return self.static_bindings[key]

    @cached_property
    def right_padding_bs(self) -> Tensor | None:
        """`padding_bs`, checked to be real tokens first, then padding: rows are then intervals, and need no mask."""
        if self.padding_bs is not None:
            holds = (self.padding_bs[:, 1:] <= self.padding_bs[:, :-1]).all()
            if self.device.type == "cpu" and not holds:
                raise UserError("attention got padding before real tokens", "pad on the right")
            torch._assert_async(holds, "attention needs padding on the right")  # does not wait for the GPU
        return self.padding_bs

    @property
    def packed(self) -> bool:
        """Whether a dense layer needs a mask: documents to keep apart, or padding that causality does not hide."""
        return self.document_bs is not None or (self.padding_bs is not None and not self.causal)

    @cached_property
    def documents_bs(self) -> tuple[Tensor, Tensor]:
        """First position and end (exclusive) of each token's document: int64 (b or 1, s), without waiting for the GPU.

        A document is a run of tokens with the same number; the padding at the end of a row is one of its own.
        """
        position_1s = torch.arange(self.length, device=self.device)[None]
        padding_bs = self.right_padding_bs if self.document_bs is None else self.padding_bs
        facts = [fact for fact in (self.document_bs, padding_bs) if fact is not None]
        if not facts:
            return torch.zeros_like(position_1s), torch.full_like(position_1s, self.length)
        starts = reduce(or_, [fact[:, 1:] != fact[:, :-1] for fact in facts])
        edge_b1 = torch.ones_like(facts[0][:, :1], dtype=torch.bool)
        first_bs = torch.where(torch.cat([edge_b1, starts], dim=1), position_1s, 0).cummax(dim=1).values
        ends = torch.where(torch.cat([starts, edge_b1], dim=1), position_1s + 1, self.length)
        return first_bs, ends.flip(1).cummin(dim=1).values.flip(1)

    def is_static(self, pattern: PatternBase) -> bool:
        """Whether the pattern's mask is the same for every sample of every batch of this length."""
        return self.padding_bs is None and self.document_bs is None and not pattern.reads_samples(self)


class BoundPattern:
    """One pattern for one batch. A static binding holds one mask for any number of samples."""

    def __init__(self, pattern: PatternBase, batch: AttentionBatch) -> None:
        self.pattern = pattern
        self.batch = batch
        self.static = batch.is_static(pattern)

    @property
    def samples(self) -> int:
        """Masks held: 1 for a static binding, the batch size otherwise."""
        facts = (self.batch.padding_bs, self.batch.document_bs, self.batch.global_bs, self.batch.input_ids_bs)
        return 1 if self.static else next(len(fact) for fact in facts if fact is not None)

    @cached_property
    def rule(self) -> Rule:
        """The pattern's rule; its tables depend on the length alone and are shared by all batches."""
        return self.pattern.rule(self.batch) if self.static else self.batch.bound_without_samples(self.pattern).rule

    @cached_property
    def mask_mod(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """allows(b, h, q, k) with causality, padding and documents, as FlexAttention calls it.

        The pattern's rule sees positions that count from the start of the document.
        """
        rule, causal = self.rule, self.batch.causal
        padding_bs = self.batch.padding_bs
        first_bs = None if self.batch.document_bs is None else self.batch.documents_bs[0]
        global_bs = self.pattern.sample_globals_bs(self.batch)

        def allows(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            allowed = rule(b, q, k) if first_bs is None else rule(b, q - first_bs[b, q], k - first_bs[b, k])
            if global_bs is not None:
                allowed = allowed | global_bs[b, q] | global_bs[b, k]
            if first_bs is not None:
                allowed = allowed & (first_bs[b, q] == first_bs[b, k])
            if causal:
                allowed = allowed & (k <= q)
            if padding_bs is not None:
                allowed = allowed & padding_bs[b, q] & padding_bs[b, k]
            return allowed

        return allows

    def mask_rows(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last` (exclusive): bool (b or 1, q, k); a causal model's without the keys from `last` on."""
        keys = last if self.batch.causal else self.batch.length
        device = self.batch.device
        b = torch.arange(self.samples, device=device, dtype=torch.int32)[:, None, None]
        q = torch.arange(first, last, device=device, dtype=torch.int32)[None, :, None]
        k = torch.arange(keys, device=device, dtype=torch.int32)[None, None, :]
        return self.mask_mod(b, torch.zeros_like(b), q, k).expand(self.samples, last - first, keys)

    def mask_tiles(self, tile: int, bytes_per_pair: int = 1) -> Iterator[Tensor]:
        """The mask in bands of rows, each cut into square tiles: bool (b or 1, row tiles, tile, key tiles, tile).

        What lies beyond the length is False. A band is as large as `ELEMENTS_AT_ONCE` allows for `bytes_per_pair`.
        """
        length = self.batch.length
        tiles = -(-length // tile)
        band = max(1, ELEMENTS_AT_ONCE // (bytes_per_pair * self.samples * tile * tiles * tile)) * tile
        for first in range(0, tiles * tile, band):
            rows = min(band, tiles * tile - first)
            mask = self.mask_rows(first, min(first + rows, length))
            mask = torch.nn.functional.pad(mask, (0, tiles * tile - mask.shape[2], 0, rows - mask.shape[1]))
            yield mask.reshape(self.samples, rows // tile, tile, tiles, tile)

    @cached_property
    def mask_bqk(self) -> Tensor:
        """The whole mask: bool (b or 1, q, k)."""
        return self.mask_rows(0, self.batch.length)

    @cached_property
    def safe_mask_b1qk(self) -> Tensor:
        """The mask with empty rows opened, for kernels whose softmax gives NaN there; their output is discarded."""
        return (self.mask_bqk | ~self.mask_bqk.any(dim=-1, keepdim=True))[:, None]

    @cached_property
    def tile_pairs_btt(self) -> Tensor:
        """Allowed pairs in each 128 x 128 tile: int32 (b or 1, t, t), evaluated in bands of rows, never as a whole."""
        counts = [
            blocks.sum(dim=4, dtype=torch.int32).sum(dim=2, dtype=torch.int32) for blocks in self.mask_tiles(TILE)
        ]
        return torch.cat(counts, dim=1)

    @property
    def interval_parts(self) -> tuple[IntervalPart, ...] | None:
        """The parts of a pattern whose rows are intervals, whatever the samples; None for all others."""
        return None if self.pattern.reads_samples(self.batch) else self.pattern.interval_parts(self.batch.causal)

    @cached_property
    def parts(self) -> list[Part]:
        """What our Triton kernels visit."""
        from loras_bench.attention.schedule import build_parts

        return build_parts(self)

    @cached_property
    def mean_keys(self) -> float:
        """Keys that a query sees on average in a whole sequence of this length."""
        return self.pattern.count_pairs(self.batch.length, self.batch.causal) / self.batch.length

    @cached_property
    def block_mask(self) -> BlockMask:
        """FlexAttention's index of tiles to visit, with full tiles apart so that they skip the mask."""
        from torch.nn.attention.flex_attention import BlockMask

        pairs = self.tile_pairs_btt[:, None]
        partial_count, partial_index = _ordered((pairs > 0) & (pairs < TILE * TILE))
        full_count, full_index = _ordered(pairs == TILE * TILE)
        return BlockMask.from_kv_blocks(
            partial_count,
            partial_index,
            full_count,
            full_index,
            BLOCK_SIZE=TILE,
            mask_mod=self.mask_mod,
            seq_lengths=(self.batch.length, self.batch.length),
        )

    @property
    def with_data(self) -> BoundPattern:
        """This binding, or on the meta device its equal on the CPU, whose tables can be read."""
        if self.batch.device.type != "meta":
            return self
        return replace(self.batch, device=torch.device("cpu")).bound(self.pattern)

    def allowed_pairs(self, batch_size: int) -> int:
        """Allowed pairs of one head, summed over the samples: real tokens only, within documents."""
        if self.static:
            return batch_size * self.pattern.count_pairs(self.batch.length, self.batch.causal)
        if self.interval_parts is not None:  # without a mask of length x length
            return sum(part.allowed_pairs() for part in self.with_data.parts)
        return int(self.tile_pairs_btt.sum(dtype=torch.int64))

    def dense_pairs(self, batch_size: int) -> int:
        """What dense attention would compute for the same batch: every (causal) pair of real tokens of a document."""
        return self.batch.bound(Dense()).allowed_pairs(batch_size)

    def visited_pairs(self, batch_size: int) -> int:
        """Pairs in the tiles that hold at least one allowed pair, whole tiles counted, summed over the samples."""
        visited = int((self.with_data.tile_pairs_btt > 0).sum()) * TILE * TILE
        return visited * batch_size if self.static else visited


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Number and column indices (chosen ones first) of the True entries of each row: int32, int32."""
    index = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True)
    return chosen.sum(dim=-1, dtype=torch.int32), index.to(torch.int32).contiguous()
