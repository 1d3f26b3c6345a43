"""The YAML schema: what an experiment is, checked strictly, with line numbers and hints in the errors.

Reading goes one way: text -> YAML with line marks -> overrides -> pydantic -> `Experiment`. Files and `key=value`
overrides pass the same parser and the same validation. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from loras_bench.methods import MethodUnion


class Section(BaseModel):
    """A part of the YAML file: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class DataConfig(Section):
    """What to train and evaluate on."""

    name: str
    """A data set of the catalog (`wikitext-2`, `imdb`, `python-docstrings`, ...), a folder under $LORAS_BENCH_DATA, or
    a hub id `owner/name`.
    """
    sequence_length: int = Field(gt=1)
    """Language modelling: length of the packed blocks. Classification: texts are truncated to this many tokens.
    Instructions: prompts lose their beginning beyond it; a response that does not fit is an error.
    """
    packing: Literal["auto", "packed", "padded"] | None = "auto"
    """Classification and instructions: `packed` lays the texts of a batch one after the other into one row and lets
    none see another; `padded` lays them side by side. `auto` packs on CUDA with triton and `dense_attention: auto`,
    without `training.compile` (each total of tokens would be compiled anew). Blocks of language modelling have no
    padding: nothing is to be chosen, and runs record null.
    """
    validation_rows: int | None = Field(default=None, ge=1)
    """Rows of the training set that are set aside for validation where the data set has no validation split: always
    the same rows.
    """
    task: Literal["language_modeling", "classification", "instruction"] | None = None
    """Only for data sets outside the catalog."""
    text_fields: tuple[str, ...] | None = None
    """Only for data sets outside the catalog: the fields that hold the text (two for sentence pairs, and for
    instructions: prompt and response).
    """
    label_field: str | None = None
    """Only for classification sets outside the catalog."""
    revision: str | None = None
    """Only for hub ids outside the catalog: the commit to read, so that the record names what was read."""
    subset: str | None = None
    """Only for hub ids outside the catalog that have several configurations."""


class TokenizerConfig(Section):
    """A byte-level BPE tokenizer trained on the model's own (pre)training text: for models from scratch."""

    vocabulary: int = Field(default=2048, ge=258)
    """Number of tokens, the 256 bytes and the special tokens included."""


class ModelConfig(Section):
    """Which model, and how its weights are held."""

    name: str | None = None
    """A model of the catalog, a folder under $LORAS_BENCH_MODELS, an installed model package, or a hub id."""
    revision: str | None = None
    """The commit of a hub model."""
    run: str | None = None
    """Path of a finished run to go on from; the joules of the chain are added up."""
    init: Literal["pretrained", "scratch"] = "pretrained"
    """`scratch`: random weights of the given `architecture`."""
    architecture: dict[str, Any] | None = None
    """For `init: scratch`: a transformers configuration, with `model_type` (gpt2, bert, roberta, llama) and sizes."""
    tokenizer: TokenizerConfig | None = None
    """For `init: scratch`: how the tokenizer is trained."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the forward and backward pass; master weights of trainable parameters stay float32."""
    implementation: Literal["auto", "fused", "transformers"] = "auto"
    """The forward pass: `fused` is ours (kernels/), for the parts of the model that have one; `auto` takes it on CUDA
    with triton, without `training.compile`.
    """
    dense_attention: Literal["auto", "cudnn", "flash", "efficient", "math"] = "auto"
    """The kernel for dense attention; `auto` is cuDNN where it exists, which is the fastest on Hopper."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.name is not None) + (self.run is not None) + (self.init == "scratch") != 1:
            raise ValueError("give exactly one of `name`, `run` and `init: scratch`")
        if self.init == "scratch" and self.architecture is None:
            raise ValueError("`init: scratch` needs `architecture`, at least `{model_type: gpt2}`")
        if self.init != "scratch" and (self.architecture is not None or self.tokenizer is not None):
            raise ValueError("`architecture` and `tokenizer` go with `init: scratch` only")
        return self


class TrainingConfig(Section):
    """The step loop; the same for every arm but for the learning rate."""

    tokens: int | None = Field(default=None, gt=0)
    """Budget in trained tokens, padding excluded; rounded up to whole steps. Give this or `epochs`."""
    epochs: float | None = Field(default=None, gt=0)
    """Budget in passes over the training set."""
    tokens_per_step: int | None = Field(default=None, gt=0)
    """Language modelling: tokens of one optimizer step, a multiple of the sequence length."""
    batch_size: int | None = Field(default=None, gt=0)
    """Classification and instructions: rows of one optimizer step."""
    micro_batch_size: int | None = Field(default=None, gt=0)
    """Rows of one forward pass; the rest of a step is accumulated. Default: the whole step."""
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    warmup_fraction: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises linearly; a cosine to zero follows."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    loss: Literal["auto", "fused", "torch"] = "auto"
    """Cross-entropy of language models: `fused` never holds all logits; `auto` takes it on CUDA with triton, without
    `training.compile`.
    """
    compile: bool = False
    """torch.compile the model's layers, in the place of `model.implementation: fused`, `loss: fused`, `cuda_graph`."""
    cuda_graph: bool | None = None
    """Capture the step of each batch shape in a CUDA graph. Default: on CUDA, in one process, without `compile`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more FLOPs (counted); fused layers keep attention."""
    checkpoint_minutes: float = Field(default=5.0, gt=0)
    """A checkpoint at least this often, so that a killed run loses no more."""

    @model_validator(mode="after")
    def _one_of(self) -> TrainingConfig:
        if (self.tokens is None) == (self.epochs is None):
            raise ValueError("give exactly one of `tokens` and `epochs`")
        if (self.tokens_per_step is None) == (self.batch_size is None):
            raise ValueError(
                "give exactly one of `tokens_per_step` (language modelling) and `batch_size` (classification, "
                "instructions)"
            )
        return self


