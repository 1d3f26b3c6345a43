"""The mathematics of folding: what each initialisation guarantees, and what the output's fit minimises."""

from __future__ import annotations

import pytest
import torch
from fold_checks import logit_error
from hypothesis import given, settings
from hypothesis import strategies as st

from loras_bench.folding.factors import Moments, bands, best_product, fold_rows, ridge

HEADS, SIZE, HIDDEN = 2, 4, 6


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def product_of(u_rc, w_rd, size):
    """M that the folded rows stand for: [W_Q, b_Q]^T W_K with every row of a band alike."""
    return size / len(u_rc) * u_rc.t() @ w_rd


def test_row_means_by_hand():
    query_hec = torch.tensor([[[1.0, 2, 3], [3, 4, 5]], [[5, 6, 7], [7, 8, 9]]])
    key_hed = torch.tensor([[[1.0, 0], [3, 0]], [[0, 2], [0, 2]]])
    u_rc, w_rd = fold_rows(query_hec, key_hed, 1, "row_mean")
    assert u_rc.tolist() == [[4, 5, 6]]
    assert w_rd.tolist() == [[1, 1]]
    u_rc, w_rd = fold_rows(query_hec[:1], key_hed[:1], 2, "row_mean")
    assert u_rc.tolist() == query_hec[0].tolist()
    assert w_rd.tolist() == key_hed[0].tolist()


def test_bands_keep_rotary_pairs_together():
    assert bands(8, 2, rotary=False).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert bands(8, 2, rotary=True).tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert bands(8, 1, rotary=True).tolist() == [0] * 8


def test_the_row_mean_is_the_nearest_matrix_of_identical_rows():
    query_hec, key_hed = drawn(1, SIZE, HIDDEN + 1), drawn(1, SIZE, HIDDEN, seed=1)
    u_rc, _ = fold_rows(query_hec, key_hed, 1, "row_mean")
    best = float((query_hec[0] - u_rc).square().sum())
    for seed in range(20):
        moved_rc = u_rc + 0.01 * drawn(1, HIDDEN + 1, seed=seed)
        assert float((query_hec[0] - moved_rc).square().sum()) > best


@pytest.mark.parametrize("initialisation", ["row_mean", "svd", "whitened"])
def test_at_full_rank_nothing_is_lost(initialisation):
    query_hec, key_hed = drawn(1, SIZE, HIDDEN + 1), drawn(1, SIZE, HIDDEN, seed=1)
    x_tc = torch.cat([drawn(50, HIDDEN, seed=2), torch.ones(50, 1)], dim=1)
    moments = Moments.of(x_tc.t() @ x_tc / 50)
    u_rc, w_rd = fold_rows(query_hec, key_hed, SIZE, initialisation, moments=moments)
    torch.testing.assert_close(product_of(u_rc, w_rd, SIZE), query_hec[0].t() @ key_hed[0])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rank=st.sampled_from([1, 2]),
    heads=st.sampled_from([1, HEADS]),
    spread=st.floats(0.05, 20),
    missing=st.integers(0, 2),
)
def test_what_svd_and_whitening_guarantee(seed, rank, heads, spread, missing):
    """SVD is nearest in weights; whitening has the smallest error of the logits, over the inputs that it saw."""
    query_hec, key_hed = drawn(heads, SIZE, HIDDEN + 1, seed=seed), drawn(heads, SIZE, HIDDEN, seed=seed + 1)
    scales_d = torch.linspace(1, spread, HIDDEN, dtype=torch.float64)
    scales_d[:missing] = 0  # inputs that never vary
    x_td = 0.3 + drawn(40, HIDDEN, seed=seed + 2) * scales_d
    x_tc = torch.cat([x_td, torch.ones(40, 1)], dim=1)
    moments = Moments.of(x_tc.t() @ x_tc / 40)
    m_cd = (query_hec.transpose(1, 2) @ key_hed).mean(0)
    fitted = {
        name: product_of(*fold_rows(query_hec, key_hed, rank, name, moments=moments), SIZE)
        for name in ("row_mean", "svd", "whitened")
    }
    distance = {name: float((m_cd - fit_cd).norm()) for name, fit_cd in fitted.items()}
    assert distance["svd"] <= min(distance["row_mean"], distance["whitened"]) * (1 + 1e-9)
    error = {name: logit_error(m_cd, fit_cd, moments) for name, fit_cd in fitted.items()}
    assert error["whitened"] <= min(error["row_mean"], error["svd"]) * (1 + 1e-9) + 1e-9


