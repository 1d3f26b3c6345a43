from __future__ import annotations

import numpy as np

from loras_bench.data.tokens import cached_arrays, encoder_of


def test_arrays_are_computed_once_for_the_same_content_tokenizer_and_purpose(byte_tokenizer, marking_tokenizer):
    calls: list[str] = []

    def read(content="text", tokenizer=byte_tokenizer, purpose="stream"):
        def compute():
            calls.append(content)
            return {"a": np.arange(3, dtype=np.int32), "flags": np.array([True, False])}

        return cached_arrays(content, encoder_of(tokenizer), purpose, compute)

    first, second = read(), read()
    assert len(calls) == 1
    assert all(np.array_equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first)
    read(content="other")
    read(tokenizer=marking_tokenizer)
    read(purpose="rows")
    assert len(calls) == 4
