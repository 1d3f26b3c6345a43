"""The command line: what it prints where, what it refuses and how, and that help is quick."""

from __future__ import annotations

import csv
import io
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_experiment import TINY, TINY_STEPS

from loras_bench import __version__
from loras_bench.commands.run import run_experiments
from loras_bench.config import Experiment

HEAVY = ("torch", "transformers", "pandas", "numpy", "matplotlib", "scipy", "datasets", "peft", "accelerate")
COMMANDS = ("run", "table", "pareto", "doctor", "kernels", "sensitivity", "counts", "schema")
MAX_HELP_S = 0.3


def python(*words, **options):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60, **options)


# --- help


def test_help_is_quick():
    """Seconds of the processor, not of the wall: other work on the machine is not counted."""

    def used_s():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    times_s = []
    for _ in range(3):
        before_s = used_s()
        assert python("-m", "loras_bench", "--help").returncode == 0
        times_s.append(used_s() - before_s)
    assert statistics.median(times_s) < MAX_HELP_S


def loaded_after(code):
    """The heavy modules that a fresh process holds after running some code."""
    shown = f"import sys\n{code}\nprint(*[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    ended = python("-c", shown)
    assert ended.returncode == 0, ended.stderr
    return ended.stderr.split()


def test_the_check_for_heavy_modules_sees_one():
    assert "numpy" in loaded_after("import numpy")


def test_no_help_imports_anything_heavy():
    lines = ["from loras_bench.cli import app"]
    lines += [f"app({[*command, '--help']!r}, standalone_mode=False)" for command in ((), *((c,) for c in COMMANDS))]
    assert loaded_after("\n".join(lines)) == []


def test_the_parent_of_runs_stays_light(write_config):
    """It plans, reads configs and records, and shows progress without torch."""
    path = str(write_config(methods=[{"kind": "lora"}, {"kind": "sparse_attention", "pattern": {"kind": "dense"}}]))
    code = f"""
from pathlib import Path
from loras_bench.commands.run import read_experiments
from loras_bench.plan import plan_blocks
from loras_bench.requests import Device
from loras_bench.runner import BlockRunner, Workers, durations_of
plan_blocks(read_experiments([{path!r}]), [0, 1], Path("nowhere"), Device("cpu", "A CPU", False))
durations_of(Path("nowhere"))
"""
    assert loaded_after(code) == []


def test_help_names_every_command_and_no_words_are_help(invoke):
    called = invoke("--help")
    assert (called.status, called.err) == (0, "")
    assert all(f"  {command} " in called.out for command in COMMANDS)
    assert invoke() == called


def test_version(invoke):
    assert invoke("--version").out == f"{__version__}\n"


# --- errors of the user


def assert_refused(called, message, hint=None):
    """Status 2, nothing on stdout, one or two lines on stderr."""
    assert called.status == 2
    assert called.out == ""
    lines = called.err.splitlines()
    assert len(lines) in (1, 2)
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert all(line.startswith("hint: ") for line in lines[1:])
    if hint is not None:
        assert hint in lines[1]


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["rnu"], "No such command 'rnu'. Did you mean 'run'?", "loras-bench --help"),
        (["run", "--sedes", "0"], "No such option: --sedes", "loras-bench run --help"),
        (["run"], "Missing argument 'CONFIG", "loras-bench run --help"),
        (["run", "x.yaml", "--stop-after", "-5"], "--stop-after", "loras-bench run --help"),
        (["run", "x.yaml", "--stop-after", "soon"], "--stop-after", "loras-bench run --help"),
        (["run", "x.yaml", "--device", "tpu"], "'tpu' is not one of 'auto', 'cuda', 'cpu'", "run --help"),
        (["table", ".", "--format", "html"], "'html' is not one of", "loras-bench table --help"),
        (["table"], "Missing argument", "loras-bench table --help"),
        (["run", "absent.yaml"], "no such file: absent.yaml", "configs/lora.yaml"),
        (["run", "training.tokens=5"], "no experiment is given", "at least one YAML file"),
        (["table", "nowhere"], "no such file or folder: nowhere", "results folder"),
        (["pareto", "nowhere"], "no such file or folder: nowhere", "results folder"),
    ],
)
def test_wrong_words_are_told_in_two_lines(invoke, words, message, hint):
    assert_refused(invoke(*words), message, hint)


