"""What the kernel benchmark is asked to measure: shapes and patterns in short words. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from loras_bench.attention.banded import Banded
from loras_bench.attention.patterns import Dense, Pattern, PatternBase
from loras_bench.config_file import parse_yaml
from loras_bench.errors import ConfigError, UserError

SIZES = re.compile(r"(\d+)x(\d+)(?:/(\d+))?x(\d+)x(\d+)")
NUMBERS = re.compile(r"(\d+)(?:\+(\d+))?")
FIRST_FIELD = {"strided": "stride", "fixed": "stride", "block_local": "block", "bigbird": "block"}
"""What a bare number means; for patterns with a band it is the window, or the half width of bidirectional ones."""


@dataclass(frozen=True)
class Shape:
    """Sizes of q, k and v: (batch, heads or key heads, length, head dim)."""

    batch: int
    heads: int
    key_heads: int
    length: int
    head_dim: int

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.key_heads else f"{self.heads}/{self.key_heads}"
        return f"{self.batch}x{heads}x{self.length}x{self.head_dim}"


@dataclass(frozen=True)
class Case:
    """One pattern at one shape: all backends are measured on it with the same inputs."""

    shape: Shape
    pattern: PatternBase
    causal: bool

    @property
    def pattern_text(self) -> str:
        """The pattern for people: `window: window 512, global_tokens 64, causal`."""
        fields = self.pattern.model_dump(exclude={"kind"}, exclude_defaults=True).items()
        direction = "causal" if self.causal else "bidirectional"
        return f"{self.pattern.kind}: {', '.join([*(f'{name} {value}' for name, value in fields), direction])}"

    @property
    def baseline(self) -> Case:
        """Dense attention in the same direction, at the same shape."""
        return Case(self.shape, Dense(), self.causal)

    def allowed_pairs(self) -> int:
        """Query-key pairs of one head that the pattern allows, summed over the samples."""
        return self.shape.batch * self.pattern.count_pairs(self.shape.length, self.causal)


def read_cases(shapes: Sequence[str], patterns: Sequence[str]) -> list[Case]:
    """Every pattern at every shape; each option may hold several, separated by blanks.

    Raises:
        UserError: A shape or a pattern cannot be read, or the pattern does not go with its direction.
    """
    sizes = [read_shape(word) for text in shapes for word in text.split()]
    words = [word for text in patterns for word in ([text] if text.lstrip().startswith("{") else text.split())]
    if not sizes or not words:
        raise UserError("nothing to measure", "give at least one shape and one pattern")
    return [Case(shape, *read_pattern(word)) for shape in sizes for word in words]


def read_shape(text: str) -> Shape:
    """`4x9/3x8192x64` -> batch 4, 9 heads, 3 key heads, length 8192, head dim 64.

    Raises:
        UserError: It is written otherwise, a size is 0, or the key heads do not divide the heads.
    """
    found = SIZES.fullmatch(text)
    hint = "write batch x heads x length x head dim: 2x16x8192x64, or 4x9/3x8192x64 for 3 key heads"
    if found is None:
        raise UserError(f"--shapes `{text}` is no shape", hint)
    batch, heads, key_heads, length, head_dim = (int(group or found[2]) for group in found.groups())
    if not min(batch, heads, key_heads, length, head_dim):
        raise UserError(f"--shapes `{text}`: a size is 0", hint)
    if heads % key_heads:
        raise UserError(f"--shapes `{text}`: {key_heads} key heads do not divide {heads} heads", hint)
    return Shape(batch, heads, key_heads, length, head_dim)


def read_pattern(text: str) -> tuple[PatternBase, bool]:
    """A pattern and whether it is causal, from `kind[:[number[+globals]][,key=value...][,bidirectional]]` or YAML.

    `window:512+64` is a window of 512 keys with 64 global ones; `window:256,bidirectional` sees 256 keys on each side;
    `{kind: bigbird, block: 128, causal: false}` is YAML or JSON in one line.

    Raises:
        UserError: It cannot be read, or is no pattern.
    """
    hint = "write window:512+64, bigbird:64,random_blocks=2, dense,bidirectional or {kind: strided, stride: 128}"
    try:
        fields = parse_yaml(text, "YAML")[0] if text.lstrip().startswith("{") else _fields_of(text)
        causal = fields.pop("causal", "half_width" not in fields)
        if not isinstance(causal, bool):
            raise ValueError(f"`causal` is true or false, not {causal!r}")
        pattern: PatternBase = TypeAdapter(Pattern).validate_python(fields)
        pattern.check(causal)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        raise UserError(f"--patterns `{text}`: {where + ': ' if where else ''}{first['msg']}", hint) from None
    except ConfigError as error:
        raise UserError(f"--patterns `{text}`: {error.message}", error.hint or hint) from None
    except ValueError as error:
        raise UserError(f"--patterns `{text}` cannot be read: {error}", hint) from None
    return pattern, causal


def _fields_of(text: str) -> dict[str, Any]:
    """The fields of a pattern that is written in the short form."""
    kind, *words = re.split("[:,]", text)
    banded = kind in {model.__name__.lower() for model in Banded.__subclasses__()}
    width = "half_width" if "bidirectional" in words else "window"
    given: list[tuple[str, Any]] = []
    for word in words:
        name, equals, value = word.partition("=")
        numbers = NUMBERS.fullmatch(word)
        if equals:
            given.append((name, parse_yaml(value, word)[0]))
        elif numbers:
            given.append((width if banded else FIRST_FIELD.get(kind, "window"), int(numbers[1])))
            if numbers[2]:
                given.append(("global_tokens", int(numbers[2])))
        elif word == "bidirectional":
            given.append(("causal", False))
        else:
            raise ValueError(f"`{word}` is neither a number nor key=value")
    fields: dict[str, Any] = {"kind": kind}
    for name, value in given:
        if name in fields:
            raise ValueError(f"`{name}` is given twice")
        fields[name] = value
    return fields
