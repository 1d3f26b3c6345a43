"""`loras-bench savings` and `loras-bench recall` on finished runs: tables, files, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_fixtures import GPT2, LORA, MOODS, experiment, request

from loras_bench.experiment import Run
from loras_bench.pruning import savings
from loras_bench.pruning.export import load_exported
from loras_bench.pruning.packing import load_packed

pytestmark = pytest.mark.usefixtures("places")
Invoke = Callable[..., Any]
UNITS = {"kind": "prune", "sparsity": 0.5, "pattern": "structured", "end": 0}
PAIRS = {"kind": "prune", "sparsity": 0.5, "pattern": "2:4", "scope": ["feed_forward", "attention"], "end": 0}


@pytest.fixture(scope="module")
def runs(places: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of finished runs, by name."""
    results, folders = tmp_path_factory.mktemp("results"), {}
    arms: dict[str, dict[str, Any]] = {
        "units": {"methods": [UNITS]},
        "pairs": {"methods": [PAIRS]},
        "dense": {},
        "lora": {"methods": [LORA]},
        "moods": {"data": MOODS, "methods": [UNITS | {"scope": ["feed_forward"]}]},
        "light": {"save": False},
        "smaller": {"model": GPT2 | {"tokenizer": {"vocabulary": 280}}},
    }
    for name, sections in arms.items():
        made = request(experiment(name, **sections), results)
        assert Run(made, lambda event: None).execute().status == "completed"
        folders[name] = made.folder
    return folders


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(savings, "HOST_SECONDS", 0)


def rows_of(out: str, title: str) -> dict[str, list[str]]:
    """The cells of the table under a title, by form."""
    table = next(
        part for part in out.split("a forward pass of")[1:] if title in out[: out.index(part)].splitlines()[-1]
    )
    lines = [line for line in table.splitlines() if line.startswith("│ ")]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    return {row[0]: row[1:] for row in cells if row[0] in ("dense", "masked", "exported", "2:4")}


def test_tables_go_to_stdout_numbers_and_models_to_files(invoke: Invoke, runs: Any, tmp_path: Path) -> None:
    file, out = tmp_path / "savings.json", tmp_path / "kept"
    words = ("--batch", 2, "--length", 32, "--device", "cpu", "--json", file, "--out", out)
    called = invoke("savings", runs["units"], runs["pairs"], *words)
    assert called.status == 0, called.err
    assert called.err.splitlines()[:2] == ["units/seed0 dense", "units/seed0 masked"]
    content = json.loads(file.read_text())
    assert (content["batch"], content["length"]) == (2, 32)
    assert content["environment"]["packages"]["torch"] and content["protocol"] in called.out
    units, pairs = ({form["form"]: form for form in run["forms"]} for run in content["runs"])
    assert units["exported"]["flops"] < units["masked"]["flops"] == units["dense"]["flops"]
    assert units["exported"]["dense_bytes"] < 0.7 * units["masked"]["dense_bytes"]
    assert units["masked"]["dense_bytes"] == units["dense"]["dense_bytes"]
    assert units["masked"]["forward_ms"]["median_ms"] > 0
    assert units["masked"]["energy_j"] is None and units["masked"]["energy_reason"] == "there is no GPU"
    assert "No joules: there is no GPU." in called.out
    assert pairs["2:4"]["flops"] < 0.8 * pairs["dense"]["flops"] and "GPU" in pairs["2:4"]["reason"]
    assert pairs["exported"]["reason"].endswith("nothing to cut")

    shown = rows_of(called.out, "units")
    assert shown["masked"][0] == f"{units['masked']['parameters']:,} (100.0%)"
    assert shown["masked"][4].endswith("(100.0%)") and not shown["exported"][4].endswith("(100.0%)")
    assert shown["2:4"][:4] == ["–"] * 4 and shown["dense"][7] == "–"

    assert sorted(path.name for path in (out / "units" / "seed0").iterdir()) == ["exported", "packed.safetensors"]
    assert sorted(path.name for path in (out / "pairs" / "seed0").iterdir()) == ["packed.safetensors"]
    exported = load_exported(out / "units" / "seed0" / "exported")
    assert sum(p.numel() for p in exported.model.parameters()) == units["exported"]["parameters"]
    packed = load_packed(out / "units" / "seed0" / "packed.safetensors")
    assert sum(int(t.count_nonzero()) for t in packed.values()) == units["masked"]["nonzero"]


