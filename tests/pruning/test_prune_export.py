"""Structured exports: the masked model in smaller matrices, as parameters and as files, and how they are read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_fixtures import INNER, LAYERS, PADDING, VOCABULARY, WIDTH, tiny, token_ids

from loras_bench.errors import UserError
from loras_bench.pruning.blocks import hidden_units_of
from loras_bench.pruning.export import WEIGHTS, Exported, export, load_exported
from loras_bench.pruning.packing import stored

FAMILIES = ["llama", "gpt2", "bert", "roberta", "llama-classifier", "gpt2-classifier"]
UNUSED = [3, *range(20, 45)]


def zero_units(model: Any, dead: int, layers: range = range(LAYERS)) -> None:
    """Outgoing weights of every second unit first, then others; the incoming ones too in the second layer alone."""
    order = torch.cat([torch.arange(0, INNER, 2), torch.arange(1, INNER, 2)])[:dead]
    for layer, (reader, writers) in enumerate(hidden_units_of(model)):
        if layer in layers:
            reader.by_outputs(reader.weight.data)[:, order] = 0
            for writer in writers if layer else ():
                writer.by_outputs(writer.weight.data)[order] = 0


def zero_tokens(model: Any, tokens: list[int]) -> None:
    model.get_input_embeddings().weight.data[tokens] = 0


def tied(family: str) -> Any:
    model = tiny(family, **({"tie_word_embeddings": True} if family == "llama" else {})).eval()
    for bias in (p for name, p in model.named_parameters() if name.endswith("bias")):
        torch.nn.init.normal_(bias, std=0.5)
    return model


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def logits_of_tokens(exported: Exported, ids: Tensor) -> Tensor:
    if exported.vocabulary is None:
        return logits(exported.model, ids)
    found = logits(exported.model, exported.vocabulary.rows(ids))
    return exported.vocabulary.logits(found) if found.ndim == 3 else found


def size(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_the_masked_model_and_is_smaller(family: str, tmp_path: Path) -> None:
    model, ids = tied(family), token_ids(3, 20)
    ids[1, 12:] = PADDING
    assert set(UNUSED) & set(ids.flatten().tolist()), "removed tokens occur"
    zero_units(model, 48)
    zero_tokens(model, UNUSED)
    expected, before = logits(model, ids), size(model)
    Exported(model, None).save(tmp_path / "masked")
    exported = export(model)
    assert exported is not None and exported.model is model and exported.vocabulary is not None
    torch.testing.assert_close(logits_of_tokens(exported, ids), expected, rtol=0, atol=1e-5)
    matrices = 3 if family.startswith("llama") else 2
    biases = 0 if family.startswith("llama") else 1
    rows = 24  # 22 tokens are left, removed ones need a row, and 24 is a multiple of 8
    units = LAYERS * 48 * (matrices * WIDTH + biases)
    assert before - size(model) == units + (VOCABULARY - rows) * WIDTH
    assert model.config.vocab_size == rows

    exported.save(tmp_path / "exported")
    saved = (tmp_path / "masked" / WEIGHTS).stat().st_size - (tmp_path / "exported" / WEIGHTS).stat().st_size
    assert abs(saved - 4 * (before - size(model))) < 1000, "headers aside"
    loaded = load_exported(tmp_path / "exported")
    loaded.model.eval()
    assert type(loaded.model) is type(model)
    assert torch.equal(logits_of_tokens(loaded, ids), logits_of_tokens(exported, ids))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_layers_keep_as_many_units_as_the_one_that_needs_most(family: str) -> None:
    model, ids = tied(family), token_ids(2, 16)
    zero_units(model, 60, range(0, 1))
    zero_units(model, 27, range(1, 2))
    expected = logits(model, ids)
    exported = export(model)
    assert exported is not None and exported.vocabulary is None
    shapes = [tuple(reader.by_outputs(reader.weight).shape) for reader, _ in hidden_units_of(model)]
    assert shapes == [(WIDTH, 56)] * LAYERS, "53 are needed"
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-5)


def test_removed_tokens_are_one_row_of_zeros_and_have_the_logit_0() -> None:
    model = tied("gpt2")
    zero_tokens(model, UNUSED)
    exported = export(model)
    assert exported is not None
    vocabulary = exported.vocabulary
    assert vocabulary is not None
    kept = [token for token in range(VOCABULARY) if token not in UNUSED]
    assert vocabulary.rows(torch.tensor([UNUSED])).unique().tolist() == [len(kept)]
    assert vocabulary.rows(torch.tensor(kept)).tolist() == list(range(len(kept)))
    assert not model.transformer.wte.weight[len(kept) :].any()
    found = logits_of_tokens(exported, token_ids(1, 8))
    assert found.shape == (1, 8, VOCABULARY) and not found[..., UNUSED].any()


def test_tokens_that_the_code_asks_for_keep_their_rows() -> None:
    """The padding token's row is zero, and yet no other token may pass for it."""
    model, ids = tied("gpt2-classifier"), token_ids(2, 12)
    model.config.eos_token_id = [0, 7]
    zero_tokens(model, [0, PADDING, 7, *UNUSED])
    ids[0, 8:], ids[1, 4:] = PADDING, 22
    expected = logits(model, ids)
    exported = export(model)
    assert exported is not None and exported.vocabulary is not None
    rows = exported.vocabulary.row_of_token
    assert len({int(rows[token]) for token in (0, PADDING, 7, 22)}) == 4
    assert model.config.pad_token_id == rows[PADDING] and model.config.eos_token_id == [0, int(rows[7])]
    torch.testing.assert_close(logits_of_tokens(exported, ids), expected, rtol=0, atol=1e-5)


def test_roberta_counts_positions_as_before() -> None:
    model, ids = tied("roberta"), token_ids(2, 12)
    model.config.pad_token_id = model.roberta.embeddings.padding_idx = 4
    model.roberta.embeddings.word_embeddings.padding_idx = 4
    ids[0, 8:] = 4
    zero_tokens(model, [2, 3, *range(20, 45)])
    expected = logits(model, ids)
    exported = export(model)
    assert exported is not None and model.config.pad_token_id == 4
    torch.testing.assert_close(logits_of_tokens(exported, ids), expected, rtol=0, atol=1e-5)


def test_an_output_layer_of_its_own_keeps_every_token() -> None:
    model = tiny("llama")
    zero_tokens(model, UNUSED)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert export(model) is None


def test_zeros_that_are_no_whole_units_are_nothing_to_cut() -> None:
    model = tied("llama")
    before = {name: tensor.clone() for name, tensor in stored(model).items()}
    for reader, _ in hidden_units_of(model):
        reader.weight.data[:, 1:] *= torch.rand(WIDTH, INNER - 1) < 0.3
        reader.weight.data[0] = 1
    zero_tokens(model, [5, 6])  # the rows that are left and one for these are as many as before
    kept = export(model)
    assert kept is None
    assert {name: t.shape for name, t in stored(model).items()} == {name: t.shape for name, t in before.items()}


def test_what_was_not_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no exported model"):
        load_exported(tmp_path)
