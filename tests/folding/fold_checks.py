"""Folded models and the dense ones that they stand for, written out row by row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from training_fixtures import HEADS, WIDTH, attended, token_ids

from loras_bench.folding.attention import FoldedAttention
from loras_bench.folding.factors import Moments
from loras_bench.folding.families import LinearMap, read_attention
from loras_bench.folding.fitting import Folding, fold_model

SIZE = WIDTH // HEADS
LAYERS = (0, 1)


def noisy(family: str, seed: int = 0, **options: Any) -> Any:
    """A tiny model with large weights, so that attention is far from uniform, and biases that are not 0."""
    model = attended(family, seed=seed, **options).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def logit_error(m_cd: Tensor, fitted_cd: Tensor, moments: Moments) -> float:
    """Mean square of what two matrices M differ by in logits, each query's mean over keys taken out."""
    gap_cd = (m_cd - fitted_cd).double()
    return float(((moments.query_cc @ gap_cd @ moments.key_dd) * gap_cd).sum())


def folded(
    model: Any,
    heads: Any = "per_head",
    rank: int = 1,
    initialisation: Any = "svd",
    values: str = "dense",
    layers: Any = LAYERS,
    penalty: float = 1e-9,
) -> list[FoldedAttention]:
    """Fold a model on random tokens, and return its blocks."""
    batches = [token_ids(4, 24, seed=seed) for seed in range(4)]
    folding = Folding(heads, rank, initialisation, values == "diagonal", penalty)
    fold_model(model.base_model, layers, folding, lambda: [model(ids, use_cache=False) for ids in batches])
    return [module for module in model.modules() if isinstance(module, FoldedAttention)]


def spread(rows_grd: Tensor, heads: int, rotary: bool) -> Tensor:
    """Every row of a dense matrix in full: (heads * SIZE, d) from (groups, rank, d)."""
    groups, rank, _ = rows_grd.shape
    if rotary:  # pairs (i, i + SIZE / 2) share a row: a run of frequencies each
        half = rows_grd.repeat_interleave(SIZE // 2 // rank, dim=1)
        full = torch.cat([half, half], dim=1)
    else:
        full = rows_grd.repeat_interleave(SIZE // rank, dim=1)
    return full.repeat(heads // groups, 1, 1).flatten(0, 1)


@torch.no_grad()
def unfold(model: Any, blocks: list[FoldedAttention], dense: Any) -> Any:
    """Write what folded blocks stand for into a dense model of the same family: W_Q = 1 u^T, W_K = 1 w^T, W_V."""
    own = dense.state_dict()
    same = {k: v for k, v in model.state_dict().items() if k in own and v.shape == own[k].shape}
    dense.load_state_dict(same, strict=False)
    for block in blocks:
        place, shape = read_attention(dense.base_model, block.layer_idx), block.shape
        query = LinearMap(
            spread(block.query, HEADS, shape.rotary),
            spread(block.query_bias[..., None], HEADS, shape.rotary)[:, 0],
        )
        key = LinearMap(spread(block.key, HEADS, shape.rotary), torch.full((HEADS * SIZE,), 0.7))
        value = (
            LinearMap(block.value_scale.diag(), torch.zeros(WIDTH))
            if block.value is None
            else LinearMap.of(block.value)
        )
        write_dense(dense, place.module, query, key, value)
    return dense


def write_dense(dense: Any, module: Any, query: LinearMap, key: LinearMap, value: LinearMap) -> None:
    family = dense.config.model_type
    if family == "gpt2":
        maps = (query, key, value)
        both = LinearMap(torch.cat([m.weight_oi for m in maps]), torch.cat([m.bias_o for m in maps]))
        both.write(module.c_attn)
    elif family == "llama":
        query.write(module.q_proj)
        LinearMap(key.weight_oi, None).write(module.k_proj)
        value = value if len(value.weight_oi) == WIDTH else repeated(value)
        LinearMap(value.weight_oi, None).write(module.v_proj)
    else:
        query.write(module.query), key.write(module.key), value.write(module.value)


def repeated(value: LinearMap) -> LinearMap:
    """One value head for each query head."""
    heads = value.weight_oi.unflatten(0, (-1, SIZE))
    return LinearMap(heads.repeat_interleave(HEADS // len(heads), dim=0).flatten(0, 1), None)
