"""Our Triton kernels against the masked reference, interpreted at tiny shapes; test_triton_gpu.py has the real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_checks import (
    BIDIRECTIONAL,
    CAUSAL,
    CPU,
    LENGTH,
    case_name,
    documents,
    inputs,
    padding,
    results,
)
from torch import Tensor

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
from loras_bench.attention.reference import ReferenceBackend
from loras_bench.attention.tiles import Kernel, TileChoice
from loras_bench.attention.triton import TritonBackend
from loras_bench.errors import UserError
from loras_bench.metering.flops import MatmulCounter

pytest.importorskip("triton")
from loras_bench.attention.operators import _strides, sparse_attention, sparse_attention_backward

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # the interpreter's log of an empty row
WHOLE: dict[str, Tensor] = {}
PADDED = {"padding_bs": padding(LENGTH, 70)}
PACKED = {"document_bs": documents(20, 61, 1, 75)}
FILLED = {"document_bs": documents(50, 70, 37), "padding_bs": padding(120)}
MARKED = {"global_bs": torch.arange(LENGTH) % torch.tensor([[60], [200]]) == 7}
FACTS = {"whole": WHOLE, "padded": PADDED, "packed": PACKED, "filled": FILLED, "marked": MARKED}
ORDER = ["dense", "window", "longformer", "dilated", "strided", "fixed", "block_local", "bigbird"]
"""Of the patterns in CAUSAL and BIDIRECTIONAL."""


def tiles(queries: int, keys: int) -> dict[Kernel, TileChoice]:
    """One size for all kernels."""
    choice = TileChoice(queries, keys, 4, 2)
    return {"forward": choice, "queries": choice, "keys": choice}


def ours(bound: BoundPattern) -> TritonBackend:
    """With small tiles, so that tiny lengths have full ones; those of irregular patterns have one size."""
    return TritonBackend(None if bound.parts[0].listed else tiles(32, 16))


def bind(pattern: PatternBase, causal: bool, facts: dict[str, Tensor] = WHOLE, length: int = LENGTH) -> BoundPattern:
    return AttentionBatch(length, causal, CPU, **facts).bound(pattern)  # type: ignore[arg-type]


def check(bound: BoundPattern, backend: TritonBackend, **shape: int) -> None:
    """Output, log-sum-exp and all gradients in float32."""
    tensors = inputs(length=bound.batch.length, **shape)  # type: ignore[arg-type]
    found, expected = results(backend, bound, tensors), results(ReferenceBackend(), bound, tensors)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "causal", "facts"),
    [
        ("dense", True, "whole"),
        ("window", True, "padded"),
        ("longformer", True, "filled"),
        ("dilated", True, "padded"),
        ("strided", True, "filled"),
        ("fixed", True, "packed"),
        ("block_local", True, "packed"),
        ("bigbird", True, "whole"),
        ("dense", False, "packed"),
        ("window", False, "packed"),
        ("longformer", False, "marked"),
        ("dilated", False, "filled"),
        ("strided", False, "padded"),
        ("fixed", False, "padded"),
        ("block_local", False, "whole"),
        ("bigbird", False, "filled"),
    ],
)
def test_every_pattern_is_the_reference(kind: str, causal: bool, facts: str) -> None:
    """In the interpreter; padded rows and documents are where the schedule can go wrong."""
    pattern = (CAUSAL if causal else BIDIRECTIONAL)[ORDER.index(kind)]
    assert pattern.kind == kind
    bound = bind(pattern, causal, FACTS[facts])
    check(bound, ours(bound), heads=3 - bound.samples, groups=1, batch=bound.samples)


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("length", [64, 65], ids=["whole tiles", "odd"])
def test_head_dimensions(head_dim: int, length: int) -> None:
    bound = bind(Window(window=40, global_tokens=2), True, length=length)
    check(bound, ours(bound), heads=1, groups=1, batch=1, head_dim=head_dim)


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 1)])
def test_heads_share_keys(heads: int, groups: int) -> None:
    bound = bind(BlockLocal(block=20), False, length=70)
    check(bound, ours(bound), heads=heads, groups=groups, batch=1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pattern", [Dense(), Strided(stride=3), Fixed(stride=2, summary=1)], ids=case_name)
def test_one_token(pattern: PatternBase, causal: bool) -> None:
    bound = bind(pattern, causal, length=1)
    check(bound, ours(bound), batch=1)


@pytest.mark.parametrize(
    ("pattern", "length", "backend"),
    [
        (Window(window=8, global_tokens=3), 100, TritonBackend(tiles(16, 16))),
        (Longformer(window=8, global_positions=(70,)), 400, TritonBackend()),
    ],
    ids=["window", "longformer"],
)
def test_tiles_of_global_keys_that_are_split(
    pattern: PatternBase, length: int, backend: TritonBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After few visits already, so that the lengths may be small."""
    monkeypatch.setattr("loras_bench.attention.schedule.ITEM_VISITS", 4)
    bound = bind(pattern, True, length=length)
    (launch,) = backend.launches(bound, 16, 2)["keys"]
    assert launch.parts > 1
    check(bound, backend, heads=2, groups=1, batch=1)


