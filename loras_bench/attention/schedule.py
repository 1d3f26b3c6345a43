"""Which tiles a kernel visits: a bound pattern turned into the int32 tables that the Triton kernels read.

A pattern whose rows are intervals (window, dense, blocks, residue classes, documents) gives the bounds of each row, and
the runs of tiles follow from arithmetic. Any other pattern gives lists of tiles and one bit a pair for the tiles that
need a mask. Everything is computed on the batch's device, and for batches of documents without waiting for it.

Shapes: b samples (1 where all share the schedule), s positions, t tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from loras_bench.attention.tiles import LIST_TILE

if TYPE_CHECKING:
    from collections.abc import Callable

    from loras_bench.attention.binding import AttentionBatch, BoundPattern
    from loras_bench.attention.pattern import Bounds, IntervalPart

NEVER = 2**30
ITEM_VISITS = 64
"""A tile of keys with more visits than this is split over several programs, unless all tiles have as many."""


@dataclass(frozen=True)
class Tiles:
    """Tiles of a kernel: the edge of what a program owns, and of what it visits."""

    rows: int
    columns: int


@dataclass(eq=False)
class Visits:
    """One kernel's work: `tiles` holds runs (b, t, 5) or lists (b, t, slots), `masks` bounds (b, 4, s) or bits."""

    items: Tensor
    """(n, 6): tile, first and last visit (-1: all), parts, first part, index; the longest first where it is known."""
    tiles: Tensor
    counts: Tensor
    """(b, t, 2): visited tiles that need a mask, and full ones."""
    masks: Tensor
    parts: int
    """Parts of all split tiles."""


