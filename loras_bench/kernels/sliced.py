"""Products of linear groups where some tokens, the context, use only the channels that are kept (SparseLoRA).

Khaki et al. 2025 (arXiv 2506.16500, section 3) leave out outputs of q, k, v, gate and up, and inputs of o and down, of
the frozen weights alone; adapters stay whole. With M = [[W, B], [A, 0]] of the group (linear.py) and I the kept rows
(or columns) of W, context tokens are multiplied with M_I = [[W_I, B_I], [A, 0]] instead: one gathered copy, made in the
forward pass and kept for the backward pass, serves both. The tokens of a batch are ordered: dense ones first, then
context, so that every product reads and writes a piece of a matrix, and nothing is copied to tell them apart.

Outputs of context tokens are `narrow` (kept channels alone, for what reads no others) or whole: u B^T everywhere, the
base's part added at the kept channels. Inputs likewise: narrow rows hold kept channels alone; of whole ones the base
reads the kept channels and the adapter all. Gradients are exactly those of this network.

Kept channels are filled up with zeros to a multiple of 8, in gathered weights and in narrow rows (sliced_parts.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loras_bench.kernels.linear import LinearGroup, Packed, Slot, blocks_of, gradients_of
from loras_bench.kernels.sliced_parts import (
    Rows,
    collect,
    gathered_bias,
    gathered_columns,
    gathered_rows,
    outer,
    spread,
    with_low_rank,
)


def sliced_outputs(group: LinearGroup, x_tk: Tensor, dense: int, kept_c: Tensor, wants_output: bool = True) -> Tensor:
    """The group's outputs (tokens, n); the base's part only at the kept channels for context tokens.

    Args:
        group: Packed; its base weights are frozen.
        x_tk: Tokens, the dense ones first. What stood in its border is overwritten.
        dense: How many are dense.
        kept_c: int64, channels of the group's output side by side, each once.
        wants_output: As `LinearGroup` takes it.
    """
    facts = group.packed, group.slots, wants_output
    y: Sequence[Tensor] = _SlicedOutputs.apply(x_tk, dense, kept_c, False, *facts, *group.parameters)
    return y[0]


def narrow_outputs(group: LinearGroup, x_tk: Tensor, dense: int, kept_pc: Tensor) -> Rows:
    """As `sliced_outputs`, but of context tokens the kept channels alone: (dense, n) and (context, p * width).

    Args:
        group: As there.
        x_tk: As there.
        dense: As there.
        kept_pc: int64, p parts of so many channels; each part is filled up with zeros to `padded(c)` columns.
    """
    return Rows(*_SlicedOutputs.apply(x_tk, dense, kept_pc, True, group.packed, group.slots, True, *group.parameters))


def sliced_inputs(group: LinearGroup, x_tk: Tensor, dense: int, kept_c: Tensor, wants_output: bool = True) -> Tensor:
    """The group's outputs (tokens, n), where the base reads only the kept channels of context tokens.

    Args:
        group: As for `sliced_outputs`.
        x_tk: Tokens, the dense ones first. What stood in its border is overwritten.
        dense: How many are dense.
        kept_c: int64, channels of x, each once.
        wants_output: As `LinearGroup` takes it.
    """
    facts = group.packed, group.slots, wants_output
    y_tn: Tensor = _SlicedInputs.apply(x_tk, None, dense, kept_c, *facts, *group.parameters)
    return y_tn


def narrow_inputs(group: LinearGroup, x: Rows, kept_c: Tensor, wants_output: bool = True) -> Tensor:
    """As `sliced_inputs` for rows (dense, k) and (context, width): channels that are not kept are zero for context.

    The kept ones are filled up with zeros to `padded(c)` columns.
    """
    facts = group.packed, group.slots, wants_output
    y_tn: Tensor = _SlicedInputs.apply(*x, len(x.dense), kept_c, *facts, *group.parameters)
    return y_tn


class _SlicedOutputs(torch.autograd.Function):
    """Keeps x, u and the gathered matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        x_tk: Tensor,
        dense: int,
        kept: Tensor,
        narrow: bool,
        packed: Packed,
        slots: list[Slot],
        wants_output: bool,
        *_: Tensor,
    ) -> tuple[Tensor, ...]:
        kept_pc = kept.view(-1, kept.shape[-1])
        whole, gathered = packed.matrix.t(), gathered_rows(packed, kept_pc).t()
        x, u = with_low_rank([x_tk], dense, whole, gathered, packed)
        outputs = whole.shape[1] - packed.border
        biases = None if packed.bias_n is None else Rows(packed.bias_n, gathered_bias(packed.bias_n, kept_pc))
        _keep(ctx, dense, narrow, packed, slots, x, u, kept_pc, gathered)
        if not wants_output:
            return (x_tk.new_empty(len(x_tk), outputs),)
        kept_columns = gathered[:, : gathered.shape[1] - packed.border]
        return spread(x, u, whole[:, :outputs], kept_columns, None if narrow else kept_pc[0], biases)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        packed: Packed = ctx.packed
        *saved, kept_pc, gathered = ctx.saved_tensors
        whole, part, inputs = packed.matrix, gathered.t(), packed.matrix.shape[1] - packed.border
        dy, v = with_low_rank(dys, ctx.dense, whole, part, packed)
        dx_tk = None
        if ctx.wants_dx:
            dx_tk = collect(dy, v, whole[:, :inputs], part[:, :inputs], None if ctx.narrow else kept_pc[0])
        gradients = _adapter_gradients(ctx, saved, dy, v, kept_b=kept_pc if ctx.narrow else None)
        return dx_tk, None, None, None, None, None, None, *gradients


