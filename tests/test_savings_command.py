"""`loras-bench savings` and `loras-bench recall` on finished runs: tables, files, and what they refuse."""

from __future__ import annotations

import csv
import json
import shutil
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


def tables_of(out: str) -> dict[str, dict[str, dict[str, str]]]:
    """The cells of each table by the line above it, then by row, then by column."""
    tables: dict[str, dict[str, dict[str, str]]] = {}
    title, heads = "", None
    for line in out.splitlines():
        if not line.startswith("|"):
            title, heads = line or title, None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if heads is None:
            heads = cells
        elif not cells[0].startswith(":-"):
            tables.setdefault(title, {})[cells[0]] = dict(zip(heads[1:], cells[1:], strict=True))
    return tables


def table_of(out: str, run: str) -> dict[str, dict[str, str]]:
    """Of a run, by row and form."""
    return next(table for title, table in tables_of(out).items() if title.startswith(f"{run}/seed0: "))


def test_tables_go_to_stdout_numbers_and_models_to_files(invoke: Invoke, runs: Any, tmp_path: Path) -> None:
    file, out = tmp_path / "savings.json", tmp_path / "kept"
    words = ("--batch", 2, "--length", 32, "--device", "cpu", "--json", file, "--out", out)
    called = invoke("savings", runs["units"], runs["pairs"] / "result.json", runs["units"], *words)
    assert called.status == 0, called.err
    assert called.err.splitlines()[:2] == ["1 of 2: units/seed0, dense", "1 of 2: units/seed0, trained"]
    content = json.loads(file.read_text())
    assert (content["batch"], content["length"]) == (2, 32)
    assert content["environment"]["packages"]["torch"] and content["protocol"] in called.out
    units, pairs = ({form["form"]: form for form in run["forms"]} for run in content["runs"])
    assert units["exported"]["flops"] < units["trained"]["flops"] == units["dense"]["flops"]
    assert units["exported"]["dense_bytes"] < 0.7 * units["trained"]["dense_bytes"]
    assert units["trained"]["dense_bytes"] == units["dense"]["dense_bytes"]
    assert units["dense"]["nonzero"] == units["dense"]["parameters"], "biases of dead units are filled too"
    assert units["trained"]["forward_ms"]["median_ms"] > 0
    assert units["trained"]["energy_j"] is None and units["trained"]["energy_reason"] == "there is no GPU"
    assert "No joules: there is no GPU." in called.out
    assert pairs["2:4"]["flops"] < 0.8 * pairs["dense"]["flops"] and "GPU" in pairs["2:4"]["reason"]
    assert pairs["exported"]["reason"].endswith("nothing to cut")
    assert f"exported: {pairs['exported']['reason']}." in called.out

    shown = table_of(called.out, "units")
    assert shown["10^6 parameters"]["trained"] == f"{units['trained']['parameters'] / 1e6:.4g} (100.0%)"
    flops = next(row for name, row in shown.items() if name.endswith("FLOP"))
    assert flops["trained"].endswith("(100.0%)") and not flops["exported"].endswith("(100.0%)")
    assert "(" not in flops["dense"] and shown["J"] == dict.fromkeys(("dense", "trained", "exported"), "–")
    assert list(table_of(called.out, "pairs")["ms"]) == ["dense", "trained", "2:4"]
    of_runs = called.out[: called.out.index("| run ")]
    assert max(len(line) for line in of_runs.splitlines() if line.startswith("|")) <= 80

    assert sorted(path.name for path in (out / "units" / "seed0").iterdir()) == ["exported", "packed.safetensors"]
    assert sorted(path.name for path in (out / "pairs" / "seed0").iterdir()) == ["packed.safetensors"]
    exported = load_exported(str(out / "units" / "seed0" / "exported"))
    assert sum(p.numel() for p in exported.model.parameters()) == units["exported"]["parameters"]
    packed = load_packed(str(out / "units" / "seed0" / "packed.safetensors"))
    assert sum(int(t.count_nonzero()) for t in packed.values()) == units["trained"]["nonzero"]


