"""A tiny experiment, and the command line called on it: in this process, or as a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_experiment import TINY

from loras_bench import cli
from loras_bench.runner import Workers

if not os.path.exists("/dev/nvidiactl"):  # before triton is imported: without a GPU its kernels are interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")

WriteConfig = Callable[..., Path]


@pytest.fixture
def write_config(tmp_path: Path) -> WriteConfig:
    """Write `<name>.yaml` with the tiny experiment; sections are merged into it."""

    def write(name: str = "tiny", **sections: Any) -> Path:
        content = {"name": name} | {key: dict(part) if isinstance(part, dict) else part for key, part in TINY.items()}
        for key, part in sections.items():
            content[key] = {**content.get(key, {}), **part} if isinstance(part, dict) else part
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Small data sets and a cache of the tests' own, for the modules that ask for them."""
    from training_fixtures import set_places  # late: it imports torch, which most command-line tests do without

    with pytest.MonkeyPatch.context() as patch:
        set_places(patch, tmp_path_factory.mktemp("places"))
        yield


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A module's tests neither read nor write the user's cache; some folders use it for all of theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@dataclass(frozen=True)
class Called:
    """What a command left."""

    status: int
    out: str
    err: str


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Called]]:
    """Call `loras-bench` in this process; runs still get processes of their own, forked from the session's server."""
    handler = signal.getsignal(signal.SIGTERM)

    def call(*words: object) -> Called:
        monkeypatch.setattr(sys, "argv", ["loras-bench", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Called(int(ended.value.code or 0), captured.out, captured.err)

    yield call
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="session")
def command_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One thread, so that losses can be compared bit for bit; and a cache that is not the user's."""
    folder = tmp_path_factory.mktemp("commands")
    return {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "LORAS_BENCH_DATA": str(folder / "data"),
    }


@pytest.fixture(scope="session")
def fork_server(command_environment: dict[str, str]) -> Workers:
    """The fork server of this process, started once: it takes seconds to import torch, a run takes half a second."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in command_environment.items():
            patch.setenv(name, value)
        workers = Workers()
        workers.ask("look_at_device", "cpu")
    return workers


@pytest.fixture
def launch(command_environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `loras-bench` as a process group of its own; what is left of it at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "loras_bench", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, **command_environment},
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
