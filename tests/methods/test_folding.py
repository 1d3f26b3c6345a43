"""The method: its YAML form, its refusals, and that a folded model trains, alone and under adapters."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from training_fixtures import LAYERS, WIDTH, Rows, attended, make_loop, task_of, tiny, token_ids
from transformers import BertConfig, GPT2Config, LlamaConfig, T5Config

from loras_bench.attention.dense import SdpaBackend
from loras_bench.attention.dispatch import ModelAttention
from loras_bench.errors import ConfigError
from loras_bench.folding.attention import FoldedAttention
from loras_bench.methods.folding import Fold, FoldConfig
from loras_bench.methods.lora import Lora, LoraConfig
from loras_bench.methods.sparse_attention import SparseAttention, SparseAttentionConfig
from loras_bench.methods.sparse_lora import SparseLora, SparseLoraConfig
from loras_bench.optimizer import MasterAdamW
from loras_bench.training import StepPlan

GPT2 = GPT2Config(n_embd=48, n_head=4, n_layer=4, attn_pdrop=0.0)
LLAMA = LlamaConfig(hidden_size=48, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4)
FREE = {"initialisation": "svd", "values": "dense"}


def method(**fields: Any) -> Fold:
    return Fold(FoldConfig.model_validate({"kind": "fold"} | fields))


def rows_of(family: str, lengths: Any = None) -> Rows:
    labels = None if task_of(family) == "language_modeling" else [row % 3 for row in range(8)]
    return Rows(token_ids(8, 16), lengths, labels)


def folded(family: str, data: Rows, **fields: Any) -> tuple[Any, Fold]:
    made, model = method(**fields), attended(family).train()
    made.check([], model.config)
    made.observe(data.collate("train", [row, row + 1]) for row in range(0, 8, 2))
    assert made.prepare(model) is model
    return model, made


def test_single_layers_and_ranges() -> None:
    assert method().config.folded_layers(3) == [0, 1, 2]
    assert method(layers=[3, "0-1"]).config.folded_layers(4) == [0, 1, 3]
    with pytest.raises(ConfigError, match="has 4 layers"):
        method(layers=["2-9"]).check([], GPT2)
    with pytest.raises(ConfigError, match="named by"):
        method(layers=["0-2", 1]).check([], GPT2)


def test_ranks_must_divide_the_rows_of_a_head() -> None:
    method(rank=4).check([], GPT2)
    with pytest.raises(ConfigError, match="rank 5 does not divide the 12 rows") as raised:
        method(rank=5).check([], GPT2)
    assert raised.value.hint == "it can be 1, 2, 3, 4, 6, 12"
    method(rank=3).check([], LLAMA)
    with pytest.raises(ConfigError, match="6 pairs of rotary channels"):
        method(rank=4).check([], LLAMA)


def test_conflicts_are_refused() -> None:
    window = SparseAttentionConfig.model_validate({"pattern": {"kind": "window", "window": 8}})
    sliced = SparseLoraConfig.model_validate({"kind": "sparse_lora", "layers": {"0": {"attention": 0.5}}})
    with pytest.raises(ConfigError, match="twice"):
        method().check([method()], GPT2)
    with pytest.raises(ConfigError, match="`sparse_attention` does not go with `fold`"):
        method().check([SparseAttention(window)], GPT2)
    with pytest.raises(ConfigError, match="`sparse_lora` slices"):
        method().check([SparseLora(sliced)], LLAMA)
    method().check([Lora(LoraConfig(kind="lora"))], GPT2)
    with pytest.raises(ConfigError, match="adapters freeze the folded rows"):
        method(learning_rate=1e-3).check([Lora(LoraConfig(kind="lora"))], GPT2)


def test_unsupported_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="t5"):
        method().check([], T5Config())
    with pytest.raises(ConfigError, match="attn_pdrop"):
        method().check([], GPT2Config())
    with pytest.raises(ConfigError, match="bias of keys"):
        method().check([], LlamaConfig(attention_bias=True))
    method().check([], BertConfig(attention_probs_dropout_prob=0.0))


@pytest.mark.parametrize("fault", [{"rank": 0}, {"heads": "all"}, {"ridge": -1}, {"values": "none"}, {"rnak": 1}])
def test_wrong_fields_are_refused(fault: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        method(**fault)


def test_data_is_read_only_where_a_fit_needs_it() -> None:
    def never() -> Any:
        raise AssertionError("read")
        yield

    for fields in (FREE, {"heads": "shared", "initialisation": "row_mean"}):
        made = method(**fields)
        made.observe(never())
        made.prepare(attended("gpt2"))
    for fields in ({}, {"initialisation": "svd"}, {"values": "dense"}):
        with pytest.raises(RuntimeError, match="observe"):
            method(**fields).prepare(attended("gpt2"))


def test_batches_are_taken_until_there_are_enough_tokens() -> None:
    data, taken = rows_of("gpt2"), []

    def batches() -> Any:
        for row in range(8):
            taken.append(row)
            yield data.collate("train", [row])

    made = method(calibration_tokens=33)
    made.observe(batches())
    assert taken == [0, 1, 2]


def test_padding_is_no_token_to_calibrate_on() -> None:
    """Two rows of 16 places with 20 tokens each: 45 tokens are three of them."""
    data, taken = rows_of("bert", [16, 4] * 4), []

    def batches() -> Any:
        for row in range(0, 8, 2):
            taken.append(row)
            yield data.collate("train", [row, row + 1])

    method(calibration_tokens=45).observe(batches())
    assert taken == [0, 2, 4]


def test_the_fits_take_any_kernel_and_leave_no_trace_in_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run in float32, for which the run's own kernel need not be there."""
    model, seen = tiny("gpt2"), set()
    attention = ModelAttention.install(model, "math")
    attention._dense.kernels_used["the run's"] = "math"
    attend = SdpaBackend.attend

    def spy(self: SdpaBackend, *args: Any) -> Any:
        seen.add(self.kernel)
        self.kernels_used["a fit's"] = "efficient"
        return attend(self, *args)

    monkeypatch.setattr(SdpaBackend, "attend", spy)
    made = method()
    made.observe([rows_of("gpt2").collate("train", [0, 1])])
    made.prepare(model)
    assert seen == {"auto"}
    found = attention.describe()
    assert (found["dense_kernel"], found["dense_kernels_used"]) == ("math", ["math"])


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama", "gpt2-classifier", "roberta"])
@pytest.mark.parametrize("heads", ["per_head", "shared"])
def test_a_folded_model_trains(family: str, heads: str) -> None:
    """Every folded row and diagonal moves, and the loss falls."""
    data = rows_of(family, [16, 12, 16, 7, 16, 16, 9, 16])
    model, _ = folded(family, data, heads=heads)
    assert model.training
    assert model.config.folding == {"heads": heads, "rank": 1, "values": "diagonal", "layers": list(range(LAYERS))}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loop = make_loop(model, data, StepPlan(8, 8, 4, 12, 0))
    losses = [float(loop.step(step)) for step in range(12)]
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    rows = {name for name in before if name.rpartition(".")[2] in ("query", "query_bias", "key", "value_scale")}
    assert len(rows) == 4 * LAYERS
    assert rows <= moved


