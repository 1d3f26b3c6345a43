"""What the names of data sets in a YAML file mean, and where on this machine (or on the hub) each is found.

A data set is looked for in a folder under $LORAS_BENCH_DATA, then on the hub at a pinned revision. Nothing is read here
and nothing heavy is imported: `loras_bench.data` reads what was located. Models: models/catalog.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loras_bench.errors import ConfigError, UserError, did_you_mean

if TYPE_CHECKING:
    from loras_bench.config import DataConfig

Task = Literal["language_modeling", "classification", "instruction"]
SPLITS = ("train", "validation", "test")
DATA_VARIABLE = "LORAS_BENCH_DATA"
FILE_ENDINGS = (".jsonl", ".jsonl.xz", ".jsonl.gz", ".txt", ".txt.xz", ".txt.gz")

_SPLIT_STEMS = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}
# GLUE keeps the labels of its test sets secret, so papers report the validation set; we call that the test set.
_LABELLED_GLUE_STEMS = {"train": ("train",), "validation": (), "test": ("validation", "dev")}
_HUB_SPLITS = {"train": "train", "validation": "validation", "test": "test"}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class HubSource:
    """A data set on the hub: `revision` is a commit, `splits` maps our split names to the repository's."""

    repository: str
    revision: str
    subset: str | None = None
    splits: Mapping[str, str] = field(default_factory=lambda: _HUB_SPLITS)


@dataclass(frozen=True)
class DatasetSpec:
    """What a data set holds.

    `label_names` is empty for sets outside the catalog: the labels are then taken from the training set.
    `line_end_is_word` follows WikiText, whose published word counts have one end-of-line word for each line.
    `hub_blank_line`: the hub's rows are lines of one text, and blank lines, stored there as "", were this.
    `folder` is the set's folder under $LORAS_BENCH_DATA, where it is not its name.

    Rows of `instruction` sets are prompts and responses. Without a label, the text fields hold the two; with one,
    `prompt` is written around the text, and the response is the label's name. `choices_after`: what stands in a
    prompt before the answers that it allows, with `/` between them. `final_answer`: a regular expression whose group
    is what exact match compares in a response.
    """

    name: str
    task: Task
    text_fields: tuple[str, ...] = ("text",)
    label_field: str | None = None
    label_names: tuple[str, ...] = ()
    stems: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _SPLIT_STEMS)
    hub: HubSource | None = None
    embedded: bool = False
    line_end_is_word: bool = False
    hub_blank_line: str | None = None
    folder: str | None = None
    prompt: str = "{}"
    choices_after: str | None = None
    final_answer: str | None = None

    @property
    def path(self) -> str:
        """The set's folder under $LORAS_BENCH_DATA."""
        return self.folder or self.name


def _lm(name: str, **more: Any) -> DatasetSpec:
    return DatasetSpec(name, "language_modeling", **more)


def _labelled(name: str, fields: str, labels: str, hub: HubSource | None = None, **more: Any) -> DatasetSpec:
    return DatasetSpec(name, "classification", tuple(fields.split()), "label", tuple(labels.split()), hub=hub, **more)


def _prompted(labelled: DatasetSpec, prompt: str) -> DatasetSpec:
    """A classification set whose labels are named in words, in answer to a prompt."""
    return replace(
        labelled, name=f"{labelled.name}-prompted", task="instruction", folder=labelled.path, prompt=prompt + "\n\n{}"
    )


def _commonsense(name: str, file: str) -> DatasetSpec:
    """A set of LLM-Adapters (Hu et al. 2023): `Answer format: answer1/answer2` -> `the correct answer is answer1`."""
    stems = {"train": (f"{file}_train",), "validation": (), "test": (f"{file}_test",)}
    fields, folder = ("instruction", "output"), "llm-adapters-commonsense"
    return DatasetSpec(name, "instruction", fields, stems=stems, folder=folder, choices_after="Answer format: ")


