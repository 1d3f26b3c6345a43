"""Trained models for inference, as commands name them: by the folder of a run, or as in an experiment's `model.name`.

The heavy imports are late: commands look at what they were given first.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from loras_bench.config import Experiment, ModelConfig
from loras_bench.errors import ConfigError
from loras_bench.results.store import RECORD_FILE

if TYPE_CHECKING:
    import torch

    from loras_bench.models.loading import LoadedModel
    from loras_bench.models.saved import PreviousRun


def load_trained(run: PreviousRun) -> LoadedModel:
    """The model that a run left, its adapters merged, for the data that it was trained on; on the CPU.

    Raises:
        UserError: The data set is not there; see also `PreviousRun.load`.
    """
    from loras_bench.data import load_data

    data = load_data(Experiment.model_validate(run.record.config).data, run.tokenizer, splits=())
    return run.load(data, run.record.seed)


def load_causal(name: str) -> tuple[LoadedModel, Any]:
    """A language model by the folder of its run or by name, on the CPU; and its tokenizer.

    Raises:
        ConfigError: The name is unknown, or the model is no language model.
        UserError: It cannot be read.
    """
    from loras_bench.models.loading import load_model, load_tokenizer
    from loras_bench.models.saved import open_run

    if (Path(name) / RECORD_FILE).exists():
        run = open_run(Path(name))
        if run.record.task == "classification":
            raise ConfigError(f"{name} is a classifier, which predicts no tokens", "give runs of language models")
        return load_trained(run), run.tokenizer
    config = ModelConfig(name=name)
    tokenizer = load_tokenizer(config, None)
    return load_model(config, task="language_modeling", tokenizer=tokenizer, num_labels=0, seed=0), tokenizer


def for_inference(model: Any, device: torch.device) -> None:
    """Give a model our attention, as every arm has it, for the device that it will run on; and no key/value cache."""
    from loras_bench.attention.dispatch import ModelAttention

    model.config.use_cache = False
    if hasattr(model.base_model, "model_attention"):  # folded models came with it
        model.base_model.model_attention.device = device
    else:
        ModelAttention.install(model, device=device)
