"""A model with its loss: equal to transformers' own loss, with and without adapters, for each head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_fixtures import Rows, attended, task_of, tiny, token_ids

from loras_bench.attention.dispatch import ModelAttention
from loras_bench.attention.patterns import Dense, PatternBase, Window
from loras_bench.methods.lora import Lora, LoraConfig
from loras_bench.models.objective import Objective, class_logits_of_packed, unwrapped


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_language_modelling_is_transformers_loss(family: str) -> None:
    model, twin = attended(family), tiny(family)
    ids_bs = token_ids(3, 10)
    targets_bs = torch.roll(ids_bs, -1, dims=1)
    targets_bs[:, -1] = -100  # transformers shifts its labels itself, so its last position predicts nothing
    loss_sum, correct = Objective(model, "language_modeling", "torch")(input_ids=ids_bs, targets=targets_bs)
    assert correct is None and loss_sum.dtype is torch.float32
    torch.testing.assert_close(loss_sum / 27, twin(input_ids=ids_bs, labels=ids_bs).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2-classifier"])
def test_classification_is_transformers_loss_and_its_hits(family: str) -> None:
    model, twin = attended(family), tiny(family)
    batch = Rows(token_ids(5, 12), lengths=[12, 7, 4, 9, 12], labels=[0, 1, 2, 1, 0]).collate("train", range(5))
    targets_b = batch["targets"]
    loss_sum, correct = Objective(model, "classification", "torch")(**batch)
    theirs = twin(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=targets_b)
    torch.testing.assert_close(loss_sum / 5, theirs.loss, rtol=1e-4, atol=1e-5)
    assert correct == (theirs.logits.argmax(-1) == targets_b).sum()


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_adapters_act_inside_the_model_that_is_called(family: str) -> None:
    """The objective calls the model under PEFT's wrapper: adapters in its layers must still act and get gradients."""
    labels = None if task_of(family) == "language_modeling" else [0, 1, 2]
    batch = Rows(token_ids(3, 8), labels=labels).collate("train", range(3))
    plain, _ = Objective(attended(family), task_of(family), "torch")(**batch)
    model = Lora(LoraConfig(kind="lora", rank=2)).prepare(attended(family))
    objective = Objective(model, task_of(family), "torch")
    assert type(unwrapped(model)) is type(tiny(family)) and unwrapped(unwrapped(model)) is unwrapped(model)
    start, _ = objective(**batch)
    assert torch.equal(start, plain)
    start.backward()
    matrices = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert matrices and all(p.grad is not None and p.grad.abs().sum() > 0 for p in matrices)
    with torch.no_grad():
        for matrix in matrices:
            matrix.normal_()
    assert not torch.allclose(objective(**batch)[0], plain)


@pytest.mark.parametrize("kind", ["adapted", "biased"])
def test_an_output_layer_that_cannot_be_fused_is_computed_as_it_stands(kind: str) -> None:
    model = attended("llama")
    if kind == "adapted":
        model = Lora(LoraConfig(kind="lora", rank=2, targets=("lm_head",))).prepare(model)
        nn.init.normal_(next(p for name, p in model.named_parameters() if "lora_B" in name))
    else:
        head = nn.Linear(32, 48)
        model.set_output_embeddings(head)
    batch = Rows(token_ids(2, 6)).collate("train", range(2))
    logits_bsv = unwrapped(model)(input_ids=batch["input_ids"]).logits
    expected = F.cross_entropy(logits_bsv.flatten(0, 1), batch["targets"].flatten(), reduction="sum")
    torch.testing.assert_close(Objective(model, "language_modeling", "torch")(**batch)[0], expected)


CLASSIFIERS = ("bert", "roberta", "gpt2-classifier", "llama-classifier")
LENGTHS, LABELS = [12, 7, 1, 33, 20], [0, 1, 2, 1, 0]


