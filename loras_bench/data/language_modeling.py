"""Language modelling on packed blocks: one stream of tokens, each an input once and a target once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from loras_bench.catalog import Task
from loras_bench.data import IGNORED, TaskData
from loras_bench.data.sources import Source
from loras_bench.data.tokens import cached_arrays, encoder_of, end_of_text_id

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# After a line end, where at most one blank stands before the next word. Byte-level BPE tokenizers (the GPT-2 pattern
# and its successors) always end a piece here: tokenising chunks in parallel gives the tokens of the whole text.
_CHUNK_BOUNDARY = re.compile(r"(?<=\n)(?=[^\S\n]?\S)")
_PROBE_CHARACTERS = 50_000


@dataclass(frozen=True)
class TextSize:
    """What perplexities are normalised by: `tokens` predicted, `words` and `bytes` (UTF-8) of the text."""

    tokens: int
    words: int
    bytes: int
    documents: int


class PackedText(TaskData):
    """Blocks of `sequence_length` tokens cut from the stream `<end of text> document <end of text> document ...`.

    Block i reads stream[i S : (i + 1) S] and predicts stream[i S + 1 : (i + 1) S + 1]. The first token is a separator,
    so every token of the text is predicted exactly once; the context starts afresh in each block (stride = S). The
    last block is filled up at its right end with positions that predict nothing; causal models need no mask for them.
    """

    task: ClassVar[Task] = "language_modeling"

    def __init__(
        self, source: Source, tokenizer: PreTrainedTokenizerBase, sequence_length: int, splits: Sequence[str]
    ) -> None:
        super().__init__(source, sequence_length, splits)
        self._separator = end_of_text_id(tokenizer)
        self._separator_name = str(tokenizer.convert_ids_to_tokens(self._separator))
        encoder = encoder_of(tokenizer)
        self._streams = {split: self._stream(split, encoder) for split in splits}
        self.text_sizes = {split: self._size(split) for split in splits}

    def _stream(self, split: str, encoder: Tokenizer) -> np.ndarray:
        rows, separator = self.source.splits[split], self._separator
        purpose = f"stream separated by {separator}"
        (documents,) = rows.columns
        return cached_arrays(
            rows.sha256, encoder, purpose, lambda: {"stream": token_stream(documents, encoder, separator)}
        )["stream"]

    def rows(self, split: str) -> int:
        return -(-self._predicted(split) // self.sequence_length)

    def _predicted(self, split: str) -> int:
        return len(self._streams[split]) - 1

    def collate(self, split: str, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        stream, predicted = self._streams[split], self._predicted(split)
        starts_b1 = np.asarray(indices, dtype=np.int64)[:, None] * self.sequence_length
        positions_bs = starts_b1 + np.arange(self.sequence_length + 1)
        window_bs = stream[np.minimum(positions_bs, predicted)].astype(np.int64)
        padding_bs = positions_bs[:, :-1] >= predicted
        return {
            "input_ids": torch.from_numpy(np.where(padding_bs, self._separator, window_bs[:, :-1])),
            "targets": torch.from_numpy(np.where(padding_bs, IGNORED, window_bs[:, 1:])),
        }

    def real_tokens(self, split: str, indices: Sequence[int] | np.ndarray) -> int:
        starts = np.asarray(indices, dtype=np.int64) * self.sequence_length
        return int(np.clip(self._predicted(split) - starts, 0, self.sequence_length).sum())

    def target_count(self, split: str, indices: Sequence[int] | np.ndarray) -> int:
        return self.real_tokens(split, indices)

    def eval_order(self, split: str) -> np.ndarray:
        return np.arange(self.rows(split), dtype=np.int64)

    def _size(self, split: str) -> TextSize:
        (documents,) = self.source.splits[split].columns
        words = sum(len(text.split()) for text in documents)
        if self.source.spec.line_end_is_word:
            words += sum(text.count("\n") for text in documents)
        size = sum(len(text.encode("utf-8")) for text in documents)
        return TextSize(self._predicted(split), words, size, len(documents))

    def protocol(self, split: str) -> dict[str, Any]:
        size = self.text_sizes[split]
        return {
            **self.source.protocol(split),
            "sequence_length": self.sequence_length,
            "stride": self.sequence_length,
            "blocks": self.rows(split),
            "tokens": size.tokens,
            "words": size.words,
            "bytes": size.bytes,
            "documents": size.documents,
            "tokenization": "each document as a whole, its line ends kept, no special tokens added",
            "context": f"starts afresh in each block; {self._separator_name} stands before each document and is "
            "predicted between documents",
            "word": "whitespace-separated"
            + (", and one for each line end" if self.source.spec.line_end_is_word else ""),
        }


def token_stream(documents: Sequence[str], encoder: Tokenizer, separator: int) -> np.ndarray:
    """The documents' tokens, int32 (tokens,), with `separator` before each document."""
    cut = _cuts_at_lines(max(documents, key=len)[:_PROBE_CHARACTERS], encoder)
    parts = [_CHUNK_BOUNDARY.split(text) if cut else [text] for text in documents]
    encodings = iter(encoder.encode_batch_fast([part for text in parts for part in text], add_special_tokens=False))
    stream: list[int] = []
    for text in parts:
        stream.append(separator)
        for encoding in islice(encodings, len(text)):
            stream += encoding.ids
    return np.asarray(stream, dtype=np.int32)


def _cuts_at_lines(text: str, encoder: Tokenizer) -> bool:
    """Whether this tokenizer gives the same tokens for the whole text as for its parts between chunk boundaries."""
    parts = encoder.encode_batch_fast(_CHUNK_BOUNDARY.split(text), add_special_tokens=False)
    return encoder.encode(text, add_special_tokens=False).ids == [token for part in parts for token in part.ids]
