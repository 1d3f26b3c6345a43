"""A job of two processes on gloo: the same training as one process, one record, and errors that end on all ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from training_fixtures import CPU, GPT2, LORA, MOODS, WINDOW, experiment, request

from loras_bench.config import Experiment
from loras_bench.distributed import agreed
from loras_bench.errors import UserError
from loras_bench.experiment import Run
from loras_bench.metering.environment import cpu_name
from loras_bench.plan import resolve, run_id
from loras_bench.requests import Device

pytestmark = pytest.mark.usefixtures("places")

TWO = Device("cpu", f"2 x {cpu_name()}", triton=False, processes=2)
PRUNE = {"kind": "prune", "sparsity": 0.5, "every": 1, "scope": ["feed_forward"]}
ARMS: dict[str, dict[str, Any]] = {
    "full": {"training": {"micro_batch_size": 2}, "evaluation": {"every_tokens": 256}},
    "lora_s": {"model": GPT2 | {"dtype": "bfloat16"}, "methods": [LORA, WINDOW], "training": {"micro_batch_size": 2}},
    "moods": {"data": MOODS, "methods": [LORA], "training": {"gradient_checkpointing": True}},
    "packed": {"data": MOODS | {"packing": "packed"}, "methods": [LORA], "training": {"micro_batch_size": 4}},
    "fpp": {"methods": [PRUNE]},
    "movement": {"methods": [PRUNE | {"score": "movement", "start": 0.4, "end": 0.4}]},
    "fold": {"data": MOODS, "methods": [{"kind": "fold", "calibration_tokens": 64}]},
    "diverges": {"training": {"learning_rate": 1e30, "tokens": 4096}},
}


def launch(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """What `accelerate launch --multi_gpu` does on GPUs; on a CPU it would start one process only."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "loras_bench", "run", *words, "--device", "cpu", "--results", str(folder)],
        capture_output=True, text=True, timeout=120, env=environment, cwd=Path(__file__).parents[1],
    )  # fmt: skip


def arm(name: str) -> Experiment:
    return resolve(experiment(name, **ARMS[name]), CPU)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """All arms in one job; one of them fails on both ranks, and the others are run all the same."""
    folder = tmp_path_factory.mktemp("job")
    files = []
    for name in ARMS:
        files.append(str(folder / f"{name}.yaml"))
        Path(files[-1]).write_text(yaml.safe_dump(arm(name).model_dump(mode="json", exclude_none=True)))
    return folder, launch(files, folder / "results")


def record(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results" / run_id(arm(name), 0, TWO) / "result.json").read_text())
    return content


@pytest.mark.parametrize("name", ["full", "lora_s", "moods", "packed", "fpp", "movement", "fold"])
def test_two_processes_train_as_one(name: str, job: Any, tmp_path: Path) -> None:
    """Same rows, same losses: gradients are averaged over the processes, with and without copies of the masters."""
    alone = Run(request(arm(name), tmp_path), lambda event: None).execute()
    together = record(job[0], name)
    assert together["status"] == alone.status == "completed", together["reason"]
    tolerance = 2e-3 if name == "lora_s" else 1e-5  # bfloat16 gradients are rounded before they are averaged
    losses = [point["loss"] for point in together["loss_curve"]]
    assert losses == pytest.approx([point.loss for point in alone.loss_curve], rel=tolerance)
    assert len(losses) >= 3
    assert together["quality"][0]["metrics"] == pytest.approx(alone.quality[0].metrics, rel=max(tolerance, 1e-4) * 5)
    seen = [point["loss"] for point in together["validation_curve"]]
    assert seen == pytest.approx([point.loss for point in alone.validation_curve], rel=1e-5)
    assert (name == "full") == bool(seen)
    fill = () if name == "packed" else ("flops", "padded_tokens")  # each process fills up a row of its own
    for field in (*fill, "trained_tokens", "steps", "trainable_parameters"):
        expected = getattr(alone, field)
        assert together[field] == (expected if isinstance(expected, int) else expected.model_dump()), field


def test_only_rank_0_prints_and_the_device_says_how_many(job: Any) -> None:
    folder, finished = job
    assert finished.stderr.count("completed") == 7, finished.stderr
    assert record(folder, "full")["device"].startswith("2 x "), "never in one panel with a single device"
    run = folder / "results" / run_id(arm("full"), 0, TWO)
    assert {path.name for path in run.iterdir()} == {".lock", "model", "tokenizer", "power.npz", "result.json"}


def test_a_loss_that_is_no_number_ends_the_run_on_all_ranks_and_not_the_job(job: Any) -> None:
    folder, finished = job
    failed = record(folder, "diverges")
    assert failed["status"] == "failed" and "learning_rate" in failed["reason"]
    assert finished.returncode == 1


def test_an_error_of_the_users_is_said_once(tmp_path: Path) -> None:
    wrong = launch(
        [str(Path(__file__).parents[1] / "configs/quickstart/full.yaml"), "training.leraning_rate=1"], tmp_path
    )
    assert wrong.returncode != 0 and "exitcode  : 2" in wrong.stderr
    assert wrong.stderr.count("unknown key `leraning_rate`") == 1


def test_alone_everything_is_agreed() -> None:
    value = object()
    assert agreed(value) is value


@pytest.mark.parametrize(
    ("variables", "fault"),
    [
        ({"LOCAL_WORLD_SIZE": "2"}, "several machines"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP is not supported"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DEEPSPEED is not supported"),
    ],
)
def test_jobs_that_cannot_be_measured_are_refused(
    variables: dict[str, str], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loras_bench.ranks import Ranks

    for name, value in ({"RANK": "0", "WORLD_SIZE": "4"} | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=fault):
        Ranks("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_train_as_one(tmp_path: Path) -> None:
    file = tmp_path / "full.yaml"
    file.write_text(yaml.safe_dump(arm("full").model_dump(mode="json", exclude_none=True)))
    curves = []
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        results = tmp_path / str(processes)
        finished = subprocess.run(
            [*command, "-m", "loras_bench", "run", str(file), "--device", "cuda", "--results", str(results)],
            capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1],
        )  # fmt: skip
        assert finished.returncode == 0, finished.stderr
        (found,) = results.rglob("result.json")
        curves.append([point["loss"] for point in json.loads(found.read_text())["loss_curve"]])
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
