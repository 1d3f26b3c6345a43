"""From a trained model to a folded one: what is exact, what is a fit, and on which tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from fold_checks import HEADS, LAYERS, SIZE, folded, logit_error, noisy
from training_fixtures import WIDTH, token_ids

from loras_bench.folding.attention import FoldedAttention
from loras_bench.folding.factors import Moments, fold_rows
from loras_bench.folding.families import read_attention, with_constant
from loras_bench.folding.fitting import Folding, fold_model

FAMILIES = ("gpt2", "bert", "roberta", "llama")


def hidden(model, ids=None):
    with torch.no_grad():
        return model.base_model(token_ids(2, 12) if ids is None else ids, use_cache=False)[0]


def relative(got, expected):
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_diagonal_is_free_where_heads_share_their_rows(family):
    """To 1e-5, biases included: the dense value matrix goes into the output projection."""
    dense, diagonal = noisy(family).double(), noisy(family).double()
    for model, values in ((dense, "dense"), (diagonal, "diagonal")):
        folded(model, "shared", values=values)
    assert relative(hidden(diagonal), hidden(dense)) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_a_diagonal_is_not_free_where_heads_keep_their_own(family):
    """A head then sees its own channels alone: a fit, which must not be called exact, and is better than none."""
    exact = attention_output(noisy(family))
    found = {}
    for values, penalty in (("dense", 0.0), ("diagonal", 1e-9), ("diagonal", 1e9)):
        model = noisy(family)
        folded(model, "per_head", values=values, penalty=penalty)
        found[values, penalty] = attention_output(model)
    fitted, bias_alone = found["diagonal", 1e-9], found["diagonal", 1e9]
    assert relative(fitted, found["dense", 0.0]) > 0.1
    assert relative(fitted, exact) < 0.9 * relative(bias_alone, exact)


def attention_output(model):
    """Of the first layer, output projection included, on the tokens that `folded` fits to."""
    name = {"gpt2": "h.0.attn.c_proj", "llama": "layers.0.self_attn.o_proj"}
    output = model.base_model.get_submodule(name.get(model.config.model_type, "encoder.layer.0.attention.output.dense"))
    seen = []
    output.register_forward_hook(lambda module, args, out: seen.append(out))
    for seed in range(4):
        hidden(model, token_ids(4, 24, seed=seed))
    return torch.cat(seen)


@pytest.mark.parametrize("family", ["gpt2", "bert", "roberta"])
def test_at_full_rank_a_model_keeps_its_outputs(family):
    model = noisy(family).double()
    before = hidden(model)
    folded(model, rank=SIZE)
    assert relative(hidden(model), before) < 1e-9


def test_rotary_folds_are_not_exact_at_any_rank():
    """SIZE / 2 bands of one pair each, and a pair's rotation mixes its two rows; the more, the nearer all the same."""
    exact, distance = attention_output(noisy("llama")), []
    for initialisation, rank in (("row_mean", 1), ("svd", 1), ("whitened", 1), ("whitened", SIZE // 2)):
        model = noisy("llama")
        folded(model, rank=rank, initialisation=initialisation)
        distance.append(relative(attention_output(model), exact))
    assert distance[0] > distance[1] > distance[2] > distance[3] > 0.01


def seen_by(model, layer, feeds):
    """Inputs (tokens, d) and outputs of a layer's dense attention, output projection included; real tokens."""
    place, xs, ys = read_attention(model.base_model, layer), [], []
    hooks = [
        place.module.register_forward_pre_hook(
            lambda module, args, kwargs: xs.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]),
            with_kwargs=True,
        ),
        place.output.register_forward_hook(lambda module, args, out: ys.append(out)),
    ]
    for batch in feeds:
        model.base_model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    real = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool() for batch in feeds]
    return [torch.cat([part[mask] for part, mask in zip(parts, real, strict=True)]).double() for parts in (xs, ys)]


def padded_feeds():
    mask = torch.arange(24) < torch.tensor([[24], [15], [9], [24]])
    return [{"input_ids": token_ids(4, 24, seed=seed), "attention_mask": mask} for seed in range(3)]


