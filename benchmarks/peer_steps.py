"""The training step of each arm: transformers and PEFT as a user puts them together, or loras_bench as `run` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peer_arms import Arm, Shape
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from loras_bench.attention.dense import KERNELS
from loras_bench.build import Ingredients, build
from loras_bench.config import Experiment
from loras_bench.data import IGNORED, TaskData
from loras_bench.data.instruction import label_rows
from loras_bench.models.loading import LoadedModel
from loras_bench.plan import resolve
from loras_bench.worker import look_at_device

SEED = 0
LEARNING_RATE = 1e-4
PATTERN = {"kind": "window", "window": 512, "global_tokens": 64}
MAX_GRAD_NORM = 1.0
"""The default of transformers' Trainer, and ours."""


@dataclass(frozen=True)
class Trainer:
    """An arm, ready to step."""

    step: Callable[[int], Tensor]
    """One optimizer step, by its number; gives the loss as a device scalar and does not wait for the device."""
    peak_bytes: Callable[[], int]
    """Most memory that tensors took since torch's last reset of its peak."""
    facts: dict[str, Any]
    """What was resolved on this device, for the record."""


def random_tokens(shape: Shape) -> Tensor:
    """The one batch of a shape, the same for every arm: int64 (rows, length + 1) on the CPU."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(shape.vocabulary, (shape.rows, shape.length + 1), generator=generator)


def label_mask(shape: Shape) -> Tensor:
    """Which positions of a row are learned: bool (length,)."""
    return torch.arange(shape.length) >= shape.length - (shape.labels or shape.length)


def random_model(shape: Shape, device: torch.device) -> nn.Module:
    """Random weights in bf16, made on the device: the same for every arm."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(SEED)
    with device:
        model: nn.Module = AutoModelForCausalLM.from_config(LlamaConfig(**shape.llama()), dtype=torch.bfloat16)
    return model


def attention_kernels(arm: Arm) -> AbstractContextManager[None]:
    """Enter it around everything that a peer does: SDPA's kernels in our order, cuDNN first, or in torch's."""
    if not arm.cudnn:
        return nullcontext()
    return sdpa_kernel(list(KERNELS.values()), set_priority=True)


def make_trainer(arm: Arm, shape: Shape, device: torch.device) -> Trainer:
    """Build an arm; enter `attention_kernels` first."""
    return _ours(arm, shape, device) if arm.ours else _peer(arm, shape, device)


