"""GGUF models as ordinary ones: dequantized once to safetensors, kept on disk, and read from there ever after."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loras_bench.cache import cached_folder
from loras_bench.errors import UserError
from loras_bench.models.catalog import ModelLocation


def as_safetensors(location: ModelLocation) -> ModelLocation:
    """The same model in a folder of float32 safetensors with its tokenizer; other models as they are.

    Reading GGUF takes transformers half a minute for each run, and marks the model as quantized, which PEFT and
    `save_pretrained` would act upon although every weight is an ordinary tensor. Both are left behind here.

    Of the tokenizer transformers restores vocabulary and merges, but not the pre-tokenizer that `tokenizer.ggml.pre`
    names: it always takes GPT-2's. For SmolLM2 (which splits digits first) that changes 8 of the 2.6 M tokens of
    WikiText-2, those of superscript digits.

    Raises:
        UserError: The file cannot be read, or the converted model cannot be written.
    """
    if location.gguf_file is None:
        return location
    import transformers

    key = f"{file_sha256(Path(location.path) / location.gguf_file)[:24]}-transformers-{transformers.__version__}"
    folder = cached_folder("models", key, lambda folder: _convert(location, folder))
    if folder is None:
        raise UserError(
            f"{location.label}: no room for its dequantized weights",
            "free disk space, or set XDG_CACHE_HOME to another disk",
        )
    return replace(location, path=str(folder), gguf_file=None)


def _convert(location: ModelLocation, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    path, gguf = location.path, {"gguf_file": location.gguf_file}
    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True, **gguf}
    auto_model: Any = AutoModelForCausalLM  # its annotations do not know `output_loading_info`
    try:
        hf_config = AutoConfig.from_pretrained(path, **gguf)
        tokenizer = AutoTokenizer.from_pretrained(path, **gguf)
        loaded, info = auto_model.from_pretrained(path, **options)
    except Exception as error:  # whatever a parser says of a broken file, the user must learn which file
        raise UserError(f"cannot read {location.gguf_file}: {error}", "GGUF needs `pip install gguf`") from error
    if info["missing_keys"]:
        raise UserError(f"{location.gguf_file} lacks {min(info['missing_keys'])}", "is the file complete?")
    tokenizer.save_pretrained(folder)
    plain = type(loaded)(hf_config)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
