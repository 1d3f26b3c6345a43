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


def labelled(tokenizer, columns, labels, length, packed=False) -> LabelledTexts:
    spec = DatasetSpec("mine", "classification", tuple(f"text{i}" for i in range(len(columns))), "label", ("no", "yes"))
    source = Source(spec, "here", {"train": Split(columns, labels)}, ("no", "yes"), "none")
    return LabelledTexts(source, tokenizer, length, ["train"], packed)


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
    assert data.target_count("train", [3, 0, 2]) == 3
    protocol = data.protocol("train")
    assert (protocol["rows"], protocol["truncated_rows"], protocol["truncated_share"]) == (4, 1, 0.25)
    assert protocol["label_counts"] == {"no": 2, "yes": 2}
    assert data.num_labels == 2


def test_padding_never_passes_the_sequence_length(marking_tokenizer):
    data = labelled(marking_tokenizer, (["a" * 80, "a"],), [0, 1], 100)
    assert data.collate("train", [0, 1])["input_ids"].shape == (2, 100)


def test_rows_packed_by_hand(marking_tokenizer):
    """With their two ends the rows have 4, 300 and 3 tokens."""
    data = labelled(marking_tokenizer, (["ab", "x" * 400, "c"],), [0, 1, 1], 300, packed=True)
    a, b, x, c = marking_tokenizer("abxc")["input_ids"][1:-1]
    batch = data.collate("train", [2, 1, 0])
    tokens = [END, c, END, END, *[x] * 298, END, END, a, b, END]
    assert batch["input_ids"].tolist() == [tokens + [PAD] * (512 - 307)]
    assert batch["attention_mask"].tolist() == [[True] * 307 + [False] * 205]
    assert batch["document_ids"].tolist() == [[0] * 3 + [1] * 300 + [2] * 4 + [3] * 205]
    assert batch["position_ids"].tolist() == [[*range(3), *range(300), *range(4)] + [0] * 205]
    assert (batch["starts"].tolist(), batch["ends"].tolist()) == ([0, 3, 303], [2, 302, 306])
    assert batch["targets"].tolist() == [1, 1, 0]
    assert {name: tensor.dtype for name, tensor in batch.items() if tensor.dtype != torch.int64} == {
        "attention_mask": torch.bool
    }


def test_a_packed_batch_has_the_same_parts_whether_or_not_it_fills_its_row(marking_tokenizer):
    data = labelled(marking_tokenizer, (["a" * 126, "b" * 126, "c"],), [0, 1, 1], 128, packed=True)
    full, filled = data.collate("train", [0, 1]), data.collate("train", [0, 2])
    assert full["attention_mask"].all() and not filled["attention_mask"].all()
    assert {name: tensor.shape for name, tensor in full.items()} == {
        name: tensor.shape for name, tensor in filled.items()
    }


def test_the_protocol_says_how_batches_are_made(marking_tokenizer):
    padded, packed = (
        labelled(marking_tokenizer, (["a"],), [0], 8, packed).protocol("train") for packed in (False, True)
    )
    assert padded.pop("padding") == "right, to the longest row of the batch, rounded up to a multiple of 64"
    assert packed.pop("padding") == "none: rows packed into one, its end filled up to a multiple of 256"
    assert padded == packed


@pytest.mark.parametrize("packing", ["packed", "padded", "auto"])
def test_the_config_decides_on_packing(marking_tokenizer, tmp_path, monkeypatch, packing):
    monkeypatch.setenv("LORAS_BENCH_DATA", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "bb", "label": 1}\n')
    config = DataConfig(name="mine", task="classification", label_field="label", sequence_length=8, packing=packing)
    batch = load_data(config, marking_tokenizer, splits=["train"]).collate("train", [0, 1])
    assert batch["input_ids"].shape == ((1, 256) if packing == "packed" else (2, 8))


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
        packed = labelled(marking_tokenizer, (["ab", "a"], ["c", ""]), [1, 0], 64, packed=True).collate("train", [1, 0])
        assert packed["token_type_ids"][0].tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 1, 1] + [0] * 246


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
