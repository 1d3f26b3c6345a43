"""Bound patterns: padding, documents, per-sample globals, tiles, and what is built only once."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from loras_bench.attention.binding import TILE, AttentionBatch
from loras_bench.attention.patterns import BigBird, BlockLocal, Dense, Dilated, Longformer, Strided, Window
from loras_bench.errors import UserError

CPU = torch.device("cpu")


def test_padding_documents_and_causality_combine() -> None:
    batch = AttentionBatch(
        5,
        True,
        CPU,
        padding_bs=torch.tensor([[1, 1, 1, 1, 0]]).bool(),
        document_bs=torch.tensor([[0, 0, 1, 1, 1]]),
    )
    expected = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]])
    assert torch.equal(batch.bound(Dense()).mask_bqk[0].int(), expected.int())


def test_documents_are_runs_of_a_number_and_padding_is_one_of_its_own() -> None:
    padding_bs = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]).bool()
    document_bs = torch.tensor([[4, 4, 0, 0, 0, 0], [1, 2, 2, 2, 2, 1]])
    first, end = AttentionBatch(6, True, CPU, padding_bs, document_bs).documents_bs
    assert first.tolist() == [[0, 0, 2, 2, 2, 5], [0, 1, 1, 1, 1, 5]]
    assert end.tolist() == [[2, 2, 5, 5, 5, 6], [1, 5, 5, 5, 5, 6]]
    first, end = AttentionBatch(6, True, CPU, padding_bs).documents_bs
    assert first.tolist() == [[0, 0, 0, 0, 0, 5], [0] * 6] and end.tolist() == [[5, 5, 5, 5, 5, 6], [6] * 6]
    first, end = AttentionBatch(6, True, CPU).documents_bs
    assert first.tolist() == [[0] * 6] and end.tolist() == [[6] * 6]
    with pytest.raises(UserError, match="padding before real tokens"):
        _ = AttentionBatch(6, True, CPU, padding_bs.flip(1)).documents_bs


def test_positions_count_from_the_start_of_the_document() -> None:
    """The second document has a global token and classes of its own."""
    batch = AttentionBatch(6, True, CPU, document_bs=torch.tensor([[0, 0, 1, 1, 1, 1]]))
    window = batch.bound(Window(window=1, global_tokens=1)).mask_bqk[0, 2:, 2:].int().tolist()
    assert window == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]
    blocks = batch.bound(BlockLocal(block=3, overlap=False)).mask_bqk[0, 2:, 2:].int().tolist()
    assert blocks == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]


def test_global_tokens_of_single_samples() -> None:
    """Position 2 is global by mask in sample 0; token id 7 stands at position 3 of sample 1."""
    batch = AttentionBatch(
        4,
        False,
        CPU,
        global_bs=torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0]]).bool(),
        input_ids_bs=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 7]]),
    )
    mask = batch.bound(Longformer(half_width=0, global_token_ids=(7,))).mask_bqk
    assert mask[0].int().tolist() == [[1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 1]]
    assert mask[1].int().tolist() == [[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize("length", [1, 128, 300, 512])
@pytest.mark.parametrize("causal", [True, False])
def test_block_mask_is_that_of_torch(length: int, causal: bool) -> None:
    pattern = Window(window=70, global_tokens=3) if causal else Window(half_width=35, global_tokens=3)
    bound = AttentionBatch(length, causal, CPU).bound(pattern)
    expected = create_block_mask(bound.mask_mod, 1, 1, length, length, device="cpu")
    found = bound.block_mask
    assert found.shape == expected.shape
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert torch.equal(found.to_dense(), expected.to_dense())


def test_tiles_of_bands_of_rows_are_the_tiles_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = AttentionBatch(700, True, CPU).bound(Strided(stride=50)).tile_pairs_btt
    monkeypatch.setattr("loras_bench.attention.binding.ELEMENTS_AT_ONCE", 1)
    assert torch.equal(AttentionBatch(700, True, CPU).bound(Strided(stride=50)).tile_pairs_btt, whole)
    assert int(whole.sum()) == Strided(stride=50).count_pairs(700, True)


def test_visited_tiles() -> None:
    """A window of 512 visits 512 / 128 + 1 tiles a row, fewer at the start; naive strides visit every tile."""
    window = AttentionBatch(8192, True, CPU).bound(Window(window=512))
    assert window.visited_pairs(3) == 3 * TILE**2 * (64 * 5 - (4 + 3 + 2 + 1))
    causal_tiles = 64 * 65 // 2
    assert AttentionBatch(8192, True, CPU).bound(Strided(stride=90)).visited_pairs(1) == causal_tiles * TILE**2
    dilated = AttentionBatch(8192, True, CPU).bound(Dilated(window=512, dilation=4))
    assert dilated.visited_pairs(1) == pytest.approx(TILE**2 * (64 * 17 - 16 * 17 // 2))
    aligned = AttentionBatch(4096, False, CPU).bound(BigBird(block=128))
    assert aligned.visited_pairs(1) == aligned.allowed_pairs(1)  # blocks of a whole tile waste nothing


def test_pairs_of_a_padded_batch_are_those_of_its_real_tokens() -> None:
    lengths = (300, 170, 0)
    batch = AttentionBatch(300, True, CPU, padding_bs=torch.arange(300) < torch.tensor(lengths)[:, None])
    pattern = Window(window=40, global_tokens=2)
    bound = batch.bound(pattern)
    assert bound.allowed_pairs(3) == sum(pattern.count_pairs(n, True) for n in lengths)
    assert bound.dense_pairs(3) == sum(n * (n + 1) // 2 for n in lengths)


def test_pairs_of_packed_documents() -> None:
    batch = AttentionBatch(100, False, CPU, document_bs=(torch.arange(100) >= 30).int()[None])
    assert batch.bound(Window(half_width=99)).allowed_pairs(1) == 30**2 + 70**2


def test_static_bindings_are_shared_and_others_live_with_their_batch() -> None:
    first = AttentionBatch(64, True, CPU)
    padded = AttentionBatch(64, True, CPU, torch.ones(2, 64).bool(), static_bindings=first.static_bindings)
    again = AttentionBatch(64, True, CPU, static_bindings=first.static_bindings)
    pattern = Window(window=8)
    assert first.bound(pattern) is again.bound(Window(window=8))
    assert padded.bound(pattern) is padded.bound(Window(window=8))
    assert padded.bound(pattern) is not first.bound(pattern)
    ids = torch.zeros(2, 64, dtype=torch.int64)
    tokens = AttentionBatch(64, True, CPU, input_ids_bs=ids, static_bindings=first.static_bindings)
    assert tokens.bound(pattern) is first.bound(pattern)  # token ids matter to patterns that name ids only
    assert not tokens.bound(Longformer(window=8, global_token_ids=(0,))).static
