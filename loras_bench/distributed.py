"""What the processes of one job decide together: rank 0 looks at its clock and its meter, and all act on what it says.

The group has gloo for values on the CPU: an agreement neither waits for a GPU nor makes one wait, which would cost
joules in the middle of a measurement.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def join(device: str) -> Any:
    """Join the job that the launcher has started; returns the group for `meet`.

    Args:
        device: `cuda` or `cpu`.
    """
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    return dist.new_group(backend="gloo")


def agreed(value: T) -> T:
    """The value that rank 0 passes, on every rank, once all have asked; alone, the value itself."""
    # one process may have a group without gloo: torchrun asks for one, and accelerate makes it
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The mean of what the processes have, once all have asked, on their device; alone, the tensor itself."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    mean = values.clone()
    dist.all_reduce(mean)
    return mean.div_(dist.get_world_size())


def meet(group: Any, patience: timedelta) -> None:
    """Wait until all ranks are here.

    Raises:
        RuntimeError: One did not come in time.
    """
    dist.monitored_barrier(group, timeout=patience)
