"""The commands: parse, call, print. Data goes to stdout, the rest to stderr; nothing heavy is imported at the top."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from loras_bench import __version__
from loras_bench.errors import UserError

app = typer.Typer(
    name="loras-bench",
    help="What efficient-training techniques really cost and save: joules, time, memory, FLOPs and quality, measured.",
    rich_markup_mode=None,  # plain help comes in half the time
    pretty_exceptions_enable=False,
)
UsageError: type[Any] = typer.BadParameter.__mro__[1]
"""Click's, or that of the copy of click that newer typers carry."""

Results = Annotated[
    list[Path], typer.Argument(help="Results folders, run folders or result.json files.", show_default=False)
]
DeviceName = Annotated[Literal["auto", "cuda", "cpu"], typer.Option(help="Where to run.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write everything there.")]


def main() -> None:
    """Entry of `loras-bench`: what the user can mend takes two lines and status 2; an interrupt is status 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is an interrupt
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except UserError as error:
        _refuse(error.message, error.hint)
    except UsageError as error:
        _refuse(error.format_message(), f"see `{error.ctx.command_path if error.ctx else 'loras-bench'} --help`")


def _refuse(message: str, hint: str | None) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    sys.exit(2)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    configs: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG... [key=value ...]",
            help="YAML files, then overrides for all of them, such as methods.lora.rank=8.",
            show_default=False,
        ),
    ],
    seeds: Annotated[str, typer.Option(help="Comma-separated; each seed is a block of all arms.")] = "0",
    results: Annotated[Path, typer.Option(help="Folder that the records go to.")] = Path("results"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print YAML, run ids, parameters and predicted FLOPs; train nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Run again what is finished.")] = False,
    device: DeviceName = "auto",
    stop_after: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="Start no run that would not fit in what is left, by the runs so far; the next call goes on.",
        ),
    ] = None,
) -> None:
    """Train, measure and evaluate experiments. Interleaved seed by seed; finished runs are skipped."""
    from loras_bench.commands.run import run_experiments

    raise typer.Exit(
        run_experiments(configs, seeds, results, device, dry_run=dry_run, force=force, stop_after_s=stop_after)
    )


@app.command()
def table(
    results: Results,
    format: Annotated[Literal["md", "csv", "tex", "json"], typer.Option(help="Form of the tables.")] = "md",
) -> None:
    """Print comparison tables. One for each data set, model, length, budget and device."""
    from loras_bench.results.render import render
    from loras_bench.results.tables import build_tables

    print(render(build_tables(_load(results)), format))


@app.command()
def pareto(
    results: Results,
    x: Annotated[str, typer.Option("--x", help="What it costs: a numeric field of the records.")] = "train_energy_j",
    y: Annotated[
        str | None,
        typer.Option(
            "--y", help="How good it is: a metric. Default: perplexity or accuracy, by task.", show_default=False
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the plots (PNG, SVG, PDF) and the frontier as CSV.")] = Path(
        "pareto"
    ),
) -> None:
    """Plot which arms are not dominated. Differences within the noise of the seeds are said to be so."""
    from loras_bench.results.pareto import describe, frontiers
    from loras_bench.results.plots import write_pareto

    found = frontiers(_load(results), x, y)
    print(describe(found))
    for path in write_pareto(found, out):
        print(path, file=sys.stderr)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what this machine can measure and run. Status 1 if something required is missing."""
    from loras_bench.metering import doctor as examination

    checks = examination.doctor()
    if as_json:
        print(json.dumps([vars(check) for check in checks], indent=1))
    else:
        _print_checks(checks)
    raise typer.Exit(1 if any(check.status == "missing" for check in checks) else 0)


@app.command()
def kernels(
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHAPE",
            help="Batch x heads x length x head dim, such as 2x16x8192x64 or, with 3 key heads, 4x9/3x8192x64.",
            show_default="2x16x8192x64 2x16x8192x128",
        ),
    ] = None,
    patterns: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Such as dense, window:512+64 (64 global tokens), bigbird or {kind: strided, stride: 128}.",
            show_default="window:512+64 window:256,bidirectional",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Loop of each backend for joules; 0 leaves them out.")] = 2.0,
    json_file: JsonFile = None,
) -> None:
    """Compare attention kernels on this GPU: ours, FlexAttention, cuDNN, SDPA, Longformer's chunks."""
    from loras_bench.commands.kernels import PATTERNS, SHAPES, compare_kernels

    raise typer.Exit(compare_kernels(shapes or SHAPES, patterns or PATTERNS, seconds, json_file))


