"""Dense attention through PyTorch's SDPA, the fastest kernel first: the baseline that a speed-up must beat.

PyTorch's own order differs between versions: 2.11 takes cuDNN on Hopper, others FlashAttention-2, which takes 1.5 times
as long there or more. SDPA returns no
log-sum-exp: where a method needs it (taps), the dispatcher takes FlexAttention or the reference for dense layers too.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda as cuda_kernels
from torch.nn.attention import SDPBackend, sdpa_kernel

from loras_bench.attention.backend import Backend
from loras_bench.attention.binding import TILE, BoundPattern
from loras_bench.attention.patterns import Dense, PatternBase
from loras_bench.errors import ConfigError

DenseKernel = Literal["auto", "cudnn", "flash", "efficient", "math"]

KERNELS = {  # in order of preference
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class SdpaBackend(Backend):
    """Dense attention, causal or bidirectional; on other devices than CUDA torch's own choice of kernel.

    Args:
        kernel: `auto` takes the first of cuDNN, FlashAttention, memory-efficient and math that accepts the inputs.

    Raises:
        ConfigError: On the first call for which the one kernel that was asked for is not available.
    """

    name = "sdpa"

    def __init__(self, kernel: DenseKernel = "auto") -> None:
        assert kernel in get_args(DenseKernel)
        self.kernel = kernel
        self.kernels_used: dict[Hashable, str] = {}
        """Kernel that SDPA takes, by the facts of the inputs that decide it; for the record."""
        if kernel == "math":
            self.backward_factor = 2.0  # keeps the weights, recomputes nothing

    def refusal(self, pattern: PatternBase, device: torch.device, head_dim: int) -> str | None:
        if not isinstance(pattern, Dense):
            return "SDPA computes every pair"
        if device.type not in ("cuda", "meta") and self.kernel not in ("auto", "math"):
            return f"the {self.kernel} kernel needs CUDA, and the model is on {device.type}"
        return None

    def attend(
        self, q_bhsd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, bound: BoundPattern, scale: float
    ) -> tuple[Tensor, None]:
        """Shapes as in `Backend.attend`; outputs of padded queries are 0."""
        batch = bound.batch
        mask = bound.safe_mask_b1qk if self._needs_mask(bound) else None
        causal = batch.causal and mask is None
        grouped = q_bhsd.shape[1] != k_bgsd.shape[1]
        padding_bs = batch.right_padding_bs if causal else batch.padding_bs
        if q_bhsd.is_cuda:
            self._note_kernel(q_bhsd, k_bgsd, v_bgsd, mask, causal, grouped)
        order = list(KERNELS.values()) if self.kernel == "auto" else [KERNELS[self.kernel]]
        with sdpa_kernel(order, set_priority=True):
            out = F.scaled_dot_product_attention(
                q_bhsd, k_bgsd, v_bgsd, mask, is_causal=causal, scale=scale, enable_gqa=grouped
            )
        return out if padding_bs is None else out.masked_fill(~padding_bs[:, None, :, None], 0), None

    def executed_pairs(self, bound: BoundPattern, batch_size: int, head_dim: int) -> int:
        """Without a mask, fused kernels skip the tiles above a causal model's diagonal; with one they skip nothing."""
        length = bound.batch.length
        if not bound.batch.causal or self._needs_mask(bound) or self.kernel == "math":
            return batch_size * length**2
        tiles = -(-length // TILE)
        return batch_size * min(tiles * (tiles + 1) // 2 * TILE**2, length**2)

    @staticmethod
    def _needs_mask(bound: BoundPattern) -> bool:
        """Padding on the right is invisible to the real queries of a causal model: the fast kernels stay available."""
        return bound.batch.packed

    def _note_kernel(
        self, q_bhsd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, mask: Tensor | None, causal: bool, grouped: bool
    ) -> None:
        """Find once for each kind of input which kernel SDPA takes; refuse if the one asked for cannot."""
        key = (q_bhsd.shape, q_bhsd.stride(), k_bgsd.shape, q_bhsd.dtype, q_bhsd.requires_grad, mask is None, causal)
        if key in self.kernels_used:
            return
        inputs = cuda_kernels.SDPAParams(q_bhsd, k_bgsd, v_bgsd, mask, 0.0, causal, grouped)
        able = {
            "cudnn": cuda_kernels.can_use_cudnn_attention,
            "flash": cuda_kernels.can_use_flash_attention,
            "efficient": cuda_kernels.can_use_efficient_attention,
            "math": lambda inputs, debug: True,
        }
        wanted = KERNELS if self.kernel == "auto" else [self.kernel]
        chosen = next((name for name in wanted if able[name](inputs, False)), None)
        if chosen is None:
            able[self.kernel](inputs, True)  # prints torch's reason as a warning
            raise ConfigError(
                f"dense_attention: the {self.kernel} kernel does not take these inputs "
                f"({q_bhsd.dtype}, head_dim {q_bhsd.shape[-1]}, {'no mask' if mask is None else 'masked'})",
                "use dense_attention: auto",
            )
        self.kernels_used[key] = chosen
