"""CUDA graphs without a GPU: a stand-in that records operations with the very tensors that they read and wrote.

As on a GPU, recording leaves every value as it was, reading a value in it is an error, and a replay knows nothing but
the recorded addresses. Only memory that one graph takes from another is not imitated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """In place of torch.cuda.CUDAGraph."""

    recorded = 0
    """Tapes that were recorded so far."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.created: set[int] = set()
        self.before: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        if func._schema.is_mutable:
            for tensor in _tensors((args, kwargs)):  # more than are written to; it does no harm
                self._keep(tensor.untyped_storage())
        out = func(*args, **kwargs)
        outs = [] if func._schema.is_mutable or func.is_view else _tensors(out)
        self.created |= {tensor.untyped_storage().data_ptr() for tensor in outs}
        if not func.is_view:
            self.operations.append((func, args, kwargs, outs))
        return out

    def _keep(self, storage: torch.UntypedStorage) -> None:
        known = self.created | {kept.data_ptr() for kept, _ in self.before}
        if storage.data_ptr() not in known:
            self.before.append((storage, storage.clone()))

    def undo(self) -> None:
        for storage, content in self.before:
            storage.copy_(content)
        self.before.clear()

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, outs in self.operations:
            results = func(*args, **kwargs)
            for place, result in zip(outs, _tensors(results) if outs else [], strict=True):
                place.copy_(result)


class _Capture:
    """In place of torch.cuda.graph."""

    def __init__(self, tape: Tape, pool: object, stream: object) -> None:
        self.tape = tape

    def __enter__(self) -> None:
        self.random = torch.get_rng_state()
        self.tape.__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.tape.__exit__(kind, error, trace)
        self.tape.undo()
        torch.set_rng_state(self.random)
        if error is not None:
            raise RuntimeError("operation failed due to a previous error during capture")
        Tape.recorded += 1


class _Stream:
    def __init__(self, device: object = None) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        pass


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@pytest.fixture
def cpu_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Tape]]:
    """torch.cuda's graphs are tapes of operations on the CPU."""
    for name, replacement in {
        "CUDAGraph": Tape,
        "graph": _Capture,
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": lambda stream: nullcontext(),
        "graph_pool_handle": object,
        "synchronize": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 0,
        "reset_peak_memory_stats": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    monkeypatch.setattr(Tape, "recorded", 0)
    yield Tape
