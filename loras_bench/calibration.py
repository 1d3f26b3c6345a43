"""What sparsity does to a trained model: its predictions of label tokens of fixed rows, under one schedule at a time.

Everything is as in training (micro-batches, which tokens are context, how channels are chosen) but for the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loras_bench.answers import Predictions, documents_of, output_layer, predict
from loras_bench.build import Build
from loras_bench.data import IGNORED, TaskData
from loras_bench.data.batches import real_tokens
from loras_bench.errors import ConfigError, UserError
from loras_bench.methods.sparse_lora import SparseLora
from loras_bench.models.objective import unwrapped
from loras_bench.models.saved import ADAPTER
from loras_bench.models.sliced_llama import slice_modules
from loras_bench.results.sensitivity import Reading
from loras_bench.sparsity.criteria import DENSE, LayerSparsity

if TYPE_CHECKING:
    from loras_bench.graphed import Batch

COMPARED_TOKENS = 512
"""Label tokens whose logits, of two models and in several copies, are held at once."""


@dataclass(frozen=True)
class CalibrationSet:
    """Fixed rows of the training split in micro-batches, on the CPU."""

    batches: list[Batch]
    rows: int

    @property
    def mean_tokens(self) -> tuple[int, int]:
        """Context and dense tokens of a row, rounded; padding is neither."""
        real, context = 0, 0
        for batch in self.batches:
            real_n = real_tokens(batch).flatten()
            real += int(real_n.sum())
            context += int((real_n[batch["sparse_rows"]] if "sparse_rows" in batch else real_n).sum())
        sparse = round(context / self.rows)
        return sparse, max(0, round(real / self.rows) - sparse)

    @property
    def labels_r(self) -> np.ndarray:
        """Label tokens of each row, int64 (rows,)."""
        return np.concatenate([_labels(batch) for batch in self.batches])


def calibration_set(data: TaskData, method: SparseLora, rows: int, micro_rows: int, seed: int) -> CalibrationSet:
    """Draw rows as training would: at random, in its micro-batches, with the method's tensors.

    Args:
        data: With a training split.
        method: Tells context from dense tokens.
        rows: How many to draw; all where there are fewer.
        micro_rows: Of a forward pass.
        seed: Of the draw.

    Raises:
        ConfigError: Labels are not of tokens, or no token is context.
    """
    if data.task == "classification":
        raise ConfigError(
            "sensitivity reads the predictions of tokens, and a classifier's labels are not tokens'",
            "take instruction data, such as sst2-prompted",
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(data.rows("train"), generator=generator)[:rows].tolist()
    batches = []
    for at in range(0, len(drawn), micro_rows):
        batch = data.collate("train", drawn[at : at + micro_rows])
        batches.append(batch | method.batch_tensors(batch))
    return CalibrationSet(batches, len(drawn))


class Calibration:
    """A trained model whose schedule can be changed at any time.

    Args:
        run: Built with a `sparse_lora` that names all layers and parts; nothing of it is trained here.
        rows: What it reads.
    """

    def __init__(self, run: Build, rows: CalibrationSet) -> None:
        self._run, self._rows = run, rows
        self._method = next(method for method in run.methods if isinstance(method, SparseLora))
        self._method.plan(1)
        self._method.before_step(0)
        self._model = run.objective.train().model
        self._sliced = run.fused is None
        if self._sliced:  # modules are sliced by the schedule of the moment; the fused layers ask for it themselves
            self._method.finish(self._model)
            self._method.sparsity.install(self._base)

    @property
    def _base(self) -> nn.Module:
        base: nn.Module = unwrapped(self._model).base_model
        return base

    @cached_property
    def _dense(self) -> list[Predictions]:
        return list(self._predictions([DENSE] * len(self._method.sparsity.schedule)))

    @cached_property
    def _dense_r(self) -> np.ndarray:
        return self._compared(self._dense)[0]

    @property
    def dense_loss(self) -> float:
        """Mean loss of a label token with everything dense, in nats."""
        return float(self._dense_r.sum() / self._rows.labels_r.sum())

    def reading(self, layers: Sequence[LayerSparsity]) -> Reading:
        """What a schedule does to the predictions of label tokens, and to their loss.

        Raises:
            UserError: The predictions are no numbers.
        """
        dense_r, labels_r = self._dense_r, self._rows.labels_r
        losses_r, divergences_r = self._compared(self._predictions(layers))
        divergence = float(divergences_r.sum() / labels_r.sum())
        if not math.isfinite(divergence):
            raise UserError("the model's predictions are no numbers", "look at the loss of its dense training")
        return Reading(divergence=max(0.0, divergence), **rise(dense_r, losses_r, labels_r)._asdict())

    def _predictions(self, layers: Sequence[LayerSparsity]) -> Iterator[Predictions]:
        """Of one batch after the other."""
        self._method.sparsity.schedule[:] = layers
        remove: Callable[[], None] = slice_modules(self._base, self._method.sparsity) if self._sliced else lambda: None
        for batch in self._rows.batches:
            yield predict(self._model, batch, self._run.accelerator.device)
        remove()

    @torch.no_grad()
    def _compared(self, found: Iterable[Predictions]) -> tuple[np.ndarray, np.ndarray]:
        """Sums over the label tokens of each row, float64 (rows,): loss, and divergence from the dense predictions."""
        logits, sums = output_layer(self._model), []
        for dense, one in zip(self._dense, found, strict=True):
            columns = one.hidden_nd, dense.hidden_nd, one.targets_n
            parts = zip(*(column.split(COMPARED_TOKENS) for column in columns), strict=True)
            values = [_loss_and_divergence(logits(x_nd), logits(y_nd), targets_n) for x_nd, y_nd, targets_n in parts]
            sums.append(torch.stack([one.sums(torch.cat(column)) for column in zip(*values, strict=True)]))
        losses_r, divergences_r = torch.cat(sums, dim=1).double().cpu().numpy()
        return losses_r, divergences_r


def _loss_and_divergence(logits_nv: Tensor, dense_nv: Tensor, targets_n: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token its loss, and Kullback and Leibler's divergence of the prediction from the dense one, in nats."""
    log_p_nv, log_dense_nv = F.log_softmax(logits_nv, dim=1), F.log_softmax(dense_nv, dim=1)
    divergence_n = F.kl_div(log_p_nv, log_dense_nv, reduction="none", log_target=True).sum(1)
    return F.nll_loss(log_p_nv, targets_n, reduction="none"), divergence_n


