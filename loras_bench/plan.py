"""Which runs a command asks for, in which order, and where each stands: reads configs and records, imports no torch."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loras_bench.catalog import DATASETS
from loras_bench.config import EnergyConfig, EvaluationConfig, Experiment, canonical_hash
from loras_bench.errors import ConfigError
from loras_bench.requests import Device, RunRequest
from loras_bench.results.store import (
    RECORD_FILE,
    RunLockedError,
    is_finished,
    lock_run,
    read_record,
    run_folder,
)

KERNEL_VERSION = "2"
"""Raised when a change of our kernels or of the measuring makes older results incomparable."""
CHECKPOINT_FILE = "checkpoint.json"


@dataclass(frozen=True)
class PlannedRun:
    """One experiment with one seed."""

    experiment: Experiment
    seed: int
    run_id: str
    folder: Path
    finished: bool
    """A completed record of this config, device model and kernel version is there already."""
    resumable: bool
    """A checkpoint of a killed run is there."""


def resolve(experiment: Experiment, device: Device) -> Experiment:
    """Replace what is left to the device by what will run on it; the hash of a run is taken after it.

    Raises:
        ConfigError: Something was asked for that cannot run there, or not together.
    """
    data, model, training = experiment.data, experiment.model, experiment.training
    cuda = device.kind == "cuda"
    fuses, plain = cuda and device.triton, not training.compile
    loss, implementation, packing = training.loss, model.implementation, data.packing
    if loss == "auto":
        loss = "fused" if fuses and plain else "torch"
    if implementation == "auto":
        implementation = "fused" if fuses and plain else "transformers"
    if training.batch_size is None:  # language modelling
        packing = None if packing == "auto" else packing
    elif packing in ("auto", None):
        # other kernels of dense layers would need the mask of the whole packed row
        packing = "packed" if fuses and plain and model.dense_attention == "auto" else "padded"
    captured = training.cuda_graph
    if captured is None:
        captured = cuda and device.processes == 1 and plain
    resolved = experiment.model_copy(
        update={
            "data": data.model_copy(update={"packing": packing}),
            "model": model.model_copy(update={"implementation": implementation}),
            "training": training.model_copy(update={"loss": loss, "cuda_graph": captured}),
        }
    )
    _check(resolved, device)
    return resolved


def _check(experiment: Experiment, device: Device) -> None:
    """Refuse what this device, or another choice of the same resolved experiment, rules out."""
    training, packing = experiment.training, experiment.data.packing
    on_cpu = "" if device.kind == "cuda" else "it runs on CUDA only"
    bare = "" if device.triton else "triton is not installed"
    compiled = "it does not go with training.compile" if training.compile else ""
    shared = "" if device.processes == 1 else "a captured step cannot wait for other processes"
    compares = (spec := DATASETS.get(experiment.data.name)) is not None and spec.final_answer is not None
    numberless = "" if compares else f"the responses of `{experiment.data.name}` have no final number to compare"
    choices = (
        ("training.loss `fused`", training.loss == "fused", on_cpu or bare or compiled),
        ("model.implementation `fused`", experiment.model.implementation == "fused", on_cpu or bare or compiled),
        ("training.cuda_graph", training.cuda_graph, on_cpu or compiled or shared),
        (
            f"data.packing `{packing}`",
            packing and training.batch_size is None,
            "it is for classification and instructions",
        ),
        ("evaluation.generation", experiment.evaluation.generation, numberless),
    )
    for choice, chosen, reason in choices:
        if chosen and reason:
            raise ConfigError(f"{experiment.name}: {choice}: {reason}", "leave the key out: the default fits")


def run_id(experiment: Experiment, seed: int, device: Device) -> str:
    """`<name>/seed<k>-<hash>`: the hash covers the resolved experiment and the device model.

    What is left at `auto` (attention kernels) follows from the device, so its name stands for what they resolve to, and
    runs on two devices never share a folder.
    """
    content = {"experiment": experiment.model_dump(mode="json", exclude={"name"}), "device": device.name}
    return f"{experiment.name}/seed{seed}-{canonical_hash(content)}"


def plan_run(experiment: Experiment, seed: int, results: Path, device: Device) -> PlannedRun:
    """Look up where one run stands."""
    identity = run_id(experiment, seed, device)
    folder = run_folder(results, identity)
    finished = is_done(folder, device)
    return PlannedRun(
        experiment, seed, identity, folder, finished, not finished and (folder / CHECKPOINT_FILE).exists()
    )


def is_done(folder: Path, device: Device) -> bool:
    """Whether a run need not be made again; a record that cannot be read counts as none."""
    try:
        return is_finished(read_record(folder / RECORD_FILE), device.name, KERNEL_VERSION)
    except (OSError, ValueError):
        return False


@contextmanager
def claim_run(request: RunRequest) -> Iterator[None]:
    """Hold a run's folder against other processes while it is worked on.

    Raises:
        RunLockedError: Another process holds it, or has finished the run since it was planned.
    """
    with lock_run(request.folder):
        if not request.fresh and is_done(request.folder, request.device):
            raise RunLockedError("another process has finished it meanwhile")
        yield


def plan_blocks(
    experiments: Sequence[Experiment], seeds: Sequence[int], results: Path, device: Device
) -> list[list[PlannedRun]]:
    """One block a seed: all arms, in an order shuffled by the seed, so that no arm always runs on the warmer GPU.

    Raises:
        ConfigError: Two arms are the same experiment.
    """
    resolved = [resolve(experiment, device) for experiment in experiments]
    blocks = []
    for seed in seeds:
        runs = [plan_run(experiment, seed, results, device) for experiment in resolved]
        identities = [run.run_id for run in runs]
        twice = next((identity for identity in identities if identities.count(identity) > 1), None)
        if twice:
            raise ConfigError(f"the same experiment is given twice: {twice}", "name each file once")
        runs.sort(key=lambda run: run.run_id)  # the order of the files on the command line does not matter
        random.Random(f"{seed} {sorted(identities)}").shuffle(runs)
        blocks.append(runs)
    return blocks


def pretraining_of(experiment: Experiment, results: Path, device: Device) -> PlannedRun | None:
    """The run that makes the weights a model from scratch starts from; shared by all arms and seeds that ask for the
    same.

    It lies in a hidden folder of the results, because it is no arm of a comparison.
    """
    if experiment.pretrain is None:
        return None
    first = Experiment(
        name="pretraining",
        data=experiment.pretrain.data,
        model=experiment.model,
        training=experiment.pretrain.training,
        evaluation=EvaluationConfig(splits=()),
        energy=EnergyConfig(steady_seconds=0, idle_seconds=0),
    )
    return plan_run(resolve(first, device), 0, results / ".pretrained", device)


def occasion_of(runs: Sequence[PlannedRun]) -> str:
    """Names a block as it starts: the same arms and seed on another day are another block."""
    return f"seed{runs[0].seed}-{canonical_hash([sorted(run.run_id for run in runs), time.time_ns()])}"
