"""Low-rank estimators of projections: what a layer's outputs roughly are, for a fraction of the product's cost.

W = U S V^T, cut after r singular values, is the best approximation of rank r (Eckart and Young 1936). SparseLoRA
(Khaki et al. 2025, arXiv 2506.16500, section 3.2) multiplies by its factors U_r S_r^1/2 and S_r^1/2 V_r^T to find which
channels of a batch will be large. Factors are computed in float32 from the weights as they are, once, and kept on disk.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loras_bench.cache import cached_folder
from loras_bench.errors import ConfigError

OVERSAMPLING = 8
"""Vectors that are iterated beside the r wanted ones: the gap to the r + 9th singular value decides the accuracy."""
ITERATIONS = 12
"""Products with W and with W^T; the results of all of them together are the space that is searched."""
PROJECTION = re.compile(r"\blayers\.(\d+)\.(?:self_attn\.[qkv]_proj|mlp\.(?:gate|up)_proj)$")
"""Projections whose outputs are estimated; those of attention's output and `down` follow the channels of v and `up`."""


@dataclass(frozen=True)
class Factors:
    """W (n, k) ~ up (n, r) @ down (r, k)."""

    down_rk: Tensor
    up_nr: Tensor

    def __call__(self, x_tk: Tensor) -> Tensor:
        """The estimate (..., n) of x W^T for x (..., k): 2 r (n + k) FLOPs a token."""
        return F.linear(F.linear(x_tk, self.down_rk), self.up_nr)

    def to(self, *where: Any) -> Factors:
        """As `Tensor.to`: another device or number format."""
        return Factors(self.down_rk.to(*where), self.up_nr.to(*where))


@torch.no_grad()
def low_rank(weight_nk: Tensor, rank: int) -> Factors:
    """The best approximation of rank r by the singular value decomposition in float32, on the device of the weight.

    Large weights are decomposed in a searched space (`_searched`), always with the same random start.

    Raises:
        ConfigError: The weight has no such rank.
        TypeError: It is not of a floating-point type (the packed bytes of a quantized weight are no matrix).
    """
    if rank > min(weight_nk.shape):
        raise ConfigError(
            f"sparse_lora: rank {rank} is more than a weight of {' x '.join(map(str, weight_nk.shape))} has",
            f"set `rank` to at most {min(weight_nk.shape)}",
        )
    if not weight_nk.is_floating_point():
        raise TypeError(f"a weight of type {weight_nk.dtype} has no singular values; dequantize it")
    w_nk = weight_nk.detach().float()
    searched = (rank + OVERSAMPLING) * ITERATIONS
    decompose = _searched if 2 * searched < min(w_nk.shape) else _whole
    u_nr, s_r, v_rk = decompose(w_nk, rank)
    root_r = s_r.sqrt()
    return Factors(root_r[:, None] * v_rk, u_nr * root_r)


def _whole(w_nk: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = torch.linalg.svd(w_nk, full_matrices=False)
    return u[:, :rank], s[:rank], v[:rank]


def _searched(w_nk: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Randomized block Krylov iteration (Musco and Musco 2015, arXiv 1504.05477, algorithm 2).

    The weights of language models have no gap after the r-th singular value; keeping every block of the iteration
    needs far fewer products there than keeping the last one alone (subspace iteration, `torch.svd_lowrank`).
    """
    generator = torch.Generator().manual_seed(0)  # of its own, and on the CPU: the same start on every device
    x_kb = torch.randn(w_nk.shape[1], rank + OVERSAMPLING, generator=generator).to(w_nk.device)
    blocks = []
    for _ in range(ITERATIONS):
        y_nb = torch.linalg.qr(w_nk @ x_kb).Q
        blocks.append(y_nb)
        x_kb = w_nk.t() @ y_nb
    basis_nq = torch.linalg.qr(torch.cat(blocks, dim=1)).Q
    u_qr, s_r, v_rk = _whole(basis_nq.t() @ w_nk, rank)
    return basis_nq @ u_qr, s_r, v_rk


def load_estimators(model: nn.Module, rank: int, layers: Iterable[int]) -> dict[str, Factors]:
    """Estimators of q, k, v, gate and up of some decoder layers: read from the cache, else computed and kept there.

    They are cached by weight, so that another choice of layers computes only what is new.

    Args:
        model: A Llama-like model, or a PEFT model around one; adapters are not part of what is estimated.
        rank: r.
        layers: Numbers of decoder layers, from 0.

    Returns:
        By the projection's name in `model.named_modules()` (that of PEFT's layer, where there is one), in the number
        format and on the device of the weight.

    Raises:
        ConfigError: A weight has no such rank.
    """
    numbers = set(layers)
    found = {}
    for name, module in model.named_modules():
        if (match := PROJECTION.search(name)) and int(match[1]) in numbers:
            weight_nk: Any = module.weight  # of PEFT's layers that of their base
            found[name] = _cached(weight_nk, rank).to(weight_nk.device, weight_nk.dtype)
    return found


def _cached(weight_nk: Tensor, rank: int) -> Factors:
    """One file a weight; one that cannot be read is replaced, and none is written where there is no room."""
    folder = cached_folder("estimators", f"rank{rank}-{OVERSAMPLING}-{ITERATIONS}", lambda folder: None)
    if folder is None:
        return low_rank(weight_nk, rank)
    file = folder / f"{_digest(weight_nk)}.safetensors"
    with suppress(OSError, SafetensorError, KeyError):
        tensors = load_file(file)
        return Factors(tensors["down_rk"], tensors["up_nr"])
    factors = low_rank(weight_nk, rank)
    with suppress(OSError, SafetensorError):
        _save(file, factors)
    return factors


def _digest(weight_nk: Tensor) -> str:
    content = weight_nk.detach().contiguous().cpu()
    digest = hashlib.sha256(f"{tuple(content.shape)} {content.dtype} ".encode())
    digest.update(content.view(torch.uint8).numpy().data)  # numpy has no bfloat16
    return digest.hexdigest()[:32]


def _save(file: Path, factors: Factors) -> None:
    """The file appears whole, by a rename: a second process that computes the same meanwhile does no harm."""
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".making-") as making:
        made = Path(making) / file.name
        save_file({name: tensor.cpu().contiguous() for name, tensor in vars(factors).items()}, made)
        os.replace(made, file)
