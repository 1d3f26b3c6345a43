"""The FLOPs of a run's whole training, from one executed step of each batch shape."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from loras_bench.attention.backend import Backend
from loras_bench.attention.counting import PairCounts
from loras_bench.attention.dispatch import ModelAttention
from loras_bench.build import Assembly
from loras_bench.graphed import shapes_of, to_device
from loras_bench.metering.flops import MatmulCounter
from loras_bench.results.record import Flops
from loras_bench.training import plan_batches, regime_of, steps_that_differ


@dataclass
class _ShapeCost:
    """What a batch of one shape costs: its matrix products, and by layer the FLOPs of one attention pair.

    `per_pair` is as the layer's backend computes it, `per_pair_fused` as a fused kernel would: the same for every
    backend, so that allowed and dense-equivalent FLOPs compare across arms.
    """

    linear: float
    per_pair: dict[int, float]
    per_pair_fused: dict[int, float]
    unknown: Counter[str]


def count_training(run: Assembly, device: torch.device, processes: int = 1) -> tuple[Flops, int]:
    """FLOPs and tokens, padding included, of all steps of the plan; on the meta device nothing is computed.

    The matrix products of a batch depend on its shapes and the regime of its step alone, fill included, so one forward
    and backward pass of each kind is executed under the counter. Attention pairs are counted from each batch's own
    documents.

    Args:
        run: With all methods applied.
        device: Where its model is.
        processes: Of the job; each has its own batch of its share of the rows.
    """
    costs: dict[Hashable, _ShapeCost] = {}
    linear = executed = allowed = dense = 0.0
    tokens = 0
    for step, times in steps_that_differ(run.data, run.plan, run.methods).items():
        for method in run.methods:
            method.before_step(step)
        ranks = (plan_batches(run.data, run.plan, step, rank, processes, run.methods) for rank in range(processes))
        for batch in chain.from_iterable(ranks):
            kind = regime_of(run.methods, step), shapes_of(batch)
            tokens += times * batch["input_ids"].numel()
            if kind not in costs:
                costs[kind] = _cost_of(run, batch, device)
            cost = costs[kind]
            linear += times * cost.linear
            for layer, pairs in enumerate(_pairs(run.attention, batch)):
                executed += times * cost.per_pair[layer] * pairs.executed
                allowed += times * cost.per_pair_fused[layer] * pairs.allowed
                dense += times * cost.per_pair_fused[layer] * pairs.dense
    unknown = sum((cost.unknown for cost in costs.values()), Counter[str]())
    flops = Flops(
        linear=linear,
        attention_executed=executed,
        attention_allowed=allowed,
        attention_dense=dense,
        incomplete=sorted(unknown),
    )
    return flops, tokens


def _pairs(attention: ModelAttention, batch: dict[str, Tensor]) -> list[PairCounts]:
    """Attention pairs of one head in each layer."""
    if "document_ids" in batch:
        return attention.batch_pair_counts(batch)
    mask_bs = batch.get("attention_mask")
    rows, length = batch["input_ids"].shape
    lengths = [length] * rows if mask_bs is None else [int(n) for n in mask_bs.sum(dim=1)]
    return attention.pair_counts(lengths, length)


def _cost_of(run: Assembly, batch: dict[str, Tensor], device: torch.device) -> _ShapeCost:
    """Run one forward and backward pass with the attention core taken out; gradients are dropped."""
    with run.attention.counting() as calls, MatmulCounter() as counter:
        loss_sum, _ = run.objective(**to_device(batch, device))
        loss_sum.backward()
    run.objective.zero_grad(set_to_none=True)
    per_pair: defaultdict[int, float] = defaultdict(float)
    per_pair_fused: defaultdict[int, float] = defaultdict(float)
    for call in calls:  # a recomputed layer calls its core twice
        per_pair[call.layer] += call.flops(1)
        per_pair_fused[call.layer] += replace(call, backward_factor=Backend.backward_factor).flops(1)
    if run.attention.taps is not None:
        run.attention.taps.clear()
    return _ShapeCost(counter.flops, dict(per_pair), dict(per_pair_fused), counter.unknown)
