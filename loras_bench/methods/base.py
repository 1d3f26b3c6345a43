"""What a training technique is: a pydantic config and a class with do-nothing defaults, composed in stage order.

An experiment lists methods; `build_methods` sorts them by stage, lets each check the others, and the training loop then
calls the same hooks of all of them. Everything here must survive composition, a captured step and a kill, so a
hook writes device tensors or modules it owns and never global state.

A captured step replays the addresses it recorded: tensors that the step reads or writes must stay the same tensors.
`before_step`, `after_step` and `load_state_dict` change them in place (`copy_`, `fill_`). Whatever a method does in
Python inside the step (`loss_terms`, forward passes of modules) happens while a graph is recorded and not in its
replays, so a Python value that changes what is computed belongs in `graph_key`. Nothing in a step may read a value to
the host.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PretrainedConfig

    from loras_bench.optimizer import MasterAdamW


class Stage(IntEnum):
    """The order in which methods prepare and finish a model.

    Up to `COMPRESS` the model that adapters are trained on becomes another, which is then saved beside them.
    """

    REPLACE = 0
    COMPRESS = 1
    QUANTIZE_BASE = 2
    ADAPT = 3
    SPARSIFY = 4
    ATTEND = 5
    CONVERT = 6


class MethodConfig(BaseModel):
    """The part of a YAML file that describes one method; `kind` selects the class."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    kind: str


@dataclass
class AttentionTap:
    """What one attention layer computed in this step, still attached to the autograd graph.

    Shapes: `q_bhsd` (batch, heads, length, head_dim), `k_bgsd` (batch, key heads, length, head_dim),
    `lse_bhs` (batch, heads, length), natural logarithm.
    """

    q_bhsd: Tensor
    k_bgsd: Tensor
    lse_bhs: Tensor
    scale: float


@dataclass
class Taps:
    """What the layers of one step show to methods whose losses look inside the model, by layer index.

    Collected only when a method asks for it. A layer that runs twice (non-reentrant gradient checkpointing recomputes
    it in the backward pass) writes its entry once: the entry of the first run already leads into the
    recomputed graph.
    """

    attention: dict[int, AttentionTap] = field(default_factory=dict)

    def put_attention(self, layer: int, tap: AttentionTap) -> None:
        self.attention.setdefault(layer, tap)

    def clear(self) -> None:
        self.attention.clear()


C = TypeVar("C", bound=MethodConfig)


class Method(ABC, Generic[C]):
    """One technique applied to one model. Subclasses override only the hooks they need."""

    stage: ClassVar[Stage]
    wants_taps: ClassVar[bool] = False

    def __init__(self, config: C) -> None:
        self.config = config

    def check(self, others: Sequence[Method[Any]], model_config: PretrainedConfig) -> None:
        """Refuse impossible requests and conflicts before any work.

        Raises:
            ConfigError: With the reason, naming both methods where two conflict.
        """

    def observe(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Called once, before `prepare`: collated training batches on the CPU, made as they are asked for.

        One pass over the rows, the same in every process; what `prepare` fits to data it keeps from them.
        """

    def prepare(self, model: nn.Module) -> nn.Module:
        """Freeze, attach or swap modules; return the model to train."""
        return model

    def resize(self, model: nn.Module) -> nn.Module:
        """Called in the place of `observe` and `prepare` where nobody will use the values of the weights (a dry run).

        Their number, shapes and costs must be those that `prepare` leaves; nothing is fitted.
        """
        return self.prepare(model)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Groups of `params`, and where they differ `lr` and `weight_decay`; the loop takes the rest."""
        return []

    def plan(self, steps: int) -> None:
        """Told once how many optimizer steps the run has."""

    def start(self, objective: nn.Module, optimizer: MasterAdamW, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Called once before any step: what depends on training data, or reaches into the optimizer's state.

        The model is on its device, in its number format, with transformers' forward pass. `batches` are micro-batches
        on the CPU, made as they are asked for: one pass over the training rows, the same in every process.
        """

    def batch_tensors(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors to go with a training batch to the device, from what `TaskData.collate` made, on the CPU.

        Their shapes may depend on the data: a step is captured for each combination of shapes that comes.
        """
        return {}

    def before_step(self, step: int) -> None:
        """Called before each optimizer step; writes device tensors only, so that a captured step sees them."""

    def graph_key(self, step: int) -> Hashable | None:
        """Steps of different keys are captured apart, as their operations differ; None means an eager step."""
        return ()

    def loss_terms(self, taps: Taps) -> Mapping[str, Tensor]:
        """Named terms to add to the task's loss, computed from what the layers showed in this step."""
        return {}

    def after_step(self, step: int) -> None:
        """Called after each optimizer step: masks, constraints."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors that must be restored for an exact resume (masks, multipliers, observers)."""
        return {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned."""

    def finish(self, model: nn.Module) -> nn.Module:
        """After training and evaluation: merge, convert or compress; return the model to save."""
        return model
