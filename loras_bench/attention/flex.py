"""FlexAttention: fused block-sparse attention for every pattern, on CUDA.

One compiled function, specialised for each shape (`dynamic=False`). Past dynamo's recompile limit torch would fall back
to an unfused kernel that holds the whole score matrix; `fullgraph=True` makes that an error, and the limit is raised.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from loras_bench.attention.backend import Backend
from loras_bench.attention.binding import BoundPattern
from loras_bench.attention.patterns import PatternBase

RECOMPILE_LIMIT = 256
"""Shapes and patterns that one process may compile; dynamo's default is 8."""


class FlexBackend(Backend):
    """Visits only the 128 x 128 tiles that hold an allowed pair; out and log-sum-exp are differentiable.

    Args:
        compiled: False runs torch's own eager emulation, which holds the whole score matrix: for tests only.
    """

    name = "flex"

    def __init__(self, compiled: bool = True) -> None:
        self._compiled = compiled

    def refusal(self, pattern: PatternBase, device: torch.device, head_dim: int) -> str | None:
        if device.type != "cuda":
            return f"FlexAttention has no backward pass on {device.type}"
        return None if self._compiled else "un-compiled FlexAttention is an emulation, not a kernel"

    @cached_property
    def _kernel(self) -> Callable[..., Any]:
        kernel: Callable[..., Any] = flex_attention
        return torch.compile(kernel, dynamic=False, fullgraph=True) if self._compiled else kernel

    def attend(
        self, q_bhsd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, bound: BoundPattern, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Needs head_dim >= 16 on CUDA, a limit of its kernels."""
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            out_bhsd, aux = self._kernel(
                q_bhsd,
                k_bgsd,
                v_bgsd,
                block_mask=bound.block_mask,
                scale=scale,
                enable_gqa=q_bhsd.shape[1] != k_bgsd.shape[1],
                return_aux=AuxRequest(lse=True),
                # short lengths would pick the decoding kernel, whose log-sum-exp takes no gradient
                kernel_options={"BACKEND": "TRITON"} if q_bhsd.is_cuda else None,
            )
        return out_bhsd, aux.lse

    def executed_pairs(self, bound: BoundPattern, batch_size: int, head_dim: int) -> int:
        return bound.visited_pairs(batch_size)
