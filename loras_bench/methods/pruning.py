"""Pruning while training: weights with the lowest scores become zero, more of them step by step, and stay zero.

The scores `fpp` are ours, after the idea of forward propagation pruning (Belhaouari and Kraidia 2025, doi
10.1038/s41598-025-92586-5, of which we know the abstract): forward passes alone. `magnitude` (Han et al. 2015), `wanda`
(Sun et al. 2023), `movement` (Sanh et al. 2020) and `random` are what they are compared with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from loras_bench.errors import ConfigError
from loras_bench.methods.base import Method, MethodConfig, Stage
from loras_bench.methods.lora import ATTENTION, FEED_FORWARD, Lora
from loras_bench.methods.sparse_lora import SparseLora

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig

    from loras_bench.optimizer import MasterAdamW
    from loras_bench.pruning.blocks import Block, Part

LINEARS = {"feed_forward": FEED_FORWARD, "attention": ATTENTION}


class PruneConfig(MethodConfig):
    """Which weights become zero, how many, and when."""

    kind: Literal["prune"]
    sparsity: float = Field(gt=0, lt=1)
    """Share of zeros at the end: of each weight matrix (of each of its rows with `wanda`), or of the units."""
    score: Literal["fpp", "magnitude", "random", "wanda", "movement"] = "fpp"
    """What the lowest of are pruned: `fpp` |weight| times the norm of its input, compared within a matrix; `wanda` the
    same within each output; `magnitude` |weight|; `movement` the sum of -gradient * weight over the steps so far.
    """
    scope: tuple[Literal["embeddings", "feed_forward", "attention"], ...] = Field(
        default=("embeddings", "feed_forward"), min_length=1
    )
    """Input embeddings (and with them an output layer that is tied to them), and linear layers; never biases alone."""
    pattern: Literal["unstructured", "2:4", "structured"] = "unstructured"
    """Single weights; two of each four neighbours that one output reads; or whole hidden units and embedding rows."""
    start: float = Field(default=0.0, ge=0, le=1)
    """Share of the optimizer steps after which sparsity begins to rise."""
    end: float = Field(default=0.5, ge=0, le=1)
    """Share of the optimizer steps after which it is reached; 0 prunes once, before training."""
    every: int = Field(default=10, ge=1)
    """Steps between two changes of the masks while sparsity rises."""
    calibration_tokens: int = Field(default=65_536, ge=1)
    """Training tokens that `fpp` and `wanda` read in forward passes before training."""

    @model_validator(mode="after")
    def _possible(self) -> PruneConfig:
        if len(set(self.scope)) < len(self.scope):
            raise ValueError("`scope` names a part twice")
        if self.start > self.end:
            raise ValueError("`start` comes after `end`")
        if self.score == "movement" and self.end == 0:
            raise ValueError(
                "`movement` sums over steps, and with `end: 0` there are none before the weights are chosen"
            )
        if self.pattern == "2:4" and self.sparsity != 0.5:
            raise ValueError("two of four is a `sparsity` of 0.5")
        if self.pattern == "2:4" and "embeddings" in self.scope:
            raise ValueError("`2:4` is for matrix products, embeddings are looked up: leave them out of `scope`")
        if self.pattern == "structured" and "attention" in self.scope:
            raise ValueError("`structured` prunes hidden units and embedding rows: leave attention out of `scope`")
        if self.pattern == "structured" and self.score == "wanda":
            raise ValueError("`wanda` compares the weights of one output, so it cannot score whole units: use `fpp`")
        return self


class Prune(Method[PruneConfig]):
    """Holds the masks; zeroes weights, their float32 masters and moments when masks change, and keeps gradients off.

    With gradient, moments and master zero, AdamW leaves a weight at zero whatever its decay and momentum. The
    gradients are masked in the backward pass, so that what is pruned has no part in their norm either.

    Attributes:
        blocks: What is pruned, each with its mask; there from `start` on.
    """

    stage: ClassVar[Stage] = Stage.COMPRESS

    def __init__(self, config: PruneConfig) -> None:
        super().__init__(config)
        self.blocks: list[Block] = []
        self._selected: list[Part] = []
        self._hooks: list[Any] = []
        self._states: dict[int, list[Tensor]] = {}
        self._dense: dict[int, Tensor] = {}

    def check(self, others: Sequence[Method[Any]], model_config: PretrainedConfig) -> None:
        """Refuse a second such method, and what would read or train other weights than those that are pruned."""
        for other in others:
            if isinstance(other, Prune):
                raise ConfigError("`prune` is listed twice in methods", "name all parts of the model in one `scope`")
            if isinstance(other, SparseLora):
                raise ConfigError(
                    "`sparse_lora` estimates channels from the weights before `prune` changes them",
                    "prune in a run of its own, and go on from it by `model.run`",
                )
            if isinstance(other, Lora) and self.config.score == "movement":
                raise ConfigError(
                    "`movement` scores weights by their gradients, and `lora` freezes them", "use another `score`"
                )
            if isinstance(other, Lora) and other.config.variant == "dora":
                raise ConfigError(
                    "`variant: dora` of `lora` rescales each row by the norm of what it was, which zeros of `prune` "
                    "spoil: a pruned unit comes back, or is NaN",
                    "use `variant: lora`",
                )
            if isinstance(other, Lora) and other.config.train_embeddings and "embeddings" in self.config.scope:
                raise ConfigError(
                    "`train_embeddings` of `lora` trains a copy of the embeddings, which `prune` would not reach",
                    "leave embeddings out of `scope`, or train_embeddings out of `lora`",
                )

    def prepare(self, model: nn.Module) -> nn.Module:
        """Find what can be pruned; nothing is changed yet.

        Raises:
            ConfigError: A part of the scope is not there, a matrix has no whole groups of four inputs, or the sparsity
                comes to none or all of what is compared.
        """
        self._selected = self._parts_of(model)
        for part in self._selected:
            self._check_part(part)
        return model

    def _check_part(self, part: Part) -> None:
        """Refuse what the pattern or the sparsity cannot do with the sizes of a part."""
        outputs, inputs = part.matrix.by_outputs(part.matrix.weight).shape
        name, sparsity = part.matrix.name, self.config.sparsity
        if self.config.pattern == "2:4" and inputs % 4:
            raise ConfigError(
                f"prune: {name} has {inputs} inputs, which are no groups of four", "use another `pattern`"
            )
        compared = inputs if part.writers is not None or self.config.score == "wanda" else outputs * inputs
        if not 0 < (pruned := round(sparsity * compared)) < compared:
            what = "units" if part.writers is not None else "weights that are compared"
            raise ConfigError(
                f"prune: a sparsity of {sparsity} prunes {pruned} of the {compared} {what} in {name}",
                f"for this layer it lies between {0.5 / compared:.2g} and 1 - {0.5 / compared:.2g}",
            )

    def _parts_of(self, model: nn.Module) -> list[Part]:
        """What shares a mask: single matrices, or those that read whole units with those that write them."""
        from loras_bench.pruning.blocks import Part, embedding_of, hidden_units_of, linears_of

        structured = self.config.pattern == "structured"
        parts: list[Part] = []
        for scope in self.config.scope:
            if scope == "embeddings":
                found = [Part(embedding_of(model), () if structured else None)]
            elif structured:
                found = [Part(*units) for units in hidden_units_of(model)]
            else:
                found = [Part(matrix) for matrix in linears_of(model, LINEARS[scope])]
            if not found:
                raise ConfigError(f"prune: {type(model).__name__} has no {scope} layers that can be pruned")
            parts += found
        return parts

    def plan(self, steps: int) -> None:
        """The masks change at fixed steps."""
        from loras_bench.pruning.schedule import CubicSchedule

        config = self.config
        self._schedule = CubicSchedule.over(steps, config.sparsity, config.start, config.end, config.every)

    def start(self, objective: nn.Module, optimizer: MasterAdamW, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Measure inputs where scores ask for it, make the masks, and prune what goes before the first step."""
        import torch

        from loras_bench.pruning.blocks import Block
        from loras_bench.pruning.scores import input_norms

        self.blocks = [Block.of(part) for part in self._selected]
        if self.config.score in ("fpp", "wanda"):
            matrices = [block.matrix for block in self.blocks]
            norms = input_norms(objective, matrices, batches, self.config.calibration_tokens)
            for block, norm_i in zip(self.blocks, norms, strict=True):
                block.norm_i = norm_i
        elif self.config.score == "movement":
            for block in self.blocks:
                block.movement = torch.zeros(block.pruned.shape, device=block.pruned.device)
        self._seed = torch.initial_seed()
        self._hold(optimizer)
        if self._schedule.changes(0):
            self._raise(0)

    def _hold(self, optimizer: MasterAdamW) -> None:
        """Find where the values of each place are kept, and keep gradients off what is pruned."""
        self._optimizer = optimizer
        self._states = {
            id(parameter): states
            for group in optimizer.groups
            for parameter, *states in zip(
                group.params, *map(group.views, (group.master, group.exp_avg, group.exp_avg_sq)), strict=True
            )
        }
        for block in self.blocks:
            for parameter, shape in block.places:
                if id(parameter) in self._states:
                    self._hooks.append(parameter.register_hook(partial(self._gradient, block, parameter, shape)))
                else:  # frozen, so in no optimizer state from which steps could be undone
                    self._dense[id(parameter)] = parameter.detach().cpu().clone()

    def _gradient(self, block: Block, weight: nn.Parameter, shape: tuple[int, ...], gradient: Tensor) -> Tensor:
        """Mask the gradient of a micro-batch: in the backward pass, so it may be captured."""
        from loras_bench.pruning.scores import movement

        if block.movement is not None:
            block.movement += movement(gradient, weight.detach(), shape).view(block.movement.shape)
        return gradient.masked_fill(block.pruned.view(shape), 0)

    def before_step(self, step: int) -> None:
        """Movement is summed from the first step on: not over passes before it, which only count operations."""
        if step == 0:
            for block in self.blocks:
                if block.movement is not None:
                    block.movement.zero_()

    def after_step(self, step: int) -> None:
        if self._schedule.changes(step + 1):
            self._raise(step + 1)

    def _raise(self, taken: int) -> None:
        """Prune as much as the schedule has after so many steps."""
        from loras_bench.pruning.masks import raised

        sparsity, two_of_four = self._schedule.sparsity(taken), self.config.pattern == "2:4"
        for index, block in enumerate(self.blocks):
            scores, mask = self._scores(index, block), block.pruned
            if mask.ndim == 2:
                scores, mask = block.matrix.by_outputs(scores), block.matrix.by_outputs(mask)
            groups = len(mask) if self.config.score == "wanda" else 1
            pruned_gn = raised(mask.reshape(groups, -1), scores.reshape(groups, -1), sparsity, two_of_four=two_of_four)
            mask.copy_(pruned_gn.view(mask.shape))
            _as_rank_0(block.pruned)
            for parameter, shape in block.places:
                for values in self._states.get(id(parameter), [parameter.detach()]):
                    values.masked_fill_(block.pruned.view(shape), 0)
        self._optimizer.write_back()

    def _scores(self, index: int, block: Block) -> Tensor:
        """Of the weights as they are now, shaped as the mask: float32."""
        from loras_bench.distributed import mean_over_processes
        from loras_bench.pruning.scores import random_scores, unit_scores, weight_scores

        if block.movement is not None:
            return mean_over_processes(block.movement)  # each has seen its share of the rows
        if self.config.score == "random":
            return random_scores(block.pruned.shape, self._seed + index, block.pruned.device)
        weight = block.matrix.weight
        weight_oi = block.matrix.by_outputs(self._states.get(id(weight), [weight.detach()])[0])
        if block.pruned.ndim == 1:
            return unit_scores(weight_oi, block.norm_i)
        return block.matrix.by_outputs(weight_scores(weight_oi, block.norm_i))

    def state_dict(self) -> dict[str, Tensor]:
        """Masks packed as bits, and what scores are made of."""
        return {name: tensor for block in self.blocks for name, tensor in block.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore masks and frozen weights; those that train are restored by the optimizer."""
        for block in self.blocks:
            block.load_state_dict(state)
            for parameter, shape in block.places:
                if (dense := self._dense.get(id(parameter))) is not None:
                    parameter.detach().copy_(dense).masked_fill_(block.pruned.view(shape), 0)

    def finish(self, model: nn.Module) -> nn.Module:
        """The weights keep their zeros and their shapes; gradients are masked no more."""
        while self._hooks:
            self._hooks.pop().remove()
        return model


def _as_rank_0(mask: Tensor) -> None:
    """Every process of a job prunes what the first one does: their sums may differ in the last digit, or in all."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.broadcast(mask.view(torch.uint8), src=0)
