"""The data of a run, ready for the step loop: one interface for language modelling, classification and instructions.

Reading goes one way: catalog (where) -> sources (texts and labels) -> language_modeling, classification or instruction
(batches).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from loras_bench.catalog import SPLITS, Task
from loras_bench.data.sources import Source, read_source
from loras_bench.errors import ConfigError
from loras_bench.kernels.cross_entropy import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loras_bench.config import DataConfig


class TaskData(ABC):
    """Tokenised splits of one data set, as rows that can be put into batches in any order."""

    task: ClassVar[Task]

    def __init__(self, source: Source, sequence_length: int, splits: Sequence[str]) -> None:
        if absent := [split for split in splits if split not in source.splits]:
            raise ConfigError(
                f"data set `{source.spec.name}` has no {absent[0]} split",
                "set data.validation_rows to set rows of the training set aside"
                if absent[0] == "validation"
                else f"it has: {', '.join(source.splits)}",
            )
        self.source = source
        self.sequence_length = sequence_length

    @property
    def name(self) -> str:
        return self.source.spec.name

    @property
    def content_hash(self) -> str:
        """SHA-256, 16 digits, of every text and label that was read."""
        return self.source.content_hash

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.source.label_names

    @property
    def num_labels(self) -> int:
        return len(self.label_names)

    @abstractmethod
    def rows(self, split: str) -> int:
        """Number of rows: packed blocks, labelled texts, or prompts with their responses."""

    @abstractmethod
    def collate(self, split: str, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """One batch on the CPU.

        Returns:
            `input_ids` int64 (batch, length); `targets` int64, (batch, length) with -100 where nothing is predicted for
            language modelling and instructions, (batch,) for classification; `attention_mask` bool (batch, length),
            True on real tokens, only where the batch has padding that a model must not see; `token_type_ids` int64
            (batch, length) for pairs of texts under tokenizers that tell the two apart. Packed documents are one row:
            `input_ids` and the like are (1, length), with `attention_mask` always, `document_ids` and `position_ids`
            int64 (1, length), and for classification `starts` and `ends` int64 (documents,), the places of each
            document's first and last token.
        """

    @abstractmethod
    def real_tokens(self, split: str, indices: Sequence[int] | np.ndarray) -> int:
        """Tokens of these rows that a model trains on, padding excluded."""

    @abstractmethod
    def target_count(self, split: str, indices: Sequence[int] | np.ndarray) -> int:
        """Targets of these rows that a loss counts: predicted tokens, or rows for classification."""

    @abstractmethod
    def eval_order(self, split: str) -> np.ndarray:
        """All row indices, int64 (rows,), in the order that evaluates with the least padding."""

    @abstractmethod
    def protocol(self, split: str) -> dict[str, Any]:
        """How this split was read, split, tokenised and counted, for the record."""


def load_data(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, splits: Sequence[str] = ("train", "test")
) -> TaskData:
    """Read and tokenise the data set of an experiment.

    Args:
        config: The `data` section, resolved for the device: where `packing` is left at `auto`, batches are padded.
        tokenizer: A fast tokenizer; it is not changed.
        splits: The splits to tokenise, of train, validation and test. What is set aside for validation leaves the
            training split whether or not validation is asked for.

    Raises:
        UserError: The data set is not found or not readable, or has no such split; the message says where it looked.
    """
    # Late, because all build on TaskData.
    from loras_bench.data.classification import LabelledTexts
    from loras_bench.data.instruction import Instructions
    from loras_bench.data.language_modeling import PackedText

    source = read_source(config)
    if source.spec.task == "language_modeling":
        return PackedText(source, tokenizer, config.sequence_length, splits)
    kind = LabelledTexts if source.spec.task == "classification" else Instructions
    return kind(source, tokenizer, config.sequence_length, splits, packed=config.packing == "packed")


def training_texts(config: DataConfig) -> list[str]:
    """The texts of the training split, all fields, on which a tokenizer may be trained."""
    return [text for column in read_source(config).splits["train"].columns for text in column]


__all__ = ["IGNORED", "SPLITS", "TaskData", "load_data", "training_texts"]
