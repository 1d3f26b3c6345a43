from __future__ import annotations

import hashlib
import sys

import pytest

from loras_bench.catalog import DATASETS
from loras_bench.config import DataConfig
from loras_bench.data import load_data, training_texts
from loras_bench.data.embedded import MODULE_GROUPS, docstrings, read_embedded, split_of


@pytest.fixture(scope="module")
def found():
    return docstrings()


@pytest.fixture(scope="module")
def modules():
    return read_embedded(DATASETS["python-docstring-modules"])


def test_topics_are_the_language_reference():
    splits = read_embedded(DATASETS["python-topics"])
    assert sum(len(split) for split in splits.values()) > 60
    assert sum(len(text) for split in splits.values() for text in split.columns[0]) > 400_000
    assert any('The "if" statement' in text for split in splits.values() for text in split.columns[0])


def test_docstrings_are_read_without_importing_and_without_repetition(found):
    texts = [text for _, text in found]
    assert len(texts) == len(set(texts)) > 5_000
    assert "turtle" not in sys.modules and "antigravity" not in sys.modules
    assert ("json", "Serialize ``obj`` to a JSON formatted ``str``.") in [
        (module, text.partition("\n")[0]) for module, text in found
    ]
    assert [module for module, _ in found] == sorted(module for module, _ in found)


def test_splits_are_fixed():
    for key in ("json", "argparse", "a", ""):
        share = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32
        assert split_of(key) == ("train" if share < 0.8 else "validation" if share < 0.9 else "test")
    first, second = (read_embedded(DATASETS["python-topics"]) for _ in range(2))
    assert {name: split.sha256 for name, split in first.items()} == {name: s.sha256 for name, s in second.items()}


def test_every_group_has_enough_rows_in_every_split(modules):
    names = DATASETS["python-docstring-modules"].label_names
    assert set(names) == set(MODULE_GROUPS.values())
    for split, least in (("train", 400), ("validation", 30), ("test", 30)):
        labels = modules[split].labels
        assert min(labels.count(label) for label in range(len(names))) >= least
        assert max(labels.count(label) for label in range(len(names))) < 0.35 * len(labels)


def test_no_module_is_in_two_splits(modules, found):
    by_text = {text: module for module, text in found}
    of_split = [{by_text[text] for text in modules[split].columns[0]} for split in ("train", "validation", "test")]
    assert not of_split[0] & of_split[1] and not of_split[0] & of_split[2] and not of_split[1] & of_split[2]


def test_it_needs_no_data_folder(byte_tokenizer, monkeypatch):
    monkeypatch.delenv("LORAS_BENCH_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = DataConfig(name="python-topics", sequence_length=256)
    data = load_data(config, byte_tokenizer)
    assert data.protocol("test")["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert data.rows("train") * 256 >= data.real_tokens("train", range(data.rows("train"))) > 300_000
    assert sum(map(len, training_texts(config))) > 300_000
