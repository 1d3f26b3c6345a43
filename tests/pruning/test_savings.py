"""The forms of a model: what each stores and executes, by hand; that zeros alone save nothing; reasons."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from training_fixtures import HEADS, INNER, LAYERS, VOCABULARY, WIDTH, tiny

from loras_bench.benchmarking.bench import Call, Drawn, Quartiles
from loras_bench.errors import UserError
from loras_bench.folding.fitting import Folding, fold_model
from loras_bench.models.loading import LoadedModel
from loras_bench.pruning.blocks import hidden_units_of, linears_of
from loras_bench.pruning.export import load_exported
from loras_bench.pruning.forms import dense_of
from loras_bench.pruning.packing import load_packed, stored
from loras_bench.pruning.savings import NO_GPU, NO_READING, ROUNDS, HostBench, Saving, SavingsRunner

BATCH, LENGTH = 2, 16
TOKENS = BATCH * LENGTH


class OnceBench(HostBench):
    """Runs each call once, says that it took 2 ms, and remembers what came out."""

    def __init__(self, drawn: Drawn | None = None) -> None:
        self.drawn = drawn
        self.results: list[Any] = []

    def times(self, call: Call) -> Quartiles:
        self.results.append(call())
        return Quartiles(1.0, 2.0, 3.0)

    def energy(self, call: Call, call_ms: float) -> Drawn | None:
        return self.drawn


def loaded(model: Any, positions: int | None = None) -> LoadedModel:
    return LoadedModel(model, "a model", True, {}, positions, {})


def forms(model: Any, bench: HostBench | None = None, out: Path | None = None) -> dict[str, Saving]:
    rows = SavingsRunner(bench or OnceBench(), BATCH, LENGTH).run(loaded(model), out, lambda form: None)
    assert [row.form for row in rows] == ["dense", "trained", "exported", "2:4"]
    return {row.form: row for row in rows}


def with_dead_units(family: str = "llama", units: int = 40, **options: Any) -> Any:
    """The outgoing weights of some units are zero; the tokens from 20 to 43 are embedded as zeros."""
    model = tiny(family, **options)
    for reader, _ in hidden_units_of(model):
        reader.by_outputs(reader.weight.data)[:, :units] = 0
    model.get_input_embeddings().weight.data[20:44] = 0
    return model


def dense_flops_of_llama(inner: int = INNER, vocabulary: int = VOCABULARY) -> int:
    """2 for each multiply-add of projections (2 of 4 heads have keys of their own), feed-forward and output."""
    layer = WIDTH * (2 * WIDTH + 2 * WIDTH // 2) + 3 * WIDTH * inner
    return 2 * TOKENS * (LAYERS * layer + WIDTH * vocabulary)


def attention_flops() -> int:
    """Every pair: what the CPU's kernel is taken to compute."""
    return LAYERS * HEADS * 4 * (WIDTH // HEADS) * BATCH * LENGTH * LENGTH


def test_what_each_form_stores_and_executes_by_hand() -> None:
    found = forms(with_dead_units(tie_word_embeddings=True))
    parameters = sum(p.numel() for p in tiny("llama", tie_word_embeddings=True).parameters())
    dead = LAYERS * 40 * WIDTH + (24 + 1) * WIDTH  # the padding token's row too
    dense, masked, exported = found["dense"], found["trained"], found["exported"]
    assert (dense.parameters, dense.nonzero) == (parameters, parameters)
    assert (masked.parameters, masked.nonzero) == (parameters, parameters - dead)
    assert dense.dense_bytes == masked.dense_bytes == dense.packed_bytes == 2 * parameters
    assert masked.packed_bytes is not None and masked.packed_bytes < 2 * parameters - dead
    assert exported.parameters == parameters - LAYERS * 40 * 3 * WIDTH - (VOCABULARY - 32) * WIDTH
    assert exported.dense_bytes == 2 * exported.parameters + 4 * VOCABULARY, "and the rows of tokens"
    linear = dense_flops_of_llama()
    assert dense.flops == linear + attention_flops()
    assert exported.flops == dense.flops - linear + dense_flops_of_llama(inner=40, vocabulary=32)
    assert found["2:4"].reason == "no linear layer has two zeros in each four inputs"
    assert found["2:4"].parameters is None


def test_zeros_alone_save_nothing_but_bytes() -> None:
    model = tiny("gpt2")
    generator = torch.Generator().manual_seed(0)
    for matrix in linears_of(model, r"[^.]+"):
        matrix.weight.data *= torch.rand(matrix.weight.shape, generator=generator) < 0.3
    found = forms(model)
    assert found["trained"].flops == found["dense"].flops
    assert found["trained"].parameters == found["dense"].parameters
    assert found["trained"].dense_bytes == found["dense"].dense_bytes
    assert found["trained"].packed_bytes < 0.8 * found["dense"].packed_bytes
    assert found["exported"].reason == "no hidden unit and too few tokens are zero throughout: nothing to cut"


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "gpt2-classifier", "roberta"])
def test_forms_compute_what_they_stand_for(family: str) -> None:
    """The exported form reads the same tokens as the masked one, and, of smaller vocabularies, gives their logits."""
    bench, model = OnceBench(), with_dead_units(family)
    forms(model, bench)
    dense, masked, exported, *again = bench.results
    assert len(again) == 3 * (ROUNDS - 1) and torch.equal(again[0], dense), "in turn"
    assert masked.dtype == torch.float32 and not torch.allclose(dense, masked, atol=1e-3)
    if masked.ndim == 3 and exported.shape != masked.shape:
        masked = torch.cat([masked[..., :20], masked[..., 44:]], dim=-1)
        exported = exported[..., : masked.shape[-1]]
    torch.testing.assert_close(exported, masked, rtol=0, atol=1e-5)