@pytest.mark.parametrize("seeds", ["a", "", "0,,1", "0,0", "-1", "1.5", "0;1", str(2**32)])
def test_bad_seeds_are_refused(invoke, write_config, seeds):
    assert_refused(invoke("run", write_config(), f"--seeds={seeds}"), f"--seeds `{seeds}`", "write --seeds 0,1,2")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.leraning_rate=1", "unknown key `leraning_rate` in training; did you mean `learning_rate`?"),
        ("methods.lora.rank=8", "no item `lora` in the list"),
        ("data.name=python-topcs", "unknown data set `python-topcs`; did you mean `python-topics`?"),
        ("model={name: minilm}", "unknown model `minilm`; did you mean `minilm-l6`?"),
        ("model={run: nowhere}", "model.run `nowhere` holds no result.json"),
        ("model={name: owner/name}", "hub model `owner/name` needs model.revision"),
    ],
)
def test_what_an_experiment_cannot_mean_is_refused_before_anything_runs(invoke, write_config, override, message):
    assert_refused(invoke("run", write_config(methods=[]), override), message)


def test_a_misspelt_key_of_a_file(invoke, write_config):
    path = write_config()
    path.write_text(path.read_text().replace("learning_rate", "leraning_rate"))
    line = path.read_text().splitlines().index("  leraning_rate: 0.001") + 1
    assert_refused(
        invoke("run", path),
        f"{path}: unknown key `leraning_rate` in training, line {line}; did you mean `learning_rate`?",
    )


def test_results_that_cannot_be_a_folder_are_refused(invoke, write_config, tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert_refused(invoke("run", write_config(), "--results", file), f"{file} is a file", "give a folder")
    assert_refused(invoke("run", write_config(), "--results", file / "sub"), f"{file} is a file", "give a folder")


def test_a_place_without_records(invoke, tmp_path):
    called = invoke("table", tmp_path)
    assert called.status == 2
    assert called.err.splitlines() == [
        f"skipped {tmp_path}: no result.json in it",
        f"error: no records in {tmp_path}",
        "hint: make some with `loras-bench run`",
    ]


@pytest.mark.usefixtures("fork_server")
def test_two_identical_experiments_are_refused(invoke, write_config, tmp_path):
    path = write_config()
    called = invoke("run", path, path, "--results", tmp_path / "results", "--device", "cpu")
    assert_refused(called, "the same experiment is given twice: tiny/seed0-", "name each file once")


@pytest.mark.usefixtures("fork_server")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused_with_a_hint(invoke, write_config, tmp_path):
    called = invoke("run", write_config(), "--results", tmp_path / "results", "--device", "cuda")
    assert_refused(called, "no CUDA device is available to torch", "--device cpu")
    assert not (tmp_path / "results").exists()


def test_a_real_process_ends_with_status_2_and_no_traceback(tmp_path):
    ended = python("-m", "loras_bench", "run", "absent.yaml", cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines()[0] == "error: no such file: absent.yaml"
    assert len(ended.stderr.splitlines()) == 2


def test_a_reader_that_goes_away_is_no_error():
    ended = subprocess.run(
        f"{sys.executable} -m loras_bench schema | head -n 1", shell=True, capture_output=True, text=True, timeout=60
    )
    assert (ended.stdout, ended.stderr) == ("{\n", "")


# --- data on stdout


def test_the_schema_is_json_that_knows_every_section(invoke):
    called = invoke("schema")
    assert (called.status, called.err) == (0, "")
    assert json.loads(called.out) == Experiment.model_json_schema()


def test_doctor_speaks_json(invoke):
    called = invoke("doctor", "--json")
    checks = json.loads(called.out)
    assert called.status == int(any(check["status"] == "missing" for check in checks))
    assert {check["status"] for check in checks} <= {"ok", "warn", "missing"}
    assert all(check["name"] for check in checks)


PRETRAIN = {"data": TINY["data"], "training": {"tokens": 512, "tokens_per_step": 256, "learning_rate": 1e-3}}


@pytest.mark.usefixtures("fork_server")
def test_a_dry_run_prints_yaml_ids_parameters_and_flops_and_trains_nothing(invoke, write_config, tmp_path):
    methods = [{"kind": "lora", "rank": 2}]
    configs = [write_config("full"), write_config("lora", methods=methods, pretrain=PRETRAIN)]
    words = ("run", *configs, "--seeds", "0,1", "--results", tmp_path / "results", "--device", "cpu", "--dry-run")
    called = invoke(*words, "training.learning_rate=0.5")
    assert (called.status, called.err) == (0, "")
    assert not (tmp_path / "results").exists()

    *documents, rest = called.out.split("---\n")[1:]
    experiments = [Experiment.model_validate(yaml.safe_load(text)) for text in documents]
    assert [experiment.name for experiment in experiments] == ["full", "lora"]
    assert {experiment.training.learning_rate for experiment in experiments} == {0.5}
    assert experiments[0].training.loss == "torch"  # as resolved for this device

    lines = [line.split() for line in rest.splitlines()]
    states = {words[0]: " ".join(words[1:]) for words in lines if words and "/seed" in words[0]}
    assert sorted(name.partition("-")[0] for name in states) == [
        "full/seed0",
        "full/seed1",
        "lora/seed0",
        "lora/seed1",
        "pretraining/seed0",
    ]
    assert set(states.values()) == {"to do"}

    # GPT-2: token and position embeddings, one layer (2 norms, c_attn, c_proj, c_fc, c_proj), the last norm.
    width, vocabulary, length = 32, 300, 64
    layer_weights = 12 * width * width
    layer_biases = 3 * width + width + 4 * width + width
    full = (vocabulary + length) * width + layer_weights + layer_biases + 2 * 2 * width + 2 * width
    lora = 2 * ((width + 3 * width) + (width + width) + (width + 4 * width) + (4 * width + width))
    counted = {words[0]: words[1:] for words in lines if words and words[0] in ("full", "lora")}
    assert counted["full"][:3] == [f"{full:,}", f"{full:,}", "(100.00%)"]
    assert counted["lora"][:2] == [f"{full + lora:,}", f"{lora:,}"]
    assert counted["full"][3] == str(TINY_STEPS)
    flops = [float(word) for word in counted["full"][4:]]
    linear = 6 * 256 * TINY_STEPS * (layer_weights + vocabulary * width)
    assert flops[0] == pytest.approx(linear, rel=1e-3)
    assert flops[2] == flops[3] > 0  # a dense arm is allowed every pair


@pytest.mark.usefixtures("fork_server")
def test_a_dry_run_counts_before_pretraining_what_it_counts_after_it(
    invoke, write_config, tmp_path, command_environment, monkeypatch
):
    """The number of steps depends on the tokenizer, which is trained on the text of the pretraining: another one."""
    data = Path(command_environment["LORAS_BENCH_DATA"])
    monkeypatch.setenv("LORAS_BENCH_DATA", str(data))
    (data / "numbers").mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        (data / "numbers" / f"{split}.txt").write_text(" ".join(map(str, range(2000))), encoding="utf-8")
    numbers = {"name": "numbers", "task": "language_modeling", "sequence_length": 64}
    config = write_config(pretrain=PRETRAIN | {"data": numbers}, training={"tokens": None, "epochs": 0.1})
    words = ("run", config, "--results", tmp_path / "results", "--device", "cpu")
    before = invoke(*words, "--dry-run")
    assert invoke(*words).status == 0
    after = invoke(*words, "--dry-run")
    assert before.out.count("to do") == 2
    assert after.out.count("  done") == 2
    assert before.out[before.out.index("Counted") :] == after.out[after.out.index("Counted") :]


# --- tables and plots of real runs


@pytest.fixture(scope="module")
def results(fork_server, tmp_path_factory):
    """Two arms of two seeds."""
    folder = tmp_path_factory.mktemp("real")
    for name, methods in (("full", []), ("lora", [{"kind": "lora", "rank": 2}])):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, "methods": methods, **TINY}))
    status = run_experiments(
        [str(folder / "full.yaml"), str(folder / "lora.yaml")], "0,1", folder / "results", "cpu",
        dry_run=False, force=False, stop_after_s=None,
    )  # fmt: skip
    assert status == 0
    return folder / "results"