def test_the_error_of_logits_is_what_a_softmax_sees():
    """Against the logits themselves, each query's mean over the keys taken out."""
    x_tc = torch.cat([drawn(30, HIDDEN), torch.ones(30, 1)], dim=1)
    gap_cd = drawn(HIDDEN + 1, HIDDEN, seed=1)
    logits_qk = x_tc @ gap_cd @ x_tc[:, :-1].t()
    centred_qk = logits_qk - logits_qk.mean(1, keepdim=True)
    got = logit_error(gap_cd, torch.zeros_like(gap_cd), Moments.of(x_tc.t() @ x_tc / 30))
    assert got == pytest.approx(float(centred_qk.square().mean()))


def test_moments_by_hand():
    x_tc = torch.tensor([[1.0, 0, 1], [3.0, 2, 1]], dtype=torch.float64)
    moments = Moments.of(x_tc.t() @ x_tc / 2)
    assert moments.query_cc.tolist() == [[5, 3, 2], [3, 2, 1], [2, 1, 1]]
    assert moments.key_dd.tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("initialisation", ["svd", "whitened"])
def test_rotary_bands_are_fitted_apart(initialisation):
    """Each at its best for its own pairs: as folding the rows of one band alone would be."""
    query_hec, key_hed = drawn(HEADS, 8, HIDDEN + 1), drawn(HEADS, 8, HIDDEN, seed=1)
    x_tc = torch.cat([drawn(30, HIDDEN, seed=2), torch.ones(30, 1)], dim=1)
    moments = Moments.of(x_tc.t() @ x_tc / 30)
    u_rc, w_rd = fold_rows(query_hec, key_hed, 2, initialisation, rotary=True, moments=moments)
    band = [2, 3, 6, 7]
    a_rc, b_rd = fold_rows(query_hec[:, band], key_hed[:, band], 1, initialisation, moments=moments)
    torch.testing.assert_close(u_rc[1:].t() @ w_rd[1:], a_rc.t() @ b_rd)


def test_the_best_product_has_the_remaining_singular_values_as_its_error():
    a_nc, b_nd = drawn(5, 7), drawn(5, 6, seed=1)
    u_rc, w_rd = best_product(a_nc, b_nd, 2)
    left = torch.linalg.svdvals(a_nc.t() @ b_nd)[2:]
    assert float((a_nc.t() @ b_nd - u_rc.t() @ w_rd).norm()) == pytest.approx(float(left.norm()))


def test_ridge_by_hand():
    """Without a penalty a line through two points; with one, the slope of (sum z y) / (sum z^2 + l)."""
    z_tm = torch.tensor([[1.0, 1], [3.0, 1]], dtype=torch.float64)
    y_tn = torch.tensor([[5.0], [9.0]], dtype=torch.float64)
    weight, bias = ridge(z_tm.t() @ z_tm, z_tm.t() @ y_tn, 0.0, intercept=True)
    assert (weight.item(), bias.item()) == pytest.approx((2, 3))
    weight, bias = ridge(z_tm.t() @ z_tm, z_tm.t() @ y_tn, 0.6, intercept=False)
    assert weight.item() == pytest.approx((5 + 27) / (10 + 6))
    assert bias is None


def test_ridge_is_the_minimum_and_leaves_the_bias_free():
    z_tm = torch.cat([drawn(40, 5), torch.ones(40, 1)], dim=1)
    y_tn = drawn(40, 3, seed=1) + 7
    gram_mm = z_tm.t() @ z_tm
    weight, bias = ridge(gram_mm, z_tm.t() @ y_tn, 0.5, intercept=True)
    weight.requires_grad_(), bias.requires_grad_()
    penalty = 0.5 * float(gram_mm.diagonal()[:-1].mean())
    loss = (z_tm[:, :-1] @ weight.t() + bias - y_tn).square().sum() + penalty * weight.square().sum()
    slopes = torch.autograd.grad(loss, [weight, bias])
    assert all(float(slope.abs().max()) < 1e-9 for slope in slopes)
