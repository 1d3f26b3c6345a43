"""What `loras-bench sensitivity` measured and chose, as it lies in `<name>.sensitivity.json`; imports no torch.

Divergences and losses are in nats a label token, increases over the loss with everything dense, errors are standard
errors over rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from loras_bench.files import write_whole

BUDGETS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
"""Shares of dense LoRA's FLOPs at which a search says what the best schedule would do."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Reading(_Entry):
    """What some sparsity does to the predictions of label tokens."""

    divergence: float
    """Of Kullback and Leibler, of the sparse model's predictions from the dense one's; not negative."""
    increase: float
    """Of the loss."""
    error: float
    """Of the increase."""


class Measurement(Reading):
    """With one part of one layer sparse."""

    layer: int
    part: str
    """`feed_forward` or `attention`."""
    sparsity: float


class Schedule(_Entry):
    """Sparsities of many layers, and what they do together."""

    layers: dict[str, dict[str, float]]
    """As `sparse_lora` takes them."""
    flops_ratio: float
    """Training FLOPs of a sparse step, as a share of dense LoRA's."""
    joint: Reading
    """Measured."""


class Choice(Schedule):
    """The schedule of least divergence within a budget of FLOPs."""

    flops_budget: float
    predicted: float
    """Sum of the divergences that were measured one part at a time, above the floor."""
    uniform: Schedule
    """The best with one sparsity of each part in all layers, at no more FLOPs than the choice."""
    frontier: dict[str, float] = {}
    """What `predicted` would be at other budgets, by share of FLOPs: those of `BUDGETS` that can be reached."""


class Sensitivity(BaseModel):
    """A search: what was asked, everything measured so far, and the choice when it is made."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    schema_version: Literal[2] = 2
    request: str
    """Hash of everything that the measurements depend on."""
    experiment: dict[str, Any]
    """The dense LoRA run that is measured, resolved for the device."""
    sparse_lora: dict[str, Any]
    """Settings of the method without `layers` and `start`."""
    seed: int
    dense_run: str
    """Folder of the trained adapters."""
    device: str
    model: str
    dataset: str
    dataset_hash: str
    layer_count: int
    rows: int
    """Calibration rows, of the training set."""
    context_tokens: int
    """Mean of a row, those that are sparse in training."""
    dense_tokens: int
    """Mean of a row, those that stay dense: they predict a label, or fill a tile up."""
    grid: dict[str, list[float]]
    dense_loss: float | None = None
    measurements: list[Measurement] = []
    choice: Choice | None = None

    def known(self) -> dict[tuple[int, str, float], Measurement]:
        """Measurements by layer, part and sparsity."""
        return {(one.layer, one.part, one.sparsity): one for one in self.measurements}

    @property
    def floor(self) -> float:
        """Divergence that rounding alone makes: what context tokens become in the last layer is read by no label, so a
        sparse feed-forward part there, which computes the same in another order, measures it.
        """
        if self.sparse_lora["tokens"] != "context":
            return 0.0
        last = (self.layer_count - 1, "feed_forward")
        return max((one.divergence for one in self.measurements if (one.layer, one.part) == last), default=0.0)

    def above_floor(self, one: Measurement) -> float:
        """The divergence as the choice takes it."""
        return max(0.0, one.divergence - self.floor)

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        write_whole(path, self.model_dump_json(indent=1) + "\n")


def read_sensitivity(path: Path) -> Sensitivity | None:
    """A search that was written before; None where there is none, or none that can be read."""
    try:
        return Sensitivity.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        return None


def describe(found: Sensitivity) -> str:
    """A finished search in a few lines, for the terminal."""
    assert found.choice is not None
    choice, even = found.choice, found.choice.uniform
    shares = {part: share for parts in even.layers.values() for part, share in parts.items()}
    rows = [
        ("chosen, parts added up", choice.flops_ratio, f"{choice.predicted:10.2g}"),
        ("chosen, together", choice.flops_ratio, _shown(choice.joint)),
        ("best uniform", even.flops_ratio, _shown(even.joint)),
    ]
    lines = [
        f"{found.model} on {found.dataset}: {found.rows} rows of {found.context_tokens} context and "
        f"{found.dense_tokens} dense tokens, loss {found.dense_loss:.4f} nats a label token",
        f"{'':26}  FLOPs / dense  divergence  loss increase ± standard error",
        *(f"{name:26}  {ratio:13.3f}  {reading}" for name, ratio, reading in rows),
        f"best uniform: {', '.join(f'{part} {share:g}' for part, share in shares.items()) or 'dense'} in all layers",
        f"at other --flops, parts added up: {', '.join(f'{at} {value:.2g}' for at, value in choice.frontier.items())}",
        "layers:",
        *(f'  "{key}": {{{", ".join(f"{part}: {share:g}" for part, share in parts.items())}}}'
          for key, parts in choice.layers.items()),
    ]  # fmt: skip
    return "\n".join(lines)


def _shown(reading: Reading) -> str:
    return f"{reading.divergence:10.2g}  {reading.increase:+.2g} ± {reading.error:.1g}"
