"""Which query-key pairs attend: one frozen config a pattern, its rule and its exact number of pairs.

A pattern's `rule` is a broadcast boolean expression allows(b, q, k) over integer tensors, written once and read by the
masked reference (as a dense mask) and by FlexAttention (as a mask_mod). The rule leaves causality out: whoever binds
a pattern adds `k <= q` for a causal model. `count_pairs` is exact row arithmetic and builds no length x length mask.

Conventions: `window` counts keys and includes the query itself (causal models); `half_width` counts the keys on each
side (bidirectional models). Formulas: Child et al. 2019 (strided, fixed), Beltagy et al. 2020 (Longformer), Zaheer et
al. 2020 (BigBird); docs/kernels.md holds the table. Shapes: b batch, q query position, k key position, s length.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from loras_bench.attention.banded import Dilated, Longformer, Window
from loras_bench.attention.blocked import BigBird, BlockLocal, Fixed, Strided
from loras_bench.attention.pattern import Dense, PatternBase

__all__ = [
    "BigBird", "BlockLocal", "Dense", "Dilated", "Fixed", "Longformer", "Pattern", "PatternBase", "Strided", "Window",
]  # fmt: skip

Pattern = Annotated[
    Dense | Window | Longformer | Dilated | Strided | Fixed | BlockLocal | BigBird, Field(discriminator="kind")
]
"""Any pattern, chosen by its `kind`."""