@pytest.mark.parametrize("family", FAMILIES)
def test_whitened_rows_are_fitted_to_the_real_tokens_of_each_layer(family):
    model, feeds = noisy(family), padded_feeds()
    with torch.no_grad():
        x_td, _ = seen_by(model, 1, feeds)
    x_tc = torch.cat([x_td, torch.ones(len(x_td), 1)], dim=1)
    place = read_attention(model.base_model, 1)
    query_hec = with_constant(place.query.heads(HEADS)).double()
    key_heads = len(place.key.weight_oi) // SIZE
    key_hed = place.key.heads(key_heads).weight_oi.double().repeat_interleave(HEADS // key_heads, dim=0)
    moments = Moments.of(x_tc.t() @ x_tc / len(x_tc))
    rotary = family == "llama"
    folding = Folding("per_head", 1, "whitened", False, 0.0)
    feed = lambda: [model.base_model(**batch, use_cache=False) for batch in feeds]  # noqa: E731
    fold_model(model.base_model, LAYERS, folding, feed)
    block = read_attention_block(model, 1)
    for head in range(HEADS):
        u_rc, w_rd = fold_rows(query_hec[[head]], key_hed[[head]], 1, "whitened", rotary=rotary, moments=moments)
        rows_rc = torch.cat([block.query[head], block.query_bias[head, :, None]], dim=1).double()
        got_cd = rows_rc.t() @ block.key[head].double()
        m_cd = query_hec[head].t() @ key_hed[head]
        expected = logit_error(m_cd, SIZE * u_rc.t() @ w_rd, moments)
        assert logit_error(m_cd, SIZE * got_cd.detach(), moments) == pytest.approx(expected, rel=1e-3)


def read_attention_block(model, layer):
    blocks = [module for module in model.modules() if isinstance(module, FoldedAttention)]
    return next(block for block in blocks if block.layer_idx == layer)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fitted_output_is_the_least_squares_one(family):
    """Of the first layer, whose inputs folding leaves as they are; against torch's own solver."""
    model, feeds = noisy(family), padded_feeds()
    original = copy.deepcopy(model)
    with torch.no_grad():
        x_td, y_td = seen_by(original, 0, feeds)
    fold_model(
        model.base_model,
        LAYERS,
        Folding("per_head", 1, "row_mean", True, 1e-12),
        lambda: [model.base_model(**batch, use_cache=False) for batch in feeds],
    )
    block, mixed = read_attention_block(model, 0), []
    mix = block.mix
    block.mix = lambda *args: mixed.append(mix(*args)) or mixed[-1]
    for batch in feeds:
        model.base_model(**batch, use_cache=False)
    mask = feeds[0]["attention_mask"]
    z_tm = torch.cat([part[mask] for part in mixed]).detach().double()
    output = {"gpt2": "h.0.attn.c_proj", "llama": "layers.0.self_attn.o_proj"}.get(
        family, "encoder.layer.0.attention.output.dense"
    )
    module = model.base_model.get_submodule(output)
    with torch.no_grad():
        got_td = module(z_tm.float()).double()
    if family != "llama":  # its projection has no bias to fit
        z_tm = torch.cat([z_tm, torch.ones(len(z_tm), 1)], dim=1)
    best = float((z_tm @ torch.linalg.lstsq(z_tm, y_td).solution - y_td).square().sum())
    assert float((got_td - y_td).square().sum()) == pytest.approx(best, rel=1e-3)
    assert best < 0.95 * float((y_td - y_td.mean(0)).square().sum())
    assert len(x_td) == len(y_td) == 3 * int(mask.sum())


def test_only_the_named_layers_change():
    model = noisy("gpt2")
    kept = model.base_model.h[0].attn
    output = kept.c_proj.weight.clone()
    folded(model, values="diagonal", layers=(1,))
    assert model.base_model.h[0].attn is kept
    assert torch.equal(kept.c_proj.weight, output)
    assert model.base_model.h[1].attn.c_proj.weight.shape == (WIDTH, WIDTH)


def test_heads_wider_than_the_model_get_a_projection_that_fits():
    """Llama's heads need not add up to the hidden size: a diagonal reads the inputs, which do."""
    model = noisy("llama", head_dim=12)
    (_, block) = folded(model, "shared", values="diagonal")
    assert block.o_proj.weight.shape == (WIDTH, WIDTH)
    assert (block.o_proj.in_features, block.o_proj.out_features) == (WIDTH, WIDTH)
    assert torch.isfinite(hidden(model)).all()
