"""FLOPs counted from the operations that a step executes: 2 per multiply-add, backward and recomputation included.

torch's own counter counts FlexAttention as nothing (2.11) or as dense (2.13) and does not halve causal attention, so
the attention core is left to `loras_bench.attention`, which counts pairs (see docs/kernels.md). Everything else goes
through torch's formulas; an operation that looks like a matrix product and has no formula is named, never guessed.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

MATMUL_LIKE = re.compile(
    r"(^|_)(mm|bmm|addmm|addbmm|baddbmm|mv|addmv|dot|vdot|ger|addr|matmul|linear|conv[123]d|convolution\w*|einsum|attention\w*)($|_)"
)
"""Names of operations that multiply matrices; the fused optimizers and norms do not match."""


class MatmulCounter(TorchDispatchMode):
    """Counts the FLOPs of every matrix product run inside it, backward passes included.

    Attributes:
        flops: Operations counted so far.
        unknown: Matmul-like operations without a formula and how often they ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0
        self.unknown: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and add its FLOPs."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = getattr(func, "_overloadpacket", func)
        formula = flop_registry.get(packet)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        elif MATMUL_LIKE.search(str(getattr(packet, "__name__", packet))):
            self.unknown[str(packet)] += 1
        return out
