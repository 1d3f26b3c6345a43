"""`loras-bench sensitivity` end to end on a tiny Llama, what it writes, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from loras_bench.config_file import load_experiment
from loras_bench.methods.sparse_lora import SparseLoraConfig
from loras_bench.results.heatmap import write_heatmap
from loras_bench.results.sensitivity import Sensitivity, read_sensitivity
from loras_bench.runner import Workers
from loras_bench.sensitivity import dense_experiment, method_of, shortened
from loras_bench.training import plan_steps

ROOT = Path(__file__).parents[1]

LAYERS = 2
LLAMA = {
    "init": "scratch",
    "architecture": {
        "model_type": "llama",
        "num_hidden_layers": LAYERS,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 80,
        "initializer_range": 0.2,
    },
    "tokenizer": {"vocabulary": 300},
}
LORA = {"kind": "lora", "rank": 4, "alpha": 8, "targets": "attention"}
SPARSE = {"kind": "sparse_lora", "layers": {"0": {"feed_forward": 0.5}}, "rank": 4, "start": 0.25, "mean_token": False}
OPTIONS = ("--rows", 12, "--steps", 2, "--feed-forward", "0.5,0.9", "--attention", "0.5", "--device", "cpu")
CELLS = LAYERS * 3


@pytest.fixture(scope="module")
def sums(command_environment: dict[str, str]) -> Iterator[Path]:
    """Additions in words, where the fork server and this process find them."""
    folder = Path(command_environment["LORAS_BENCH_DATA"])
    (folder / "sums").mkdir(parents=True)
    for split, rows in (("train", 24), ("test", 4)):
        pairs = [(7 * row % 50, 11 * row % 30) for row in range(rows)]
        lines = [
            {"prompt": f"What is {a} and {b}, taken together as they are?", "response": f"it is {a + b}"}
            for a, b in pairs
        ]
        (folder / "sums" / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LORAS_BENCH_DATA", "XDG_CACHE_HOME"):
            patch.setenv(name, command_environment[name])
        yield folder


@pytest.fixture
def config(sums: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write an experiment; sections replace those of the default."""

    def write(**sections: Any) -> Path:
        content = {
            "name": "tiny",
            "data": {"name": "sums", "task": "instruction", "sequence_length": 128},
            "model": LLAMA,
            "methods": [LORA],
            "training": {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2},
            "energy": {"steady_seconds": 0, "idle_seconds": 0},
        } | sections
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    return write


def search_of(out: Path) -> Sensitivity:
    found = read_sensitivity(out / "tiny.sensitivity.json")
    assert found is not None
    return found


@pytest.fixture(scope="module")
def finished(sums: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished search, to be copied: the dense run needs a process of its own and seconds."""
    return tmp_path_factory.mktemp("finished") / "out"


@pytest.fixture
def out(
    finished: Path, tmp_path: Path, config: Callable[..., Path], invoke: Callable[..., Any], fork_server: Workers
) -> Path:
    """A copy of the finished search of the default experiment at --flops 0.7."""
    if not finished.exists():
        called = invoke("sensitivity", config(), "--flops", 0.7, "--out", finished, *OPTIONS)
        assert called.status == 0, called.err
        (finished / "stdout").write_text(called.out)
        (finished / "stderr").write_text(called.err)
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def test_from_a_config_to_a_config(out: Path, config: Callable[..., Path]) -> None:
    found, given = search_of(out), load_experiment(config())
    assert found.choice is not None
    written = load_experiment(out / "tiny.sensitivity.yaml")
    sparse = method_of(written, SparseLoraConfig)
    assert sparse is not None and sparse.tokens == "context"
    assert sparse.model_dump(exclude_none=True)["layers"] == found.choice.layers
    assert written.model_copy(update={"name": "tiny", "methods": written.methods[:-1]}) == given
    assert found.choice.flops_ratio <= 0.7 and found.choice.uniform.flops_ratio <= found.choice.flops_ratio
    assert len(found.measurements) == len(found.known()) == CELLS and found.rows == 12
    shown = (out / "stdout").read_text()
    assert f"{found.choice.predicted:.2g}" in shown and f"{found.choice.joint.increase:+.2g}" in shown
    assert "tiny.sensitivity.yaml" in (out / "stderr").read_text()
    assert {path.name for path in out.iterdir() if path.name.startswith("tiny")} == {
        f"tiny.sensitivity.{ending}" for ending in ("yaml", "json", "png", "svg")
    }
    assert "was found by `loras-bench sensitivity` at --flops 0.7" in (out / "tiny.sensitivity.yaml").read_text()


def test_the_choice_is_what_was_measured(out: Path) -> None:
    """The sum over its cells is the prediction; the feed-forward part of the last layer is free."""
    found = search_of(out)
    assert found.choice is not None and found.dense_loss is not None
    sparse = SparseLoraConfig.model_validate({"kind": "sparse_lora", "layers": found.choice.layers})
    cells = [
        (layer, part, share)
        for layer, shares in enumerate(sparse.schedule(LAYERS))
        for part, share in shares._asdict().items()
        if share
    ]
    assert found.choice.predicted == pytest.approx(sum(found.known()[cell].divergence for cell in cells))
    frontier = list(found.choice.frontier.values())
    assert frontier == sorted(frontier, reverse=True) and frontier[0] >= found.choice.predicted >= frontier[-1]
    last = [one for one in found.measurements if one.layer == LAYERS - 1 and one.part == "feed_forward"]
    assert [(one.divergence, one.increase, one.error) for one in last] == [(0, 0, 0)] * 2, (
        "no label reads what context tokens become there"
    )
    assert all(one.divergence > 0 and one.increase and one.error > 0 for one in found.measurements if one not in last)


def test_what_rounding_makes_counts_as_nothing(out: Path) -> None:
    """The last layer's feed-forward part is read by no label: what is measured there is the floor of all others."""
    found = search_of(out)
    assert found.floor == 0, "on a CPU"
    last = [one for one in found.measurements if (one.layer, one.part) == (LAYERS - 1, "feed_forward")]
    others = [one for one in found.measurements if one not in last]
    raised = [one.model_copy(update={"divergence": 1e-5 * (1 + number)}) for number, one in enumerate(last)]
    rough = found.model_copy(update={"measurements": [*raised, *others]})
    assert rough.floor == 1e-5 * len(last)
    assert [rough.above_floor(one) for one in raised] == [0.0] * len(last)
    assert [rough.above_floor(one) for one in others] == [max(0, one.divergence - rough.floor) for one in others]
    every = rough.model_copy(update={"sparse_lora": rough.sparse_lora | {"tokens": "all"}})
    assert every.floor == 0, "with `tokens: all` labels read it"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "sparse_lora" / "search").glob("*.json")))
