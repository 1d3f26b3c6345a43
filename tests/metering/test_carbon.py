"""Units, carbon arithmetic, and a tracker that may fail as it likes."""

from __future__ import annotations

import socket
import sys

import pytest

from loras_bench.metering.carbon import CarbonEstimator, emissions_g, watt_hours


def test_units():
    assert watt_hours(22_380.0) == pytest.approx(6.2167, abs=5e-5)
    assert emissions_g(3.6e6, pue=1.0, intensity_g_per_kwh=475.0) == 475.0
    assert emissions_g(22_380.0, pue=1.5, intensity_g_per_kwh=100.0) == pytest.approx(0.93250, abs=1e-5)


def test_impossible_factors_are_refused():
    with pytest.raises(ValueError, match="PUE"):
        emissions_g(1.0, pue=0.9, intensity_g_per_kwh=100.0)
    with pytest.raises(ValueError, match="intensity"):
        emissions_g(1.0, pue=1.0, intensity_g_per_kwh=-1.0)


def test_a_missing_package_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with CarbonEstimator("FRA") as estimator:
        pass
    assert estimator.estimate.reason == "the package codecarbon is not installed"
    assert estimator.estimate.cpu_energy_j is None


def test_codecarbon_estimates_offline_and_leaves_no_file(tmp_path, monkeypatch):
    pytest.importorskip("codecarbon")

    def refuse(*arguments):
        raise AssertionError("codecarbon reached for the network")

    monkeypatch.chdir(tmp_path)
    (tmp_path / ".codecarbon.config").write_text(
        "[codecarbon]\nsave_to_api=true\nemissions_endpoint=http://localhost\n"
    )
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with CarbonEstimator("FRA", water_l_per_kwh=1.8) as estimator:
        sum(range(2_000_000))
    estimate = estimator.estimate
    assert estimate.reason is None
    assert estimate.cpu_energy_j > 0
    assert estimate.ram_energy_j > 0
    assert estimate.emissions_g > 0
    assert estimate.water_l > 0
    assert "estimate" in estimate.method
    assert sorted(tmp_path.iterdir()) == before


def test_codecarbon_failures_never_end_a_run(monkeypatch):
    codecarbon = pytest.importorskip("codecarbon")
    with CarbonEstimator("Narnia") as estimator:
        pass
    assert "Narnia" in estimator.estimate.reason

    class Broken:
        def __init__(self, **options):
            pass

        def start(self):
            pass

        def stop(self):
            raise RuntimeError("disk full")

    monkeypatch.setattr(codecarbon, "OfflineEmissionsTracker", Broken)
    with CarbonEstimator("FRA") as estimator:
        pass
    assert "disk full" in estimator.estimate.reason
    with pytest.raises(KeyError), CarbonEstimator("FRA"):
        raise KeyError("the run's own errors go on")
