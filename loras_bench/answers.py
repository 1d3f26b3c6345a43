"""How well a language model answers prompts: the likelihoods of given responses, and its own greedy ones.

Shapes: b rows or documents, s positions, n predicted positions, v tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loras_bench.data import IGNORED
from loras_bench.data.batches import inputs_of
from loras_bench.data.prompts import final_answer
from loras_bench.graphed import Batch, to_device
from loras_bench.kernels.cross_entropy import CHUNK_TOKENS
from loras_bench.models.objective import unwrapped

if TYPE_CHECKING:
    from loras_bench.data.instruction import Instructions

WIDTH_MULTIPLE = 64
"""Texts that grow are as wide as a multiple of this: few different shapes."""
STEPS_BETWEEN_CHECKS = 16
"""New tokens between two looks at which answers are whole: these leave the batch."""


def score_choices(
    model: nn.Module, data: Instructions, split: str, rows: Sequence[int] | np.ndarray, device: torch.device
) -> np.ndarray:
    """Compare the responses that the prompts of some rows allow.

    Returns:
        Sums over the rows, float64 (4,): -log likelihood of the right responses in nats, their tokens, and the rows
        whose right response has the largest log likelihood, and the largest per character.
    """
    documents = [data.choices(split, int(row)) for row in rows]
    flat = np.concatenate(documents)
    scores = log_likelihoods(model, data.collate_documents(split, flat), device).double().cpu().numpy()
    sums = np.array([0.0, data.target_count(split, rows), 0.0, 0.0])
    of_rows = np.split(scores, np.cumsum([len(choices) for choices in documents])[:-1])
    for choices, right, score_c in zip(documents, data.right(split, rows), of_rows, strict=True):
        best, normalized = score_c.argmax(), (score_c / data.characters(split, choices)).argmax()
        sums += (-score_c[right - choices[0]], 0, choices[best] == right, choices[normalized] == right)
    return sums


def documents_of(batch: Batch) -> Tensor:
    """The number of the document that each place of a batch belongs to: int64 (b, s)."""
    ids_bs = batch["input_ids"]
    return batch.get("document_ids", torch.arange(len(ids_bs))[:, None].expand_as(ids_bs))


@dataclass(frozen=True)
class Predictions:
    """What a model makes of the places of a batch that predict a label, on its device."""

    hidden_nd: Tensor
    """Input of the output layer."""
    targets_n: Tensor
    documents_n: Tensor
    documents: int
    """How many there are in the batch."""

    def sums(self, values_n: Tensor) -> Tensor:
        """Of one value a place, by document: float32 (documents,)."""
        return torch.zeros(self.documents, device=values_n.device).index_add_(0, self.documents_n, values_n)


@torch.no_grad()
def predict(model: nn.Module, batch: Batch, device: torch.device) -> Predictions:
    """Read a batch up to the output layer.

    Args:
        model: A transformers language model, or a PEFT model around one.
        batch: From `Instructions.collate_documents`, on the CPU: documents of one row each, or packed into one.
        device: Where the model is.
    """
    targets_bs = batch["targets"]
    places_n = (targets_bs != IGNORED).flatten().nonzero()[:, 0]
    documents_n = documents_of(batch).flatten()[places_n]
    facts = {"places": places_n, "documents": documents_n, "targets": targets_bs.flatten()[places_n]}
    on_device = to_device(facts, device)
    hidden_bsd = unwrapped(model).base_model(**to_device(inputs_of(batch), device), use_cache=False)[0]
    hidden_nd = hidden_bsd.flatten(0, 1).index_select(0, on_device["places"])
    return Predictions(hidden_nd, on_device["targets"], on_device["documents"], int(documents_n[-1]) + 1)


def output_layer(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Logits (n, v) of hidden states (n, d), in float32.

    In bfloat16 they are off by up to 0.3 nats an answer, which turns one answer in 40 (ARC-Easy).
    """
    head = unwrapped(model).get_output_embeddings()
    if type(head) is nn.Linear and head.bias is None:
        weight_vd = head.weight.detach().float()
        return lambda hidden_nd: F.linear(hidden_nd.float(), weight_vd)
    return lambda hidden_nd: head(hidden_nd).float()  # type: ignore[no-any-return]


