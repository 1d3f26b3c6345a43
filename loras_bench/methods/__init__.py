"""The registry of methods: adding one touches this file and its own."""

from __future__ import annotations

from typing import Union

from loras_bench.methods.folding import Fold, FoldConfig
from loras_bench.methods.lora import Lora, LoraConfig
from loras_bench.methods.low_rank import LowRank, LowRankConfig
from loras_bench.methods.pruning import Prune, PruneConfig
from loras_bench.methods.sparse_attention import SparseAttention, SparseAttentionConfig
from loras_bench.methods.sparse_lora import SparseLora, SparseLoraConfig

MethodUnion = Union[  # noqa: UP007 (pydantic reads it at run time)
    FoldConfig, LoraConfig, LowRankConfig, PruneConfig, SparseAttentionConfig, SparseLoraConfig
]
METHODS = {
    "fold": Fold,
    "lora": Lora,
    "prune": Prune,
    "sparse_attention": SparseAttention,
    "sparse_lora": SparseLora,
    "svd": LowRank,
}
REPLACING = (Fold, LowRank)
"""Those that put smaller modules in place, of which a saved model's configuration tells (`of`, `resize`)."""
