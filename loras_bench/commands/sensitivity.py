"""`loras-bench sensitivity`: train LoRA densely, measure what each part of each layer tolerates, choose a schedule."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loras_bench.commands.run import read_experiments
from loras_bench.config import Experiment
from loras_bench.errors import UserError
from loras_bench.files import write_whole
from loras_bench.methods.sparse_lora import SparseLoraConfig
from loras_bench.plan import PlannedRun, plan_run, pretraining_of, resolve
from loras_bench.progress import Progress
from loras_bench.requests import Device
from loras_bench.results.sensitivity import (
    BUDGETS,
    Choice,
    Measurement,
    Schedule,
    Sensitivity,
    describe,
    read_sensitivity,
)
from loras_bench.runner import BlockRunner, Workers
from loras_bench.sensitivity import (
    SEARCHED,
    all_sparse,
    check_run,
    dense_experiment,
    experiment_text,
    identity_of,
    lora_of,
    method_of,
    shortened,
)

if TYPE_CHECKING:
    from loras_bench.build import Ingredients
    from loras_bench.calibration import Calibration, CalibrationSet
    from loras_bench.sparsity.criteria import LayerSparsity
    from loras_bench.sparsity.sensitivity import StepCost

DENSE_RUNS = ".dense"
"""Hidden in the output folder: these runs are no arms of a comparison."""


def find_schedule(
    words: Sequence[str],
    flops: float,
    feed_forward: str,
    attention: str,
    rows: int,
    steps: int | None,
    run: Path | None,
    seed: int,
    out: Path,
    device: str,
    *,
    force: bool,
) -> int:
    """Find the schedule, print what it does and write it; returns the exit status.

    Raises:
        UserError: Something that was asked for cannot be done.
    """
    experiments = read_experiments(words)
    if len(experiments) > 1:
        raise UserError("sensitivity is of one experiment", "call it once for each")
    if not 0 < flops < 1:
        raise UserError(f"--flops {flops:g} is no share between 0 and 1", "write --flops 0.6")
    if steps is not None and run is not None:
        raise UserError("--steps is of the dense training that --run takes the place of", "give one of the two")
    grid = {
        "feed_forward": parse_grid("--feed-forward", feed_forward),
        "attention": parse_grid("--attention", attention),
    }
    files = Files(out, experiments[0].name)
    if files.experiment.exists() and not force:
        raise UserError(
            f"{files.experiment} is there already",
            "give another --out, or --force: measurements that the new call needs are kept",
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: it cannot be made: {error.strerror}", "give another folder") from None
    workers = Workers()
    target: Device = workers.ask("look_at_device", device)
    with Progress() as progress:
        search = Search(experiments[0], grid, seed, files, target, workers, progress)
        try:
            found = search.run(flops, rows, steps, run, force=force)
        except KeyboardInterrupt:
            progress.say("interrupted; the next call goes on")
            raise
    print(describe(found))
    for path in files.all():
        print(path, file=sys.stderr)
    return 0


def parse_grid(option: str, text: str) -> list[float]:
    """`0.5,0.9` -> [0.5, 0.9]."""
    try:
        shares = sorted(float(part) for part in text.split(","))
    except ValueError:
        shares = []
    if not shares or len(set(shares)) < len(shares) or not 0 < shares[0] <= shares[-1] < 1:
        raise UserError(f"{option} `{text}`: sparsities are different numbers between 0 and 1", "write 0.5,0.75,0.9")
    return shares


class Files:
    """What a search leaves in its folder."""

    def __init__(self, out: Path, name: str) -> None:
        self.out, self.stem = out, out / f"{name}.sensitivity"
        self.experiment, self.search, *self.plots = (
            self.stem.with_name(f"{self.stem.name}.{ending}") for ending in ("yaml", "json", "png", "svg")
        )

    def all(self) -> list[Path]:
        return [self.experiment, self.search, *self.plots]


class Search:
    """One search; `run` is its story."""

    def __init__(
        self,
        experiment: Experiment,
        grid: Mapping[str, list[float]],
        seed: int,
        files: Files,
        device: Device,
        workers: Workers,
        progress: Progress,
    ) -> None:
        self.experiment, self.grid, self.seed, self.files = experiment, dict(grid), seed, files
        self.device, self.workers, self.progress = device, workers, progress

    def run(self, flops: float, rows: int, steps: int | None, run: Path | None, *, force: bool) -> Sensitivity:
        """From the dense run to the files."""
        from loras_bench.build import build, read
        from loras_bench.calibration import Calibration, load_adapters
        from loras_bench.sparsity.sensitivity import check_budget
        from loras_bench.worker import be_quiet

        be_quiet()
        self.progress.start(f"sensitivity of {self.experiment.name}")
        self._say("loading data and model")
        dense = resolve(dense_experiment(self.experiment), self.device)
        if run is not None:
            self.seed = check_run(run, dense)
        ingredients = read(dense, self.seed)
        dense = dense if steps is None else shortened(dense, steps, ingredients.data.rows("train"))
        layer_count = ingredients.loaded.model.config.num_hidden_layers
        everything = all_sparse(self.experiment, dense, ingredients.data.task, layer_count, self.grid)
        drawn, cost = self._draw(everything, ingredients, rows)
        check_budget(cost, self.grid, flops)
        found = self._open(dense, everything, ingredients, drawn, run, force=force)
        if run is None:
            self._train(dense)
        if (first := pretraining_of(dense, self.files.out / DENSE_RUNS, self.device)) is not None:
            ingredients = read(dense, self.seed, first.folder)
        built = build(everything, self.seed, self.device.kind, ingredients)
        load_adapters(built.model, Path(found.dense_run))
        calibration = Calibration(built, drawn)
        self._measure(found, calibration)
        self._choose(found, calibration, cost, flops)
        return found

    def _draw(self, everything: Experiment, ingredients: Ingredients, rows: int) -> tuple[CalibrationSet, StepCost]:
        """The calibration rows, and what a step costs by their tokens; conflicts of methods show here."""
        from loras_bench.build import build_methods
        from loras_bench.calibration import calibration_set
        from loras_bench.methods.sparse_lora import SparseLora
        from loras_bench.sparsity.sensitivity import step_cost
        from loras_bench.training import plan_steps

        data, model_config = ingredients.data, ingredients.loaded.model.config
        methods = build_methods(everything, model_config)
        method = next(one for one in methods if isinstance(one, SparseLora))
        plan = plan_steps(everything.training, data, everything.data.sequence_length, self.seed)
        drawn = calibration_set(data, method, rows, plan.micro_rows, self.seed)
        return drawn, step_cost(model_config, *drawn.mean_tokens, lora_of(everything))

    def _open(
        self,
        dense: Experiment,
        everything: Experiment,
        ingredients: Ingredients,
        drawn: CalibrationSet,
        run: Path | None,
        *,
        force: bool,
    ) -> Sensitivity:
        """A new search, or an earlier one of the same request that goes on.

        Raises:
            UserError: The file holds something else.
        """
        identity = identity_of(dense, everything, drawn.rows, self.seed, run, self.device)
        file = self.files.search
        earlier = read_sensitivity(file)
        same = earlier is not None and earlier.request == identity
        if file.exists() and not same and not force:
            what = "holds another search" if earlier else "cannot be read: it is damaged, or of another version"
            raise UserError(f"{file} {what}", "--force replaces it, or give another --out")
        sparse = method_of(everything, SparseLoraConfig)
        assert sparse is not None
        found = Sensitivity(
            request=identity,
            experiment=dense.model_dump(mode="json"),
            sparse_lora=sparse.model_dump(mode="json", exclude={"kind", *SEARCHED}),
            seed=self.seed,
            dense_run=str(run or self._planned(dense).folder),
            device=self.device.name,
            model=ingredients.loaded.label,
            dataset=ingredients.data.name,
            dataset_hash=ingredients.data.content_hash,
            layer_count=ingredients.loaded.model.config.num_hidden_layers,
            rows=drawn.rows,
            context_tokens=drawn.mean_tokens[0],
            dense_tokens=drawn.mean_tokens[1],
            grid=self.grid,
            measurements=earlier.measurements if same and earlier else [],
        )
        if found.measurements:
            self.progress.say(f"{len(found.measurements)} measurements are there already")
        return found

    def _planned(self, dense: Experiment) -> PlannedRun:
        return plan_run(dense, self.seed, self.files.out / DENSE_RUNS, self.device)

    def _train(self, dense: Experiment) -> None:
        """The dense run, in a process of its own; a finished one is taken as it is, a killed one taken up.

        Raises:
            UserError: It failed.
        """
        runner = BlockRunner(
            self.files.out / DENSE_RUNS, self.device, self.workers, self.progress, force=False, stop_at=None
        )
        outcomes = runner.run([[self._planned(dense)]])
        if outcomes and outcomes[-1].status != "completed":
            raise UserError(f"the dense run {outcomes[-1].status}: {outcomes[-1].reason}", "see the lines above")

    def _measure(self, found: Sensitivity, calibration: Calibration) -> None:
        """Each part of each layer alone, at each sparsity; every measurement is on disk when the next begins."""
        from loras_bench.sparsity.criteria import DENSE, LayerSparsity

        known = found.known()
        todo = [
            (layer, part, share)
            for part, shares in self.grid.items()
            for share in shares
            for layer in range(found.layer_count)
            if (layer, part, share) not in known
        ]
        found.dense_loss = calibration.dense_loss
        begun = time.monotonic()
        for number, (layer, part, share) in enumerate(todo):
            schedule = [DENSE] * found.layer_count
            schedule[layer] = LayerSparsity(**{part: share})
            reading = calibration.reading(schedule)
            found.measurements.append(Measurement(layer=layer, part=part, sparsity=share, **reading.model_dump()))
            found.write(self.files.search)
            left_s = (time.monotonic() - begun) / (number + 1) * (len(todo) - number - 1)
            self._say(f"measured {number + 1} of {len(todo)}: layer {layer}, {part} {share:g}; {left_s:.0f} s left")

    def _choose(self, found: Sensitivity, calibration: Calibration, cost: StepCost, flops: float) -> None:
        """The schedule, what it does as a whole, and the best uniform one; then all files, the experiment last."""
        from loras_bench.results.heatmap import write_heatmap
        from loras_bench.sparsity.sensitivity import choose, predicted, uniform

        divergences: dict[tuple[int, str], dict[float, float]] = {}
        for (layer, part, share), one in found.known().items():
            if share in self.grid[part]:
                divergences.setdefault((layer, part), {})[share] = found.above_floor(one)
        chosen = choose(cost, divergences, flops)
        self._say("measuring the schedule")
        joint = schedule_of(chosen, cost, calibration)
        even = schedule_of(uniform(cost, divergences, joint.flops_ratio), cost, calibration)
        budgets = [budget for budget in BUDGETS if cost.reaches(self.grid, budget)]
        found.choice = Choice(
            **dict(joint),
            flops_budget=flops,
            predicted=predicted(chosen, divergences),
            uniform=even,
            frontier={str(budget): predicted(choose(cost, divergences, budget), divergences) for budget in budgets},
        )
        found.write(self.files.search)
        write_heatmap(found, self.files.stem)
        write_whole(self.files.experiment, experiment_text(self.experiment, found))

    def _say(self, phase: str) -> None:
        self.progress.update({"phase": phase})


def schedule_of(layers: Sequence[LayerSparsity], cost: StepCost, calibration: Calibration) -> Schedule:
    """A schedule with its FLOPs and what it does to the loss."""
    from loras_bench.sparsity.sensitivity import by_range

    return Schedule(layers=by_range(layers), flops_ratio=cost.ratio(layers), joint=calibration.reading(layers))
