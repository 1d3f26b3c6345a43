"""Tiny models, data and experiments that the tests of training share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from loras_bench.attention.dispatch import ModelAttention
from loras_bench.build import Assembly, Build, assemble, build, read
from loras_bench.catalog import DatasetSpec
from loras_bench.config import Experiment, TrainingConfig
from loras_bench.data import IGNORED, TaskData
from loras_bench.data.packing import lay_out
from loras_bench.data.sources import Source
from loras_bench.methods.base import Method
from loras_bench.models.objective import Objective
from loras_bench.optimizer import MasterAdamW
from loras_bench.requests import Device, RunRequest
from loras_bench.training import Loop, StepPlan

torch.set_num_threads(1)  # more only wait for each other at these sizes, seconds long on a busy machine

VOCABULARY, WIDTH, LAYERS, HEADS, INNER = 48, 32, 2, 4, 80
PADDING = 1
CPU = Device("cpu", "a CPU", False)


def tiny(family: str, seed: int = 0, **options: Any) -> Any:
    """A model of a family without dropout, in float32; `gpt2-classifier` and `llama-classifier` classify."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "hidden_size": WIDTH}
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": PADDING}
    encoder: dict[str, Any] = sizes | {
        "intermediate_size": INNER,
        "num_labels": 3,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    match family:
        case "gpt2" | "gpt2-classifier":
            gpt2 = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "n_positions": 64, "n_inner": INNER}
            dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            kind = GPT2LMHeadModel if family == "gpt2" else GPT2ForSequenceClassification
            return kind(GPT2Config(**(common | gpt2 | dropouts | options), num_labels=3))
        case "llama" | "llama-classifier":
            llama = sizes | {"intermediate_size": INNER, "num_key_value_heads": 2}
            made = LlamaForCausalLM if family == "llama" else LlamaForSequenceClassification
            return made(LlamaConfig(**(common | llama | options), num_labels=3))
        case "bert":
            return BertForSequenceClassification(BertConfig(**common, **(encoder | options)))
        case "roberta":
            return RobertaForSequenceClassification(RobertaConfig(**common, **(encoder | options)))
    raise ValueError(family)


def task_of(family: str) -> Any:
    return "language_modeling" if family in ("gpt2", "llama") else "classification"


def token_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random tokens, int64 (rows, length), without the special ones."""
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


class Rows(TaskData):
    """Rows of tokens held in memory, the same for every split; with `labels` a classification task.

    `lengths` are the real tokens of each row; the rest is padding. With `packed` the rows of a batch are one.
    """

    def __init__(
        self,
        ids_ns: Tensor,
        lengths: Sequence[int] | None = None,
        labels: Sequence[int] | None = None,
        packed: bool = False,
    ):
        self.task = "language_modeling" if labels is None else "classification"  # type: ignore[misc]
        spec = DatasetSpec("memory", self.task, label_names=() if labels is None else ("a", "b", "c"))
        super().__init__(Source(spec, "memory", {}, spec.label_names, "none"), ids_ns.shape[1], ())
        self.labels = labels
        self.packed = packed
        self.lengths = np.asarray(lengths if lengths is not None else [ids_ns.shape[1]] * len(ids_ns))
        self.ids_ns = ids_ns.clone()
        self.ids_ns[torch.arange(ids_ns.shape[1]) >= torch.as_tensor(self.lengths)[:, None]] = PADDING

    def rows(self, split: str) -> int:
        return len(self.ids_ns)

    def collate(self, split: str, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        ids_bs, lengths_b = self.ids_ns[list(indices)], torch.as_tensor(self.lengths[list(indices)])
        if self.packed:
            assert self.labels is not None
            length = self.ids_ns.shape[1]
            layout = lay_out(np.asarray(indices) * length, self.lengths[list(indices)], length, packed=True)
            ids_1s = torch.from_numpy(layout.take(self.ids_ns.flatten().numpy(), PADDING))
            facts = {name: torch.from_numpy(array) for name, array in (layout.facts | layout.borders).items()}
            return facts | {"input_ids": ids_1s, "targets": torch.tensor([self.labels[i] for i in indices])}
        if self.labels is not None:
            width = int(lengths_b.max())
            mask_bs = torch.arange(width) < lengths_b[:, None]
            batch = {"input_ids": ids_bs[:, :width], "targets": torch.tensor([self.labels[i] for i in indices])}
            return batch if mask_bs.all() else batch | {"attention_mask": mask_bs}
        targets_bs = torch.roll(ids_bs, -1, dims=1)
        targets_bs[torch.arange(ids_bs.shape[1]) >= lengths_b[:, None]] = IGNORED
        return {"input_ids": ids_bs, "targets": targets_bs}

    def real_tokens(self, split: str, indices: Sequence[int] | np.ndarray) -> int:
        return int(self.lengths[list(indices)].sum())

    def target_count(self, split: str, indices: Sequence[int] | np.ndarray) -> int:
        return self.real_tokens(split, indices) if self.labels is None else len(indices)

    def eval_order(self, split: str) -> np.ndarray:
        return np.argsort(self.lengths, kind="stable")

    def protocol(self, split: str) -> dict[str, Any]:
        return {"words": 10, "bytes": 100}


def make_loop(
    model: nn.Module,
    data: TaskData,
    plan: StepPlan,
    methods: Sequence[Method[Any]] = (),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    graphed: bool = False,
    **training: Any,
) -> Loop:
    """A loop as `build` makes it, around a model that is there already."""
    settings = {"tokens": 1, "tokens_per_step": 1, "learning_rate": 1e-2, "weight_decay": 0.0} | training
    config = TrainingConfig.model_validate(settings)
    model.to(device)
    optimizer = MasterAdamW(model, [], config.learning_rate, config.weight_decay, config.betas, dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    objective = Objective(model, data.task, "torch").train()
    AcceleratorState._reset_state(reset_partial_state=True)  # else the first test's device would be everyone's
    accelerator = Accelerator(cpu=device == "cpu")
    return Loop(objective, optimizer, methods, data, plan, config, accelerator, None, graphed)


def attended(family: str, device: torch.device | None = None, **options: Any) -> Any:
    """A tiny model, on the CPU, with our attention installed for the device that it will run on."""
    model = tiny(family, **options)
    ModelAttention.install(model, device=device)
    return model


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of the bytes of each tensor."""
    return {
        name: hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
    }


