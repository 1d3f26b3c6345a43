from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loras_bench.catalog import DatasetSpec
from loras_bench.config import DataConfig
from loras_bench.data import IGNORED, load_data
from loras_bench.data.language_modeling import PackedText, token_stream
from loras_bench.data.sources import Source, Split
from loras_bench.data.tokens import encoder_of
from loras_bench.errors import ConfigError
from loras_bench.models.tokenizer import train_tokenizer

END = 0  # <|endoftext|> is the first token of tokenizers that we train


def packed(tokenizer, documents, length, **spec) -> PackedText:
    source = Source(DatasetSpec("mine", "language_modeling", **spec), "here", {"test": Split((documents,))}, (), "none")
    return PackedText(source, tokenizer, length, ["test"])


def ids(tokenizer, text) -> list[int]:
    return tokenizer(text)["input_ids"]


def test_blocks_by_hand(byte_tokenizer):
    a, b, c, d, e = ids(byte_tokenizer, "abcde")
    data = packed(byte_tokenizer, ["abc", "de"], 4)
    # stream: END a b c END d e -> six predicted tokens -> a full block and one of two
    assert data.rows("test") == 2
    batch = data.collate("test", [0, 1])
    assert batch["input_ids"].tolist() == [[END, a, b, c], [END, d, END, END]]
    assert batch["targets"].tolist() == [[a, b, c, END], [d, e, IGNORED, IGNORED]]
    assert batch.keys() == {"input_ids", "targets"}
    assert [data.real_tokens("test", [row]) for row in (0, 1)] == [4, 2]
    assert data.real_tokens("test", range(2)) == data.target_count("test", range(2)) == 6
    assert data.eval_order("test").tolist() == [0, 1]


def test_sizes_by_hand(byte_tokenizer):
    text = " = Höhe = \n \n a b \n"  # 5 words on 3 lines; ö takes two bytes
    plain, wikitext = packed(byte_tokenizer, [text], 8), packed(byte_tokenizer, [text], 8, line_end_is_word=True)
    assert plain.protocol("test")["words"] == 5
    assert wikitext.protocol("test")["words"] == 5 + 3
    assert plain.protocol("test")["bytes"] == len(text) + 1 == plain.protocol("test")["tokens"]


@given(
    documents=st.lists(st.text(alphabet="ab \n", max_size=30), min_size=1, max_size=5),
    length=st.integers(min_value=2, max_value=17),
)
@settings(max_examples=60, deadline=None)
def test_every_token_is_an_input_once_and_a_target_once(byte_tokenizer, documents, length):
    stream = [token for text in documents for token in (END, *ids(byte_tokenizer, text))]
    data = packed(byte_tokenizer, documents, length)
    rows = data.rows("test")
    if rows == 0:
        assert len(stream) == 1
        return
    batch = data.collate("test", range(rows))
    predicted = batch["targets"] != IGNORED
    assert batch["targets"][predicted].tolist() == stream[1:]
    assert batch["input_ids"][predicted].tolist() == stream[:-1]
    assert data.real_tokens("test", range(rows)) == int(predicted.sum()) == len(stream) - 1
    assert [data.target_count("test", [row]) for row in range(rows)] == predicted.sum(1).tolist()
    assert predicted[:-1].all()  # only the last block is padded
    assert not (predicted[-1].int().diff() > 0).any()  # and at its right end


@given(st.text(alphabet=" \n\t\r\u00a0ab1.'é", max_size=80))
@settings(max_examples=300, deadline=None)
def test_parallel_chunks_give_the_tokens_of_the_whole_text(bpe, text):
    encoder = encoder_of(bpe)
    assert token_stream([text], encoder, END).tolist() == [END, *encoder.encode(text).ids]


@pytest.fixture(scope="module")
def bpe():
    """Merges across blanks and line ends, which a wrong cut would miss."""
    texts = ["a b\n\n ab 1.1\n", " \n  = ab = \n\n\tab's\n", "\n\n\n  a\n b\n"] * 20
    return train_tokenizer(texts, 320, mark_ends=False)


def test_a_tokenizer_that_sees_across_lines_is_given_the_whole_text(bpe):
    from tokenizers import pre_tokenizers

    encoder = encoder_of(bpe)
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    text = "a b\n\n ab 1.1\na b\n\n ab 1.1\n" * 3
    assert token_stream([text], encoder, END).tolist() == [END, *encoder.encode(text).ids]


def test_order_of_rows_is_free(byte_tokenizer):
    data = packed(byte_tokenizer, ["abcdefghij"], 3)
    whole: Tensor = data.collate("test", range(4))["input_ids"]
    assert data.collate("test", np.array([2, 0]))["input_ids"].tolist() == whole[[2, 0]].tolist()


def test_a_missing_split_is_an_error_with_a_way_out(byte_tokenizer, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.txt").write_text("some text")
    monkeypatch.setenv("LORAS_BENCH_DATA", str(tmp_path))
    config = DataConfig(name="mine", task="language_modeling", sequence_length=8)
    with pytest.raises(ConfigError, match="no validation split") as caught:
        load_data(config, byte_tokenizer, splits=["train", "validation"])
    assert "validation_rows" in str(caught.value.hint)


@pytest.mark.skipif(not os.environ.get("LORAS_BENCH_DATA"), reason="needs WikiText-2: set LORAS_BENCH_DATA")
def test_wikitext_2_has_its_published_word_counts(byte_tokenizer):
    splits = ("train", "validation", "test")
    data = load_data(DataConfig(name="wikitext-2", sequence_length=8192), byte_tokenizer, splits=splits)
    assert [data.protocol(split)["words"] for split in splits] == [2_088_628, 217_646, 245_569]
    assert [data.protocol(split)["bytes"] for split in splits] == [10_797_148, 1_121_681, 1_256_449]
    assert data.protocol("test")["tokens"] == 1_256_449  # one token a byte; the separator is only read
