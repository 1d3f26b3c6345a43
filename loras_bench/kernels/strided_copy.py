"""Many float32 tensors rounded into matrices with strided rows, all in one launch.

torch's copies of lists take one kernel only where each target is laid out as its source. Adapters that are views of a
larger matrix are not, and hundreds of small copies would cost more than the optimizer's arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Elements of one program."""
FORMATS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class StridedCopy:
    """Copies each source to its target whenever it is called; the tensors must stay where they are.

    Args:
        targets: Matrices of one number format on one device; columns have stride 1, rows any.
        sources: float32 and contiguous, of the same shapes.
    """

    def __init__(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        self.places = [tensor.data_ptr() for tensor in targets]
        rows = []
        for target, source in zip(targets, sources, strict=True):
            assert target.ndim == 2 and target.stride(1) == 1 and source.is_contiguous()
            for first in range(0, target.numel(), BLOCK):
                size = min(BLOCK, target.numel() - first)
                place = source.data_ptr() + 4 * first
                rows.append((target.data_ptr(), place, first, size, target.shape[1], target.stride(0)))
        self._format = FORMATS[targets[0].dtype]
        self._blocks = torch.tensor(rows, dtype=torch.int64, device=targets[0].device)

    def __call__(self) -> None:
        _copy[(len(self._blocks),)](self._blocks, format=self._format, block=BLOCK)


@triton.jit  # type: ignore[untyped-decorator]
def _copy(blocks: tl.tensor, format: tl.constexpr, block: tl.constexpr) -> None:
    """One block of one tensor. Each row of `blocks`: target, source, first element, elements, columns, row stride."""
    row = blocks + tl.program_id(0) * 6
    target = tl.load(row).to(tl.pointer_type(format))
    source = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    first, size, columns, stride = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    within = tl.arange(0, block)
    element = first + within
    place = element // columns * stride + element % columns
    values = tl.load(source + within, mask=within < size)
    tl.store(target + place, values.to(format), mask=within < size)