@app.command()
def sensitivity(
    config: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG [key=value ...]",
            help="A YAML file with `lora`, and overrides of it; of `sparse_lora` all but the layers is kept.",
            show_default=False,
        ),
    ],
    flops: Annotated[
        float, typer.Option(help="Budget: training FLOPs of a sparse step as a share of dense LoRA's.")
    ] = 0.6,
    feed_forward: Annotated[str, typer.Option(help="Sparsities to try for feed-forward layers.")] = "0.5,0.75,0.9,0.99",
    attention: Annotated[str, typer.Option(help="Sparsities to try for attention.")] = "0.25,0.5,0.75",
    rows: Annotated[int, typer.Option(min=2, help="Training rows that are read.")] = 256,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps of the dense training. Default: the config's budget.")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option("--run", metavar="FOLDER", help="A finished run of the dense arm, instead of training one."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the dense training and the rows; with --run the run's.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the experiment, measurements, plots.")] = Path("sensitivity"),
    device: DeviceName = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace the files of an earlier search.")] = False,
) -> None:
    """Find a schedule for sparse_lora: which layers tolerate how much sparsity. A killed search goes on."""
    from loras_bench.commands.sensitivity import find_schedule

    raise typer.Exit(
        find_schedule(config, flops, feed_forward, attention, rows, steps, run, seed, out, device, force=force)
    )


@app.command()
def counts(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="bert-base, gpt2, or models as in an experiment's `model.name`.",
            show_default="bert-base gpt2",
        ),
    ] = None,
    sparsity: Annotated[
        float, typer.Option(min=0, max=1, help="Share of feed-forward and embedding weights set to zero.")
    ] = 0.7,
    rank: Annotated[int, typer.Option(min=1, help="Rows left of a query or key matrix.")] = 1,
    format: Annotated[Literal["md", "json"], typer.Option(help="Form of the table.")] = "md",
) -> None:
    """Count what folding and pruning leave of models' weights, from their configurations."""
    from loras_bench.commands.counts import print_counts

    print_counts(models or ["bert-base", "gpt2"], sparsity, rank, format)


@app.command()
def savings(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs made with `save: true`.", show_default=False)
    ],
    batch: Annotated[int, typer.Option(min=1, help="Rows of the forward pass.")] = 8,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each row.")] = 512,
    seconds: Annotated[float, typer.Option(min=0, help="Loop of each form for joules; 0 leaves them out.")] = 2.0,
    out: Annotated[Path | None, typer.Option(help="Folder to keep packed and exported models in.")] = None,
    format: Annotated[Literal["md", "csv"], typer.Option(help="Form of the tables.")] = "md",
    device: DeviceName = "auto",
    json_file: JsonFile = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what an earlier call wrote to --out.")] = False,
) -> None:
    """Show what pruned and folded models save: bytes, FLOPs, time and joules, beside those of the dense model."""
    from loras_bench.commands.savings import measure_savings

    raise typer.Exit(measure_savings(runs, batch, length, seconds, out, format, device, json_file, force=force))


@app.command()
def recall(
    models: Annotated[list[str], typer.Argument(metavar="MODEL_OR_RUN...", show_default=False)],
    distances: Annotated[str, typer.Option(help="Tokens from a token to its copy.")] = "8,32,128,512",
    rows: Annotated[int, typer.Option(min=1, help="Random rows for each distance.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of the rows.")] = 0,
    device: DeviceName = "auto",
    json_file: JsonFile = None,
) -> None:
    """Probe what language models (`model.name`, or folders of runs) copy from their context: random tokens, twice."""
    from loras_bench.commands.recall import probe_recall

    raise typer.Exit(probe_recall(models, distances, rows, seed, device, json_file))


@app.command()
def schema() -> None:
    """Print the JSON Schema of an experiment's YAML, for editors."""
    from loras_bench.config import Experiment

    print(json.dumps(Experiment.model_json_schema(), indent=1))


def _load(results: list[Path]) -> list[Any]:
    """Records of the given places; files that could not be used are named on stderr."""
    from loras_bench.results.store import load_records

    records, problems = load_records(results)
    for problem in problems:
        print(f"skipped {problem}", file=sys.stderr)
    if not records:
        raise UserError(f"no records in {', '.join(map(str, results))}", "make some with `loras-bench run`")
    return records


def _print_checks(checks: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "warn": "yellow", "missing": "red"}
    grid = Table(box=None, show_header=False, pad_edge=False)
    for check in checks:
        value = Text(str(check.value if check.value is not None else ""))
        if check.hint:
            value.append(f"\n{check.hint}", style="dim")
        grid.add_row(Text(check.status, style=styles[check.status]), check.name, value)
    Console(highlight=False).print(grid)
