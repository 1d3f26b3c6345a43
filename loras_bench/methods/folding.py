"""Folded attention: identical rows for queries and keys, a diagonal for values (Belhaouari and Kraidia 2025).

Folds a trained model before it is trained on: the blocks are smaller modules (folding/attention.py), nothing is masked.
The paper's full text is not public to us: the equations and fits are our derivation from its abstract.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from loras_bench.attention.families import check_architecture
from loras_bench.errors import ConfigError
from loras_bench.methods.base import Method, MethodConfig, Stage
from loras_bench.methods.layers import by_layer
from loras_bench.methods.lora import Lora
from loras_bench.methods.sparse_attention import SparseAttention
from loras_bench.methods.sparse_lora import SparseLora

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig

    from loras_bench.folding.fitting import Folding


def _names(layers: object) -> object:
    """YAML reads `[3]` as a number."""
    return [str(layer) for layer in layers] if isinstance(layers, list | tuple) else layers


class FoldConfig(MethodConfig):
    """What becomes of the matrices of attention; the output projection stays dense."""

    kind: Literal["fold"]
    heads: Literal["per_head", "shared"] = "per_head"
    """Whether each head keeps query and key rows of its own, or all heads share them and attend alike."""
    rank: int = Field(default=1, ge=1)
    """Rows that are left of a head's query and key matrix; 1 is identical-row compression, all of them is exact (with
    `initialisation: svd`, without rotary embedding).
    """
    initialisation: Literal["row_mean", "svd", "whitened"] = "whitened"
    """Of the rows: the mean of the head's rows, the best product of this rank for the weights, or the best for the
    logits of calibration data.
    """
    values: Literal["diagonal", "dense"] = "diagonal"
    """A diagonal value matrix needs another output projection: computed where heads share their rows, and fitted to the
    dense block's outputs on calibration data elsewhere.
    """
    ridge: float = Field(default=1e-3, ge=0)
    """Penalty of that fit, as a share of the mean variance of what the projection reads."""
    layers: Annotated[tuple[str, ...], BeforeValidator(_names)] | None = None
    """Layers (`"3"`) or ranges with both ends (`"3-5"`), counted from 0; default all."""
    calibration_tokens: int = Field(default=65_536, ge=1)
    """Training tokens, padding excluded, that the fits read at least: whole micro-batches of them."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Of the folded rows and diagonals, which never decay; default that of the run."""

    def folding(self) -> Folding:
        from loras_bench.folding.fitting import Folding

        return Folding(self.heads, self.rank, self.initialisation, self.values == "diagonal", self.ridge)

    def folded_layers(self, layer_count: int) -> list[int]:
        """Numbers of the layers, ascending.

        Raises:
            ConfigError: A name is no layer or range, lies outside the model, or overlaps another.
        """
        if self.layers is None:
            return list(range(layer_count))
        return sorted(by_layer("fold", dict.fromkeys(self.layers, True), layer_count))


