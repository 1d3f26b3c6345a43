"""benchmarks/peers.py: the arms that need no GPU really run; who competes, what is skipped, what the table says."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import peers
import pytest
import torch
from peer_arms import ARMS, SHAPES, TINY, Arm, Shape, choose_arms, choose_shapes
from peer_results import Results
from peer_steps import make_trainer
from peer_table import render
from torch import nn

from loras_bench.errors import UserError
from loras_bench.requests import Device

CANDIDATES = [name for name in ARMS if name.startswith("peer_lora/")]

TRIAL = ["--device", "cpu", "--shapes", "tiny", "--seconds", "0.05", "--repeats", "2"]


def entries_of(path: Path) -> dict[str, dict[str, Any]]:
    return {entry["arm"]: entry for entry in json.loads(path.read_text())["entries"]}


# --- real runs


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, fork_server: object) -> Path:
    """A results file of tiny arms that really ran."""
    out = tmp_path_factory.mktemp("peers") / "results" / "peers.json"
    arms = "full,lora,peer_lora/cudnn,peer_full/liger,ours_full,ours_lora,ours_lora_s"
    assert peers.main([*TRIAL, "--arms", arms, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("arm", ["full", "lora", "peer_lora/cudnn", "ours_full", "ours_lora", "ours_lora_s"])
def test_an_arm_runs_and_is_measured(compared: Path, arm: str) -> None:
    entry = entries_of(compared)[arm]
    assert entry["status"] == "completed", entry["reason"]
    assert len(entry["windows"]) == 2
    for window in entry["windows"]:
        assert window["seconds"] >= 0.05
        assert window["tokens"] % TINY.tokens_per_step == 0
        assert window["tokens_per_s"] == pytest.approx(window["tokens"] / window["seconds"])
    rates = sorted(window["tokens_per_s"] for window in entry["windows"])
    assert rates[0] <= entry["tokens_per_s"] <= rates[1]
    assert entry["shape"] == asdict(TINY) and entry["options"] == asdict(ARMS[arm])


def test_all_arms_start_from_the_same_weights_on_the_same_tokens(compared: Path) -> None:
    """The sums differ by the last position of a row, which transformers does not predict."""
    losses = {name: entry["first_loss"] for name, entry in entries_of(compared).items() if "first_loss" in entry}
    assert len(losses) == 6
    assert losses["full"] == pytest.approx(losses["lora"], rel=1e-3)  # adapters start at zero
    for name, loss in losses.items():
        assert 0 < entries_of(compared)[name]["last_loss"] < loss  # it learns its one batch
        assert loss == pytest.approx(math.log(TINY.vocabulary), rel=0.02)
        assert loss == pytest.approx(losses["full"], rel=0.01)


def test_ours_is_what_the_package_trains(compared: Path) -> None:
    entries = entries_of(compared)
    assert entries["ours_lora"]["facts"]["attention"]["pattern"] == {"kind": "dense"}
    pattern = entries["ours_lora_s"]["facts"]["attention"]["pattern"]
    assert (pattern["kind"], pattern["window"], pattern["global_tokens"]) == ("window", 512, 64)


def test_prompts_without_labels_and_sparse_lora_on_them(tmp_path: Path, fork_server: object) -> None:
    out = tmp_path / "peers.json"
    words = [*TRIAL, "--arms", "full,lora,ours_lora,ours_sparse_lora", "--out", str(out)]
    words[words.index("tiny")] = "tiny-prompts"
    assert peers.main(words) == 0
    entries = entries_of(out)
    assert {name: entry["reason"] for name, entry in entries.items()} == dict.fromkeys(entries)
    assert len(entries) == 4
    losses = [entry["first_loss"] for entry in entries.values()]
    assert losses == pytest.approx([losses[0]] * 4, rel=0.02)
    assert entries["ours_sparse_lora"]["first_loss"] != entries["ours_lora"]["first_loss"], "it leaves something out"
    assert "the last 16 of a row learned" in render(list(entries.values()))


def test_an_arm_that_cannot_run_is_a_row_with_its_reason(compared: Path) -> None:
    liger = entries_of(compared)["peer_full/liger"]
    assert liger["status"] == "failed" or liger["facts"]
    if liger["status"] == "failed":
        assert "liger_kernel" in liger["reason"]
        assert liger["reason"] in render([liger])


def test_the_file_names_each_environment_once(compared: Path) -> None:
    content = json.loads(compared.read_text())
    assert {entry["environment"] for entry in content["entries"]} == set(content["environments"])
    assert next(iter(content["environments"].values()))["packages"]["torch"]
    assert [path.name for path in compared.parent.iterdir()] == ["peers.json"]


def test_what_is_finished_is_skipped_until_it_is_forced(compared: Path, tmp_path: Path) -> None:
    out = tmp_path / "peers.json"
    out.write_text(compared.read_text())
    words = [*TRIAL, "--arms", "lora", "--out", str(out)]
    before = entries_of(out)
    assert peers.main(words) == 0
    assert entries_of(out) == before
    assert peers.main([*words, "--force"]) == 0
    after = entries_of(out)
    assert after.pop("lora")["at"] > before.pop("lora")["at"]
    assert after == before


def test_an_arm_that_takes_too_long_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fork_server: object
) -> None:
    monkeypatch.setattr(peers, "LIMIT_S", 0.01)
    out = tmp_path / "peers.json"
    assert peers.main([*TRIAL, "--arms", "full", "--out", str(out)]) == 0
    entry = entries_of(out)["full"]
    assert (entry["status"], entry["reason"]) == ("failed", "it took more than 0 s")


@pytest.mark.parametrize("lora", [False, True])
def test_compiled_layers_are_compiled_one_by_one_and_liger_gives_the_loss_alone(
    lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the compiler does to them is torch's; a stand-in for Liger's package shows what it is asked for."""
    asked: list[dict[str, bool]] = []
    compiled: list[tuple[str, dict[str, Any]]] = []
    liger = ModuleType("liger_kernel.transformers")
    liger.apply_liger_kernel_to_llama = lambda **options: asked.append(options)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compiled.append((type(self).__name__, how)))
    monkeypatch.setattr(torch, "compile", lambda *args, **how: pytest.fail("the whole model is compiled"))
    arm = ARMS[f"peer_{'lora' if lora else 'full'}/liger-loss+compile-layers"]
    trainer = make_trainer(arm, TINY, torch.device("cpu"))
    assert asked == [{"rope": False, "rms_norm": False, "swiglu": False}]
    assert compiled == [("LlamaDecoderLayer", {"mode": "default", "dynamic": False})] * TINY.layers
    assert float(trainer.step(0)) == pytest.approx(math.log(TINY.vocabulary), rel=0.02)
    make_trainer(ARMS["peer_full/liger"], TINY, torch.device("cpu"))
    assert asked[1] == {"rope": True, "rms_norm": True, "swiglu": True}


