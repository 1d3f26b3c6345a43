from __future__ import annotations

import os

import pytest
import torch

from loras_bench.catalog import DatasetSpec
from loras_bench.config import DataConfig
from loras_bench.data import load_data
from loras_bench.data.classification import LabelledTexts
from loras_bench.data.sources import Source, Split
from loras_bench.errors import UserError

END, PAD = 0, 1  # the order in which our tokenizers name their special tokens


def labelled(tokenizer, columns, labels, length) -> LabelledTexts:
    spec = DatasetSpec("mine", "classification", tuple(f"text{i}" for i in range(len(columns))), "label", ("no", "yes"))
    return LabelledTexts(
        Source(spec, "here", {"train": Split(columns, labels)}, ("no", "yes"), "none"), tokenizer, length, ["train"]
    )


def test_rows_padding_and_truncation_by_hand(marking_tokenizer):
    texts = ["ab", "x" * 100, "y" * 126, "z" * 127]  # with their two ends: 4, 102, 128, 129 tokens
    data = labelled(marking_tokenizer, (texts,), [0, 1, 1, 0], 128)
    a, b = marking_tokenizer("ab")["input_ids"][1:-1]

    short = data.collate("train", [0])
    assert short["input_ids"].tolist() == [[END, a, b, END] + [PAD] * 60]
    assert short["attention_mask"].dtype == torch.bool
    assert short["attention_mask"].tolist() == [[True] * 4 + [False] * 60]
    assert short["targets"].tolist() == [0]

    mixed = data.collate("train", [1, 0])
    assert mixed["input_ids"].shape == (2, 128)
    assert mixed["attention_mask"].sum(1).tolist() == [102, 4]
    assert mixed["targets"].tolist() == [1, 0]

    full = data.collate("train", [3, 2])  # the cut row keeps its end, and nothing is padded
    assert full.keys() == {"input_ids", "targets"}
    assert full["input_ids"][:, -1].tolist() == [END, END]

    assert data.real_tokens("train", range(4)) == 4 + 102 + 128 + 128
    protocol = data.protocol("train")
    assert (protocol["rows"], protocol["truncated_rows"], protocol["truncated_share"]) == (4, 1, 0.25)
    assert protocol["label_counts"] == {"no": 2, "yes": 2}
    assert data.num_labels == 2


def test_padding_never_passes_the_sequence_length(marking_tokenizer):
    data = labelled(marking_tokenizer, (["a" * 80, "a"],), [0, 1], 100)
    assert data.collate("train", [0, 1])["input_ids"].shape == (2, 100)


def test_evaluation_goes_from_short_to_long(marking_tokenizer):
    data = labelled(marking_tokenizer, (["aaa", "a", "aa", "b"],), [0, 0, 0, 1], 64)
    assert data.eval_order("train").tolist() == [1, 3, 2, 0]


def test_pairs_under_a_tokenizer_that_marks_them(marking_tokenizer):
    data = labelled(marking_tokenizer, (["ab"], ["c"]), [1], 64)
    a, b, c = marking_tokenizer("abc")["input_ids"][1:-1]
    batch = data.collate("train", [0])
    assert batch["input_ids"][0, :6].tolist() == [END, a, b, END, c, END]
    if "token_type_ids" in marking_tokenizer.model_input_names:
        assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1] + [0] * 58


def test_pairs_are_joined_by_a_line_end_where_no_special_token_parts_them(byte_tokenizer):
    data = labelled(byte_tokenizer, (["ab"], ["c"]), [1], 64)
    batch = data.collate("train", [0])
    assert batch["input_ids"][0, :4].tolist() == byte_tokenizer("ab\nc")["input_ids"]
    assert "token_type_ids" not in batch


def test_the_caller_s_tokenizer_is_not_changed(marking_tokenizer):
    before = marking_tokenizer.backend_tokenizer.to_str()
    labelled(marking_tokenizer, (["ab"],), [1], 4)
    assert marking_tokenizer.backend_tokenizer.to_str() == before


def test_a_row_without_tokens_is_named(byte_tokenizer):
    with pytest.raises(UserError, match="row 1 has no text"):
        labelled(byte_tokenizer, (["a", ""],), [0, 1], 8)


@pytest.mark.skipif(not os.environ.get("LORAS_BENCH_DATA"), reason="needs the data sets: set LORAS_BENCH_DATA")
@pytest.mark.parametrize(
    ("name", "rows", "labels"),
    [
        ("trec", (5_252, 200, 500), 6),
        ("mr", (9_411, 200, 1_051), 2),
        ("cola", (8_351, 200, 1_043), 2),
        ("rte", (2_290, 200, 277), 2),
        ("mrpc", (3_668, 408, 1_725), 2),
        ("qqp-subset", (20_976, 200, 2_320), 2),
    ],
)
def test_real_sets_have_their_rows(marking_tokenizer, name, rows, labels):
    splits = ("train", "validation", "test")
    config = DataConfig(name=name, sequence_length=64, validation_rows=None if name == "mrpc" else 200)
    data = load_data(config, marking_tokenizer, splits=splits)
    assert tuple(data.rows(split) for split in splits) == rows
    assert data.num_labels == labels
    assert all(min(data.protocol(split)["label_counts"].values()) > 0 for split in ("train", "test"))