class Fold(Method[FoldConfig]):
    """Replaces attention by `FoldedAttention`; everything that is left trains."""

    stage: ClassVar[Stage] = Stage.REPLACE

    def __init__(self, config: FoldConfig) -> None:
        super().__init__(config)
        self._batches: Sequence[Mapping[str, Tensor]] | None = None

    @classmethod
    def of(cls, model_config: PretrainedConfig) -> Fold | None:
        """The method that made a model what its configuration says it is; None for dense ones."""
        folding = getattr(model_config, "folding", None)
        return None if folding is None else cls(FoldConfig.model_validate({"kind": "fold"} | folding))

    def check(self, others: Sequence[Method[Any]], model_config: PretrainedConfig) -> None:
        """Refuse what would need the dense queries and keys, sizes that do not divide, and a second such method."""
        if any(isinstance(other, Fold) for other in others):
            raise ConfigError(
                "`fold` comes twice: folded layers have no matrices left to fold",
                "name all layers in one `fold`; a run that goes on from a folded one lists none",
            )
        if any(isinstance(other, SparseAttention) for other in others):
            raise ConfigError(
                "`sparse_attention` does not go with `fold`: a token's logits no longer tell which keys are near it",
                "remove one of them",
            )
        if self.config.learning_rate is not None and any(isinstance(other, Lora) for other in others):
            raise ConfigError(
                "fold: adapters freeze the folded rows and diagonals, so that they have no `learning_rate`",
                "leave the key out, or fold in a run of its own and go on from it by `model.run`",
            )
        if any(isinstance(other, SparseLora) for other in others):
            raise ConfigError(
                "`sparse_lora` slices query and key matrices, and `fold` leaves none", "remove one of them"
            )
        check_architecture(model_config)
        self.config.folded_layers(model_config.num_hidden_layers)
        heads, rotary = model_config.num_attention_heads, model_config.model_type == "llama"
        head_dim = getattr(model_config, "head_dim", None) or model_config.hidden_size // heads
        parts, what = (head_dim // 2, "pairs of rotary channels") if rotary else (head_dim, "rows")
        if parts % self.config.rank:
            divisors = ", ".join(str(rank) for rank in range(1, parts + 1) if parts % rank == 0)
            raise ConfigError(
                f"fold: rank {self.config.rank} does not divide the {parts} {what} of a head", f"it can be {divisors}"
            )
        if rotary and model_config.attention_bias:
            raise ConfigError(
                "fold: under rotary embedding the bias of keys counts, and folded keys have none",
                "choose a model with attention_bias: false",
            )

    def observe(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Called once, before `prepare`: keep the training batches on which the folds are fitted.

        Args:
            batches: As `TaskData.collate` made them, on the CPU; taken until there are enough tokens.
        """
        from loras_bench.data.batches import real_tokens

        if not self.config.folding().reads_data:
            return
        kept, tokens = [], 0
        for batch in batches:
            kept.append(batch)
            tokens += int(real_tokens(batch).sum())
            if tokens >= self.config.calibration_tokens:
                break
        self._batches = kept

    def prepare(self, model: nn.Module) -> nn.Module:
        """Fold the layers; what was folded is noted in the model's configuration as `folding`.

        Raises:
            RuntimeError: The fits read data, and `observe` was not called.
        """
        from loras_bench.folding.fitting import fold_model

        base: Any = model.base_model
        folding = self.config.folding()
        if folding.reads_data and not self._batches:
            raise RuntimeError("fold: `observe` comes before `prepare`")
        before = next(model.parameters()).device
        model.to(base.model_attention.device)  # where its attention computes
        fold_model(base, self._layers(base), folding, partial(self._feed, model))
        model.to(before)
        self._batches = None
        return self._noted(model)

    def resize(self, model: nn.Module) -> nn.Module:
        """Give the layers of a transformers model the sizes of folded ones, with any values."""
        from loras_bench.folding.fitting import fold_sizes

        base: Any = model.base_model
        fold_sizes(base, self._layers(base), self.config.folding())
        return self._noted(model)

    def _layers(self, base: Any) -> list[int]:
        return self.config.folded_layers(base.config.num_hidden_layers)

    def _noted(self, model: nn.Module) -> nn.Module:
        base: Any = model.base_model
        note = self.config.model_dump(mode="json", include={"heads", "rank", "values"})
        base.config.folding = note | {"layers": self._layers(base)}
        base.config.use_cache = False  # folded attention keeps no keys
        return model

    def _feed(self, model: nn.Module) -> None:
        """The model over the calibration batches, with its head: `Objective` knows how each task's batches are read.

        In float32, which not every kernel takes that the run may ask for in its own number format.
        """
        from loras_bench.graphed import to_device
        from loras_bench.models.objective import Objective

        base: Any = model.base_model
        training, device = model.training, next(model.parameters()).device
        with base.model_attention.any_dense_kernel():
            for batch in self._batches or ():
                task = "classification" if batch["targets"].ndim == 1 else "language_modeling"
                Objective(model, task, "torch").eval()(**to_device(dict(batch), device))  # type: ignore[arg-type]
        model.train(training)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The folded rows and diagonals, if they have a rate of their own and adapters have not frozen them."""
        from loras_bench.folding.attention import FoldedAttention

        blocks = [module for module in model.modules() if isinstance(module, FoldedAttention)]
        rows = [row for block in blocks for row in block.undecayed if row.requires_grad]
        if self.config.learning_rate is None or not rows:
            return []
        return [{"params": rows, "lr": self.config.learning_rate, "weight_decay": 0.0}]
