"""Sources: which GPU CUDA means, whose processes run on it, RAPL's tree, and what is missing."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from scripted_source import FakeClock, ScriptedGpu

from loras_bench.metering.clock import SystemClock
from loras_bench.metering.nvml import NvmlSource, cuda_device_id, foreign_pids, visible_devices
from loras_bench.metering.rapl import RaplSource
from loras_bench.metering.sources import NullSource, SourceError, counter_period_s, open_sources


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("", []),
        ("2,0", [2, 0]),
        (" 1 , 3", [1, 3]),
        ("1,-1,2", [1]),
        ("0,0", []),
        ("GPU-aa,GPU-bb", ["GPU-aa", "GPU-bb"]),
        ("GPU-aa,1", ["GPU-aa"]),
        ("MIG-c0ffee,MIG-GPU-aa/1/0", ["MIG-c0ffee", "MIG-GPU-aa/1/0"]),
    ],
)
def test_visible_devices_are_parsed_as_cuda_does(value, expected):
    assert visible_devices(value) == expected


def test_an_ordinal_goes_through_cuda_visible_devices():
    assert cuda_device_id(1, {}) == 1
    assert cuda_device_id(1, {"CUDA_VISIBLE_DEVICES": "3,5"}) == 5
    assert cuda_device_id(0, {"CUDA_VISIBLE_DEVICES": "MIG-c0ffee"}) == "MIG-c0ffee"
    with pytest.raises(SourceError, match="shows no device 1"):
        cuda_device_id(1, {"CUDA_VISIBLE_DEVICES": "3"})


PARENTS = {100: 50, 101: 100, 102: 101, 50: 1, 60: 50, 61: 60, 900: 1}
"""50 started 100 (ourselves) and 60; 101 and 102 are our descendants, 61 is that of 60; 900 is a stranger."""


@pytest.mark.parametrize(
    ("running", "launched", "expected"),
    [
        ([100], False, ()),
        ([100, 101, 102, 50], False, ()),
        ([100, 900], False, (900,)),
        ([100, 60, 61], False, (60, 61)),
        ([100, 60, 61, 900], True, (900,)),
        ([], False, ()),
        ([33333], False, ()),  # in a container: ourselves, by the host's number
        ([33333, 44444], False, (44444,)),
        ([100, 44444], False, (44444,)),
    ],
)
def test_foreign_processes(running, launched, expected):
    assert foreign_pids(running, 100, launched, PARENTS.get) == expected


class FakeNvmlError(Exception):
    pass


class FakeNvml:
    """As much of pynvml as the source calls, for a machine with two GPUs; functions in `broken` raise."""

    NVMLError = FakeNvmlError
    NVML_SUCCESS, NVML_TEMPERATURE_GPU, NVML_CLOCK_SM, NVML_CLOCK_MEM = 0, 0, 1, 2
    NVML_FI_DEV_POWER_INSTANT, NVML_DEVICE_MIG_ENABLE, NVML_GPU_VIRTUALIZATION_MODE_VGPU = 186, 1, 2

    def __init__(self, broken=(), mig_mode=0, virtualization=0, instant_return=0):
        answers = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlDeviceGetHandleByIndex": lambda index: f"GPU-{'ab'[index] * 8}",
            "nvmlDeviceGetHandleByUUID": self._by_uuid,
            "nvmlDeviceGetUUID": lambda handle: handle,
            "nvmlDeviceIsMigDeviceHandle": lambda handle: SimpleNamespace(value=handle.startswith("MIG")),
            "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": lambda handle: "GPU-bbbbbbbb",
            "nvmlDeviceGetMigMode": lambda handle: (mig_mode, mig_mode),
            "nvmlDeviceGetVirtualizationMode": lambda handle: virtualization,
            "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 12_345_678,
            "nvmlDeviceGetPowerUsage": lambda handle: 250_000,
            "nvmlDeviceGetFieldValues": lambda handle, fields: [
                SimpleNamespace(nvmlReturn=instant_return, value=SimpleNamespace(uiVal=693_500))
            ],
            "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
            "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 0x04 | 0x40,
            "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=99),
            "nvmlDeviceGetComputeRunningProcesses": lambda handle: [],
            "nvmlDeviceGetTemperature": lambda handle, kind: 61,
            "nvmlDeviceGetClockInfo": lambda handle, kind: {1: 1755, 2: 2619}[kind],
        }
        for name, answer in answers.items():
            setattr(self, name, self._refuse if name in broken else answer)

    @staticmethod
    def _by_uuid(uuid):
        if uuid not in ("GPU-aaaaaaaa", "GPU-bbbbbbbb") and not uuid.startswith("MIG-"):
            raise FakeNvmlError("Not Found")
        return uuid

    @staticmethod
    def _refuse(*arguments):
        raise FakeNvmlError("Not Supported")


@pytest.fixture
def nvml(monkeypatch):
    def install(**options):
        monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(**options))

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return install


def test_nvml_units_and_state(nvml):
    nvml()
    source = NvmlSource(0, FakeClock())
    reading = source.read()
    assert (reading.t_s, reading.energy_j, reading.power_w) == (1000.0, 12_345.678, 693.5)
    assert source.read(with_power=False).power_w is None
    assert (source.name, source.power_kind, source.flags) == ("GPU-aaaaaaaa", "instant", {})
    state = source.state()
    assert (state.temperature_c, state.sm_clock_mhz, state.memory_clock_mhz) == (61, 1755, 2619)
    assert (state.power_limit_w, state.utilization_percent, state.foreign_pids) == (700.0, 99, ())
    assert state.clock_event_reasons == {"sw_power_cap", "hw_thermal_slowdown"}


@pytest.mark.parametrize(("value", "name"), [("1", "GPU-bbbbbbbb"), ("GPU-b", "GPU-bbbbbbbb"), ("1,0", "GPU-bbbbbbbb")])
def test_nvml_opens_the_gpu_that_cuda_calls_zero(nvml, monkeypatch, value, name):
    nvml()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert NvmlSource(0, FakeClock()).name == name


def test_a_mig_instance_is_measured_on_its_gpu_and_flagged(nvml, monkeypatch):
    nvml()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-c0ffee")
    source = NvmlSource(0, FakeClock())
    assert source.name == "GPU-bbbbbbbb"
    assert set(source.flags) == {"mig"}


def test_mig_mode_and_vgpu_are_flagged(nvml):
    nvml(mig_mode=1, virtualization=2)
    assert set(NvmlSource(0, FakeClock()).flags) == {"mig", "vgpu"}


def test_a_missing_counter_is_flagged_and_power_remains(nvml):
    nvml(broken={"nvmlDeviceGetTotalEnergyConsumption"})
    source = NvmlSource(0, FakeClock())
    assert source.flags["counter_missing"].endswith("Not Supported")
    assert source.read().energy_j is None
    assert source.read().power_w == 693.5


@pytest.mark.parametrize("options", [{"instant_return": 3}, {"broken": {"nvmlDeviceGetFieldValues"}}])
def test_instant_power_falls_back_to_the_average(nvml, options):
    nvml(**options)
    source = NvmlSource(0, FakeClock())
    assert source.power_kind == "average"
    assert source.read().power_w == 250.0


def test_no_power_at_all(nvml):
    nvml(broken={"nvmlDeviceGetFieldValues", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetCurrentClocksEventReasons"})
    source = NvmlSource(0, FakeClock())
    assert source.power_kind is None
    assert source.read().power_w is None
    assert source.state().clock_event_reasons == frozenset()


def test_nvml_failures_carry_their_reason(nvml, monkeypatch):
    nvml(broken={"nvmlInit"})
    with pytest.raises(SourceError, match="Not Supported"):
        NvmlSource(0, FakeClock())
    nvml()
    with pytest.raises(SourceError, match="Not Found"):
        NvmlSource("GPU-zz", FakeClock())
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(SourceError, match="nvidia-ml-py is not installed"):
        NvmlSource(0, FakeClock())


def make_zone(root, name, label, energy_uj, range_uj=262_143_328_850):
    zone = root / name
    zone.mkdir()
    (zone / "name").write_text(label + "\n")
    (zone / "energy_uj").write_text(f"{energy_uj}\n")
    (zone / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return zone / "energy_uj"


def test_rapl_adds_packages_and_dram_once_each(tmp_path):
    zones = [
        make_zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000),
        make_zone(tmp_path, "intel-rapl:0:0", "core", 500),
        make_zone(tmp_path, "intel-rapl:0:1", "dram", 2_000_000),
        make_zone(tmp_path, "intel-rapl:1", "package-1", 3_000_000),
        make_zone(tmp_path, "intel-rapl:2", "psys", 9_000_000),
        make_zone(tmp_path, "intel-rapl-mmio:0", "package-0", 1_000_000),
    ]
    source = RaplSource(FakeClock(), tmp_path)
    assert source.read().energy_j == 0.0
    for zone in zones:
        zone.write_text(str(int(zone.read_text()) + 4_000_000))
    assert source.read().energy_j == 12.0
    assert source.read().power_w is None


def test_rapl_wraps(tmp_path):
    counter = make_zone(tmp_path, "intel-rapl:0", "package-0", 9_000_000, range_uj=10_000_000)
    source = RaplSource(FakeClock(), tmp_path)
    for value_uj, total_j in [(9_500_000, 0.5), (500_000, 1.5), (400_000, 11.4), (400_000, 11.4)]:
        counter.write_text(str(value_uj))
        assert source.read().energy_j == pytest.approx(total_j)


def test_rapl_says_why_it_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(SourceError, match="no RAPL package"):
        RaplSource(FakeClock(), tmp_path / "absent")
    counter = make_zone(tmp_path, "intel-rapl:0", "package-0", 1)
    source = RaplSource(FakeClock(), tmp_path)
    counter.unlink()
    with pytest.raises(SourceError, match="RAPL read failed"):
        source.read()

    def refuse(path, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(SourceError, match="root only"):
        RaplSource(FakeClock(), tmp_path)


def test_opening_never_fails_a_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    gpu, cpu = open_sources([0], FakeClock(), tmp_path)
    assert isinstance(gpu, NullSource)
    assert gpu.flags == {"counter_missing": "the package nvidia-ml-py is not installed"}
    assert (gpu.read().energy_j, gpu.read().power_w, gpu.state()) == (None, None, None)
    assert cpu.kind == "cpu"
    assert "no RAPL package" in cpu.flags["counter_missing"]
    make_zone(tmp_path, "intel-rapl:0", "package-0", 1)
    assert open_sources([], FakeClock(), tmp_path)[1].name == "rapl"


@pytest.mark.parametrize(("tick_s", "expected"), [(0.1, 0.1), (0.02, 0.02), (0.6, None)])
def test_the_counters_period_is_measured(tick_s, expected):
    clock = FakeClock()
    period_s = counter_period_s(ScriptedGpu(clock, tick_s=tick_s), clock)
    assert period_s == (None if expected is None else pytest.approx(expected, abs=0.001))
    assert counter_period_s(ScriptedGpu(clock, has_counter=False), clock) is None


@pytest.mark.gpu
def test_a_real_gpu():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    torch.zeros(1, device="cuda")
    clock = SystemClock()
    source = NvmlSource(0, clock)
    assert source.name == f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    assert 0.01 < counter_period_s(source, clock) < 0.15
    assert 10.0 < source.read().power_w < 2000.0
    assert source.state().foreign_pids == ()
