"""From a resolved experiment to what its training needs: read data and model, assemble the methods, build the loop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loras_bench.attention.dispatch import ModelAttention
from loras_bench.checkpoint import TrainingState
from loras_bench.config import Experiment
from loras_bench.data import TaskData, load_data, training_texts
from loras_bench.errors import ConfigError
from loras_bench.methods import METHODS, REPLACING
from loras_bench.methods.base import Method, Taps
from loras_bench.models.loading import LoadedModel, load_model
from loras_bench.models.objective import Objective, unwrapped
from loras_bench.models.saved import open_run
from loras_bench.models.tokenizer import load_tokenizer
from loras_bench.optimizer import MasterAdamW
from loras_bench.training import Loop, StepPlan, plan_batches, plan_steps

if TYPE_CHECKING:
    from accelerate import Accelerator

    from loras_bench.models.fused import FusedForward
    from loras_bench.models.fused_linears import FusedLinears


@dataclass
class Ingredients:
    """Data and model as they were read."""

    data: TaskData
    tokenizer: Any
    loaded: LoadedModel
    chain_energy_j: float | None
    """Joules of the runs that this one goes on from; None where they are unknown, 0 where there are none."""


@dataclass
class Assembly(Ingredients):
    """With all methods applied, on the CPU in float32: enough to count, not yet to train."""

    model: nn.Module
    objective: Objective
    attention: ModelAttention
    methods: list[Method[Any]]
    plan: StepPlan

    def parameter_counts(self) -> tuple[int, int]:
        """All parameters and the trained ones; tied weights count once."""
        parameters = list(self.model.parameters())
        return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


@dataclass
class Build(Assembly):
    """A run ready to step, on its device."""

    optimizer: MasterAdamW
    state: TrainingState
    loop: Loop
    accelerator: Accelerator
    fused: FusedForward | FusedLinears | None
    """Our forward pass in the place of transformers'; removed before the model is merged and saved."""


def build_methods(experiment: Experiment, model_config: Any) -> list[Method[Any]]:
    """Methods in stage order, each checked against the others.

    Raises:
        ConfigError: Two methods conflict, or one asks for what this model cannot do.
    """
    methods = sorted((METHODS[config.kind](config) for config in experiment.methods), key=lambda method: method.stage)
    made = [method for kind in REPLACING if (method := kind.of(model_config))]  # by the run that this one goes on from
    try:
        for method in made:
            method.check(methods, model_config)
        for index, method in enumerate(methods):
            method.check([*made, *methods[:index], *methods[index + 1 :]], model_config)
    except ConfigError as error:
        raise ConfigError(f"experiment `{experiment.name}`: {error.message}", error.hint) from None
    return methods


def read(experiment: Experiment, seed: int, pretrained: Path | None = None) -> Ingredients:
    """Tokenizer, data and model; from the catalog, from another run, or from scratch.

    Args:
        experiment: Resolved for the device.
        seed: Of a classification head that the model lacks.
        pretrained: The run that `pretrain:` made, for models from scratch.
    """
    config = experiment.model
    origin = pretrained or (Path(config.run) if config.run else None)
    previous = open_run(origin) if origin else None
    # A dry run may come before its pretraining: the tokenizer is trained on what pretraining will read.
    texts_of = (experiment.pretrain or experiment).data
    tokenizer = previous.tokenizer if previous else load_tokenizer(config, lambda: training_texts(texts_of))
    splits: Sequence[str] = ("train", *experiment.evaluation.splits)
    if experiment.evaluation.every_tokens is not None and "validation" not in splits:
        splits = (*splits, "validation")
    data = load_data(experiment.data, tokenizer, splits=splits)
    if previous:
        return Ingredients(data, tokenizer, previous.load(data, seed), previous.chain_energy_j)
    loaded = load_model(config, task=data.task, tokenizer=tokenizer, num_labels=data.num_labels, seed=seed)
    return Ingredients(data, tokenizer, loaded, 0.0)


