from __future__ import annotations

import pytest

from loras_bench.models.tokenizer import train_tokenizer


@pytest.fixture(autouse=True, scope="module")
def _in_all_modules(own_cache):
    """Nothing here touches the user's cache."""


@pytest.fixture(scope="session")
def byte_tokenizer():
    """No merges: one token a byte, and the two special tokens. It adds no special tokens, like GPT-2's."""
    return train_tokenizer([], 258, mark_ends=False)


@pytest.fixture(scope="session")
def marking_tokenizer():
    """One token a byte, with `<|endoftext|>` before and after each text, like BERT's [CLS] and [SEP]."""
    return train_tokenizer([], 258, mark_ends=True)
