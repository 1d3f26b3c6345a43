"""From texts to token ids, without touching the caller's tokenizer; kept on disk, as all arms need the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from loras_bench.cache import cached_folder
from loras_bench.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
_ARRAYS = "arrays.safetensors"


def encoder_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A private copy of the tokenizer's Rust core, with neither truncation nor padding.

    Raises:
        UserError: The tokenizer has no Rust core.
    """
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UserError(f"{type(tokenizer).__name__} is not a fast tokenizer", "give the model folder a tokenizer.json")
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills a batch up.

    Raises:
        UserError: The tokenizer has none.
    """
    if not isinstance(tokenizer.pad_token_id, int):
        raise UserError("the tokenizer has no padding token", "load it with loras_bench.models.load_tokenizer")
    return tokenizer.pad_token_id


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that separates documents: `<|endoftext|>` where the vocabulary has it, else the end-of-sequence token.

    Raises:
        UserError: There is neither.
    """
    vocabulary = tokenizer.get_vocab()
    if END_OF_TEXT in vocabulary:
        return vocabulary[END_OF_TEXT]
    if isinstance(tokenizer.eos_token_id, int):
        return tokenizer.eos_token_id
    raise UserError(
        "the tokenizer has no end-of-text token", "language modelling needs a model with one (GPT-2, Llama)"
    )


def cached_arrays(
    split_hash: str, encoder: Tokenizer, purpose: str, compute: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """`compute()`, or what it returned before for the same content, tokenizer and purpose."""
    from safetensors.numpy import load_file, save_file

    key = hashlib.sha256("\n".join((split_hash, encoder.to_str(), purpose)).encode()).hexdigest()[:32]
    folder = cached_folder("tokens", key, lambda folder: save_file(compute(), folder / _ARRAYS))
    return load_file(folder / _ARRAYS) if folder else compute()