@pytest.mark.parametrize("which", [0, 1], ids=["output", "log-sum-exp"])
def test_one_of_the_two_gradients_alone(which: int) -> None:
    """The gradient of a plain sum has strides of 0."""
    bound, tensors = bind(Window(window=9), True, length=40), inputs(length=40, batch=1)
    found = torch.autograd.grad(TritonBackend().attend(*tensors, bound, 0.3)[which].sum(), tensors, allow_unused=True)  # type: ignore[call-arg]
    value = ReferenceBackend().attend(*tensors, bound, 0.3)[which].sum()  # type: ignore[call-arg]
    expected = torch.autograd.grad(value, tensors, allow_unused=True, materialize_grads=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_an_infinite_gradient_of_an_empty_row_goes_nowhere() -> None:
    """The square of a log-sum-exp of -inf has one."""
    bound = bind(Window(window=9), True, {"padding_bs": padding(20, length=40)}, length=40)
    tensors = inputs(length=40, batch=1)
    found, expected = (
        torch.autograd.grad(backend.attend(*tensors, bound, 0.3)[1].square().sum(), tensors[:2])  # type: ignore[call-arg]
        for backend in (TritonBackend(), ReferenceBackend())
    )
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all() and (one != 0).any()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_heads_of_one_packed_projection() -> None:
    """q, k and v are views of one (batch, length, heads) matrix, as a fused projection leaves them."""
    bound, (heads, groups, dim) = bind(Strided(stride=7), True, length=40), (2, 1, 16)
    packed = torch.randn(2, 40, (heads + 2 * groups) * dim, generator=torch.Generator().manual_seed(0))
    parts = packed.unflatten(2, (-1, dim)).transpose(1, 2).split([heads, groups, groups], dim=1)
    views = [part.requires_grad_() for part in parts]
    assert not any(view.is_contiguous() for view in views)
    copies = [view.detach().clone().requires_grad_() for view in views]
    for one, other in zip(results(ours(bound), bound, views), results(ReferenceBackend(), bound, copies), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="contiguous"):
        ours(bound).attend(*(view.transpose(2, 3).contiguous().transpose(2, 3) for view in views), bound, 0.3)  # type: ignore[call-arg,misc]


def test_what_the_kernels_refuse() -> None:
    assert "cpu" in (TritonBackend().refusal(Dense(), CPU, 64) or "")
    assert TritonBackend().refusal(Dense(), torch.device("cuda"), 64) is None
    assert "at most 128" in (TritonBackend().refusal(Dense(), torch.device("cuda"), 256) or "")
    with pytest.raises(UserError, match="128"):
        TritonBackend().attend(*inputs(length=4, head_dim=160), bind(Dense(), True, length=4), 0.3)  # type: ignore[call-arg]


def test_elements_beyond_32_bits_are_refused() -> None:
    """2^20 positions of 2,048 elements each, of which only the shape exists."""
    _strides(torch.empty_strided((1, 1, 2**20, 16), (2**31, 16, 2047, 1), device="meta"), "q")
    with pytest.raises(ValueError, match="q is too long"):
        _strides(torch.empty_strided((1, 1, 2**20, 16), (2**31, 16, 2048, 1), device="meta"), "q")


def operands(bound: BoundPattern, backend: TritonBackend, tensors: list[Tensor]) -> tuple[list[Any], list[Any]]:
    """Arguments of the two operators."""
    q, k, v = (tensor.detach() for tensor in tensors)
    launches = backend.launches(bound, q.shape[3], q.shape[1] // k.shape[1])
    tables = {kernel: [table for launch in some for table in launch[:5]] for kernel, some in launches.items()}
    numbers = {kernel: [number for launch in some for number in launch[5:]] for kernel, some in launches.items()}
    forward = [q, k, v, tables["forward"], numbers["forward"], 0.3]
    out, lse = sparse_attention(*forward)
    own = [tables["queries"], numbers["queries"], tables["keys"], numbers["keys"]]
    return forward, [q, k, v, out, lse, torch.ones_like(out), torch.ones_like(lse), *own, 0.3]


@pytest.mark.parametrize("pattern", [Strided(stride=7), Fixed(stride=8, summary=2)], ids=case_name)
def test_operators_keep_the_rules_of_torch(pattern: PatternBase) -> None:
    """Schemas, fake tensors with the strides of the real ones, and tracing."""
    bound = bind(pattern, True, {"document_bs": documents(7, 13)}, length=20)
    forward, backward = operands(bound, ours(bound), inputs(length=20, batch=1, heads=2, groups=1))
    torch.library.opcheck(sparse_attention, forward)
    torch.library.opcheck(sparse_attention_backward, backward)


@pytest.mark.parametrize(
    ("pattern", "causal", "size", "pairs"),
    [
        (Dense(), False, (16, 16), 64**2),
        (Dense(), True, (16, 16), (1 + 2 + 3 + 4) * 256),
        (Dense(), True, (32, 16), (2 + 4) * 512),
        (Window(window=16), True, (16, 16), (1 + 2 + 2 + 2) * 256),
        (Window(window=1, global_tokens=1), True, (16, 16), (1 + 2 + 2 + 2) * 256),
        (BlockLocal(block=16, overlap=False), False, (16, 16), 4 * 256),
        (Dilated(window=64, dilation=4), True, (16, 16), 4 * 256),  # four classes of 16: block-diagonal
        (BigBird(block=64), True, (64, 64), 64**2),
    ],
    ids=case_name,
)
def test_flops_are_products_times_executed_pairs(
    pattern: PatternBase, causal: bool, size: tuple[int, int], pairs: int
) -> None:
    """64 tokens; two products forward, three for the queries and four for the keys: 9 x 2 x pairs x heads x dim."""
    bound, backend = bind(pattern, causal, length=64), TritonBackend(tiles(*size))
    tensors = inputs(length=64, batch=1, heads=2, groups=1)
    with MatmulCounter() as forward:
        out, _ = backend.attend(*tensors, bound, 0.3)  # type: ignore[call-arg]
    with MatmulCounter() as backward:
        out.sum().backward()
    assert backend.executed_pairs(bound, 1, 16) == pairs
    assert forward.flops == 2 * 2 * pairs * 2 * 16
    assert backward.flops == backend.backward_factor * forward.flops
    assert not forward.unknown and not backward.unknown


def test_executed_pairs_of_the_meta_device_and_of_padded_rows() -> None:
    backend = TritonBackend(tiles(16, 16))
    meta = AttentionBatch(64, True, torch.device("meta")).bound(Window(window=16))
    assert backend.executed_pairs(meta, 3, 16) == 3 * 7 * 256
    padded = bind(Dense(), False, {"padding_bs": padding(64, 20, 0, length=64)}, length=64)
    assert backend.executed_pairs(padded, 3, 16) == (16 + 4) * 256