def test_runs_side_by_side_with_their_quality(invoke: Invoke, runs: Any) -> None:
    called = invoke("savings", runs["units"], runs["dense"], "--batch", 2, "--length", 16, "--device", "cpu")
    (compared,) = (table for table in tables_of(called.out).values() if "units/seed0" in table)
    record = json.loads((runs["units"] / "result.json").read_text())
    units, dense = compared["units/seed0"], compared["dense/seed0"]
    (perplexity,) = (quality["metrics"]["perplexity"] for quality in record["quality"])
    assert float(units["test perplexity"]) == pytest.approx(perplexity, rel=1e-3)
    assert (units["form"], dense["form"]) == ("exported", "trained")
    cheaper = [name for name in units if name.endswith(("FLOP", "not zero", "packed"))]
    assert len(cheaper) == 3 and all(float(units[name]) < float(dense[name]) for name in cheaper)


def test_lines_for_programs(invoke: Invoke, runs: Any) -> None:
    words = ("--batch", 2, "--length", 16, "--device", "cpu", "--format", "csv")
    called = invoke("savings", runs["units"], runs["moods"], *words)
    lines = list(csv.DictReader(called.out.splitlines()))
    assert [(line["run"], line["form"]) for line in lines] == [
        (f"{run}/seed0", form) for run in ("units", "moods") for form in ("dense", "trained", "exported", "2:4")
    ]
    assert float(lines[0]["test perplexity"]) > 1 and lines[0]["test accuracy"] == ""
    assert 0 <= float(lines[4]["test accuracy"]) <= 1 and float(lines[1]["forward_median_ms"]) > 0
    assert int(lines[1]["nonzero"]) < int(lines[1]["parameters"]) and lines[3]["reason"]


def test_a_run_that_cannot_be_measured_does_not_hold_up_the_others(invoke: Invoke, runs: Any, tmp_path: Path) -> None:
    """One whose data set is gone; and what is wrong with a name is found before anything is measured."""
    gone = tmp_path / "gone"
    shutil.copytree(runs["dense"], gone)
    record = json.loads((gone / "result.json").read_text())
    record["config"]["data"]["name"], record["run_id"] = "nowhere", "gone/seed0"
    (gone / "result.json").write_text(json.dumps(record))
    file = tmp_path / "savings.json"
    words = ("--batch", 2, "--length", 16, "--device", "cpu", "--json", file)
    called = invoke("savings", gone, runs["units"], *words)
    assert called.status == 1
    assert "Not measured: " in called.out and "nowhere" in called.out and table_of(called.out, "units")
    first, second = json.loads(file.read_text())["runs"]
    assert "nowhere" in first["reason"] and (second["reason"], len(second["forms"])) == (None, 4)
    alone = invoke("savings", gone, *words)
    assert (alone.status, alone.out) == (2, "") and "nowhere" in alone.err
    refused = invoke("savings", runs["units"], tmp_path / "nothing", *words)
    assert (refused.status, refused.out) == (2, "") and len(refused.err.splitlines()) == 2


def test_models_that_were_kept_are_replaced_when_asked(invoke: Invoke, runs: Any, tmp_path: Path) -> None:
    out = tmp_path / "kept"
    words = (runs["units"], "--batch", 1, "--length", 8, "--device", "cpu", "--out", out)
    assert invoke("savings", *words).status == 0
    (out / "units" / "seed0" / "exported" / "stale").touch()
    again = invoke("savings", *words)
    assert (again.status, again.out) == (2, "")
    assert again.err.splitlines() == [
        f"error: {out / 'units' / 'seed0'} exists", "hint: give another --out, or --force: it is replaced"
    ]  # fmt: skip
    assert invoke("savings", *words, "--force").status == 0
    assert not (out / "units" / "seed0" / "exported" / "stale").exists()


def test_two_runs_of_one_name_are_not_kept_in_one_place(invoke: Invoke, runs: Any, tmp_path: Path) -> None:
    shutil.copytree(runs["units"], tmp_path / "copy")
    called = invoke("savings", runs["units"], tmp_path / "copy", "--out", tmp_path / "kept", "--device", "cpu")
    assert called.status == 2 and "two runs would be kept in" in called.err
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("name", ["moods", "lora"])
def test_classifiers_and_merged_adapters(invoke: Invoke, runs: Any, name: str) -> None:
    called = invoke("savings", runs[name], "--batch", 2, "--length", 16, "--device", "cpu")
    assert called.status == 0, called.err
    assert ("exported" in table_of(called.out, name)["ms"]) is (name == "moods")


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("light", (), "holds no weights"),
        (None, (), "holds no result.json"),
        ("units", ("--length", 65), "--length 65: "),
        ("units", ("--batch", 0), "--batch"),
        ("units", ("--json", "/nowhere/at/all.json"), "--json /nowhere/at/all.json"),
        ("units", ("--out", __file__), f"--out {__file__}: {__file__} is a file"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    invoke: Invoke, runs: Any, tmp_path: Path, name: str | None, words: Any, message: str
) -> None:
    called = invoke("savings", runs[name] if name else tmp_path, "--device", "cpu", *words)
    assert (called.status, called.out) == (2, "")
    assert message in called.err.splitlines()[0] and "model.run" not in called.err


