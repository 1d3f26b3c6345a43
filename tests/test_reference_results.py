"""The committed results are those of the committed configs: `make reference` on an H200 would skip them all."""

from pathlib import Path

import pytest

from loras_bench.config_file import load_experiment
from loras_bench.plan import plan_run, resolve
from loras_bench.requests import Device
from loras_bench.results.store import load_records

ROOT = Path(__file__).parents[1]
H200 = Device("cuda", "NVIDIA H200", triton=True)
ARMS = ("full", "full_s", "lora", "lora_s", "lora_s_7")
IMDB_ARMS = ("imdb/full", "imdb/lora", "imdb/lora_s")


@pytest.mark.parametrize("arm", [*ARMS, *IMDB_ARMS])
def test_every_reference_arm_is_finished_in_three_seeds(arm):
    experiment = resolve(load_experiment(ROOT / "configs" / f"{arm}.yaml"), H200)
    assert [plan_run(experiment, seed, ROOT / "results", H200).finished for seed in (0, 1, 2)] == [True] * 3


def test_reference_results_hold_no_other_arm_and_no_doubtful_run():
    records, problems = load_records([ROOT / "results"])
    assert problems == []
    assert {record.name for record in records} == {arm.replace("/", "_") for arm in (*ARMS, *IMDB_ARMS)}
    assert {flag.name for record in records for flag in record.flags} <= {"power_capped", "short_window"}
    assert all(record.energy_j_per_mtoken is not None for record in records)  # short ones have a steady phase
    assert all(record.implementation["cuda_graph"] for record in records)
    assert all(record.train_energy_source == "counter" and record.flops.incomplete == [] for record in records)


def test_the_chosen_learning_rates_are_the_best_of_the_search_on_validation():
    records, _ = load_records([ROOT / "benchmarks" / "learning_rates"])
    assert all(quality.split == "validation" for record in records for quality in record.quality)
    for arm in (*ARMS, *IMDB_ARMS):
        experiment = load_experiment(ROOT / "configs" / f"{arm}.yaml")
        tried = {
            record.config["training"]["learning_rate"]: record.quality[0].metrics
            for record in records
            if record.name == experiment.name
        }
        assert len(tried) >= 3
        best = min(tried, key=lambda rate: tried[rate].get("perplexity", -tried[rate].get("accuracy", 0.0)))
        assert experiment.training.learning_rate == best
