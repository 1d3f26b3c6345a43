"""Folded blocks against the dense weights that they stand for, in whole models, and what rank 1 can and cannot do."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from fold_checks import HEADS, SIZE, folded, noisy, unfold
from training_fixtures import WIDTH, attended, tiny, token_ids

from loras_bench.attention.dispatch import ModelAttention
from loras_bench.attention.patterns import Dense
from loras_bench.errors import UserError
from loras_bench.folding.attention import FoldedAttention
from loras_bench.folding.families import read_attention
from loras_bench.folding.fitting import Folding, fold_sizes

has_triton = find_spec("triton") is not None
FAMILIES = ("gpt2", "bert", "roberta", "llama")


def dense_twin(family, **options):
    """With a key head for each head: what heads share is written out."""
    more = {"num_key_value_heads": HEADS} if family == "llama" else {}
    return attended(family, **more, **options).eval()


def batches():
    """Whole rows, padded rows, and rows of two documents."""
    ids = token_ids(2, 12)
    position_s = torch.arange(12)
    second_b1 = torch.tensor([[5], [9]])
    document_bs = (position_s >= second_b1).long()
    yield {"input_ids": ids}
    yield {"input_ids": ids, "attention_mask": position_s < torch.tensor([[12], [7]])}
    yield {"input_ids": ids, "document_ids": document_bs, "position_ids": position_s - document_bs * second_b1}


@pytest.mark.parametrize("values", ["dense", "diagonal"])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("heads", ["per_head", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folded_model_equals_its_dense_weights(family, heads, rank, values):
    model = noisy(family)
    blocks = folded(model, heads, rank, values=values)
    assert len(blocks) == 2
    with torch.no_grad():
        for block in blocks:
            block.query_bias += 0.5
            if values == "diagonal":
                block.value_scale += torch.linspace(-1, 1, WIDTH)
    options = {"attention_bias": False} if family == "llama" else {}
    dense = unfold(model, blocks, dense_twin(family, **options))
    for batch in batches():
        if family == "roberta" and "position_ids" in batch:
            batch["position_ids"] = batch["position_ids"] + 2
        real_bs = batch.get("attention_mask", torch.ones(2, 12)).bool()
        got = model.base_model(**batch, use_cache=False)[0][real_bs]
        expected = dense.base_model(**batch, use_cache=False)[0][real_bs]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_the_dense_weights(family):
    """Of the block's input and its rows: dense gradients summed over the rows that are one row now."""
    model = noisy(family)
    blocks = folded(model)
    dense = unfold(model, blocks, dense_twin(family))
    for each in (model, dense):
        each.base_model(token_ids(2, 12), use_cache=False)[0].square().sum().backward()
    module = dense.base_model.get_submodule(
        {"gpt2": "h.0.attn", "llama": "layers.0.self_attn"}.get(family, "encoder.layer.0.attention.self")
    )
    if family == "gpt2":
        query_grad = module.c_attn.weight.grad.t()[:WIDTH]
    else:
        query_grad = (module.q_proj if family == "llama" else module.query).weight.grad
    expected = query_grad.unflatten(0, (HEADS, SIZE)).sum(1, keepdim=True)
    torch.testing.assert_close(blocks[0].query.grad, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    embeddings = [each.base_model.get_input_embeddings().weight.grad for each in (model, dense)]
    torch.testing.assert_close(*embeddings, rtol=1e-4, atol=1e-5 * float(embeddings[1].abs().max()))


def attention_weights(block, x_bsd):
    """P (batch, groups, q, k), by giving the core one-hot values."""
    seen = []
    attend = block.model_attention.attend

    def spy(layer, q, k, v, batch, scale):
        one_hot = torch.eye(x_bsd.shape[1]).expand(*q.shape[:2], -1, -1)
        seen.append((q, k, attend(layer, q, k, one_hot, batch, scale)))
        return attend(layer, q, k, v, batch, scale)

    block.model_attention.attend = spy
    block(x_bsd)
    del block.model_attention.attend
    return seen[0]


def test_logits_are_of_rank_1_and_each_head_looks_at_two_keys_at_most():
    model = noisy("bert")
    block = folded(model, layers=(0,))[0]
    x_bsd = torch.randn(1, 40, WIDTH, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        q, k, weights = attention_weights(block, x_bsd)
    assert q.shape == k.shape == (1, HEADS, 40, 1)
    for head in range(HEADS):
        targets = set(weights[0, head].argmax(-1).tolist())
        keys = k[0, head, :, 0]
        assert targets <= {int(keys.argmax()), int(keys.argmin())}
    assert any(len(set(weights[0, head].argmax(-1).tolist())) == 2 for head in range(HEADS))


def test_a_causal_block_sees_no_future():
    model = noisy("gpt2")
    block = folded(model, layers=(0,))[0]
    x_bsd = torch.randn(1, 10, WIDTH, generator=torch.Generator().manual_seed(3))
    changed_bsd = x_bsd.clone()
    changed_bsd[:, 6:] += 1
    with torch.no_grad():
        before, after = block(x_bsd)[0], block(changed_bsd)[0]
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


@pytest.mark.parametrize("initialisation", ["row_mean", "svd", "whitened"])
@pytest.mark.parametrize("family", ["gpt2", "bert", "roberta"])
def test_the_bias_of_keys_has_no_effect(family, initialisation):
    """A fold has none: models that differ in it alone, however much, fold to the same rows and outputs."""
    outputs, rows = [], []
    for size in (0.0, 5.0):
        model = noisy(family).double()
        with torch.no_grad():
            for layer in (0, 1):
                key = read_attention(model.base_model, layer).key
                key.bias_o.add_(size * torch.linspace(-1, 1, WIDTH).double())
        blocks = folded(model, initialisation=initialisation, values="diagonal")
        outputs.append(model.base_model(token_ids(2, 12), use_cache=False)[0])
        rows.append(torch.cat([block.query.flatten(1) @ block.key.flatten(1).t() for block in blocks]))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-7, atol=1e-7)


def test_rotary_logits_are_those_of_the_distance_kernel():
    """a_i b_j sum_p 2 cos(theta_p (i - j)) / sqrt(E): the notes' equation."""
    model = noisy("llama")
    block = folded(model, layers=(0,))[0]
    x_bsd = torch.randn(1, 9, WIDTH, generator=torch.Generator().manual_seed(3))
    position = torch.arange(9)
    rotation = model.base_model.rotary_emb(x_bsd, position[None])
    seen = []
    block.model_attention.attend = lambda layer, q, k, v, batch, scale: seen.append((q, k, scale)) or v
    block.mix(x_bsd, None, rotation)
    del block.model_attention.attend
    ((q, k, scale),) = seen
    a, b = (x_bsd @ rows[:, 0].t() for rows in (block.query, block.key))
    a = a + block.query_bias[:, 0]
    theta = model.base_model.rotary_emb.inv_freq
    kernel = 2 * torch.cos(theta * (position[:, None] - position)[..., None]).sum(-1)
    expected = torch.einsum("bqh,bkh,qk->bhqk", a, b, kernel) / SIZE**0.5
    torch.testing.assert_close(scale * q @ k.transpose(2, 3), expected, rtol=1e-4, atol=1e-4)


def test_folding_the_inputs_of_a_conv1d_would_leave_uniform_attention():
    """The trap: rows of the stored array are input units, and a normed input sums to 0. Ours are output units."""
    norm = torch.nn.LayerNorm(WIDTH, elementwise_affine=False)
    x_bsd = norm(torch.randn(1, 20, WIDTH, generator=torch.Generator().manual_seed(3)))
    wrong, right = noisy("gpt2"), noisy("gpt2")
    attn = wrong.base_model.h[0].attn
    stored_io = attn.c_attn.weight.detach().clone()
    with torch.no_grad():
        attn.c_attn.weight[:, : 2 * WIDTH] = stored_io[:, : 2 * WIDTH].mean(0, keepdim=True)
        (_, _, uniform), (_, _, ours) = (
            attention_weights(block, x_bsd) for block in (attn, folded(right, initialisation="row_mean")[0])
        )
    even = torch.ones(20, 20).tril() / torch.arange(1, 21)[:, None]
    torch.testing.assert_close(uniform, even.expand_as(uniform), rtol=0, atol=1e-5)
    assert (ours - even).abs().amax(dim=(0, 2, 3)).min() > 0.2, "every head looks somewhere"
    block = right.base_model.h[0].attn
    for head in range(HEADS):
        outputs = slice(head * SIZE, (head + 1) * SIZE)
        torch.testing.assert_close(block.query[head, 0], stored_io[:, outputs].mean(1))


@pytest.mark.parametrize(
    ("family", "heads", "rank", "values", "device", "equal"),
    [
        ("llama", "per_head", 1, "diagonal", "cpu", True),
        ("llama", "per_head", 2, "dense", "cuda", True),
        ("llama", "shared", 1, "dense", "cuda", False),
        ("bert", "per_head", 1, "diagonal", "cpu", False),
        ("bert", "per_head", 1, "diagonal", "cuda", True),
        ("bert", "per_head", SIZE, "dense", "cpu", True),
        ("gpt2", "shared", SIZE, "diagonal", "cuda", False),
    ],
)
def test_folds_of_equal_widths_keep_every_backend(family, heads, rank, values, device, equal):
    """Rotary rows are spread over the head; others have 8 columns on CUDA, which is the tiny models' head."""
    model = attended(family, device=torch.device(device))
    fold_sizes(model.base_model, (0,), Folding(heads, rank, "svd", values == "diagonal", 0.0))
    attention = model.base_model.model_attention
    assert attention.equal_widths is equal
    if device == "cuda":
        assert (attention._choose(Dense(), "auto", packed=True)[0].name == "triton") is (equal and has_triton)
    later = tiny(family)  # as a saved model is read: folded before attention is installed
    fold_sizes(later.base_model, (0,), Folding(heads, rank, "svd", values == "diagonal", 0.0))
    assert ModelAttention.install(later, device=torch.device(device)).equal_widths is equal


def test_heads_wider_than_the_model_have_widths_of_their_own():
    """Of 12 columns: a dense value has as many, a diagonal those of the inputs."""
    for values, equal in (("dense", True), ("diagonal", False)):
        model = attended("llama", head_dim=12)
        fold_sizes(model.base_model, (0,), Folding("per_head", 1, "svd", values == "diagonal", 0.0))
        assert model.base_model.model_attention.equal_widths is equal


def test_a_cache_is_refused():
    model = noisy("gpt2")
    folded(model)
    with pytest.raises(UserError, match="cache"):
        model(token_ids(1, 4), use_cache=True)


@pytest.mark.parametrize(
    ("heads", "values", "left"),
    [
        ("shared", "diagonal", 2 * WIDTH + 1 + WIDTH),
        ("per_head", "diagonal", HEADS * (2 * WIDTH + 1) + WIDTH),
        ("per_head", "dense", HEADS * (2 * WIDTH + 1) + WIDTH * WIDTH + WIDTH),
    ],
)
def test_what_is_left_is_really_smaller(heads, values, left):
    """Against the 3 d^2 + 3 d of c_attn; the output projection stays d^2 + d."""
    model = noisy("gpt2")
    before = sum(p.numel() for p in model.parameters())
    (block,) = folded(model, heads, values=values, layers=(1,))
    assert sum(p.numel() for p in block.parameters()) == left + WIDTH * WIDTH + WIDTH
    assert before - sum(p.numel() for p in model.parameters()) == 3 * WIDTH * WIDTH + 3 * WIDTH - left
    assert isinstance(model.base_model.h[1].attn, FoldedAttention)
