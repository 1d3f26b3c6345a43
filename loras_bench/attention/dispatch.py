"""The attention of one model: the pattern of each layer, the backend that computes it, and why that one.

`ModelAttention.install` (huggingface.py holds the plug) is called once for every arm, dense ones too, so that all arms
take their kernels from the same place. Methods then change the patterns. State lives on this object, never in a module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loras_bench.attention.backend import Backend, SparseBackend
from loras_bench.attention.binding import AttentionBatch, BoundPattern
from loras_bench.attention.counting import CoreCall, PairCounts, count_core
from loras_bench.attention.dense import DenseKernel, SdpaBackend
from loras_bench.attention.flex import FlexBackend
from loras_bench.attention.patterns import Dense, Longformer, PatternBase
from loras_bench.attention.reference import ReferenceBackend
from loras_bench.attention.triton import TritonBackend
from loras_bench.errors import ConfigError, UserError
from loras_bench.methods.base import AttentionTap

if TYPE_CHECKING:
    from loras_bench.methods.base import Taps


class ModelAttention:
    """Owns the attention core of every layer of one model.

    Args:
        layers: Number of layers.
        causal: Whether the model is causal.
        head_dim: Size of a head.
        device: Where the model will run; decides the backends.
        dense_kernel: SDPA kernel of dense layers.
    """

    def __init__(
        self, layers: int, causal: bool, head_dim: int, device: torch.device, dense_kernel: DenseKernel = "auto"
    ) -> None:
        self.causal = causal
        self.head_dim = head_dim
        self.device = device
        self.taps: Taps | None = None
        """Set it to collect q, k and the log-sum-exp of every layer."""
        self.equal_widths = True
        """Whether queries and values of every layer have the same width; what only SDPA can do without."""
        self._dense = SdpaBackend(dense_kernel)
        sparse: list[Backend] = [TritonBackend(), FlexBackend(), ReferenceBackend()]  # by preference
        self._sparse = {backend.name: backend for backend in sparse}
        self._override: PatternBase | None = None
        self._packed = False
        """Whether the latest batch was: what `describe` tells of dense layers."""
        self._calls: list[CoreCall] | None = None
        self._static_bindings: dict[tuple[PatternBase, int, torch.device], BoundPattern] = {}
        self._pairs: dict[tuple[PatternBase, SparseBackend, bool, int, int], PairCounts] = {}
        self.set_patterns([Dense()] * layers)

    @classmethod
    def install(
        cls, model: nn.Module, dense_kernel: DenseKernel = "auto", device: torch.device | None = None
    ) -> ModelAttention:
        """Take over the attention of a transformers model; every layer is dense at first.

        Args:
            model: A GPT-2, BERT, RoBERTa or Llama model, any head, not yet wrapped.
            dense_kernel: SDPA kernel of dense layers.
            device: Where the model will run, if it is not there yet.

        Raises:
            ConfigError: For other architectures, or if the model's configuration asks for what no kernel does.
        """
        from loras_bench.attention.huggingface import plug_in

        return plug_in(cls, model, dense_kernel, device)

    @staticmethod
    def of(model: nn.Module) -> ModelAttention:
        """The attention that was installed in the model, found under any wrapper."""
        found = next((m.model_attention for m in model.modules() if hasattr(m, "model_attention")), None)
        if not isinstance(found, ModelAttention):
            raise LookupError("ModelAttention.install was not called for this model")
        return found

    def take(self, layer: nn.Module) -> None:
        """Compute the core of this layer from now on."""
        layer.model_attention = self  # type: ignore[assignment]  # no module of torch's
        self.equal_widths = self.equal_widths and bool(getattr(layer, "equal_widths", True))

    def set_patterns(self, patterns: Sequence[PatternBase], backend: SparseBackend = "auto") -> None:
        """Give each layer its pattern.

        Args:
            patterns: One for each layer.
            backend: Who computes the layers that are not dense.

        Raises:
            ConfigError: If a pattern does not fit the model, or the backend the device.
        """
        for pattern in set(patterns):  # refuse now rather than in the first step
            pattern.check(self.causal)
            self._choose(pattern, backend, packed=False)
        self.patterns = list(patterns)
        self.backend = backend

    @contextmanager
    def override(self, pattern: PatternBase) -> Iterator[None]:
        """Use one pattern in all layers inside the `with` block: dense evaluation of a model trained sparsely."""
        pattern.check(self.causal)
        before, self._override = self._override, pattern
        try:
            yield
        finally:
            self._override = before

    @contextmanager
    def any_dense_kernel(self) -> Iterator[None]:
        """Inside the `with` block, dense layers take the fastest kernel for whatever comes, and none is recorded.

        For passes before training that are none of the run's own.
        """
        before, self._dense = self._dense, SdpaBackend()
        try:
            yield
        finally:
            self._dense = before

    @contextmanager
    def counting(self) -> Iterator[list[CoreCall]]:
        """Replace every attention core by an operation without arithmetic that logs what it would have computed."""
        if self._calls is not None:
            raise RuntimeError("counting is on already")
        calls: list[CoreCall] = []
        self._calls = calls
        try:
            yield calls
        finally:
            self._calls = None

    def batch(
        self,
        length: int,
        device: torch.device,
        padding_bs: Tensor | None = None,
        document_bs: Tensor | None = None,
        global_bs: Tensor | None = None,
        input_ids_bs: Tensor | None = None,
    ) -> AttentionBatch:
        """The facts of a batch, to which each layer's pattern is bound once. Masks are true at real (global) tokens.

        On the meta device there is no data to read: every sequence counts as one document of full length.
        """
        if padding_bs is not None and padding_bs.dim() != 2:
            raise UserError(
                "attention masks of more than two dimensions are not supported", "pass a (batch, length) mask"
            )
        sparse = [pattern for pattern in self.patterns if not isinstance(pattern, Dense)]
        if global_bs is not None and sparse and not any(isinstance(pattern, Longformer) for pattern in sparse):
            raise UserError("the batch marks global tokens, but no layer's pattern reads them", "use kind: longformer")
        if device.type == "meta":
            padding_bs = document_bs = global_bs = input_ids_bs = None
        return AttentionBatch(
            length=length,
            causal=self.causal,
            device=device,
            padding_bs=None if padding_bs is None else padding_bs.bool(),
            document_bs=document_bs,
            global_bs=None if global_bs is None else global_bs.bool(),
            input_ids_bs=input_ids_bs,
            static_bindings=self._static_bindings,
        )

    def attend(
        self, layer: int, q_bhsd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, batch: AttentionBatch, scale: float
    ) -> Tensor:
        """The attention core of one layer: out_bhsd from q, and k, v with g key heads (h a multiple of g)."""
        if q_bhsd.device.type not in (self.device.type, "meta"):
            raise UserError(
                f"attention was installed for {self.device.type}, but the model runs on {q_bhsd.device.type}",
                "move the model first, or name the device when installing",
            )
        if q_bhsd.shape[2] != k_bgsd.shape[2]:
            raise UserError("attention with a key/value cache is not supported", "pass use_cache=False")
        pattern = self._override or self.patterns[layer]
        bound = batch.bound(pattern)
        self._packed = batch.packed
        backend, _ = self._choose(pattern, self.backend, batch.packed)
        lse_bhs: Tensor | None
        if self._calls is None:
            out_bhsd, lse_bhs = backend.attend(q_bhsd, k_bgsd, v_bgsd, bound, scale)
        else:
            pairs = self._count(bound, len(q_bhsd))
            widths = q_bhsd.shape[3], v_bgsd.shape[3]
            call = CoreCall(layer, q_bhsd.shape[1], *widths, pairs, backend.backward_factor)
            self._calls.append(call)
            out_bhsd, lse_bhs = count_core(q_bhsd, k_bgsd, v_bgsd, call)
        if self.taps is not None:
            assert lse_bhs is not None
            self.taps.put_attention(layer, AttentionTap(q_bhsd, k_bgsd, lse_bhs, scale))
        return out_bhsd

    def pair_counts(self, lengths: Sequence[int], padded_length: int | None = None) -> list[PairCounts]:
        """Pairs of one head in each layer, summed over samples of these lengths padded on the right.

        Args:
            lengths: Real tokens of each sample.
            padded_length: Length of the batch; default the longest sample.
        """
        padded = padded_length or max(lengths)
        totals = []
        for layer_pattern in self.patterns:
            pattern = self._override or layer_pattern
            counts = [(self._count_row(pattern, length, padded), n) for length, n in Counter(lengths).items()]
            totals.append(
                PairCounts(
                    dense=sum(row.dense * n for row, n in counts),
                    allowed=sum(row.allowed * n for row, n in counts),
                    executed=sum(row.executed * n for row, n in counts),
                )
            )
        return totals

    def batch_pair_counts(self, batch: Mapping[str, Tensor]) -> list[PairCounts]:
        """Pairs of one head in each layer for one collated batch on the CPU; its documents decide."""
        ids_bs = batch["input_ids"]
        facts = self.batch(
            ids_bs.shape[1], ids_bs.device, batch.get("attention_mask"), batch.get("document_ids"), input_ids_bs=ids_bs
        )
        counted = {
            pattern: self._count(facts.bound(pattern), len(ids_bs))
            for pattern in {self._override or pattern for pattern in self.patterns}
        }
        return [counted[self._override or pattern] for pattern in self.patterns]

    def describe(self) -> dict[str, Any]:
        """What each layer does and why, for the record; dense kernels are known after the first step on CUDA."""
        layers = []
        for pattern in self.patterns:
            backend, reason = self._choose(pattern, self.backend, self._packed)
            layers.append({"pattern": pattern.model_dump(mode="json"), "backend": backend.name, "reason": reason})
        return {
            "causal": self.causal,
            "dense_kernel": self._dense.kernel,
            "dense_kernels_used": sorted(set(self._dense.kernels_used.values())),
            "layers": layers,
        }

    def _choose(self, pattern: PatternBase, requested: SparseBackend, packed: bool) -> tuple[Backend, str]:
        """The backend for a pattern, and why: SDPA for dense layers, the first that can train for the others.

        SDPA would need the whole n x n mask for packed documents: those are ours where Triton runs.
        """
        if isinstance(pattern, Dense) and self.taps is None:
            ours = self.equal_widths and self._sparse["triton"].refusal(pattern, self.device, self.head_dim) is None
            if not (packed and ours and self._dense.kernel == "auto"):
                if refusal := self._dense.refusal(pattern, self.device, self.head_dim):
                    raise ConfigError(f"dense_attention: {refusal}", "use dense_attention: auto")
                return self._dense, f"dense layers take SDPA ({self._dense.kernel})"
        if requested != "auto":
            backend = self._sparse[requested]
            if refusal := backend.refusal(pattern, self.device, self.head_dim):
                raise ConfigError(f"backend: {backend.name}: {refusal}", "use backend: auto")
            return backend, "asked for"
        refusals: list[str] = []
        for backend in self._sparse.values():
            if (refusal := backend.refusal(pattern, self.device, self.head_dim)) is None:
                return backend, "; ".join(refusals) or f"first choice on {self.device.type}"
            refusals.append(refusal)
        raise ConfigError(f"no backend computes {pattern.kind} on {self.device.type}: {'; '.join(refusals)}")

    def _count(self, bound: BoundPattern, batch_size: int) -> PairCounts:
        backend, _ = self._choose(bound.pattern, self.backend, bound.batch.packed)
        return PairCounts(
            dense=bound.dense_pairs(batch_size),
            allowed=bound.allowed_pairs(batch_size),
            executed=backend.executed_pairs(bound, batch_size, self.head_dim),
        )

    def _count_row(self, pattern: PatternBase, length: int, padded: int) -> PairCounts:
        """Pairs of one sample, remembered."""
        key = (pattern, self.backend, self.taps is None, length, padded)  # with the device they decide the kernel
        if key not in self._pairs:
            padding_bs = (torch.arange(padded) < length)[None] if length < padded else None
            batch = self.batch(padded, torch.device("cpu"), padding_bs)
            self._pairs[key] = self._count(batch.bound(pattern), 1)
        return self._pairs[key]
