"""The FLOPs of a run's whole training, from one executed step of each batch shape."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loras_bench.attention.backend import Backend
from loras_bench.build import Assembly
from loras_bench.metering.flops import MatmulCounter
from loras_bench.results.record import Flops
from loras_bench.training import plan_batches, to_device


@dataclass
class _ShapeCost:
    """What a batch of one padded shape costs: its matrix products, and by layer the FLOPs of one attention pair.

    `per_pair` is as the layer's backend computes it, `per_pair_fused` as a fused kernel would: the same for every
    backend, so that allowed and dense-equivalent FLOPs compare across arms.
    """

    linear: float
    per_pair: dict[int, float]
    per_pair_fused: dict[int, float]
    unknown: Counter[str]


def count_training(run: Assembly, device: torch.device, processes: int = 1) -> tuple[Flops, int]:
    """FLOPs and tokens, padding included, of all steps of the plan; on the meta device nothing is computed.

    The matrix products of a batch depend on its padded shape alone, so one forward and backward pass of each shape is
    executed under the counter. Attention pairs are counted from each batch's own lengths.

    Args:
        run: With all methods applied.
        device: Where its model is.
        processes: Of the job; this one executes its share of a batch, and all shares cost the same.
    """
    costs: dict[tuple[int, ...], _ShapeCost] = {}
    linear = executed = allowed = dense = 0.0
    tokens = 0
    steps = 1 if run.data.task == "language_modeling" else run.plan.steps  # blocks all have one shape
    for step in range(steps):
        for batch in plan_batches(run.data, run.plan, step):
            shape = tuple(batch["input_ids"].shape)
            tokens += batch["input_ids"].numel()
            if shape not in costs:
                share = {name: tensor[: len(tensor) // processes] for name, tensor in batch.items()}
                costs[shape] = _cost_of(run, share, device)
            cost = costs[shape]
            linear += cost.linear * processes
            for layer, pairs in enumerate(run.attention.pair_counts(_lengths(batch), shape[1])):
                executed += cost.per_pair[layer] * pairs.executed
                allowed += cost.per_pair_fused[layer] * pairs.allowed
                dense += cost.per_pair_fused[layer] * pairs.dense
    unknown = sum((cost.unknown for cost in costs.values()), Counter[str]())
    repeats = run.plan.steps // steps
    flops = Flops(
        linear=linear * repeats,
        attention_executed=executed * repeats,
        attention_allowed=allowed * repeats,
        attention_dense=dense * repeats,
        incomplete=sorted(unknown),
    )
    return flops, tokens * repeats


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


def _lengths(batch: dict[str, Tensor]) -> list[int]:
    """Real tokens of each row; without a mask every row is full."""
    mask_bs = batch.get("attention_mask")
    rows, length = batch["input_ids"].shape
    return [length] * rows if mask_bs is None else [int(n) for n in mask_bs.sum(dim=1)]