class GenerationConfig(Section):
    """Greedy answers, for the exact match of their final number (GSM8K).

    There is no key/value cache: every new token is a forward pass over the whole text.
    """

    rows: int = Field(default=200, gt=0)
    """Answers the first rows of the split, these many."""
    new_tokens: int = Field(default=256, gt=0)
    """Length at which an answer is cut off."""


class EvaluationConfig(Section):
    """What is read when."""

    splits: tuple[Literal["validation", "test"], ...] = ("test",)
    """Read once, after training. A search for hyper-parameters reads `[validation]` only."""
    attention: tuple[Literal["same", "dense"], ...] = ("same",)
    """`same`: the pattern it was trained with; `dense`: every pair."""
    batch_size: int = Field(default=8, gt=0)
    """Rows of one forward pass."""
    every_tokens: int | None = Field(default=None, gt=0)
    """Also read the validation loss each time this many tokens were trained, outside the `train` phase."""
    generation: GenerationConfig | None = None
    """Also answer prompts, where a data set's responses end in a number that can be compared."""

    @model_serializer(mode="wrap")
    def _without_absent(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The hashes of runs that generate nothing stay what they were before there was anything to generate."""
        content: dict[str, Any] = dump(self)
        return {key: value for key, value in content.items() if key != "generation" or value is not None}


class CarbonConfig(Section):
    """Carbon of the measured GPU joules: J / 3.6e6 * pue * intensity."""

    intensity_g_per_kwh: float = Field(gt=0)
    source: str
    """Where the intensity comes from; printed with the number."""
    pue: float = Field(default=1.0, ge=1)


class EnergyConfig(Section):
    """How joules are measured; see docs/energy.md."""

    steady_seconds: float = Field(default=10.0, ge=0)
    """Length of the steady phase that follows a `train` phase of less than 10 s; 0 leaves it out."""
    idle_seconds: float = Field(default=10.0, ge=0)
    """Length of the idle reading at both ends of a block; 0 leaves it out."""
    carbon: CarbonConfig | None = None
    codecarbon_country: str | None = Field(default=None, pattern=r"^[A-Z]{3}$")
    """ISO code (`FRA`): adds CodeCarbon's estimates for CPU, RAM, carbon and water, labelled as estimates."""


class PretrainConfig(Section):
    """Training from scratch before the methods are applied; done once, cached by the hash of all that it depends on."""

    data: DataConfig
    training: TrainingConfig


class Experiment(Section):
    """One YAML file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the arm in tables and the folder of its runs."""
    data: DataConfig
    model: ModelConfig
    methods: tuple[Annotated[MethodUnion, Field(discriminator="kind")], ...] = ()
    """The techniques to apply; none of them is full fine-tuning."""
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    energy: EnergyConfig = EnergyConfig()
    pretrain: PretrainConfig | None = None
    """For `init: scratch` only."""
    save: bool = True
    """Keep the trained weights in the run's folder: adapters for LoRA, with the model under them if that changed."""

    @model_validator(mode="after")
    def _pretraining_fits(self) -> Experiment:
        if self.pretrain is not None and self.model.init != "scratch":
            raise ValueError("`pretrain` goes with `model: {init: scratch}` only")
        return self


def canonical_hash(content: Any) -> str:
    """The first 10 hexadecimal digits of the SHA-256 of canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]