def test_folded_rows_have_a_rate_of_their_own_and_never_decay() -> None:
    model, made = folded("gpt2", rows_of("gpt2"), learning_rate=1e-3)
    (group,) = made.parameter_groups(model)
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.0)
    assert len(group["params"]) == 4 * LAYERS
    assert method().parameter_groups(model) == [], "the run's"
    model, made = folded("gpt2", rows_of("gpt2"), learning_rate=1e-3, **FREE)
    (group,) = made.parameter_groups(model)
    assert len(group["params"]) == 3 * LAYERS  # a dense value matrix decays as any other
    for groups in ([], [group]):
        optimizer = MasterAdamW(model, groups, 1e-2, 0.1, (0.9, 0.999), torch.float32)
        decays = {id(p) for one in optimizer.groups if one.weight_decay for p in one.params}
        assert not decays & {id(p) for p in group["params"]}
        assert {id(p) for name, p in model.named_parameters() if "attn.value.weight" in name} <= decays


def test_adapters_go_on_what_stays_dense() -> None:
    """Output projections, feed-forward layers, dense value matrices; the folded rows are frozen with the base."""
    model, _ = folded("gpt2", rows_of("gpt2"), initialisation="svd", values="dense")
    adapted = Lora(LoraConfig(kind="lora", rank=2)).prepare(model)
    names = {name.split(".lora_A")[0].rpartition("base_model.model.")[2] for name, _ in adapted.named_parameters()}
    assert {"transformer.h.0.attn.c_proj", "transformer.h.0.attn.value", "transformer.h.1.mlp.c_fc"} <= names
    assert method(learning_rate=1e-3, **FREE).parameter_groups(adapted) == []
    data = rows_of("gpt2")
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    loss = make_loop(adapted, data, StepPlan(8, 8, 8, 4, 0)).step(0)
    assert torch.isfinite(loss)
    moved = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(".lora_B." in name for name in moved)


def test_the_same_data_folds_to_the_same_bits() -> None:
    """A run that is taken up again folds anew; what adapters leave frozen must come out as it was."""
    data = rows_of("gpt2")
    first, second = (folded("gpt2", data)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_a_folded_layer_keeps() -> None:
    model, _ = folded("gpt2", rows_of("gpt2"), layers=[1])
    kinds = [type(block.attn) for block in model.transformer.h]
    assert kinds[1] is FoldedAttention
    assert kinds[0] is not FoldedAttention
    assert model.transformer.h[1].attn.query.shape == (4, 1, WIDTH)


def test_the_configuration_is_read_without_torch() -> None:
    heavy = "{'torch', 'transformers', 'numpy'}"
    code = f"import sys, loras_bench.methods.folding; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