def assemble(
    experiment: Experiment, seed: int, device: torch.device, ingredients: Ingredients, *, fitted: bool = True
) -> Assembly:
    """Apply the methods.

    Args:
        experiment: Resolved for the device.
        seed: Of the adapters and the order of the data.
        device: Where the run will be; nothing is put there yet.
        ingredients: The model in them is changed.
        fitted: Whether methods fit the weights; False where only sizes matter.
    """
    from accelerate.utils import set_seed

    data, loaded = ingredients.data, ingredients.loaded
    if loaded.max_positions is not None and experiment.data.sequence_length > loaded.max_positions:
        raise ConfigError(
            f"data.sequence_length {experiment.data.sequence_length} is longer than {loaded.label} can read",
            f"it has positions for {loaded.max_positions} tokens",
        )
    model: nn.Module = loaded.model
    methods = build_methods(experiment, model.config)
    attention = ModelAttention.install(model, experiment.model.dense_attention, device)
    set_seed(seed)  # the adapters' first weights depend on the seed alone, not on how the model was read
    plan = plan_steps(experiment.training, data, experiment.data.sequence_length, seed)
    for method in methods:
        if fitted:
            method.observe(_one_pass(data, plan))
        model = method.prepare(model) if fitted else method.resize(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("nothing is trained: every parameter is frozen")
    if experiment.training.gradient_checkpointing:
        unwrapped(model).gradient_checkpointing_enable({"use_reentrant": False})
        # transformers lets the embeddings' output require gradients, which only reentrant checkpointing needs: LoRA
        # would compute gradients of the first layer's input for nothing.
        unwrapped(model).disable_input_require_grads()
    if any(method.wants_taps for method in methods):
        attention.taps = Taps()
    for method in methods:
        method.plan(plan.steps)
    objective = Objective(model, data.task, experiment.training.loss).train()  # type: ignore[arg-type]
    return Assembly(
        **vars(ingredients), model=model, objective=objective, attention=attention, methods=methods, plan=plan
    )


def build(experiment: Experiment, seed: int, device: str, ingredients: Ingredients) -> Build:
    """Assemble a run and put it on its device with its optimizer.

    Args:
        experiment: Resolved for the device.
        seed: Of the adapters and the order of the data.
        device: `cuda` or `cpu`.
        ingredients: The model in them is changed.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no")  # not what the launcher's defaults say
    parts = assemble(experiment, seed, accelerator.device, ingredients)
    if parts.plan.micro_rows % accelerator.num_processes:
        rows, processes = parts.plan.micro_rows, accelerator.num_processes
        raise ConfigError(
            f"{rows} rows of a forward pass do not divide over {processes} processes", "see training.micro_batch_size"
        )
    parts.model.to(accelerator.device)
    optimizer = _optimizer(experiment, parts)
    for method in parts.methods:
        method.start(parts.objective, optimizer, _one_pass(parts.data, parts.plan, parts.methods))
    fused = _fuse(parts.model) if experiment.model.implementation == "fused" else None
    prepared: Any = parts.objective
    if accelerator.num_processes > 1:
        prepared = accelerator.prepare(prepared)
    if experiment.training.compile:
        prepared.compile(dynamic=False)
    loop = Loop(
        prepared,
        optimizer,
        parts.methods,
        parts.data,
        parts.plan,
        experiment.training,
        accelerator,
        parts.attention.taps,
        graphed=bool(experiment.training.cuda_graph),
    )
    state = TrainingState(optimizer, parts.methods, accelerator.device)
    return Build(**vars(parts), optimizer=optimizer, state=state, loop=loop, accelerator=accelerator, fused=fused)


def _one_pass(data: TaskData, plan: StepPlan, methods: Sequence[Method[Any]] = ()) -> Iterator[dict[str, Tensor]]:
    """The micro-batches of the first steps, as many as read every training row."""
    for step in range(math.ceil(plan.rows / plan.rows_per_step)):
        yield from plan_batches(data, plan, step, methods=methods)


def _fuse(model: nn.Module) -> FusedForward | FusedLinears:
    """The fused forward pass of the architecture; where it has none, fused LoRA layers."""
    from loras_bench.models.fused_bert import FusedBert  # late: they need Triton
    from loras_bench.models.fused_gpt2 import FusedGpt2
    from loras_bench.models.fused_linears import FusedLinears
    from loras_bench.models.fused_llama import FusedLlama

    base = unwrapped(model).base_model
    for kind in (FusedLlama, FusedBert, FusedGpt2):
        if kind.why_not(base.config) is None and not hasattr(base.config, "folding"):
            return kind.install(base)
    return FusedLinears(model)


def _optimizer(experiment: Experiment, parts: Assembly) -> MasterAdamW:
    """Masters are copied before the model is cast, so that they hold what was loaded."""
    training = experiment.training
    dtype = getattr(torch, experiment.model.dtype)
    groups = [group for method in parts.methods for group in method.parameter_groups(parts.model)]
    optimizer = MasterAdamW(parts.model, groups, training.learning_rate, training.weight_decay, training.betas, dtype)
    for parameter in parts.model.parameters():  # buffers such as rotary frequencies keep their precision
        parameter.data = parameter.data.to(dtype)
    return optimizer
