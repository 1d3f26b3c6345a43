"""Structured pruning made real: hidden units and embedding rows that are zero are cut out, and matrices shrink.

What to cut is read off the weights: a unit whose outgoing weights are all zero adds nothing, whatever writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loras_bench.errors import UserError
from loras_bench.models.smaller import from_pretrained
from loras_bench.pruning.blocks import Matrix, hidden_units_of
from loras_bench.pruning.packing import stored

MULTIPLE = 8
"""Of hidden units and embedding rows: 16 bytes in bfloat16, which fast matrix products ask for. Zeros fill it up."""
INNER_SIZE = {"llama": "intermediate_size", "gpt2": "n_inner", "bert": "intermediate_size"}
INNER_SIZE["roberta"] = INNER_SIZE["bert"]
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
"""Keys of a configuration that name tokens."""
WEIGHTS, VOCABULARY = "model.safetensors", "vocabulary.safetensors"


@dataclass(frozen=True)
class Vocabulary:
    """Which row of a smaller embedding stands for each token.

    A removed token has a row of zeros, shared by all of them: that is how the masked model embeds it, and, where the
    output layer is tied to the embedding, the logit 0 that the masked model gives it.

    Attributes:
        row_of_token: int32 (tokens,).
    """

    row_of_token: Tensor

    def rows(self, token_ids: Tensor) -> Tensor:
        """The input of the smaller model: row numbers in place of tokens, int64, in the same shape."""
        return self.row_of_token.to(token_ids.device)[token_ids].long()

    def logits(self, logits_bsr: Tensor) -> Tensor:
        """The logits of all tokens, (batch, length, tokens), from those of rows."""
        return logits_bsr.index_select(-1, self.row_of_token.to(logits_bsr.device))


@dataclass(frozen=True)
class Exported:
    """A smaller model of transformers' own classes, and its vocabulary where tokens were removed."""

    model: Any
    vocabulary: Vocabulary | None

    def save(self, folder: Path) -> None:
        """Write a folder that transformers loads, unless it has folded attention; its ids are the vocabulary's rows."""
        folder.mkdir(parents=True, exist_ok=True)
        config = self.model.config
        config.architectures, config.dtype = [type(self.model).__name__], self.model.dtype
        config.save_pretrained(folder)
        save_file(stored(self.model), folder / WEIGHTS, metadata={"format": "pt"})
        if self.vocabulary is not None:
            save_file({"row_of_token": self.vocabulary.row_of_token}, folder / VOCABULARY)


def load_exported(folder: Path | str) -> Exported:
    """Read what `Exported.save` wrote.

    Raises:
        UserError: There is no exported model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        classifies = config.architectures[0].endswith("ForSequenceClassification")
        kind = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
        model, _ = from_pretrained(kind, str(folder), config, dtype="auto", use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no exported model: {error}", "see `loras-bench savings --out`") from None
    path = Path(folder) / VOCABULARY
    return Exported(model, Vocabulary(load_file(path)["row_of_token"]) if path.exists() else None)


def export(model: Any) -> Exported | None:
    """Cut out what is zero, in place.

    All layers keep as many hidden units as the one that needs most, since transformers' configurations have one size
    for all. An output layer that is not tied to the embedding keeps every token, and so does then the embedding.

    Args:
        model: A GPT-2, BERT, RoBERTa or Llama model, any head.

    Returns:
        The same model, smaller; None, and the model as it was, if there is nothing to cut.
    """
    cut = _cut_units(model)
    vocabulary = _cut_vocabulary(model)
    return Exported(model, vocabulary) if cut or vocabulary else None


def _cut_units(model: Any) -> bool:
    layers = hidden_units_of(model)
    live = [(reader.by_outputs(reader.weight.detach()) != 0).any(dim=0) for reader, _ in layers]
    sizes = {len(units) for units in live}
    if len(sizes) != 1:
        return False
    count = _filled(max(int(units.sum()) for units in live))
    if count >= sizes.pop():
        return False
    for (reader, writers), units in zip(layers, live, strict=True):
        kept = (~units).byte().argsort(stable=True)[:count].sort().values  # those that are not zero, then others
        _cut(reader, kept, inputs=True)
        for writer in writers:
            _cut(writer, kept, inputs=False)
    setattr(model.config, INNER_SIZE[model.config.model_type], count)
    return True


def _cut(matrix: Matrix, kept: Tensor, *, inputs: bool) -> None:
    """Keep some inputs or outputs of a linear layer."""
    module: Any = matrix.module
    module.weight = _parameter(module.weight.detach().index_select(int(inputs != matrix.transposed), kept))
    if not inputs and module.bias is not None:
        module.bias = _parameter(module.bias.detach()[kept])
    names = ("nx", "nf") if isinstance(module, Conv1D) else ("in_features", "out_features")
    setattr(module, names[0 if inputs else 1], len(kept))


def _cut_vocabulary(model: Any) -> Vocabulary | None:
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    weight_td = embedding.weight.detach()
    if output is not None and (output.weight is not embedding.weight or output.bias is not None):
        return None
    kept = (weight_td != 0).any(dim=1)
    kept[_special_tokens(model.config, len(kept))] = True  # what asks for a token by number must find it alone
    tokens = kept.nonzero()[:, 0]
    rows = _filled(len(tokens) + 1)
    if rows >= len(kept):
        return None
    row_of_token = torch.full((len(kept),), len(tokens), dtype=torch.int32)
    row_of_token[tokens] = torch.arange(len(tokens), dtype=torch.int32)
    filler_rd = weight_td.new_zeros(rows - len(tokens), weight_td.shape[1])
    embedding.weight, embedding.num_embeddings = _parameter(torch.cat([weight_td[tokens], filler_rd])), rows
    if embedding.padding_idx is not None:
        embedding.padding_idx = int(row_of_token[embedding.padding_idx])
    if output is not None:
        output.weight, output.out_features = embedding.weight, rows
    _renumber(model, row_of_token, rows)
    return Vocabulary(row_of_token)


def _special_tokens(config: Any, tokens: int) -> list[int]:
    found = [token for key in TOKEN_IDS for token in _listed(getattr(config, key, None))]
    if config.model_type == "roberta":  # counts positions from the number of its padding token
        found += range(config.pad_token_id)
    return [token for token in found if 0 <= token < tokens]


def _renumber(model: Any, row_of_token: Tensor, rows: int) -> None:
    """Tell the configuration the new numbers."""
    model.config.vocab_size = rows
    if hasattr(model, "vocab_size"):
        model.vocab_size = rows
    for holder in (model.config, getattr(model, "generation_config", None)):
        for key in TOKEN_IDS:
            if named := _listed(given := getattr(holder, key, None)):
                renumbered = [int(row_of_token[token]) for token in named if token < len(row_of_token)]
                setattr(holder, key, renumbered if isinstance(given, Sequence) else next(iter(renumbered), None))


def _listed(token: int | Sequence[int] | None) -> list[int]:
    return [] if token is None else [token] if isinstance(token, int) else list(token)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous())


def _filled(count: int) -> int:
    return -(-count // MULTIPLE) * MULTIPLE
