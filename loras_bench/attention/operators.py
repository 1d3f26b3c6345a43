"""Sparse attention by our Triton kernels, as `torch.library` operators with a gradient and FLOP formulas.

Loaded on first use, because Triton is not installed everywhere. Kernels: triton_forward.py and triton_backward.py;
schedules: schedule.py; sizes of tiles: tiles.py. A pattern of two parts (strided) is one operator: the second part
continues the online softmax of the first. That merge by log-sum-exp is exact but for one rounding of the first part's
results to the type of q.

Shapes: b samples, h query heads, g key heads, s length, d head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from loras_bench.attention.schedule import Part, Tiles
from loras_bench.attention.tiles import PRODUCTS, Kernel, TileChoice
from loras_bench.attention.triton_backward import key_gradient_kernel, query_gradient_kernel
from loras_bench.attention.triton_forward import forward_kernel

SMALLEST_DOT = 16
"""tl.dot takes no smaller dimension."""


class Launch(NamedTuple):
    """One kernel for one part of a pattern, as an operator can take it: five tensors and eight numbers."""

    items: Tensor
    tiles: Tensor
    counts: Tensor
    masks: Tensor
    order: Tensor
    """Empty where positions are tokens."""
    listed: int
    has_prefix: int
    parts: int
    """Parts of the tiles that are split over several programs."""
    queries: int
    keys: int
    warps: int
    stages: int
    owns: int
    """Rows of the tile that a program owns."""

    @classmethod
    def of(cls, part: Part, kernel: Kernel, choice: TileChoice, group: int) -> Launch:
        """The launch of a kernel whose tiles are chosen."""
        edges = Tiles(choice.queries, choice.keys)
        if kernel == "keys":
            edges = Tiles(choice.keys, choice.queries)
        visits = part.visits("keys" if kernel == "keys" else "queries", edges, group)
        order = visits.items.new_empty(0) if part.order is None else part.order
        return cls(
            visits.items, visits.tiles, visits.counts, visits.masks, order,
            int(part.listed), int(part.has_prefix), visits.parts, *choice, edges.rows,
        )  # fmt: skip

    def pairs(self, batch_size: int) -> int:
        """Pairs that the kernel computes for one head; waits for the device."""
        held = int(self.counts.sum(dtype=torch.int64)) * self.queries * self.keys
        return held * batch_size // len(self.counts)

    def arguments(self, q_bhsd: Tensor, k_bgsd: Tensor, scale: float) -> dict[str, Any]:
        """What all kernels take."""
        length, head_dim = q_bhsd.shape[2:]
        shared = [0 if len(table) == 1 else table.stride(0) for table in (self.tiles, self.counts, self.masks)]
        return {
            "items_ptr": self.items, "tiles_ptr": self.tiles, "counts_ptr": self.counts, "masks_ptr": self.masks,
            "order_ptr": self.order, "tiles_b": shared[0], "counts_b": shared[1], "masks_b": shared[2],
            "order_b": 0 if len(self.order) <= 1 else self.order.stride(0), "slots": self.tiles.shape[2],
            "length": length, "heads": q_bhsd.shape[1], "scale": scale,
            "GROUP": q_bhsd.shape[1] // k_bgsd.shape[1], "D": head_dim,
            "D_PAD": _padded(head_dim), "M": self.queries, "N": self.keys,
            "LISTED": bool(self.listed), "HAS_PREFIX": bool(self.has_prefix), "ORDERED": bool(self.order.numel()),
            "EVEN": length % max(self.queries, self.keys) == 0,
            "PRECISION": "ieee" if q_bhsd.dtype == torch.float32 else "tf32",
            "num_warps": self.warps, "num_stages": self.stages,
        }  # fmt: skip


def packed(launches: Sequence[Launch]) -> tuple[list[Tensor], list[int]]:
    """The launches of one kernel as an operator takes them."""
    tables = [table for launch in launches for table in launch[:5]]
    return tables, [number for launch in launches for number in launch[5:]]


def _unpack(tables: Sequence[Tensor], numbers: Sequence[int]) -> Iterator[Launch]:
    for index in range(len(tables) // 5):
        yield Launch(*tables[5 * index : 5 * index + 5], *numbers[8 * index : 8 * index + 8])  # type: ignore[arg-type]


def _padded(head_dim: int) -> int:
    """The head dimension as tl.dot takes it: a power of two, not too small."""
    size: int = triton.next_power_of_2(head_dim)
    return max(SMALLEST_DOT, size)


def _strides(tensor_bhsd: Tensor, name: str) -> dict[str, int]:
    if tensor_bhsd.stride(3) != 1:
        raise ValueError(f"the head dimension of {name} must be contiguous")
    if max(tensor_bhsd.shape[axis] * tensor_bhsd.stride(axis) for axis in (1, 2)) >= 2**31:
        raise ValueError(f"{name} is too long: the kernels count the elements of a sample in 32 bits")
    return dict(zip((f"{name}_b", f"{name}_h", f"{name}_s"), tensor_bhsd.stride()[:3], strict=True))


def _empty_bhsd(like_bhsd: Tensor) -> Tensor:
    """An uninitialised tensor of the same shape, laid out (b, s, h, d): heads of a token lie side by side."""
    batch, heads, length, head_dim = like_bhsd.shape
    return like_bhsd.new_empty(batch, length, heads, head_dim).transpose(1, 2)


@torch.library.custom_op("loras_bench::sparse_attention", mutates_args=())
def sparse_attention(
    q_bhsd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, tables: list[Tensor], numbers: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """out_bhsd and the natural log-sum-exp lse_bhs (float32; -inf and an output of 0 where no key is allowed)."""
    out_bhsd = _empty_bhsd(q_bhsd)
    batch, heads, length, _ = q_bhsd.shape
    lse_bhs = torch.empty(batch, heads, length, dtype=torch.float32, device=q_bhsd.device)
    strides = _strides(q_bhsd, "q") | _strides(k_bgsd, "k") | _strides(v_bgsd, "v") | _strides(out_bhsd, "o")
    for index, launch in enumerate(_unpack(tables, numbers)):
        forward_kernel[len(launch.items), heads, batch](
            q_bhsd, k_bgsd, v_bgsd, out_bhsd, lse_bhs, **strides, **launch.arguments(q_bhsd, k_bgsd, scale),
            CONTINUE=index > 0,
        )  # fmt: skip
    return out_bhsd, lse_bhs


@sparse_attention.register_fake
def _(
    q_bhsd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, tables: list[Tensor], numbers: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    return _empty_bhsd(q_bhsd), q_bhsd.new_empty(q_bhsd.shape[:3], dtype=torch.float32)


@torch.library.custom_op("loras_bench::sparse_attention_backward", mutates_args=())
def sparse_attention_backward(
    q_bhsd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, out_bhsd: Tensor, lse_bhs: Tensor, dout_bhsd: Tensor,
    dlse_bhs: Tensor | None, query_tables: list[Tensor], query_numbers: list[int], key_tables: list[Tensor],
    key_numbers: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq_bhsd, dk_bgsd and dv_bgsd from the gradients of out and of the log-sum-exp."""
    batch, heads, _, head_dim = q_bhsd.shape
    key_heads = k_bgsd.shape[1]
    dq_bhsd, dk_bgsd, dv_bgsd = _empty_bhsd(q_bhsd), _empty_bhsd(k_bgsd), _empty_bhsd(v_bgsd)
    delta_bhs = torch.empty_like(lse_bhs)
    strides = _strides(q_bhsd, "q") | _strides(k_bgsd, "k") | _strides(v_bgsd, "v") | _strides(dout_bhsd, "do")
    own = _strides(out_bhsd, "o") | _strides(dq_bhsd, "dq")
    for index, launch in enumerate(_unpack(query_tables, query_numbers)):
        query_gradient_kernel[len(launch.items), heads, batch](
            q_bhsd, k_bgsd, v_bgsd, out_bhsd, dout_bhsd, lse_bhs, lse_bhs if dlse_bhs is None else dlse_bhs, delta_bhs,
            dq_bhsd, **strides, **own, **launch.arguments(q_bhsd, k_bgsd, scale),
            CONTINUE=index > 0, HAS_DLSE=dlse_bhs is not None,
        )  # fmt: skip
    own = _strides(dk_bgsd, "dk") | _strides(dv_bgsd, "dv")
    for index, launch in enumerate(_unpack(key_tables, key_numbers)):
        size = batch * key_heads * launch.owns * _padded(head_dim)
        work = lse_bhs.new_empty(launch.parts * 2 * size)
        arrived = launch.items.new_zeros(batch * key_heads * len(launch.items) if launch.parts else 1)
        key_gradient_kernel[len(launch.items), key_heads, batch](
            q_bhsd, k_bgsd, v_bgsd, dout_bhsd, lse_bhs, delta_bhs, dk_bgsd, dv_bgsd, work, arrived,
            **strides, **own, **launch.arguments(q_bhsd, k_bgsd, scale),
            CONTINUE=index > 0, SPLIT=launch.parts > 0,
        )  # fmt: skip
    return dq_bhsd, dk_bgsd, dv_bgsd


