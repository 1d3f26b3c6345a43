"""Provenance and the doctor's checks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from loras_bench.metering.doctor import doctor
from loras_bench.metering.environment import collect_environment, git_state, package_versions, relevant_variables


def test_the_environment_is_json_and_holds_what_a_reader_asks():
    environment = json.loads(json.dumps(collect_environment()))
    assert environment["python"].startswith("3.")
    assert environment["packages"]["pydantic"].startswith("2.")
    assert environment["cpu"]["logical_cores"] >= environment["cpu"]["usable_cores"] >= 1
    assert environment["cpu"]["memory_bytes"] > 1e8
    assert environment["command_line"] == [Path(sys.argv[0]).name, *sys.argv[1:]]


def test_importing_and_collecting_stay_light():
    code = (
        "import sys; from loras_bench.metering import environment, doctor, meter, carbon;"
        "environment.collect_environment();"
        "print([m for m in ('torch', 'numpy', 'transformers', 'pandas', 'codecarbon', 'pynvml') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() in ("[]", "['pynvml']")  # pynvml is a thin binding, asked for the GPUs' names


def test_only_installed_packages_are_named():
    assert package_versions(["pydantic", "no-such-package"]).keys() == {"pydantic"}


def test_only_relevant_variables_are_kept():
    environ = {"CUDA_VISIBLE_DEVICES": "0", "HF_TOKEN": "secret", "HOSTNAME": "me", "TRITON_CACHE_DIR": "/x"}
    assert relevant_variables(environ) == {"CUDA_VISIBLE_DEVICES": "0", "TRITON_CACHE_DIR": "/x"}


def test_git_state_of_a_checkout(tmp_path):
    assert git_state(tmp_path) is None

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)

    git("init")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    clean = git_state(tmp_path)
    assert len(clean["sha"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "file").write_text("2")
    assert git_state(tmp_path) == {"sha": clean["sha"], "dirty": True}


def test_the_doctor_finds_folders_and_packages(tmp_path, monkeypatch):
    (tmp_path / "wikitext-2").mkdir()
    monkeypatch.setenv("LORAS_BENCH_DATA", str(tmp_path))
    monkeypatch.setenv("LORAS_BENCH_MODELS", str(tmp_path / "absent"))
    checks = {check.name: check for check in doctor()}
    assert checks["torch"].status == "ok"
    assert checks["LORAS_BENCH_DATA"].value == f"{tmp_path}: 1 entries"
    assert checks["LORAS_BENCH_MODELS"].status == "missing"
    assert {"cuda", "rapl", "flex attention", "triton", "gguf", "codecarbon"} <= checks.keys()
    for check in checks.values():
        assert check.status in ("ok", "warn", "missing")
        assert check.value
