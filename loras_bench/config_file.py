"""Reading an experiment: YAML with line marks, `key=value` overrides, and errors that name the line and the likely
key.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ValidationError

from loras_bench.config import Experiment
from loras_bench.errors import ConfigError, did_you_mean

KeyPath = tuple[str | int, ...]
_SHAPES = {
    "tuple_type": "must be a list",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
}
"""What pydantic says in Python's words, in YAML's."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: `1e-4` is a float, `NO` and `12:30` are text; no aliases; else as in SafeLoader."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """An alias may contain itself, or grow without end; a value written out reads as well."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"aliases such as *{event.anchor} are not read; write the value out", event.start_mark
            )
        return super().compose_node(parent, index)  # type: ignore[no-any-return]

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """`010` is ten; YAML 1.1 reads it as an octal number."""
        text = self.construct_scalar(node).replace("_", "")
        return int(text, 16 if text.startswith("0x") else 10)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
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


class Place(NamedTuple):
    """Where a value was written: a line of a file, or an override of it."""

    origin: str
    line: int | None

    def __str__(self) -> str:
        return f"{self.origin}{self.on_line}"

    @property
    def on_line(self) -> str:
        return f", line {self.line}" if self.line else ""


class Source:
    """Where each key of an experiment came from."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.places: dict[KeyPath, Place] = {}

    def place(self, location: KeyPath) -> Place:
        """The place of the innermost known part of a key path."""
        inner_first = (location[:end] for end in range(len(location), -1, -1))
        return next((self.places[part] for part in inner_first if part in self.places), Place(self.path, None))

    def replace(self, location: KeyPath, place: Place) -> None:
        """A key and all under it were written anew."""
        self.places = {key: old for key, old in self.places.items() if key[: len(location)] != location}
        self.places[location] = place


def _walk(node: yaml.Node, location: KeyPath, source: Source) -> None:
    """Record the line of every key and refuse duplicates."""
    source.places.setdefault(location, Place(source.path, node.start_mark.line + 1))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*location, index), source)
    elif isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = (*location, str(key_node.value))
            line = key_node.start_mark.line + 1
            if key in source.places:
                raise ConfigError(
                    f"{source.path}, line {line}: key `{key[-1]}` was already given in line {source.places[key].line}",
                    "keep one of the two",
                )
            source.places[key] = Place(source.path, line)
            _walk(value_node, key, source)


def parse_yaml(text: str, path: str) -> tuple[Any, Source]:
    """Parse YAML text into plain Python values and the places of their keys.

    Raises:
        ConfigError: The text is not YAML, uses an alias or a tag, or gives a key twice.
    """
    source = Source(path)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, source
        _walk(node, (), source)
        return loader.construct_document(node), source
    except (yaml.YAMLError, ValueError) as error:  # a ValueError is `!!int x`
        mark = getattr(error, "problem_mark", None)
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise ConfigError(f"{Place(path, mark.line + 1 if mark else None)}: not valid YAML: {problem}") from None


def is_override(argument: str) -> bool:
    """Whether a command-line word is `key=value` and not a path."""
    return re.match(r"^[A-Za-z_][\w.-]*=", argument) is not None and not Path(argument).exists()


def _apply_override(content: Any, override: str, source: Source) -> None:
    """Set one dotted key in place; list items are named by index or, for methods, by kind."""
    dotted, _, value_text = override.partition("=")
    place = Place(f"{source.path}, override `{override}`", None)
    value, _ = parse_yaml(value_text, str(place))
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
            source.replace(location, place)
        else:
            if isinstance(target, dict) and target.get(key) is None:
                target[key] = {}
                source.replace(location, place)
            target = target[key]


def _list_index(items: list[Any], key: str, place: Place) -> int:
    kinds = [item.get("kind") if isinstance(item, dict) else None for item in items]
    if key in kinds:
        return kinds.index(key)
    if key.isdecimal() and int(key) < len(items):
        return int(key)
    choices = ", ".join(f"`{name}`" for name in (*filter(None, kinds), *range(len(items))))
    raise ConfigError(f"{place}: no item `{key}` in the list", f"items: {choices}" if items else "the list is empty")


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
    try:
        return Experiment.model_validate(content)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # A misspelt key is two errors, an unknown key and a missing one: the first says what to do.
        first = min(errors, key=lambda item: item["type"] != "extra_forbidden")
        raise ConfigError(*_explain(first, content, source)) from None


