"""What a run leaves of its weights (a whole model or PEFT adapters, safetensors), and how another goes on from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from loras_bench.config import ModelConfig
from loras_bench.errors import ConfigError
from loras_bench.models.loading import LoadedModel, load_model
from loras_bench.models.tokenizer import load_tokenizer
from loras_bench.results.record import Record
from loras_bench.results.store import RECORD_FILE, read_record

if TYPE_CHECKING:
    from loras_bench.data import TaskData

MODEL, ADAPTER, TOKENIZER = "model", "adapter", "tokenizer"


def save_weights(folder: Path, model: nn.Module, tokenizer: Any) -> None:
    """Save adapters in PEFT's format, or the whole model where there are none; and the tokenizer."""
    is_peft = hasattr(model, "peft_config")
    model.save_pretrained(folder / (ADAPTER if is_peft else MODEL))  # type: ignore[operator]
    tokenizer.save_pretrained(folder / TOKENIZER)


@dataclass
class PreviousRun:
    """A finished run to go on from."""

    folder: Path
    record: Record
    tokenizer: Any

    @property
    def chain_energy_j(self) -> float | None:
        """Joules of that run and of all before it."""
        return self.record.chain_energy_j

    def load(self, data: TaskData, seed: int) -> LoadedModel:
        """The trained model, adapters merged, with a head for the new task where the task changes.

        Raises:
            ConfigError: The run kept adapters that do not fit the task or the number of its classes.
        """
        if (self.folder / MODEL).is_dir():
            return self._with_label(_load(ModelConfig(name=str(self.folder / MODEL)), data, seed, self.tokenizer))
        if (self.record.task == "classification") != (data.task == "classification"):  # the others share their head
            raise ConfigError(
                f"{self.folder}: adapters of {self.record.task} do not fit {data.task}", "go on from a full model"
            )
        from peft import PeftModel

        loaded = self._base(data)
        try:
            adapted = PeftModel.from_pretrained(loaded.model, str(self.folder / ADAPTER))
        except RuntimeError as error:
            mismatch = str(error).splitlines()[-1].strip()
            raise ConfigError(f"{self.folder}: its adapters do not fit {data.name}: {mismatch}") from None
        loaded.model = adapted.merge_and_unload()  # type: ignore[operator]
        for parameter in loaded.model.parameters():
            parameter.requires_grad_(True)
        return self._with_label(loaded)

    def _base(self, data: TaskData) -> LoadedModel:
        """What the adapters were trained on; its random parts follow the seed of that run."""
        config, seed = ModelConfig.model_validate(self.record.config["model"]), self.record.seed
        if config.run is not None:
            return open_run(Path(config.run)).load(data, seed)
        if self.record.config["pretrain"] is not None:
            adapter = json.loads((self.folder / ADAPTER / "adapter_config.json").read_text(encoding="utf-8"))
            config = ModelConfig(name=adapter["base_model_name_or_path"])
        return _load(config, data, seed, self.tokenizer)

    def _with_label(self, loaded: LoadedModel) -> LoadedModel:
        # With the hash: models that differ in how they were made must not share a panel.
        loaded.label = f"{self.record.model} + {self.record.name} {self.record.run_id.rpartition('-')[2]}"
        return loaded


def _load(config: ModelConfig, data: TaskData, seed: int, tokenizer: Any) -> LoadedModel:
    return load_model(config, task=data.task, tokenizer=tokenizer, num_labels=data.num_labels, seed=seed)


def open_run(folder: Path) -> PreviousRun:
    """Read a finished run.

    Raises:
        ConfigError: There is none, it did not finish, or it kept no weights.
    """
    try:
        record = read_record(folder / RECORD_FILE)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.run: no finished run in {folder} ({error})", "give the folder that holds result.json"
        ) from None
    if record.status != "completed":
        raise ConfigError(
            f"model.run: {folder} did not finish ({record.status}: {record.reason})", "run it to its end first"
        )
    if not ((folder / MODEL).is_dir() or (folder / ADAPTER).is_dir()):
        raise ConfigError(f"model.run: {folder} holds no weights", "run it again with `save: true`")
    return PreviousRun(folder, record, load_tokenizer(ModelConfig(name=str(folder / TOKENIZER)), None))
