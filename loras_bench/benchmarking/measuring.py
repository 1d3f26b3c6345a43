"""Measures every contender of a case; whatever stops one of them is the reason in its row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from loras_bench.attention.backend import Backend
from loras_bench.attention.binding import BoundPattern
from loras_bench.benchmarking.bench import Bench, Call, Drawn, Quartiles
from loras_bench.benchmarking.cases import Case, Shape
from loras_bench.benchmarking.contenders import Contender, Speed
from loras_bench.benchmarking.inputs import Gradients, Inputs, bind, random_inputs, reference_of, relative_errors
from loras_bench.errors import UserError

BACKWARD_FACTOR = 2.5
"""FLOPs of a backward pass over a forward pass, for every backend: who recomputes more gets no credit for it."""
EAGER = "timed without a CUDA graph"


@dataclass
class Row:
    """What was found about one contender; what was not measured is None, and `reason` says why."""

    backend: str
    executed_pairs: int | None = None
    """Pairs of one head, summed over the samples, that the kernel computes."""
    forward: Quartiles | None = None
    both: Quartiles | None = None
    """Forward and backward."""
    drawn: Drawn | None = None
    """Of forward and backward."""
    peak_bytes: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    note: str = ""
    reason: str | None = None


@dataclass(frozen=True)
class Result:
    """A case with a row for each contender."""

    case: Case
    allowed_pairs: int
    rows: list[Row]

    def tflop_per_s(self, row: Row, pairs: int | None, both: bool) -> float | None:
        """Rate of the products over so many pairs of each head: 4 * pairs * head_dim, and the backward pass."""
        times = row.both if both else row.forward
        if pairs is None or times is None:
            return None
        flops = 4 * pairs * self.case.shape.head_dim * self.case.shape.heads * (1 + BACKWARD_FACTOR * both)
        return flops / times.median_ms / 1e9

    def to_json(self) -> dict[str, Any]:
        """Plain values with their units in the names."""
        return {
            "shape": asdict(self.case.shape),
            "pattern": self.case.pattern.model_dump(mode="json"),
            "causal": self.case.causal,
            "allowed_pairs": self.allowed_pairs,
            "rows": [self._row_json(row) for row in self.rows],
        }

    def _row_json(self, row: Row) -> dict[str, Any]:
        drawn = row.drawn or Drawn(None, None)
        return {
            "backend": row.backend,
            "forward_ms": row.forward and row.forward._asdict(),
            "forward_backward_ms": row.both and row.both._asdict(),
            "executed_pairs": row.executed_pairs,
            "forward_tflop_per_s_executed": self.tflop_per_s(row, row.executed_pairs, both=False),
            "forward_backward_tflop_per_s_executed": self.tflop_per_s(row, row.executed_pairs, both=True),
            "forward_backward_tflop_per_s_allowed": self.tflop_per_s(row, self.allowed_pairs, both=True),
            "energy_j": drawn.energy_j,
            "power_w": drawn.power_w,
            "peak_bytes": row.peak_bytes,
            "relative_errors": row.errors,
            "note": row.note,
            "reason": row.reason,
        }


class CaseRunner:
    """Measures the cases one after the other; dense contenders are measured once for each shape and direction."""

    def __init__(self, contenders: Sequence[Contender], bench: Bench, say: Callable[[str], None]) -> None:
        self.contenders, self.bench, self.say = contenders, bench, say
        self._dense: dict[tuple[str, Case], Row] = {}

    def run(self, case: Case) -> Result:
        """All contenders on the same inputs."""
        rows = []
        for contender in self.contenders:
            computed = case.baseline if contender.dense else case
            key = (contender.name, computed)
            if key not in self._dense:
                self.say(f"{case.shape}  {computed.pattern_text}  {contender.name}")
                row = self._measure(contender, computed)
                if row.reason:
                    self.say(f"  {row.reason}")
                if not contender.dense:
                    rows.append(row)
                    continue
                self._dense[key] = row
            rows.append(self._dense[key])
        return Result(case, case.allowed_pairs(), rows)

    def _measure(self, contender: Contender, case: Case) -> Row:
        row = Row(contender.name)
        try:
            _Measurement(contender, case, self.bench, row).run()
        except torch.cuda.OutOfMemoryError:
            row.reason = "out of memory"
        except UserError as error:
            row.reason = error.message
        except Exception as error:  # one contender's fault, whatever it is, must not end the others
            row.reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        self.bench.release()
        return row


class _Measurement:
    """One contender on one case; fills its row as far as it comes."""

    def __init__(self, contender: Contender, case: Case, bench: Bench, row: Row) -> None:
        self.contender, self.case, self.bench, self.row = contender, case, bench, row
        self.inputs: Inputs = random_inputs(case.shape, bench.device)
        self.bound: BoundPattern = bind(case, bench.device)

    def run(self) -> None:
        """Correctness first, then memory, times and joules."""
        backend = self.contender.make(self._trial)
        if refusal := backend.refusal(self.case.pattern, self.bench.device, self.case.shape.head_dim):
            raise UserError(refusal)
        found = self._results(backend)
        self.row.note = getattr(backend, "note", "")
        self.row.errors = _checked(relative_errors(found, reference_of(self.inputs, self.bound)))
        del found
        shape: Shape = self.case.shape
        self.row.executed_pairs = backend.executed_pairs(self.bound, shape.batch, shape.head_dim)
        forward, both = self._calls(backend)
        self.bench.release()
        self.row.peak_bytes = self.bench.peak_bytes(both)
        if self.contender.capturable:
            forward, both = (self._captured(call) for call in (forward, both))
        else:
            self.row.note = EAGER
        self.row.forward = self.bench.times(forward)
        self.row.both = self.bench.times(both)
        self.row.drawn = self.bench.energy(both, self.row.both.median_ms)

    def _calls(self, backend: Backend) -> tuple[Call, Call]:
        """Forward, keeping what a backward pass needs; forward and backward."""
        inputs, bound = self.inputs, self.bound

        def forward() -> torch.Tensor:
            return backend.attend(*inputs.leaves, bound, inputs.scale)[0]

        def both() -> object:
            return torch.autograd.grad(forward(), inputs.leaves, inputs.grad_bhsd)

        return forward, both

    def _captured(self, call: Call) -> Call:
        captured = self.bench.captured(call)
        if captured is None and EAGER not in self.row.note:
            self.row.note = ", ".join(filter(None, [self.row.note, EAGER]))
        return captured or call

    def _results(self, backend: Backend) -> Gradients:
        out = backend.attend(*self.inputs.leaves, self.bound, self.inputs.scale)[0]
        dq, dk, dv = torch.autograd.grad(out, self.inputs.leaves, self.inputs.grad_bhsd)
        return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}

    def _trial(self, backend: Backend) -> Speed:
        if refusal := backend.refusal(self.case.pattern, self.bench.device, self.case.shape.head_dim):
            raise UserError(refusal)
        forward, both = (self.bench.captured(call) or call for call in self._calls(backend))
        first, second = (self.bench.times(call, thorough=False).median_ms for call in (forward, both))
        return Speed(first, second)


def _checked(errors: dict[str, float]) -> dict[str, float]:
    """The errors; a kernel whose results are no numbers is not worth timing."""
    if broken := [name for name, error in errors.items() if not math.isfinite(error)]:
        raise UserError(f"NaN or infinite values in {', '.join(broken)}")
    return errors
