"""Reading YAML: its scalars, its errors with line numbers and likely keys, and overrides through the same checks."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loras_bench.config_file import is_override, load_experiment, parse_yaml
from loras_bench.errors import ConfigError

EXPERIMENT = """\
name: lora_s
data:
  name: python-topics
  sequence_length: 64
model: {name: minilm-l6}
methods:
  - {kind: lora, rank: 16}
  - kind: sparse_attention
    pattern: {kind: window, window: 16}
training:
  tokens: 1000
  tokens_per_step: 128
  learning_rate: 1e-3
"""


@pytest.fixture
def load(tmp_path):
    """Write text to `x.yaml`, read it; errors name the file by its name alone."""

    def read(text, *overrides):
        path = tmp_path / "x.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            return load_experiment(path, overrides)
        except ConfigError as error:
            raise ConfigError(error.message.replace(f"{tmp_path}/", ""), error.hint) from None

    return read


def refused(load, text, *overrides):
    """The error's message and hint; each is one line."""
    with pytest.raises(ConfigError) as error:
        load(text, *overrides)
    assert "\n" not in error.value.message + (error.value.hint or "")
    return error.value.message, error.value.hint


# --- scalars


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("+1.5e+3", 1500.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("2_500_000", 2_500_000),
        ("1_000.5", 1000.5),
        ("010", 10),
        ("09", 9),
        ("0x1F", 31),
        ("-3", -3),
        ("-.inf", -math.inf),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("NO", "NO"),
        ("no", "no"),
        ("off", "off"),
        ("y", "y"),
        ("12:30", "12:30"),
        ("2026-01-01", "2026-01-01"),
        ("1.2.3", "1.2.3"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("'1e-4'", "1e-4"),
    ],
)
def test_plain_scalars_are_those_of_yaml_1_2(text, value):
    read, _ = parse_yaml(f"key: {text}", "x.yaml")
    assert read["key"] == value
    assert type(read["key"]) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_that_python_writes_is_read_back(number):
    assert parse_yaml(repr(number), "x")[0] == number


@given(st.integers(), st.booleans())
def test_every_integer_is_read_back(number, grouped):
    assert parse_yaml(f"{number:_}" if grouped else str(number), "x")[0] == number


# --- errors of YAML


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "x.yaml, line 1: not valid YAML: expected ',' or ']'"),
        ("a: 1\n\tb: 2", "x.yaml, line 2: not valid YAML: found character '\\t'"),
        ("a: !!python/object/apply:os.system [ls]", "x.yaml, line 1: not valid YAML: could not determine a constr"),
        ("a: !!int abc", "x.yaml: not valid YAML: invalid literal"),
        ("a: \0", "x.yaml: not valid YAML: unacceptable character #x0000"),
        ("a: &a [*a]", "x.yaml, line 1: not valid YAML: aliases such as *a are not read"),
        ("a: 1\n---\nb: 2", "x.yaml, line 2: not valid YAML: but found another document"),
        ("? {a: b}\n: 1", "x.yaml, line 1: not valid YAML: found unhashable key"),
        ("", "x.yaml: an experiment is a mapping"),
        ("- name: x", "x.yaml: an experiment is a mapping"),
        ("text", "x.yaml: an experiment is a mapping"),
    ],
)
def test_what_is_no_yaml_mapping_is_refused_with_its_line(load, text, message):
    assert refused(load, text)[0].startswith(message)


def test_a_duplicate_key_is_refused_with_both_lines(load):
    message, hint = refused(load, EXPERIMENT + "name: again\n")
    assert message == "x.yaml, line 14: key `name` was already given in line 1"
    assert hint == "keep one of the two"


def test_a_nested_duplicate_is_refused_and_equal_keys_of_siblings_are_not(load):
    message, _ = refused(load, EXPERIMENT.replace("tokens: 1000", "tokens: 1000\n  learning_rate: 2e-3"))
    assert message == "x.yaml, line 14: key `learning_rate` was already given in line 12"
    assert load(EXPERIMENT).data.name == "python-topics"  # `name` stands in two sections, `kind` in three


