"""From joules to gCO2e, by a factor and a PUE that the user gives; CodeCarbon's models of what is not measured."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from types import TracebackType
from typing import Any

J_PER_WH = 3600.0
J_PER_KWH = 3.6e6


def watt_hours(energy_j: float) -> float:
    """Joules to watt-hours."""
    return energy_j / J_PER_WH


def emissions_g(energy_j: float, pue: float, intensity_g_per_kwh: float) -> float:
    """Grams of CO2 equivalent: E / 3.6e6 x PUE x carbon intensity.

    Args:
        energy_j: Joules at the device.
        pue: Power usage effectiveness of the building, at least 1 (1.0: the computers alone).
        intensity_g_per_kwh: Carbon intensity of the electricity. There is no default: it spans a factor of fifty
            between countries, and a silent one would be an invented result.

    Raises:
        ValueError: A PUE below 1 or a negative intensity.
    """
    if pue < 1.0:
        raise ValueError(f"PUE is at least 1, got {pue}")
    if intensity_g_per_kwh < 0:
        raise ValueError(f"carbon intensity is not negative, got {intensity_g_per_kwh}")
    return energy_j / J_PER_KWH * pue * intensity_g_per_kwh


@dataclass(frozen=True)
class CarbonEstimate:
    """What CodeCarbon says of a span. `cpu_method` tells a RAPL measurement from a model; RAM is always a model.

    CodeCarbon reads the same NVML counter as the meter, at longer intervals: its GPU joules are not repeated here.
    """

    cpu_energy_j: float | None = None
    ram_energy_j: float | None = None
    emissions_g: float | None = None
    """GPU, CPU and RAM together, with CodeCarbon's intensity for the country."""
    water_l: float | None = None
    cpu_method: str | None = None
    method: str = "CodeCarbon estimate"
    country_iso_code: str | None = None
    seconds: float | None = None
    reason: str | None = None
    """Why there are no values."""


class CarbonEstimator:
    """Runs CodeCarbon's offline tracker around a span: no file, no network, and no failure that ends a run.

    Start it on one rank only: it measures the whole machine.

    Args:
        country_iso_code: Three letters (`FRA`); must be given, because it selects the carbon intensity.
        pue: Power usage effectiveness, multiplied into CodeCarbon's energies and emissions.
        water_l_per_kwh: Water usage effectiveness of the site; None leaves water unknown.
    """

    def __init__(self, country_iso_code: str, pue: float = 1.0, water_l_per_kwh: float | None = None) -> None:
        self.estimate = CarbonEstimate(reason="the tracker was not started", country_iso_code=country_iso_code)
        self._country = country_iso_code
        self._pue = pue
        self._water_l_per_kwh = water_l_per_kwh
        self._tracker: Any = None

    def __enter__(self) -> CarbonEstimator:
        try:
            self._tracker = self._start()
        except ImportError:
            self._fail("the package codecarbon is not installed")
        except Exception as error:  # a tracker's fault, whatever it is, must not end a run
            self._fail(f"CodeCarbon did not start: {error!r}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._tracker is None:
            return
        try:
            self.estimate = self._stop()
        except Exception as failure:  # as above
            self._fail(f"CodeCarbon did not stop: {failure!r}")

    def _fail(self, reason: str) -> None:
        self.estimate = CarbonEstimate(reason=reason, country_iso_code=self._country)

    def _start(self) -> Any:
        from codecarbon import OfflineEmissionsTracker
        from codecarbon.input import DataSource

        if self._country not in DataSource().get_global_energy_mix_data():
            raise ValueError(f"CodeCarbon knows no country {self._country!r}; codes have three letters")
        # The tracker warns while it reads its arguments, before it has read `log_level`.
        logging.getLogger("codecarbon").setLevel(logging.ERROR)
        tracker = OfflineEmissionsTracker(
            country_iso_code=self._country,
            pue=self._pue,
            wue=self._water_l_per_kwh or 0.0,
            tracking_mode="machine",
            log_level="error",
            allow_multiple_runs=True,
            # Given, these win over a .codecarbon.config in the home or working folder, which could send data away.
            output_methods=[],
            emissions_endpoint=None,
            output_handlers=[],
            electricitymaps_api_token="",
            cloud_provider=None,
            region=None,
        )
        tracker.start()
        return tracker

    def _stop(self) -> CarbonEstimate:
        self._tracker.stop()
        data = self._tracker.final_emissions_data
        modes = {getattr(part, "_mode", None) for part in self._tracker._hardware if type(part).__name__ == "CPU"}
        return CarbonEstimate(
            cpu_energy_j=data.cpu_energy * J_PER_KWH or None,
            ram_energy_j=data.ram_energy * J_PER_KWH or None,
            emissions_g=data.emissions * 1e3,
            water_l=None if self._water_l_per_kwh is None else data.water_consumed,
            cpu_method=", ".join(sorted(mode for mode in modes if mode)) or None,
            method=f"CodeCarbon {data.codecarbon_version} estimate",
            country_iso_code=data.country_iso_code,
            seconds=data.duration,
        )
