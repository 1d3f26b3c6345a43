"""What becomes of the rows of a set, and of a chat template."""

from __future__ import annotations

import json

import pytest

from loras_bench.catalog import DATASETS
from loras_bench.config import DataConfig
from loras_bench.data.prompts import Template, final_answer, template_of
from loras_bench.data.sources import read_source
from loras_bench.errors import UserError
from loras_bench.models.tokenizer import train_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
QUESTION = "Which? Answer1: a Answer2: b\n\nAnswer format: answer1/answer2"


@pytest.fixture
def own_tokenizer():
    return train_tokenizer([], 258, mark_ends=False)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write the training rows of a set of the catalog, and read it."""
    monkeypatch.setenv("LORAS_BENCH_DATA", str(tmp_path))

    def written(name, rows, **config):
        spec = DATASETS.get(name)
        folder = tmp_path / (spec.path if spec else name)
        folder.mkdir(exist_ok=True)
        path = folder / f"{spec.stems['train'][0] if spec else 'train'}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path, lambda: read_source(DataConfig(name=name, sequence_length=64, **config))

    return written


def asked(question=QUESTION, output="the correct answer is answer2"):
    return {"instruction": question, "input": "", "output": output}


def test_a_chat_template_is_taken_apart(own_tokenizer):
    own_tokenizer.chat_template = "System.\n" + CHAT
    template = template_of(own_tokenizer)
    assert template == Template(
        "the tokenizer's chat template", "System.\n<user>", "<|endoftext|>\n<assistant>", "<|endoftext|>"
    )


def test_a_chat_template_without_an_end_of_turn_gets_the_end_of_sequence(own_tokenizer):
    own_tokenizer.chat_template = CHAT.replace("<|endoftext|>", "")
    assert template_of(own_tokenizer).after == "<|endoftext|>"


def test_a_chat_template_that_puts_the_response_elsewhere_is_refused(own_tokenizer):
    own_tokenizer.chat_template = CHAT.replace("<assistant>{% endif", "<assistant>Think:{% endif")
    with pytest.raises(UserError, match="chat template"):
        template_of(own_tokenizer)


def test_the_plain_template_keeps_the_beginning_of_a_text(own_tokenizer, marking_tokenizer):
    plain = template_of(own_tokenizer)
    assert (plain.before, plain.between, plain.after) == (
        "### Instruction:\n",
        "\n\n### Response:\n",
        "<|endoftext|>",
    )
    assert template_of(marking_tokenizer).before == "<|endoftext|>### Instruction:\n"
    own_tokenizer.eos_token = None
    with pytest.raises(UserError, match="end-of-sequence"):
        template_of(own_tokenizer)


def test_the_answers_that_a_prompt_allows_are_the_choices(write):
    _, read = write("arc-e", [asked(), asked(QUESTION + "/answer3", "the correct answer is answer1")])
    split = read().splits["train"]
    assert split.columns[1] == ["the correct answer is answer2", "the correct answer is answer1"]
    assert split.labels == [1, 0]
    assert split.choices == [
        tuple(f"the correct answer is answer{number}" for number in (1, 2)),
        tuple(f"the correct answer is answer{number}" for number in (1, 2, 3)),
    ]


def test_labels_are_named_in_answer_to_a_prompt(write):
    _, read = write("sst2-prompted", [{"sentence": "good {braces}", "label": 1}, {"sentence": "bad", "label": 0}])
    split = read().splits["train"]
    assert split.columns == (
        [f"Is the sentiment of this sentence negative or positive?\n\n{text}" for text in ("good {braces}", "bad")],
        ["positive", "negative"],
    )
    assert (split.labels, split.choices) == ([1, 0], [("negative", "positive")] * 2)


def test_free_responses_have_no_choices(write):
    _, read = write("gsm8k", [{"question": "1 + 1?", "answer": "It is 2.\n#### 2"}])
    split = read().splits["train"]
    assert (split.columns, split.labels, split.choices) == ((["1 + 1?"], ["It is 2.\n#### 2"]), None, None)
    _, read = write("mine", [{"q": "why?", "a": "so"}], task="instruction", text_fields=("q", "a"))
    assert read().splits["train"].columns == (["why?"], ["so"])


def test_choices_follow_their_rows_into_the_validation_split(write):
    rows = [asked(f"{number}. {QUESTION}", f"the correct answer is answer{1 + number % 2}") for number in range(8)]
    _, read = write("arc-e", rows, validation_rows=3)
    source = read()
    assert [len(source.splits[name]) for name in ("train", "validation")] == [5, 3]
    for split in source.splits.values():
        for response, label, choices in zip(split.columns[1], split.labels, split.choices, strict=True):
            assert choices[label] == response


def test_the_content_hash_follows_the_choices(write):
    _, read = write("arc-e", [asked()])
    first = read().content_hash
    _, read = write("arc-e", [asked(QUESTION + "/answer3")])
    assert read().content_hash != first


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("arc-e", asked(output="the correct answer is answer7"), "none of the answers that follow `Answer format: `"),
        ("arc-e", asked("Which?"), "none of the answers"),
        ("arc-e", asked(output=" \n"), "`output` is empty"),
        ("arc-e", asked(question=""), "`instruction` is empty"),
        ("arc-e", {"instruction": QUESTION}, "`output` is no text"),
        ("gsm8k", {"question": "1 + 1?", "answer": "2"}, "has no `####"),
        ("sst2-prompted", {"sentence": "fine", "label": 4}, "label 4"),
        ("sst2-prompted", {"sentence": " ", "label": 1}, "`sentence` is empty"),
    ],
)
def test_wrong_rows_are_named_with_file_and_line(write, name, row, message):
    good = {
        "arc-e": asked(),
        "gsm8k": {"question": "1 + 1?", "answer": "#### 2"},
        "sst2-prompted": {"sentence": "good", "label": 1},
    }[name]
    path, read = write(name, [good, good, row])
    with pytest.raises(UserError, match=message) as caught:
        read()
    assert caught.value.message.startswith(f"{path} line 3")
    assert caught.value.hint


def test_a_field_that_no_row_has_is_named_with_the_file(write):
    path, read = write("arc-e", [{"instruction": QUESTION}])
    with pytest.raises(UserError, match="has no field `output`") as caught:
        read()
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("She has 2.\n#### 1,234", "1234"),
        ("#### -3.5", "-3.5"),
        ("#### 18. Good", "18"),
        ("#### 7\n#### 8", "7"),
        ("the answer is 7", None),
    ],
)
def test_final_answers(response, number):
    assert final_answer(response, DATASETS["gsm8k"].final_answer) == number