def _peer(arm: Arm, shape: Shape, device: torch.device) -> Trainer:
    if arm.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        in_layers = not arm.compile_layers
        apply_liger_kernel_to_llama(rope=in_layers, rms_norm=in_layers, swiglu=in_layers)
    model: Any = random_model(shape, device)
    if arm.lora:
        model = _with_adapters(model, arm, shape)
    if shape.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
    call = _compiled(model, arm)
    ids_bs = random_tokens(shape)[:, :-1].to(device)
    labels_bs = ids_bs.masked_fill(~label_mask(shape).to(device), IGNORED)

    def step(number: int) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        loss: Tensor = call(input_ids=ids_bs, labels=labels_bs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach().clone()

    # torch.compile's graphs keep their memory to themselves: what tensors took is known for all of it only
    graphed = arm.compile_mode == "reduce-overhead"
    peak_bytes = torch.cuda.max_memory_reserved if graphed else torch.cuda.max_memory_allocated
    return Trainer(step, peak_bytes, {"sdpa": _sdpa_kernel(shape, device)})


def _compiled(model: Any, arm: Arm) -> Any:
    """The model to call; its layers are compiled in place."""
    if arm.compile_mode is None:
        return model
    if not arm.compile_layers:
        return torch.compile(model, mode=arm.compile_mode, dynamic=False)
    for layer in model.get_decoder().layers:
        layer.compile(mode=arm.compile_mode, dynamic=False)
    return model


def _with_adapters(model: nn.Module, arm: Arm, shape: Shape) -> nn.Module:
    from peft import LoraConfig, TaskType, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if shape.attention_only else "all-linear"
    config = LoraConfig(r=shape.rank, lora_alpha=2 * shape.rank, target_modules=targets, task_type=TaskType.CAUSAL_LM)
    return get_peft_model(model, config, autocast_adapter_dtype=not arm.bf16_adapters)


def _sdpa_kernel(shape: Shape, device: torch.device) -> str:
    """What scaled_dot_product_attention takes for q, k and v as transformers' Llama gives them."""

    def some(heads: int) -> Tensor:
        sizes = (shape.rows, shape.length, heads, shape.hidden // shape.heads)
        return torch.empty(sizes, dtype=torch.bfloat16, device=device, requires_grad=True).transpose(1, 2)

    q, k, v = some(shape.heads), some(shape.key_heads), some(shape.key_heads)
    return SDPBackend(torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=True)).name.lower()


class RandomTokens(TaskData):
    """One batch of random tokens as a data set of language modelling."""

    task = "language_modeling"

    def __init__(self, shape: Shape) -> None:
        self.sequence_length = shape.length
        self._ids_bs, self._learned_s = random_tokens(shape), label_mask(shape)

    def rows(self, split: str) -> int:
        return len(self._ids_bs)

    def collate(self, split: str, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        ids_bs = self._ids_bs[list(indices)]
        targets_bs = ids_bs[:, 1:].masked_fill(~self._learned_s, IGNORED)
        batch = {"input_ids": ids_bs[:, :-1].contiguous(), "targets": targets_bs}
        if not self._learned_s.all():  # as Instructions has it
            batch["label_rows"] = torch.from_numpy(label_rows(targets_bs.numpy()))
        return batch

    def real_tokens(self, split: str, indices: Sequence[int] | np.ndarray) -> int:
        return len(indices) * self.sequence_length

    def target_count(self, split: str, indices: Sequence[int] | np.ndarray) -> int:
        return len(indices) * int(self._learned_s.sum())

    def eval_order(self, split: str) -> np.ndarray:
        return np.arange(len(self._ids_bs))

    def protocol(self, split: str) -> dict[str, Any]:
        return {}


def _ours(arm: Arm, shape: Shape, device: torch.device) -> Trainer:
    """What `loras-bench run` would train; random weights and tokens stand in for what it reads from disk."""
    experiment = resolve(_experiment(arm, shape), look_at_device(device.type))
    model: Any = random_model(shape, device)
    loaded = LoadedModel(model=model, label=shape.model, causal=True, origin={}, max_positions=None, dropout={})
    run = build(experiment, SEED, device.type, Ingredients(RandomTokens(shape), None, loaded, 0.0))
    facts = {
        "implementation": experiment.model.implementation,
        "loss": experiment.training.loss,
        "cuda_graph": experiment.training.cuda_graph,
        "attention": run.attention.describe()["layers"][0],
    }
    return Trainer(run.loop.step, run.loop.peak_memory_bytes, facts)


def _experiment(arm: Arm, shape: Shape) -> Experiment:
    methods: list[dict[str, Any]] = []
    if arm.lora:
        targets = "attention" if shape.attention_only else "all-linear"
        methods.append({"kind": "lora", "rank": shape.rank, "alpha": 2 * shape.rank, "targets": targets})
    if arm.sparse:
        methods.append({"kind": "sparse_attention", "pattern": PATTERN})
    if arm.sliced:
        methods.append({"kind": "sparse_lora", "layers": shape.slices, "start": 0.0})
    return Experiment.model_validate(
        {
            "name": arm.name,
            "data": {"name": "random tokens", "task": "language_modeling", "sequence_length": shape.length},
            "model": {"init": "scratch", "architecture": {"model_type": "llama"}, "dtype": "bfloat16"},
            "methods": methods,
            "training": {
                "tokens": 1000 * shape.tokens_per_step,
                "tokens_per_step": shape.tokens_per_step,
                "learning_rate": LEARNING_RATE,
                "max_grad_norm": MAX_GRAD_NORM,
                "gradient_checkpointing": shape.checkpointing,
            },
        }
    )
