"""What a run leaves of its weights (a whole model or PEFT adapters, safetensors), and how another goes on from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loras_bench.config import ModelConfig
from loras_bench.errors import ConfigError
from loras_bench.models.loading import LoadedModel, load_model
from loras_bench.models.tokenizer import load_tokenizer
from loras_bench.results.record import Record
from loras_bench.results.store import RECORD_FILE, read_record

if TYPE_CHECKING:
    from loras_bench.data import TaskData

MODEL, ADAPTER, BASE, TOKENIZER = "model", "adapter", "base", "tokenizer"
PRUNED_SHARE = 0.05
"""A matrix with more exact zeros than this was pruned. Trained weights have none; what is dequantised has a few (0.07 %
of SmolLM2's Q4_1, about 1 % of 8 bits), and 5 % of zeros is less than pruning is done for. Quantised to four bits or
fewer with a level at zero (Q4_0), a tenth is zero: such weights cannot be told from pruned ones, and count as those.
"""


def save_weights(folder: Path, model: Any, tokenizer: Any, *, changed_base: bool = False) -> None:
    """Save adapters in PEFT's format, or the whole model where there are none; and the tokenizer, beside a model too.

    Args:
        folder: Of the run.
        model: Adapters on a base that has changed are taken off it.
        tokenizer: Of the model.
        changed_base: Whether the model that adapters were trained on is not what was loaded: it is saved beside them.
    """
    is_peft = hasattr(model, "peft_config")
    model.save_pretrained(folder / (ADAPTER if is_peft else MODEL))
    if is_peft and changed_base:
        model.unload().save_pretrained(folder / BASE)
    tokenizer.save_pretrained(folder / TOKENIZER)
    if not is_peft:
        tokenizer.save_pretrained(folder / MODEL)  # so that `model.name` can be that folder


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
            ConfigError: The run kept adapters that do not fit the task or the number of its classes, or that cannot be
                merged.
        """
        if (self.folder / MODEL).is_dir():
            return self._with_label(_load(ModelConfig(name=str(self.folder / MODEL)), data, seed, self.tokenizer))
        if (self.record.task == "classification") != (data.task == "classification"):  # the others share their head
            raise ConfigError(
                f"{self.folder}: adapters of {self.record.task} do not fit {data.task}", "go on from a full model"
            )
        loaded = self._base(data)
        loaded.model = self._merged(loaded.model, data)
        for parameter in loaded.model.parameters():
            parameter.requires_grad_(True)
        return self._with_label(loaded)

    def _merged(self, base: Any, data: TaskData) -> Any:
        """The model that adapters were trained on, with them in its weights."""
        from peft import PeftModel

        try:
            adapted: Any = PeftModel.from_pretrained(base, str(self.folder / ADAPTER))
        except RuntimeError as error:
            mismatch = str(error).splitlines()[-1].strip()
            raise ConfigError(f"{self.folder}: its adapters do not fit {data.name}: {mismatch}") from None
        if filled := _pruned_under_adapters(base):
            raise ConfigError(
                f"{self.folder}: merging its adapters would fill the zeros of {len(filled)} pruned layers, "
                f"{filled[0]} first",
                "go on from a run that prunes without `lora`, or whose adapters have other `targets`",
            )
        return adapted.merge_and_unload()

    def _base(self, data: TaskData) -> LoadedModel:
        """What the adapters were trained on; its random parts follow the seed of that run."""
        config, seed = ModelConfig.model_validate(self.record.config["model"]), self.record.seed
        if (self.folder / BASE).is_dir():
            return _load(ModelConfig(name=str(self.folder / BASE)), data, seed, self.tokenizer)
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


def _pruned_under_adapters(model: Any) -> list[str]:
    """Names of the adapted layers whose own weights are pruned: merging would leave no zeros of them.

    Read off the weights, whatever made the zeros, and of tied ones under either name.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    shares = {name: float((m.get_base_layer().weight == 0).float().mean()) for name, m in layers.items()}
    return sorted(name for name, share in shares.items() if share > PRUNED_SHARE)


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
