"""Estimators against the full decomposition and the oracle; the cache against damage, other processes and no room."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from loras_bench.errors import ConfigError
from loras_bench.kernels.linear import LinearGroup
from loras_bench.sparsity import estimator
from loras_bench.sparsity.criteria import Heads, feed_forward_scores, query_key_scores, top, value_scores
from loras_bench.sparsity.estimator import Factors, load_estimators, low_rank

HEADS = Heads(query=6, key=2, size=4)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(rows: int, columns: int, singular_values: Tensor, seed: int = 0) -> Tensor:
    count = len(singular_values)
    left, right = (torch.linalg.qr(drawn(size, count, seed=seed + k)).Q for k, size in enumerate((rows, columns)))
    return (left * singular_values) @ right.t()


def best(weight: Tensor, rank: int) -> Tensor:
    """The approximation of Eckart and Young, in float64."""
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


# The decomposition


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_small_weights_get_the_optimum_of_eckart_and_young(shape: tuple[int, int]) -> None:
    weight = drawn(*shape) / 10
    singular = torch.linalg.svdvals(weight)
    for rank in (1, 8, 24):
        factors = low_rank(weight, rank)
        assert factors.down_rk.shape == (rank, shape[1]) and factors.up_nr.shape == (shape[0], rank)
        product = factors.up_nr @ factors.down_rk
        assert (product - best(weight, rank)).abs().max() < 1e-5
        rest = weight - product
        torch.testing.assert_close(rest.norm(), singular[rank:].norm(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            torch.linalg.matrix_norm(rest, 2), (*singular, torch.tensor(0.0))[rank], atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(factors.down_rk.norm(dim=1), singular[:rank].sqrt())  # the root on either side
        torch.testing.assert_close(factors.up_nr.norm(dim=0), singular[:rank].sqrt())


def test_a_factor_pair_estimates_the_projection() -> None:
    weight, x = with_spectrum(30, 20, torch.tensor([3.0, 2.0, 1.0])), drawn(2, 5, 20, seed=9)
    torch.testing.assert_close(low_rank(weight, 3)(x), x @ weight.t())


COUNT = torch.arange(1.0, 421.0)
SPECTRA = {
    "as language models'": COUNT**-0.5,
    "a few outliers": torch.where(COUNT <= 4, 10.0, 1.0) * (1 - COUNT / 1000),
    "fast decay": 0.8**COUNT,
    "rank 5": torch.where(COUNT <= 5, 1.0 / COUNT, 0.0),
}


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", [(900, 420), (420, 900)])
def test_large_weights_are_searched_to_a_hundredth_of_a_per_mille(kind: str, shape: tuple[int, int]) -> None:
    """Of what every approximation of rank 8 loses, and of the largest singular value; singular values to 0.3 %."""
    weight = with_spectrum(*shape, SPECTRA[kind])
    factors = low_rank(weight, 8)
    lost, unavoidable = (weight - factors.up_nr @ factors.down_rk).norm(), SPECTRA[kind][8:].norm()
    assert lost < unavoidable * (1 + 1e-5) + 1e-5 * SPECTRA[kind][0]
    found = factors.down_rk.norm(dim=1) * factors.up_nr.norm(dim=0)
    torch.testing.assert_close(found, SPECTRA[kind][:8], rtol=3e-3, atol=1e-5)


def test_a_weight_of_noise_without_any_gap() -> None:
    """The worst case: 420 singular values between 0.3 and 1.7 of the mean; still 0.01 % of the optimum."""
    weight = drawn(900, 420)
    factors = low_rank(weight, 8)
    assert (weight - factors.up_nr @ factors.down_rk).norm() < torch.linalg.svdvals(weight)[8:].norm() * (1 + 1e-4)


def test_searched_and_whole_decompositions_choose_the_same_channels() -> None:
    weight, x = with_spectrum(900, 420, SPECTRA["as language models'"]).bfloat16(), drawn(256, 420, seed=5)
    chosen, expected = (
        set(top(value_scores(estimate), 90).tolist())
        for estimate in (low_rank(weight, 8)(x), x @ best(weight, 8).float().t())
    )
    assert len(chosen & expected) >= 89


def test_the_same_weight_gives_the_same_factors_and_random_numbers_elsewhere_stay() -> None:
    weight = drawn(500, 420)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = low_rank(weight, 4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(low_rank(weight, 4).down_rk, first.down_rk)


def test_a_weight_of_zeros_has_estimates_of_zero() -> None:
    for rows in (20, 500):
        assert not low_rank(torch.zeros(rows, 450), 4)(drawn(3, 450)).any()


def test_what_has_no_such_decomposition_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank 5 is more than a weight of 4 x 9 has") as refused:
        low_rank(drawn(4, 9), 5)
    assert refused.value.hint is not None and "at most 4" in refused.value.hint
    with pytest.raises(TypeError, match="dequantize"):
        low_rank(torch.zeros(8, 8, dtype=torch.uint8), 2)


# Estimated and true choices


def indices(z: dict[str, Tensor]) -> list[set[int]]:
    """What each criterion keeps of true or estimated outputs."""
    scores = (
        feed_forward_scores(z["gate"], z["up"]),
        value_scores(z["v"]),
        query_key_scores(z["q"], z["k"], HEADS),
    )
    return [set(top(score, len(score) // 4).tolist()) for score in scores]


def oracle(x: Tensor, weights: dict[str, Tensor]) -> list[set[int]]:
    return indices({name: x @ weight.t() for name, weight in weights.items()})


def estimated(x: Tensor, weights: dict[str, Tensor], rank: int) -> list[set[int]]:
    return indices({name: low_rank(weight, min(rank, *weight.shape))(x) for name, weight in weights.items()})


def layer(seed: int) -> dict[str, Tensor]:
    """The weights of a layer whose singular values fall like 1 / number."""
    widths = {"q": 24, "k": 8, "v": 8, "gate": 64, "up": 64}
    spectrum = 1 / torch.arange(1.0, 25.0)
    return {
        name: with_spectrum(width, 24, spectrum[: min(width, 24)], seed=seed + 10 * number)
        for number, (name, width) in enumerate(widths.items())
    }


@pytest.mark.parametrize("seed", range(5))
def test_an_estimator_of_full_rank_chooses_as_the_oracle(seed: int) -> None:
    weights, x = layer(seed), drawn(50, 24, seed=seed + 100)
    assert estimated(x, weights, 24) == oracle(x, weights)
    assert estimated(x, weights, 1) != oracle(x, weights)


def test_the_overlap_with_the_oracle_grows_with_the_rank() -> None:
    def overlap(rank: int) -> float:
        shared = total = 0
        for seed in range(20):
            weights, x = layer(seed), drawn(50, 24, seed=seed + 100)
            for ours, true in zip(estimated(x, weights, rank), oracle(x, weights), strict=True):
                shared, total = shared + len(ours & true), total + len(true)
        return shared / total

    overlaps = [overlap(rank) for rank in (1, 2, 4, 8)]
    assert overlaps == sorted(set(overlaps)), overlaps
    assert overlaps[-1] > 0.9


# Of a model, and kept on disk


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "loras_bench" / "estimators"


def llama(seed: int = 0, **options: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 8, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **options))


def equal(one: dict[str, Factors], other: dict[str, Factors]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].down_rk, other[name].down_rk) and torch.equal(one[name].up_nr, other[name].up_nr)
        for name in one
    )


def never(*arguments: object) -> Factors:
    raise AssertionError("computed again")


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")


def test_estimators_of_the_layers_asked_for_by_name(folder: Path) -> None:
    model = llama().bfloat16()
    found = load_estimators(model, 4, [0, 2])
    assert found.keys() == {f"model.layers.{layer}.{part}" for layer in (0, 2) for part in PARTS}
    for name, factors in found.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor) and weight.dtype == factors.up_nr.dtype == torch.bfloat16
        expected = low_rank(weight, 4).to(torch.bfloat16)
        assert torch.equal(factors.up_nr, expected.up_nr) and torch.equal(factors.down_rk, expected.down_rk)
    assert load_estimators(model, 4, []) == {}


def test_they_are_computed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    first = load_estimators(model, 4, [0, 1])
    assert len(files(folder)) == 10
    monkeypatch.setattr(estimator, "low_rank", never)
    assert equal(load_estimators(model, 4, [0, 1]), first)
    for changed, rank in ((model, 3), (llama(seed=1), 4), (llama().bfloat16(), 4)):
        with pytest.raises(AssertionError, match="computed again"):
            load_estimators(changed, rank, [1])


def test_adapters_and_fused_storage_are_not_what_is_estimated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    plain = load_estimators(model, 4, [1])
    monkeypatch.setattr(estimator, "low_rank", never)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules="all-linear"))  # type: ignore[arg-type]
    found = load_estimators(adapted, 4, [1])
    assert equal({name.removeprefix("base_model.model."): factors for name, factors in found.items()}, plain)
    attention = adapted.get_submodule("base_model.model.model.layers.1.self_attn")
    LinearGroup.of([attention.q_proj, attention.k_proj, attention.v_proj]).pack()
    assert not attention.q_proj.base_layer.weight.is_contiguous()
    assert equal(load_estimators(adapted, 4, [1]), found)


@pytest.mark.parametrize("damage", ["truncated", "empty", "noise", "other tensors"])
def test_a_damaged_file_is_computed_anew(folder: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    first = load_estimators(model, 4, [1])
    for file in files(folder):
        content = file.read_bytes()
        other = save({"other": torch.zeros(3)})
        file.write_bytes(
            {"truncated": content[:-9], "empty": b"", "noise": b"\x80" * 99, "other tensors": other}[damage]
        )
    assert equal(load_estimators(model, 4, [1]), first)
    monkeypatch.setattr(estimator, "low_rank", never)
    assert equal(load_estimators(model, 4, [1]), first)


def test_another_process_that_computes_the_same_does_no_harm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes every file after we have looked for it and before we write ours."""
    model, expected = llama(), load_estimators(llama(), 4, [1])
    for file in files(folder):
        file.unlink()

    def slow(weight: Tensor, rank: int) -> Factors:
        monkeypatch.setattr(estimator, "low_rank", low_rank)
        theirs = load_estimators(model, 4, [1])
        monkeypatch.setattr(estimator, "low_rank", slow)
        assert equal(theirs, expected)
        return low_rank(weight, rank)

    monkeypatch.setattr(estimator, "low_rank", slow)
    assert equal(load_estimators(model, 4, [1]), expected)
    assert len(files(folder)) == 5 and all(file.suffix == ".safetensors" for file in files(folder))


def test_no_place_to_write_is_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(load_estimators(llama(), 4, [1])) == 5


def test_a_rank_that_a_projection_does_not_have_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="rank 9 is more than a weight of 8 x 24 has"):
        load_estimators(llama(), 9, [1])
