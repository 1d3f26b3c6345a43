"""Synthetic records: what a run of the main comparison leaves, without running it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loras_bench.results.record import Block, Flag, Flops, Quality, Record

RecordFactory = Callable[..., Record]


def synthetic_record(
    name: str = "full",
    seed: int = 0,
    *,
    joules: float | None = 13000.0,
    quality: float = 10.5,
    dense: float | None = None,
    tokens: int = 2_500_000,
    config_hash: str = "aaaaaaaaaa",
    flags: tuple[str, ...] = (),
    block: str | None = "block",
    operations: float = 4e15,
    config: dict[str, Any] | None = None,
    **changes: Any,
) -> Record:
    """A completed run on WikiText-2 with the given figures; `changes` set any other field."""
    task = changes.get("task", "language_modeling")
    metric = "perplexity" if task == "language_modeling" else "accuracy"
    readings = [Quality(split="test", attention="same", metrics={metric: quality, "loss": 2.35}, protocol={})]
    if dense is not None:
        readings.append(Quality(split="test", attention="dense", metrics={metric: dense}, protocol={}))
    values: dict[str, Any] = {
        "run_id": f"{name}/seed{seed}-{config_hash}",
        "name": name,
        "seed": seed,
        "status": "completed",
        "started_at": "2026-01-01T00:00:00Z",
        "finished_at": "2026-01-01T00:01:00Z",
        "block": Block(id=f"{block}{seed}", position=0, size=3) if block else None,
        "task": task,
        "dataset": "wikitext-2",
        "model": "SmolLM2-135M-Instruct (dequantized Q4_1)",
        "sequence_length": 8192,
        "methods": [] if name == "full" else ["lora"],
        "device": "NVIDIA H100 80GB HBM3",
        "config": {"training": {"tokens": tokens, "learning_rate": 1e-4}} if config is None else config,
        "kernel_version": "1",
        "environment": {},
        "total_parameters": 134_515_008,
        "trainable_parameters": 134_515_008 if name == "full" else 884_736,
        "train_energy_j": joules,
        "train_energy_source": None if joules is None else "counter",
        "energy_j_per_mtoken": None if joules is None else joules / 2.5,
        "energy_j_per_mtoken_phase": None if joules is None else "train",
        "run_energy_j": None if joules is None else joules * 1.4,
        "chain_energy_j": None if joules is None else joules * 1.4,
        "idle_before_w": 78.0,
        "idle_after_w": 81.5,
        "train_seconds": 25.0,
        "tokens_per_second": 100_000.0,
        "mean_power_w": None if joules is None else joules / 25,
        "peak_memory_bytes": 11 * 2**30,
        "flops": Flops(
            linear=operations * 0.75,
            attention_executed=operations * 0.25,
            attention_allowed=operations * 0.2,
            attention_dense=operations * 0.5,
        ),
        "quality": readings,
        "flags": [Flag(name=flag, reason=f"why {flag}") for flag in flags],
        "missing": {"train_energy_j": "no GPU energy counter on this machine"} if joules is None else {},
    }
    return Record(**(values | changes))


@pytest.fixture
def make_record() -> RecordFactory:
    return synthetic_record


def synthetic_comparison() -> list[Record]:
    """Three arms, three seeds, with noise that the seeds share."""
    records = []
    for seed, noise in enumerate((0.995, 1.0, 1.01)):
        records += [
            synthetic_record("full", seed, joules=13000 * noise, quality=10.53 * noise),
            synthetic_record("lora", seed, joules=13600 * noise + 40 * seed, quality=11.10 * noise + 0.01 * seed),
            synthetic_record(
                "lora_s", seed, joules=10200 * noise, quality=11.80 * noise, dense=11.28 * noise, operations=3e15
            ),
        ]
    return records


@pytest.fixture
def comparison() -> list[Record]:
    return synthetic_comparison()
