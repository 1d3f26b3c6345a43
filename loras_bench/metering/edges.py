"""Edges on the counter's ticks, and the stretch between two of them.

The counter is refreshed about every 0.1 s, so an edge read at any moment is wrong by up to 0.1 s x power. An edge
that waits for the value to change knows both the joules and the moment they belong to: what is left of the error is
the pace of the wait, about 1 ms x power.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loras_bench.metering.clock import Clock
from loras_bench.metering.phases import EnergySourceName, GpuEnergy, PhaseEnergy, Spread
from loras_bench.metering.sources import DeviceState, Reading
from loras_bench.metering.trace import Trace

TICK_WAIT_S = 0.15
"""Longest wait for a counter's tick."""
SPIN_S = 0.0005

_THERMAL = frozenset({"sw_thermal_slowdown", "hw_thermal_slowdown"})
_POWER = frozenset({"sw_power_cap", "hw_power_brake_slowdown"})


@dataclass(frozen=True, slots=True)
class Mark:
    """One source at an edge."""

    t_s: float
    energy_j: float | None
    on_tick: bool


@dataclass(frozen=True, slots=True)
class Edge:
    """The end of one stretch and the start of the next."""

    t_s: float
    marks: tuple[Mark, ...]
    """In the order of the traces. Each GPU has its own tick; `t_s` is the last of them."""


def take_edge(traces: Sequence[Trace], synchronize: Callable[[], None], clock: Clock) -> Edge:
    """Wait for the devices, then for the next tick of each GPU's counter, and mark every source there."""
    synchronize()
    for trace in traces:
        # Before the tick, so that the state belongs to the stretch that ends here.
        trace.read_state()
    ticks = _wait_for_ticks([trace for trace in traces if trace.source.kind == "gpu"], clock)
    edge_s = max((mark.t_s for mark in ticks.values()), default=clock.now())
    marks = []
    for trace in traces:
        mark = ticks.get(trace)
        if mark is None:
            # RAPL is refreshed every millisecond and needs no alignment; a GPU without a counter has none to align.
            reading = trace.read(with_power=False)
            mark = Mark(edge_s, None if reading is None else reading.energy_j, on_tick=True)
        marks.append(mark)
    for trace in traces:
        # The trapezoid over the next stretch begins with a sample of its own.
        trace.read()
    return Edge(edge_s, tuple(marks))


def _wait_for_ticks(traces: Sequence[Trace], clock: Clock) -> dict[Trace, Mark]:
    """Spin until each counter has changed; those that cannot be read are left out."""
    pending = list(traces)
    seen: dict[Trace, Reading] = {}
    marks: dict[Trace, Mark] = {}
    deadline_s = clock.now() + TICK_WAIT_S
    while pending and clock.now() < deadline_s:
        for trace in list(pending):
            reading = trace.read(with_power=False)
            if reading is None:
                continue
            if reading.energy_j is None:
                pending.remove(trace)
                continue
            ticked = trace in seen and reading.energy_j != seen[trace].energy_j
            seen[trace] = reading
            marks[trace] = Mark(reading.t_s, reading.energy_j, on_tick=ticked)
            if ticked:
                pending.remove(trace)
        if pending:
            clock.sleep(SPIN_S)
    return marks


def stretch(name: str, start: Edge, end: Edge, traces: Sequence[Trace], polls: int, new_part: bool) -> PhaseEnergy:
    """What was spent between two edges, as (a part of) phase `name`."""
    flags: dict[str, str] = {}
    gpus: list[GpuEnergy] = []
    states: list[DeviceState] = []
    cpu_energy_j: float | None = None
    cpu_reason: str | None = "no CPU source"
    for trace, first, last in zip(traces, start.marks, end.marks, strict=True):
        if trace.source.kind == "gpu":
            gpus.append(_gpu_energy(trace, first, last, flags))
            trace_states = trace.states_in(start.t_s, end.t_s)
            _flag_states(trace.source.name, trace_states, flags)
            states += trace_states
        elif first.energy_j is not None and last.energy_j is not None:
            cpu_energy_j, cpu_reason = last.energy_j - first.energy_j, None
        else:
            cpu_reason = trace.source.flags.get("counter_missing") or trace.error
    return PhaseEnergy(
        name=name,
        seconds=end.t_s - start.t_s,
        parts=int(new_part),
        polls=polls,
        gpus=tuple(gpus),
        cpu_energy_j=cpu_energy_j,
        cpu_reason=cpu_reason,
        temperature_c=Spread.of([s.temperature_c for s in states if s.temperature_c is not None]),
        sm_clock_mhz=Spread.of([s.sm_clock_mhz for s in states if s.sm_clock_mhz is not None]),
        memory_clock_mhz=Spread.of([s.memory_clock_mhz for s in states if s.memory_clock_mhz is not None]),
        flags=flags,
    )


def _gpu_energy(trace: Trace, first: Mark, last: Mark, flags: dict[str, str]) -> GpuEnergy:
    """Joules of one GPU by the best rung of the ladder that holds; says in `flags` what was wrong."""
    name = trace.source.name
    flags.update(trace.source.flags)
    integral_j = trace.integral_j(first.t_s, last.t_s)
    energy_j: float | None = None
    source: EnergySourceName | None = None
    if first.energy_j is None or last.energy_j is None:
        flags.setdefault("counter_missing", f"{name}: no counter reading at an edge ({trace.error})")
    elif trace.reset_in(first.t_s, last.t_s):
        flags["counter_reset"] = f"{name}: the counter went backwards; integrated power stands in for it"
    else:
        energy_j, source = last.energy_j - first.energy_j, "counter"
    if not (first.on_tick and last.on_tick):
        flags["edge_unaligned"] = f"{name}: the counter did not tick within {TICK_WAIT_S} s of an edge"
    if integral_j is None:
        lack = "no power reading" if trace.source.power_kind is None else "power samples have holes"
        flags["cross_check_missing" if source else "energy_missing"] = f"{name}: {lack}"
    elif source is None:
        energy_j = integral_j
        source = "instant_integral" if trace.source.power_kind == "instant" else "average_integral"
    return GpuEnergy(uuid=name, seconds=last.t_s - first.t_s, energy_j=energy_j, source=source, integral_j=integral_j)


def _flag_states(name: str, states: Sequence[DeviceState], flags: dict[str, str]) -> None:
    for state in states:
        reasons = state.clock_event_reasons
        # `hw_slowdown` is the common bit of heat and of the power brake.
        if reasons & _THERMAL or ("hw_slowdown" in reasons and not reasons & _POWER):
            flags.setdefault("thermal_throttle", f"{name}: {', '.join(sorted(reasons))} at {state.temperature_c} C")
        if reasons & _POWER:
            flags.setdefault("power_capped", f"{name}: {', '.join(sorted(reasons))} at {state.power_limit_w} W")
        if state.foreign_pids:
            flags.setdefault("foreign_process", f"{name}: processes {', '.join(map(str, state.foreign_pids))}")
