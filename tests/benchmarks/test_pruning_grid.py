"""benchmarks/pruning_grid.py: every experiment of every data set can be read, and differs in what it says it does."""

from __future__ import annotations

from pathlib import Path

import pytest
from pruning_grid import SETS, SPARSITIES, experiments, main

from loras_bench.catalog import DATASETS
from loras_bench.config_file import load_experiment
from loras_bench.methods.pruning import PruneConfig
from loras_bench.plan import plan_blocks
from loras_bench.requests import Device

SCORES = {"fpp", "wanda", "magnitude"}


@pytest.mark.parametrize("data", SETS)
def test_the_arms_of_a_set(data: str, tmp_path: Path) -> None:
    found = {made.name: made for made in experiments(data, SPARSITIES)}
    assert DATASETS[data].task == SETS[data][0]
    pruned = {(arm, share) for arm in (*SCORES, "fpp_units", "fpp_irc_dwc") for share in (20, 30, 40, 50, 60, 70)}
    others = {"full", "full_transformers", "fpp_two_of_four", "irc", "irc_dwc", "svd"} | (
        {"dwc"} if "classification" in SETS[data] else set()
    )
    assert set(found) == {f"{data}_{arm}_{share}" for arm, share in pruned} | {f"{data}_{arm}" for arm in others}
    for arm, share in pruned:
        (prune,) = [method for method in found[f"{data}_{arm}_{share}"].methods if isinstance(method, PruneConfig)]
        assert prune.sparsity == share / 100
        assert arm not in SCORES or prune.score == arm
    assert {made.data.name for made in found.values()} == {data}
    assert all(made.save for made in found.values()), "`savings` and `recall` read the weights"
    plain = found[f"{data}_full_transformers"]
    assert (plain.model.implementation, plain.methods) == ("transformers", ())
    alike = [
        made.model_dump(exclude={"name": True, "methods": True, "model": {"implementation"}}) for made in found.values()
    ]
    assert all(dump == alike[0] for dump in alike)
    assert {made.model.implementation for made in found.values() if made != plain} == {"auto"}
    (block,) = plan_blocks([*found.values()], [0], tmp_path, Device("cuda", "A GPU", triton=True))
    assert len({run.run_id for run in block}) == len(found)


def test_what_is_written_is_what_was_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trec", "warandpeace", "--sparsity", "0.2,0.7", "--arms", "fpp,irc_dwc", "--out", str(tmp_path)]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        f"{data}/{arm}.yaml" for data in ("trec", "warandpeace") for arm in ("fpp_20", "fpp_70", "irc_dwc")
    ]
    meant = [made for data in ("trec", "warandpeace") for made in experiments(data, (0.2, 0.7), ("fpp", "irc_dwc"))]
    assert [load_experiment(path) for path in paths] == meant


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trec", "--arms", "fppp"], "no arm `fppp`"),
        (["trec", "--sparsity", "1.0"], "less than 1"),
        (["trec", "mr", "--sparsity", "0.5,1.0"], "less than 1"),
        (["trec", "--sparsity", "half"], "error: --sparsity `half` is not a list of numbers\nhint: write"),
        (["trec", "--sparsity", "0.2,0.4,0.2"], "a sparsity of 20 % is given twice"),
    ],
)
def test_wrong_words_are_named(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir()), "all or nothing is written"


def test_near_sparsities_have_files_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trec", "--sparsity", "0.29,0.333,0.334", "--arms", "fpp,fpp", "--out", str(tmp_path)]) == 0
    names = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    assert names == ["fpp_29.yaml", "fpp_33.3.yaml", "fpp_33.4.yaml"]


def test_a_file_in_the_place_of_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["trec", "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.endswith("is a file\nhint: give a folder\n")
