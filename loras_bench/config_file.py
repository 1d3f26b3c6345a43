"""Reading an experiment: YAML with line marks, `key=value` overrides, and errors that name the line and the likely
key.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from loras_bench.config import Experiment
from loras_bench.errors import ConfigError

KeyPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: `1e-4` is a float, `NO` and `12:30` are text; everything else as in SafeLoader."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^$"), [""])


class _Source:
    """Where each key came from: line numbers of a file, or the text of an override."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.places: dict[KeyPath, str] = {}

    def place(self, location: KeyPath) -> str:
        """The place of the innermost known part of a key path."""
        for end in range(len(location), -1, -1):
            if location[:end] in self.places:
                return self.places[location[:end]]
        return self.path


def _walk(node: yaml.Node, location: KeyPath, source: _Source) -> None:
    """Record the line of every key and refuse duplicates."""
    source.places[location] = f"{source.path}, line {node.start_mark.line + 1}"
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*location, index), source)
    elif isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = str(key_node.value)
            line = key_node.start_mark.line + 1
            if (*location, key) in source.places:
                first = source.places[(*location, key)].rsplit(" ", 1)[-1]
                raise ConfigError(
                    f"{source.path}, line {line}: key `{key}` was already given in line {first}", "keep one of the two"
                )
            _walk(value_node, (*location, key), source)
            source.places[(*location, key)] = f"{source.path}, line {line}"


def parse_yaml(text: str, path: str) -> tuple[Any, _Source]:
    """Parse YAML text into plain Python values and the places of their keys.

    Raises:
        ConfigError: The text is not YAML, uses a tag, or gives a key twice.
    """
    source = _Source(path)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, source
        _walk(node, (), source)
        return loader.construct_document(node), source
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    finally:
        loader.dispose()


def is_override(argument: str) -> bool:
    """Whether a command-line word is `key=value` and not a path."""
    return re.match(r"^[A-Za-z_][\w.-]*=", argument) is not None and not Path(argument).exists()


def _apply_override(content: Any, override: str, source: _Source) -> None:
    """Set one dotted key in place; list items are named by index or, for methods, by kind."""
    dotted, _, value_text = override.partition("=")
    value, _ = parse_yaml(value_text, f"override `{override}`")
    place = f"override `{override}`"
    target, location = content, ()  # type: tuple[Any, KeyPath]
    keys: list[str | int] = list(dotted.split("."))
    for position, key in enumerate(keys):
        if isinstance(target, list):
            key = _list_index(target, str(key), place)
        elif not isinstance(target, dict):
            raise ConfigError(f"{place}: `{'.'.join(map(str, location))}` holds no keys")
        location = (*location, key)
        if position == len(keys) - 1:
            target[key] = value
        elif isinstance(target, dict):
            if target.get(key) is None:
                target[key] = {}
            target = target[key]
        else:
            target = target[typing.cast(int, key)]
    source.places[location] = place


def _list_index(items: list[Any], key: str, place: str) -> int:
    kinds = [item.get("kind") if isinstance(item, dict) else None for item in items]
    if key in kinds:
        return kinds.index(key)
    if key.isdigit() and int(key) < len(items):
        return int(key)
    choices = ", ".join(f"`{kind}`" for kind in kinds if kind) or "none"
    raise ConfigError(
        f"{place}: no item `{key}` in the list", f"items there: {choices}; or an index below {len(items)}"
    )


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read one YAML file, apply `key=value` overrides and validate the result.

    Raises:
        ConfigError: With the file, the line, and a hint where one can be given.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"no such file: {path}", "give the path of an experiment, such as configs/lora.yaml"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    content, source = parse_yaml(text, str(path))
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: an experiment is a mapping with `name`, `data`, `model` and `training`", "see configs/lora.yaml"
        )
    for override in overrides:
        _apply_override(content, override, source)
    return validate_experiment(content, source)


def validate_experiment(content: dict[str, Any], source: _Source) -> Experiment:
    """Turn plain values into an `Experiment`, translating pydantic's errors into ours."""
    try:
        return Experiment.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise ConfigError(*_explain(first, content, source, more)) from None


def _explain(error: Any, content: Any, source: _Source, more: str) -> tuple[str, str | None]:
    location = _locate(error["loc"], content)
    place, key = source.place(location), location[-1] if location else ""
    parent = ".".join(str(part) for part in location[:-1]) or "the experiment"
    if error["type"] == "extra_forbidden":
        known = sorted(_keys_at(Experiment, location[:-1], content))
        close = difflib.get_close_matches(str(key), known, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key `{key}` in {parent}, {place}{more}", hint
    if error["type"] == "missing":
        return f"key `{key}` is missing in {parent}, {place}{more}", None
    if error["type"] == "union_tag_not_found":
        return (
            f"{place}: `{'.'.join(map(str, location))}` needs a `kind`{more}",
            f"one of {error['ctx']['discriminator']}",
        )
    if error["type"] == "union_tag_invalid":
        tags = re.findall(r"'([^']+)'", error["ctx"]["expected_tags"])
        close = difflib.get_close_matches(str(error["ctx"]["tag"]), tags, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"known kinds: {', '.join(tags)}"
        return f"{place}: unknown kind `{error['ctx']['tag']}`{more}", hint
    message = error["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(error["input"], dict) else f", not `{error['input']}`"
    name = ".".join(str(part) for part in location)
    return f"{place}: {f'`{name}`: ' if name else ''}{message}{shown}{more}", None


def _locate(loc: Iterable[str | int], content: Any) -> KeyPath:
    """Drop the union tags that pydantic puts into locations: keep what leads through the content."""
    path: list[str | int] = []
    parts = list(loc)
    for index, part in enumerate(parts):
        if isinstance(content, dict) and isinstance(part, str):
            if part not in content and content.get("kind") == part and index < len(parts) - 1:
                continue
            path.append(part)
            content = content.get(part)
        elif isinstance(content, (list, tuple)) and isinstance(part, int) and part < len(content):
            path.append(part)
            content = content[part]
    return tuple(path)


def _models_of(annotation: Any) -> list[type[BaseModel]]:
    """Every pydantic model that an annotation may hold, inside unions, tuples, dicts and Annotated."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for part in typing.get_args(annotation) for model in _models_of(part)]


def _keys_at(model: type[BaseModel], location: KeyPath, content: Any) -> set[str]:
    """The keys that the schema knows at a location."""
    candidates = [model]
    for part in location:
        content = content[part]
        if isinstance(part, str):
            fields = [candidate.model_fields[part] for candidate in candidates if part in candidate.model_fields]
            if fields:
                candidates = [found for field in fields for found in _models_of(field.annotation)]
        kind = content.get("kind") if isinstance(content, dict) else None
        tagged = (
            [c for c in candidates if kind and kind in typing.get_args(c.model_fields["kind"].annotation)]
            if kind
            else []
        )
        candidates = tagged or candidates
    return {name for candidate in candidates for name in candidate.model_fields}
