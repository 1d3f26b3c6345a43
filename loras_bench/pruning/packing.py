"""Weights with zeros, stored packed: one bit for each place, and the values that are not zero.

Of two-of-four sparse weights a compressed form would keep two values of each group and two indices of two bits. Four
bits of the mask are no more, and keep less where a group has more than two zeros: one format does for both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from loras_bench.errors import UserError
from loras_bench.pruning.masks import pack_bits, unpack_bits

MASK, VALUES = ".mask", ".values"
SHAPES = "packed_shapes"
"""Key of the file's metadata: JSON, the shape of each packed tensor by name."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def stored(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """What a file holds of a model: each parameter and persistent buffer once, by the first of its names.

    Args:
        model: Its output layer may be tied to its embeddings.
        dtype: Of all floating-point tensors; default as they are.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach().to(dtype if tensor.is_floating_point() else None).contiguous()
    return found


def stored_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of tensors in a file, without its header."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def packed_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors in the file that `save_packed` writes, without its header."""
    return sum(min(tensor.numel() * tensor.element_size(), _packed_size(tensor)) for tensor in tensors.values())


def save_packed(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; a tensor with too few zeros to gain by it is kept as it is.

    Only what has no bit set counts as zero: -0.0 is kept as a value, so that every bit comes back.
    """
    packed: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        if _packed_size(tensor) >= tensor.numel() * tensor.element_size():
            packed[name] = tensor.detach().contiguous()
            continue
        mask = _bits(tensor) != 0
        packed[name + MASK], packed[name + VALUES] = pack_bits(mask), tensor.detach()[mask]
        shapes[name] = list(tensor.shape)
    save_file(packed, path, metadata={"format": "pt", SHAPES: json.dumps(shapes)})


def load_packed(path: Path | str) -> dict[str, Tensor]:
    """The tensors that `save_packed` was given, bit for bit.

    Raises:
        UserError: The file holds no packed weights.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}", "give a file that `loras-bench savings --out` wrote")
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if SHAPES not in metadata:
            raise UserError(f"{path} holds no packed weights", "give a file that `loras-bench savings --out` wrote")
        shapes = json.loads(metadata[SHAPES])
        names = [name for name in file.keys() if name.removesuffix(MASK).removesuffix(VALUES) not in shapes]  # noqa: SIM118
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
        for name, shape in shapes.items():
            bits, values = file.get_tensor(name + MASK), file.get_tensor(name + VALUES)
            flat = values.new_zeros(math.prod(shape))
            tensors[name] = flat.masked_scatter_(unpack_bits(bits, flat.shape), values).view(shape)
    return tensors


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])


def _packed_size(tensor: Tensor) -> int:
    return -(-tensor.numel() // 8) + int(_bits(tensor).count_nonzero()) * tensor.element_size()