@pytest.mark.gpu
def test_all_arms_on_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "peers.json"
    arms = "full,lora,ours_full,ours_lora,ours_lora_s,peer_full/cudnn,peer_lora/compile"
    words = ["--device", "cuda", "--shapes", "tiny", "--seconds", "0.5", "--repeats", "1", "--arms", arms]
    assert peers.main([*words, "--out", str(out)]) == 0
    entries = entries_of(out)
    assert {name: entry["reason"] for name, entry in entries.items()} == dict.fromkeys(arms.split(","))
    for name, entry in entries.items():
        assert entry["peak_bytes"] > 0 and entry["energy_j_per_mtoken"] > 0, name
        assert entry["first_loss"] == pytest.approx(entries["full"]["first_loss"], rel=0.01)
    assert entries["ours_lora_s"]["facts"]["cuda_graph"] is True


# --- who competes


class Scripted(peers.Comparison):
    """Finds what it is told to find."""

    def __init__(self, results: Results, findings: dict[str, Any], **options: Any) -> None:
        defaults = {"seconds": 10.0, "repeats": 3, "stop_at": None, "force": False}
        super().__init__(None, Device("cuda", "a GPU", True), results, **(defaults | options))
        self.findings = findings
        self.measured: list[tuple[str, float, int]] = []

    def _measure(self, arm: Arm, shape: Shape, seconds: float, repeats: int) -> dict[str, Any]:
        self.measured.append((arm.name, seconds, repeats))
        found = self.findings[arm.name]
        if isinstance(found, str):
            return {"status": found, "reason": "because", "wall_s": 2.0, "environment": {}}
        return completed(found) | {"environment": {"python": "3"}}


def completed(joules: float, tokens_per_s: float = 1000.0) -> dict[str, Any]:
    return {
        "status": "completed",
        "reason": None,
        "energy_j_per_mtoken": joules,
        "tokens_per_s": tokens_per_s,
        "power_w": 600.0,
        "peak_bytes": 3 * 2**30,
        "wall_s": 35.0,
    }


FOUND: dict[str, Any] = {name: 4000.0 + index for index, name in enumerate(CANDIDATES)}
FOUND |= {CANDIDATES[2]: 3000.0, CANDIDATES[3]: "failed", CANDIDATES[4]: "out of memory", "lora": 5000.0}


@pytest.fixture
def results(tmp_path: Path) -> Callable[[], Results]:
    return lambda: Results(tmp_path / "peers.json")


