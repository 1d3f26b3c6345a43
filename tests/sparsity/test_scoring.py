"""What scores are taken from: the same norms as those of whole estimates, mean tokens by hand, random ones by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loras_bench.attention.binding import AttentionBatch
from loras_bench.sparsity import criteria, scoring
from loras_bench.sparsity.contextual import BatchTokens, ContextualSparsity, _mean_weights
from loras_bench.sparsity.criteria import Heads, LayerSparsity, feed_forward_scores, query_key_scores, value_scores
from loras_bench.sparsity.estimator import Factors, low_rank
from loras_bench.sparsity.scoring import Estimates, OutputNorms, RandomScores, ScoredTokens, TrueOutputs

CPU = torch.device("cpu")
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TOKENS, INPUTS, WIDTHS = 9, 24, (32, 16, 16)
REAL = torch.tensor([True] * 6 + [False] * 3)


def factors() -> list[Factors]:
    torch.manual_seed(0)
    return [low_rank(torch.randn(width, INPUTS), 4) for width in WIDTHS]


def inputs() -> Tensor:
    return torch.randn(TOKENS, INPUTS, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("real_t", [None, REAL])
def test_norms_of_estimates_need_no_estimates(real_t: Tensor | None) -> None:
    estimates = Estimates(factors())
    for norm_1n, one in zip(estimates.norms(inputs(), real_t), factors(), strict=True):
        torch.testing.assert_close(norm_1n, value_scores(one(inputs()), real_t)[None], rtol=1e-5, atol=1e-5)
    for y_tn, one in zip(estimates(inputs()), factors(), strict=True):
        torch.testing.assert_close(y_tn, one(inputs()))


def test_estimates_take_the_inputs_number_format_in_the_first_pass() -> None:
    estimates = Estimates(factors())
    exact = estimates.norms(inputs(), None)
    rough = estimates.norms(inputs().bfloat16(), None)
    assert all(norm_1n.dtype is torch.float32 for norm_1n in rough)
    torch.testing.assert_close(rough, exact, rtol=0.03, atol=0.03)
    assert all(y_tn.dtype is torch.bfloat16 for y_tn in estimates(inputs().bfloat16()))


@pytest.mark.parametrize("mean_token", [True, False])
def test_scores_are_the_criteria_of_what_the_layers_compute(mean_token: bool) -> None:
    torch.manual_seed(0)
    q, k, v, gate, up = layers = [nn.Linear(INPUTS, width, bias=width == 40) for width in (*WIDTHS, 40, 40)]
    heads = Heads(4, 2, 8)
    criterion = OutputNorms({3: TrueOutputs([gate, up])}, {3: TrueOutputs([q, k, v])}, heads, mean_token)
    mean_mt = torch.zeros(2, TOKENS)
    mean_mt[0, :2], mean_mt[1, 2:6] = 1 / 2, 1 / 4
    tokens, x_td = ScoredTokens(REAL, mean_mt), inputs()
    with torch.no_grad():
        pairs, values = criterion.attention(3, x_td, tokens)
        hidden = criterion.feed_forward(3, x_td, tokens)
        y = [layer(x_td) for layer in layers]
        if mean_token:
            y[3:] = [layer(torch.stack([x_td[:2].mean(0), x_td[2:6].mean(0)])) for layer in layers[3:]]
        torch.testing.assert_close(pairs, query_key_scores(y[0], y[1], heads, REAL))
        torch.testing.assert_close(values, value_scores(y[2], REAL))
        torch.testing.assert_close(hidden, feed_forward_scores(y[3], y[4], None if mean_token else REAL))


def test_the_mean_token_is_over_the_real_tokens_of_a_sample() -> None:
    """Samples 1, 0, 1 of tokens in any order; a sample without tokens, and a number that is no sample's."""
    sample_t = torch.tensor([1, 0, 1, 1, 7, 0])
    real_t = torch.tensor([True, True, True, False, True, True])
    expected = [[0, 0.5, 0, 0, 0, 0.5], [0.5, 0, 0.5, 0, 0, 0], [0] * 6]
    assert _mean_weights(sample_t, torch.arange(3), real_t).tolist() == expected
    assert _mean_weights(sample_t, torch.tensor([7]), None).tolist() == [[0, 0, 0, 0, 1, 0]]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("real_t", [None, REAL], ids=["all real", "padded"])
