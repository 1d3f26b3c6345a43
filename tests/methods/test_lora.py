"""LoRA and DoRA: identity at the start, merging, a base that never changes, parameter counts, files that PEFT reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from torch import Tensor, nn
from training_fixtures import HEADS, INNER, LAYERS, WIDTH, Rows, digests, make_loop, task_of, tiny, token_ids
from transformers import GPT2Config, GPT2LMHeadModel

from loras_bench.attention.dispatch import ModelAttention
from loras_bench.errors import ConfigError
from loras_bench.methods.lora import Lora, LoraConfig
from loras_bench.models.objective import unwrapped
from loras_bench.training import StepPlan

FAMILIES = ["gpt2", "llama", "bert", "roberta", "gpt2-classifier"]


def lora(**fields: Any) -> Lora:
    return Lora(LoraConfig.model_validate({"kind": "lora", "rank": 4, "alpha": 6} | fields))


def adapted(family: str, **fields: Any) -> Any:
    return lora(**fields).prepare(tiny(family)).eval()


def logits(model: nn.Module, family: str) -> Tensor:
    mask_bs = torch.ones(3, 12, dtype=torch.bool)
    return model(input_ids=token_ids(3, 12), attention_mask=mask_bs).logits


def randomize(model: nn.Module) -> None:
    """Adapters as after a training: neither matrix is zero, magnitudes have moved."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def trained(model: nn.Module) -> dict[str, int]:
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_as_the_base_model_bit_for_bit(family: str) -> None:
    assert torch.equal(logits(adapted(family), family), logits(tiny(family).eval(), family))


