"""An experiment that trains in a fraction of a second, and what its runs leave."""

from __future__ import annotations

from pathlib import Path

from loras_bench.results.record import Record
from loras_bench.results.store import read_record

TINY = {
    "data": {"name": "python-topics", "sequence_length": 64},
    "model": {
        "init": "scratch",
        "architecture": {
            "model_type": "gpt2",
            "n_layer": 1,
            "n_embd": 32,
            "n_head": 2,
            "n_positions": 64,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        "tokenizer": {"vocabulary": 300},
    },
    "training": {"tokens": 2048, "tokens_per_step": 256, "learning_rate": 1e-3},
    "evaluation": {"batch_size": 128},
    "energy": {"steady_seconds": 0, "idle_seconds": 0},
    "save": False,
}
TINY_STEPS = 8
"""2,048 tokens in steps of 256."""


def records_of(results: Path) -> dict[str, Record]:
    """All records by the path of their run, hidden ones too."""
    return {str(path.parent.relative_to(results)): read_record(path) for path in sorted(results.rglob("result.json"))}


def only_record(results: Path) -> Record:
    (record,) = records_of(results).values()
    return record
