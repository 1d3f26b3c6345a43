"""Trained models for inference, as commands name them: by the folder of a run, or as in an experiment's `model.name`.

The heavy imports are late: commands look at what they were given first.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loras_bench.config import Experiment, ModelConfig
from loras_bench.errors import ConfigError, UserError, did_you_mean
from loras_bench.models.catalog import MODELS, ModelLocation, locate_model
from loras_bench.results.store import RECORD_FILE

if TYPE_CHECKING:
    import torch

    from loras_bench.models.loading import LoadedModel
    from loras_bench.models.saved import PreviousRun

NAME_A_RUN = f"name the folder of a run, which holds {RECORD_FILE}"


def load_trained(run: PreviousRun) -> LoadedModel:
    """The model that a run left, its adapters merged, for the data that it was trained on; on the CPU.

    Raises:
        UserError: The data set is not there; see also `PreviousRun.load`.
    """
    from loras_bench.data import load_data

    data = load_data(Experiment.model_validate(run.record.config).data, run.tokenizer, splits=())
    return run.load(data, run.record.seed)


def open_trained(path: Path) -> PreviousRun:
    """A finished run with weights, by its folder or the record in it.

    Raises:
        UserError: There is none; the message says what is there instead.
    """
    from loras_bench.models.saved import open_run

    folder = path.parent if path.name == RECORD_FILE else path
    if not path.exists():
        near = did_you_mean(str(folder), map(str, folder.parent.glob("*/")))
        raise UserError(f"there is no {path}{near}", NAME_A_RUN)
    if not (folder / RECORD_FILE).exists():
        below = next(folder.glob(f"*/**/{RECORD_FILE}"), None)
        hint = f"{NAME_A_RUN}, such as {below.parent}" if below else NAME_A_RUN
        raise UserError(f"{path} holds no {RECORD_FILE}", hint)
    try:
        return open_run(folder)
    except ConfigError as error:
        raise UserError(error.message.removeprefix("model.run: "), error.hint) from None


def open_causal(name: str) -> PreviousRun | ModelConfig:
    """What a command calls a language model: a run, or a model by the name that `model.name` would have.

    Raises:
        UserError: There is neither, or the run was of a classifier.
    """
    path = Path(name)
    if path.name != RECORD_FILE and not (path / RECORD_FILE).exists():
        if next(path.glob(f"*/**/{RECORD_FILE}"), None):
            return open_trained(path)  # which says that it holds runs
        locate_by_name(name, MODELS)
        return ModelConfig(name=name)
    run = open_trained(path)
    if run.record.task == "classification":
        raise UserError(f"{name} is a classifier, which predicts no tokens", "give runs of language models")
    return run


def load_causal(opened: PreviousRun | ModelConfig) -> tuple[LoadedModel, Any]:
    """A language model on the CPU, and its tokenizer.

    Raises:
        UserError: It cannot be read, or predicts no tokens.
    """
    from loras_bench.models.loading import load_model, load_tokenizer

    if not isinstance(opened, ModelConfig):
        return load_trained(opened), opened.tokenizer
    tokenizer = load_tokenizer(opened, None)
    return load_model(opened, task="language_modeling", tokenizer=tokenizer, num_labels=0, seed=0), tokenizer


def locate_by_name(name: str, known: Collection[str]) -> ModelLocation:
    """Find a model of this machine.

    Args:
        name: Of the catalog, a folder under $LORAS_BENCH_MODELS, or a path.
        known: Names that the command takes, for the hint.

    Raises:
        UserError: There is none.
    """
    try:
        return locate_model(name)
    except ConfigError:  # its words are about keys of an experiment, and hub ids, which need one
        near = did_you_mean(name, [*known, *map(str, Path(name).parent.glob("*/"))])
        raise UserError(
            f"no model, and no folder of one, is called `{name}`{near}",
            f"known names: {', '.join(known)}; or give a folder",
        ) from None


def for_inference(model: Any, device: torch.device) -> None:
    """Give a model our attention, as every arm has it, for the device that it will run on; and no key/value cache."""
    from loras_bench.attention.dispatch import ModelAttention

    model.config.use_cache = False
    ModelAttention.install(model, device=device)
