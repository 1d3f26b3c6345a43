"""Matrices as products of two thin ones, by singular value decomposition: what folding is compared with.

At the weights that folding leaves, the best matrices of low rank for the Frobenius norm (Eckart and Young 1936).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from loras_bench.errors import ConfigError
from loras_bench.methods.base import Method, MethodConfig, Stage
from loras_bench.methods.folding import Fold
from loras_bench.methods.lora import ATTENTION, FEED_FORWARD
from loras_bench.methods.sparse_lora import SparseLora

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

TARGETS = {
    "query-key-value": r"(q_proj|k_proj|v_proj|c_attn|query|key|value)",
    "all-linear": f"({ATTENTION}|{FEED_FORWARD})",
}


class LowRankConfig(MethodConfig):
    """Which matrices become products, and of which rank."""

    kind: Literal["svd"]
    targets: Literal["query-key-value", "all-linear"] = "query-key-value"
    """`query-key-value` is what `fold` replaces, `all-linear` the output projection and the feed-forward layer too."""
    rank: int | None = Field(default=None, ge=1)
    """Of each matrix: rank * (inputs + outputs) weights. Default the largest with which queries, keys and values have
    no more weights than `fold` leaves by default: a row of each head for queries and for keys, a diagonal of values.
    """

    @model_validator(mode="after")
    def _has_rank(self) -> LowRankConfig:
        if self.targets == "all-linear" and self.rank is None:
            raise ValueError("`targets: all-linear` needs a `rank`: `fold` leaves nothing that it could equal")
        return self


class LowRank(Method[LowRankConfig]):
    """Replaces linear layers by `LowRankLinear`; everything trains, the two factors as matrices."""

    stage: ClassVar[Stage] = Stage.REPLACE

    @classmethod
    def of(cls, model_config: PretrainedConfig) -> LowRank | None:
        """The method that made a model what its configuration says it is; None for dense ones."""
        note = getattr(model_config, "low_rank", None)
        return None if note is None else cls(LowRankConfig.model_validate({"kind": "svd"} | note))

    def check(self, others: Sequence[Method[Any]], model_config: PretrainedConfig) -> None:
        """Refuse what needs the whole matrices, and a second such method."""
        if any(isinstance(other, LowRank) for other in others):
            raise ConfigError(
                "`svd` comes twice: its factors are no matrices to factorise",
                "one `svd` a model; a run that goes on from a factorised one lists none",
            )
        if any(isinstance(other, Fold) for other in others):
            raise ConfigError("`svd` and `fold` both replace queries, keys and values", "remove one of them")
        if any(isinstance(other, SparseLora) for other in others):
            raise ConfigError("`sparse_lora` slices whole matrices, and `svd` leaves factors", "remove one of them")

    def prepare(self, model: nn.Module) -> nn.Module:
        """Factorise; the rank is noted in the model's configuration as `low_rank`.

        Raises:
            ConfigError: A matrix has no such rank.
        """
        return self._replaced(model, fitted=True)

    def resize(self, model: nn.Module) -> nn.Module:
        """As `prepare`, with any values: nothing is decomposed."""
        return self._replaced(model, fitted=False)

    def _replaced(self, model: nn.Module, *, fitted: bool) -> nn.Module:
        from loras_bench.models.low_rank import replace_linears
        from loras_bench.pruning.blocks import linears_of

        config: Any = model.config
        rank = self.config.rank or self._rank_of_fold(model)
        smallest = min(min(m.weight.shape) for m in linears_of(model, TARGETS[self.config.targets]))
        if rank > smallest:
            raise ConfigError(f"svd: a matrix of this model has rank {smallest}, not {rank}", "lower `rank`")
        replace_linears(model, TARGETS[self.config.targets], rank, fitted=fitted)
        config.low_rank = {"targets": self.config.targets, "rank": rank}
        return model

    def _rank_of_fold(self, model: nn.Module) -> int:
        """The largest with no more weights than folded rows of each head; 1 where those are less than any product."""
        from loras_bench.folding.counts import folded_rows
        from loras_bench.pruning.blocks import linears_of

        config: Any = model.config
        matrices = linears_of(model, TARGETS[self.config.targets])
        per_rank = sum(sum(matrix.weight.shape) for matrix in matrices)
        folded = config.num_hidden_layers * folded_rows(config.hidden_size, config.num_attention_heads, 1)
        return max(1, int(folded // per_rank))
