"""Sentences about a panel that a paper can take as they are: its energy, and what its accuracy is worth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loras_bench.metering.carbon import emissions_g
from loras_bench.results.formatting import format_interval, format_number
from loras_bench.results.panels import Arm
from loras_bench.results.quantities import Quantity
from loras_bench.results.record import Record

SOURCES = {
    "counter": "the GPU's NVML energy counter",
    "instant_integral": "integrated NVML instant power",
    "average_integral": "integrated NVML 1 s average power",
}

COUNTS_FROM = 3
"""Standard errors above the most frequent answer from which a set says something about an arm."""


def energy_statement(device: str, arms: Sequence[Arm]) -> str:
    """How much energy the arms took and how that was measured, ready to paste into a paper."""
    energy = Quantity("train_energy_j")
    shown = [(arm, interval) for arm in arms if (interval := arm.interval(energy)) is not None]
    if not shown:
        reasons = dict.fromkeys(arm.why_missing(energy) for arm in arms)
        return f"No joules were measured on {device}: {'; '.join(reasons)}."
    runs = [run for arm, _ in shown for run in arm.runs if run.train_energy_j is not None]
    sources = [SOURCES[name] for name in sorted({run.train_energy_source or "counter" for run in runs})]
    joules = ", ".join(f"{arm.label} {format_interval(interval)} J" for arm, interval in shown)
    return (
        f"Energy of the train phase on {device}, by {' and '.join(sources)}: {joules}. "
        f"{_seeds(runs)}; the host and the warm-up are not included, {_idle(runs)}. "
        f"The sensor's gain is not calibrated: ratios on one card are more certain than joules. {_versions(runs)}"
    )


def _seeds(runs: Iterable[Record]) -> str:
    seeds = sorted({run.seed for run in runs})
    if len(seeds) == 1:
        return f"Single runs (seed {seeds[0]}), so without intervals"
    listed = ", ".join(map(str, seeds))
    return f"Means with 95 % Student-t intervals over seeds {listed}, ratios paired by seed within blocks"


def _idle(runs: Iterable[Record]) -> str:
    watts = [value for run in runs for value in (run.idle_before_w, run.idle_after_w) if value is not None]
    if not watts:
        return "idle draw (not read) is not subtracted"
    return f"idle draw ({format_number(min(watts), 3)} to {format_number(max(watts), 3)} W) is not subtracted"


def _versions(runs: Sequence[Record]) -> str:
    kernels = ", ".join(sorted({run.kernel_version for run in runs}))
    packages = runs[0].environment.get("packages", {}) if runs else {}
    versions = "".join(f", {name} {packages[name]}" for name in ("torch", "transformers") if name in packages)
    version = packages.get("loras-bench", "")
    return f"Measured with {f'loras-bench {version}'.strip()} (kernels {kernels}{versions})."


def majority_notes(arms: Iterable[Arm], split: str | None) -> list[str]:
    """How far each arm's accuracy lies above that of the most frequent answer, where runs recorded it."""
    shown, base = [], ""
    for arm in arms:
        readings = [q for run in arm.runs for q in run.quality if q.split == split and q.attention == "same"]
        errors = [(quality, above) for quality in readings if (above := quality.standard_errors) is not None]
        if errors:
            protocol = errors[0][0].protocol
            base = f"{protocol['majority_share']:.4f} of {protocol['rows']:,} {split} rows"
            shown.append(f"{arm.label} {sum(above for _, above in errors) / len(errors):.1f}")
    if not shown:
        return []
    return [
        f"The most frequent answer is right in {base}; accuracy above it, in standard errors: {', '.join(shown)}. "
        f"Below {COUNTS_FROM} an arm has learned nothing that the set could show."
    ]


def estimate_notes(arms: Iterable[Arm]) -> list[str]:
    """CodeCarbon's models of what is not measured, labelled as such; whole runs, means over seeds."""
    notes = []
    for arm in arms:
        found = [run.estimates for run in arm.runs if run.estimates.get("cpu_energy_j") is not None]
        if found:
            cpu_j = sum(estimate["cpu_energy_j"] for estimate in found) / len(found)
            ram_j = sum(estimate["ram_energy_j"] or 0.0 for estimate in found) / len(found)
            grams = sum(estimate["emissions_g"] for estimate in found) / len(found)
            notes.append(
                f"Estimated for whole runs of {arm.label} ({found[0]['method']}, {found[0]['country_iso_code']}): "
                f"CPU {format_number(cpu_j, 3)} J ({found[0]['cpu_method']}), RAM {format_number(ram_j, 3)} J (model), "
                f"{format_number(grams, 3)} g CO2e with the GPU."
            )
    return notes


def carbon_notes(arms: Iterable[Arm]) -> list[str]:
    """Estimated carbon where the experiments ask for it: joules / 3.6e6 * PUE * intensity, with the factors named."""
    grams: dict[str, list[str]] = {}
    for arm in arms:
        carbon = (arm.all_runs[0].config.get("energy") or {}).get("carbon")
        interval = arm.interval(Quantity("train_energy_j"))
        if carbon and interval:
            value = emissions_g(interval.mean, carbon["pue"], carbon["intensity_g_per_kwh"])
            factors = f"{carbon['intensity_g_per_kwh']:g} g/kWh ({carbon['source']}), PUE {carbon['pue']:g}"
            grams.setdefault(factors, []).append(f"{arm.label} {format_number(value, 3)} g")
    return [f"Carbon of the train energy (estimated at {factors}): {', '.join(g)}." for factors, g in grams.items()]
