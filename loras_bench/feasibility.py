"""What can be refused before anything runs: methods against each other, and against their model without its weights.

The models are made on the meta device from their configurations, so that a large one costs no more than a small one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from loras_bench.attention.dispatch import ModelAttention
from loras_bench.build import build_methods
from loras_bench.catalog import DATASETS, Task
from loras_bench.config import Experiment, ModelConfig, TokenizerConfig
from loras_bench.errors import UserError
from loras_bench.methods import REPLACING
from loras_bench.models.catalog import locate_model
from loras_bench.models.gguf import as_safetensors
from loras_bench.models.loading import _auto_class, _check_family, _fit_to_task, _read_config, load_model
from loras_bench.models.saved import BASE, MODEL, open_run
from loras_bench.requests import Device

CLASSES = 2
"""Of a classification head, of which no method asks more than that it is there."""


def check_experiments(experiments: Sequence[Experiment], device: Device) -> None:
    """Refuse what no run of these could do; each combination of a model and methods is looked at once.

    What depends on weights or data is left to the runs: a checkpoint that is incomplete, a loss that is no number.

    Raises:
        ConfigError: Two methods conflict, or one asks for what its model cannot do.
        UserError: A model's configuration cannot be read.
    """
    seen = []
    for experiment in experiments:
        if (asked := (experiment.model, experiment.pretrain, experiment.methods, experiment.data.task)) not in seen:
            seen.append(asked)
            _check(experiment, torch.device(device.kind))


def _check(experiment: Experiment, device: torch.device) -> None:
    known = DATASETS.get(experiment.data.name)
    task = known.task if known else experiment.data.task or "language_modeling"
    with _named(experiment):
        model = _outline(experiment.model, task)
    methods = build_methods(experiment, model.config)
    with _named(experiment), torch.device("meta"):
        ModelAttention.install(model, experiment.model.dense_attention, device)
        for method in methods:
            with suppress(RuntimeError):  # what reads values finds none here, and is left to the run
                model = method.resize(model)


@contextmanager
def _named(experiment: Experiment) -> Iterator[None]:
    """Say in errors whose they are."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"experiment `{experiment.name}`: {error.message}", error.hint) from None


def _outline(given: ModelConfig, task: Task) -> Any:
    """The model that an experiment starts from, with the modules that earlier runs left, and without values."""
    model = _origin(given)
    if model.name is None:
        tokenizer: Any = _AnyTokenizer((model.tokenizer or TokenizerConfig()).vocabulary)
        with torch.device("meta"):
            return load_model(model, task=task, tokenizer=tokenizer, num_labels=CLASSES, seed=0).model
    config = _read_config(as_safetensors(locate_model(model.name, model.revision)))
    _check_family(config, task)
    tokenizer = _AnyTokenizer(config.vocab_size)
    _fit_to_task(config, task, tokenizer, CLASSES)
    with torch.device("meta"):
        outline = _auto_class(task).from_config(config)
        for kind in REPLACING:
            if (made := kind.of(config)) is not None:
                outline = made.resize(outline)
    return outline


def _origin(model: ModelConfig) -> ModelConfig:
    """In the place of a run to go on from what it saved, or what its adapters belong to."""
    if model.run is None:
        return model
    previous = open_run(Path(model.run))
    for part in (MODEL, BASE):
        if (previous.folder / part).is_dir():
            return ModelConfig(name=str(previous.folder / part))
    return _origin(ModelConfig.model_validate(previous.record.config["model"]))


class _AnyTokenizer:
    """What sizes depend on of a tokenizer that is not read or trained yet."""

    pad_token_id = bos_token_id = eos_token_id = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size
