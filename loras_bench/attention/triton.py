"""Our own Triton kernels as a backend: every pattern, dense layers over packed documents too, on CUDA.

Operators: operators.py; kernels: triton_forward.py and triton_backward.py. All are imported on first use: Triton is not
installed everywhere.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, get_args

from loras_bench.attention.backend import Backend
from loras_bench.attention.tiles import PRODUCTS, Kernel, TileChoice, choose_tiles
from loras_bench.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

    from loras_bench.attention.binding import BoundPattern
    from loras_bench.attention.operators import Launch
    from loras_bench.attention.patterns import PatternBase

LARGEST_HEAD = 128


class TritonBackend(Backend):
    """Skips every tile without an allowed pair and every mask in a full one; out and log-sum-exp are differentiable.

    Args:
        tiles: Sizes of the tiles of each kernel, 64 x 64 for irregular patterns; default those of tiles.json.
    """

    name = "triton"
    backward_factor = 3.5
    """Two kernels that each recompute the scores: 7 products to 2, and no sum that depends on timing."""

    def __init__(self, tiles: Mapping[Kernel, TileChoice] | None = None) -> None:
        self._tiles = tiles

    def refusal(self, pattern: PatternBase, device: torch.device, head_dim: int) -> str | None:
        if device.type != "cuda":
            return f"our Triton kernels do not run on {device.type}"
        if head_dim > LARGEST_HEAD:
            return f"our Triton kernels take heads of at most {LARGEST_HEAD} dimensions, not {head_dim}"
        return None if find_spec("triton") else "Triton is not installed"

    def attend(
        self, q_bhsd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, bound: BoundPattern, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Head dimensions up to 128; `scale` must be positive."""
        from loras_bench.attention.operators import SparseAttention

        if q_bhsd.shape[3] > LARGEST_HEAD:
            raise UserError(f"our Triton kernels take heads of at most {LARGEST_HEAD}", "use backend: flex")
        launches = self.launches(bound, q_bhsd.shape[3], q_bhsd.shape[1] // k_bgsd.shape[1])
        out_bhsd, lse_bhs = SparseAttention.apply(q_bhsd, k_bgsd, v_bgsd, launches, scale)  # type: ignore[no-untyped-call]
        return out_bhsd, lse_bhs

    def launches(self, bound: BoundPattern, head_dim: int, group: int) -> dict[Kernel, list[Launch]]:
        """What each of the three kernels does for each part of the pattern; `group` query heads share a key head."""
        from loras_bench.attention.operators import Launch

        choices = self.choices(bound, head_dim)
        return {
            kernel: [Launch.of(part, kernel, choice, group) for part in bound.parts]
            for kernel, choice in choices.items()
        }

    def choices(self, bound: BoundPattern, head_dim: int) -> Mapping[Kernel, TileChoice]:
        """The tiles of each kernel for a pattern; documents of a packed row count as short."""
        if self._tiles is not None:
            return self._tiles
        batch = bound.batch
        keys = 0 if batch.document_bs is not None else batch.bound_without_samples(bound.pattern).mean_keys
        return {kernel: choose_tiles(kernel, head_dim, keys, bound.parts[0].listed) for kernel in get_args(Kernel)}

    def executed_pairs(self, bound: BoundPattern, batch_size: int, head_dim: int) -> int:
        """The mean over the 9 products of a training step: the kernels' tiles need not have one size."""
        launches = self.launches(bound.with_data, head_dim, 1)
        done = sum(PRODUCTS[kernel] * part.pairs(batch_size) for kernel in launches for part in launches[kernel])
        return round(done / sum(PRODUCTS.values()))
