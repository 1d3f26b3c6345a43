"""What `peers.py` compares: models by their sizes, and arms by what they are made of. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loras_bench.errors import UserError


@dataclass(frozen=True)
class Shape:
    """A Llama model with random weights, and the batches that it trains on."""

    name: str
    model: str
    """Whose sizes these are."""
    length: int
    rows: int
    """Rows of a forward pass; one forward pass a step."""
    hidden: int
    layers: int
    heads: int
    key_heads: int
    inner: int
    vocabulary: int
    tied: bool
    checkpointing: bool = False
    """Gradient checkpointing, where 80 GB do not hold the activations of PEFT's own LoRA; then for all arms alike."""
    full: bool = True
    """Whether full fine-tuning fits."""
    labels: int | None = None
    """Tokens at the end of each row that are learned, as responses are; None: all."""
    rank: int = 16
    """Of LoRA; alpha is twice it."""
    attention_only: bool = False
    """LoRA on q, k, v and o, else on all linear layers."""
    slices: Mapping[str, Mapping[str, float]] | None = None
    """Layers of SparseLoRA and their sparsities; None: it is not compared here."""

    @property
    def tokens_per_step(self) -> int:
        return self.length * self.rows

    def llama(self) -> dict[str, Any]:
        """Arguments of transformers' `LlamaConfig`."""
        return {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "intermediate_size": self.inner,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": self.length,
            "use_cache": False,
        }


_135M = Shape("135m-8k", "SmolLM2-135M", 8192, 4, 576, 30, 9, 3, 1536, 49152, True)
_1B = Shape("1b-4k", "Llama-3.2-1B", 4096, 2, 2048, 16, 32, 8, 8192, 128256, True)
_8B = Shape("8b-2k", "Llama-3-8B", 2048, 2, 4096, 32, 32, 8, 14336, 128256, False, full=False)
_MATH = {"3-30": {"feed_forward": 0.99}} | {layers: {"attention": 0.75} for layers in ("14-19", "21-23", "25-29")}
"""For Llama-3-8B on Math10K (Khaki et al. 2025, arXiv 2506.16500, Table 12)."""
_PROMPTS = replace(_8B, rank=32, attention_only=True, slices=_MATH)
SHAPES = {
    shape.name: shape
    for shape in (
        replace(_135M, name="135m-1k", length=1024, rows=32),
        _135M,
        replace(_135M, name="135m-32k", length=32768, rows=1),
        _1B,
        replace(_1B, name="1b-16k", length=16384, rows=1, checkpointing=True),
        _8B,
        replace(_8B, name="8b-8k", length=8192, rows=1, checkpointing=True),
        replace(_PROMPTS, name="8b-512-128", length=512, rows=8, labels=128),
        replace(_PROMPTS, name="8b-2k-512", length=2048, rows=2, labels=512),
    )
}
TINY = Shape("tiny", "a toy", 64, 2, 128, 2, 4, 2, 192, 64, True)
"""For tests."""
TINY_PROMPTS = replace(
    TINY, name="tiny-prompts", rows=8, labels=16, attention_only=True, slices={"0": {"feed_forward": 0.9}}
)


@dataclass(frozen=True)
class Arm:
    """One way to train the model; what is not ours is transformers and PEFT."""

    name: str
    lora: bool
    ours: bool = False
    sparse: bool = False
    """Window of 512 keys with 64 global tokens."""
    sliced: bool = False
    """SparseLoRA."""
    bf16_adapters: bool = False
    """Adapters in the model's number format; PEFT's default is float32."""
    cudnn: bool = False
    """SDPA takes cuDNN first, as torch 2.11 does by itself on Hopper and other versions do not."""
    liger: bool = False
    """Liger's kernels; its loss alone where the layers are compiled, which fuses the rest of them by itself."""
    compile_mode: str | None = None
    """A mode of `torch.compile`; None leaves the model eager."""
    compile_layers: bool = False
    """Compile the layers, one graph for all of them, and not the model: seconds instead of minutes."""

    @property
    def group(self) -> str:
        """Candidates of one group compete; the best of them is measured in full."""
        return self.name.partition("/")[0]

    def fits(self, shape: Shape) -> bool:
        """Whether the arm is compared at this shape."""
        return (self.lora or shape.full) and (not self.sliced or shape.slices is not None)


def _candidates(group: str, lora: bool) -> list[Arm]:
    plain = Arm("cudnn", lora, bf16_adapters=lora, cudnn=True)
    fused = replace(plain, liger=True)
    arms = {
        "cudnn": plain,
        "liger": fused,
        "compile": replace(plain, compile_mode="default"),
        "liger+compile": replace(fused, compile_mode="default"),
        "liger-loss+compile-layers": replace(fused, compile_mode="default", compile_layers=True),
        "liger+compile-max-autotune": replace(fused, compile_mode="max-autotune-no-cudagraphs"),
        "liger+compile-cudagraphs": replace(fused, compile_mode="reduce-overhead"),
    }
    return [replace(arm, name=f"{group}/{name}") for name, arm in arms.items()]


ARMS = {
    arm.name: arm
    for arm in (
        Arm("full", lora=False),
        Arm("lora", lora=True),
        Arm("ours_full", lora=False, ours=True),
        Arm("ours_lora", lora=True, ours=True),
        Arm("ours_lora_s", lora=True, ours=True, sparse=True),
        Arm("ours_sparse_lora", lora=True, ours=True, sliced=True),
        *_candidates("peer_full", lora=False),
        *_candidates("peer_lora", lora=True),
    )
}


def choose_shapes(names: Sequence[str]) -> list[Shape]:
    """The shapes of these names.

    Raises:
        UserError: There is no such shape.
    """
    known = SHAPES | {shape.name: shape for shape in (TINY, TINY_PROMPTS)}
    for name in names:
        if name not in known:
            raise UserError(f"--shapes: there is no `{name}`", f"one of {', '.join(SHAPES)}")
    return [known[name] for name in names]


def choose_arms(names: Sequence[str]) -> list[Arm]:
    """The arms of these names, in their order; the name of a group stands for all its candidates.

    Raises:
        UserError: There is no such arm.
    """
    chosen: dict[str, Arm] = {}
    for name in names:
        found = {arm.name: arm for arm in ARMS.values() if name in (arm.name, arm.group)}
        if not found:
            groups = list(dict.fromkeys(arm.group for arm in ARMS.values()))
            raise UserError(
                f"--arms: there is no `{name}`", f"one of {', '.join(groups)}, or {list(ARMS)[-1]} and such"
            )
        chosen |= found
    return list(chosen.values())