def padded_and_packed() -> list[dict[str, Tensor]]:
    ids_ns = token_ids(5, 40)
    return [Rows(ids_ns, LENGTHS, LABELS, packed=packed).collate("train", [3, 0, 2, 4, 1]) for packed in (False, True)]


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    inner = unwrapped(model)
    inputs = {name: tensor for name, tensor in batch.items() if name != "targets"}
    return class_logits_of_packed(inner, **inputs) if "starts" in inputs else inner(**inputs).logits


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss_sum, correct = Objective(model, "classification", "torch")(**batch)
    loss_sum.backward()
    assert correct is not None
    return loss_sum.detach(), correct, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def pattern_of(kind: str, family: str) -> PatternBase:
    size = {"half_width": 3} if family in ("bert", "roberta") else {"window": 4}
    match kind:
        case "dense":
            return Dense()
        case "window":
            return Window(kind="window", **size)
        case "window_and_prefix":
            return Window(kind="window", global_tokens=2, **size)
    raise ValueError(kind)


@pytest.mark.parametrize("kind", ["dense", "window", "window_and_prefix"])
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_packed_documents_are_classified_as_padded_ones(family: str, kind: str) -> None:
    """Logits, loss, hits and every gradient; weights far from their small first values, so that attention matters."""
    model = attended(family, initializer_range=0.2)
    ModelAttention.of(model).set_patterns([pattern_of(kind, family)] * len(ModelAttention.of(model).patterns))
    padded, packed = padded_and_packed()
    assert packed["input_ids"].shape == (1, 256)
    torch.testing.assert_close(logits(model, packed), logits(model, padded), rtol=1e-5, atol=1e-5)
    model.double()  # gradients reach 50 here: in float32 their sums differ in the fourth decimal
    (loss, correct, theirs), (packed_loss, packed_correct, ours) = gradients(model, padded), gradients(model, packed)
    torch.testing.assert_close(packed_loss, loss, rtol=1e-6, atol=1e-6)
    assert packed_correct == correct
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_packed_documents_do_not_see_each_other(family: str) -> None:
    model = attended(family, initializer_range=0.2)
    _, packed = padded_and_packed()
    before = logits(model, packed)
    changed = packed | {"input_ids": packed["input_ids"].clone()}
    start, end = (int(packed[name][3]) for name in ("starts", "ends"))
    changed["input_ids"][0, start : end + 1] = token_ids(1, end + 1 - start, seed=1)
    changed["input_ids"][0, int(packed["ends"][-1]) + 1 :] = 7  # nor the fill
    after = logits(model, changed)
    kept = [0, 1, 2, 4]
    torch.testing.assert_close(after[kept], before[kept], rtol=0, atol=1e-6)
    assert not torch.allclose(after[3], before[3], atol=1e-3)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_adapters_and_the_head_beside_them_learn_from_packed_documents(family: str) -> None:
    """PEFT keeps a trained copy of the head in a wrapper of its own."""
    model = Lora(LoraConfig(kind="lora", rank=2)).prepare(attended(family, initializer_range=0.2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.2)
    padded, packed = padded_and_packed()
    torch.testing.assert_close(logits(model, packed), logits(model, padded), rtol=1e-5, atol=1e-5)
    model.double()
    (_, _, theirs), (_, _, ours) = gradients(model, padded), gradients(model, packed)
    assert ours.keys() == theirs.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("modules_to_save" in name for name in ours)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6, msg=name)


def test_packed_pairs_keep_their_segments() -> None:
    model = attended("bert", initializer_range=0.2)
    padded, packed = padded_and_packed()
    second_bs = torch.arange(padded["input_ids"].shape[1]) >= padded["attention_mask"].sum(1)[:, None] // 2
    padded["token_type_ids"] = (second_bs & padded["attention_mask"]).long()
    packed["token_type_ids"] = torch.zeros_like(packed["input_ids"])
    packed["token_type_ids"][packed["attention_mask"]] = padded["token_type_ids"][padded["attention_mask"]]
    plain = logits(model, {name: tensor for name, tensor in packed.items() if name != "token_type_ids"})
    torch.testing.assert_close(logits(model, packed), logits(model, padded), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(model, packed), plain, atol=1e-3)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_recomputed_layers_know_the_documents_too(family: str) -> None:
    model = attended(family, initializer_range=0.2)
    _, packed = padded_and_packed()
    _, _, theirs = gradients(model, packed)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    _, _, ours = gradients(model, packed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
