"""Instructions: prompts with their responses, of which a model learns the response alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from loras_bench.catalog import Task
from loras_bench.data import IGNORED, TaskData
from loras_bench.data.packing import filled_up, lay_out, padding_of, starts_of
from loras_bench.data.prompts import Template, template_of
from loras_bench.data.sources import Source, Split
from loras_bench.data.tokens import cached_arrays, encoder_of, padding_id
from loras_bench.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


LABEL_MULTIPLE = 128
"""The rows that reach the output layer are filled up to a multiple of this: whole tiles, and few shapes to capture."""


class Instructions(TaskData):
    """Pairs of at most `sequence_length` tokens, written by the tokenizer's `Template`.

    A row is one document where its response is free, and one for each response that its prompt allows: training reads
    that of the right response, evaluation compares all of them. Prompt and response are tokenised apart, as they are
    when a model answers. A longer pair loses the beginning of its prompt, after what the template writes before it; of
    a response nothing is ever cut off. A batch holds its documents one after the other (`packed`) or side by side.
    """

    task: ClassVar[Task] = "instruction"

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
        self.padding = padding_id(tokenizer)
        self.template = template_of(tokenizer)
        self._encoder = encoder_of(tokenizer)
        self.end = self._encoder.encode(self.template.after, add_special_tokens=False).ids[-1]
        """The token that ends a response."""
        self._documents = {split: self._encode(split) for split in splits}
        self._starts = {split: starts_of(arrays["lengths"]) for split, arrays in self._documents.items()}

    def _encode(self, split: str) -> dict[str, np.ndarray]:
        rows, template, longest = self.source.splits[split], self.template, self.sequence_length
        purpose = f"instructions {template} in {longest} tokens"
        arrays = cached_arrays(
            rows.sha256, self._encoder, purpose, lambda: encode_documents(rows, template, self._encoder, longest)
        )
        if len(lacking := np.flatnonzero(arrays["missing"] > 0)):
            row, needed = int(lacking[0]), longest + int(arrays["missing"].max())
            raise UserError(
                f"`{self.name}` {split} row {row} ({rows.columns[0][row][:40]!r}): its response does not fit into "
                f"{longest} tokens; {len(lacking)} such rows",
                f"set data.sequence_length to {needed} or more",
            )
        return arrays

    def rows(self, split: str) -> int:
        return len(self._documents[split]["right"])

    def right(self, split: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The documents of these rows with the right response, int64 (rows,)."""
        right: np.ndarray = self._documents[split]["right"][np.asarray(indices, dtype=np.int64)]
        return right

    def choices(self, split: str, row: int) -> np.ndarray:
        """All documents of a row, int64 (choices,)."""
        first, count = (int(self._documents[split][name][row]) for name in ("first", "counts"))
        return np.arange(first, first + count)

    def characters(self, split: str, documents: np.ndarray) -> np.ndarray:
        """The length of each document's response, int64 (documents,)."""
        characters: np.ndarray = self._documents[split]["characters"][documents]
        return characters

    def prompt(self, split: str, row: int) -> list[int]:
        """The tokens that a model is given to answer."""
        arrays = self._documents[split]
        document = arrays["right"][row]
        start = self._starts[split][document]
        tokens: list[int] = arrays["ids"][start : start + arrays["prompts"][document]].tolist()
        return tokens

    def text(self, tokens: Sequence[int]) -> str:
        """A model's response as it stands in the data set."""
        return self._encoder.decode(list(tokens), skip_special_tokens=True)

    def collate(self, split: str, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        return self.collate_documents(split, self.right(split, indices))

    def collate_documents(self, split: str, documents: np.ndarray) -> dict[str, Tensor]:
        """As `collate`, of any documents; `label_rows` are the places of the targets, and some others."""
        arrays = self._documents[split]
        starts_b, lengths_b = self._starts[split][documents], arrays["lengths"][documents]
        layout = lay_out(starts_b, lengths_b, self.sequence_length, self._packed)
        ids_bs, targets_bs = layout.take(arrays["ids"], self.padding), layout.take(arrays["targets"], IGNORED)
        batch = {**layout.facts, "input_ids": ids_bs, "targets": targets_bs, "label_rows": label_rows(targets_bs)}
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def real_tokens(self, split: str, indices: Sequence[int] | np.ndarray) -> int:
        return int(self._documents[split]["lengths"][self.right(split, indices)].sum())

    def target_count(self, split: str, indices: Sequence[int] | np.ndarray) -> int:
        arrays, documents = self._documents[split], self.right(split, indices)
        return int((arrays["lengths"] - arrays["prompts"])[documents].sum())

    def eval_order(self, split: str) -> np.ndarray:
        arrays = self._documents[split]
        return np.argsort(arrays["lengths"][arrays["right"]], kind="stable")

    def protocol(self, split: str) -> dict[str, Any]:
        rows, everything = self.source.splits[split], range(self.rows(split))
        cut = self._documents[split]["cut"][self.right(split, everything)]
        truncated = int((cut > 0).sum())
        facts = {
            **self.source.protocol(split),
            "rows": len(rows),
            "sequence_length": self.sequence_length,
            "tokens": self.real_tokens(split, everything),
            "response_tokens": self.target_count(split, everything),
            "template": {"name": self.template.name, **{key: getattr(self.template, key) for key in _PARTS}},
            "truncated_prompts": truncated,
            "truncated_share": truncated / len(rows),
            "truncated_responses": 0,
            "padding": padding_of(self._packed),
            "loss": "on the response and the end of its turn",
        }
        if rows.choices is None:
            return facts
        answer, count = Counter(rows.columns[1]).most_common(1)[0]
        return {
            **facts,
            "majority_class": answer,
            "majority_share": count / len(rows),
            "accuracy": "by the likelihood of each allowed response with the end of its turn: the largest sum (acc of "
            "lm-evaluation-harness); accuracy_normalized: the largest sum per character (its acc_norm)",
        }


_PARTS = ("before", "between", "after")


def label_rows(targets_bs: np.ndarray) -> np.ndarray:
    """Places of a batch, its rows one after the other, that predict something: int64, ascending, filled up."""
    return np.flatnonzero(filled_up(targets_bs.flatten() != IGNORED, LABEL_MULTIPLE))


def encode_documents(rows: Split, template: Template, encoder: Tokenizer, longest: int) -> dict[str, np.ndarray]:
    """Tokenise the prompt of every row with each of its responses.

    Returns:
        Of all documents, one after the other: `ids` int32 and `targets` int32 (tokens,), the token that comes next
        where it is part of the response, else -100. Of each document int64: `lengths`, `prompts` (tokens of the
        prompt with what the template writes around it), `cut` (tokens that the prompt lost), `missing` (tokens by
        which `longest` is too short for its response) and `characters` of the response. Of each row int64: `first`,
        `counts` and `right`, its first document, their number, and that with the right response.
    """
    prompts, responses = rows.columns
    allowed = [(response,) for response in responses] if rows.choices is None else rows.choices
    head = len(_ids(encoder, [template.before])[0])
    asked = _ids(encoder, [template.before + prompt + template.between for prompt in prompts])
    tail = len(_ids(encoder, [template.between])[0])
    texts = list(dict.fromkeys(chain.from_iterable(allowed)))  # each once: labels are few
    answers = dict(zip(texts, _ids(encoder, [text + template.after for text in texts]), strict=True))
    documents: list[list[int]] = []
    prompt_lengths, cuts, missing = [], [], []
    for prompt, choices in zip(asked, allowed, strict=True):
        room = longest - max(len(answers[text]) for text in choices)
        cut = max(0, min(len(prompt) - room, len(prompt) - head - tail))
        kept = prompt[:head] + prompt[head + cut :]
        for text in choices:
            documents.append(kept + answers[text])
            prompt_lengths.append(len(kept))
            cuts.append(cut)
            missing.append(max(0, len(kept) - room))
    ids = np.fromiter(chain.from_iterable(documents), dtype=np.int32)
    lengths = np.asarray([len(document) for document in documents], dtype=np.int64)
    counts = np.asarray([len(choices) for choices in allowed], dtype=np.int64)
    labels = np.asarray(rows.labels if rows.choices is not None else [0] * len(rows), dtype=np.int64)
    prompt_n = np.asarray(prompt_lengths, dtype=np.int64)
    return {
        "ids": ids,
        "targets": _targets(ids, lengths, prompt_n),
        "lengths": lengths,
        "prompts": prompt_n,
        "cut": np.asarray(cuts, dtype=np.int64),
        "missing": np.asarray(missing, dtype=np.int64),
        "characters": np.asarray([len(text) for text in chain.from_iterable(allowed)], dtype=np.int64),
        "first": starts_of(counts),
        "counts": counts,
        "right": starts_of(counts) + labels,
    }


def _targets(ids: np.ndarray, lengths: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """The next token of every token, where a response has it."""
    next_place = np.arange(len(ids)) - np.repeat(starts_of(lengths), lengths) + 1
    predicts = (next_place >= np.repeat(prompts, lengths)) & (next_place < np.repeat(lengths, lengths))
    return np.where(predicts, np.roll(ids, -1), IGNORED).astype(np.int32)


def _ids(encoder: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Tokens of each text, with no special tokens but those that it spells out."""
    return [encoding.ids for encoding in encoder.encode_batch_fast(texts, add_special_tokens=False)]
