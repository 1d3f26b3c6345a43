"""Integration of power samples: exact where it can be, absent where nobody knows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loras_bench.metering.sources import DeviceState, Reading, SourceError
from loras_bench.metering.trace import Poller, Trace


class Replay:
    """A source that replays readings; None is a failure."""

    name, kind, power_kind, flags = "GPU-a", "gpu", "instant", {}

    def __init__(self, readings):
        self._readings = iter(readings)

    def read(self, with_power=True):
        reading = next(self._readings)
        if reading is None:
            raise SourceError("gone")
        return reading

    def state(self):
        return None


def trace_of(*samples):
    trace = Trace(Replay([Reading(t_s, None, power_w) for t_s, power_w in samples]))
    for _ in samples:
        trace.read()
    return trace


def test_trapezoid_by_hand():
    trace = trace_of((0.0, 100.0), (0.4, 300.0), (0.8, 300.0), (1.0, 0.0))
    assert trace.integral_j(0.0, 1.0) == pytest.approx(80 + 120 + 30)
    assert trace.integral_j(0.2, 0.4) == pytest.approx((200 + 300) / 2 * 0.2)
    assert trace.integral_j(0.9, 0.95) == pytest.approx((150 + 75) / 2 * 0.05)
    assert trace.integral_j(0.5, 0.5) == 0.0
    assert trace.integral_j(-0.1, 0.0) == pytest.approx(10.0)  # the nearest sample stands for a little while
    assert trace.integral_j(1.0, 1.1) == pytest.approx(0.0)


@given(
    steps_s=st.lists(st.floats(0.01, 0.4), min_size=2, max_size=30),
    slope=st.floats(-5.0, 5.0),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
)
def test_exact_for_linear_power_and_additive(steps_s, slope, cut):
    times_s = [sum(steps_s[:i]) for i in range(len(steps_s))]
    trace = trace_of(*((t_s, 500.0 + slope * t_s) for t_s in times_s))
    a, b, c = sorted(share * times_s[-1] for share in cut)
    assert trace.integral_j(a, c) == pytest.approx(500 * (c - a) + slope * (c * c - a * a) / 2, abs=1e-6)
    assert trace.integral_j(a, b) + trace.integral_j(b, c) == pytest.approx(trace.integral_j(a, c), abs=1e-6)


def test_holes_above_a_tenth_of_the_window_make_the_integral_unknown():
    trace = trace_of(*((t / 10, 100.0) for t in range(100)), *((10.8 + t / 10, 100.0) for t in range(10)))
    assert trace.integral_j(0.0, 11.0) == pytest.approx(1100.0)  # 0.9 of 11 s
    assert trace.integral_j(9.0, 11.0) is None
    assert trace.integral_j(0.0, 14.0) is None  # nothing known after 11.7
    assert trace.integral_j(-3.0, 5.0) is None
    assert trace_of().integral_j(0.0, 1.0) is None
    assert trace_of((0.0, None), (1.0, None)).integral_j(0.0, 1.0) is None


def test_resets_and_failures_are_remembered():
    readings = [Reading(1.0, 10.0, 5.0), None, Reading(2.0, 12.0, 5.0), Reading(3.0, 1.0, 5.0), Reading(4.0, 1.0, 5.0)]
    trace = Trace(Replay(readings))
    assert [trace.read() for _ in readings] == readings
    assert trace.error == "gone"
    assert trace.last == readings[-1]
    assert trace.reset_in(2.0, 3.0)
    assert not trace.reset_in(3.0, 9.0)
    assert not trace.reset_in(0.0, 2.0)


def test_states_are_found_by_window_in_any_order_of_arrival():
    trace = Trace(Replay([]))
    for t_s in (3.0, 1.0, 2.0):
        trace.source.state = lambda t_s=t_s: DeviceState(t_s)
        trace.read_state()
    assert [state.t_s for state in trace.states_in(1.0, 3.0)] == [2.0, 3.0]


def test_polls_are_counted_by_window():
    poller = Poller([], clock=None)
    poller.polls_s.extend([1.0, 2.0, 3.0])
    assert poller.polls_in(1.0, 3.0) == 2
    assert poller.polls_in(3.5, 9.0) == 0