class _SlicedInputs(torch.autograd.Function):
    """Keeps x, u and the gathered matrix. Of narrow rows the first argument has the dense ones."""

    @staticmethod
    def forward(
        ctx: Any,
        x_tk: Tensor,
        context_sc: Tensor | None,
        dense: int,
        kept_c: Tensor,
        packed: Packed,
        slots: list[Slot],
        wants_output: bool,
        *_: Tensor,
    ) -> Tensor:
        whole, gathered = packed.matrix.t(), gathered_columns(packed, kept_c).t()
        xs = [x_tk] if context_sc is None else [x_tk, context_sc]
        x, u = with_low_rank(xs, dense, whole, gathered, packed)
        outputs, narrow = whole.shape[1] - packed.border, context_sc is not None
        biases = None if packed.bias_n is None else Rows(packed.bias_n, packed.bias_n)
        _keep(ctx, dense, narrow, packed, slots, x, u, kept_c, gathered)
        if not wants_output:
            return x_tk.new_empty(len(x.dense) + len(x.context), outputs)
        return collect(x, u, whole[:, :outputs], gathered[:, :outputs], None if narrow else kept_c, biases)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_tn: Tensor) -> tuple[Tensor | None, ...]:
        packed: Packed = ctx.packed
        *saved, kept_c, gathered = ctx.saved_tensors
        whole, part, inputs = packed.matrix, gathered.t(), packed.matrix.shape[1] - packed.border
        dy, v = with_low_rank([dy_tn], ctx.dense, whole, part, packed)
        dxs: tuple[Tensor | None, ...] = (None, None)
        if ctx.wants_dx:
            kept_columns = part[:, : part.shape[1] - packed.border]
            dxs = spread(dy, v, whole[:, :inputs], kept_columns, None if ctx.narrow else kept_c)
        gradients = _adapter_gradients(ctx, saved, dy, v, kept_a=kept_c[None] if ctx.narrow else None)
        return *(dxs if ctx.narrow else (dxs[0], None)), None, None, None, None, None, *gradients


def _keep(
    ctx: Any, dense: int, narrow: bool, packed: Packed, slots: list[Slot], x: Rows, u: Rows, kept: Tensor, m: Tensor
) -> None:
    """What the backward pass needs; the parameters are the last arguments of the function."""
    needed = ctx.needs_input_grad[-len(slots) :]
    ctx.wanted = blocks_of(slots, needed)
    if not ctx.wanted <= {"a", "b"}:
        raise RuntimeError("sliced products are for frozen base weights")
    ctx.wants_dx, ctx.needed = ctx.needs_input_grad[0], needed
    ctx.dense, ctx.narrow, ctx.packed, ctx.slots = dense, narrow, packed, slots
    # detached: autograd takes a write into the border of a view for a write into x, and would refuse to go on
    xs = [part.detach() for part in x] if "a" in ctx.wanted else [None, None]
    ctx.save_for_backward(*xs, *(u if "b" in ctx.wanted else [None, None]), kept, m)


def _adapter_gradients(
    ctx: Any,
    saved: Sequence[Tensor],
    dy: Rows,
    v: Rows,
    kept_a: Tensor | None = None,
    kept_b: Tensor | None = None,
) -> list[Tensor | None]:
    """The blocks dA = v^T x and dB = dy^T u; of narrow rows the columns are those of the kept channels."""
    x, u = Rows(*saved[:2]), Rows(*saved[2:])
    blocks = {}
    if "a" in ctx.wanted:
        blocks["a"] = outer(v, x, kept_a)
    if "b" in ctx.wanted:
        blocks["b"] = outer(u, dy, kept_b).t()
    return gradients_of(ctx.slots, ctx.needed, blocks)