@torch.no_grad()
def log_likelihoods(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """Log likelihood of the targets of each document of a batch, in nats, float32 (documents,) on the device."""
    found, logits = predict(model, batch, device), output_layer(model)
    parts = zip(found.hidden_nd.split(CHUNK_TOKENS), found.targets_n.split(CHUNK_TOKENS), strict=True)
    losses = [F.cross_entropy(logits(hidden_nd), targets_n, reduction="none") for hidden_nd, targets_n in parts]
    return -found.sums(torch.cat(losses))


def count_exact(
    model: nn.Module,
    data: Instructions,
    split: str,
    rows: Sequence[int],
    new_tokens: int,
    device: torch.device,
) -> int:
    """Of these rows, those to which the model's greedy answer has the final number of the data set's."""
    pattern = data.source.spec.final_answer
    assert pattern is not None
    prompts = [data.prompt(split, row) for row in rows]
    answers = greedy(model, prompts, data.end, new_tokens, data.sequence_length, device)
    responses = data.source.splits[split].columns[1]
    wanted = [final_answer(responses[row], pattern) for row in rows]
    return sum(final_answer(data.text(answer), pattern) == final for answer, final in zip(answers, wanted, strict=True))


@torch.no_grad()
def greedy(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    end: int,
    new_tokens: int,
    longest: int,
    device: torch.device,
) -> list[list[int]]:
    """Continue each prompt by the likeliest token, again and again, without a key/value cache.

    Our attention keeps none, so each token is a forward pass over the whole texts. They stand side by side with their
    padding on the right, which a causal model does not see.

    Args:
        model: A causal language model of transformers, or a PEFT model around one.
        prompts: Tokens, at least one each.
        end: The token that ends an answer; it is not part of it.
        new_tokens: Length at which an answer is cut off.
        longest: Length at which a text is cut off, prompt included.
        device: Where the model is.

    Returns:
        The new tokens of each prompt.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    going = [number for number, prompt in enumerate(prompts) if len(prompt) < longest]
    while going:
        texts = [[*prompts[number], *answers[number]] for number in going]
        grown = _grow(model, texts, min(STEPS_BETWEEN_CHECKS, longest - max(map(len, texts))), longest, device)
        unfinished = []
        for number, tokens in zip(going, grown, strict=True):
            ends = tokens.index(end) if end in tokens else len(tokens)
            answers[number] = (answers[number] + tokens[:ends])[:new_tokens]
            room = min(new_tokens, longest - len(prompts[number]))
            if ends == len(tokens) and len(answers[number]) < room:
                unfinished.append(number)
        going = unfinished
    return answers


def _grow(
    model: nn.Module, texts: Sequence[Sequence[int]], tokens: int, longest: int, device: torch.device
) -> list[list[int]]:
    """The likeliest next tokens of each text, so many, whatever they are."""
    inner: Any = unwrapped(model)
    lengths = [len(text) for text in texts]
    rounded = -(-(max(lengths) + tokens) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    padded = torch.zeros(len(texts), min(rounded, longest), dtype=torch.int64)
    for row, text in enumerate(texts):
        padded[row, : len(text)] = torch.tensor(text)
    on_device = to_device({"ids": padded, "lengths": torch.tensor(lengths), "rows": torch.arange(len(texts))}, device)
    ids_bs, length_b, row_b = on_device["ids"], on_device["lengths"], on_device["rows"]
    for new in range(tokens):
        hidden_bsd = inner.base_model(input_ids=ids_bs, use_cache=False)[0]
        logits_bv = inner.get_output_embeddings()(hidden_bsd[row_b, length_b + new - 1])
        ids_bs[row_b, length_b + new] = logits_bv.float().argmax(dim=-1)
    return [ids[length : length + tokens] for ids, length in zip(ids_bs.tolist(), lengths, strict=True)]
