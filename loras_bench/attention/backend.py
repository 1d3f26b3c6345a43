"""What a backend is: one way to compute the attention core, for the patterns and devices that it supports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from loras_bench.attention.binding import BoundPattern
    from loras_bench.attention.patterns import PatternBase

SparseBackend = Literal["auto", "triton", "flex", "reference"]
"""Who may be asked for the layers that are not dense."""


class Backend(ABC):
    """Computes softmax(scale * q k^T + mask) v. Shapes: b batch, h query heads, g key heads, s length, d head dim."""

    name: ClassVar[str]
    backward_factor: float = 2.5
    """FLOPs of the backward pass over the forward pass: 5 products to 2 where the kernel recomputes the scores."""

    def refusal(self, pattern: PatternBase, device: torch.device, head_dim: int) -> str | None:
        """Why this backend cannot train with the pattern, on the device, at the size of head; None where it can."""
        return None

    @abstractmethod
    def attend(
        self, q_bhsd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, bound: BoundPattern, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        """The core: out_bhsd and the natural log-sum-exp lse_bhs, also differentiable; None if the backend has none."""

    @abstractmethod
    def executed_pairs(self, bound: BoundPattern, batch_size: int, head_dim: int) -> int:
        """Pairs that the kernel computes for one head, summed over the samples: masked ones in visited tiles too."""
