"""What the tests of attention share: cases of every pattern, small random patterns and batches, inputs and results."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from loras_bench.attention.backend import Backend
from loras_bench.attention.binding import AttentionBatch, BoundPattern
from loras_bench.attention.patterns import (
    BigBird,
    BlockLocal,
    Dense,
    Dilated,
    Fixed,
    Longformer,
    PatternBase,
    Strided,
    Window,
)

CPU = torch.device("cpu")
LENGTH = 157  # no multiple of a tile, a block or a stride
CAUSAL = [
    Dense(),
    Window(window=20, global_tokens=5),
    Longformer(window=20, global_tokens=2, global_positions=(40, 141)),
    Dilated(window=9, dilation=3),
    Strided(stride=12),
    Fixed(stride=12, summary=2),
    BlockLocal(block=24),
    BigBird(block=16, window_blocks=2, global_blocks=1, random_blocks=2),
]
BIDIRECTIONAL = [
    Dense(),
    Window(half_width=10, global_tokens=1),
    Longformer(half_width=10, global_tokens=1, global_positions=(40, 141)),
    Dilated(half_width=5, dilation=3),
    Strided(stride=12),
    Fixed(stride=12, summary=2),
    BlockLocal(block=24),
    BigBird(block=16, window_blocks=3, global_blocks=1, random_blocks=2),
]
CASES = [(pattern, True) for pattern in CAUSAL] + [(pattern, False) for pattern in BIDIRECTIONAL]


def case_name(value: object) -> str:
    return value.kind if isinstance(value, PatternBase) else {True: "causal", False: "bidirectional"}.get(value, "")  # type: ignore[call-overload,no-any-return]


def inputs(
    heads: int = 4, groups: int = 2, length: int = LENGTH, batch: int = 2, dtype: torch.dtype = torch.float32,
    head_dim: int = 16,
) -> list[Tensor]:  # fmt: skip
    """q_bhsd, k_bgsd and v_bgsd, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, count, length, head_dim) for count in (heads, groups, groups)]
    return [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes]


def padding(*lengths: int, length: int = LENGTH) -> Tensor:
    return torch.arange(length) < torch.tensor(lengths)[:, None]


def results(backend: Backend, bound: BoundPattern, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Output, log-sum-exp and the gradients of a random projection of the output and of the finite log-sum-exp."""
    out, lse = backend.attend(*tensors, bound, 0.3)  # type: ignore[call-arg,misc]
    generator = torch.Generator().manual_seed(1)
    loss = (out * torch.randn(out.shape, generator=generator).to(out)).sum()
    if lse is not None:
        weights = torch.randn(lse.shape, generator=generator).to(lse)
        loss = loss + (weights * lse.masked_fill(lse.isinf(), 0)).sum()
    return out, lse if lse is not None else torch.zeros(()), *torch.autograd.grad(loss, tensors)


def documents(*lengths: int) -> Tensor:
    """One row of documents of these lengths."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


def interval_patterns(causal: bool) -> st.SearchStrategy[PatternBase]:
    """Patterns whose rows are intervals."""
    width = {"window": st.integers(1, 20)} if causal else {"half_width": st.integers(0, 20)}
    size = st.integers(1, 12)
    return st.one_of(
        st.just(Dense()),
        st.builds(Window, global_tokens=st.integers(0, 40), **width),
        st.builds(Dilated, dilation=size, **width),
        st.builds(Strided, stride=size),
        st.builds(BlockLocal, block=size, overlap=st.booleans()),
    )


def irregular_patterns(causal: bool) -> st.SearchStrategy[PatternBase]:
    """The other patterns that have a formula: all but BigBird."""
    width = {"window": st.integers(1, 20)} if causal else {"half_width": st.integers(0, 20)}
    return st.one_of(
        st.builds(
            Longformer,
            global_tokens=st.integers(0, 3),
            global_positions=st.lists(st.integers(0, 40), max_size=4).map(tuple),
            **width,
        ),
        st.integers(1, 12).flatmap(lambda n: st.builds(Fixed, stride=st.just(n), summary=st.integers(1, n))),
    )


@st.composite
def batches(draw: st.DrawFn, causal: bool, longest: int) -> AttentionBatch:
    """Rows that are whole, padded, or hold documents and perhaps padding at the end."""
    length = draw(st.integers(1, longest))
    kind = draw(st.sampled_from(["whole", "padded", "documents", "documents"]))
    padding_bs = document_bs = None
    if kind == "documents":
        sizes = st.lists(st.one_of(st.integers(1, 4), st.integers(1, longest)), min_size=1, max_size=8)
        rows = [documents(*draw(sizes), length)[:, :length] for _ in range(2)]
        document_bs = torch.cat(rows)
    if kind == "padded" or (kind == "documents" and draw(st.booleans())):
        padding_bs = padding(*(draw(st.integers(0, length)) for _ in range(2)), length=length)
    return AttentionBatch(length, causal, CPU, padding_bs, document_bs)
