"""What sliced products (sliced.py) are made of: gathered matrices, and products with parts of them, by rows.

The way back of a product is the way forward through the transposed matrix: `spread` and `collect` serve both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loras_bench.kernels.bordered import bordered
from loras_bench.kernels.linear import Packed, low_rank

CHANNEL_MULTIPLE = 8
"""16 bytes in bfloat16: the unit in which tensor cores are fed."""


class Rows(NamedTuple):
    """The rows of dense tokens and those of context tokens."""

    dense: Tensor
    context: Tensor


def padded(count: int) -> int:
    """Columns that so many kept channels take."""
    return -(-count // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE


def gathered_rows(packed: Packed, kept_pc: Tensor) -> Tensor:
    """M_I (p * width + r, k + r) for kept rows of W: with their rows of B, and A below."""
    outputs, width = len(packed.matrix) - packed.border, padded(kept_pc.shape[1])
    gathered = packed.matrix.new_empty(kept_pc.shape[0] * width + packed.border, packed.matrix.shape[1])
    for part, kept_c in zip(gathered.split(width), kept_pc, strict=False):
        torch.index_select(packed.matrix, 0, kept_c, out=part[: len(kept_c)])
        part[len(kept_c) :].zero_()
    gathered[len(gathered) - packed.border :] = packed.matrix[outputs:]
    return gathered


def gathered_bias(bias_n: Tensor, kept_pc: Tensor) -> Tensor:
    """Biases (p * width) of the rows of `gathered_rows`."""
    fill = padded(kept_pc.shape[1]) - kept_pc.shape[1]
    return F.pad(bias_n.index_select(0, kept_pc.flatten()).view_as(kept_pc), (0, fill)).flatten()


def gathered_columns(packed: Packed, kept_c: Tensor) -> Tensor:
    """M_I (n + r, width + r) for kept columns of W: with their columns of A, and B at the right."""
    return _gathered(packed.matrix, kept_c, packed.matrix[:, packed.matrix.shape[1] - packed.border :])


def _gathered(x_tk: Tensor, kept_c: Tensor, u_tr: Tensor) -> Tensor:
    """[x_I | 0 | u] (t, width + r), rows aligned."""
    rank, count, width = u_tr.shape[1], len(kept_c), padded(len(kept_c))
    kept_tc = bordered(len(x_tk), width, rank, x_tk)
    both = kept_tc.as_strided((len(x_tk), width + rank), kept_tc.stride())
    torch.index_select(x_tk, 1, kept_c, out=both[:, :count])
    both[:, count:width] = 0
    both[:, width:] = u_tr
    return both


def with_low_rank(xs: Sequence[Tensor], dense: int, whole: Tensor, part: Tensor, packed: Packed) -> tuple[Rows, Rows]:
    """Rows of x and u = s x A^T (or dy and v = s dy B); `whole` and `part` are M and M_I, or both transposed.

    One product u where the rows are one matrix, of whole channels.
    """
    matrices = [whole] if len(xs) == 1 else [whole, part]
    found = [low_rank(x, m, packed) for x, m in zip(xs, matrices, strict=True)]
    us = [x.new_empty(len(x), 0) if u is None else u for x, u in zip(xs, found, strict=True)]
    return (_split(xs[0], dense), _split(us[0], dense)) if len(xs) == 1 else (Rows(*xs), Rows(*us))


def _split(x_tk: Tensor, dense: int) -> Rows:
    return Rows(x_tk[:dense], x_tk[dense:])


def spread(
    x: Rows, u: Rows, whole: Tensor, part: Tensor, kept_c: Tensor | None, biases: Rows | None = None
) -> tuple[Tensor, ...]:
    """[x | u] times the whole matrix (k + r, n) for dense rows, and for context a part (k + r, width) of its columns.

    Returns:
        (dense, n) and (context, width); where the kept columns' places are given, one matrix (tokens, n) that has those
        of context there, and u B^T elsewhere.
    """
    dense, context, width = len(x.dense), len(x.context), whole.shape[1]
    kept_sc = bordered(context, part.shape[1], 0, x.context)
    _product(x.context, u.context, part, kept_sc, biases and biases.context)
    if kept_c is None:
        return _product(x.dense, u.dense, whole, x.dense.new_empty(dense, width), biases and biases.dense), kept_sc
    y_tn = x.dense.new_empty(dense + context, width)
    y = _split(y_tn, dense)
    _product(x.dense, u.dense, whole, y.dense, biases and biases.dense)
    torch.mm(u.context, whole[x.context.shape[1] :], out=y.context)
    y.context.index_copy_(1, kept_c, kept_sc[:, : len(kept_c)])
    return (y_tn,)


def collect(x: Rows, u: Rows, whole: Tensor, part: Tensor, kept_c: Tensor | None, biases: Rows | None = None) -> Tensor:
    """[x | u] times the whole matrix (k + r, n) for dense rows, and for context a part (width + r, n) of its rows.

    Where the places of kept channels are given, context rows are whole: their kept channels are gathered first.
    """
    y_tn = x.dense.new_empty(len(x.dense) + len(x.context), whole.shape[1])
    y = _split(y_tn, len(x.dense))
    _product(x.dense, u.dense, whole, y.dense, biases and biases.dense)
    if kept_c is None:
        _product(x.context, u.context, part, y.context, biases and biases.context)
    else:
        both = _gathered(x.context, kept_c, u.context)
        _product(both, both[:, :0], part, y.context, biases and biases.context)
    return y_tn


def _product(x_tk: Tensor, u_tr: Tensor, m: Tensor, out: Tensor, bias_n: Tensor | None) -> Tensor:
    """[x | u] m + bias: one product where u lies beside x, else a second one adds that of u."""
    first = _joined(x_tk, u_tr)
    both = first is not None
    x_tk = x_tk if first is None else first
    rows = m if both else m[: x_tk.shape[1]]
    if bias_n is None:
        torch.mm(x_tk, rows, out=out)
    else:
        torch.addmm(bias_n, x_tk, rows, out=out)
    return out if both else torch.addmm(out, u_tr, m[x_tk.shape[1] :], out=out)


def _joined(x_tk: Tensor, u_tr: Tensor) -> Tensor | None:
    """The matrix [x | u] if u lies at the right of x; x itself where u has no columns."""
    if u_tr.shape[1] == 0:
        return x_tk
    offset = x_tk.storage_offset() + x_tk.shape[1]
    same = x_tk.untyped_storage()._cdata == u_tr.untyped_storage()._cdata
    if not same or x_tk.stride() != u_tr.stride() or u_tr.storage_offset() != offset:
        return None
    return x_tk.as_strided((len(x_tk), x_tk.shape[1] + u_tr.shape[1]), x_tk.stride(), x_tk.storage_offset())


def outer(u: Rows, x: Rows, kept_pc: Tensor | None) -> Tensor:
    """u^T x summed over all rows: (r, k), where the columns of context rows are those of the kept channels, if any."""
    sum_rk = torch.mm(u.dense.t(), x.dense)
    if kept_pc is None:
        return torch.addmm(sum_rk, u.context.t(), x.context, out=sum_rk)
    parts = torch.mm(u.context.t(), x.context).split(padded(kept_pc.shape[1]), dim=1)
    for part, kept_c in zip(parts, kept_pc, strict=True):
        sum_rk.index_add_(1, kept_c, part[:, : len(kept_c)])
    return sum_rk
