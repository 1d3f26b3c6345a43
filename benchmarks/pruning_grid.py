"""Writes the experiments of pruning and folding on one data set, from the arms of configs/pruning.

    python benchmarks/pruning_grid.py trec --sparsity 0.2,0.4,0.7 --out grid
    loras-bench run grid/trec/*.yaml --seeds 0,1,2 --results grid-results

An arm whose sparsity can be chosen becomes one for each sparsity. All arms of a data set go into one command: ratios
are taken within its blocks. Every run keeps its weights, which `loras-bench savings` and `recall` read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from loras_bench.config import Experiment
from loras_bench.config_file import load_experiment
from loras_bench.errors import UserError
from loras_bench.files import check_folder

CONFIGS = Path(__file__).parents[1] / "configs" / "pruning"
SPARSITIES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
SHORT = {"data.validation_rows": 500}
"""Sets without a validation split of their own, of sentences."""
SETS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "wikitext-2": ("language_modeling", {}),
    "warandpeace": ("language_modeling", {"training.tokens": 1_700_000}),
    "wiki-longdocs": ("language_modeling", {"data.sequence_length": 8192}),
    "sst2": ("classification", {}),
    "imdb": ("classification", {"data.validation_rows": 2000, "data.sequence_length": 512}),
    "mr": ("classification", SHORT | {"training.epochs": 3}),
    "subj": ("classification", SHORT | {"training.epochs": 3}),
    "cr": ("classification", SHORT | {"training.epochs": 5}),
    "mpqa": ("classification", SHORT | {"training.epochs": 3}),
    "trec": ("classification", SHORT | {"training.epochs": 5}),
    "ag_news": ("classification", SHORT | {"training.epochs": 2, "data.sequence_length": 256}),
}
"""The arms of each set, and what differs from the files: the small sets are passed over several times."""


def experiments(data: str, sparsities: Sequence[float], arms: Sequence[str] | None = None) -> Iterator[Experiment]:
    """The arms of a data set, by file and sparsity.

    Raises:
        UserError: There is no such set or arm, or a sparsity is named twice.
        ConfigError: A sparsity is none.
    """
    if data not in SETS:
        raise UserError(f"no arms are known for `{data}`", f"known sets: {', '.join(SETS)}")
    folder, differences = SETS[data]
    files = {file.stem: file for file in sorted((CONFIGS / folder).glob("*.yaml"))}
    if unknown := [arm for arm in arms or () if arm not in files]:
        raise UserError(f"no arm `{unknown[0]}` in {CONFIGS / folder}", f"known arms: {', '.join(files)}")
    shares = [f"{100 * sparsity:g}" for sparsity in sparsities]
    if twice := next((share for share in shares if shares.count(share) > 1), None):
        raise UserError(f"a sparsity of {twice} % is given twice", "name each once")
    common = [f"{key}={value}" for key, value in differences.items()]
    for arm in arms or files:
        chosen = [f"data.name={data}", f"name={data}_{arm}", *common]
        found = load_experiment(files[arm], chosen)
        if any(method.kind == "prune" and method.pattern != "2:4" for method in found.methods):
            for sparsity, share in zip(sparsities, shares, strict=True):
                varied = [f"methods.prune.sparsity={sparsity}", f"name={data}_{arm}_{share}"]
                yield load_experiment(files[arm], [*chosen, *varied])
        else:
            yield found


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", nargs="+", choices=SETS)
    parser.add_argument("--sparsity", default=",".join(map(str, SPARSITIES)), help="comma-separated shares of zeros")
    parser.add_argument("--arms", help="comma-separated names of files; default all")
    parser.add_argument("--out", type=Path, default=Path("pruning-grid"), help="folder; one in it for each data set")
    given = parser.parse_args(words)
    try:
        check_folder(given.out, "--out")
        sparsities, arms = _numbers(given.sparsity), given.arms and list(dict.fromkeys(given.arms.split(",")))
        found = {data: list(experiments(data, sparsities, arms)) for data in given.data}  # all, before any is written
    except UserError as error:
        print(f"error: {error.message}", *([f"hint: {error.hint}"] if error.hint else []), sep="\n", file=sys.stderr)
        return 2
    for data, made in found.items():
        (given.out / data).mkdir(parents=True, exist_ok=True)
        for experiment in made:
            path = given.out / data / f"{experiment.name.removeprefix(f'{data}_')}.yaml"
            content = experiment.model_dump(mode="json", exclude_unset=True)
            path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
            print(path)
    return 0


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--sparsity `{text}` is not a list of numbers", "write --sparsity 0.2,0.4") from None


if __name__ == "__main__":
    sys.exit(main())
