"""AdamW on float32 master weights, the same for every arm.

The model computes in its own number format; the optimizer holds each trainable parameter, its gradient and its
moments in float32. A bfloat16 parameter would lose updates smaller than 1/256 of its value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

if TYPE_CHECKING:
    from loras_bench.kernels.strided_copy import StridedCopy

EPSILON = 1e-8
ALIGNMENT = 4
"""Elements."""


def cosine_with_warmup(step: int, steps: int, warmup_fraction: float) -> float:
    """Factor of the learning rate at a step (from 0): linear rise, then half a cosine that ends at zero."""
    warmup = max(1, round(warmup_fraction * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class MasterAdamW:
    """AdamW whose parameters are float32 masters of the model's, packed so that a step takes few kernels.

    The masters of a group lie one after the other in one buffer, and so do their gradients and moments: clipping and
    the update see one tensor a group, however many adapters there are. A model in float32 has no copies: its parameters
    become views of the masters. No tensor here is ever replaced, so a CUDA graph that recorded a step stays valid
    after `load_state_dict`, and nothing waits for the device.

    Args:
        model: On its device. Its parameters with `requires_grad` are trained; call before the model is cast, so that
            masters are exact.
        groups: Extra optimizer groups of methods: `params`, and where they differ `lr` and `weight_decay`.
        learning_rate: Peak learning rate, of groups without an `lr` of their own; `set_rate` scales it.
        weight_decay: Decoupled decay of matrices; vectors (norms, biases) do not decay, nor does what modules list as
            `undecayed`.
        betas: Of the moments.
        dtype: What the model will be cast to.
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
        listed = [dict(group) for group in groups]
        special = {id(parameter) for group in listed for parameter in group["params"]}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in special]
        spared = {id(parameter) for module in model.modules() for parameter in getattr(module, "undecayed", ())}
        decays = [p.ndim >= 2 and id(p) not in spared for p in rest]
        listed.append({"params": [p for p, yes in zip(rest, decays, strict=True) if yes], "weight_decay": weight_decay})
        listed.append({"params": [p for p, yes in zip(rest, decays, strict=True) if not yes], "weight_decay": 0.0})
        defaults = {"lr": learning_rate, "weight_decay": weight_decay}
        self.groups = [_Group(**(defaults | group)) for group in listed if group["params"]]
        self.betas = betas
        self.parameters: list[Tensor] = [p for group in self.groups for p in group.params]
        self.masters: list[Tensor] = [m for group in self.groups for m in group.views(group.master)]
        self.gradients: list[Tensor] = [g for group in self.groups for g in group.views(group.gradient)]
        self._apart: StridedCopy | None = None
        if dtype is torch.float32:
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                parameter.data = master

    @torch.no_grad()
    def collect_gradients(self, *, first: bool) -> None:
        """Take the model's gradients into the masters' and drop them: accumulation happens in float32.

        A parameter that the loss did not reach has a gradient of 0.

        Args:
            first: Of the step: what was collected before is forgotten.
        """
        slots = self.gradients
        if not first:  # one conversion of all, then one addition a group: `add_` of other formats goes tensor by tensor
            fresh = [torch.zeros_like(group.gradient) for group in self.groups]
            slots = [part for group, new in zip(self.groups, fresh, strict=True) for part in group.views(new)]
        found = [(s, p.grad) for s, p in zip(slots, self.parameters, strict=True) if p.grad is not None]
        if first and len(found) < len(slots):
            torch._foreach_zero_(slots)
        if found:
            torch._foreach_copy_([slot for slot, _ in found], [gradient for _, gradient in found])
        if not first:
            torch._foreach_add_([group.gradient for group in self.groups], fresh)
        for parameter in self.parameters:
            parameter.grad = None

    def set_rate(self, scale: float) -> None:
        """Set the learning rate of the next steps to `scale` times its peak: written to the device, float32."""
        for group in self.groups:
            group.rate.fill_(group.lr * scale)

    @torch.no_grad()
    def step(self, max_grad_norm: float) -> Tensor:
        """Clip, update the masters, write them to the model.

        Returns:
            The norm of all gradients before clipping, a device scalar.
        """
        gradients = [group.gradient for group in self.groups]
        norm = torch.nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, (max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        beta1, beta2 = self.betas
        for group in self.groups:
            adamw(
                [group.master],
                [group.gradient],
                [group.exp_avg],
                [group.exp_avg_sq],
                [],
                [group.steps],
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group.rate,
                weight_decay=group.weight_decay,
                eps=EPSILON,
                maximize=False,
            )
        self.write_back()
        return norm

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the model's parameters, but for those that are their own masters."""
        pairs = zip(self.parameters, self.masters, strict=True)
        copies = [(parameter, master) for parameter, master in pairs if parameter.data_ptr() != master.data_ptr()]
        apart = [pair for pair in copies if pair[0].is_cuda and not pair[0].is_contiguous()]
        whole = [pair for pair in copies if pair[0].is_contiguous() or not pair[0].is_cuda]
        if whole:
            torch._foreach_copy_([parameter for parameter, _ in whole], [master for _, master in whole])
        if apart:
            if self._apart is None or self._apart.places != [parameter.data_ptr() for parameter, _ in apart]:
                from loras_bench.kernels.strided_copy import StridedCopy  # views of such matrices come with triton

                self._apart = StridedCopy([parameter for parameter, _ in apart], [master for _, master in apart])
            self._apart()

    def state_dict(self) -> dict[str, Tensor]:
        """Masters and moments as one flat dict of tensors, for safetensors and for snapshots."""
        return {
            f"{name}.{index}": getattr(group, name)
            for index, group in enumerate(self.groups)
            for name in ("master", "exp_avg", "exp_avg_sq", "steps")
        }

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned, in place."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(tensors[name])
        self.write_back()


class _Group:
    """Parameters that share their settings, and the float32 buffers (elements,) of all of them.

    Each parameter's slot begins at a multiple of 16 bytes, as vectorised kernels want; the padding stays 0.
    """

    def __init__(self, params: Sequence[Tensor], lr: float, weight_decay: float) -> None:
        self.params, self.lr, self.weight_decay = list(params), lr, weight_decay
        self._slots = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in self.params]
        device = self.params[0].device
        size = sum(self._slots)
        self.master, self.gradient, self.exp_avg, self.exp_avg_sq = (torch.zeros(size, device=device) for _ in range(4))
        self.steps, self.rate = torch.zeros((), device=device), torch.zeros((), device=device)
        torch._foreach_copy_(self.views(self.master), [parameter.detach() for parameter in self.params])

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The slots of a buffer in the shapes of the parameters."""
        parts = buffer.split(self._slots)
        return [part[: p.numel()].view(p.shape) for part, p in zip(parts, self.params, strict=True)]
