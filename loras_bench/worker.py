"""What runs in a worker process. The fork server imports this module, and so torch, but never touches CUDA."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401 (the server imports once what every run needs)
import torch
import transformers
import transformers.modeling_utils

from loras_bench.build import assemble, read
from loras_bench.config import Experiment
from loras_bench.counting import count_training
from loras_bench.errors import UserError
from loras_bench.experiment import Run
from loras_bench.feasibility import check_experiments
from loras_bench.interrupts import raise_once
from loras_bench.metering.environment import cpu_name
from loras_bench.plan import claim_run
from loras_bench.requests import Device, RunRequest
from loras_bench.results.store import RunLockedError


def look_at_device(wanted: str) -> Device:
    """Find out what the runs will run on.

    Raises:
        UserError: CUDA was asked for and is not there.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("no CUDA device is available to torch", "see `loras-bench doctor`, or use --device cpu")
    if wanted == "cpu" or not available:
        return Device("cpu", cpu_name(), False)
    return Device("cuda", torch.cuda.get_device_name(0), find_spec("triton") is not None)


def facts_of(experiment: Experiment, seed: int, device: Device, pretrained: Path | None) -> dict[str, Any]:
    """What a dry run prints: parameters and predicted FLOPs, from the model and data themselves, on the meta device."""
    # without a GPU: the fused groups multiply a few zeros more, where adapters of a group share their input
    training = experiment.training.model_copy(update={"loss": "torch", "cuda_graph": False})
    model = experiment.model.model_copy(update={"implementation": "transformers"})
    plain = experiment.model_copy(update={"training": training, "model": model})
    run = assemble(plain, seed, torch.device(device.kind), read(plain, seed, pretrained), fitted=False)
    total, trainable = run.parameter_counts()
    run.objective.to("meta")
    flops, _ = count_training(run, torch.device("meta"), device.processes)
    return {"steps": run.plan.steps, "total_parameters": total, "trainable_parameters": trainable, "flops": flops}


QUESTIONS: dict[str, Callable[..., Any]] = {
    "look_at_device": look_at_device,
    "check_experiments": check_experiments,
    "facts_of": facts_of,
}


def answer(question: str, arguments: tuple[Any, ...], sender: Connection) -> None:
    """Answer one question of the parent, or send the error."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # an interrupt ends the parent too, which says so
    be_quiet()
    reply: tuple[Any, ...]
    try:
        reply = ("ok", QUESTIONS[question](*arguments))
    except UserError as error:
        reply = ("user error", error.message, error.hint)
    except Exception as error:
        reply = ("error", f"{type(error).__name__}: {error}", traceback.format_exc())
    with suppress(OSError):  # the parent may be gone
        sender.send(reply)


def work(request: RunRequest, sender: Connection) -> None:
    """Execute one run and report to the parent; the run's log takes what libraries print."""
    raise_once()

    def report(event: dict[str, Any]) -> None:
        with suppress(OSError):  # if the parent is gone, an interrupt follows
            sender.send(event)

    try:
        with claim_run(request), open(request.folder / "log.txt", "a", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            be_quiet()
            run = Run(request, report)
            record = run.execute()
            ending = {"status": record.status, "reason": record.reason, "temperature_c": run.done.start_temperature_c}
    except RunLockedError as error:
        ending = {"status": "skipped", "reason": error.message}
    except KeyboardInterrupt as error:
        ending = {"status": "interrupted", "reason": str(error)}
    except Exception as error:
        traceback.print_exc()
        ending = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    report(ending)


def be_quiet() -> None:
    """Libraries advise on stderr; a run's own log is enough for that."""
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # read by `datasets` when a run imports it
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
