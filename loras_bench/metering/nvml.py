"""GPU joules, power and state through NVML (`nvidia-ml-py`), for the GPU that CUDA means by an ordinal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from loras_bench.metering.clock import Clock
from loras_bench.metering.sources import DeviceState, PowerKind, Reading, SourceError, SourceKind

T = TypeVar("T")

CLOCK_EVENT_REASONS: Mapping[int, str] = {
    0x01: "gpu_idle",
    0x02: "applications_clocks_setting",
    0x04: "sw_power_cap",
    0x08: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}
"""Bits of `nvmlDeviceGetCurrentClocksEventReasons` (nvml.h)."""


def visible_devices(value: str | None) -> list[int] | list[str] | None:
    """Parse `CUDA_VISIBLE_DEVICES` as the CUDA driver does.

    Returns:
        NVML indices, or UUIDs (`GPU-...`, possibly shortened, or `MIG-...`), in the order of CUDA ordinals; None if
        the variable is not set. A bad or negative entry ends the list, a repeated one empties it.
    """
    if value is None:
        return None
    tokens = [token.strip() for token in value.split(",")]
    for prefix in ("GPU-", "MIG-"):
        if tokens[0].startswith(prefix):
            uuids: list[str] = []
            for token in tokens:
                if not token.startswith(prefix):
                    break
                uuids.append(token)
            return uuids if len(set(uuids)) == len(uuids) else []
    indices: list[int] = []
    for token in tokens:
        if not token.isdigit():
            break
        indices.append(int(token))
    return indices if len(set(indices)) == len(indices) else []


def cuda_device_id(ordinal: int, environ: Mapping[str, str] = os.environ) -> int | str:
    """What NVML calls CUDA device `ordinal`: an index or a UUID.

    Indices alone are in doubt, because CUDA orders unlike devices by speed and NVML by PCI bus: once CUDA is up, it is
    asked for the UUID.

    Raises:
        SourceError: `CUDA_VISIBLE_DEVICES` does not show that many devices.
    """
    visible = visible_devices(environ.get("CUDA_VISIBLE_DEVICES"))
    if visible is not None and ordinal >= len(visible):
        raise SourceError(f"CUDA_VISIBLE_DEVICES={environ['CUDA_VISIBLE_DEVICES']!r} shows no device {ordinal}")
    if visible is not None and isinstance(visible[ordinal], str):
        return visible[ordinal]
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return f"GPU-{torch.cuda.get_device_properties(ordinal).uuid}"
    return ordinal if visible is None else visible[ordinal]


def parent_pid(pid: int) -> int | None:
    """Parent of a process, or None for one that is not visible from here."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is the command in parentheses and may itself hold blanks and parentheses.
    return int(stat.rpartition(")")[2].split()[1])


def foreign_pids(
    running: Collection[int], own: int, launched: bool, parent: Callable[[int], int | None] = parent_pid
) -> tuple[int, ...]:
    """Those of the `running` processes that are not of this run: not ours, our parent, or a descendant.

    Args:
        running: Process ids that NVML lists on the GPU.
        own: Our process id.
        launched: Whether our parent is a launcher of several ranks; its other descendants are then ours too.
        parent: Gives the parent of a process, None for one that is not visible from here.
    """
    our_parent = parent(own)
    root = our_parent if launched and our_parent is not None else own

    def is_ours(pid: int) -> bool:
        ancestor: int | None = pid
        while ancestor is not None and ancestor > 1:
            if ancestor == root:
                return True
            ancestor = parent(ancestor)
        return pid == our_parent

    others = [pid for pid in running if not is_ours(pid)]
    visible = [pid for pid in others if parent(pid) is not None]
    invisible = [pid for pid in others if parent(pid) is None]
    if own not in running:
        # In a container NVML may list the host's process ids: one of those that we cannot see can be ourselves.
        invisible = invisible[1:]
    return tuple(sorted(visible + invisible))


