"""Classification of texts and of pairs of texts: truncated rows, packed into one row or padded per batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from loras_bench.catalog import Task
from loras_bench.data import TaskData
from loras_bench.data.packing import lay_out, padding_of, starts_of
from loras_bench.data.sources import Source, Split
from loras_bench.data.tokens import cached_arrays, encoder_of, padding_id
from loras_bench.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


class LabelledTexts(TaskData):
    """Rows of at most `sequence_length` tokens, special tokens included; the end of longer texts is cut off.

    Of a pair, the longer text is cut. Tokenizers that add no special tokens cannot mark the border of a pair; its two
    texts are then joined by a line end. A batch holds its rows side by side, padded on the right, or `packed` one after
    the other.
    """

    task: ClassVar[Task] = "classification"

    def __init__(
        self,
        source: Source,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        splits: Sequence[str],
        packed: bool = False,
    ) -> None:
        super().__init__(source, sequence_length, splits)
        self._packed = packed
        self._padding = padding_id(tokenizer)
        marks_pairs = tokenizer.num_special_tokens_to_add(pair=True) > 0
        self._pairs = len(source.spec.text_fields) == 2 and marks_pairs
        self._segments = self._pairs and "token_type_ids" in tokenizer.model_input_names
        encoder = encoder_of(tokenizer)
        encoder.enable_truncation(sequence_length)
        self._rows = {split: self._encode(split, encoder) for split in splits}
        self._starts = {split: starts_of(rows["lengths"]) for split, rows in self._rows.items()}

    def _encode(self, split: str, encoder: Tokenizer) -> dict[str, np.ndarray]:
        rows = self.source.splits[split]
        purpose = f"rows, pairs marked: {self._pairs}"
        arrays = cached_arrays(rows.sha256, encoder, purpose, lambda: encode_rows(rows, encoder, self._pairs))
        if len(empty := np.flatnonzero(arrays["lengths"] == 0)):
            raise UserError(f"`{self.name}` {split} row {empty[0]} has no text", "remove empty rows")
        return arrays

    def rows(self, split: str) -> int:
        return len(self._rows[split]["lengths"])

    def collate(self, split: str, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        rows, chosen_b = self._rows[split], np.asarray(indices, dtype=np.int64)
        starts_b, lengths_b = self._starts[split][chosen_b], rows["lengths"][chosen_b]
        layout = lay_out(starts_b, lengths_b, self.sequence_length, self._packed)
        batch = {"targets": rows["labels"][chosen_b], **layout.facts, **layout.borders}
        batch["input_ids"] = layout.take(rows["ids"], self._padding)
        if self._segments:
            batch["token_type_ids"] = layout.take(rows["segments"], 0)
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def real_tokens(self, split: str, indices: Sequence[int] | np.ndarray) -> int:
        return int(self._rows[split]["lengths"][np.asarray(indices, dtype=np.int64)].sum())

    def target_count(self, split: str, indices: Sequence[int] | np.ndarray) -> int:
        return len(indices)

    def eval_order(self, split: str) -> np.ndarray:
        return np.argsort(self._rows[split]["lengths"], kind="stable")

    def protocol(self, split: str) -> dict[str, Any]:
        rows = self._rows[split]
        truncated = int(rows["truncated"].sum())
        counts = np.bincount(rows["labels"], minlength=self.num_labels)
        return {
            **self.source.protocol(split),
            "rows": self.rows(split),
            "sequence_length": self.sequence_length,
            "tokens": int(rows["lengths"].sum()),
            "truncated_rows": truncated,
            "truncated_share": truncated / self.rows(split),
            "label_counts": dict(zip(self.label_names, counts.tolist(), strict=True)),
            "padding": padding_of(self._packed),
        }


def encode_rows(rows: Split, encoder: Tokenizer, pairs: bool) -> dict[str, np.ndarray]:
    """Tokenise every row with the encoder's truncation.

    Returns:
        `ids` int32 (tokens of all rows, one after the other), for pairs also `segments` of the same shape (0 in the
        first text, 1 in the second), `lengths` int64 (rows,), `truncated` bool (rows,), `labels` int64 (rows,).
    """
    inputs = list(zip(*rows.columns, strict=True))
    encodings = encoder.encode_batch_fast(inputs if pairs else ["\n".join(row) for row in inputs])
    arrays = {
        "ids": _flat(row.ids for row in encodings),
        "lengths": np.asarray([len(row.ids) for row in encodings], dtype=np.int64),
        "truncated": np.asarray([bool(row.overflowing) for row in encodings], dtype=np.bool_),
        "labels": np.asarray(rows.labels, dtype=np.int64),
    }
    return {**arrays, "segments": _flat(row.type_ids for row in encodings)} if pairs else arrays


def _flat(rows: Iterable[Sequence[int]]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(rows), dtype=np.int32)
