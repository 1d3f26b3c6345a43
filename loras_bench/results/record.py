"""What one run leaves behind: `result.json`, schema-versioned, units in the names, None with a reason where nothing
was measured.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1

Status = Literal["completed", "failed", "interrupted"]
EnergySourceName = Literal["counter", "instant_integral", "average_integral"]


class _Part(BaseModel):
    # A diverged run has NaN in its curves: pydantic would write null there and then refuse to read it as a float.
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="strings")


class Flag(_Part):
    """One thing that a reader of the numbers must know."""

    name: str
    """Short name, as in docs/energy.md: `short_window`, `foreign_process`, `resumed`, ..."""
    reason: str
    """What happened, with the values that raised the flag."""


class Phase(_Part):
    """One named span of a run; the phases of a run add up to it."""

    name: str
    seconds: float
    energy_j: float | None
    energy_source: EnergySourceName | None
    integral_j: float | None
    """The same span by integrated instant power: a cross-check of edges and polling, not of the sensor's gain."""
    cpu_energy_j: float | None = None
    """RAPL package energy where readable; never added to the GPU's."""
    details: dict[str, Any] = Field(default_factory=dict)
    """Parts, mean power, temperatures and clocks, joules by GPU."""


class Quality(_Part):
    """One evaluation of the trained model."""

    split: str
    attention: Literal["same", "dense"]
    """`same`: with the pattern it was trained with; `dense`: every pair."""
    metrics: dict[str, float]
    """For language modelling `perplexity` (per token), `word_perplexity`, `bits_per_byte`, `loss`; for classification
    `accuracy`, `loss`; for instructions `perplexity` (per token of the responses), `loss`, and where prompts allow few
    responses `accuracy`, `accuracy_normalized`, or where some were answered `exact_match`.
    """
    protocol: dict[str, Any]
    """Tokenizer, block length, how the tail is scored, truncation, counts of tokens, words, bytes or rows; where
    prompts allow few responses, the share of the most frequent.
    """

    @property
    def standard_errors(self) -> float | None:
        """How far the accuracy lies above that of the most frequent answer, in its own standard errors.

        Those of a share of `rows` independent answers. None where no most frequent answer was recorded.
        """
        accuracy, share = self.metrics.get("accuracy"), self.protocol.get("majority_share")
        if accuracy is None or share is None:
            return None
        error = math.sqrt(accuracy * (1 - accuracy) / self.protocol["rows"])
        return (accuracy - share) / error if error else math.copysign(math.inf, accuracy - share)


class CurvePoint(_Part):
    """One point of the loss or evaluation curve."""

    step: int
    tokens: int
    loss: float


class Flops(_Part):
    """Counted operations of the `train` phase: 2 per multiply-add; recomputation included; warm-up excluded."""

    linear: float
    """Matrix products outside the attention core."""
    attention_executed: float
    """The attention core as the kernels execute it: whole visited tiles."""
    attention_allowed: float
    """The attention core on the pairs that the pattern allows."""
    attention_dense: float
    """The attention core if every pair (every causal pair, for a causal model) were computed."""
    incomplete: list[str] = Field(default_factory=list)
    """Matmul-like operations seen that have no formula; the totals are too low by these."""

    @property
    def total(self) -> float:
        """Executed operations, linear and attention."""
        return self.linear + self.attention_executed


class Block(_Part):
    """The comparison that the run was part of: one seed, all arms, one GPU, back to back."""

    id: str
    position: int
    size: int


class Record(_Part):
    """A run, told in numbers. See docs/architecture.md for the meaning of every field."""

    schema_version: int = SCHEMA_VERSION
    run_id: str
    """`<name>/seed<k>-<hash>`, also the folder."""
    name: str
    seed: int
    status: Status
    reason: str | None = None
    """Why the run failed or was interrupted."""
    started_at: str
    finished_at: str
    block: Block | None = None

    task: Literal["language_modeling", "classification", "instruction"]
    dataset: str
    model: str
    """The name that tables show, with what a reader must know (`(dequantized Q4_1)`)."""
    sequence_length: int
    methods: list[str]
    """The kinds of the methods applied, in stage order."""
    device: str
    """GPU model name, or the CPU's."""
    device_uuids: list[str] = Field(default_factory=list)
    config: dict[str, Any]
    """The resolved experiment."""
    kernel_version: str
    environment: dict[str, Any]
    attention: dict[str, Any] = Field(default_factory=dict)
    """Pattern and backend of each layer and why the backend was chosen."""
    implementation: dict[str, Any] = Field(default_factory=dict)
    """Whose forward pass ran, what of it is fused, what is not and why; whether steps were replayed as CUDA graphs."""

    total_parameters: int | None = None
    trainable_parameters: int | None = None
    trained_tokens: int | None = None
    """Real tokens trained on, padding excluded."""
    padded_tokens: int | None = None
    """Tokens computed, padding included."""
    steps: int | None = None

    train_energy_j: float | None = None
    """GPU joules of the `train` phase, the Pareto default."""
    train_energy_source: EnergySourceName | None = None
    energy_j_per_mtoken: float | None = None
    """GPU joules per million trained tokens over at least 10 s of steady steps."""
    energy_j_per_mtoken_phase: Literal["train", "steady"] | None = None
    run_energy_j: float | None = None
    """GPU joules of all phases."""
    chain_energy_j: float | None = None
    """`run_energy_j` plus that of the runs this one goes on from (`model: {run: ...}`)."""
    lost_energy_j: float | None = None
    """Joules of work that a kill destroyed; never part of `train_energy_j`."""
    idle_before_w: float | None = None
    idle_after_w: float | None = None
    train_seconds: float | None = None
    tokens_per_second: float | None = None
    """Trained tokens over the `train` phase."""
    mean_power_w: float | None = None
    peak_memory_bytes: int | None = None
    """The most that tensors occupied on the device from the first training step to the last, evaluations between
    them included (CPU: peak resident set of the process)."""
    flops: Flops | None = None
    quality: list[Quality] = Field(default_factory=list)
    loss_curve: list[CurvePoint] = Field(default_factory=list)
    validation_curve: list[CurvePoint] = Field(default_factory=list)
    phases: list[Phase] = Field(default_factory=list)
    estimates: dict[str, Any] = Field(default_factory=dict)
    """CodeCarbon's models of CPU, RAM, carbon and water: estimates, never added to a measurement."""
    flags: list[Flag] = Field(default_factory=list)
    missing: dict[str, str] = Field(default_factory=dict)
    """For each field that is None though a reader might expect it: why."""

    @property
    def attends_densely(self) -> bool:
        """Whether every layer's pattern is known and dense."""
        layers = self.attention.get("layers", [])
        return bool(layers) and all(layer["pattern"]["kind"] == "dense" for layer in layers)

    @property
    def resumed(self) -> bool:
        """Whether the run was taken up after a kill; such runs stay out of intervals."""
        return any(flag.name == "resumed" for flag in self.flags)

    @property
    def trainable_percent(self) -> float | None:
        """Share of the parameters that were trained."""
        if self.trainable_parameters is None or not self.total_parameters:
            return None
        return 100 * self.trainable_parameters / self.total_parameters
