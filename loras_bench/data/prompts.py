"""From the rows of a set to prompts and responses, and how a tokenizer writes the two as one text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loras_bench.catalog import DatasetSpec
from loras_bench.data.sources import Split
from loras_bench.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = ("### Instruction:\n", "\n\n### Response:\n")
"""Before a prompt, and between it and the response, without a chat template: Alpaca's marks (Taori et al. 2023)."""
# Stand for the prompt and the response where a chat template is looked at; words that no template contains.
_PROMPT, _RESPONSE = "prompt-a41f", "response-c96e"


@dataclass(frozen=True)
class Template:
    """The text of a pair is `before + prompt + between + response + after`; a model learns what follows `between`."""

    name: str
    before: str
    between: str
    after: str
    """The end of a turn, by which a model says that its response is whole."""


def template_of(tokenizer: PreTrainedTokenizerBase) -> Template:
    """The tokenizer's chat template for one turn, with its own system prompt; without one, the plain template.

    Whitespace that a chat template writes after the end of a turn is left out: nothing follows.

    Raises:
        UserError: The chat template cannot be taken apart, or there is no token that ends a response.
    """
    end = tokenizer.eos_token
    if tokenizer.chat_template is None:
        if not isinstance(end, str):
            raise UserError("the tokenizer has no end-of-sequence token", "responses need one to end with")
        first = tokenizer("")["input_ids"][:1]  # Llama's begin every text with a token of its own
        begin = str(tokenizer.bos_token) if first == [tokenizer.bos_token_id] else ""
        return Template("plain: the tokenizer has no chat template", begin + PLAIN[0], PLAIN[1], end)
    turns = [{"role": "user", "content": _PROMPT}, {"role": "assistant", "content": _RESPONSE}]
    asked = str(tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True))
    answered = str(tokenizer.apply_chat_template(turns, tokenize=False))
    before, _, between = asked.partition(_PROMPT)
    if not answered.startswith(asked + _RESPONSE) or not between:
        raise UserError(
            "the tokenizer's chat template writes a response elsewhere than it asks for one",
            "give the model a chat template of plain turns, or none",
        )
    after = answered.removeprefix(asked + _RESPONSE).rstrip() or str(end)
    return Template("the tokenizer's chat template", before, between, after)


def as_instructions(spec: DatasetSpec, split: Split, label_names: Sequence[str], where: Callable[[int], str]) -> Split:
    """Prompts, responses and the responses that are allowed, from the fields that the set has.

    Args:
        spec: Says how.
        split: The text fields, with labels where the set has them.
        label_names: Of these labels.
        where: Names the place of a row, for errors.

    Raises:
        UserError: A prompt or response is empty, or a response is not what its prompt allows; with file and line.
    """
    labels, choices = split.labels, None
    if labels is not None:
        prompts = [spec.prompt.format(text) for text in split.columns[0]]
        responses = [label_names[label] for label in labels]
        choices = [tuple(label_names)] * len(labels)
    else:
        prompts, responses = split.columns
    for name, texts in ((spec.text_fields[0], split.columns[0]), (spec.text_fields[-1], responses)):
        if empty := [row for row, text in enumerate(texts) if not text.strip()]:
            raise UserError(f"{where(empty[0])}: `{name}` is empty", "mend or remove the row")
    if spec.choices_after is not None:
        choices, labels = [], []
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            allowed, label = _choices(prompt, response, spec.choices_after, where(row))
            choices.append(allowed)
            labels.append(label)
    if spec.final_answer is not None:
        for row, response in enumerate(responses):
            if final_answer(response, spec.final_answer) is None:
                raise UserError(f"{where(row)}: the response has no `{spec.final_answer}`", "mend or remove the row")
    return Split((prompts, responses), labels, choices)


def _choices(prompt: str, response: str, mark: str, where: str) -> tuple[tuple[str, ...], int]:
    """The responses that a prompt allows and which of them is right: they differ in their ends alone."""
    _, found, listed = prompt.rpartition(mark)
    ends = listed.strip().split("/")
    right = [number for number, end in enumerate(ends) if end and response.endswith(end)]
    if not found or len(right) != 1:
        raise UserError(
            f"{where}: the response ends in none of the answers that follow `{mark}` in its prompt",
            "mend or remove the row",
        )
    stem = response.removesuffix(ends[right[0]])
    return tuple(stem + end for end in ends), right[0]


def final_answer(response: str, pattern: str) -> str | None:
    """The number that a response ends with, as lm-evaluation-harness compares it for GSM8K (`strict-match`).

    Of the first match of the pattern, without commas and without a full stop at its end; None where nothing matches.
    """
    found = re.search(pattern, response)
    return found[1].replace(",", "").removesuffix(".") if found else None