def set_places(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """A cache of the tests' own, and two small data sets: `notes` (language) and `moods` (three classes)."""
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    patch.setenv("LORAS_BENCH_DATA", str(folder))
    words = ["quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "seven", "wizards", "box", "kings"]
    draw = np.random.default_rng(0)
    for split, rows in (("train", 24), ("validation", 8), ("test", 8)):
        texts = [" ".join(draw.choice(words, size=draw.integers(3, 30))) for _ in range(rows)]
        (folder / "notes").mkdir(exist_ok=True)
        (folder / "notes" / f"{split}.txt").write_text("\n".join(texts) + "\n")
        (folder / "moods").mkdir(exist_ok=True)
        lines = [json.dumps({"text": text, "label": number % 3}) for number, text in enumerate(texts)]
        (folder / "moods" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


NOTES = {"name": "notes", "task": "language_modeling", "sequence_length": 32}
MOODS = {"name": "moods", "task": "classification", "label_field": "label", "sequence_length": 64}
GPT2 = {
    "init": "scratch",
    "architecture": {
        "model_type": "gpt2",
        "n_layer": LAYERS,
        "n_embd": WIDTH,
        "n_head": HEADS,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    },
    "tokenizer": {"vocabulary": 300},
}
LLAMA = GPT2 | {
    "architecture": {
        "model_type": "llama",
        "num_hidden_layers": LAYERS,
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "intermediate_size": INNER,
    }
}
BERT = {
    "init": "scratch",
    "architecture": {
        "model_type": "bert",
        "num_hidden_layers": LAYERS,
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "intermediate_size": INNER,
        "hidden_dropout_prob": 0.0,
        "initializer_range": 0.2,  # ten times the default: what a token attends to shows in the loss
    },
    "tokenizer": {"vocabulary": 300},
}
LORA = {"kind": "lora", "rank": 4, "alpha": 8}
WINDOW = {"kind": "sparse_attention", "pattern": {"kind": "window", "window": 8, "global_tokens": 2}}
HALF_WINDOW = {"kind": "sparse_attention", "pattern": {"kind": "window", "half_width": 4, "global_tokens": 1}}


def experiment(name: str = "arm", **sections: Any) -> Experiment:
    """An experiment of three steps on `notes` with a GPT-2 from scratch, or as the sections say."""
    language = sections.get("data", NOTES)["task"] == "language_modeling"
    size = {"tokens_per_step": 128, "tokens": 384} if language else {"batch_size": 8, "epochs": 1}
    training = size | {"learning_rate": 1e-2, "loss": "torch"} | sections.pop("training", {})
    content = {
        "name": name,
        "data": NOTES,
        "model": GPT2 if language else BERT,
        "training": training,
        "energy": {"steady_seconds": 0, "idle_seconds": 0},
    }
    return Experiment.model_validate(content | sections)


def assemble_run(made: Experiment, seed: int = 0) -> Assembly:
    """A run with its methods applied."""
    return assemble(made, seed, torch.device("cpu"), read(made, seed))


def build_run(made: Experiment, seed: int = 0, device: str = "cpu") -> Build:
    """A run that is ready to step."""
    AcceleratorState._reset_state(reset_partial_state=True)  # else the first test's device would be everyone's
    return build(made, seed, device, read(made, seed))


def request(arm: Experiment, results: Path, seed: int = 0, **fields: Any) -> RunRequest:
    """What the parent process would send to a worker."""
    return RunRequest(arm, seed, f"{arm.name}/seed{seed}", results / arm.name / f"seed{seed}", CPU, **fields)