def test_a_missing_file_a_folder_and_other_bytes_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no such file: nowhere/x\.yaml"):
        load_experiment("nowhere/x.yaml")
    with pytest.raises(ConfigError, match=r"cannot read .*Is a directory"):
        load_experiment(tmp_path)
    (tmp_path / "x.yaml").write_bytes(b"name: \xff")
    with pytest.raises(ConfigError, match=r"cannot read .*utf-8"):
        load_experiment(tmp_path / "x.yaml")


# --- errors of the schema


def test_a_misspelt_key_is_told_with_its_line_and_the_likely_key(load):
    text = EXPERIMENT.replace("learning_rate", "leraning_rate")
    assert refused(load, text) == (
        "x.yaml: unknown key `leraning_rate` in training, line 13; did you mean `learning_rate`?",
        None,
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: lora_s", "nmae: lora_s", "unknown key `nmae` in the experiment, line 1; did you mean `name`?"),
        ("rank: 16", "rnak: 16", "unknown key `rnak` in methods.lora, line 7; did you mean `rank`?"),
        (
            "window: 16",
            "window: 16, global_tokns: 4",
            "unknown key `global_tokns` in methods.sparse_attention.pattern, line 9; did you mean `global_tokens`?",
        ),
        (
            "    pattern:",
            "    layers: {0: {kind: window, widow: 3}}\n    pattern:",
            "unknown key `widow` in methods.sparse_attention.layers.0, line 9; did you mean `window`?",
        ),
    ],
)
def test_unknown_keys_are_found_inside_lists_unions_and_mappings(load, old, new, message):
    assert refused(load, EXPERIMENT.replace(old, new)) == (f"x.yaml: {message}", None)


def test_an_unknown_key_that_is_close_to_none_gets_the_list_of_known_keys(load):
    message, hint = refused(load, EXPERIMENT.replace("rank: 16", "zzz: 16"))
    assert message == "x.yaml: unknown key `zzz` in methods.lora, line 7"
    assert hint is not None
    assert hint.startswith("known keys: alpha, dropout, kind, rank,")


def test_a_missing_key_is_told_with_the_line_of_its_section(load):
    message, _ = refused(load, EXPERIMENT.replace("  learning_rate: 1e-3\n", ""))
    assert message == "x.yaml: key `learning_rate` is missing in training, line 10"
    message, _ = refused(load, EXPERIMENT.replace("model: {name: minilm-l6}\n", ""))
    assert message == "x.yaml: key `model` is missing in the experiment, line 1"


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ("kind: lora", "kind: lroa", "line 7: unknown kind `lroa` in methods; did you mean `lora`?", None),
        (
            "kind: window",
            "kind: windo",
            "line 9: unknown kind `windo` in methods.sparse_attention; did you mean `window`?",
            None,
        ),
        (
            "kind: lora, ",
            "",
            "line 7: `methods.0` needs a `kind`",
            "known kinds: fold, lora, svd, prune, sparse_attention",
        ),
    ],
)
def test_unknown_and_missing_kinds(load, old, new, message, hint):
    told, told_hint = refused(load, EXPERIMENT.replace(old, new))
    assert told == f"x.yaml, {message}"
    assert (told_hint or "").startswith(hint or "")
    assert (told_hint is None) == (hint is None)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("1e-3", "-1", "line 13: `training.learning_rate`: Input should be greater than 0, not `-1`"),
        ("1e-3", ".inf", "line 13: `training.learning_rate`: Input should be a finite number, not `inf`"),
        ("1e-3", "fast", "line 13: `training.learning_rate`: Input should be a valid number"),
        ("tokens: 1000", "tokens: 12:30", "line 11: `training.tokens`: Input should be a valid integer"),
        ("rank: 16", "rank: 0", "line 7: `methods.lora.rank`: Input should be greater than or equal to 1, not `0`"),
        ("window: 16", "window: 0", "line 9: `methods.sparse_attention.pattern.window`: Input should be greater"),
        ("{name: minilm-l6}", "minilm-l6", "line 5: `model`: must be a mapping, not `minilm-l6`"),
        ("{kind: lora, rank: 16}", "lora", "line 7: `methods.0`: must be a mapping, not `lora`"),
        ("  tokens: 1000", "  tokens: 1000\n  epochs: 1", "line 10: `training`: give exactly one of `tokens` and"),
        ("model: {name: minilm-l6}", "model: {}", "line 5: `model`: give exactly one of `name`, `run` and"),
        ("name: lora_s", "name: a/b", "line 1: `name`: String should match pattern"),
    ],
)
def test_bad_values_are_told_with_key_line_and_value(load, old, new, message):
    assert refused(load, EXPERIMENT.replace(old, new))[0].startswith(f"x.yaml, {message}")


