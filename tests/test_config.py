"""The schema: what an experiment may hold, and what its hash depends on."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from loras_bench.config import Experiment, ModelConfig, PretrainConfig, TrainingConfig, canonical_hash
from loras_bench.methods import METHODS

LM = {"tokens": 1000, "tokens_per_step": 100, "learning_rate": 1e-3}
SMALLEST = {
    "name": "x",
    "data": {"name": "python-topics", "sequence_length": 64},
    "model": {"name": "minilm-l6"},
    "training": LM,
}


def test_the_smallest_experiment_is_full_fine_tuning_on_the_test_set():
    experiment = Experiment.model_validate(SMALLEST)
    assert experiment.methods == ()
    assert experiment.evaluation.splits == ("test",)
    assert experiment.evaluation.attention == ("same",)
    assert experiment.pretrain is None


@pytest.mark.parametrize("name", ["a/b", "../up", "", ".hidden", "a b", "-x"])
def test_a_name_that_is_no_plain_folder_is_refused(name):
    with pytest.raises(ValidationError, match="name"):
        Experiment.model_validate(SMALLEST | {"name": name})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 1000, "epochs": 1.0}, "exactly one of `tokens` and `epochs`"),
        ({"tokens": None}, "exactly one of `tokens` and `epochs`"),
        ({"batch_size": 8}, "exactly one of `tokens_per_step`"),
        ({"tokens_per_step": None}, "exactly one of `tokens_per_step`"),
        ({"learning_rate": 0}, "greater than 0"),
        ({"learning_rate": float("inf")}, "finite"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"warmup_fraction": 1.0}, "less than 1"),
        ({"tokens": 1.5}, "integer"),
    ],
)
def test_impossible_training_is_refused(change, message):
    with pytest.raises(ValidationError, match=message):
        TrainingConfig.model_validate(LM | change)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "exactly one of `name`, `run` and `init: scratch`"),
        ({"name": "a", "run": "b"}, "exactly one of"),
        ({"name": "a", "init": "scratch", "architecture": {"model_type": "gpt2"}}, "exactly one of"),
        ({"init": "scratch"}, "needs `architecture`"),
        ({"name": "a", "architecture": {"model_type": "gpt2"}}, "go with `init: scratch` only"),
        ({"name": "a", "dtype": "float16"}, "'float32' or 'bfloat16'"),
    ],
)
def test_a_model_has_one_origin(section, message):
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate(section)


def test_pretraining_goes_with_models_from_scratch_only():
    pretrain = PretrainConfig.model_validate({"data": SMALLEST["data"], "training": LM})
    with pytest.raises(ValidationError, match="`pretrain` goes with"):
        Experiment.model_validate(SMALLEST | {"pretrain": pretrain})


def test_every_section_refuses_unknown_keys():
    schema = Experiment.model_json_schema()
    objects = [schema, *(part for part in schema["$defs"].values() if part["type"] == "object")]
    assert len(objects) > 10
    assert [part.get("title") for part in objects if part.get("additionalProperties") is not False] == []


def test_the_schema_explains_its_keys_and_knows_every_method():
    schema = Experiment.model_json_schema()
    assert "passes over the training set" in schema["$defs"]["TrainingConfig"]["properties"]["epochs"]["description"]
    kinds = {
        kind
        for part in schema["$defs"].values()
        if "kind" in part.get("properties", {})
        for kind in [part["properties"]["kind"].get("const")]
    }
    assert set(METHODS) <= kinds


def test_an_experiment_survives_its_own_json():
    experiment = Experiment.model_validate(SMALLEST | {"methods": [{"kind": "lora", "rank": 4}]})
    assert Experiment.model_validate(json.loads(experiment.model_dump_json())) == experiment


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), values, min_size=2))
def test_the_hash_ignores_the_order_of_keys(content):
    backwards = dict(reversed(content.items()))
    assert canonical_hash(content) == canonical_hash(backwards)
    assert len(canonical_hash(content)) == 10


def test_the_hash_is_sha256_of_canonical_json():
    # printf '{"a":1,"b":[true,null]}' | sha256sum
    assert canonical_hash({"b": [True, None], "a": 1}) == "1cc69c7fa2"


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_of_methods_are_finite(value):
    from loras_bench.methods.lora import LoraConfig

    with pytest.raises(ValidationError):
        LoraConfig(kind="lora", alpha=value)
