"""AdamW on float32 master weights, the same for every arm.

The model computes in its own number format; the optimizer holds each trainable parameter, its gradient and its
moments in float32. A bfloat16 parameter would lose updates smaller than 1/256 of its value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def cosine_with_warmup(step: int, steps: int, warmup_fraction: float) -> float:
    """Factor of the learning rate at a step (from 0): linear rise, then half a cosine that ends at zero."""
    warmup = max(1, round(warmup_fraction * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class MasterAdamW:
    """Fused AdamW whose parameters are float32 copies of the model's (the same tensors where those are float32).

    Args:
        model: Its parameters with `requires_grad` are trained; call before the model is cast, so that masters are
            exact.
        groups: Extra optimizer groups of methods; each holds `params` and settings of its own.
        learning_rate: Peak learning rate, of groups without an `lr` of their own; `step` scales it.
        weight_decay: Decoupled decay of matrices; vectors (norms, biases) do not decay.
        betas: Of the moments.
        dtype: What the model will be cast to; masters are copies unless it is float32.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Iterable[Mapping[str, Any]],
        learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float],
        dtype: torch.dtype,
    ) -> None:
        extra = [dict(group) for group in groups]
        special = {id(parameter) for group in extra for parameter in group["params"]}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in special]
        extra.append({"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay})
        extra.append({"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0})
        self.parameters: list[Tensor] = [p for group in extra for p in group["params"]]
        self.copies = dtype is not torch.float32
        masters = {id(p): p.detach().to(torch.float32, copy=True) if self.copies else p for p in self.parameters}
        self.masters = [masters[id(p)] for p in self.parameters]
        for group in extra:
            group["params"] = [masters[id(p)] for p in group["params"]]
        self.adam = torch.optim.AdamW(
            [group for group in extra if group["params"]],
            lr=learning_rate,
            betas=betas,
            weight_decay=weight_decay,
            fused=True,
        )
        self.peaks: list[float] = [group["lr"] for group in self.adam.param_groups]

    def collect_gradients(self) -> None:
        """Add the model's gradients to the masters' and drop them: accumulation happens in float32."""
        if not self.copies:
            return
        fresh: list[tuple[Tensor, Tensor]] = []
        held: list[tuple[Tensor, Tensor]] = []
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = torch.empty_like(master)
                fresh.append((master.grad, parameter.grad))
            else:
                held.append((master.grad, parameter.grad.float()))
        if fresh:
            torch._foreach_copy_([mine for mine, _ in fresh], [new for _, new in fresh])
        if held:
            torch._foreach_add_([mine for mine, _ in held], [new for _, new in held])
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, scale: float, max_grad_norm: float) -> Tensor:
        """Clip, update the masters at `scale` times the peak learning rate, write them to the model.

        Returns:
            The norm of all gradients before clipping, a device scalar.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.masters, max_grad_norm)
        for group, peak in zip(self.adam.param_groups, self.peaks, strict=True):
            group["lr"] = peak * scale
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        if self.copies:
            self.write_back()
        return norm

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the model's parameters."""
        if self.copies:
            torch._foreach_copy_(self.parameters, self.masters)

    def state_dict(self) -> dict[str, Tensor]:
        """Masters and moments as one flat dict of tensors, for safetensors and for snapshots."""
        tensors = {f"master.{index}": master.detach() for index, master in enumerate(self.masters)}
        for index, master in enumerate(self.masters):
            for name, value in self.adam.state.get(master, {}).items():
                tensors[f"{name}.{index}"] = value
        return tensors

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned, moments that it lacks included (they go back to none)."""
        for index, master in enumerate(self.masters):
            master.copy_(tensors[f"master.{index}"])
            names = ("step", "exp_avg", "exp_avg_sq")
            if f"exp_avg.{index}" in tensors:
                state = self.adam.state[master]
                for name in names:
                    value = tensors[f"{name}.{index}"].to(master.device)
                    if name in state:
                        state[name].copy_(value)
                    else:
                        state[name] = value.clone()
            else:
                self.adam.state.pop(master, None)
        self.write_back()
