"""From a trained model to one with folded attention: read each layer, fit its rows and its output, put it in place.

Every layer is fitted to what it computes in the dense model, before any is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from loras_bench.attention.families import is_causal
from loras_bench.folding.attention import FoldedAttention, FoldShape
from loras_bench.folding.factors import Initialisation, Moments, fold_rows, ridge
from loras_bench.folding.families import DenseAttention, LinearMap, read_attention, with_constant

if TYPE_CHECKING:
    from loras_bench.attention.binding import AttentionBatch

Feed = Callable[[], None]
"""Runs the model over the calibration data, without gradients or dropout."""


@dataclass(frozen=True)
class Folding:
    """What is folded, and how.

    `heads` is whether each head keeps rows of its own or all share them; `penalty` that of the fit of the output
    (`factors.ridge`). The other fields are those of `FoldShape` and `fold_rows`.
    """

    heads: Literal["per_head", "shared"]
    rank: int
    initialisation: Initialisation
    diagonal: bool
    penalty: float

    @property
    def fits_outputs(self) -> bool:
        """Whether the output is a fit: a head with weights of its own reads its own channels alone."""
        return self.diagonal and self.heads == "per_head"

    @property
    def reads_data(self) -> bool:
        return self.fits_outputs or self.initialisation == "whitened"


@torch.no_grad()
def fold_model(base: Any, layers: Sequence[int], folding: Folding, feed: Feed) -> None:
    """Replace the attention of these layers by folded ones.

    Args:
        base: A base model with `ModelAttention` installed and dense patterns.
        layers: Which, counted from 0.
        folding: How.
        feed: Called where the folding reads data, at most twice.
    """
    dense = {layer: read_attention(base, layer) for layer in layers}
    moments = _read_moments(dense, feed) if folding.initialisation == "whitened" else {}
    folded = {layer: empty_fold(base, layer, folding) for layer in layers}
    for layer, block in folded.items():
        _write_rows(block, dense[layer], folding, moments.get(layer))
    if folding.fits_outputs:
        outputs = _fit_outputs(dense, folded, folding.penalty, feed)
    elif folding.diagonal:
        outputs = {layer: output_over_inputs(dense[layer], folded[layer].shape) for layer in layers}
    else:
        outputs = {}
    for layer, block in folded.items():
        place(dense[layer], block, outputs.get(layer))


@torch.no_grad()
def fold_sizes(base: Any, layers: Sequence[int], folding: Folding) -> None:
    """As `fold_model`, but for the values: to count parameters, or for saved weights to be read into."""
    for layer in layers:
        dense, block = read_attention(base, layer), empty_fold(base, layer, folding)
        place(dense, block, output_over_inputs(dense, block.shape) if folding.diagonal else None)


def place(dense: DenseAttention, block: FoldedAttention, output: LinearMap | None) -> None:
    """Put a folded block where the dense one is, with another output projection where there is one."""
    block.train(dense.module.training)
    setattr(dense.owner, dense.name, block)
    if output is not None:
        output.write(dense.output)


def empty_fold(base: Any, layer: int, folding: Folding) -> FoldedAttention:
    """A folded block of the sizes that the layer's would have, on its device and in its type; its rows are 0.

    It shares the model's attention, if that is installed already.
    """
    dense, config = read_attention(base, layer), base.config
    heads = config.num_attention_heads
    shape = FoldShape(
        hidden=config.hidden_size,
        heads=heads,
        key_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=len(dense.query.weight_oi) // heads,
        groups=heads if folding.heads == "per_head" else 1,
        rank=folding.rank,
        rotary=dense.rotary,
        scaling=float(dense.scaling),
    )
    value = None if folding.diagonal else dense.value.as_module(like=dense.output)
    block = FoldedAttention(shape, layer, is_causal(config), value, dense.inside).to(dense.query.weight_oi)
    if hasattr(base, "model_attention"):
        base.model_attention.take(block)
    return block


def output_over_inputs(dense: DenseAttention, shape: FoldShape) -> LinearMap:
    """The output projection that reads the layer's mixed inputs themselves: W_o W_V, and W_o b_V + b_o.

    Exact where all heads share their attention weights P, whose rows sum to 1:
    (P (X W_V^T + 1 b_V^T)) W_o^T + b_o = (P X) (W_o W_V)^T + (W_o b_V + b_o).
    """
    output = LinearMap.of(dense.output)
    value = dense.value.heads(shape.key_heads)
    sharing = shape.heads // shape.key_heads
    weight_oi = output.weight_oi @ value.weight_oi.repeat_interleave(sharing, dim=0).flatten(0, 1)
    if value.bias_o is None:
        return LinearMap(weight_oi, output.bias_o)
    added_o = output.weight_oi @ value.bias_o.repeat_interleave(sharing, dim=0).flatten()
    return LinearMap(weight_oi, added_o if output.bias_o is None else added_o + output.bias_o)


def _write_rows(block: FoldedAttention, dense: DenseAttention, folding: Folding, moments: Moments | None) -> None:
    """Fit the rows of each group of heads."""
    shape = block.shape
    query_hec = with_constant(dense.query.heads(shape.heads))
    key_hed = dense.key.heads(shape.key_heads).weight_oi.repeat_interleave(shape.heads // shape.key_heads, dim=0)
    together = shape.heads // shape.groups
    for group in range(shape.groups):
        members = slice(group * together, (group + 1) * together)
        u_rc, w_rd = fold_rows(
            query_hec[members],
            key_hed[members],
            shape.rank,
            folding.initialisation,
            rotary=shape.rotary,
            moments=moments,
        )
        block.query[group], block.query_bias[group], block.key[group] = u_rc[:, :-1], u_rc[:, -1], w_rd


def _read_moments(dense: Mapping[int, DenseAttention], feed: Feed) -> dict[int, Moments]:
    sums: dict[int, Tensor] = {}

    def read(layer: int, x_bsd: Tensor, batch: AttentionBatch, rotation: Any) -> None:
        _add(sums, layer, _with_one(_real(x_bsd, batch)), None)

    with _watched(dense, read):
        feed()
    return {layer: Moments.of(sum_cc / sum_cc[-1, -1]) for layer, sum_cc in sums.items()}


def _fit_outputs(
    dense: Mapping[int, DenseAttention], folded: Mapping[int, FoldedAttention], penalty: float, feed: Feed
) -> dict[int, LinearMap]:
    """The output projections that make the folded blocks nearest to the dense ones, over all real tokens."""
    grams: dict[int, Tensor] = {}
    crosses: dict[int, Tensor] = {}
    waiting: dict[int, tuple[Tensor, AttentionBatch]] = {}

    def mix(layer: int, x_bsd: Tensor, batch: AttentionBatch, rotation: Any) -> None:
        waiting[layer] = _with_one(_real(folded[layer].mix(x_bsd, batch, rotation), batch)), batch

    def compare(layer: int, module: nn.Module, args: Any, y_bsd: Tensor) -> None:
        mixed_tm, batch = waiting.pop(layer)
        _add(grams, layer, mixed_tm, None)
        _add(crosses, layer, mixed_tm, _real(y_bsd, batch))

    hooks = [block.output.register_forward_hook(partial(compare, layer)) for layer, block in dense.items()]
    with _watched(dense, mix):
        feed()
    for hook in hooks:
        hook.remove()
    has_bias = {layer: LinearMap.of(block.output).bias_o is not None for layer, block in dense.items()}
    return {layer: LinearMap(*ridge(grams[layer], crosses[layer], penalty, has_bias[layer])) for layer in dense}


@contextmanager
def _watched(dense: Mapping[int, DenseAttention], see: Callable[[int, Tensor, Any, Any], None]) -> Iterator[None]:
    """Call `see` with layer, input, facts of the batch and rotation whenever one of the dense blocks is called."""

    def before(layer: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        x_bsd = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        see(layer, x_bsd, kwargs["attention_batch"], kwargs.get("position_embeddings"))

    hooks = [
        block.module.register_forward_pre_hook(partial(before, layer), with_kwargs=True)
        for layer, block in dense.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _real(x_bsd: Tensor, batch: AttentionBatch) -> Tensor:
    """The rows of real tokens, float64 (tokens, d)."""
    return (x_bsd.flatten(0, 1) if batch.padding_bs is None else x_bsd[batch.padding_bs]).double()


def _with_one(x_td: Tensor) -> Tensor:
    return torch.cat([x_td, x_td.new_ones(len(x_td), 1)], dim=1)


def _add(sums: dict[int, Tensor], layer: int, left_tm: Tensor, right_tn: Tensor | None) -> None:
    product = left_tm.t() @ (left_tm if right_tn is None else right_tn)
    sums[layer] = sums[layer] + product if layer in sums else product