class Rise(NamedTuple):
    """Of a mean loss over rows, in nats a label token."""

    increase: float
    error: float


def load_adapters(model: nn.Module, run: Path) -> None:
    """Give a built model the trained adapters of a run in place of its fresh ones.

    Raises:
        ConfigError: They are not there, or do not fit.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    folder = run / ADAPTER
    if not folder.is_dir():
        raise ConfigError(f"{run} holds no adapters", "name a finished run of plain LoRA with `save: true`")
    weights = load_peft_weights(str(folder), device="cpu")
    try:
        loaded: Any = set_peft_model_state_dict(model, weights)
    except RuntimeError as error:
        raise ConfigError(f"{run}: its adapters do not fit: {str(error).splitlines()[-1].strip()}") from None
    absent = [name for name in loaded.missing_keys if ".lora_" in name]
    if absent or loaded.unexpected_keys:
        named = ", ".join([*absent, *loaded.unexpected_keys][:3])
        raise ConfigError(f"{run}: its adapters are on other layers: {named}", "it must be a run of the same `lora`")


def rise(dense_r: np.ndarray, sparse_r: np.ndarray, labels_r: np.ndarray) -> Rise:
    """The increase of the mean loss of a label token, and its standard error over rows.

    A ratio of sums (Cochran, Sampling Techniques, 1977, section 2.11): rows have different numbers of labels.

    Args:
        dense_r: The summed loss of each row with everything dense, float64 (rows,), in nats.
        sparse_r: The same under a schedule.
        labels_r: Label tokens of each row.
    """
    rises_r, rows = sparse_r - dense_r, len(labels_r)
    increase = rises_r.sum() / labels_r.sum()
    variance = np.square(rises_r - increase * labels_r).sum() / max(1, rows - 1)
    return Rise(float(increase), math.sqrt(variance / rows) / float(labels_r.mean()))


def _labels(batch: Batch) -> np.ndarray:
    return torch.bincount(documents_of(batch)[batch["targets"] != IGNORED]).numpy()
