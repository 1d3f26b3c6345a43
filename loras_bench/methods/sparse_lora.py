"""SparseLoRA (Khaki et al. 2025, arXiv 2506.16500): context tokens use a part of the frozen channels while training.

In the layers of a schedule, tokens whose outputs no label reads multiply with the channels that matter most for the
batch, as cheap estimates of the layers' outputs tell. Adapters stay whole, and so do tokens that predict a label, the
first steps, evaluation, and the weights that are saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from loras_bench.errors import ConfigError
from loras_bench.methods.base import Method, MethodConfig, Stage
from loras_bench.methods.layers import by_layer, text_keys
from loras_bench.methods.lora import Lora

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig

    from loras_bench.optimizer import MasterAdamW
    from loras_bench.sparsity.criteria import Heads, LayerSparsity
    from loras_bench.sparsity.measured import MeasuredNorms
    from loras_bench.sparsity.scoring import Criterion

ROW_MULTIPLE = 128
"""Dense tokens are filled up with context to a multiple of this: whole tiles, and few shapes of a batch to capture."""


class SlicedParts(BaseModel):
    """Shares of the channels that context tokens leave out: 0.75 keeps a quarter."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    feed_forward: float | None = Field(default=None, ge=0, lt=1)
    """Of the hidden channels between gate, up and down."""
    attention: float | None = Field(default=None, ge=0, lt=1)
    """Of the channels of keys and values, with those of queries and of attention's output that belong to them."""

    @model_validator(mode="after")
    def _names_a_part(self) -> SlicedParts:
        if self.feed_forward is None and self.attention is None:
            raise ValueError("give `feed_forward`, `attention` or both")
        return self


class SparseLoraConfig(MethodConfig):
    """Which layers are sparse, for which tokens and from when on."""

    kind: Literal["sparse_lora"]
    layers: Annotated[Mapping[str, SlicedParts], BeforeValidator(text_keys)] = Field(min_length=1)
    """Sparsities by layer (`"3"`) or range with both ends (`"3-30"`), counted from 0. The two parts of a layer may be
    given under different keys; layers that no key names are dense.
    """
    tokens: Literal["context", "all"] = "context"
    """Which tokens are sparse: those that predict no label, or `all`, where every token has a label (plain language
    modelling) or the label is not a token's (classification).
    """
    dense_tokens: Literal["labels", "random"] = "labels"
    """Which tokens stay dense under `tokens: context`: those that predict a label, or as many random ones, for
    comparison.
    """
    start: float = Field(default=0.05, ge=0, lt=1)
    """Share of the optimizer steps, the first ones, that are dense; rounded up to whole steps."""
    criterion: Literal["svd", "measured", "oracle", "random"] = "svd"
    """How channels are scored: by norms of the outputs that low-rank estimators predict for each batch; by norms of the
    true outputs that were `measured` once, before training, so that all batches use the same channels; by norms of the
    true outputs of each batch (`oracle`, which costs more than it saves); or at random in each step.
    """
    rank: int = Field(default=8, ge=1)
    """Of the estimators."""
    mean_token: bool = True
    """Score the feed-forward layer by the mean token of each sample, as the official code does, rather than by all;
    for `svd` and `oracle`.
    """
    calibration_tokens: int = Field(default=16_384, ge=1)
    """Training tokens that `measured` reads in forward passes before training."""

    @model_validator(mode="after")
    def _tokens_agree(self) -> SparseLoraConfig:
        if self.tokens == "all" and self.dense_tokens == "random":
            raise ValueError("`dense_tokens` goes with `tokens: context`; with `tokens: all` none is dense")
        return self

    def schedule(self, layer_count: int) -> list[LayerSparsity]:
        """The sparsity of each layer of the model.

        Raises:
            ConfigError: If a key of `layers` is no range, lies outside the model, or names a part of a layer again.
        """
        from loras_bench.sparsity.criteria import LayerSparsity

        parts = {}
        for part in LayerSparsity._fields:
            named = {key: getattr(shares, part) for key, shares in self.layers.items()}
            parts[part] = by_layer(
                f"sparse_lora, {part}", {key: share for key, share in named.items() if share is not None}, layer_count
            )
        return [
            LayerSparsity(**{part: shares.get(layer, 0.0) for part, shares in parts.items()})
            for layer in range(layer_count)
        ]