def test_candidates_compete_and_the_best_is_measured_in_full(results: Callable[[], Results]) -> None:
    comparison = Scripted(results(), FOUND)
    assert comparison.run(TINY, choose_arms(["lora", "peer_lora"]))
    screened = [(name, peers.SCREEN_S, 1) for name in CANDIDATES]
    assert comparison.measured == [("lora", 10.0, 3), *screened, (CANDIDATES[2], 10.0, 3)]
    assert {entry["arm"]: entry["repeats"] for entry in results().entries}[CANDIDATES[2]] == 3


def test_the_next_call_tries_failures_again_and_nothing_else(results: Callable[[], Results]) -> None:
    Scripted(results(), FOUND).run(TINY, choose_arms(["peer_lora"]))
    again = Scripted(results(), FOUND | {CANDIDATES[3]: 2000.0})
    again.run(TINY, choose_arms(["peer_lora"]))
    assert again.measured == [(CANDIDATES[3], peers.SCREEN_S, 1), (CANDIDATES[3], 10.0, 3)]


def test_force_measures_each_arm_once_more(results: Callable[[], Results]) -> None:
    Scripted(results(), FOUND).run(TINY, choose_arms(["peer_lora"]))
    forced = Scripted(results(), FOUND, force=True)
    forced.run(TINY, choose_arms(["peer_lora"]))
    assert len(forced.measured) == len(CANDIDATES) + 1


def test_one_candidate_alone_needs_no_competition(results: Callable[[], Results]) -> None:
    comparison = Scripted(results(), FOUND)
    comparison.run(TINY, choose_arms([CANDIDATES[0]]))
    assert comparison.measured == [(CANDIDATES[0], 10.0, 3)]


def test_a_group_of_which_nothing_runs_is_left(results: Callable[[], Results]) -> None:
    comparison = Scripted(results(), dict.fromkeys(CANDIDATES, "failed"))
    assert comparison.run(TINY, choose_arms(["peer_lora"]))
    assert len(comparison.measured) == len(CANDIDATES)


def test_no_arm_is_started_that_would_not_end_in_time(
    results: Callable[[], Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers.time, "monotonic", lambda: 100.0)
    late = Scripted(results(), FOUND, stop_at=100.0 + peers.START_S + 29.0)
    assert not late.run(TINY, choose_arms(["lora"])) and late.measured == []
    early = Scripted(results(), FOUND, stop_at=100.0 + peers.START_S + 30.0)
    assert early.run(TINY, choose_arms(["lora"])) and len(early.measured) == 1
    # it is known now that it takes 5 s besides its windows
    longer = Scripted(results(), FOUND, seconds=12.0, stop_at=100.0 + 5.0 + 36.0)
    assert longer.run(TINY, choose_arms(["lora"])) and longer.measured == [("lora", 12.0, 3)]


def test_full_fine_tuning_of_the_largest_model_is_left_out(results: Callable[[], Results]) -> None:
    comparison = Scripted(results(), {"lora": 1.0, "ours_lora": 1.0})
    comparison.run(SHAPES["8b-2k"], choose_arms(["full", "ours_full", "lora", "ours_lora"]))
    assert [name for name, *_ in comparison.measured] == ["lora", "ours_lora"]


def test_without_a_counter_the_fastest_is_the_best(results: Callable[[], Results]) -> None:
    kept = results()
    for name, rate in (("full", 10.0), ("lora", 30.0), ("ours_full", 20.0)):
        entry = completed(0.0, rate) | {"energy_j_per_mtoken": None, "device": "a GPU", "environment": {}}
        kept.put(entry | {"arm": name, "shape": asdict(TINY)})
    assert kept.best("a GPU", "tiny", ["full", "lora", "ours_full"]) == "lora"
    assert kept.best("a GPU", "tiny", ["ours_lora"]) is None and kept.best("another", "tiny", ["lora"]) is None


# --- files, words and tables


def test_results_of_several_calls_are_merged(results: Callable[[], Results]) -> None:
    first, second = results(), results
    first.put(completed(1.0) | {"device": "a", "arm": "lora", "shape": asdict(TINY), "environment": {"call": 1}})
    for device in ("a", "b"):
        entry = completed(2.0) | {"device": device, "arm": "lora", "shape": asdict(TINY), "environment": {"call": 2}}
        second().put(entry)
    kept = results()
    assert [(entry["device"], entry["energy_j_per_mtoken"]) for entry in kept.entries] == [("a", 2.0), ("b", 2.0)]
    assert list(kept.environments.values()) == [{"call": 2}]  # what no entry names is dropped


@pytest.mark.parametrize("content", ["{", "[]", '{"schema_version": 99}'])
def test_another_file_is_not_overwritten(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "other.json"
    out.write_text(content)
    assert peers.main(["--table", "--out", str(out)]) == 2
    assert out.read_text() == content and "error: --out" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "word"), [("--shapes", "135m-8k,7b"), ("--arms", "lora,qlora")])
