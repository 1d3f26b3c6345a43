"""What zeros save: a trained model in each form that it can be kept and run in, stored, counted and timed side by side.

`dense` is what the model would be without them, `trained` is what the run left and computes with them, `exported` is
cut smaller (export.py), `2:4` runs on the sparse tensor cores (semi_structured.py).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loras_bench.benchmarking.bench import Call, CudaBench, Drawn, Quartiles
from loras_bench.errors import UserError
from loras_bench.models.loading import LoadedModel
from loras_bench.pruning.forms import Form, forms_of, forward_flops
from loras_bench.pruning.packing import packed_bytes, save_packed, stored, stored_bytes
from loras_bench.pruning.semi_structured import use_sparse_tensor_cores
from loras_bench.trained import for_inference

STORED = torch.bfloat16
"""Number format of files, and of products on a GPU; a CPU computes in float32."""
ROUNDS = 3
"""Each form is timed so often, all forms in turn."""
HOST_CALLS, HOST_SECONDS = 5, 0.25
"""At least so many calls are timed on a CPU in a round, for so long."""
NO_SPARSE_CORES = "the sparse tensor cores are those of a GPU"
NO_GPU, NO_LOOP, NO_READING = "there is no GPU", "no seconds were given to a loop", "no reading of the GPU's energy"
EAGER = "timed without a CUDA graph"


@dataclass(frozen=True)
class Saving:
    """One form of a model; what was not measured is None, and `reason` says why.

    Attributes:
        form: `dense`, `trained`, `exported` or `2:4`.
        parameters: That it holds; `nonzero` of them are not zero.
        dense_bytes: Of its tensors in bfloat16, every weight stored; `packed_bytes` with zeros stored as bits.
        flops: That a forward pass executes.
        times: Of a forward pass.
        drawn: By a forward pass; where there are no joules, `energy_reason` says why.
    """

    form: str
    parameters: int | None = None
    nonzero: int | None = None
    dense_bytes: int | None = None
    packed_bytes: int | None = None
    flops: float | None = None
    times: Quartiles | None = None
    drawn: Drawn | None = None
    energy_reason: str | None = None
    note: str = ""
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values with their units in the names."""
        drawn = self.drawn or Drawn(None, None)
        plain = {key: value for key, value in asdict(self).items() if key not in ("times", "drawn")}
        times = {"forward_ms": self.times and self.times._asdict()}
        return plain | times | {"energy_j": drawn.energy_j, "power_w": drawn.power_w}


class HostBench:
    """The CPU: times alone."""

    device = torch.device("cpu")

    def captured(self, call: Call) -> None:
        """There is nothing to capture."""

    def times(self, call: Call) -> Quartiles:
        """Quartiles of some calls, after two that are not timed."""
        call(), call()
        times_ms: list[float] = []
        while len(times_ms) < HOST_CALLS or sum(times_ms) < 1e3 * HOST_SECONDS:
            started = time.perf_counter()
            call()
            times_ms.append(1e3 * (time.perf_counter() - started))
        return Quartiles(*statistics.quantiles(times_ms, n=4, method="inclusive"))

    def energy(self, call: Call, call_ms: float) -> None:
        """A CPU's counters see all that runs on it."""