def test_a_number_as_a_key_is_refused(load):
    assert refused(load, EXPERIMENT + "1: 2\n")[0].startswith("x.yaml, line 14: `1`: Keys should be strings")


# --- overrides


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("training.learning_rate=3e-4", True),
        ("methods.0.rank=8", True),
        ("model.revision=", True),
        ("name=a=b", True),
        ("configs/lora.yaml", False),
        ("lora.yaml", False),
        ("./a=b.yaml", False),
        ("=x", False),
        ("0=x", False),
    ],
)
def test_what_is_an_override(word, expected):
    assert is_override(word) is expected


def test_a_file_with_an_equals_sign_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=3.yaml").touch()
    assert not is_override("lr=3.yaml")


def test_overrides_are_parsed_as_yaml_and_reach_every_level(load):
    experiment = load(
        EXPERIMENT,
        "training.learning_rate=3e-4",
        "methods.lora.rank=8",
        "methods.1.pattern={kind: window, window: 5}",
        "evaluation.splits=[validation]",
        "energy.steady_seconds=0",
        "name=NO",
        "model.revision=",
    )
    assert experiment.training.learning_rate == 3e-4
    assert experiment.methods[0].rank == 8
    assert experiment.methods[1].pattern.window == 5
    assert experiment.evaluation.splits == ("validation",)
    assert experiment.energy.steady_seconds == 0
    assert experiment.name == "NO"
    assert experiment.model.revision is None


def test_a_later_override_wins_and_items_are_named_by_index_or_kind(load):
    assert load(EXPERIMENT, "methods.lora.rank=8", "methods.0.rank=9").methods[0].rank == 9


def test_a_list_can_be_replaced_whole(load):
    assert load(EXPERIMENT, "methods=[]").methods == ()


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        (
            "training.leraning_rate=1",
            "unknown key `leraning_rate` in training; did you mean `learning_rate`?",
            None,
        ),
        ("trainin.tokens=5", "unknown key `trainin` in the experiment; did you mean `training`?", None),
        ("training.tokens=-5", "`training.tokens`: Input should be greater than 0, not `-5`", None),
        ("methods.dora.rank=8", "no item `dora` in the list", "items: `lora`, `sparse_attention`, `0`, `1`"),
        ("methods.2.rank=8", "no item `2` in the list", "items: `lora`, `sparse_attention`, `0`, `1`"),
        ("name.x=1", "`name` holds no keys", None),
        ("methods.lora.rank.x=1", "`methods.0.rank` holds no keys", None),
        ("training={}", "key `learning_rate` is missing in training", None),
        ("training.tokens=[1", "not valid YAML: expected ',' or ']', but got '<stream end>'", None),
        ("training.tokens={a: 1, a: 2}", "key `a` was already given in line 1", "keep one of the two"),
    ],
)
def test_a_wrong_override_is_named_with_the_file(load, override, message, hint):
    told, told_hint = refused(load, EXPERIMENT, override)
    assert told.startswith(f"x.yaml, override `{override}`")
    assert told.endswith(f": {message}")
    assert told_hint == hint


def test_an_override_of_an_item_of_an_empty_or_absent_list(load):
    message, hint = refused(load, "methods: []\n" + _without_methods(), "methods.lora.rank=8")
    assert (message, hint) == (
        "x.yaml, override `methods.lora.rank=8`: no item `lora` in the list",
        "the list is empty",
    )
    message, _ = refused(load, _without_methods(), "methods.lora.rank=8")
    assert message == "x.yaml, override `methods.lora.rank=8`: `methods`: must be a list"


def _without_methods():
    before, _, rest = EXPERIMENT.partition("methods:")
    return before + rest[rest.index("training:") :]


def test_an_error_of_the_file_beside_a_good_override_keeps_its_line(load):
    text = EXPERIMENT.replace("tokens: 1000", "tokns: 1000")
    message, _ = refused(load, text, "training.learning_rate=1e-4")
    assert message == "x.yaml: unknown key `tokns` in training, line 11; did you mean `tokens`?"
