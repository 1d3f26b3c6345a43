"""Tokenizers: read beside a model's weights, or trained for a model from scratch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from loras_bench.attention.families import CAUSAL, DROPOUT_FIELD
from loras_bench.config import ModelConfig, TokenizerConfig
from loras_bench.data.tokens import END_OF_TEXT
from loras_bench.errors import ConfigError, UserError
from loras_bench.models.catalog import ModelLocation, locate_model
from loras_bench.models.gguf import as_safetensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TextSource = Callable[[], Iterable[str]]
"""Called for the texts only where a tokenizer is trained: reading them costs time."""
PADDING = "<pad>"
ENCODER_FAMILIES = tuple(family for family in DROPOUT_FIELD if family not in CAUSAL)


def load_tokenizer(config: ModelConfig, training_texts: TextSource | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model: its own, or for `init: scratch` one trained on `training_texts()`.

    Padding is on the right; a tokenizer without a padding token pads with its end-of-text token.

    Args:
        config: The `model` section; its `name` may also be a folder that holds a tokenizer without weights.
        training_texts: Gives the texts for `init: scratch`.

    Raises:
        ConfigError: A name is unknown.
        UserError: The model is not found, or has no readable tokenizer.
    """
    if config.init == "scratch":
        if training_texts is None:
            raise ConfigError("a tokenizer from scratch needs texts to be trained on")
        family = (config.architecture or {}).get("model_type")
        vocabulary = config.tokenizer.vocabulary if config.tokenizer else TokenizerConfig().vocabulary
        return train_tokenizer(training_texts(), vocabulary, mark_ends=family in ENCODER_FAMILIES)
    if config.name is None:
        raise ConfigError("model.run has its tokenizer in the run's folder")
    if (Path(config.name) / "tokenizer_config.json").is_file():
        return _read(ModelLocation(config.name, config.name, config.name))
    return _read(as_safetensors(locate_model(config.name, config.revision)))


def _read(location: ModelLocation) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            location.path, revision=location.revision or "main", trust_remote_code=False
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"no tokenizer for {location.label} in {location.origin}: {error}", "is the model complete?"
        ) from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = END_OF_TEXT if END_OF_TEXT in tokenizer.get_vocab() else tokenizer.eos_token
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocabulary: int, *, mark_ends: bool) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer (Radford et al. 2019) that can write any text; the same texts give the same one.

    Args:
        texts: What it is trained on.
        vocabulary: Number of tokens at most, 258 or more (bytes, end of text, padding); a small text
            may not have pairs for all of them.
        mark_ends: Put `<|endoftext|>` before and after each text, as BERT-like models expect [CLS] and [SEP].
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    special: dict[str, str] = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": PADDING}
    if mark_ends:
        core.post_processor = processors.TemplateProcessing(
            single=f"{END_OF_TEXT} $A {END_OF_TEXT}",
            pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B:1 {END_OF_TEXT}:1",
            special_tokens=[(END_OF_TEXT, core.token_to_id(END_OF_TEXT))],
        )
        special |= {"cls_token": END_OF_TEXT, "sep_token": END_OF_TEXT}
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="right", **special)