def test_two_of_four_executes_half_of_its_products() -> None:
    model = tiny("bert")
    weights = 0
    for matrix in linears_of(model, r".*layer.*\.[^.]+"):
        matrix.weight.data.view(-1, 4)[:, 1:3] = 0
        weights += matrix.weight.numel()
    row, dense = (found := forms(model))["2:4"], found["dense"]
    assert row.flops == dense.flops - TOKENS * weights, "the pooler is not of them"
    assert row.times is None and row.reason == "the sparse tensor cores are those of a GPU"
    assert row.note == "12 linear layers"
    assert row.dense_bytes == dense.dense_bytes and row.packed_bytes == found["trained"].packed_bytes
    assert row.packed_bytes < dense.packed_bytes - weights + weights / 8 + 1


def test_filled_zeros_are_as_large_as_what_was_there() -> None:
    model = with_dead_units("gpt2")
    model.transformer.ln_f.weight.data[:3] = 0
    before = copy.deepcopy(dict(model.named_parameters()))
    for name, weight in dense_of(model).named_parameters():
        assert torch.equal(model.get_parameter(name), before[name])
        was = before[name]
        assert weight.all() and torch.equal(weight[was != 0], was[was != 0])
        if not was.any():
            assert 0.01 < weight.std() < 0.03, "biases of a new model"
        elif not was.all() and was.ndim > 1:
            ratio = weight[was == 0].std() / was[was != 0].square().mean().sqrt()
            assert 0.9 < ratio < 1.1


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_a_folded_model_stands_beside_the_whole_one(family: str) -> None:
    model, whole = tiny(family), tiny(family)
    fold_model(model.base_model, [0, 1], Folding("per_head", 1, "svd", False, 0.1), lambda: None)
    model.config.folding = {"heads": "per_head", "rank": 1, "values": "dense", "layers": [0, 1]}
    found = forms(model)
    assert found["dense"].parameters == found["dense"].nonzero == sum(p.numel() for p in whole.parameters())
    assert found["trained"].parameters == sum(p.numel() for p in model.parameters()) < found["dense"].parameters
    assert found["dense"].flops == forms(whole)["dense"].flops > found["trained"].flops
    assert found["dense"].times is not None and found["trained"].reason is None


def test_kept_files_hold_the_models(tmp_path: Path) -> None:
    model = with_dead_units(tie_word_embeddings=True)
    found = forms(model, out=tmp_path / "kept" / "here")
    packed = load_packed(tmp_path / "kept" / "here" / "packed.safetensors")
    assert all(torch.equal(packed[name], tensor) for name, tensor in stored(model).items())
    exported = load_exported(tmp_path / "kept" / "here" / "exported")
    assert sum(p.numel() for p in exported.model.parameters()) == found["exported"].parameters
    assert {p.dtype for p in exported.model.parameters()} == {torch.bfloat16}
    assert exported.vocabulary is not None


def test_joules_or_why_there_are_none() -> None:
    on_cpu = forms(tiny("llama"))["trained"]
    assert on_cpu.drawn is None and on_cpu.energy_reason == NO_GPU
    unread = forms(tiny("llama"), OnceBench(Drawn(None, None)))["trained"]
    assert unread.energy_reason == NO_READING
    read = forms(tiny("llama"), OnceBench(Drawn(0.25, 100.0)))["trained"].to_json()
    assert (read["energy_j"], read["power_w"], read["energy_reason"]) == (0.25, 100.0, None)
    assert read["forward_ms"] == {"low_ms": 1.0, "median_ms": 2.0, "high_ms": 3.0}


def test_what_stops_one_form_is_its_reason_and_does_not_end_the_others() -> None:
    class Broken(OnceBench):
        def times(self, call: Call) -> Quartiles:
            if not self.results:
                self.results.append(None)  # the others go on
                raise RuntimeError("CUBLAS_STATUS: no\nand more")
            return super().times(call)

    found = forms(tiny("llama"), Broken())
    assert found["dense"].reason == "CUBLAS_STATUS: no" and found["dense"].parameters and found["dense"].flops
    assert found["trained"].reason is None and found["trained"].times is not None


def test_what_is_no_failure_of_a_form_ends_the_command() -> None:
    """A mistake of ours must not become a row of a table."""

    class Wrong(OnceBench):
        def times(self, call: Call) -> Quartiles:
            raise KeyError("a mistake")

    with pytest.raises(KeyError, match="a mistake"):
        forms(tiny("llama"), Wrong())


def test_the_fastest_round_counts() -> None:
    class Disturbed(OnceBench):
        def times(self, call: Call) -> Quartiles:
            turn, form = divmod(len(self.results), 2)
            super().times(call)
            return Quartiles(0.0, [[30.0, 7.0], [10.0, 9.0], [20.0, 8.0]][turn][form], 40.0)

    found = forms(tiny("llama"), Disturbed())
    assert found["dense"].times == Quartiles(0.0, 10.0, 40.0) and found["trained"].times == Quartiles(0.0, 7.0, 40.0)


def test_the_cpus_clock() -> None:
    calls: list[int] = []
    times = HostBench().times(lambda: calls.append(sum(range(100_000))))
    assert 0 < times.low_ms <= times.median_ms <= times.high_ms
    assert len(calls) >= 7


def test_rows_that_are_too_long_are_refused() -> None:
    runner = SavingsRunner(OnceBench(), 1, 65)
    with pytest.raises(UserError, match="--length 65: a model has 64 positions"):
        runner.run(loaded(tiny("gpt2"), 64), None, lambda form: None)