def test_unknown_words_are_refused(option: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.main([option, word, "--out", str(tmp_path / "peers.json")]) == 2
    assert f"{option}: there is no `{word.partition(',')[2]}`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--repeats", "0"], "--repeats 0: an arm needs at least one window"),
        (["--repeats", "-2"], "--repeats -2: an arm needs at least one window"),
        (["--seconds", "0"], "--seconds 0 is no length of a window"),
        (["--seconds", "-1.5"], "--seconds -1.5 is no length of a window"),
        (["--seconds", "nan"], "--seconds nan is no length of a window"),
        (["--seconds", "inf"], "--seconds inf is no length of a window"),
    ],
)
def test_windows_that_cannot_be_are_refused(
    words: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "peers.json"
    assert peers.main(["--shapes", "tiny", "--arms", "lora", "--device", "cpu", "--out", str(out), *words]) == 2
    assert f"error: {reason}\nhint: " in capsys.readouterr().err and not out.exists()


def test_a_group_stands_for_its_candidates() -> None:
    assert [arm.name for arm in choose_arms(["peer_lora", "lora", "lora"])] == [*CANDIDATES, "lora"]
    with pytest.raises(UserError, match="there is no `tiny2`"):
        choose_shapes(["tiny", "tiny2"])


@pytest.mark.parametrize("shape", SHAPES.values())
def test_shapes_have_the_sizes_of_their_models(shape: Shape) -> None:
    """Parameters by the formula of the architecture, against those of the published models."""
    head = shape.hidden // shape.heads
    attention = shape.hidden * head * (2 * shape.heads + 2 * shape.key_heads)
    layer = attention + 3 * shape.hidden * shape.inner + 2 * shape.hidden
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    total = shape.layers * layer + embeddings + shape.hidden
    published = {"SmolLM2-135M": 134_515_008, "Llama-3.2-1B": 1_235_814_400, "Llama-3-8B": 8_030_261_248}
    assert total == published[shape.model]
    assert shape.tokens_per_step == 32768 or shape.model != "SmolLM2-135M"


def test_the_table_compares_with_the_best_peer(results: Callable[[], Results]) -> None:
    findings = {"lora": 5000.0, "peer_lora/liger": 4000.0, "peer_lora/cudnn": "out of memory"}
    findings |= {"ours_lora": 3000.0, "ours_lora_s": 1000.0}
    Scripted(results(), findings).run(TINY, choose_arms([*findings]))
    lines = render(results().entries).splitlines()
    assert lines[0] == "### a toy, S = 64, 128 tokens a step, on a GPU"
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[4:]}
    assert list(rows) == ["lora", "**peer_lora/liger**", "peer_lora/cudnn", "ours_lora", "ours_lora_s"]
    assert rows["ours_lora_s"] == ["1,000", "1,000", "600.0", "3.000", "1.000", "0.250", "3 x 10 s"]
    assert rows["lora"][5] == "1.250" and rows["peer_lora/cudnn"][-1] == "out of memory: because"


def test_a_candidate_of_one_window_is_the_best_peer_only_where_no_other_was_measured_in_full() -> None:
    def entry(arm: str, joules: float, repeats: int) -> dict[str, Any]:
        facts = {"device": "a GPU", "arm": arm, "shape": asdict(TINY), "options": asdict(ARMS[arm])}
        return completed(joules) | facts | {"window_s": 3.0, "repeats": repeats}

    screened = entry("peer_lora/liger", 2000.0, 1)
    table = render([screened, entry("lora", 4000.0, 3), entry("ours_lora", 3000.0, 3)])
    assert "| **lora** |" in table and "| peer_lora/liger |" in table
    assert "| 1.000 | 0.750 | 3 x 3 s |" in table and "| 1.000 | 0.500 | screened, 1 x 3 s |" in table
    assert "| **peer_lora/liger** |" in render([screened, entry("ours_lora", 3000.0, 3)])


def test_without_results_there_is_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.main(["--table", "--out", str(tmp_path / "none.json")]) == 2
    assert "holds no results" in capsys.readouterr().err


def test_a_best_peer_on_another_gpu_is_marked() -> None:
    here, there = entry_of("ours_lora", "one"), entry_of("lora", "other")
    assert render([there, here]).count("on another GPU than the best peer") == 1
    assert "another GPU" not in render([entry_of("lora", "one"), here])


def entry_of(arm: str, gpu: str) -> dict[str, Any]:
    facts = {"device": "a GPU", "arm": arm, "shape": asdict(TINY), "options": asdict(ARMS[arm]), "gpu": gpu}
    return completed(2.0) | facts | {"window_s": 3.0, "repeats": 3, "environment": "e"}
