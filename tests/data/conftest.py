from __future__ import annotations

import pytest

from loras_bench.models.tokenizer import train_tokenizer


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """Tests neither read nor write the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def byte_tokenizer():
    """No merges: one token a byte, and the two special tokens. It adds no special tokens, like GPT-2's."""
    return train_tokenizer([], 258, mark_ends=False)


@pytest.fixture(scope="session")
def marking_tokenizer():
    """One token a byte, with `<|endoftext|>` before and after each text, like BERT's [CLS] and [SEP]."""
    return train_tokenizer([], 258, mark_ends=True)
