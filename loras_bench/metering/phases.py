"""What a phase cost: joules with their provenance, how parts add up, and the flags that a reader must see."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field

from loras_bench.metering.trace import POLL_INTERVAL_S

EnergySourceName = Literal["counter", "instant_integral", "average_integral"]
LADDER: tuple[EnergySourceName | None, ...] = ("counter", "instant_integral", "average_integral", None)
"""How joules were obtained, best first; a sum is called after the worst of its terms."""

HEADLINE_PHASES = ("train", "steady")
MIN_HEADLINE_S = 10.0
MIN_CROSS_CHECK_S = 2.0
"""The power reading lags the counter by up to 0.1 s, which is 5 % of 2 s: shorter windows cannot be judged."""
MAX_MISMATCH = 0.05
MAX_MISSED_POLLS = 0.1
MAX_IDLE_DRIFT = 0.1
MIN_SAMPLED_SHARE = 0.9


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Spread(_Frozen):
    """Smallest, mean and largest of some samples."""

    min: float
    mean: float
    max: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Summarise; None for no values."""
        if not values:
            return None
        return cls(min=min(values), mean=sum(values) / len(values), max=max(values), samples=len(values))

    def __add__(self, other: Spread) -> Spread:
        samples = self.samples + other.samples
        mean = (self.mean * self.samples + other.mean * other.samples) / samples
        return Spread(min=min(self.min, other.min), mean=mean, max=max(self.max, other.max), samples=samples)


class GpuEnergy(_Frozen):
    """One GPU's share of a phase."""

    uuid: str
    seconds: float
    """From tick to tick of this GPU's counter."""
    energy_j: float | None
    source: EnergySourceName | None
    integral_j: float | None
    """The same window by integrated power."""


class PhaseEnergy(_Frozen):
    """What one named phase cost, all its parts together. GPU joules; CPU joules are a column of their own."""

    name: str
    seconds: float
    """From edge to edge; an edge is the counter tick that follows the synchronized end of the work."""
    parts: int
    """Unbroken stretches; each has two edges."""
    polls: int
    gpus: tuple[GpuEnergy, ...]
    cpu_energy_j: float | None
    """RAPL packages and DRAM; never added to the GPU's joules."""
    cpu_reason: str | None
    """Why `cpu_energy_j` is None."""
    temperature_c: Spread | None
    sm_clock_mhz: Spread | None
    memory_clock_mhz: Spread | None
    flags: dict[str, str]
    """Name -> reason, as listed in docs/energy.md."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def energy_j(self) -> float | None:
        """Joules of all GPUs; None if one of them is unknown."""
        return sum_if_known(gpu.energy_j for gpu in self.gpus)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def integral_j(self) -> float | None:
        """Joules of all GPUs by integrated power: a cross-check of edges and polling, not of the sensor's gain."""
        return sum_if_known(gpu.integral_j for gpu in self.gpus)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def source(self) -> EnergySourceName | None:
        """The worst rung of the ladder that any joule of the phase stands on."""
        return max((gpu.source for gpu in self.gpus), key=LADDER.index, default=None)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def mean_power_w(self) -> float | None:
        """Mean draw of all GPUs together, each over its own ticks."""
        return sum_if_known(
            gpu.energy_j / gpu.seconds if gpu.energy_j is not None and gpu.seconds else None for gpu in self.gpus
        )

    @computed_field  # type: ignore[prop-decorator]
    @property
    def integral_to_counter(self) -> float | None:
        """Integrated power over counter; None unless every joule is the counter's and there is an integral."""
        if self.source != "counter" or self.integral_j is None or not self.energy_j:
            return None
        return self.integral_j / self.energy_j

    def __add__(self, other: PhaseEnergy) -> PhaseEnergy:
        """The two together, under the name of the first."""
        mine, others = ({gpu.uuid: gpu for gpu in phase.gpus} for phase in (self, other))
        # A run resumed on another GPU has joules of both: a GPU absent from one of the two adds nothing there.
        gpus = [_add_gpu(mine[uuid], others[uuid]) if uuid in others else mine[uuid] for uuid in mine]
        gpus += [others[uuid] for uuid in others if uuid not in mine]
        return PhaseEnergy(
            name=self.name,
            seconds=self.seconds + other.seconds,
            parts=self.parts + other.parts,
            polls=self.polls + other.polls,
            gpus=tuple(gpus),
            cpu_energy_j=sum_if_known((self.cpu_energy_j, other.cpu_energy_j)),
            cpu_reason=self.cpu_reason or other.cpu_reason,
            temperature_c=_merge(self.temperature_c, other.temperature_c),
            sm_clock_mhz=_merge(self.sm_clock_mhz, other.sm_clock_mhz),
            memory_clock_mhz=_merge(self.memory_clock_mhz, other.memory_clock_mhz),
            flags={**other.flags, **self.flags},
        )


