"""Settings by layer: a layer (`"3"`) or a range with both ends (`"0-1"`), counted from 0, and what holds there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from loras_bench.errors import ConfigError

V = TypeVar("V")


def text_keys(layers: object) -> object:
    """For a pydantic validator: YAML reads `3:` as a number."""
    return {str(key): value for key, value in layers.items()} if isinstance(layers, Mapping) else layers


def by_layer(method: str, layers: Mapping[str, V], layer_count: int) -> dict[int, V]:
    """What is set for each layer that a key names.

    Args:
        method: Whose setting it is, for messages.
        layers: By layer or range.
        layer_count: Layers of the model.

    Raises:
        ConfigError: If a key is no range, lies outside the model, or overlaps another.
    """
    found: dict[int, V] = {}
    named_by: dict[int, str] = {}
    for key, value in layers.items():
        for layer in _layer_range(method, key, layer_count):
            if layer in named_by:
                raise ConfigError(
                    f"{method}: layer {layer} is named by `{named_by[layer]}` and by `{key}`", "name each layer once"
                )
            named_by[layer], found[layer] = key, value
    return found


def _layer_range(method: str, key: str, layer_count: int) -> range:
    first, _, last = key.partition("-")
    if not (first.isdecimal() and (last or first).isdecimal()) or int(first) > int(last or first):
        raise ConfigError(f"{method}: `{key}` in `layers` names no layers", 'write a layer ("3") or a range ("0-1")')
    if int(last or first) >= layer_count:
        raise ConfigError(
            f"{method}: `{key}` in `layers` lies outside the model, which has {layer_count} layers",
            f"layers are counted from 0 to {layer_count - 1}",
        )
    return range(int(first), int(last or first) + 1)
