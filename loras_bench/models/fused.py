"""What the fused forward passes of all architectures share: their linear layers, putting in place and taking out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loras_bench.errors import UserError
from loras_bench.kernels.linear import LinearGroup, why_not

if TYPE_CHECKING:
    from loras_bench.attention.dispatch import ModelAttention

TANH = {"gelu": False, "gelu_new": True, "gelu_pytorch_tanh": True}
"""GELU by transformers' names, and whether each is the approximation by a hyperbolic tangent."""


class Separate:
    """Linear layers that cannot be one product, called one after the other; stands in for a `LinearGroup`."""

    border = 0

    def __init__(self, modules: Sequence[nn.Module], reason: str) -> None:
        self.modules, self.reason = modules, reason

    def __call__(self, x_nd: Tensor, wants_output: bool = True) -> Tensor:
        outputs = [module(x_nd) for module in self.modules]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


class FusedForward(ABC):
    """A chain of fused operations in the place of a module's forward pass; the modules keep their parameters.

    Args:
        base: A base model of transformers, adapters attached, on its device and in its number format, with
            `ModelAttention` installed.
        place: The module of it whose forward pass is replaced.
        layers: The model's layers.
    """

    groups: ClassVar[Mapping[str, Sequence[str]]]
    """Linear layers of one layer that read the same input, in the order of use."""

    def __init__(self, base: Any, place: nn.Module, layers: Sequence[nn.Module]) -> None:
        self.base, self.place, self.modules = base, place, layers
        self.attention: ModelAttention = base.model_attention
        self.linears = [
            {name: _grouped([layer.get_submodule(path) for path in paths]) for name, paths in self.groups.items()}
            for layer in layers
        ]
        """The groups of each layer."""
        self.draws = any(isinstance(module, nn.Dropout) and module.p > 0 for module in base.modules())
        """Whether what is computed twice, for checkpointing, must draw the same random numbers twice."""
        self.recomputes = False
        """Whether a piece is being computed again: for what its gradient needs, so its last product can be left out."""

    @staticmethod
    @abstractmethod
    def why_not(config: Any) -> str | None:
        """Why a model of this configuration keeps transformers' forward pass; None if it can be fused."""

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What `place` computes."""

    @classmethod
    def install(cls, base: Any) -> Self:
        """Pack the linear layers of a base model and replace its forward pass.

        Raises:
            ValueError: The model cannot be fused; `why_not` tells beforehand.
        """
        if reason := cls.why_not(base.config):
            raise ValueError(reason)
        fused = cls(base)  # type: ignore[call-arg]
        for group in fused._packable():
            group.pack()
        fused.place.forward = fused.forward  # type: ignore[method-assign]
        return fused

    def remove(self) -> None:
        """Give the model its own forward pass and its parameters memory of their own: before merging and saving."""
        del self.place.forward
        for group in self._packable():
            group.unpack()

    def describe(self) -> dict[str, Any]:
        """How many groups of linear layers are fused, and which are not and why; for the record."""
        refusals = {
            f"layers.{number}.{name}": group.reason
            for number, groups in enumerate(self.linears)
            for name, group in groups.items()
            if isinstance(group, Separate)
        }
        return described(type(self).__name__, len(self._packable()), refusals)

    def runner(self, piece: Callable[..., Any]) -> Callable[..., Any]:
        """The function of a piece of a layer, recomputed in the backward pass if the model checkpoints.

        The pieces are what comes before attention and what comes after it. Attention is not recomputed: what it reads
        and gives is kept, and with the inputs of the pieces that is a third of what a layer keeps otherwise (Llama).
        """
        if not (self.base.gradient_checkpointing and self.base.training):
            return piece
        contexts = lambda: (nullcontext(), self._recomputing())  # noqa: E731
        return partial(checkpoint, piece, use_reentrant=False, preserve_rng_state=self.draws, context_fn=contexts)

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        self.recomputes = True
        try:
            yield
        finally:
            self.recomputes = False

    def _packable(self) -> list[LinearGroup]:
        return [group for groups in self.linears for group in groups.values() if isinstance(group, LinearGroup)]


def described(forward: str, fused: int, refusals: Mapping[str, str]) -> dict[str, Any]:
    """Whose forward pass runs, how many groups of linear layers are fused, and which are not, by the reason."""
    separate: defaultdict[str, list[str]] = defaultdict(list)
    for name, reason in refusals.items():
        separate[reason].append(name)
    return {"forward": forward, "fused_groups": fused, "separate_groups": dict(separate)}


def refuse_unsupported(past_key_values: Any, requests: Mapping[str, Any]) -> None:
    """Refuse what only transformers' forward passes do.

    Raises:
        UserError: For a key/value cache, and outputs of every layer.
    """
    if past_key_values is not None:
        raise UserError("attention with a key/value cache is not supported", "pass use_cache=False")
    if requests.get("output_hidden_states") or requests.get("output_attentions"):
        raise UserError("the fused forward pass returns the last hidden states only", "use the transformers path")


def _grouped(modules: Sequence[nn.Module]) -> LinearGroup | Separate:
    reason = why_not(modules)
    return LinearGroup.of(modules) if reason is None else Separate(modules, reason)
