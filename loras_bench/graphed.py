"""The pieces of a training step, run as they are or as CUDA graphs.

A step of small kernels is bound by their launches: a graph launches all of them at once. It replays the very addresses
that it recorded, so whatever a piece reads and writes must stay where it is: batches are copied into buffers that
stay, numbers that change from step to step are device tensors, and state is restored in place.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol

import torch
from torch import Tensor

from loras_bench.errors import ConfigError

Batch = dict[str, Tensor]
Piece = Callable[[], object]


class Runner(Protocol):
    """How the pieces of a step are run."""

    def load(self, batch: Batch) -> Batch:
        """Put a collated batch on the device."""
        ...

    def run(self, kernels: Hashable, variant: Hashable, piece: Piece) -> None:
        """Run a piece.

        Args:
            kernels: Pieces that share it need the same kernels, but for copies and additions.
            variant: With `kernels` it stands for the same operations on the same tensors, always.
            piece: What to run.
        """
        ...


class Eager:
    """Runs each piece as it is."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def load(self, batch: Batch) -> Batch:
        return to_device(batch, self.device)

    def run(self, kernels: Hashable, variant: Hashable, piece: Piece) -> None:
        piece()


class Graphs:
    """Records each piece at its first use and replays it from then on.

    The first piece of its kernels is run eagerly, which compiles and tunes them; only then is anything recorded, and
    recording runs nothing. There are as many graphs as pieces in each regime, and as many input buffers as shapes of a
    batch. All graphs take their memory from one pool: they run one after the other and hand on nothing but what lives
    outside of it.
    """

    def __init__(self, device: torch.device) -> None:
        self.recorder = Recorder(device)
        self.device = device
        self.regime: Hashable = None
        self._inputs: dict[Hashable, Batch] = {}
        self._rehearsed: set[Hashable] = set()
        self._replays: dict[Hashable, Piece] = {}

    def __len__(self) -> int:
        """Graphs held."""
        return len(self._replays)

    def enter(self, regime: Hashable) -> None:
        """Pieces run from now on are those of this regime: methods have changed the operations."""
        self.regime = regime

    def load(self, batch: Batch) -> Batch:
        """Copy a batch into the buffers of its shapes; from pinned memory, so that the host runs ahead."""
        shapes = shapes_of(batch)
        if shapes not in self._inputs:
            self._inputs[shapes] = {
                name: torch.empty_like(tensor, device=self.device) for name, tensor in batch.items()
            }
        inputs = self._inputs[shapes]
        for name, tensor in batch.items():
            inputs[name].copy_(pinned(tensor, self.device), non_blocking=True)
        return inputs

    def run(self, kernels: Hashable, variant: Hashable, piece: Piece) -> None:
        """Run a piece; see `Runner`.

        Raises:
            ConfigError: It cannot be recorded.
        """
        rehearsal, key = (self.regime, kernels), (self.regime, kernels, variant)
        known = rehearsal in self._rehearsed
        if not known:
            self.recorder.rehearse(piece)
            self._rehearsed.add(rehearsal)
        if key not in self._replays:
            self._replays[key] = self.recorder.record(piece)
        if known:
            self._replays[key]()


class Recorder:
    """What torch asks of those who record CUDA graphs: a side stream, a rehearsal on it, one memory pool.

    Attributes:
        temporary_bytes: The most that one piece holds beside what lives outside of it. A replay allocates nothing, so
            the allocator's own peak misses it.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.temporary_bytes = 0
        self.pool = torch.cuda.graph_pool_handle()

    def rehearse(self, piece: Piece) -> None:
        """Run a piece on the side stream, so that what it leaves for later passes belongs to that stream."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            piece()
        current.wait_stream(self.stream)

    def record(self, piece: Piece) -> Piece:
        """Record a piece without running it; returns what replays it.

        Raises:
            ConfigError: It waits for the device, or does something else that a graph cannot hold.
            torch.OutOfMemoryError: As it was raised.
        """
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                piece()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            cause = error.__context__ or error  # leaving a broken capture raises a second, less telling error
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            reason = str(cause).strip().partition("\n")[0]
            message = f"training.cuda_graph: the step cannot be captured: {reason}"
            raise ConfigError(message, "set training.cuda_graph: false") from error
        self.temporary_bytes = max(self.temporary_bytes, torch.cuda.max_memory_allocated() - before)
        return graph.replay


def shapes_of(batch: Batch) -> Hashable:
    """What two batches have in common that run the same operations."""
    return tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in sorted(batch.items()))


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy in memory from which a GPU reads without the host waiting; the tensor itself for other devices."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a collated batch, without the host waiting for the GPU."""
    return {name: pinned(tensor, device).to(device, non_blocking=True) for name, tensor in batch.items()}