@pytest.mark.parametrize("group", [1, 3])
def test_our_kernels_choose_what_torch_chooses(
    group: int, real_t: Tensor | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores, selection and what belongs to it: where a layer asks. On a CPU they are interpreted."""
    pytest.importorskip("triton")
    torch.manual_seed(0)
    heads, hidden = Heads(2 * group, 2, 8), 40
    widths = {"qkv": (16 * group, 16, 16), "gate_up": (hidden, hidden)}
    made = {name: [low_rank(torch.randn(width, INPUTS), 4) for width in of] for name, of in widths.items()}
    mean_mt = _mean_weights(torch.arange(TOKENS) // 4, torch.arange(2), real_t)
    tokens = BatchTokens(0, None, None, ScoredTokens(None if real_t is None else real_t.to(device), mean_mt.to(device)))
    chosen = []
    for kernels in (False, True):
        for module in (criteria, scoring):
            monkeypatch.setattr(module, "has_kernels", lambda device, kernels=kernels: kernels)
        estimates = {name: {0: Estimates(factors)} for name, factors in made.items()}
        criterion = OutputNorms(estimates["gate_up"], estimates["qkv"], heads, mean_token=True)
        sparsity = ContextualSparsity([LayerSparsity(0.8, 0.5)], heads, criterion, True)
        x_td = inputs().to(device)
        attention, hidden_2c = sparsity.attention(0, x_td, tokens), sparsity.feed_forward(0, x_td, tokens)
        assert attention is not None and hidden_2c is not None
        chosen.append([hidden_2c.tolist(), *(part.tolist() for part in attention)])
    assert chosen[0] == chosen[1]
    (gate, up), query, key, value, _, qkv = chosen[0]
    assert len(gate) == 8 and up == [channel + hidden for channel in gate] and gate == sorted(gate)
    side_by_side = [*query, *(16 * group + c for c in key), *(16 * group + 16 + c for c in value)]
    assert sorted(qkv) == sorted(side_by_side)


def test_random_scores_are_written_where_they_were() -> None:
    scores = RandomScores({2: (10, 3, 6), 5: (10, 3, 6)}, lambda: torch.device("cpu"))
    tokens = ScoredTokens(None, torch.zeros(1, 1))
    found = {}
    for step in (4, 5, 4):
        scores.draw(step)
        parts = [scores.feed_forward(layer, inputs(), tokens) for layer in (2, 5)]
        parts += [part for layer in (2, 5) for part in scores.attention(layer, inputs(), tokens)]
        assert [len(part) for part in parts] == [10, 10, 3, 6, 3, 6]
        found.setdefault(step, []).append([part.clone() for part in parts])
        places = [part.data_ptr() for part in parts]
        assert found.setdefault("places", places) == places  # type: ignore[call-overload]
    assert all(map(torch.equal, found[4][0], found[4][1]))
    assert not any(map(torch.equal, found[4][0], found[5][0]))


@pytest.mark.parametrize("packed", [False, True])
def test_the_tokens_of_a_batch_and_their_samples_with_the_dense_ones_first(packed: bool) -> None:
    """Documents of 3 and 2 tokens and a place without one: side by side, or one after the other."""
    if packed:
        document_bs = torch.tensor([[0, 0, 0, 1, 1, 2]])
        facts: dict[str, Any] = {"document_bs": document_bs, "padding_bs": document_bs < 2}
        batch, rows, samples = AttentionBatch(6, True, CPU, **facts), 1, torch.arange(2)
    else:
        real_bs = torch.tensor([[True, True, True], [True, True, False]])
        batch, rows, samples = AttentionBatch(3, True, CPU, padding_bs=real_bs), 2, None
    sparsity = ContextualSparsity([LayerSparsity(0.5)], Heads(2, 2, 4), RandomScores({}, lambda: CPU), False)
    dense_rows, sparse_rows = torch.tensor([2, 3]), torch.tensor([0, 1, 4, 5])
    tokens = sparsity._tokens(batch, rows, torch.float32, dense_rows, sparse_rows, samples)
    assert tokens is not None and tokens.order_t is not None and tokens.place_t is not None
    assert (tokens.dense, tokens.order_t.tolist()) == (2, [2, 3, 0, 1, 4, 5])
    assert tokens.order_t[tokens.place_t].tolist() == [0, 1, 2, 3, 4, 5]
    assert tokens.scored.real_t is not None and tokens.scored.real_t.tolist() == [True] * 5 + [False]
    third, half = 1 / 3, 1 / 2
    expected = torch.tensor([[third, 0, third, third, 0, 0], [0, half, 0, 0, half, 0]])
    torch.testing.assert_close(tokens.scored.mean_mt, expected)