def _glue(subset: str, splits: Mapping[str, str]) -> HubSource:
    return HubSource("nyu-mll/glue", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c", subset, splits)


_TRAIN_TEST = {"train": "train", "test": "test"}
_DEV_AS_TEST = {"train": "train", "test": "validation"}
_WIKITEXT = HubSource("Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3", "wikitext-2-v1")
_IMDB = HubSource("stanfordnlp/imdb", "e6281661ce1c48d982bc483cf8a173c1bbeb5d31", None, _TRAIN_TEST)
_AG_NEWS = HubSource("fancyzhx/ag_news", "eb185aade064a813bc0b7f42de02595523103ca4", None, _TRAIN_TEST)
_COLA, _RTE, _SST2 = (_glue(subset, _DEV_AS_TEST) for subset in ("cola", "rte", "sst2"))
_GSM8K = HubSource("openai/gsm8k", "e53f048856ff4f594e959d75785d2c2d37b678ee", "main", _TRAIN_TEST)
_SECRET = {"stems": _LABELLED_GLUE_STEMS}
_SST2_TEXTS = _labelled("sst2", "sentence", "negative positive", _SST2)
_NEWS = _labelled("ag_news", "text", "world sports business technology", _AG_NEWS)  # title and description, joined

_SPECS = (
    _lm("wikitext-2", hub=_WIKITEXT, line_end_is_word=True, hub_blank_line=" \n"),
    _lm("warandpeace"),
    _lm("wiki-longdocs"),
    _lm("python-topics", embedded=True),
    _lm("python-docstrings", embedded=True),
    _labelled("python-docstring-modules", "text", "text data network concurrency testing system", embedded=True),
    _labelled("imdb", "text", "negative positive", _IMDB),
    _SST2_TEXTS,
    _labelled("mr", "sentence", "negative positive"),
    _labelled("cr", "sentence", "negative positive"),
    _labelled("mpqa", "sentence", "negative positive"),
    _labelled("subj", "sentence", "subjective objective"),
    _labelled("trec", "question", "ABBR DESC ENTY HUM LOC NUM"),
    _NEWS,
    _labelled("cola", "sentence", "unacceptable acceptable", _COLA, **_SECRET),
    _labelled("mrpc", "sentence1 sentence2", "different equivalent", _glue("mrpc", _HUB_SPLITS)),
    _labelled("rte", "sentence1 sentence2", "not_entailment entailment", _RTE, **_SECRET),
    _labelled("qqp-subset", "question1 question2", "different duplicate"),
    _commonsense("arc-e", "arc-easy"),
    _commonsense("arc-c", "arc-challenge"),
    _commonsense("openbookqa", "openbookqa"),
    _commonsense("boolq-without-passages", "boolq"),  # LLM-Adapters asks its questions without their passages
    DatasetSpec("gsm8k", "instruction", ("question", "answer"), hub=_GSM8K, final_answer=r"#### (-?[0-9.,]+)"),
    _prompted(_SST2_TEXTS, "Is the sentiment of this sentence negative or positive?"),
    _prompted(_NEWS, "Is this news article about world, sports, business or technology?"),
)
DATASETS: Mapping[str, DatasetSpec] = {spec.name: spec for spec in _SPECS}


@dataclass(frozen=True)
class DataLocation:
    """Where a data set was found: `files` by split, or else `hub`, or else (embedded) in the running Python."""

    spec: DatasetSpec
    origin: str
    files: Mapping[str, Path] = field(default_factory=dict)
    hub: HubSource | None = None
    looked: tuple[str, ...] = ()


def locate_data(config: DataConfig) -> DataLocation:
    """Find the data set of an experiment.

    Raises:
        ConfigError: The name is unknown, or keys are given that do not fit it.
        UserError: It is on no place of this machine, and the hub may not be asked.
    """
    spec = _dataset_spec(config)
    if spec.embedded:
        return DataLocation(spec, "the running Python's own files")
    files, looked = _find_folder(spec)
    if files:
        return DataLocation(spec, str(files["train"].parent), files, None, tuple(looked))
    if spec.hub is None:
        looked.append("the hub has no copy that this catalog knows")
    elif _offline():
        looked.append(f"hub {spec.hub.repository}: not asked, because HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set")
    else:
        origin = f"hub {spec.hub.repository} {spec.hub.subset or ''}".strip() + f" at {spec.hub.revision}"
        return DataLocation(spec, origin, {}, spec.hub, (*looked, origin))
    raise missing_data(spec, looked)


def task_of(config: DataConfig) -> Task | None:
    """The task of a data set, without looking for it; None where it is unknown."""
    return DATASETS[config.name].task if config.name in DATASETS else config.task


def missing_data(spec: DatasetSpec, looked: Iterable[str]) -> UserError:
    """The error for a data set that is nowhere: where it was looked for, and what to do."""
    hub = f", or let this machine reach the hub ({spec.hub.repository})" if spec.hub else ""
    return UserError(
        f"data set `{spec.name}` not found; looked in: " + "; ".join(looked),
        f"put {spec.path}/{spec.stems['train'][0]}.jsonl or .txt (.xz, .gz) into a folder and set {DATA_VARIABLE} to "
        f"that folder{hub}",
    )


def _dataset_spec(config: DataConfig) -> DatasetSpec:
    """The catalog's entry, or one made from the configuration for a set outside it."""
    given = [key for key in ("task", "text_fields", "label_field", "revision", "subset") if getattr(config, key)]
    if config.name in DATASETS:
        if given:
            raise ConfigError(
                f"data.{given[0]} is for data sets outside the catalog; `{config.name}` is in it", "remove the key"
            )
        return DATASETS[config.name]
    if config.task is None:
        raise ConfigError(
            f"unknown data set `{config.name}`{did_you_mean(config.name, DATASETS)}",
            "for a data set of your own give data.task and data.text_fields; known names: " + ", ".join(DATASETS),
        )
    if config.task == "classification" and config.label_field is None:
        raise ConfigError(
            f"data set `{config.name}` needs data.label_field for classification", "name the field of the label"
        )
    if config.task != "classification" and config.label_field is not None:
        raise ConfigError(f"data.label_field does not go with task {config.task}", "remove the key")
    fields = config.text_fields or (("prompt", "response") if config.task == "instruction" else ("text",))
    if config.task == "instruction" and len(fields) != 2:
        raise ConfigError(
            f"data.text_fields names {len(fields)} fields", "two for instructions: the prompt's and the response's"
        )
    if len(fields) > (1 if config.task == "language_modeling" else 2):
        raise ConfigError(
            f"data.text_fields names {len(fields)} fields", "one field, or two for pairs in classification"
        )
    return DatasetSpec(config.name, config.task, fields, config.label_field, hub=_custom_hub(config))


def _custom_hub(config: DataConfig) -> HubSource | None:
    if not HUB_ID.fullmatch(config.name):
        return None
    if config.revision is None and not _find_folder(DatasetSpec(config.name, config.task or "classification"))[0]:
        raise ConfigError(
            f"hub data set `{config.name}` needs data.revision", "give the commit hash of its hub page (Files)"
        )
    return HubSource(config.name, config.revision, config.subset) if config.revision else None


def _find_folder(spec: DatasetSpec) -> tuple[dict[str, Path], list[str]]:
    """The files by split of the set's folder (empty where there is no training file), and where was looked."""
    root = os.environ.get(DATA_VARIABLE)
    if not root:
        return {}, [f"${DATA_VARIABLE}, which is not set"]
    folder = Path(root).expanduser() / spec.path
    files: dict[str, Path] = {}
    for split in SPLITS:
        candidates = (folder / (stem + ending) for stem in spec.stems[split] for ending in FILE_ENDINGS)
        if path := next((path for path in candidates if path.is_file()), None):
            files[split] = path
    place = f"{folder} ({spec.stems['train'][0]}{{{','.join(FILE_ENDINGS)}}}, from ${DATA_VARIABLE})"
    return (files if "train" in files else {}), [place]


def _offline() -> bool:
    values = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))
    return any(value.upper() in {"1", "ON", "YES", "TRUE"} for value in values)