def test_a_table_has_every_arm_in_every_format(invoke, results):
    called = {format: invoke("table", results, "--format", format) for format in ("md", "csv", "tex", "json")}
    assert {one.status for one in called.values()} == {0}
    assert {one.err for one in called.values()} == {""}
    assert all("full" in one.out and "lora" in one.out for one in called.values())
    assert json.loads(called["json"].out)
    assert len(list(csv.reader(io.StringIO(called["csv"].out)))) > 2


def test_a_damaged_record_is_named_and_the_others_are_shown(invoke, results, tmp_path):
    whole = invoke("table", results)
    damaged = tmp_path / "results" / "lora" / "seed9-0000000000"
    damaged.mkdir(parents=True)
    (damaged / "result.json").write_text('{"schema_version": 1, "run_id"')
    called = invoke("table", results, tmp_path / "results")
    assert called.status == 0
    assert called.out == whole.out
    assert called.err.startswith(f"skipped {damaged / 'result.json'}: not valid JSON")


def test_pareto_prints_the_frontier_and_writes_plots(invoke, results, tmp_path):
    called = invoke("pareto", results, "--out", tmp_path / "plots")
    assert called.status == 0
    assert "FLOPs" in called.out  # there are no joules on a CPU, and the title says so
    written = [line for line in called.err.splitlines() if line.startswith(str(tmp_path))]
    assert {path.rpartition(".")[2] for path in written} == {"png", "svg", "pdf", "csv"}


def test_pareto_refuses_an_unknown_field(invoke, results):
    called = invoke("pareto", results, "--x", "train_enrgy_j")
    assert called.status == 2
    assert "train_enrgy_j" in called.err
    assert "Traceback" not in called.err
