from __future__ import annotations

import gzip
import json
import lzma

import pytest

from loras_bench.config import DataConfig
from loras_bench.data.sources import read_source
from loras_bench.errors import ConfigError, UserError


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAS_BENCH_DATA", str(tmp_path))
    return tmp_path


def write_rows(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(lzma.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def reviews(root, count=20):
    rows = [{"text": f"review {i}", "label": i % 2} for i in range(count)]
    write_rows(root / "imdb" / "train.jsonl.xz", rows)
    write_rows(root / "imdb" / "test.jsonl.xz", rows[:3])
    return rows


@pytest.mark.parametrize("pack", [lambda b: b, gzip.compress, lzma.compress], ids=["txt", "gz", "xz"])
def test_text_is_read_byte_for_byte(root, pack):
    ending = {"gzip": ".gz", "lzma": ".xz"}.get(pack.__module__, "")
    text = "\n = Title = \n \n line\r\nwith \u2028 odd\x85 ends\r\n\n"
    (root / "mine").mkdir()
    (root / "mine" / f"train.txt{ending}").write_bytes(pack(text.encode()))
    source = read_source(DataConfig(name="mine", task="language_modeling", sequence_length=8))
    assert source.splits["train"].columns == ([text],)


def test_rows_and_labels_come_through(root):
    rows = reviews(root)
    source = read_source(DataConfig(name="imdb", sequence_length=8))
    assert source.splits["train"].columns == ([row["text"] for row in rows],)
    assert source.splits["train"].labels == [row["label"] for row in rows]
    assert source.label_names == ("negative", "positive")
    assert source.splits.keys() == {"train", "test"}
    assert source.validation == "none"


def test_validation_rows_are_fixed_and_disjoint(root):
    rows = reviews(root)
    config = DataConfig(name="imdb", sequence_length=8, validation_rows=5)
    splits = read_source(config).splits
    held, kept = splits["validation"].columns[0], splits["train"].columns[0]
    assert (len(held), len(kept)) == (5, 15)
    assert sorted(held + kept) == sorted(row["text"] for row in rows)
    # The choice follows the texts, not their order in the file.
    write_rows(root / "imdb" / "train.jsonl.xz", rows[::-1])
    assert set(read_source(config).splits["validation"].columns[0]) == set(held)
    fewer = read_source(config.model_copy(update={"validation_rows": 2})).splits["validation"].columns[0]
    assert set(fewer) < set(held)


def test_validation_rows_are_refused_where_the_set_has_its_own(root):
    reviews(root)
    write_rows(root / "imdb" / "dev.jsonl.xz", [{"text": "x", "label": 1}])
    with pytest.raises(ConfigError, match="of its own"):
        read_source(DataConfig(name="imdb", sequence_length=8, validation_rows=2))
    with pytest.raises(ConfigError, match="1 training rows"):
        write_rows(root / "mine" / "train.jsonl.xz", [{"text": "x"}])
        read_source(DataConfig(name="mine", task="language_modeling", sequence_length=8, validation_rows=1))


def test_the_content_hash_follows_texts_labels_and_splits(root):
    rows = reviews(root)
    config = DataConfig(name="imdb", sequence_length=8)
    first = read_source(config).content_hash
    assert read_source(config.model_copy(update={"sequence_length": 16})).content_hash == first
    assert read_source(config.model_copy(update={"validation_rows": 2})).content_hash != first
    rows[7]["label"] = 1 - rows[7]["label"]
    write_rows(root / "imdb" / "train.jsonl.xz", rows)
    assert read_source(config).content_hash != first


def test_labels_of_other_sets_are_numbered_by_name(root):
    write_rows(
        root / "mine" / "train.jsonl.xz", [{"a": "x", "b": "y", "kind": kind} for kind in ("spam", "ham", "spam")]
    )
    config = DataConfig(
        name="mine", task="classification", text_fields=("a", "b"), label_field="kind", sequence_length=8
    )
    source = read_source(config)
    assert source.label_names == ("ham", "spam")
    assert source.splits["train"].labels == [1, 0, 1]
    assert source.splits["train"].columns == (["x"] * 3, ["y"] * 3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x", "label": -1}, "label -1"),
        ({"text": "x"}, "no field `label`"),
        ({"label": 0}, "no field `text`"),
        ({"text": 5, "label": 0}, r"test\.jsonl\.xz line 1: `text` is no text"),
    ],
)
def test_wrong_rows_are_named(root, row, message):
    reviews(root)
    write_rows(root / "imdb" / "test.jsonl.xz", [row])
    with pytest.raises(UserError, match=message):
        read_source(DataConfig(name="imdb", sequence_length=8))


@pytest.mark.parametrize("line", ['{"text": "cut off', "plain text", '{"text": "a"} {"text": "b"}'])
def test_a_line_that_is_no_json_is_named_with_its_file(root, line):
    reviews(root)
    (root / "imdb" / "test.jsonl.xz").unlink()
    path = root / "imdb" / "test.jsonl"
    path.write_text(json.dumps({"text": "a", "label": 0}) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_source(DataConfig(name="imdb", sequence_length=8))
    assert f"{path} line 2" in caught.value.message


def test_a_broken_file_is_named(root):
    reviews(root)
    (root / "imdb" / "test.jsonl.xz").write_bytes(b"not xz at all")
    with pytest.raises(UserError, match=r"cannot read .*test\.jsonl\.xz"):
        read_source(DataConfig(name="imdb", sequence_length=8))
