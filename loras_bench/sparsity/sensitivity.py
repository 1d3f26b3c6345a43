"""A schedule of sparsities from what each part of each layer tolerates (SparseLoRA, Khaki et al. 2025, section 3.3).

The paper raises the sparsity of one layer at a time and sets the schedule by hand. Here it is the one of least total
divergence within a budget of FLOPs, found exactly, on the assumption that the divergences of parts add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from loras_bench.errors import UserError
from loras_bench.sparsity.criteria import DENSE, Heads, LayerSparsity
from loras_bench.sparsity.flops import ATTENTION, Shape, step_flops

if TYPE_CHECKING:
    from loras_bench.methods.lora import LoraConfig

PARTS = LayerSparsity._fields
Divergences = Mapping[tuple[int, str], Mapping[float, float]]
"""By layer and part: how far each sparsity takes the predictions from the dense ones, not negative."""


class Option(NamedTuple):
    """One way to run one part of one layer."""

    saved: int
    divergence: float


@dataclass(frozen=True)
class StepCost:
    """The FLOPs of a training step under a schedule, by `flops.step_flops`; see its arguments."""

    shape: Shape
    layer_count: int
    context: int
    output: int
    lora_rank: int
    adapted: Sequence[str]

    def ratio(self, layers: Sequence[LayerSparsity]) -> float:
        """As a share of dense LoRA's."""
        return self._flops(layers) / self._dense

    def saved_weights(self, part: str, sparsity: float) -> int:
        """Weights of one layer that a context token does not multiply with."""
        dense, sparse = (self.shape.linears(LayerSparsity(**{part: share})).values() for share in (0.0, sparsity))
        return sum(a * b - c * d for (a, b), (c, d) in zip(dense, sparse, strict=True))

    def weights_to_save(self, ratio: float) -> int:
        """How many weights a context token must leave out, in all layers together, for this share of FLOPs.

        Raises:
            UserError: No token is context.
        """
        if not self.context:
            raise UserError(
                "no token of a micro-batch would be sparse: nothing can be saved",
                "dense tokens are filled up to a multiple of 128: raise training.micro_batch_size or batch_size",
            )
        weights = (1 - ratio) * self._dense / (4 * self.context)
        return math.ceil(weights * (1 - 1e-12))  # a ratio that was computed from whole weights gives these back

    def reaches(self, grid: Mapping[str, Sequence[float]], ratio: float) -> bool:
        """Whether the largest sparsities of a grid, in all layers, save enough for this share of FLOPs."""
        most = sum(max(self.saved_weights(part, one) for one in grid[part]) for part in PARTS)
        return self.weights_to_save(ratio) <= self.layer_count * most

    @cached_property
    def _dense(self) -> float:
        return self._flops([DENSE] * self.layer_count)

    def _flops(self, layers: Sequence[LayerSparsity]) -> float:
        return step_flops(self.shape, layers, self.context, self.output, self.lora_rank, self.adapted)


def step_cost(model_config: Any, context: int, output: int, lora: LoraConfig) -> StepCost:
    """Of a Llama-like model with adapters; tokens as `step_flops` counts them."""
    heads = Heads(model_config.num_attention_heads, model_config.num_key_value_heads, model_config.head_dim)
    shape = Shape(model_config.hidden_size, model_config.intermediate_size, heads)
    return StepCost(shape, model_config.num_hidden_layers, context, output, lora.rank, adapted(lora, shape))


def adapted(lora: LoraConfig, shape: Shape) -> list[str]:
    """The projections of a layer that get adapters, as `Shape.linears` names them."""
    names = list(shape.linears())
    if isinstance(lora.targets, tuple):
        return [name for name in names if any(target.endswith(f"{name}_proj") for target in lora.targets)]
    groups = {"attention": ATTENTION, "feed-forward": [name for name in names if name not in ATTENTION]}
    return list(groups.get(lora.targets, names))


def check_budget(cost: StepCost, grid: Mapping[str, Sequence[float]], budget: float) -> None:
    """Refuse a share of FLOPs that not even the largest sparsities of the grid reach.

    Raises:
        UserError: With the smallest share that can be reached.
    """
    if not cost.reaches(grid, budget):
        least = cost.ratio([LayerSparsity(**{part: max(grid[part]) for part in PARTS})] * cost.layer_count)
        raise UserError(
            f"--flops {budget:g} cannot be reached: with the largest sparsity everywhere a sparse step takes "
            f"{math.ceil(least * 1e4) / 1e4:.4f} of dense LoRA's FLOPs",
            f"of a row, {cost.context} tokens are context and {cost.output} are dense; raise --flops, or the largest "
            "sparsity of --feed-forward or --attention",
        )


