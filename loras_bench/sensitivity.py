"""The experiments around a sensitivity search: the dense run, the one that is measured, and the one that is found.

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from loras_bench.catalog import Task
from loras_bench.config import EnergyConfig, EvaluationConfig, Experiment, canonical_hash
from loras_bench.errors import ConfigError
from loras_bench.methods.base import MethodConfig
from loras_bench.methods.lora import LoraConfig
from loras_bench.methods.sparse_lora import SparseLoraConfig
from loras_bench.plan import KERNEL_VERSION
from loras_bench.requests import Device
from loras_bench.results.sensitivity import Sensitivity
from loras_bench.results.store import RECORD_FILE, read_record

M = TypeVar("M", bound=MethodConfig)

SEARCHED = ("layers", "start")
"""Keys of `sparse_lora` that no measurement depends on."""


def method_of(experiment: Experiment, kind: type[M]) -> M | None:
    """The settings of one method, if the experiment has it."""
    return next((method for method in experiment.methods if isinstance(method, kind)), None)


def lora_of(experiment: Experiment) -> LoraConfig:
    """The settings of LoRA.

    Raises:
        ConfigError: There are none.
    """
    found = method_of(experiment, LoraConfig)
    if found is None:
        raise ConfigError(f"{experiment.name}: sensitivity is that of a model with adapters", "add `lora` to methods")
    return found


def dense_experiment(experiment: Experiment) -> Experiment:
    """Training alone, without `sparse_lora`; its adapters are kept."""
    lora_of(experiment)
    return experiment.model_copy(
        update={
            "methods": tuple(one for one in experiment.methods if not isinstance(one, SparseLoraConfig)),
            "evaluation": EvaluationConfig(splits=()),
            "energy": EnergyConfig(steady_seconds=0, idle_seconds=0),
            "save": True,
        }
    )


def shortened(experiment: Experiment, steps: int, rows: int) -> Experiment:
    """With a budget of so many optimizer steps.

    Args:
        experiment: Any.
        steps: Wanted.
        rows: Of its training set.
    """
    training = experiment.training
    budget: dict[str, Any] = {"tokens": None, "epochs": None}
    if training.tokens_per_step is not None:
        budget["tokens"] = steps * training.tokens_per_step
    else:
        assert training.batch_size is not None
        budget["epochs"] = (steps - 0.5) * training.batch_size / rows  # rounded up to whole steps
    return experiment.model_copy(update={"training": training.model_copy(update=budget)})


def all_sparse(
    experiment: Experiment, dense: Experiment, task: Task, layer_count: int, grid: Mapping[str, list[float]]
) -> Experiment:
    """The dense experiment with every part of every layer sparse from the first step on, to be measured.

    Args:
        experiment: As given; its `sparse_lora` keeps all settings but the schedule. Without one, the defaults hold, and
            all tokens are sparse where each has a label.
        dense: Resolved.
        task: Of the data.
        layer_count: Layers of the model.
        grid: Sparsities of each part.
    """
    given = method_of(experiment, SparseLoraConfig)
    settings: dict[str, Any] = {"tokens": "context" if task == "instruction" else "all"}
    if given is not None:
        settings = given.model_dump(exclude={"kind", *SEARCHED})
    parts = {part: max(shares) for part, shares in grid.items()}
    layers = {f"0-{layer_count - 1}": parts}
    sparse = SparseLoraConfig.model_validate({"kind": "sparse_lora", "layers": layers, "start": 0.0, **settings})
    training = dense.training.model_copy(update={"compile": False, "gradient_checkpointing": False})
    return dense.model_copy(update={"methods": (*dense.methods, sparse), "training": training})


def check_run(folder: Path, dense: Experiment) -> int:
    """The seed of a finished run whose adapters take the place of the dense training.

    Raises:
        ConfigError: It did not finish, or trained something else.
    """
    try:
        record = read_record(folder / RECORD_FILE)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--run {folder}: no finished run ({error})", f"name a folder that holds {RECORD_FILE}"
        ) from None
    if record.status != "completed":
        raise ConfigError(f"--run {folder} did not finish ({record.status})", "run it to its end first")
    if dense.pretrain is not None:
        raise ConfigError("--run does not go with `pretrain`", "leave it out: the dense run is made here")
    theirs, ours = record.config, dense.model_dump(mode="json")
    for section, keys in {"data": ("name",), "model": ("name", "revision", "run", "init", "architecture")}.items():
        for key in keys:
            if theirs[section].get(key) != ours[section][key]:
                raise ConfigError(
                    f"--run {folder}: its {section}.{key} is {theirs[section].get(key)}, not {ours[section][key]}",
                    "name a run of the same experiment without `sparse_lora`",
                )
    if theirs["methods"] != ours["methods"]:
        raise ConfigError(
            f"--run {folder} was trained by {theirs['methods']}", f"name a run whose methods are {ours['methods']}"
        )
    return record.seed


def identity_of(
    dense: Experiment, everything: Experiment, rows: int, seed: int, run: Path | None, device: Device
) -> str:
    """Hash of all that a measurement depends on."""
    sparse = method_of(everything, SparseLoraConfig)
    assert sparse is not None
    return canonical_hash(
        {
            "dense": dense.model_dump(mode="json", exclude={"name"}),
            "sparse_lora": sparse.model_dump(mode="json", exclude=set(SEARCHED)),
            "rows": rows,
            "seed": seed,
            "run": str(run.resolve()) if run else None,
            "device": device.name,
            "kernels": KERNEL_VERSION,
        }
    )


def found_experiment(experiment: Experiment, found: Sensitivity) -> dict[str, Any]:
    """The keys of the given experiment with the schedule that was chosen; an arm that was dense gets another name."""
    assert found.choice is not None
    content = experiment.model_dump(mode="json", exclude_unset=True)
    given = method_of(experiment, SparseLoraConfig)
    kept = {"tokens": found.sparse_lora["tokens"]}
    if given is not None:
        kept = given.model_dump(exclude_unset=True, exclude={"kind", "layers"})
    sparse = {"kind": "sparse_lora", "layers": found.choice.layers, **kept}
    others = [method for method in content["methods"] if method["kind"] != "sparse_lora"]
    name = experiment.name if given else f"{experiment.name}_sparse"
    return {**content, "name": name, "methods": [*others, sparse]}


def experiment_text(experiment: Experiment, found: Sensitivity) -> str:
    """The found experiment as YAML, with how it was found in comments."""
    assert found.choice is not None
    choice = found.choice
    lines = [
        f"The schedule of sparse_lora was found by `loras-bench sensitivity` at --flops {choice.flops_budget:g}.",
        f"Model {found.model} with the adapters of {found.dense_run};",
        f"data {found.dataset} ({found.dataset_hash}): {found.rows} training rows, of a row on average "
        f"{found.context_tokens} context and {found.dense_tokens} dense tokens.",
        f"A sparse step takes {choice.flops_ratio:.3f} of dense LoRA's FLOPs. Loss {found.dense_loss:.4f} nats a label "
        "token with everything dense;",
        f"divergence: parts one at a time, added up, {choice.predicted:.2g}; together {choice.joint.divergence:.2g},",
        f"and the loss rises by {choice.joint.increase:.2g} (standard error {choice.joint.error:.1g});",
        f"the best uniform schedule at no more FLOPs {choice.uniform.joint.divergence:.2g}, and the loss rises by "
        f"{choice.uniform.joint.increase:.2g}.",
    ]
    content = yaml.safe_dump(
        found_experiment(experiment, found), sort_keys=False, default_flow_style=None, allow_unicode=True, width=110
    )
    return "".join(f"# {line}\n" for line in lines) + content
