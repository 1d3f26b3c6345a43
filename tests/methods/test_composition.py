"""Every pair of methods in every cell of the matrix of docs/methods.md: it works, or is refused with the reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from training_fixtures import HALF_WINDOW, LLAMA, LORA, MOODS, NOTES, WINDOW, build_run, digests, experiment

from loras_bench.build import Build
from loras_bench.errors import ConfigError
from loras_bench.evaluation import evaluate
from loras_bench.methods import METHODS
from loras_bench.methods.lora import Lora, LoraConfig
from loras_bench.methods.pruning import Prune

pytestmark = pytest.mark.usefixtures("places")

DOCUMENT = Path(__file__).parents[2] / "docs" / "methods.md"
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"data": NOTES},
    "llama": {"data": NOTES, "model": LLAMA},
    "bert": {"data": MOODS},
}


def config_of(kind: str, family: str) -> dict[str, Any]:
    sparse = HALF_WINDOW if family == "bert" else WINDOW
    sliced = {"kind": "sparse_lora", "layers": {"0-1": {"attention": 0.5, "feed_forward": 0.75}}, "rank": 4}
    return {
        "fold": {"kind": "fold", "calibration_tokens": 64},
        "lora": LORA,
        "prune": {"kind": "prune", "sparsity": 0.5, "end": 0},  # at once: adapters find a base that changes no more
        "sparse_attention": sparse,
        "sparse_lora": sliced | {"tokens": "all", "start": 0},
        "svd": {"kind": "svd"},
    }[kind]


def built(family: str, *methods: dict[str, Any], **sections: Any) -> Build:
    made = experiment(**MODELS[family], methods=list(methods), **sections)
    return build_run(made)


def matrix() -> dict[tuple[str, str], str]:
    """The table under "Pairs of methods": {(row, column): cell}."""
    section = DOCUMENT.read_text(encoding="utf-8").split("## Pairs of methods")[1].split("\n## ")[0]
    rows = [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for line in re.findall(r"^\|.*\|$", section, re.M)
    ]
    header, _, *body = rows
    return {(row[0], column): cell for row in body for column, cell in zip(header[1:], row[1:], strict=True)}


def test_the_matrix_names_every_method() -> None:
    assert set(matrix()) == {(row, column) for row in METHODS for column in METHODS}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("pair", [(row, column) for row in METHODS for column in METHODS], ids="+".join)
def test_each_cell_of_the_matrix(pair: tuple[str, str], family: str) -> None:
    """Works: a real step with a finite loss that changes what the methods train, and nothing else. Refused: with the
    reason that the cell gives.
    """
    cell = matrix()[pair]
    methods = [config_of(kind, family) for kind in pair]
    if cell.startswith("works for Llama: ") and family != "llama":
        with pytest.raises(ConfigError, match="Llama"):
            built(family, *methods)
        return
    if cell.startswith("refused: "):
        with pytest.raises(ConfigError) as raised:
            built(family, *methods)
        assert cell.removeprefix("refused: ").strip("`") in f"{raised.value.message}; {raised.value.hint}".replace(
            "`", ""
        )
        return
    assert cell.startswith("works")
    check_a_step(built(family, *methods), set(pair))


def check_a_step(run: Build, kinds: set[str]) -> None:
    parameters = dict(run.model.named_parameters())
    expected = {
        name for name in parameters if "lora" not in kinds or ".lora_" in name or ".classifier.modules_to_save" in name
    }
    assert {name for name, parameter in parameters.items() if parameter.requires_grad} == expected
    before, buffers = digests(parameters), digests(dict(run.model.named_buffers()))
    losses = [run.loop.step(step) for step in range(2)]  # A of an adapter moves once B is no longer zero
    assert torch.isfinite(torch.stack(losses)).all()
    after = digests(parameters)
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= expected
    # keys have no bias that matters: a softmax does not see a shift, so its gradient is zero but for rounding
    assert {name for name in expected - changed if "key.bias" not in name} == set()
    assert digests(dict(run.model.named_buffers())) == buffers
    sparse = "sparse_attention" in kinds
    assert {pattern.kind for pattern in run.attention.patterns} == {"window" if sparse else "dense"}
    for name, value in evaluate(run.objective, run.data, "test", 4, run.accelerator).items():
        assert value == value, name


@pytest.mark.parametrize("family", MODELS)
def test_dora_is_refused_beside_prune(family: str) -> None:
    """And on what an earlier run pruned: its magnitudes of whole units would be 0 / 0."""
    assert "no DoRA" in matrix()["prune", "lora"]
    dora, units = LORA | {"variant": "dora"}, config_of("prune", family) | {"pattern": "structured"}
    for methods in ([dora, units], [config_of("prune", family), dora]):
        with pytest.raises(ConfigError, match="`variant: dora`"):
            built(family, *methods)
    with pytest.raises(ConfigError, match=r"has outputs without any \(pruned units\)"):
        Lora(LoraConfig.model_validate(dora)).prepare(built(family, units).model)
    outline = built(family).model.to("meta")
    Lora(LoraConfig.model_validate(dora)).resize(outline)  # where there are no weights to look at


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("kind", [None, *(kind for kind in METHODS if kind != "sparse_lora")])
def test_each_method_alone(kind: str | None, family: str) -> None:
    methods = [] if kind is None else [config_of(kind, family)]
    check_a_step(built(family, *methods), {kind} if kind else set())


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("options", [{}, {"variant": "dora"}, {"targets": "attention", "dropout": 0.1}], ids=str)
def test_the_order_of_listing_does_not_matter(family: str, options: dict[str, Any]) -> None:
    lora, sparse = LORA | options, config_of("sparse_attention", family)
    runs = [built(family, *methods) for methods in ((lora, sparse), (sparse, lora))]
    losses = []
    for run in runs:
        torch.manual_seed(7)
        losses.append([float(run.loop.step(step)) for step in range(3)])
    assert losses[0] == losses[1]
    assert digests(dict(runs[0].model.named_parameters())) == digests(dict(runs[1].model.named_parameters()))


@pytest.mark.parametrize("family", MODELS)
def test_lora_s_is_lora_with_a_window_and_nothing_more(family: str) -> None:
    """A window that covers the whole length: the same losses and weights as LoRA on dense attention."""
    wide = {"half_width": 64} if family == "bert" else {"window": 64}
    covering = {"kind": "sparse_attention", "pattern": {"kind": "window"} | wide}
    narrow = config_of("sparse_attention", family)
    lora, lora_s, other = (built(family, *methods) for methods in ([LORA], [LORA, covering], [LORA, narrow]))
    for step in range(4):
        expected, different = lora.loop.step(step), other.loop.step(step)
        torch.testing.assert_close(lora_s.loop.step(step), expected, rtol=1e-4, atol=1e-5)
    assert expected != different, "a narrow one changes the result"


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("extra", [{"gradient_checkpointing": True}, {"micro_batch_size": 2}], ids=str)
def test_compositions_bear_the_switches_of_training(family: str, extra: dict[str, Any]) -> None:
    methods = [LORA, config_of("sparse_attention", family)]
    plain, switched = built(family, *methods), built(family, *methods, training=extra)
    for step in range(3):
        torch.testing.assert_close(switched.loop.step(step), plain.loop.step(step), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kinds", [("lora", "sparse_attention", "sparse_lora"), ("fold", "lora", "prune")], ids="+".join
)
def test_three_go_together(kinds: tuple[str, ...]) -> None:
    check_a_step(built("llama", *(config_of(kind, "llama") for kind in kinds)), set(kinds))


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("first", ["fold", "svd"])
def test_pruned_attention_is_what_smaller_modules_leave_of_it(first: str, family: str) -> None:
    """In either order of listing: output projections alone, nothing of what was replaced."""
    prune = config_of("prune", family) | {"scope": ["attention"]}
    for methods in ([config_of(first, family), prune], [prune, config_of(first, family)]):
        run = built(family, *methods)
        pruned = [block.matrix for method in run.methods if isinstance(method, Prune) for block in method.blocks]
        last = {"gpt2": "attn.c_proj", "llama": "self_attn.o_proj", "bert": "attention.output.dense"}[family]
        assert [matrix.name.endswith(last) for matrix in pruned] == [True, True]
        assert all(matrix.module is run.model.get_submodule(matrix.name) for matrix in pruned)
        assert all(int((matrix.weight == 0).sum()) == matrix.weight.numel() // 2 for matrix in pruned)
        check_a_step(run, {first, "prune"})


def test_the_composition_trains_in_bfloat16_too() -> None:
    made = experiment(data=NOTES, model=LLAMA | {"dtype": "bfloat16"}, methods=[LORA, WINDOW])
    run = build_run(made)
    exact = built("llama", LORA, WINDOW)
    for step in range(4):
        assert float(run.loop.step(step)) == pytest.approx(float(exact.loop.step(step)), rel=0.02)
