"""The one linear seam: layers that read the same input as one matrix product, their LoRA adapters inside it.

A group of layers holds one bordered matrix M = [[W, B], [A, 0]]: W (n, k) the base weights, one below the other;
A (r, k) the adapters' first factors; B (n, r) their second ones, block-diagonal. With s the adapters' scaling:

    forward    u = s x A^T    y  = [x | u] [W | B]^T
    backward   v = s dy B     dx = [dy | v] [W ; A]     dB = dy^T u     dA = v^T x

which are LoRA's equations (Hu et al. 2021) without an elementwise pass. The way back is the way forward through M^T, so
one pair of functions serves both. u and v lie in the borders of x and dy where these have one (bordered.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from loras_bench.kernels.bordered import with_border

RANK_MULTIPLE = 16
"""The sum of a group's ranks is rounded up to this, the depth of one tensor-core product; zeros fill the rest."""


class LinearGroup:
    """One or several linear layers with the same input, as one product. Build it with `LinearGroup.of`.

    `pack` moves the modules' parameters into one bordered matrix and makes them views of it: whoever writes them in
    place (optimizers, `load_state_dict`) or reads them (PEFT, `state_dict`) sees them as before. Call it once the model
    has its type and device, and `unpack` before adapters are merged or weights saved.

    Attributes:
        widths: Outputs of each module; the group's output holds them side by side.
        border: Spare columns that x and dy should have: the sum of the ranks, rounded up; 0 without adapters.
        slots: Where each parameter lies in the matrix.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.widths = [layer.shape[0] for layer in layers]
        self.border = -(-sum(layer.rank for layer in layers) // RANK_MULTIPLE) * RANK_MULTIPLE
        self._layers = layers
        self.slots = _slots(layers)
        self._packed: Packed | None = None

    @classmethod
    def of(cls, modules: Sequence[nn.Module]) -> LinearGroup:
        """The group of these modules: nn.Linear, transformers' Conv1D, or PEFT's LoRA layer around either.

        Raises:
            ValueError: They cannot be one product; `why_not` tells beforehand.
        """
        if reason := why_not(modules):
            raise ValueError(reason)
        return cls([read_layer(module) for module in modules])

    def pack(self) -> None:
        """Move the parameters into one bordered matrix, and the biases into one vector."""
        first = self.slots[0].parameter
        if any((slot.parameter.dtype, slot.parameter.device) != (first.dtype, first.device) for slot in self.slots):
            raise ValueError("base and adapters differ in type or device: pack after the model is cast and moved")
        outputs, inputs = sum(self.widths), self._layers[0].shape[1]
        shape = outputs + self.border, inputs + self.border
        if self.border == 0 and all(layer.transposed for layer in self._layers):
            # what trains must have its rows in one piece, for the optimizer: here Conv1D's weights, else the adapters
            matrix = first.new_zeros(shape[::-1], requires_grad=False).t()
        else:
            matrix = first.new_zeros(shape, requires_grad=False)
        blocks = {
            "weight": matrix[:outputs, :inputs],
            "a": matrix[outputs:, :inputs],
            "b": matrix[:outputs, inputs:],
            "bias": first.new_zeros(outputs, requires_grad=False),
        }
        for slot in self.slots:
            place = slot.of(blocks[slot.block])
            place.copy_(slot.parameter.data)
            slot.parameter.data = place
        bias_n = blocks["bias"] if any(layer.bias is not None for layer in self._layers) else None
        self._packed = Packed(matrix, bias_n, self.border, self._scaling(matrix))

    def unpack(self) -> None:
        """Give every parameter contiguous storage of its own again."""
        for slot in self.slots:
            slot.parameter.data = slot.parameter.data.clone(memory_format=torch.contiguous_format)
        self._packed = None

    def __call__(self, x: Tensor, wants_output: bool = True) -> Tensor:
        """The outputs (..., sum of widths) for x (..., inputs). What stood in the border of x is overwritten.

        Without `wants_output` nothing but what the gradients need is computed, and the outputs may be anything: for
        recomputation under checkpointing, where nobody reads those of the last product.
        """
        y_tn: Tensor = _GroupProduct.apply(x.flatten(0, -2), self.packed, self.slots, wants_output, *self.parameters)
        return y_tn.view(*x.shape[:-1], -1)

    @property
    def packed(self) -> Packed:
        """The matrix that the group's products read (kernels/sliced.py takes parts of it)."""
        if self._packed is None:
            raise RuntimeError("pack the group before it is called")
        return self._packed

    @property
    def parameters(self) -> list[nn.Parameter]:
        """In the order of the slots."""
        return [slot.parameter for slot in self.slots]

    def _scaling(self, matrix: Tensor) -> float | Tensor:
        """One factor where the adapters agree, for the product's alpha; else one for each column of the border."""
        factors = [layer.scaling for layer in self._layers for _ in range(layer.rank)] or [1.0]
        if len(set(factors)) == 1:
            return factors[0]
        factors += [1.0] * (self.border - len(factors))
        dtype = torch.promote_types(matrix.dtype, torch.float32)  # a factor of 4 / 3 is off by 0.3 % in bfloat16
        return torch.tensor(factors, dtype=dtype, device=matrix.device)


