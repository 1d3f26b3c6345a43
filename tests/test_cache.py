from __future__ import annotations

import pytest

from loras_bench.cache import cached_folder


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "loras_bench" / "things"


def test_content_is_made_once(base):
    made = []

    def make(folder):
        made.append(folder)
        (folder / "file").write_text("content")

    folders = [cached_folder("things", "key", make) for _ in range(2)]
    assert folders == [base / "key"] * 2
    assert (base / "key" / "file").read_text() == "content"
    assert len(made) == 1


def test_what_fails_leaves_nothing_behind(base):
    def fail(folder):
        (folder / "half").write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        cached_folder("things", "key", fail)
    assert list(base.iterdir()) == []


def test_a_second_process_that_was_faster_wins(base):
    def make(folder):
        (base / "key").mkdir()
        (base / "key" / "file").write_text("theirs")
        (folder / "file").write_text("ours")

    assert cached_folder("things", "key", make) == base / "key"
    assert (base / "key" / "file").read_text() == "theirs"


def test_no_place_to_write_is_not_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cached_folder("things", "key", lambda folder: None) is None
