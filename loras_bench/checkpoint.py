"""The state of a run between two steps: snapshots in memory and checkpoints on disk (safetensors and JSON, no
pickles).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loras_bench.methods.base import Method
from loras_bench.optimizer import MasterAdamW
from loras_bench.plan import CHECKPOINT_FILE

TENSORS, FACTS = "checkpoint.safetensors", CHECKPOINT_FILE


class TrainingState:
    """What an optimizer step changes: master weights, moments, the methods' tensors and the random numbers' states."""

    def __init__(self, optimizer: MasterAdamW, methods: Sequence[Method[Any]], device: torch.device) -> None:
        self.optimizer, self.methods, self.device = optimizer, methods, device

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state under a flat name, not copied; all processes of a job call it together."""
        state = {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state_dict().items()}
        for index, method in enumerate(self.methods):
            state |= {f"method.{index}.{name}": tensor for name, tensor in method.state_dict().items()}
        state["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            state["random.cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the state on the same device, for steps that will be undone."""
        return {name: tensor.detach().clone() for name, tensor in self.tensors().items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a snapshot or a checkpoint."""
        self.optimizer.load_state_dict(_under("optimizer.", state))
        for index, method in enumerate(self.methods):
            method.load_state_dict(_under(f"method.{index}.", state))
        torch.set_rng_state(state["random.cpu"].cpu())
        if self.device.type == "cuda" and "random.cuda" in state:
            torch.cuda.set_rng_state(state["random.cuda"].cpu(), self.device)


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def save_checkpoint(folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a checkpoint; a kill at any moment leaves the earlier one or this one.

    The facts name the file of the state's tensors that belongs to them, and are renamed into place last.
    """
    name = f"step{facts['step']}-{TENSORS}"
    temporary = folder / f".{name}.tmp"
    save_file({key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}, temporary)
    os.replace(temporary, folder / name)
    facts_file = folder / f".{FACTS}.tmp"
    facts_file.write_text(json.dumps({**facts, "tensors": name}), encoding="utf-8")
    os.replace(facts_file, folder / FACTS)
    for old in folder.glob(f"step*-{TENSORS}"):
        if old.name != name:
            old.unlink()


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The newest checkpoint of a run; None if there is none, or none that can be read."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        return facts, load_file(folder / facts["tensors"])
    except (OSError, ValueError, TypeError, KeyError, SafetensorError):
        return None


def remove_checkpoint(folder: Path) -> None:
    """A finished run needs none."""
    (folder / FACTS).unlink(missing_ok=True)  # first: facts without their tensors would be no checkpoint
    for file in (*folder.glob(f"*{TENSORS}*"), *folder.glob(f".{FACTS}.*")):
        file.unlink()