def why_not(modules: Sequence[nn.Module]) -> str | None:
    """Why these modules cannot be one `LinearGroup`; None if they can."""
    from peft.tuners.lora import Linear as LoraLinear

    for module in modules:
        base = module.base_layer if type(module) is LoraLinear else module
        if type(base) not in (nn.Linear, Conv1D):
            return f"{type(base).__name__} is not a plain linear layer"
        if type(module) is LoraLinear and (reason := _why_not_adapted(module)):
            return reason
    if len({read_layer(module).shape[1] for module in modules}) != 1:
        return "the layers differ in their number of inputs"
    return None


def _why_not_adapted(module: Any) -> str | None:
    """The rules of PEFT's LoRA layer under which it is y = W x + b + s B A x."""
    if module.merged or module.disable_adapters:
        return "its adapters are merged or disabled"
    names = [name for name in module.active_adapters if name in module.lora_A]
    if len(names) != 1:
        return f"{len(names)} adapters are active, not one"
    (name,) = names
    if name in module.lora_variant:
        return f"its adapter is a variant: {type(module.lora_variant[name]).__name__}"
    if not isinstance(module.lora_dropout[name], nn.Identity):
        return "its adapter has dropout"
    return "its adapter has a bias" if module.lora_B[name].bias is not None else None


@dataclass(frozen=True)
class Layer:
    """What one module computes with; its adapter is `a` (r, k) and `b` (n, r)."""

    weight: nn.Parameter
    transposed: bool
    bias: nn.Parameter | None
    a: nn.Parameter | None = None
    b: nn.Parameter | None = None
    scaling: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        rows, columns = self.weight.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def rank(self) -> int:
        return 0 if self.a is None else len(self.a)