@pytest.mark.parametrize("family", FAMILIES)
def test_dora_starts_as_the_base_model(family: str) -> None:
    base = logits(tiny(family).eval(), family)
    torch.testing.assert_close(logits(adapted(family, variant="dora"), family), base, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_equals_unmerged(family: str, variant: str) -> None:
    model = adapted(family, variant=variant)
    start = logits(model, family)
    randomize(model)
    unmerged = logits(model, family)
    assert (unmerged - start).abs().max() > 1e-3
    torch.testing.assert_close(logits(model.merge_and_unload(), family), unmerged, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_update_is_alpha_over_rank_b_a(family: str) -> None:
    model = adapted(family, alpha=6)  # rank 4: a scale of 1.5
    randomize(model)
    layer = next(
        m for name, m in model.named_modules() if name.endswith(("h.0.attn.c_attn", "layers.0.self_attn.q_proj"))
    )
    a_ri, b_or = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x_ni = torch.randn(5, WIDTH)
    expected = layer.base_layer(x_ni) + 1.5 * x_ni @ a_ri.T @ b_or.T
    torch.testing.assert_close(layer(x_ni), expected)
    assert a_ri.shape == (4, WIDTH) and b_or.shape[1] == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_the_frozen_base_is_byte_identical_after_training(family: str, dtype: torch.dtype) -> None:
    base = tiny(family)
    ModelAttention.install(base)
    model = lora(dropout=0.1).prepare(base)
    labels = None if task_of(family) == "language_modeling" else [0, 1, 2, 0]
    loop = make_loop(
        model, Rows(token_ids(4, 12), labels=labels), StepPlan(4, 4, 2, 5, 0), dtype=dtype, weight_decay=0.1
    )
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    frozen |= dict(model.named_buffers())
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before, start = digests(frozen), digests(learned)
    for step in range(5):
        loop.step(step)
    assert digests(frozen) == before
    moved = digests(learned)
    assert all(moved[name] != start[name] for name in start), "and every trained parameter has moved"


def gpt2_small(layers: int, targets: Any, rank: int) -> dict[str, int]:
    with torch.device("meta"):
        base = GPT2LMHeadModel(GPT2Config(n_layer=layers))
        return trained(lora(rank=rank, targets=targets).prepare(base))


def test_the_base_of_the_table() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT2LMHeadModel(GPT2Config()).parameters()) == 124_439_808


@pytest.mark.parametrize(
    ("rank", "c_attn", "all_linear", "percent", "reduction"),
    [
        (4, 147_456, 589_824, 0.474, 99.53),
        (8, 294_912, 1_179_648, 0.948, 99.05),
        (16, 589_824, 2_359_296, 1.896, 98.10),
        (64, 2_359_296, 9_437_184, 7.584, 92.42),
    ],
)
def test_trainable_parameters_of_gpt2_small(
    rank: int, c_attn: int, all_linear: int, percent: float, reduction: float
) -> None:
    """Rank x (inputs + outputs) of each adapted layer, and nothing else."""
    names = gpt2_small(12, "all-linear", rank)
    assert sum(names.values()) == all_linear
    assert all(re.search(r"\.lora_[AB]\.default\.weight$", name) for name in names)
    assert all_linear / 124_439_808 * 100 == pytest.approx(percent, abs=0.0005)
    assert (1 - all_linear / 124_439_808) * 100 == pytest.approx(reduction, abs=0.005)
    assert sum(gpt2_small(12, ("c_attn",), rank).values()) == c_attn
    assert sum(gpt2_small(6, "all-linear", rank).values()) == all_linear // 2, "DistilGPT2 has half the layers"


def test_dora_adds_one_magnitude_for_each_output() -> None:
    difference = sum(trained(adapted("llama", variant="dora")).values()) - sum(trained(adapted("llama")).values())
    keys = WIDTH // HEADS * 2
    assert difference == LAYERS * (WIDTH + 2 * keys + WIDTH + 2 * INNER + WIDTH)


ATTENTION = {
    "gpt2": {"attn.c_attn", "attn.c_proj"},
    "llama": {f"self_attn.{name}_proj" for name in "qkvo"},
    "bert": {"attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"},
}
FEED_FORWARD = {
    "gpt2": {"mlp.c_fc", "mlp.c_proj"},
    "llama": {f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    "bert": {"intermediate.dense", "output.dense"},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("group", ["attention", "feed-forward", "all-linear"])
def test_groups_of_targets(family: str, group: str) -> None:
    """In every layer; all-linear is both, and BERT's pooler, which has no layer."""
    shape = {"roberta": "bert", "gpt2-classifier": "gpt2"}.get(family, family)
    wanted = (ATTENTION[shape] if group != "feed-forward" else set()) | (
        FEED_FORWARD[shape] if group != "attention" else set()
    )
    names = {name.partition(".lora_A")[0] for name in trained(adapted(family, targets=group)) if ".lora_A" in name}
    in_layers = {name: re.search(r"\.(\d)\.(.*)", name) for name in names}
    found = {(int(match[1]), match[2]) for match in in_layers.values() if match}
    assert found == {(layer, name) for layer in range(LAYERS) for name in wanted}
    outside = {name for name, match in in_layers.items() if not match}
    assert outside == ({"base_model.model.bert.pooler.dense"} if (family, group) == ("bert", "all-linear") else set())


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_but_adapters_and_the_head_of_a_classifier_is_trained(family: str) -> None:
    others = {name for name in trained(adapted(family)) if ".lora_" not in name}
    head = {"bert": r"\.classifier\.", "roberta": r"\.classifier\.", "gpt2-classifier": r"\.score\."}.get(family)
    assert all(head and re.search(head + "modules_to_save", name) for name in others)
    assert bool(others) == (task_of(family) == "classification")


def test_targets_by_name() -> None:
    names = trained(adapted("llama", targets=("q_proj", "v_proj")))
    assert {name.split(".")[-4] for name in names} == {"q_proj", "v_proj"}
    with pytest.raises(ConfigError, match=r"cannot be attached.*query_projection"):
        adapted("llama", targets=("query_projection",))


def test_two_adapters_in_one_run_are_refused() -> None:
    with pytest.raises(ConfigError, match="twice"):
        lora().check([lora(rank=8)], GPT2Config())
    lora().check([], GPT2Config())
    for wrong in (
        {"rank": 0},
        {"alpha": 0},
        {"dropout": 1.0},
        {"variant": "qlora"},
        {"targets": "everything"},
        {"r": 4},
    ):
        with pytest.raises(ValidationError):
            lora(**wrong)


def test_adapters_live_in_the_models_number_format() -> None:
    """PEFT would keep them in float32 and cast every input: measured at 8B, 1.45 times the joules."""
    model = lora().prepare(tiny("llama").to(torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("family", "norms", "embeddings"),
    [
        ("gpt2", {"h.0.ln_1", "h.0.ln_2", "h.1.ln_1", "h.1.ln_2", "ln_f"}, "wte"),
        ("llama", {"0.input_layernorm", "0.post_attention_layernorm", "1.input_layernorm",
                   "1.post_attention_layernorm", "model.norm"}, "embed_tokens"),
        ("bert", {"embeddings.LayerNorm", "0.attention.output.LayerNorm", "0.output.LayerNorm",
                  "1.attention.output.LayerNorm", "1.output.LayerNorm"}, "word_embeddings"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tied", [False, True])
def test_norms_and_embeddings_can_be_trained_and_are_saved_beside_the_adapters(
    family: str, norms: set[str], embeddings: str, tied: bool, tmp_path: Path
) -> None:
    """Input embeddings only: an output layer tied to them keeps the base's weights, also when saved and merged."""

    def base() -> Any:
        return tiny(family, tie_word_embeddings=tied)

    model = lora(train_norms=True, train_embeddings=True).prepare(base()).eval()
    beside = {name for name in trained(model) if ".lora_" not in name and "classifier" not in name}
    modules = {name.partition(".modules_to_save")[0] for name in beside}
    assert {next(n for n in norms | {embeddings} if module.endswith(n)) for module in modules} == norms | {embeddings}
    assert len(modules) == len(norms) + 1
    randomize(model)
    expected = logits(model, family)
    if task_of(family) == "language_modeling":
        head, theirs = unwrapped(model).get_output_embeddings(), base().get_output_embeddings()
        assert type(head) is nn.Linear and torch.equal(head.weight, theirs.weight) and not head.weight.requires_grad
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(again, family), expected, rtol=0, atol=1e-6)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged, family), expected, rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path / "whole")
    whole = type(merged).from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(logits(whole, family), expected, rtol=0, atol=1e-5)


def test_without_the_switches_neither_is_trained() -> None:
    only_norms = {name for name in trained(adapted("gpt2", train_norms=True)) if ".lora_" not in name}
    assert only_norms and all(".ln_" in name for name in only_norms)
    only_embeddings = {name for name in trained(adapted("gpt2", train_embeddings=True)) if ".lora_" not in name}
    assert [name for name in only_embeddings if "wte" not in name] == [] != only_embeddings


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_peft_reads_the_saved_adapters(family: str, variant: str, tmp_path: Path) -> None:
    model = adapted(family, variant=variant)
    randomize(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(family), str(tmp_path)).eval()
    torch.testing.assert_close(logits(again, family), logits(model, family), rtol=0, atol=1e-6)
    assert not list(tmp_path.glob("*.bin")) and (tmp_path / "adapter_model.safetensors").is_file()