def choose(cost: StepCost, divergences: Divergences, budget: float) -> list[LayerSparsity]:
    """The schedule of least total divergence among those whose FLOPs are at most `budget` of dense LoRA's.

    Of equals it takes the sparser: what costs nothing is free.

    Args:
        cost: Of a step.
        divergences: Of each part of each layer that may be sparse; being dense adds nothing.
        budget: Share of dense LoRA's FLOPs; `check_budget` has let it pass.
    """
    shares = {place: [*sorted(found, reverse=True), 0.0] for place, found in divergences.items()}
    options = [
        [Option(cost.saved_weights(place[1], one), divergences[place].get(one, 0.0)) for one in shares[place]]
        for place in shares
    ]
    picked = least_divergence(options, max(0, cost.weights_to_save(budget)))
    chosen = {place: shares[place][index] for place, index in zip(shares, picked, strict=True)}
    return [
        LayerSparsity(**{part: chosen.get((layer, part), 0.0) for part in PARTS}) for layer in range(cost.layer_count)
    ]


def predicted(layers: Sequence[LayerSparsity], divergences: Divergences) -> float:
    """The sum of the divergences that the parts of a schedule have one at a time."""
    shares = {(layer, part): getattr(layers[layer], part) for layer, part in divergences}
    return sum(found[shares[place]] for place, found in divergences.items() if shares[place])


def least_divergence(groups: Sequence[Sequence[Option]], needed: int) -> list[int]:
    """One option of each group, so that they save at least `needed` at the least total divergence.

    The multiple-choice knapsack problem by dynamic programming over whole units saved (Kellerer, Pferschy and
    Pisinger, Knapsack Problems, 2004, section 11.5): exact. least_s is the least divergence of the groups so far that
    saves s or more, and `needed` is the largest s. The unit is what all savings are multiples of.

    Args:
        groups: Options of each part, at least one of them.
        needed: What to save in all, not negative.

    Returns:
        The index of the option of each group; of equals the first.

    Raises:
        ValueError: The options cannot save so much.
    """
    unit = math.gcd(*(option.saved for group in groups for option in group)) or 1
    most = -(-needed // unit)
    least_s = np.full(most + 1, np.inf)
    least_s[0] = 0.0
    picks = []
    for group in groups:
        best_s, pick_s = np.full(most + 1, np.inf), np.zeros(most + 1, np.int8)
        for index, option in enumerate(group):
            shift = min(option.saved // unit, most)
            through_s = np.concatenate([np.full(shift, least_s[0]), least_s[: most + 1 - shift]]) + option.divergence
            better_s = through_s < best_s
            best_s[better_s], pick_s[better_s] = through_s[better_s], index
        least_s = best_s
        picks.append(pick_s)
    if not math.isfinite(least_s[most]):
        raise ValueError(f"the options save less than {needed}")
    found, left = [], most
    for group, pick_s in zip(reversed(groups), reversed(picks), strict=True):
        found.append(int(pick_s[left]))
        left = max(0, left - group[found[-1]].saved // unit)
    return found[::-1]


def uniform(cost: StepCost, divergences: Divergences, ratio: float) -> list[LayerSparsity]:
    """The best schedule that is the same in every layer, by added divergences: the paper's "uniform" ablation.

    Each part has one sparsity of its grid in all layers, or is dense everywhere; its FLOPs are at most `ratio` of dense
    LoRA's, which the largest sparsities reach.
    """
    shares = {
        part: sorted({one for (_, name), found in divergences.items() if name == part for one in found})
        for part in PARTS
    }
    schedules = (
        [LayerSparsity(*pair)] * cost.layer_count for pair in product(*([0.0, *shares[part]] for part in PARTS))
    )
    fitting = [schedule for schedule in schedules if cost.ratio(schedule) <= ratio]
    return min(fitting, key=lambda schedule: (predicted(schedule, divergences), cost.ratio(schedule)))


def by_range(layers: Sequence[LayerSparsity]) -> dict[str, dict[str, float]]:
    """The sparse layers as `sparse_lora` takes them: neighbours with the same sparsity of a part are one range."""
    found: dict[str, dict[str, float]] = {}
    for part in PARTS:
        for share, run in groupby(range(len(layers)), key=lambda layer: float(getattr(layers[layer], part))):
            first, *rest = run
            if share:
                found.setdefault(f"{first}-{rest[-1]}" if rest else str(first), {})[part] = share
    return dict(sorted(found.items(), key=lambda item: int(item[0].partition("-")[0])))
