"""Who takes part in the kernel benchmark, and how FlexAttention is tuned for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from loras_bench.attention.backend import Backend
from loras_bench.attention.binding import BoundPattern
from loras_bench.attention.dense import SdpaBackend
from loras_bench.attention.flex import FlexBackend
from loras_bench.attention.triton import TritonBackend
from loras_bench.benchmarking.longformer import LongformerChunks
from loras_bench.errors import UserError


class Speed(NamedTuple):
    """Median milliseconds of a first look."""

    forward_ms: float
    both_ms: float


Trial = Callable[[Backend], Speed]


@dataclass(frozen=True)
class Contender:
    """One row of a case.

    Args:
        name: In the table.
        make: Builds the backend; what needs tuning times its variants by the given trial.
        dense: It computes every pair whatever the pattern: the baseline that a sparse kernel has to beat.
        capturable: Whether a CUDA graph can hold a call.
    """

    name: str
    make: Callable[[Trial], Backend]
    dense: bool = False
    capturable: bool = True


def default_kernel(q_bhsd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, causal: bool) -> SDPBackend:
    """What torch takes for dense attention when nobody tells it what to take."""
    grouped = q_bhsd.shape[1] != k_bgsd.shape[1]
    return SDPBackend(torch._fused_sdp_choice(q_bhsd, k_bgsd, v_bgsd, is_causal=causal, enable_gqa=grouped))


class DefaultSdpa(SdpaBackend):
    """`scaled_dot_product_attention` as it comes; `note` is the kernel that torch takes.

    Made before anything else asks for an order of kernels: torch sets its own order at its first choice, and a context
    that was entered before would put back an order that nobody has.
    """

    def __init__(self) -> None:
        super().__init__()
        if torch.cuda.is_available():
            some = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device="cuda")
            default_kernel(some, some, some, causal=True)

    def attend(
        self, q_bhsd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, bound: BoundPattern, scale: float
    ) -> tuple[Tensor, None]:
        """Shapes as in `Backend.attend`; nothing may be padded."""
        causal, grouped = bound.batch.causal, q_bhsd.shape[1] != k_bgsd.shape[1]
        self.note = default_kernel(q_bhsd, k_bgsd, v_bgsd, causal).name.removesuffix("_ATTENTION").lower()
        out = F.scaled_dot_product_attention(q_bhsd, k_bgsd, v_bgsd, is_causal=causal, scale=scale, enable_gqa=grouped)
        return out, None


class DistinctFlash(SdpaBackend):
    """FlashAttention-2, where torch would take another kernel by itself."""

    def __init__(self) -> None:
        super().__init__("flash")

    def attend(
        self, q_bhsd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, bound: BoundPattern, scale: float
    ) -> tuple[Tensor, None]:
        """Shapes as in `Backend.attend`."""
        if default_kernel(q_bhsd, k_bgsd, v_bgsd, bound.batch.causal) == SDPBackend.FLASH_ATTENTION:
            raise UserError("default SDPA takes it already")
        return super().attend(q_bhsd, k_bgsd, v_bgsd, bound, scale)


class ForwardOptions(NamedTuple):
    """Tile of FlexAttention's forward kernel."""

    block_m: int
    block_n: int
    warps: int
    stages: int

    def kernel_options(self) -> dict[str, int]:
        return {
            "fwd_BLOCK_M": self.block_m,
            "fwd_BLOCK_N": self.block_n,
            "fwd_num_warps": self.warps,
            "fwd_num_stages": self.stages,
        }


class BackwardOptions(NamedTuple):
    """Tiles of FlexAttention's backward kernel: queries and keys of the dk and dv half, then of the dq half."""

    block_m1: int
    block_n1: int
    block_m2: int
    block_n2: int
    warps: int
    stages: int

    def kernel_options(self) -> dict[str, int]:
        return {
            "bwd_BLOCK_M1": self.block_m1,
            "bwd_BLOCK_N1": self.block_n1,
            "bwd_BLOCK_M2": self.block_m2,
            "bwd_BLOCK_N2": self.block_n2,
            "bwd_num_warps": self.warps,
            "bwd_num_stages": self.stages,
        }


SWEEP: tuple[tuple[ForwardOptions | None, BackwardOptions | None], ...] = (
    (None, None),  # torch's own choice
    (ForwardOptions(64, 64, 4, 3), BackwardOptions(64, 64, 64, 64, 4, 3)),
    (ForwardOptions(128, 64, 4, 3), BackwardOptions(32, 128, 128, 32, 4, 3)),
    (ForwardOptions(128, 64, 8, 2), BackwardOptions(64, 128, 128, 64, 8, 2)),
)
"""Tried in pairs: forward and backward are kernels of their own, so one compilation tries an option of each."""


class TunedFlex(FlexBackend):
    """FlexAttention with tiles of our choice; None leaves a kernel's to torch."""

    def __init__(self, forward: ForwardOptions | None, backward: BackwardOptions | None) -> None:
        super().__init__()
        self.forward, self.backward = forward, backward

    @cached_property
    def _kernel(self) -> Callable[..., Any]:
        compiled = super()._kernel
        chosen = {
            name: value for options in self._options if options for name, value in options.kernel_options().items()
        }

        def kernel(*tensors: Tensor, kernel_options: dict[str, Any], **arguments: Any) -> Any:
            return compiled(*tensors, kernel_options=kernel_options | chosen, **arguments)

        return kernel

    @property
    def _options(self) -> tuple[ForwardOptions | None, BackwardOptions | None]:
        return self.forward, self.backward

    @property
    def note(self) -> str:
        """The options, for the table."""
        texts = []
        for name, options in zip(("forward", "backward"), self._options, strict=True):
            if options is None:
                texts.append(f"{name} default")
            else:
                *tiles, warps, stages = options
                texts.append(f"{name} {'x'.join(map(str, tiles))}, {warps} warps, {stages} stages")
        return "; ".join(texts)


def tune_flex(trial: Trial) -> TunedFlex:
    """The fastest forward and the fastest backward options of the sweep, together.

    Raises:
        UserError: None of them ran.
    """
    speeds: dict[tuple[ForwardOptions | None, BackwardOptions | None], Speed] = {}
    refusals: list[str] = []
    for options in SWEEP:
        try:
            speeds[options] = trial(TunedFlex(*options))
        except Exception as error:  # tiles that do not fit into shared memory, or that torch refuses
            refusals.append(str(error).strip().partition("\n")[0])
    if not speeds:
        raise UserError(f"no option of the sweep ran: {refusals[0]}")
    forward = min(speeds, key=lambda options: speeds[options].forward_ms)[0]
    backward = min(speeds, key=lambda options: speeds[options].both_ms - speeds[options].forward_ms)[1]
    return TunedFlex(forward, backward)


def contenders() -> list[Contender]:
    """All of them, ours last: a fault in a kernel under development leaves the GPU's context unusable."""
    default = DefaultSdpa()
    return [
        Contender("cuDNN dense", lambda trial: SdpaBackend("cudnn"), dense=True),
        Contender("default SDPA", lambda trial: default, dense=True),
        Contender("FlashAttention-2", lambda trial: DistinctFlash(), dense=True),
        Contender("Flex", lambda trial: FlexBackend()),
        Contender("Flex tuned", tune_flex),
        Contender("HF Longformer", lambda trial: LongformerChunks(), capturable=False),
        Contender("ours (Triton)", lambda trial: TritonBackend()),
    ]
