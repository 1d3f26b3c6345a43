"""Where a run happened: provenance for its record. Imports nothing heavy; asks torch only if the run has loaded it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from loras_bench import __version__

PACKAGES = (
    *("torch", "triton", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors"),
    *("liger-kernel", "gguf", "torchao", "bitsandbytes", "numpy", "scipy", "pydantic", "codecarbon", "nvidia-ml-py"),
    *("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"),
)
"""Distributions whose versions bear on a result."""

VARIABLES = (
    *("CUDA_", "CUBLAS_", "NCCL_", "NVIDIA_TF32", "TORCH", "PYTORCH_", "TRITON_", "OMP_", "MKL_NUM_THREADS"),
    *("TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE", "LORAS_BENCH_", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
)
"""Beginnings of names of environment variables that bear on a result; none of these holds a secret."""


def collect_environment() -> dict[str, Any]:
    """Hardware, software, code version and command line, JSON-able; what cannot be known is None or absent.

    The host's name and the user's are left out: records get published.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command_line": [Path(sys.argv[0]).name, *sys.argv[1:]],  # no paths of the user: records get published
        "packages": {"loras-bench": __version__} | package_versions(),
        "torch": _torch(),
        "gpus": gpus(),
        "cpu": _cpu(),
        "git": git_state(Path(__file__).resolve().parents[2]),
        "variables": relevant_variables(os.environ),
    }


def package_versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of those distributions that are installed; nothing is imported."""
    versions = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def relevant_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that change how fast or what a run computes."""
    return {name: environ[name] for name in sorted(environ) if name.startswith(VARIABLES)}


def gpus() -> list[dict[str, Any]]:
    """All NVIDIA GPUs that NVML shows, in its order; empty where there are none or no driver."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []

    def ask(name: str, *arguments: Any) -> Any:
        try:
            return getattr(pynvml, name)(*arguments)
        except pynvml.NVMLError:
            return None

    found = []
    for handle in handles:
        limit_mw = ask("nvmlDeviceGetEnforcedPowerLimit", handle)
        memory = ask("nvmlDeviceGetMemoryInfo", handle)
        found.append(
            {
                "name": ask("nvmlDeviceGetName", handle),
                "uuid": ask("nvmlDeviceGetUUID", handle),
                "vbios": ask("nvmlDeviceGetVbiosVersion", handle),
                "driver": ask("nvmlSystemGetDriverVersion"),
                "power_limit_w": None if limit_mw is None else limit_mw / 1e3,
                "memory_bytes": None if memory is None else memory.total,
            }
        )
    return found


def git_state(checkout: Path) -> dict[str, Any] | None:
    """Commit and whether files differ from it; None if `checkout` is no git checkout (an installed package)."""
    if not (checkout / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"sha": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (subprocess.SubprocessError, OSError):
        return None


def _torch() -> dict[str, Any] | None:
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    """The model name of the processor, or its architecture."""
    return str(_cpu()["model"] or platform.machine())


def _cpu() -> dict[str, Any]:
    model = platform.processor() or None
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    memory_bytes = None
    with suppress(ValueError, OSError, AttributeError):
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"model": model, "logical_cores": os.cpu_count(), "usable_cores": usable, "memory_bytes": memory_bytes}