def _explain(error: Any, content: Any, source: Source) -> tuple[str, str | None]:
    """One of pydantic's errors in our words: the message and the hint."""
    location = _locate(error["loc"], content)
    place, key = source.place(location), location[-1] if location else ""
    name, parent = _name(location, content), _name(location[:-1], content) or "the experiment"
    match error["type"]:
        case "extra_forbidden":
            known = {field for model in _models_at(location[:-1], content) for field in model.model_fields}
            guess, hint = _closest(str(key), known, "known keys")
            return f"{place.origin}: unknown key `{key}` in {parent}{place.on_line}{guess}", hint
        case "missing":
            return f"{place.origin}: key `{key}` is missing in {parent}{place.on_line}", None
        case "union_tag_not_found":
            return f"{place}: `{name}` needs a `kind`", f"known kinds: {', '.join(_kinds_at(location, content))}"
        case "union_tag_invalid":
            guess, hint = _closest(str(error["ctx"]["tag"]), _kinds_at(location, content), "known kinds")
            return f"{place}: unknown kind `{error['ctx']['tag']}` in {parent}{guess}", hint
    message = _SHAPES.get(error["type"]) or error["msg"].removeprefix("Value error, ")
    given = error["input"]
    shown = "" if isinstance(given, dict | list) else f", not `{given}`"
    return f"{place}: {f'`{name}`: ' if name else ''}{message}{shown}", None


def _closest(word: str, known: Iterable[str], what: str) -> tuple[str, str | None]:
    """The end of the message if a known word is close, else a hint that lists them all."""
    names = sorted(known)
    guess = did_you_mean(word, names)
    return guess, None if guess else f"{what}: {', '.join(names)}"


def _child(content: Any, part: str | int) -> Any:
    """What a key or index leads to; a key of YAML may be a number where the location has its text."""
    if isinstance(content, dict):
        return next((value for key, value in content.items() if str(key) == str(part)), None)
    return content[part] if isinstance(content, list) and isinstance(part, int) and part < len(content) else None


def _locate(loc: Sequence[str | int], content: Any) -> KeyPath:
    """Keep what leads through the content of a location of pydantic's, which names the members of unions too."""
    path: list[str | int] = []
    parts = list(loc)
    while parts:
        if isinstance(content, dict) and "kind" in content and parts[0] == content["kind"]:
            del parts[0]  # chosen by its kind; a key of the same name would come after it
            if not parts:
                break
        if not isinstance(content, dict | list):
            break
        part = parts.pop(0)
        path.append(str(part) if isinstance(content, dict) else part)
        content = _child(content, path[-1])
    return tuple(path)


def _name(location: KeyPath, content: Any) -> str:
    """A dotted key as an override writes it: items of a list by kind where they have one."""
    names = []
    for part in location:
        content = _child(content, part)
        kind = content.get("kind") if isinstance(part, int) and isinstance(content, dict) else None
        names.append(str(kind or part))
    return ".".join(names)


def _models_of(annotation: Any) -> list[type[BaseModel]]:
    """Every pydantic model that an annotation may hold, inside unions, tuples, dicts and Annotated."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for part in typing.get_args(annotation) for model in _models_of(part)]


def _models_at(location: KeyPath, content: Any) -> list[type[BaseModel]]:
    """The models that the schema allows at a location; where the content names a known kind, those of this kind."""
    models: list[type[BaseModel]] = [Experiment]
    for part in location:
        content = _child(content, part)
        fields = [model.model_fields[part] for model in models if isinstance(part, str) and part in model.model_fields]
        if fields:
            models = [found for field in fields for found in _models_of(field.annotation)]
        kind = content.get("kind") if isinstance(content, dict) else None
        models = [model for model in models if kind in _kinds(model)] or models
    return models


def _kinds(model: type[BaseModel]) -> tuple[str, ...]:
    return typing.get_args(model.model_fields["kind"].annotation) if "kind" in model.model_fields else ()


def _kinds_at(location: KeyPath, content: Any) -> list[str]:
    return [kind for model in _models_at(location, content) for kind in _kinds(model)]