class _Measurement:
    """One form while it is measured; what stops it becomes its reason, and stops no other."""

    def __init__(self, form: Form, ids_bs: Tensor, bench: CudaBench | HostBench) -> None:
        self.form, self.ids_bs, self.bench = form, ids_bs, bench
        self.row = Saving(form.name, reason=form.reason) if form.reason else _as_stored(form)
        self.call: Call

    def attempt(self, step: Callable[[], Saving]) -> None:
        """Take a step, unless an earlier one failed."""
        if self.row.reason is not None:
            return
        try:
            self.row = step()
        except torch.cuda.OutOfMemoryError:
            self.row = replace(self.row, reason="out of memory")
        except (UserError, RuntimeError) as error:
            self.row = replace(self.row, reason=str(error).strip().partition("\n")[0])

    def counted(self) -> Saving:
        """With our attention installed, the FLOPs."""
        for_inference(self.form.model, self.bench.device)
        flops, unknown = forward_flops(self.form, self.ids_bs)
        notes = [f"{len(self.form.linears)} linear layers"] if self.form.linears else []
        notes += [f"not counted: {', '.join(unknown)}"] if unknown else []
        return replace(self.row, flops=flops, note=", ".join(notes))

    def prepared(self) -> Saving:
        """On the device, its forward pass ready to be called: all logits are computed."""
        device = self.bench.device
        on_gpu = device.type == "cuda"
        if self.form.linears and not on_gpu:
            raise UserError(NO_SPARSE_CORES)
        model = self.form.model.to(device, STORED if on_gpu else torch.float32)
        use_sparse_tensor_cores(model, self.form.linears)
        inputs_bs = self.form.inputs(self.ids_bs).to(device)

        def forward() -> Tensor:
            with torch.no_grad():
                logits: Tensor = model(input_ids=inputs_bs).logits
            return logits

        captured = self.bench.captured(forward)
        self.call = captured or forward
        notes = [self.row.note, EAGER if captured is None and on_gpu else ""]
        return replace(self.row, note=", ".join(filter(None, notes)))

    def timed(self) -> Saving:
        """The fastest round so far counts: what disturbs a machine makes it slower."""
        times, best = self.bench.times(self.call), self.row.times
        return replace(self.row, times=times if best is None or times.median_ms < best.median_ms else best)

    def drawn(self) -> Saving:
        assert self.row.times is not None
        drawn = self.bench.energy(self.call, self.row.times.median_ms)
        reason = None
        if drawn is None:
            reason = NO_LOOP if self.bench.device.type == "cuda" else NO_GPU
        elif drawn.energy_j is None:
            reason = NO_READING
        return replace(self.row, drawn=drawn, energy_reason=reason)


class SavingsRunner:
    """Measures the forms of models.

    Args:
        bench: Where.
        batch: Rows of the forward pass, of random tokens.
        length: Tokens of each row.
    """

    def __init__(self, bench: CudaBench | HostBench, batch: int, length: int) -> None:
        self.bench, self.batch, self.length = bench, batch, length

    def run(self, loaded: LoadedModel, out: Path | None, say: Callable[[str], None]) -> list[Saving]:
        """All forms of a model, held in memory together and timed in turn.

        Args:
            loaded: Its model is on the CPU, and is changed to bfloat16.
            out: Folder that keeps it packed (`packed.safetensors`) and, if it can be cut, `exported`.
            say: Told the name of each form when it begins.

        Raises:
            UserError: The model has no positions for so many tokens.
        """
        longest = loaded.max_positions
        if longest is not None and self.length > longest:
            raise UserError(f"--length {self.length}: {loaded.label} has {longest} positions", "give a smaller one")
        model: Any = loaded.model
        model.to(STORED).eval()
        generator = torch.Generator().manual_seed(0)
        ids_bs = torch.randint(model.config.vocab_size, (self.batch, self.length), generator=generator)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            save_packed(out / "packed.safetensors", stored(model))
        measured = []
        for form in forms_of(model, out and out / "exported"):
            say(form.name)
            measured.append(one := _Measurement(form, ids_bs, self.bench))
            one.attempt(one.counted)
            one.attempt(one.prepared)
        for _ in range(ROUNDS):
            for one in measured:
                one.attempt(one.timed)
        for one in measured:
            one.attempt(one.drawn)
        return [one.row for one in measured]


def _as_stored(form: Form) -> Saving:
    """The facts of its weights."""
    tensors = stored(form.model)
    if form.vocabulary is not None:
        tensors["row_of_token"] = form.vocabulary.row_of_token
    parameters = list(form.model.parameters())
    return Saving(
        form.name,
        parameters=sum(parameter.numel() for parameter in parameters),
        nonzero=sum(int(parameter.detach().count_nonzero()) for parameter in parameters),
        dense_bytes=stored_bytes(tensors),
        packed_bytes=packed_bytes(tensors),
    )