class SparseLora(Method[SparseLoraConfig]):
    """Tells the model's forward pass which tokens and channels each training step uses; no parameter changes."""

    stage: ClassVar[Stage] = Stage.SPARSIFY

    def __init__(self, config: SparseLoraConfig) -> None:
        super().__init__(config)
        self._dense_steps = 0
        self._measured: MeasuredNorms | None = None
        self._remove: list[Callable[[], None]] = []

    def check(self, others: Sequence[Method[Any]], model_config: PretrainedConfig) -> None:
        """Refuse other architectures, missing or unsuitable adapters, wrong layers, and a second such method."""
        if any(isinstance(other, SparseLora) for other in others):
            raise ConfigError("`sparse_lora` is listed twice in methods", "give all layers in one")
        lora = next((other for other in others if isinstance(other, Lora)), None)
        if lora is None:
            raise ConfigError("`sparse_lora` slices the frozen weights beside adapters", "add `lora` to methods")
        if lora.config.variant != "lora" or lora.config.dropout:
            kind = "DoRA" if lora.config.variant == "dora" else "dropout on adapters"
            why = "scales the base's output" if kind == "DoRA" else "takes adapters out of the fused products"
            raise ConfigError(f"`sparse_lora` does not go with {kind}, which {why}", "use plain `lora`")
        if model_config.model_type != "llama":
            raise ConfigError(
                f"`sparse_lora` knows the layers of Llama, the model is of type {model_config.model_type}",
                "choose a Llama model, or remove the method",
            )
        if model_config.hidden_act != "silu":
            raise ConfigError(f"`sparse_lora` scores SwiGLU, the model's activation is {model_config.hidden_act}")
        self.config.schedule(model_config.num_hidden_layers)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Compute or load the estimators, and install the schedule in the model."""
        from loras_bench.models.objective import unwrapped
        from loras_bench.models.sliced_llama import slice_modules
        from loras_bench.sparsity.contextual import ContextualSparsity
        from loras_bench.sparsity.criteria import Heads

        base = unwrapped(model).base_model
        config = base.config
        schedule = self.config.schedule(config.num_hidden_layers)
        heads = Heads(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        criterion = self._criterion(base, schedule, heads)
        self.sparsity = ContextualSparsity(schedule, heads, criterion, self.config.tokens == "all")
        self._remove = [self.sparsity.install(base), slice_modules(base, self.sparsity)]
        return model

    def _criterion(self, base: Any, schedule: Sequence[LayerSparsity], heads: Heads) -> Criterion:
        from loras_bench.sparsity.estimator import load_estimators
        from loras_bench.sparsity.measured import MeasuredNorms
        from loras_bench.sparsity.scoring import Estimates, OutputNorms, RandomScores, TrueOutputs

        sparse = [layer for layer, shares in enumerate(schedule) if any(shares)]
        gate_up, qkv = ("mlp.gate", "mlp.up"), ("self_attn.q", "self_attn.k", "self_attn.v")
        if self.config.criterion == "random":
            channels = heads.key * heads.size
            sizes = (base.config.intermediate_size, channels // 2, channels)
            self._scores = RandomScores(dict.fromkeys(sparse, sizes), lambda: next(base.parameters()).device)
            return self._scores
        if self.config.criterion == "svd":
            factors = load_estimators(base, self.config.rank, sparse)

            def estimates(*places: str) -> dict[int, Estimates]:
                names = {layer: [f"layers.{layer}.{place}_proj" for place in places] for layer in sparse}
                return {layer: Estimates([factors[name] for name in names[layer]]) for layer in sparse}

            return OutputNorms(estimates(*gate_up), estimates(*qkv), heads, self.config.mean_token)

        def true_outputs(*places: str) -> dict[int, TrueOutputs]:
            found = {}
            for layer in sparse:
                modules = [base.get_submodule(f"layers.{layer}.{place}_proj") for place in places]
                found[layer] = TrueOutputs([getattr(module, "base_layer", module) for module in modules])
            return found

        if self.config.criterion == "measured":
            self._measured = MeasuredNorms(true_outputs(*gate_up), true_outputs(*qkv), heads)
            return self._measured
        return OutputNorms(true_outputs(*gate_up), true_outputs(*qkv), heads, self.config.mean_token)

    def start(self, objective: nn.Module, optimizer: MasterAdamW, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Measure outputs where the criterion asks for it: adapters are still zero, so they are the base's."""
        if self._measured is None:
            return
        from loras_bench.models.objective import unwrapped

        model: Any = objective
        training = objective.training
        objective.eval()  # every token is dense
        self._measured.measure(unwrapped(model.model).base_model, batches, self.config.calibration_tokens)
        objective.train(training)

    def plan(self, steps: int) -> None:
        """The first steps are dense."""
        self._dense_steps = math.ceil(round(self.config.start * steps, 6))

    def batch_tensors(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Which rows of the batch, its tokens one after the other, are dense and which are context.

        Returns:
            `dense_rows` and `sparse_rows`, int64, ascending, under `tokens: context`; and `samples` int64, the numbers
            of the documents of a packed batch.

        Raises:
            ConfigError: Every token of the batch predicts a label, or its labels are not tokens'.
        """
        import torch

        from loras_bench.data.packing import filled_up

        tensors = {}
        if "document_ids" in batch:  # the fill of a packed row is one more document
            tensors["samples"] = torch.arange(int(batch["document_ids"][batch["attention_mask"].bool()].max()) + 1)
        if self.config.tokens == "all":
            return tensors
        is_dense = torch.zeros(batch["input_ids"].numel(), dtype=torch.bool)
        is_dense[self._dense_rows(batch)] = True
        is_dense = torch.from_numpy(filled_up(is_dense.numpy(), ROW_MULTIPLE))
        return tensors | {"dense_rows": is_dense.nonzero()[:, 0], "sparse_rows": (~is_dense).nonzero()[:, 0]}

    def _dense_rows(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The rows that predict a label, or as many random ones: int64."""
        import torch

        from loras_bench.data import IGNORED
        from loras_bench.data.batches import real_tokens

        targets, ids = batch["targets"], batch["input_ids"]
        if targets.shape != ids.shape:
            raise ConfigError("sparse_lora: the labels of this task are not tokens'", "set `tokens: all`")
        rows = (targets.flatten() != IGNORED).nonzero()[:, 0]
        if len(rows) == targets.numel():
            raise ConfigError(
                "sparse_lora: every token of a batch predicts a label, so that none would be sparse",
                "set `tokens: all`, or choose data with prompts",
            )
        if self.config.dense_tokens == "labels":
            return rows
        real = real_tokens(batch).flatten().nonzero()[:, 0]
        generator = torch.Generator().manual_seed(int(ids.sum()))  # of the batch alone: the same when resumed
        return real[torch.randperm(len(real), generator=generator)[: len(rows)]]

    def before_step(self, step: int) -> None:
        self.sparsity.active = self._sparse(step)
        if self.config.criterion == "random":
            self._scores.draw(step)

    def graph_key(self, step: int) -> Hashable:
        return self._sparse(step)

    def _sparse(self, step: int) -> bool:
        return step >= self._dense_steps

    def state_dict(self) -> dict[str, Tensor]:
        """What was measured."""
        return {} if self._measured is None else self._measured.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if self._measured is not None:
            self._measured.load_state_dict(state)

    def finish(self, model: nn.Module) -> nn.Module:
        """Give the model its own forward passes again; adapters and weights are plain LoRA's."""
        while self._remove:
            self._remove.pop()()
        return model
