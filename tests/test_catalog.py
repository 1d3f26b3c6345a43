from __future__ import annotations

import subprocess
import sys

import pytest

from loras_bench.catalog import DATASETS, locate_data, task_of
from loras_bench.config import DataConfig
from loras_bench.errors import ConfigError, UserError


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch):
    for name in ("LORAS_BENCH_DATA", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def data(name, **more):
    return DataConfig(name=name, sequence_length=8, **more)


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_nothing_heavy_is_imported():
    modules = "import sys, loras_bench.catalog, loras_bench.models.catalog"
    code = f"{modules}; print({{'torch', 'transformers', 'datasets', 'numpy'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_a_folder_is_found_with_any_split_name_and_compression(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAS_BENCH_DATA", str(tmp_path))
    for name in ("train.txt.xz", "valid.txt.xz", "test.txt.xz"):
        touch(tmp_path / "wikitext-2" / name)
    for name in ("train.jsonl", "dev.jsonl.gz"):
        touch(tmp_path / "cola" / name)
    found = locate_data(data("wikitext-2"))
    assert {split: path.name for split, path in found.files.items()} == {
        "train": "train.txt.xz",
        "validation": "valid.txt.xz",
        "test": "test.txt.xz",
    }
    # CoLA's test labels are secret: its dev set is the test set.
    assert {s: p.name for s, p in locate_data(data("cola")).files.items()} == {
        "train": "train.jsonl",
        "test": "dev.jsonl.gz",
    }


def test_the_error_lists_every_place_and_the_way_out(tmp_path, monkeypatch):
    with pytest.raises(UserError) as caught:
        locate_data(data("imdb"))
    assert "$LORAS_BENCH_DATA, which is not set" in caught.value.message
    assert "hub stanfordnlp/imdb: not asked" in caught.value.message
    assert "LORAS_BENCH_DATA" in str(caught.value.hint) and "imdb/train.jsonl" in str(caught.value.hint)
    monkeypatch.setenv("LORAS_BENCH_DATA", str(tmp_path))
    with pytest.raises(UserError) as caught:
        locate_data(data("mr"))
    assert str(tmp_path / "mr") in caught.value.message
    assert "hub has no copy" in caught.value.message


def test_the_hub_is_the_last_place_and_pinned(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for spec in DATASETS.values():
        if spec.hub:
            found = locate_data(data(spec.name))
            assert found.hub == spec.hub and len(spec.hub.revision) == 40
            assert spec.hub.revision in found.origin


def test_unknown_data_sets():
    with pytest.raises(ConfigError, match="did you mean `wikitext-2`"):
        locate_data(data("wikitext2"))
    with pytest.raises(ConfigError, match=r"data\.label_field"):
        locate_data(data("mine", task="classification"))
    with pytest.raises(ConfigError, match=r"data\.revision"):
        locate_data(data("owner/name", task="language_modeling"))
    with pytest.raises(ConfigError, match="is for data sets outside the catalog"):
        locate_data(data("imdb", label_field="label"))


def test_a_hub_data_set_of_the_user_s_own(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    found = locate_data(data("owner/name", task="language_modeling", revision="abc", subset="small"))
    assert found.hub is not None
    assert (found.hub.repository, found.hub.revision, found.hub.subset) == ("owner/name", "abc", "small")


def test_sets_of_one_folder_have_files_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAS_BENCH_DATA", str(tmp_path))
    for name in ("arc-easy_train.jsonl.xz", "arc-easy_test.jsonl.xz", "boolq_train.jsonl.xz"):
        touch(tmp_path / "llm-adapters-commonsense" / name)
    files = locate_data(data("arc-e")).files
    assert {split: path.name for split, path in files.items()} == {
        "train": "arc-easy_train.jsonl.xz",
        "test": "arc-easy_test.jsonl.xz",
    }
    assert list(locate_data(data("boolq-without-passages")).files) == ["train"]
    with pytest.raises(UserError) as caught:
        locate_data(data("arc-c"))
    assert "llm-adapters-commonsense/arc-challenge_train.jsonl" in str(caught.value.hint)


def test_prompted_sets_are_read_from_the_folder_of_their_texts(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAS_BENCH_DATA", str(tmp_path))
    touch(tmp_path / "sst2" / "train.jsonl")
    assert locate_data(data("sst2-prompted")).files == locate_data(data("sst2")).files


def test_instructions_of_ones_own_need_two_fields(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAS_BENCH_DATA", str(tmp_path))
    touch(tmp_path / "mine" / "train.jsonl")
    assert locate_data(data("mine", task="instruction")).spec.text_fields == ("prompt", "response")
    with pytest.raises(ConfigError, match="names 1 fields"):
        locate_data(data("mine", task="instruction", text_fields=("text",)))
    with pytest.raises(ConfigError, match="task instruction"):
        locate_data(data("mine", task="instruction", label_field="label"))


def test_the_task_is_known_without_looking_for_the_data():
    assert task_of(data("gsm8k")) == "instruction"
    assert task_of(data("mine", task="classification")) == "classification"
    assert task_of(data("mine")) is None