@pytest.mark.parametrize("command", ["savings", "recall"])
def test_wrong_places_are_told_in_the_words_of_the_command(invoke: Invoke, runs: Any, command: str) -> None:
    """Nobody wrote `model.run`, and no error number helps; a folder that is not there is no model of the hub."""
    results = runs["units"].parent.parent
    for wrong, message, hint in (
        (results / "units" / "seed1", f"`{runs['units']}`" if command == "recall" else str(runs["units"]), ""),
        (results, "holds no result.json", "such as "),
        ("results/nothing", "results/nothing", ""),
    ):
        called = invoke(command, wrong, "--device", "cpu")
        assert (called.status, called.out) == (2, "")
        assert message in called.err and hint in called.err
        assert all(word not in called.err for word in ("model.run", "Errno", "hub", "revision"))


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
    assert (content["rows"], content["seed"]) == (8, 0) and len(called.err.splitlines()) == 3
    assert called.err.splitlines()[1] == f"2 of 3: {runs['dense']}" and list(content["models"])[1] == str(runs["dense"])
    found = [content["models"][str(runs[name])] for name in ("units", "dense", "smaller")]
    assert [[point["distance"] for point in model["recall"]] for model in found] == [[4, 16]] * 3
    assert [point["copies"] for point in found[0]["recall"]] == [8 * 3, 8 * 15]
    assert found[0]["tokens"] == found[1]["tokens"] < 151 < found[2]["tokens"] == 278, "half of 300 are pruned"
    (table,) = tables_of(called.out).values()
    assert table["by chance, of 280 tokens"] == {"distance": "", "accuracy": "0.36%", "loss": "5.635", "copies": ""}
    assert called.out.count(str(runs["dense"])) == 2 and "Drawn from 278 of 280 tokens" in called.out
    assert invoke("recall", runs["units"], runs["dense"], runs["smaller"], *words).out == called.out
    other = json.loads(file.read_text())["models"]
    invoke("recall", runs["dense"], *words[:-2], "--json", tmp_path / "alone")
    alone = json.loads((tmp_path / "alone").read_text())["models"][str(runs["dense"])]
    assert alone["tokens"] == 298 > other[str(runs["dense"])]["tokens"], "nothing is pruned of it"


def test_a_distance_that_is_too_long_for_a_model_is_left_out(invoke: Invoke, runs: Any, tmp_path: Path) -> None:
    """Half of the positions is not."""
    file = tmp_path / "recall.json"
    words = ("--distances", "8,32,33", "--rows", 2, "--device", "cpu", "--json", file)
    called = invoke("recall", runs["dense"], runs["dense"], *words)
    assert called.status == 0, called.err
    assert "distance 33 needs 66 positions, and there are 64." in called.out
    (model,) = json.loads(file.read_text())["models"].values()
    assert [point["distance"] for point in model["recall"]] == [8, 32] and list(model["left_out"]) == ["33"]


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("moods", (), "is a classifier"),
        ("light", (), "holds no weights"),
        ("dense", ("--distances", "4,x"), "--distances `4,x`"),
        ("dense", ("--distances", "1"), "--distances `1`"),
        ("dense", ("--distances", "33"), "distance 33 needs 66 positions, and there are 64"),
        ("units", ("--distances", "4", "--json", "/"), "--json / is a folder"),
    ],
)
def test_what_cannot_be_probed_is_refused(invoke: Invoke, runs: Any, name: str, words: Any, message: str) -> None:
    called = invoke("recall", runs[name], *words, "--device", "cpu")
    assert (called.status, called.out) == (2, "")
    assert message in called.err.splitlines()[0]


def test_an_unknown_model_is_refused(invoke: Invoke) -> None:
    called = invoke("recall", "minilm")
    assert (called.status, called.out) == (
        2,
        "",
    ) and "no model, and no folder of one, is called `minilm`; did you mean `minilm-l6`?" in called.err
