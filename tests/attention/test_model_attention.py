"""Whole transformers models on our attention: parity, causality, receptive field, taps, counting."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
)
from transformers.pytorch_utils import Conv1D

from loras_bench.attention.binding import AttentionBatch
from loras_bench.attention.dense import DenseKernel
from loras_bench.attention.dispatch import ModelAttention, SparseBackend
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
from loras_bench.attention.tiles import choose_tiles
from loras_bench.attention.triton import PRODUCTS, TritonBackend
from loras_bench.errors import ConfigError, UserError
from loras_bench.methods.base import Taps

LENGTH = 48
CAUSAL = [
    Window(window=7),
    Window(window=7, global_tokens=3),
    Longformer(window=5, global_positions=(9, 30)),
    Longformer(window=5, global_token_ids=(3,)),
    Dilated(window=4, dilation=3),
    Strided(stride=7),
    Fixed(stride=8, summary=2),
    BlockLocal(block=10),
    BigBird(block=4, window_blocks=2, global_blocks=1, random_blocks=2),
    Dense(),
]


def make(family: str, attn: str = "eager", layers: int = 2) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4}
    match family:
        case "llama":
            config = LlamaConfig(**sizes, intermediate_size=48, num_key_value_heads=2)
            return LlamaForCausalLM._from_config(config, attn_implementation=attn).eval()
        case "gpt2":
            config = GPT2Config(vocab_size=50, n_embd=32, n_layer=layers, n_head=4, n_positions=64, attn_pdrop=0.0)
            return GPT2LMHeadModel._from_config(config, attn_implementation=attn).eval()
        case "bert":
            config = BertConfig(**sizes, intermediate_size=48, attention_probs_dropout_prob=0.0)
            return BertModel._from_config(config, attn_implementation=attn).eval()
        case _:
            config = RobertaConfig(**sizes, intermediate_size=48, attention_probs_dropout_prob=0.0)
            return RobertaModel._from_config(config, attn_implementation=attn).eval()


def tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(4, 50, (batch, length), generator=torch.Generator().manual_seed(1))


def final(model: nn.Module, ids: Tensor, **kwargs: Any) -> Tensor:
    return model(input_ids=ids, **kwargs)[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta"])
@pytest.mark.parametrize("theirs", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_dense_install_changes_nothing(family: str, theirs: str, padded: bool) -> None:
    expected_model, model = make(family, theirs), make(family)
    ModelAttention.install(model)
    ids, mask = tokens(), torch.ones(2, LENGTH, dtype=torch.int64)
    if padded:
        mask[1, 29:] = 0
    kwargs = {"attention_mask": mask} if padded else {}
    real = mask.bool()
    found, expected = final(model, ids, **kwargs)[real], final(expected_model, ids, **kwargs)[real]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.square().sum().backward()
    expected.square().sum().backward()
    for (name, one), other in zip(model.named_parameters(), expected_model.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("pattern", CAUSAL, ids=lambda p: p.kind)
@torch.no_grad()
def test_no_layer_of_the_model_sees_its_future(family: str, pattern: PatternBase) -> None:
    model = make(family)
    ModelAttention.install(model).set_patterns([pattern, pattern])
    ids = tokens()
    ids[:, 20] = 3  # a global token of the pattern that names ids
    before = final(model, ids)
    for position in (0, 17, LENGTH - 1):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % 40 + 4
        after = final(model, changed)
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.equal(after[:, position], before[:, position])


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@torch.no_grad()
def test_a_window_of_the_whole_length_is_dense(padded: bool) -> None:
    mask = torch.ones(2, LENGTH).bool()
    if padded:
        mask[1, 29:] = False
    for family, pattern in (("llama", Window(window=LENGTH)), ("bert", Window(half_width=LENGTH))):
        model = make(family)
        attention = ModelAttention.install(model)
        dense = final(model, tokens(), attention_mask=mask)
        attention.set_patterns([pattern, pattern])
        torch.testing.assert_close(final(model, tokens(), attention_mask=mask), dense, rtol=1e-5, atol=1e-5)
        attention.set_patterns([Window(window=3) if family == "llama" else Window(half_width=1)] * 2)
        assert not torch.allclose(final(model, tokens(), attention_mask=mask), dense, atol=1e-3)


@torch.no_grad()
def test_receptive_field_grows_by_window_less_one_a_layer() -> None:
    model, position = make("llama", layers=3), 10
    attention = ModelAttention.install(model)
    ids, changed = tokens(), tokens()
    changed[:, position] = (changed[:, position] + 1) % 40 + 4

    def reach(pattern: PatternBase) -> int:
        attention.set_patterns([pattern] * 3)
        difference = (final(model, ids) != final(model, changed)).any(dim=-1).any(dim=0)
        return int(difference.nonzero().max())

    assert reach(Window(window=5)) == position + 3 * (5 - 1)
    assert reach(Longformer(window=5, global_positions=(14,))) == LENGTH - 1


@torch.no_grad()
def test_documents_of_a_row_are_independent() -> None:
    for pattern in (Dense(), Window(window=6)):
        model = make("gpt2")
        ModelAttention.install(model).set_patterns([pattern, pattern])
        ids = tokens(1)
        document_ids = (torch.arange(LENGTH) >= 20).int()[None]
        before = final(model, ids, document_ids=document_ids)
        changed = ids.clone()
        changed[:, 19] += 1
        assert torch.equal(final(model, changed, document_ids=document_ids)[:, 20:], before[:, 20:])
        assert not torch.equal(final(model, changed)[:, 20:], before[:, 20:])


@torch.no_grad()
def test_global_mask_of_the_batch_reaches_the_pattern() -> None:
    model = make("bert")
    attention = ModelAttention.install(model)
    attention.set_patterns([Longformer(half_width=1)] * 2)
    mask = torch.zeros(2, LENGTH, dtype=torch.int64)
    mask[:, 0] = 1
    marked = final(model, tokens(), global_mask=mask)
    attention.set_patterns([Longformer(half_width=1, global_tokens=1)] * 2)
    assert torch.equal(marked, final(model, tokens()))
    attention.set_patterns([Window(half_width=1)] * 2)
    with pytest.raises(UserError, match="global tokens"):
        final(model, tokens(), global_mask=mask)


@torch.no_grad()
def test_override_is_dense_inside_and_gone_after() -> None:
    model = make("llama")
    attention = ModelAttention.install(model)
    dense = final(model, tokens())
    attention.set_patterns([Window(window=4)] * 2)
    sparse = final(model, tokens())
    with attention.override(Dense()):
        assert torch.equal(final(model, tokens()), dense)
    assert torch.equal(final(model, tokens()), sparse)
    assert not torch.equal(sparse, dense)


def test_static_batches_are_bound_once_and_shared_by_layers() -> None:
    model = make("llama")
    attention = ModelAttention.install(model)
    attention.set_patterns([Window(window=4)] * 2)
    for _ in range(3):
        final(model, tokens())
    assert len(attention._static_bindings) == 1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("pattern", [Window(window=9, global_tokens=2), Dense()], ids=lambda p: p.kind)
def test_taps_lead_into_the_graph_also_when_layers_are_recomputed(pattern: PatternBase, checkpointing: bool) -> None:
    model = make("llama").train()
    attention = ModelAttention.install(model)
    attention.set_patterns([pattern] * 2)
    plain = final(model, tokens())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    attention.taps = taps = Taps()
    logits = final(model, tokens(), use_cache=False)
    torch.testing.assert_close(logits, plain, rtol=1e-5, atol=1e-5)
    assert sorted(taps.attention) == [0, 1]
    tap = taps.attention[1]
    assert tap.q_bhsd.shape == (2, 4, LENGTH, 8) and tap.k_bgsd.shape == (2, 2, LENGTH, 8)
    mask = attention.batch(LENGTH, logits.device).bound(pattern).mask_bqk
    scores = torch.einsum("bgrqd,bgkd->bgrqk", tap.q_bhsd.view(2, 2, 2, LENGTH, 8), tap.k_bgsd).flatten(1, 2)
    expected = (scores * tap.scale).masked_fill(~mask[:, None], float("-inf")).logsumexp(-1)
    torch.testing.assert_close(tap.lse_bhs, expected, rtol=1e-5, atol=1e-5)
    loss = tap.lse_bhs.square().mean() + tap.q_bhsd.square().mean()
    gradient = torch.autograd.grad(loss, model.model.layers[0].self_attn.v_proj.weight)[0]
    assert gradient.isfinite().all() and (gradient != 0).any()
    if checkpointing:
        model.gradient_checkpointing_disable()
        attention.taps = again = Taps()
        final(model, tokens(), use_cache=False)
        loss = again.attention[1].lse_bhs.square().mean() + again.attention[1].q_bhsd.square().mean()
        expected = torch.autograd.grad(loss, model.model.layers[0].self_attn.v_proj.weight)[0]
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


def flops_of_step(model: nn.Module, ids: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        final(model, ids, use_cache=False).float().sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("pattern", [Window(window=9, global_tokens=2), Dense()], ids=lambda p: p.kind)
def test_counting_leaves_no_arithmetic_in_the_core(pattern: PatternBase, device: str) -> None:
    """Counted on the surrounding linear layers alone: 2 FLOPs a weight and token forward, twice that backward."""
    model = make("gpt2").to(device)
    attention = ModelAttention.install(model)
    attention.set_patterns([pattern] * 2)
    with attention.counting() as log:
        counted = flops_of_step(model, tokens().to(device))
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | Conv1D))
    assert counted == 6 * linear * 2 * LENGTH
    assert [(call.layer, call.heads, call.head_dim, call.backward) for call in log] == [
        (0, 4, 8, True),
        (1, 4, 8, True),
    ]
    for call in log:
        assert call.pairs.dense == 2 * LENGTH * (LENGTH + 1) // 2
        assert call.pairs.allowed == 2 * pattern.count_pairs(LENGTH, True)
        assert call.pairs.executed == 2 * LENGTH**2  # one tile; the reference computes everything


def test_counted_and_real_core_agree_on_a_dense_bidirectional_model() -> None:
    """The math kernel is plain products, which torch counts by itself: both ways give the same total."""
    model = make("bert")
    attention = ModelAttention.install(model, dense_kernel="math")
    with attention.counting() as log:
        around = flops_of_step(model, tokens())
    real = flops_of_step(model, tokens())
    assert real == around + sum(call.flops(call.pairs.executed) for call in log)


def test_counting_sees_recomputation_and_inference() -> None:
    model = make("gpt2").train()
    attention = ModelAttention.install(model)
    with attention.counting() as log, torch.no_grad():
        final(model, tokens())
    assert [call.backward for call in log] == [False, False]
    assert log[0].flops(10) == 4 * 10 * 8 * 4
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with attention.counting() as log:
        final(model, tokens(), use_cache=False).sum().backward()
    assert len(log) == 4 and sum(call.backward for call in log) == 2
    assert log[0].flops(10) == 4 * 10 * 8 * 4 * 3.5


def test_pair_counts_from_lengths_are_those_of_the_padded_batch() -> None:
    model = make("llama")
    attention = ModelAttention.install(model)
    attention.set_patterns([Window(window=9, global_tokens=2), Dense()])
    lengths = [48, 31, 31, 7]
    mask = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    with attention.counting() as log:
        final(model, tokens(4), attention_mask=mask)
    assert attention.pair_counts(lengths) == [call.pairs for call in log]
    assert attention.pair_counts(lengths, 64)[0].executed == 4 * 64**2
    assert attention.pair_counts([40])[0].allowed == Window(window=9, global_tokens=2).count_pairs(40, True)


def test_describe_is_json_with_a_reason_for_every_layer() -> None:
    attention = ModelAttention.install(make("llama"))
    attention.set_patterns([Dense(), Window(window=4)])
    described = json.loads(json.dumps(attention.describe()))
    dense, window = described["layers"]
    assert dense["backend"] == "sdpa" and described["dense_kernel"] == "auto"
    assert window == {
        "pattern": {"kind": "window", "window": 4, "half_width": None, "global_tokens": 0},
        "backend": "reference",
        "reason": "our Triton kernels do not run on cpu; FlexAttention has no backward pass on cpu",
    }


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def tiles_of_a_window(window: int, length: int, queries: int, keys: int) -> int:
    """Tiles that hold a pair, of a causal window whose length is a multiple of both edges."""
    rows = range(0, length, queries)
    return sum((row + queries - 1) // keys - max(row - window + 1, 0) // keys + 1 for row in rows)


@needs_triton
@pytest.mark.parametrize(("backend", "factor"), [("auto", 3.5), ("triton", 3.5), ("flex", 2.5)])
def test_a_model_that_will_run_on_cuda_is_planned_for_cuda(backend: SparseBackend, factor: float) -> None:
    model = make("llama").to("meta")
    attention = ModelAttention.install(model, device=torch.device("cuda"))
    attention.set_patterns([Window(window=9), Dense()], backend)
    name = "flex" if backend == "flex" else "triton"
    assert [layer["backend"] for layer in attention.describe()["layers"]] == [name, "sdpa"]
    with attention.counting() as log:
        final(model, torch.zeros(2, 1024, dtype=torch.int64, device="meta"))
    executed = 2 * 15 * 128**2
    if name == "triton":  # the mean over the products of its three kernels, each with its own tiles
        choices = [(choose_tiles(kernel, 8, 9, False), PRODUCTS[kernel]) for kernel in PRODUCTS]
        done = [n * tiles_of_a_window(9, 1024, c.queries, c.keys) * c.queries * c.keys for c, n in choices]
        executed = round(2 * sum(done) / 9)
    assert [call.pairs.executed for call in log] == [executed, 2 * 36 * 128**2]
    assert [call.backward_factor for call in log] == [factor, 2.5]


def packed_batch(*lengths: int) -> dict[str, Tensor]:
    """One row of documents, with padding at the end up to LENGTH."""
    real, numbers = sum(lengths), torch.arange(len(lengths) + 1)
    document_ids = torch.repeat_interleave(numbers, torch.tensor([*lengths, LENGTH - real]))[None]
    mask = (torch.arange(LENGTH) < real)[None]
    return {"input_ids": tokens(1), "attention_mask": mask, "document_ids": document_ids}


@pytest.mark.parametrize("pattern", CAUSAL, ids=lambda p: p.kind)
def test_pairs_of_a_packed_batch_are_those_of_its_documents(pattern: PatternBase) -> None:
    """The tail of padding counts for nothing but the work of the reference, which computes all."""
    model = make("llama")
    attention = ModelAttention.install(model)
    attention.set_patterns([pattern, Dense()])
    batch = packed_batch(19, 1, 22)
    found = attention.batch_pair_counts(batch)
    alone = [attention.pair_counts([n]) for n in (19, 1, 22)]
    for layer, counts in enumerate(found):
        assert counts.dense == sum(one[layer].dense for one in alone) == 190 + 1 + 253
        assert counts.allowed == sum(one[layer].allowed for one in alone)
        assert counts.executed == LENGTH**2
    with attention.counting() as log:
        final(model, **{"ids": batch.pop("input_ids"), **batch})
    assert [call.pairs for call in log] == found
    with attention.override(Dense()):
        assert attention.batch_pair_counts(packed_batch(LENGTH))[0].allowed == LENGTH * (LENGTH + 1) // 2


@needs_triton
def test_dense_layers_take_our_kernels_on_cuda_where_documents_are_packed() -> None:
    """SDPA would compute all of LENGTH x LENGTH; ours only what a dense model computes for documents, in tiles."""
    cuda, batch = torch.device("cuda"), packed_batch(30, 9)

    def executed(batch: dict[str, Tensor], kernel: DenseKernel = "auto", family: str = "llama") -> int:
        attention = ModelAttention.install(make(family), kernel, cuda)
        assert attention.describe()["layers"][0]["backend"] == "sdpa"
        return attention.batch_pair_counts(batch)[0].executed

    def by_ours(causal: bool, **facts: Tensor) -> int:
        bound = AttentionBatch(LENGTH, causal, torch.device("cpu"), **facts).bound(Dense())
        return TritonBackend().executed_pairs(bound, 1, 8)

    facts = {"padding_bs": batch["attention_mask"], "document_bs": batch["document_ids"]}
    assert executed(batch) == by_ours(True, **facts) != LENGTH**2
    assert executed(batch, "efficient") == LENGTH**2
    padded = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert executed(padded, family="bert") == by_ours(False, padding_bs=batch["attention_mask"])
    assert executed(padded) == LENGTH**2  # causal: SDPA's fast kernels need no mask; one tile


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="attn_pdrop"):
        ModelAttention.install(GPT2LMHeadModel(GPT2Config(vocab_size=5, n_embd=8, n_layer=1, n_head=1)))
    model = make("llama")
    attention = ModelAttention.install(model)
    assert ModelAttention.of(nn.Sequential(model)) is attention
    with pytest.raises(RuntimeError, match="already"):
        ModelAttention.install(model)
    with pytest.raises(LookupError):
        ModelAttention.of(make("bert"))
    with pytest.raises(ConfigError, match="flex"):
        attention.set_patterns([Window(window=4)] * 2, backend="flex")
    with pytest.raises(ConfigError, match="causal"):
        attention.set_patterns([Window(half_width=4)] * 2)
    with pytest.raises(UserError, match="two dimensions"):
        final(model, tokens(), attention_mask=torch.ones(2, 1, LENGTH, LENGTH))
    cache = model(tokens(), use_cache=True).past_key_values
    with pytest.raises(UserError, match="cache"):
        model(tokens(length=1), past_key_values=cache)
    with pytest.raises(ConfigError, match="dense_attention"):
        ModelAttention.install(make("llama"), dense_kernel="cudnn")


def test_a_causal_bert_stays_causal() -> None:
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        attention_probs_dropout_prob=0.0, is_decoder=True,
    )  # fmt: skip
    model = BertModel(config).eval()
    assert ModelAttention.install(model).causal
    ids = tokens()
    before = final(model, ids)
    ids[:, -1] += 1
    assert torch.equal(final(model, ids)[:, :-1], before[:, :-1])


def test_a_classifier_trains_on_padded_batches_with_sparse_attention() -> None:
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    ModelAttention.install(model).set_patterns([Window(half_width=4, global_tokens=1)] * 2)
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH, 9])[:, None]
    model(tokens(), attention_mask=mask, labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