def sum_if_known(terms: Iterable[float | None]) -> float | None:
    """Sum; None if a term is None or there is none, because an unknown term makes the sum unknown."""
    known: list[float] = []
    for term in terms:
        if term is None:
            return None
        known.append(term)
    return sum(known) if known else None


def _merge(a: Spread | None, b: Spread | None) -> Spread | None:
    return a + b if a is not None and b is not None else a or b


def _add_gpu(a: GpuEnergy, b: GpuEnergy) -> GpuEnergy:
    return GpuEnergy(
        uuid=a.uuid,
        seconds=a.seconds + b.seconds,
        energy_j=sum_if_known((a.energy_j, b.energy_j)),
        source=max(a.source, b.source, key=LADDER.index),
        integral_j=sum_if_known((a.integral_j, b.integral_j)),
    )


def add_up(name: str, parts: Sequence[PhaseEnergy]) -> PhaseEnergy:
    """The parts (at least one) together, under a name; not judged."""
    return reduce(lambda a, b: a + b, parts).model_copy(update={"name": name})


def judge(phase: PhaseEnergy, polled: bool = True) -> PhaseEnergy:
    """Raise the flags that depend on a whole phase: what is too short alone may be long enough with its other parts.

    Args:
        phase: A sum of parts.
        polled: Whether a poller ran, so that missed polls mean something.
    """
    return phase.model_copy(update={"flags": {**phase.flags, **_verdicts(phase, polled)}})


def _verdicts(phase: PhaseEnergy, polled: bool) -> dict[str, str]:
    flags: dict[str, str] = {}
    if phase.name in HEADLINE_PHASES and phase.seconds < MIN_HEADLINE_S:
        flags["short_window"] = f"{phase.name} lasted {phase.seconds:.2f} s, less than {MIN_HEADLINE_S:.0f} s"
    for gpu in phase.gpus:
        if gpu.source != "counter" or gpu.integral_j is None or not gpu.energy_j or gpu.seconds < MIN_CROSS_CHECK_S:
            continue
        ratio = gpu.integral_j / gpu.energy_j
        if abs(1 - ratio) > MAX_MISMATCH:
            flags["counter_integral_mismatch"] = (
                f"{gpu.uuid}: integrated power is {ratio:.3f} of the counter's {gpu.energy_j:.1f} J"
            )
    expected = phase.seconds / POLL_INTERVAL_S
    if polled and phase.seconds >= MIN_CROSS_CHECK_S and phase.polls < (1 - MAX_MISSED_POLLS) * expected:
        flags["poller_late"] = f"{phase.polls} of {expected:.0f} polls were made in time"
    return flags


class IdleReading(_Frozen):
    """What the GPUs of the job draw when they do nothing, with contexts created and the model loaded."""

    power_w: float | None
    integral_power_w: float | None
    source: EnergySourceName | None
    seconds: float
    temperature_c: Spread | None
    flags: dict[str, str]


def idle_drift(before: IdleReading, after: IdleReading) -> str | None:
    """The reason for the flag `idle_drift` if two idle readings differ by more than a tenth, else None."""
    if before.power_w is None or after.power_w is None:
        return None
    if abs(after.power_w - before.power_w) <= MAX_IDLE_DRIFT * before.power_w:
        return None
    return f"idle power went from {before.power_w:.1f} W to {after.power_w:.1f} W"


def sampled_share(step_s: float, window_s: float, period_s: float = 0.1, slice_s: float = 0.025) -> float:
    """Share of a step's course that a part-time power sensor ever looks at in a window of equal steps.

    A100 and H100 sample about 25 % of the time (Yang et al., arXiv 2312.02741): one slice each period. If the step is
    commensurate with the period, the slices always see the same moments of it, and the joules of the others are unseen.

    Args:
        step_s: Seconds of one step, taken as constant; steps that vary are seen more evenly.
        window_s: Seconds of the measured window.
        period_s: Update period of the sensor.
        slice_s: Averaged part of each period.

    Returns:
        Between `slice_s / period_s` and 1.
    """
    width = slice_s / step_s
    starts = sorted((index * period_s / step_s) % 1.0 for index in range(max(1, int(window_s / period_s))))
    gaps = [later - earlier for earlier, later in zip(starts, [*starts[1:], starts[0] + 1.0], strict=True)]
    return min(1.0, sum(min(width, gap) for gap in gaps))


def aliased_sampling(step_s: float, window_s: float) -> str | None:
    """The reason for the flag `aliased_sampling` if equal steps of `step_s` would be seen in part only, else None."""
    share = sampled_share(step_s, window_s)
    if share >= MIN_SAMPLED_SHARE:
        return None
    return f"steps of {step_s * 1e3:.1f} ms: the power sensor sees {share:.0%} of a step if all steps are equally long"
