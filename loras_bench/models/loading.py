"""From the `model` section of a YAML file to a model with float32 weights; no remote code, no pickles."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loras_bench.attention.families import DROPOUT_FIELD
from loras_bench.catalog import Task
from loras_bench.errors import ConfigError, UserError
from loras_bench.models.catalog import ModelLocation, locate_model
from loras_bench.models.gguf import as_safetensors, file_sha256
from loras_bench.models.smaller import from_pretrained
from loras_bench.models.tokenizer import ENCODER_FAMILIES, load_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from loras_bench.config import ModelConfig

FAMILIES = tuple(DROPOUT_FIELD)
# Parts that a classifier may lack in a checkpoint, because they are trained for the task at hand.
_HEADS = ("score.", "classifier.", "bert.pooler.", "pooler.")


@dataclass
class LoadedModel:
    """A model and what a record says about it.

    `origin` names where the weights come from (place, revision or SHA-256, fresh parameters). `causal` is whether a
    position sees only earlier ones. `max_positions` is the longest sequence of models with learned position
    embeddings, None where positions are rotary. `dropout` holds the configuration's rates by name.
    """

    model: PreTrainedModel
    label: str
    causal: bool
    origin: Mapping[str, Any]
    max_positions: int | None
    dropout: Mapping[str, float]


def load_model(
    config: ModelConfig,
    *,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    num_labels: int,
    seed: int,
) -> LoadedModel:
    """Load or initialise the model of an experiment, on the CPU, in float32, with transformers' default attention.

    Everything random (the classification head, or all weights for `init: scratch`) depends on `seed` alone, so that all
    arms of a block start from the same weights.

    Args:
        config: The `model` section; `name` may be the folder of a saved model; `run` is not handled here.
        task: Language modelling and instructions need a decoder; classification takes any family and a new head.
        tokenizer: Gives the vocabulary size and the padding token.
        num_labels: Number of classes; read for classification only.
        seed: Of the random weights.

    Raises:
        ConfigError: The family or task is not supported, or `architecture` has unknown keys.
        UserError: Weights are absent, incomplete, pickled, or do not fit the tokenizer.
    """
    if config.run is not None:
        raise ConfigError("model.run goes on from a finished run: load the model in its folder")
    if config.init == "scratch":
        return _from_scratch(config.architecture or {}, task, tokenizer, num_labels, seed)
    assert config.name is not None
    found = locate_model(config.name, config.revision)
    location = as_safetensors(found)
    hf_config = _read_config(location)
    _check_family(hf_config, task)
    attention_dropout = getattr(hf_config, DROPOUT_FIELD[hf_config.model_type])
    _fit_to_task(hf_config, task, tokenizer, num_labels)
    if hf_config.vocab_size < len(tokenizer):
        raise UserError(
            f"{location.label} embeds {hf_config.vocab_size} tokens, its tokenizer has {len(tokenizer)}",
            "the tokenizer is not the model's",
        )
    with _seeded(seed):
        model, fresh = _read_weights(location, hf_config, task)
    return _loaded(
        model,
        location.label,
        {**_origin(found), "fresh_parameters": fresh, "attention_dropout_removed": attention_dropout},
    )


def _from_scratch(
    architecture: Mapping[str, Any],
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    num_labels: int,
    seed: int,
) -> LoadedModel:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    given = dict(architecture)
    family = given.pop("model_type", None)
    if family not in FAMILIES:
        raise ConfigError(f"model.architecture.model_type is {family!r}", f"it must be one of: {', '.join(FAMILIES)}")
    _check_architecture(family, given)
    try:
        hf_config = AutoConfig.for_model(family, **given, vocab_size=len(tokenizer))
        _check_family(hf_config, task)
        _fit_to_task(hf_config, task, tokenizer, num_labels)
        hf_config.bos_token_id, hf_config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        with _seeded(seed):
            model = _auto_class(task).from_config(hf_config, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model.architecture makes no {family} model: {reason}", "check its sizes") from None
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return _loaded(model, f"{family} from scratch ({millions:.1f} M)", {"place": "random weights", "seed": seed})


def _check_architecture(family: str, given: Mapping[str, Any]) -> None:
    """Refuse unknown keys: transformers would keep them silently, and train another model than was meant."""
    from transformers import AutoConfig

    if "vocab_size" in given:
        raise ConfigError(
            "model.architecture.vocab_size follows the tokenizer", "set model.tokenizer.vocabulary instead"
        )
    if given.get(DROPOUT_FIELD[family]):
        raise ConfigError(
            f"model.architecture.{DROPOUT_FIELD[family]}: no sparse kernel drops attention weights", "leave it out"
        )
    known = AutoConfig.for_model(family)
    for key in given:
        if not hasattr(known, key):
            close = difflib.get_close_matches(key, vars(known), n=1)
            hint = f"did you mean `{close[0]}`?" if close else None
            raise ConfigError(f"unknown key `{key}` in model.architecture for {family}", hint)


def _read_config(location: ModelLocation) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        revision = location.revision or "main"
        config: PretrainedConfig = AutoConfig.from_pretrained(location.path, trust_remote_code=False, revision=revision)
        return config
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"cannot read the configuration of {location.label}: {error}", f"looked in: {location.origin}"
        ) from error


def _read_weights(
    location: ModelLocation, hf_config: PretrainedConfig, task: Task
) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of the parameters that its checkpoint lacked."""
    # A head for other classes is replaced, not an error. The copy: transformers writes into what it loads with.
    try:
        model, info = from_pretrained(
            _auto_class(task),
            location.path,
            copy.deepcopy(hf_config),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            trust_remote_code=False,
            revision=location.revision or "main",
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"cannot read the weights of {location.label}: {error}", f"looked in: {location.origin}"
        ) from error
    fresh = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    if absent := [name for name in fresh if task != "classification" or not name.startswith(_HEADS)]:
        raise UserError(f"{location.label} lacks {len(absent)} weights, {absent[0]} first", "is its file complete?")
    return model, fresh