def test_committed_searches_can_be_read(path: Path) -> None:
    found = read_sensitivity(path)
    assert found is not None and found.choice is not None and found.choice.joint.divergence < 0.01


def test_the_found_experiment_runs(out: Path, invoke: Callable[..., Any], tmp_path: Path) -> None:
    words = ("run", out / "tiny.sensitivity.yaml", "--results", tmp_path / "results", "--device", "cpu", "--dry-run")
    called = invoke(*words)
    assert called.status == 0 and "name: tiny_sparse" in called.out, called.err


def test_a_killed_search_goes_on(
    out: Path, config: Callable[..., Path], invoke: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is missing is measured, and the same comes out; the dense run is not made again."""
    whole = search_of(out)
    for ending in ("yaml", "png", "svg"):
        (out / f"tiny.sensitivity.{ending}").unlink()
    killed = whole.model_copy(update={"measurements": whole.measurements[:4], "choice": None})
    killed.write(out / "tiny.sensitivity.json")
    written: list[int] = []
    write = Sensitivity.write
    monkeypatch.setattr(
        Sensitivity, "write", lambda self, path: (written.append(len(self.measurements)), write(self, path))
    )
    called = invoke("sensitivity", config(), "--flops", 0.7, "--out", out, *OPTIONS)
    assert called.status == 0 and "4 measurements are there already" in called.err, called.err
    assert "completed" not in called.err, "the dense run was made again"
    assert written == [*range(5, CELLS + 1), CELLS]
    assert search_of(out).model_copy(update={"dense_run": whole.dense_run}) == whole


def test_another_budget_measures_nothing_anew(
    out: Path, config: Callable[..., Path], invoke: Callable[..., Any]
) -> None:
    before = search_of(out)
    words = ("sensitivity", config(), "--flops", 0.9, "--out", out, *OPTIONS)
    refused = invoke(*words)
    assert refused.status == 2 and "is there already" in refused.err and "--force" in refused.err
    called = invoke(*words, "--force")
    assert called.status == 0 and f"{CELLS} measurements are there already" in called.err, called.err
    after = search_of(out)
    assert after.measurements == before.measurements
    assert before.choice is not None and after.choice is not None
    assert after.choice.flops_budget == 0.9 and after.choice.predicted <= before.choice.predicted


def test_another_search_is_not_replaced(out: Path, config: Callable[..., Path], invoke: Callable[..., Any]) -> None:
    (out / "tiny.sensitivity.yaml").unlink()
    before = (out / "tiny.sensitivity.json").read_text()
    words = ("sensitivity", config(), "--out", out, *OPTIONS, "--rows", 8, "--flops", 0.7)
    called = invoke(*words)
    assert called.status == 2 and "holds another search" in called.err
    (out / "tiny.sensitivity.json").write_text("{")
    assert "cannot be read" in invoke(*words).err
    (out / "tiny.sensitivity.json").write_text(before)


def test_a_finished_run_takes_the_place_of_training(
    out: Path, config: Callable[..., Path], invoke: Callable[..., Any], tmp_path: Path
) -> None:
    """With the same adapters and rows, the same measurements; settings of sparse_lora are kept."""
    whole = search_of(out)
    words = [word for word in OPTIONS if word not in ("--steps", 2)]
    again = tmp_path / "again"
    called = invoke("sensitivity", config(), "--flops", 0.7, "--out", again, *words, "--run", whole.dense_run)
    assert called.status == 0 and not (again / ".dense").exists(), called.err
    assert search_of(again).measurements == whole.measurements
    sparse = config(methods=[LORA, SPARSE])
    other = tmp_path / "other"
    called = invoke("sensitivity", sparse, "--flops", 0.7, "--out", other, *words, "--run", whole.dense_run)
    assert called.status == 0, called.err
    assert search_of(other).measurements != whole.measurements, "other estimators and another criterion"
    written = load_experiment(other / "tiny.sensitivity.yaml")
    kept = method_of(written, SparseLoraConfig)
    assert written.name == "tiny" and kept is not None
    assert (kept.rank, kept.start, kept.mean_token) == (4, 0.25, False)


def test_a_run_of_something_else_is_refused(
    out: Path, config: Callable[..., Path], invoke: Callable[..., Any], tmp_path: Path
) -> None:
    run = search_of(out).dense_run
    words = [word for word in OPTIONS if word not in ("--steps", 2)]

    def refusal(path: Path, folder: object = run) -> str:
        called = invoke("sensitivity", path, "--out", tmp_path / "new", *words, "--run", folder)
        assert called.status == 2
        return str(called.err)

    assert "was trained by" in refusal(config(methods=[LORA | {"rank": 8}]))
    larger = LLAMA | {"architecture": LLAMA["architecture"] | {"intermediate_size": 96}}  # type: ignore[operator]
    assert "model.architecture" in refusal(config(model=larger))
    assert "no finished run" in refusal(config(), tmp_path)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--flops", 1.5), "--flops 1.5"),
        (("--flops", 0.05), "dense LoRA's FLOPs"),
        (("--attention", "0.5,1"), "--attention `0.5,1`"),
        (("--feed-forward", "much"), "--feed-forward `much`"),
        (("--steps", 3, "--run", "somewhere"), "--steps"),
        (("--out", "/proc/nowhere"), "--out /proc/nowhere"),
        (("methods.0.rank=two",), "methods.lora.rank"),
    ],
)
def test_what_cannot_be_done_is_refused_first(
    words: tuple[object, ...], named: str, config: Callable[..., Path], invoke: Callable[..., Any], tmp_path: Path
) -> None:
    called = invoke("sensitivity", config(), "--out", tmp_path / "out", "--device", "cpu", *words)
    assert called.status == 2 and named in called.err and not (tmp_path / "out" / ".dense").exists(), called.err


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"methods": []}, "add `lora`"),
        ({"methods": [LORA | {"variant": "dora"}]}, "DoRA"),
        ({"model": {"init": "scratch", "architecture": {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2,
          "n_positions": 128}, "tokenizer": {"vocabulary": 300}}}, "Llama"),
    ],
)  # fmt: skip
def test_what_sparse_lora_refuses_is_refused(
    sections: dict[str, Any], named: str, config: Callable[..., Path], invoke: Callable[..., Any], tmp_path: Path
) -> None:
    called = invoke("sensitivity", config(**sections), "--out", tmp_path / "out", "--device", "cpu")
    assert called.status == 2 and named in called.err and "Traceback" not in called.err


@pytest.mark.parametrize("steps", [1, 3, 7, 40])
def test_a_budget_of_steps(steps: int, config: Callable[..., Path]) -> None:
    from types import SimpleNamespace

    data: Any = SimpleNamespace(task="instruction", rows=lambda split: 24)
    dense = dense_experiment(load_experiment(config()))
    assert plan_steps(shortened(dense, steps, 24).training, data, 128, 0).steps == steps


def test_help_tells_the_defaults(invoke: Callable[..., Any]) -> None:
    text = " ".join(invoke("sensitivity", "--help").out.split())
    assert "0.5,0.75,0.9,0.99" in text and "0.25,0.5,0.75" in text and "0.6" in text


def test_the_plot_of_many_layers(out: Path, tmp_path: Path) -> None:
    """Chosen cells are marked once a layer and part, whatever the grid."""
    found = search_of(out)
    wide = found.model_copy(
        update={
            "layer_count": 30,
            "measurements": [
                one.model_copy(update={"layer": layer})
                for one in found.measurements
                if one.layer == 0
                for layer in range(30)
            ],
        }
    )
    png, svg = write_heatmap(wide, tmp_path / "wide")
    assert png.stat().st_size > 10_000 and "dense" in svg.read_text()


def test_an_interrupt_says_that_the_next_call_goes_on(
    out: Path, config: Callable[..., Path], invoke: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After two measurements; the others are made by the next call."""
    whole = search_of(out)
    fresh = whole.model_copy(update={"measurements": [], "choice": None})
    (out / "tiny.sensitivity.yaml").unlink()
    fresh.write(out / "tiny.sensitivity.json")
    write = Sensitivity.write

    def interrupted(self: Sensitivity, path: Path) -> None:
        write(self, path)
        if len(self.measurements) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Sensitivity, "write", interrupted)
    words = ("sensitivity", config(), "--flops", 0.7, "--out", out, *OPTIONS)
    called = invoke(*words)
    assert called.status == 130 and "interrupted; the next call goes on" in called.err, called.err
    assert search_of(out).measurements == whole.measurements[:2]
    assert not (out / "tiny.sensitivity.yaml").exists()