class NvmlSource:
    """One NVIDIA GPU: the energy counter, instant power, and the state of the board.

    Args:
        device: CUDA ordinal (after `CUDA_VISIBLE_DEVICES`), or UUID. A MIG instance is measured on its parent, whose
            counter covers the whole GPU (flag `mig`).
        clock: Time stamps of the readings.

    Raises:
        SourceError: NVML, the driver or the device is missing.
    """

    kind: SourceKind = "gpu"

    def __init__(self, device: int | str, clock: Clock) -> None:
        try:
            import pynvml
        except ImportError as error:
            raise SourceError("the package nvidia-ml-py is not installed") from error
        self._nvml: ModuleType = pynvml
        self._clock = clock
        self.flags: dict[str, str] = {}
        try:
            pynvml.nvmlInit()
            self._handle = self._open(cuda_device_id(device) if isinstance(device, int) else device)
            self.name: str = pynvml.nvmlDeviceGetUUID(self._handle)
        except pynvml.NVMLError as error:
            raise SourceError(f"NVML: {error}") from error
        self._has_counter = self._probe_counter()
        self.power_kind: PowerKind | None = self._probe_power()
        if self._ask(pynvml.nvmlDeviceGetVirtualizationMode) == pynvml.NVML_GPU_VIRTUALIZATION_MODE_VGPU:
            self.flags["vgpu"] = "a virtual GPU: its readings may cover the whole board"

    def _open(self, device: int | str) -> Any:
        nvml = self._nvml
        if isinstance(device, int):
            handle = nvml.nvmlDeviceGetHandleByIndex(device)
        else:
            uuids = [
                nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(i)) for i in range(nvml.nvmlDeviceGetCount())
            ]
            # A shortened UUID is legal in CUDA_VISIBLE_DEVICES; NVML wants it whole.
            matches = [uuid for uuid in uuids if uuid.startswith(device)]
            handle = nvml.nvmlDeviceGetHandleByUUID(matches[0] if len(matches) == 1 else device)
        if self._ask(lambda h: nvml.nvmlDeviceIsMigDeviceHandle(h).value, handle):
            self.flags["mig"] = f"{device} is a MIG instance: the energy counter covers its whole GPU"
            return nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
        mig_mode = self._ask(nvml.nvmlDeviceGetMigMode, handle)
        if mig_mode is not None and mig_mode[0] == nvml.NVML_DEVICE_MIG_ENABLE:
            self.flags["mig"] = "MIG is enabled: the energy counter covers all instances of the GPU"
        return handle

    def _ask(self, function: Callable[..., T], *arguments: Any) -> T | None:
        """Call an NVML getter that boards are free not to support; default argument: our handle."""
        try:
            return function(*(arguments or (self._handle,)))
        except self._nvml.NVMLError:
            return None

    def _probe_counter(self) -> bool:
        try:
            self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except self._nvml.NVMLError as error:
            self.flags["counter_missing"] = f"NVML energy counter of {self.name}: {error}"
            return False
        return True

    def _probe_power(self) -> PowerKind | None:
        if self._instant_power_w() is not None:
            return "instant"
        return "average" if self._ask(self._nvml.nvmlDeviceGetPowerUsage) is not None else None

    def _instant_power_w(self) -> float | None:
        nvml = self._nvml
        fields = self._ask(nvml.nvmlDeviceGetFieldValues, self._handle, [nvml.NVML_FI_DEV_POWER_INSTANT])
        if fields is None or fields[0].nvmlReturn != nvml.NVML_SUCCESS:
            return None
        return float(fields[0].value.uiVal / 1e3)

    def _power_w(self) -> float | None:
        if self.power_kind == "instant":
            return self._instant_power_w()
        milliwatts = self._ask(self._nvml.nvmlDeviceGetPowerUsage) if self.power_kind == "average" else None
        return None if milliwatts is None else milliwatts / 1e3

    def read(self, with_power: bool = True) -> Reading:
        """Counter (joules since the driver was loaded) and power; see `EnergySource.read`."""
        energy_j = None
        if self._has_counter:
            try:
                energy_j = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3
            except self._nvml.NVMLError as error:
                raise SourceError(f"NVML energy counter of {self.name}: {error}") from error
        t_s = self._clock.now()
        return Reading(t_s, energy_j, self._power_w() if with_power else None)

    def state(self) -> DeviceState:
        """Temperature, clocks, power limit, utilisation and neighbours, each None where the board does not say."""
        nvml = self._nvml
        limit_mw = self._ask(nvml.nvmlDeviceGetEnforcedPowerLimit)
        reasons = self._ask(nvml.nvmlDeviceGetCurrentClocksEventReasons) or 0
        utilization = self._ask(nvml.nvmlDeviceGetUtilizationRates)
        processes = self._ask(nvml.nvmlDeviceGetComputeRunningProcesses) or []
        return DeviceState(
            t_s=self._clock.now(),
            temperature_c=self._ask(nvml.nvmlDeviceGetTemperature, self._handle, nvml.NVML_TEMPERATURE_GPU),
            sm_clock_mhz=self._ask(nvml.nvmlDeviceGetClockInfo, self._handle, nvml.NVML_CLOCK_SM),
            memory_clock_mhz=self._ask(nvml.nvmlDeviceGetClockInfo, self._handle, nvml.NVML_CLOCK_MEM),
            power_limit_w=None if limit_mw is None else limit_mw / 1e3,
            utilization_percent=None if utilization is None else utilization.gpu,
            clock_event_reasons=frozenset(name for bit, name in CLOCK_EVENT_REASONS.items() if reasons & bit),
            foreign_pids=foreign_pids(
                {process.pid for process in processes},
                os.getpid(),
                launched=int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1,
            ),
        )