def _check_family(hf_config: PretrainedConfig, task: Task) -> None:
    if hf_config.model_type not in FAMILIES:
        raise ConfigError(
            f"models of the family `{hf_config.model_type}` are not supported", f"supported: {', '.join(FAMILIES)}"
        )
    if task != "classification" and hf_config.model_type in ENCODER_FAMILIES:
        raise ConfigError(
            f"`{hf_config.model_type}` models read in both directions and cannot do language modelling, "
            "nor answer prompts",
            "use a gpt2 or llama model, or a classification data set",
        )


def _fit_to_task(hf_config: PretrainedConfig, task: Task, tokenizer: PreTrainedTokenizerBase, num_labels: int) -> None:
    # Classifiers on decoders find a text's last token by the padding token; RoBERTa counts positions by it.
    hf_config.pad_token_id = tokenizer.pad_token_id
    # No sparse kernel drops attention weights, so no arm does; the record keeps what the checkpoint asked for.
    setattr(hf_config, DROPOUT_FIELD[hf_config.model_type], 0.0)
    if task == "classification":
        hf_config.num_labels = num_labels


def _auto_class(task: Task) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if task == "classification" else AutoModelForCausalLM


def _origin(location: ModelLocation) -> dict[str, Any]:
    """Where the weights come from: the hub's revision, or the SHA-256 of each file."""
    if location.revision:
        return {"place": location.origin}
    names = (
        [location.gguf_file]
        if location.gguf_file
        else sorted(p.name for p in Path(location.path).glob("*.safetensors"))
    )
    return {"place": location.origin, "sha256": {name: file_sha256(Path(location.path) / name) for name in names}}


def _loaded(model: PreTrainedModel, label: str, origin: Mapping[str, Any]) -> LoadedModel:
    config = model.config
    positions = {"gpt2": 0, "bert": 0, "roberta": 2}.get(
        config.model_type
    )  # RoBERTa's first two rows are not positions
    dropout = {
        name: float(rate) for name, rate in vars(config).items() if "drop" in name and isinstance(rate, int | float)
    }
    return LoadedModel(
        model=model,
        label=label,
        causal=config.model_type not in ENCODER_FAMILIES,
        origin=origin,
        max_positions=None if positions is None else config.max_position_embeddings - positions,
        dropout=dropout,
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeded random numbers inside, the caller's generator untouched outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


__all__ = ["FAMILIES", "LoadedModel", "load_model", "load_tokenizer"]
