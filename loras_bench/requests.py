"""What the parent process tells a worker: plain values that travel between processes, and nothing that needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loras_bench.config import Experiment
from loras_bench.results.record import Block


@dataclass(frozen=True)
class Device:
    """What the runs will run on, as a probe process saw it."""

    kind: str
    """`cuda` or `cpu`."""
    name: str
    triton: bool
    """Whether triton is installed, which our fused kernels need."""
    processes: int = 1
    """Of the job, each with a device of its own, all on this machine."""


@dataclass(frozen=True)
class RunRequest:
    """One run."""

    experiment: Experiment
    """Resolved for the device."""
    seed: int
    run_id: str
    folder: Path
    device: Device
    block: Block | None = None
    pretrained: Path | None = None
    """Folder of the finished run that `pretrain:` asked for."""
    idle_before: bool = False
    idle_after: bool = False
    cool_to_c: float | None = None
    """Wait, for 30 s at most, until the GPU is no warmer than this before warming up."""
    fresh: bool = False
    """Ignore the checkpoint of an earlier, killed run."""
    process: int = 0
    """Rank in a job of several processes; only rank 0 measures and writes."""

    @property
    def processes(self) -> int:
        """Processes of the job."""
        return self.device.processes

    @property
    def main_process(self) -> bool:
        """Whether this process measures and writes."""
        return self.process == 0

    @property
    def gpus(self) -> list[int]:
        """The GPUs that this process measures."""
        return list(range(self.processes)) if self.device.kind == "cuda" and self.main_process else []