@sparse_attention_backward.register_fake
def _(q_bhsd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_bhsd(q_bhsd), _empty_bhsd(k_bgsd), _empty_bhsd(v_bgsd)


@register_flop_formula(torch.ops.loras_bench.sparse_attention, get_raw=True)  # type: ignore[untyped-decorator]
def _forward_flops(
    q: Tensor, k: Tensor, v: Tensor, tables: list[Tensor], numbers: list[int], scale: float, **kwargs: Any
) -> int:
    """The forward kernel's products over the pairs of the visited tiles."""
    return PRODUCTS["forward"] * sum(_product_flops(q, launch) for launch in _unpack(tables, numbers))


@register_flop_formula(torch.ops.loras_bench.sparse_attention_backward, get_raw=True)  # type: ignore[untyped-decorator]
def _backward_flops(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
    query_tables: list[Tensor], query_numbers: list[int], key_tables: list[Tensor], key_numbers: list[int],
    scale: float, **kwargs: Any,
) -> int:  # fmt: skip
    """Those of the kernel of the queries and of that of the keys."""
    queries = sum(_product_flops(q, launch) for launch in _unpack(query_tables, query_numbers))
    keys = sum(_product_flops(q, launch) for launch in _unpack(key_tables, key_numbers))
    return PRODUCTS["queries"] * queries + PRODUCTS["keys"] * keys


def _product_flops(q_bhsd: Tensor, launch: Launch) -> int:
    """One product of all heads: 2 FLOPs for each pair and head dimension."""
    batch, heads, _, head_dim = q_bhsd.shape
    return 2 * launch.pairs(batch) * heads * head_dim


class SparseAttention(torch.autograd.Function):
    """The two operators as one differentiable function; the log-sum-exp takes a gradient too."""

    @staticmethod
    def forward(
        ctx: Any, q_bhsd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, launches: dict[Kernel, list[Launch]], scale: float
    ) -> tuple[Tensor, Tensor]:
        out_bhsd, lse_bhs = sparse_attention(q_bhsd, k_bgsd, v_bgsd, *packed(launches["forward"]), scale)
        ctx.save_for_backward(q_bhsd, k_bgsd, v_bgsd, out_bhsd, lse_bhs)
        ctx.launches, ctx.scale = launches, scale
        ctx.set_materialize_grads(False)
        return out_bhsd, lse_bhs

    @staticmethod
    def backward(ctx: Any, dout_bhsd: Tensor | None, dlse_bhs: Tensor | None) -> Any:
        q_bhsd, k_bgsd, v_bgsd, out_bhsd, lse_bhs = ctx.saved_tensors
        if dout_bhsd is None:
            dout_bhsd = torch.zeros_like(out_bhsd)
        if dout_bhsd.stride(3) != 1:
            dout_bhsd = dout_bhsd.contiguous()
        if dlse_bhs is not None:  # where no key is allowed nothing depends on q or k, whatever the loss makes of -inf
            dlse_bhs = dlse_bhs.masked_fill(lse_bhs.isinf(), 0).contiguous()
        grads = sparse_attention_backward(
            q_bhsd, k_bgsd, v_bgsd, out_bhsd, lse_bhs, dout_bhsd, dlse_bhs,
            *packed(ctx.launches["queries"]), *packed(ctx.launches["keys"]), ctx.scale,
        )  # fmt: skip
        return *grads, None, None