@pytest.mark.parametrize("name", ["moods", "lora"])
def test_classifiers_and_merged_adapters(invoke: Invoke, runs: Any, name: str) -> None:
    called = invoke("savings", runs[name], "--batch", 2, "--length", 16, "--device", "cpu")
    assert called.status == 0, called.err
    shown = rows_of(called.out, name)
    assert (shown["exported"][0] == "–") is (name == "lora")


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("light", (), "holds no weights"),
        (None, (), "no finished run in"),
        ("units", ("--length", 65), "--length 65: "),
        ("units", ("--batch", 0), "--batch"),
        ("units", ("--json", "/nowhere/at/all.json"), "--json /nowhere/at/all.json"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    invoke: Invoke, runs: Any, tmp_path: Path, name: str | None, words: Any, message: str
) -> None:
    called = invoke("savings", runs[name] if name else tmp_path, "--device", "cpu", *words)
    assert (called.status, called.out) == (2, "")
    assert message in called.err.splitlines()[0]


def test_a_gpu_that_is_not_there(invoke: Invoke, runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in ("savings", "recall"):
        called = invoke(command, runs["units"], "--device", "cuda")
        assert called.status == 2 and "no CUDA device" in called.err


def test_recall_of_runs(invoke: Invoke, runs: Any, tmp_path: Path) -> None:
    file = tmp_path / "recall.json"
    words = ("--distances", "16,4", "--rows", 8, "--device", "cpu", "--json", file)
    called = invoke("recall", runs["units"], runs["dense"], runs["smaller"], *words)
    assert called.status == 0, called.err
    content = json.loads(file.read_text())
    assert (content["rows"], content["seed"]) == (8, 0) and list(content["models"]) == called.err.splitlines()
    found = [content["models"][str(runs[name])] for name in ("units", "dense", "smaller")]
    assert [[point["distance"] for point in model["recall"]] for model in found] == [[4, 16]] * 3
    assert [point["copies"] for point in found[0]["recall"]] == [8 * 3, 8 * 15]
    assert found[0]["tokens"] == found[1]["tokens"] < 151 < found[2]["tokens"] == 278, "half of 300 are pruned"
    assert called.out.count("| distance |") == 3 and "loss ln 280" in called.out
    assert invoke("recall", runs["units"], runs["dense"], runs["smaller"], *words).out == called.out
    other = json.loads(file.read_text())["models"]
    invoke("recall", runs["dense"], *words[:-2], "--json", tmp_path / "alone")
    alone = json.loads((tmp_path / "alone").read_text())["models"][str(runs["dense"])]
    assert alone["tokens"] == 298 > other[str(runs["dense"])]["tokens"], "nothing is pruned of it"


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("moods", (), "is a classifier"),
        ("light", (), "holds no weights"),
        ("dense", ("--distances", "4,x"), "--distances `4,x`"),
        ("dense", ("--distances", "1"), "--distances `1`"),
        ("dense", ("--distances", "8,32"), "distance 32 needs 65 positions"),
        ("units", ("--distances", "4", "--json", "/"), "--json / is a folder"),
    ],
)
def test_what_cannot_be_probed_is_refused(invoke: Invoke, runs: Any, name: str, words: Any, message: str) -> None:
    called = invoke("recall", runs[name], *words, "--device", "cpu")
    assert (called.status, called.out) == (2, "")
    assert message in called.err.splitlines()[0]


def test_an_unknown_model_is_refused(invoke: Invoke) -> None:
    called = invoke("recall", "minilm")
    assert (called.status, called.out) == (2, "") and "unknown model `minilm`" in called.err