class Part:
    """A part of a bound pattern: what its queries and its keys visit, for any size of tiles.

    Args:
        key_bounds: Key intervals of each query, int32 (b, 4, s), or None for an irregular pattern.
        query_bounds: Query intervals of each key.
        bits: One word for 64 keys of each query, int64 (b, t, t, 64), for an irregular pattern.
        order: Token at each position of the schedule, int32 (b, s); None where positions are tokens.
        waits: Whether the schedule may wait for the device: it is the same for all samples (b = 1) and is made once.
    """

    def __init__(
        self,
        key_bounds: Tensor | None,
        query_bounds: Tensor | None,
        bits: Tensor | None,
        order: Tensor | None,
        has_prefix: bool,
        waits: bool,
    ) -> None:
        self.bits, self.order, self.has_prefix, self.waits = bits, order, has_prefix, waits
        self._bounds = {"queries": key_bounds, "keys": query_bounds}
        self._visits: dict[tuple[str, Tiles, int], Visits] = {}

    def allowed_pairs(self) -> int:
        """Allowed pairs of one head, all held samples, of an interval pattern; waits for the device."""
        bounds = self._bounds["queries"]
        assert bounds is not None
        lengths = (bounds[:, 1::2] - bounds[:, 0::2]).clamp(min=0)
        return int(lengths.sum(dtype=torch.int64))

    @property
    def listed(self) -> bool:
        return self.bits is not None

    def visits(self, side: str, tiles: Tiles, group: int = 1) -> Visits:
        """What the tiles of one side (`queries` or `keys`) visit; `group` times over in the kernel of the keys."""
        key = (side, tiles, group)
        if key not in self._visits:
            self._visits[key] = self._make(side, tiles, group)
        return self._visits[key]

    def _make(self, side: str, tiles: Tiles, group: int) -> Visits:
        if self.bits is not None:
            assert tiles == Tiles(LIST_TILE, LIST_TILE)
            tables, counts = self._lists(side)
            masks = self.bits
        else:
            bounds = self._bounds[side]
            assert bounds is not None
            (tables, counts), masks = tile_runs(bounds, tiles), bounds
        items, parts = self._items(counts.sum(dim=2), group if side == "keys" else 0)
        return Visits(items, tables, counts, masks, parts)

    def _lists(self, side: str) -> tuple[Tensor, Tensor]:
        """The tiles that each tile visits, those with a mask first, then full ones; and the numbers of both."""
        assert self.bits is not None
        some, full = (self.bits != 0).any(dim=3), (self.bits == -1).all(dim=3)
        if side == "keys":
            some, full = some.transpose(1, 2), full.transpose(1, 2)
        counts = torch.stack([(some & ~full).sum(dim=2), full.sum(dim=2)], dim=-1).to(torch.int32)
        rank = some.to(torch.int8) + (some & ~full).to(torch.int8)
        order = torch.argsort(rank, dim=2, descending=True, stable=True).to(torch.int32)
        slots = max(1, int(counts.sum(dim=2).max())) if self.waits else order.shape[2]
        return order[..., :slots].contiguous(), counts.contiguous()

    def _items(self, counts: Tensor, group: int) -> tuple[Tensor, int]:
        """The programs' work, longest first; tiles with far more visits than the others are split."""
        if not self.waits:
            index = torch.arange(counts.shape[1], device=counts.device, dtype=torch.int32)
            whole = torch.stack([index, 0 * index, 0 * index - 1, 0 * index + 1, 0 * index, 0 * index], dim=1)
            return whole, 0
        visits = counts[0].cpu() * max(group, 1)  # all samples share the schedule
        chunk = max(ITEM_VISITS, 2 * int(visits.median()))
        items: list[tuple[int, list[int]]] = []
        parts = 0
        for tile, total in enumerate(visits.tolist()):
            pieces = -(-total // chunk) if group else 1
            if pieces <= 1:
                items.append((total, [tile, 0, -1, 1, 0, 0]))
                continue
            for piece in range(pieces):
                end = min(total, (piece + 1) * chunk)
                items.append((end - piece * chunk, [tile, piece * chunk, end, pieces, parts, piece]))
            parts += pieces
        items.sort(key=lambda item: -item[0])
        return torch.tensor([item for _, item in items], dtype=torch.int32, device=counts.device), parts


def tile_runs(bounds_b4s: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """The two runs of column tiles that each tile of rows visits, and which of the second run need no mask.

    Returns:
        int32 (b, t, 5): first tile and number of tiles of the first run, first tile of the second run, first and end
        of its full tiles; int32 (b, t, 2): number of tiles that need a mask, and of full ones.
    """
    samples, _, length = bounds_b4s.shape
    count = -(-length // tiles.rows)
    spare = count * tiles.rows - length
    first, end = F.pad(bounds_b4s, (0, spare)).view(samples, 2, 2, count, tiles.rows).unbind(dim=2)
    some = end > first
    low = torch.where(some, first, NEVER).amin(dim=-1) // tiles.columns
    high = (torch.where(some, end, 0).amax(dim=-1) + tiles.columns - 1) // tiles.columns
    (low_a, low_b), (high_a, high_b) = low.unbind(dim=1), high.unbind(dim=1)
    # Rows of two documents may have their first intervals beyond the second ones of others: then one run holds all.
    mixed = (low_b < low_a) & (high_a > low_a)
    low_a, high_a = torch.where(mixed, 0, low_a), torch.where(mixed, 0, high_a)
    high_b = torch.where(mixed, torch.maximum(high_b, high[:, 0]), high_b)
    number_a = (high_a - low_a).clamp(min=0)
    low_b = torch.where(number_a > 0, torch.maximum(low_b, high_a), low_b)
    number_b = (high_b - low_b).clamp(min=0)
    beyond = torch.arange(count * tiles.rows, device=end.device).view(count, tiles.rows) >= length  # may be anything
    end_b = low_b + number_b
    full_low = torch.maximum(-(-first[:, 1].amax(dim=-1) // tiles.columns), low_b)
    full_end = torch.minimum(torch.where(beyond, NEVER, end[:, 1]).amin(dim=-1) // tiles.columns, end_b)
    full_low = torch.where(full_end > full_low, full_low, end_b)
    full_end = torch.maximum(full_end, full_low)
    number_full = full_end - full_low
    runs = torch.stack([low_a, number_a, low_b, full_low, full_end], dim=-1)
    counts = torch.stack([number_a + number_b - number_full, number_full], dim=-1)
    return runs.to(torch.int32).contiguous(), counts.to(torch.int32).contiguous()


def build_parts(bound: BoundPattern) -> list[Part]:
    """The schedule of a bound pattern: one part, or two whose results are merged by their log-sum-exp."""
    batch = bound.batch
    waits = bound.static
    if bound.interval_parts is None:
        return [Part(None, None, packed_mask(bound), None, False, waits)]
    return [_interval_part(part, batch, waits) for part in bound.interval_parts]


def _interval_part(part: IntervalPart, batch: AttentionBatch, waits: bool) -> Part:
    start_bs, end_bs = batch.documents_bs
    position = torch.arange(batch.length, device=batch.device)[None] - start_bs
    size = end_bs - start_bs
    order = None
    if part.step > 1:
        remainder, position = position % part.step, position // part.step
        # a document's residue classes follow each other; the first `size % step` of them are longer by one
        start_bs = start_bs + remainder * (size // part.step) + torch.minimum(remainder, size % part.step)
        size = (size - remainder + part.step - 1) // part.step
        place = start_bs + position
        tokens = torch.arange(batch.length, device=batch.device).expand_as(place)
        order = torch.empty_like(place).scatter_(1, place, tokens)

    def absolute(rule: Callable[[Tensor, Tensor], Bounds]) -> tuple[Tensor, bool]:
        edges = rule(position, size)
        bounds = [start_bs + edge for edge in edges]
        if batch.padding_bs is not None:
            bounds = [torch.where(batch.padding_bs, edge, 0) for edge in bounds]
        if order is not None:
            bounds = [edge.gather(1, order) for edge in bounds]
        return torch.stack(bounds, dim=1).to(torch.int32).contiguous(), not isinstance(edges[1], int)

    keys, keys_prefix = absolute(part.keys)
    queries, queries_prefix = absolute(part.queries)
    compact = None if order is None else order.to(torch.int32).contiguous()
    return Part(keys, queries, None, compact, keys_prefix or queries_prefix, waits)


def packed_mask(bound: BoundPattern) -> Tensor:
    """The whole mask, one bit a pair: int64 (b, query tiles, key tiles, 64), bit k of a word for key k of the tile."""
    bit = torch.arange(LIST_TILE, device=bound.batch.device)
    weights = torch.ones_like(bit) << bit
    bands = bound.mask_tiles(LIST_TILE, bytes_per_pair=weights.element_size())
    return torch.cat([(blocks * weights).sum(dim=4).transpose(2, 3) for blocks in bands], dim=1).contiguous()
