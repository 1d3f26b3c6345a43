"""Packed weights: every bit comes back, and the computed size is the file's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from training_fixtures import digests, tiny

from loras_bench.errors import UserError
from loras_bench.pruning.packing import load_packed, packed_bytes, save_packed, stored, stored_bytes


def bytes_in(path: Path) -> int:
    """Of the tensors in a safetensors file, by its own header."""
    with safe_open(path, "pt") as file:
        return stored_bytes({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def sparse(shape: tuple[int, ...], zeros: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return values.masked_fill_(torch.rand(shape, generator=generator) < zeros, 0).to(dtype)


def test_the_size_by_hand() -> None:
    """12 places are 2 bytes of bits, 3 values are 6; 8 values and a byte would be more than 8 values."""
    three = torch.zeros(3, 4, dtype=torch.bfloat16)
    three[0, 1], three[1, 1], three[2, 3] = 1.0, -2.0, 0.5
    full = torch.ones(8, dtype=torch.bfloat16)
    assert packed_bytes({"three": three}) == 2 + 3 * 2
    assert packed_bytes({"full": full}) == 8 * 2 == stored_bytes({"full": full})
    full[3] = 0
    assert packed_bytes({"full": full}) == 1 + 7 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("zeros", [0.0, 0.05, 0.5, 0.7, 1.0])
def test_bits_come_back_and_the_size_is_the_files(tmp_path: Path, dtype: torch.dtype, zeros: float) -> None:
    tensors = {
        "matrix": sparse((33, 17), zeros, dtype),
        "vector": sparse((5,), zeros, dtype, 1),
        "transposed": sparse((16, 12), zeros, dtype, 2).t(),
        "number": torch.tensor([3], dtype=dtype),
        "nothing": torch.zeros(0, 4, dtype=dtype),
    }
    save_packed(tmp_path / "packed", tensors)
    loaded = load_packed(tmp_path / "packed")
    assert digests(loaded) == digests(tensors)
    assert {name: t.shape for name, t in loaded.items()} == {name: t.shape for name, t in tensors.items()}
    assert bytes_in(tmp_path / "packed") == packed_bytes(tensors) <= stored_bytes(tensors)


@given(st.integers(0, 10_000), st.floats(0, 1), st.integers(1, 9), st.integers(1, 9))
def test_any_share_of_zeros(tmp_path_factory: pytest.TempPathFactory, seed: int, zeros: float, r: int, c: int) -> None:
    path = tmp_path_factory.mktemp("packed") / "file"
    tensors = {"w": sparse((r, c), zeros, torch.bfloat16, seed)}
    save_packed(path, tensors)
    assert digests(load_packed(path)) == digests(tensors)
    assert bytes_in(path) == packed_bytes(tensors)


def test_negative_zeros_and_nans_are_values(tmp_path: Path) -> None:
    odd = torch.zeros(8, 8)
    odd[0, 0], odd[1, 1], odd[2, 2] = -0.0, float("nan"), 1e-45
    save_packed(tmp_path / "packed", {"odd": odd})
    assert packed_bytes({"odd": odd}) == 8 + 3 * 4
    assert digests(load_packed(tmp_path / "packed")) == digests({"odd": odd})


def test_shares_of_the_notes() -> None:
    """70 % zeros: 0.3 + 1/32 of float32, 0.3 + 1/16 of bfloat16. Two of four: half and a sixteenth."""
    weight = torch.ones(1000, 80)
    weight.view(-1)[:56_000] = 0
    assert packed_bytes({"w": weight}) / stored_bytes({"w": weight}) == pytest.approx(0.3 + 1 / 32)
    half = {"w": weight.bfloat16()}
    assert packed_bytes(half) / stored_bytes(half) == pytest.approx(0.3 + 1 / 16)
    pairs = {"w": torch.tensor([0, 1, 0, 1]).repeat(100, 20).bfloat16()}
    values_and_indices = 100 * 40 * 2 + 100 * 40 * 2 // 8
    assert packed_bytes(pairs) == values_and_indices, "what a compressed form takes: indices of two bits"


def test_tied_weights_are_stored_once_and_a_model_comes_back(tmp_path: Path) -> None:
    model, other = tiny("llama", tie_word_embeddings=True), tiny("llama", seed=1, tie_word_embeddings=True)
    with torch.no_grad():
        model.model.embed_tokens.weight[5:30] = 0
    tensors = stored(model)
    assert "lm_head.weight" not in tensors
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in model.parameters())
    assert {t.dtype for t in stored(model, torch.bfloat16).values()} == {torch.bfloat16}
    save_packed(tmp_path / "packed", tensors)
    missing = other.load_state_dict(load_packed(tmp_path / "packed"), strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys
    assert digests(other.state_dict()) == digests(model.state_dict())


def test_another_file_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "plain")
    with pytest.raises(UserError, match="holds no packed weights"):
        load_packed(tmp_path / "plain")