def read_layer(module: Any) -> Layer:
    base = getattr(module, "base_layer", module)
    transposed = isinstance(base, Conv1D)
    if base is module:
        return Layer(base.weight, transposed, base.bias)
    (name,) = (name for name in module.active_adapters if name in module.lora_A)
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    return Layer(base.weight, transposed, base.bias, a, b, float(module.scaling[name]))


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies in its block (`weight`, `bias`, `a` or `b`), and its gradient in that of the block."""

    parameter: nn.Parameter
    block: str
    index: tuple[slice, ...]
    transposed: bool = False

    def of(self, block: Tensor) -> Tensor:
        part = block[self.index]
        return part.t() if self.transposed else part


def _slots(layers: Sequence[Layer]) -> list[Slot]:
    """Rows of W, of B and of the bias by layer, one below the other; rows of A and columns of B by adapter."""
    slots, output, column = [], 0, 0
    for layer in layers:
        rows, ranks = slice(output, output + layer.shape[0]), slice(column, column + layer.rank)
        slots.append(Slot(layer.weight, "weight", (rows,), layer.transposed))
        if layer.bias is not None:
            slots.append(Slot(layer.bias, "bias", (rows,)))
        if layer.a is not None and layer.b is not None:
            slots.append(Slot(layer.a, "a", (ranks,)))
            slots.append(Slot(layer.b, "b", (rows, ranks)))
        output, column = rows.stop, ranks.stop
    return slots


@dataclass(frozen=True)
class Packed:
    """M (n + r, k + r), the bias (n), and the factor of the adapters: one number, or one for each of the r columns."""

    matrix: Tensor
    bias_n: Tensor | None
    border: int
    scaling: float | Tensor


class _GroupProduct(torch.autograd.Function):
    """Keeps x and u; the parameters are arguments so that autograd asks for their gradients."""

    @staticmethod
    def forward(
        ctx: Any, x_tk: Tensor, packed: Packed, slots: list[Slot], wants_output: bool, *parameters: Tensor
    ) -> Tensor:
        across = packed.matrix.t()
        u_tr = low_rank(x_tk, across, packed)
        wanted = blocks_of(slots, ctx.needs_input_grad[4:])
        # detached: autograd takes a write into the border of a view for a write into x, and would refuse to go on
        kept_tk = x_tk.detach() if wanted & {"weight", "a"} else None
        ctx.save_for_backward(kept_tk, u_tr if "b" in wanted else None)
        ctx.packed, ctx.slots, ctx.wanted = packed, slots, wanted
        if not wants_output:
            return x_tk.new_empty(len(x_tk), across.shape[1] - packed.border)
        return _product(x_tk, u_tr, across, packed.bias_n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_tn: Tensor) -> tuple[Tensor | None, ...]:
        x_tk, u_tr = ctx.saved_tensors
        packed, wanted, wants_dx = ctx.packed, ctx.wanted, ctx.needs_input_grad[0]
        v_tr = low_rank(dy_tn, packed.matrix, packed) if wants_dx or "a" in wanted else None
        dx_tk = _product(dy_tn, v_tr, packed.matrix, None) if wants_dx else None
        blocks: dict[str, Tensor] = {}
        if "weight" in wanted:
            laid_across = packed.matrix.stride(0) == 1  # the gradient lies as the weight does
            blocks["weight"] = torch.mm(x_tk.t(), dy_tn).t() if laid_across else torch.mm(dy_tn.t(), x_tk)
        if "bias" in wanted:
            blocks["bias"] = dy_tn.sum(0)
        if "a" in wanted:
            assert v_tr is not None
            blocks["a"] = torch.mm(v_tr.t(), x_tk)
        if "b" in wanted:
            blocks["b"] = torch.mm(u_tr.t(), dy_tn).t()
        return dx_tk, None, None, None, *gradients_of(ctx.slots, ctx.needs_input_grad[4:], blocks)


def blocks_of(slots: Sequence[Slot], needed: Sequence[bool]) -> set[str]:
    """The blocks of which a parameter's gradient is asked for."""
    return {slot.block for slot, asked in zip(slots, needed, strict=True) if asked}


def gradients_of(slots: Sequence[Slot], needed: Sequence[bool], blocks: Mapping[str, Tensor]) -> list[Tensor | None]:
    """Each parameter's gradient, a view of that of its block; None where it is not asked for."""
    return [slot.of(blocks[slot.block]) if asked else None for slot, asked in zip(slots, needed, strict=True)]


def low_rank(x_tk: Tensor, m: Tensor, packed: Packed) -> Tensor | None:
    """The product u (t, r) = s x m[:k, n:], in the border of x, if it has one; None without adapters. m is M or M^T."""
    if packed.border == 0:
        return None
    whole = with_border(x_tk, packed.border)
    u_tr = x_tk.new_empty(len(x_tk), packed.border) if whole is None else whole[:, -packed.border :]
    factor_kr = m[: x_tk.shape[1], -packed.border :]
    if isinstance(packed.scaling, float):
        return torch.addmm(u_tr, x_tk, factor_kr, beta=0, alpha=packed.scaling, out=u_tr)
    torch.mm(x_tk, factor_kr, out=u_tr)
    return u_tr.mul_(packed.scaling)


def _product(x_tk: Tensor, u_tr: Tensor | None, m: Tensor, bias_n: Tensor | None) -> Tensor:
    """[x | u] m[:, :n] + bias: one product if u is the border of x, else a second one adds that of u."""
    if u_tr is None:
        return _affine(x_tk, m, bias_n)
    rank = u_tr.shape[1]
    both = m[:, :-rank]
    if (whole := with_border(x_tk, rank)) is not None:
        return _affine(whole, both, bias_n)
    y_tn = _affine(x_tk, both[:-rank], bias_n)
    return torch.addmm(y_tn, u_tr, both[-rank:], out=y_tn)


def _affine(x_tk: Tensor, m_kn: Tensor, bias_n: Tensor | None) -> Tensor:
    return torch.mm(x_tk, m_kn) if bias_n is None else torch.addmm(bias_n, x_tk, m_kn)
