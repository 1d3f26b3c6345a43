"""Pruning: exact zeros on schedule under decay and momentum, which weights go, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cpu_graphs import cpu_graphs  # noqa: F401
from pruning_checks import ARMS, FAMILIES, STEPS, assert_zero, built, kept_units, masks_of, method_of, prune
from pydantic import ValidationError
from test_composition import LLAMA
from torch import Tensor
from training_fixtures import LORA, NOTES, assemble_run, build_run, experiment

from loras_bench.build import Build, build_methods
from loras_bench.counting import count_training
from loras_bench.errors import ConfigError
from loras_bench.methods.pruning import PruneConfig
from loras_bench.training import plan_batches

pytestmark = pytest.mark.usefixtures("places")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arm", ARMS)
def test_zeros_follow_the_schedule_and_stay_zero(family: str, arm: str) -> None:
    """Under decay and momentum, in bfloat16 with masters; exact to the weight, and in each row for wanda."""
    run = built(family, model={"dtype": "bfloat16"}, **ARMS[arm])
    assert run.plan.steps == STEPS
    before = masks_of(run)
    assert not any(mask.any() for mask in before)
    for step in range(STEPS):
        assert torch.isfinite(run.loop.step(step))
        assert_zero(run)
        taken = step + 1
        for block, old in zip(method_of(run).blocks, before, strict=True):
            assert not (old & ~block.pruned).any()
            if taken in (2, 4, 6):
                share = 0.5 * (1 - (1 - taken / 6) ** 3)
                mask = block.pruned if block.pruned.ndim == 1 else block.matrix.by_outputs(block.pruned)
                groups = mask if arm == "wanda" else mask.reshape(1, -1)
                assert groups.sum(dim=1).tolist() == [round(share * groups.shape[1])] * len(groups)
            else:
                assert torch.equal(block.pruned, old)
        before = masks_of(run)
    if arm == "2:4":
        blocks = method_of(run).blocks
        fours = [block.matrix.by_outputs(block.matrix.weight).reshape(-1, 4) for block in blocks]
        assert {int(n) for four in fours for n in (four == 0).sum(dim=1)} == {2}


def test_what_is_left_trains_as_by_hand() -> None:
    """Against torch's AdamW on masked gradients, clipped by the norm of what is left."""
    run = built("llama", score="magnitude", end=0, training={"max_grad_norm": 0.05, "warmup_fraction": 0.0})
    plain = build_run(experiment(**FAMILIES["llama"], training={"tokens": STEPS * 128, "weight_decay": 0.1}))
    masks: dict[str, Tensor] = {}
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    for block in method_of(run).blocks:
        masks |= {names[id(parameter)]: ~block.pruned.view(shape) for parameter, shape in block.places}
    assert len(masks) == 1 + 3 * 2
    named = dict(plain.model.named_parameters())
    for name, mask in masks.items():
        named[name].data.mul_(mask)
    decays = [[p for p in named.values() if p.ndim >= 2], [p for p in named.values() if p.ndim < 2]]
    groups = [{"params": params, "weight_decay": decay} for params, decay in zip(decays, (0.1, 0.0), strict=True)]
    config = plain.loop.config
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=1e-8)
    for step in range(3):
        run.loop.step(step)
        (batch,) = plan_batches(plain.data, plain.plan, step)
        loss_sum, _ = plain.objective(**batch)
        optimizer.zero_grad()
        (loss_sum / plain.data.target_count("train", plain.plan.indices(step))).backward()
        for name, mask in masks.items():
            named[name].grad *= mask  # type: ignore[operator]
        assert torch.nn.utils.clip_grad_norm_(named.values(), 0.05) > 0.05
        for group in optimizer.param_groups:
            group["lr"] = float(run.optimizer.groups[0].rate)
        optimizer.step()
        for name, mask in masks.items():
            named[name].data.mul_(mask)
    for name, parameter in run.model.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lowest_are_those_that_go(family: str) -> None:
    """At once, before training: the magnitudes that are left are the larger ones, and those of the loaded model."""
    run = built(family, score="magnitude", end=0, sparsity=0.25, scope=["feed_forward", "attention"])
    dense = build_run(experiment(**FAMILIES[family]))
    loaded = dict(dense.model.named_parameters())
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    assert len(method_of(run).blocks) == {"gpt2": 4, "llama": 7, "bert": 6}[family] * 2
    for block in method_of(run).blocks:
        old = loaded[names[id(block.matrix.weight)]].detach()
        assert torch.equal(block.matrix.weight, old * ~block.pruned)
        assert int(block.pruned.sum()) == old.numel() // 4
        assert old[block.pruned].abs().max() <= old[~block.pruned].abs().min()
    touched = {names[id(block.matrix.weight)] for block in method_of(run).blocks}
    rest = [torch.equal(run.model.get_parameter(name), loaded[name]) for name in loaded if name not in touched]
    assert len(rest) > 4 and all(rest)


def test_fpp_keeps_what_the_inputs_use_and_wanda_compares_it_within_an_output() -> None:
    scope = ["attention"]
    fpp, wanda = (built("llama", score=score, end=0, scope=scope) for score in ("fpp", "wanda"))
    dense = dict(build_run(experiment(**FAMILIES["llama"])).model.named_parameters())
    for one, other in zip(method_of(fpp).blocks, method_of(wanda).blocks, strict=True):
        assert one.norm_i is not None and other.norm_i is not None
        torch.testing.assert_close(one.norm_i, other.norm_i)
        score_oi = dense[f"{one.matrix.name}.weight"].abs() * one.norm_i
        cut = score_oi.flatten().sort().values[score_oi.numel() // 2]
        assert torch.equal(one.pruned, score_oi < cut)
        assert torch.equal(other.pruned, score_oi < score_oi.sort(dim=1).values[:, [score_oi.shape[1] // 2]])


@pytest.mark.parametrize("arm", ["units", "moving units", "movement"])
def test_micro_batches_and_their_gradients_sum_to_the_movement(arm: str) -> None:
    run = built("llama", start=0.9, end=1, training={"micro_batch_size": 2}, **ARMS[arm])
    count_training(run, torch.device("cpu"))  # passes that are no steps
    sums = {id(parameter): torch.zeros_like(parameter) for parameter in run.model.parameters()}
    for step in range(3):
        before = {id(parameter): parameter.detach().clone() for parameter in run.model.parameters()}
        run.loop.config = run.loop.config.model_copy(update={"max_grad_norm": 1e9})
        run.loop.step(step)
        for parameter, gradient in zip(run.optimizer.parameters, run.optimizer.gradients, strict=True):
            sums[id(parameter)] -= gradient * before[id(parameter)]
    for block in method_of(run).blocks:
        if arm == "units":
            assert block.movement is None
            continue
        expected = sum(
            sums[id(parameter)].sum_to_size(shape).view(block.pruned.shape) for parameter, shape in block.places
        )
        assert isinstance(expected, Tensor) and block.movement is not None and expected.abs().max() > 1e-6
        torch.testing.assert_close(block.movement, expected, rtol=1e-3, atol=1e-7)


def test_unused_embeddings_go_first_and_the_training_loss_stays() -> None:
    """Whole rows, of a model whose output layer is not tied to them."""
    dense = build_run(experiment(**FAMILIES["llama"]))
    used = torch.cat([batch["input_ids"].unique() for batch in everything(dense)]).unique()
    rows = dense.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    unused = 1 - len(used) / rows
    assert 0.1 < unused < 0.95
    run = built("llama", scope=["embeddings"], pattern="structured", end=0, sparsity=unused)
    kept = kept_units(run)
    assert list(kept) == ["model.embed_tokens"] and torch.equal(kept["model.embed_tokens"], used)
    for batch in everything(dense):
        assert torch.equal(run.objective(**batch)[0], dense.objective(**batch)[0])
    one_more = built("llama", scope=["embeddings"], pattern="structured", end=0, sparsity=unused + 1.01 / rows)
    (left,) = kept_units(one_more).values()
    assert len(left) == len(used) - 1 and set(left.tolist()) < set(used.tolist())


def everything(run: Build) -> list[dict[str, Tensor]]:
    return [run.data.collate("train", [row]) for row in range(run.data.rows("train"))]


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_units_can_be_cut_out(family: str) -> None:
    """A feed-forward layer without its pruned units, built of what is left, computes the same."""
    run = built(family, scope=["feed_forward"], pattern="structured", sparsity=0.4)
    for step in range(STEPS):
        run.loop.step(step)
    model = run.model.eval()
    kept = kept_units(run)
    assert len(kept) == 2
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    for block in method_of(run).blocks:
        units = kept[block.matrix.name]
        total = block.matrix.by_outputs(block.matrix.weight).shape[1]
        assert len(units) == total - round(0.4 * total)
        layer = block.matrix.name.removesuffix(
            {"llama": ".down_proj", "gpt2": ".c_proj", "bert": ".output.dense"}[family]
        )
        parent = model.get_submodule(layer)
        if family == "llama":
            whole = parent(hidden)
            gate, up, down = (getattr(parent, f"{name}_proj").weight for name in ("gate", "up", "down"))
            cut = (torch.nn.functional.silu(hidden @ gate[units].T) * (hidden @ up[units].T)) @ down[:, units].T
        elif family == "gpt2":
            whole = parent(hidden)
            inner = parent.act(hidden @ parent.c_fc.weight[:, units] + parent.c_fc.bias[units])
            cut = inner @ parent.c_proj.weight[units] + parent.c_proj.bias
        else:
            up, down = parent.intermediate.dense, parent.output.dense
            whole = down(parent.intermediate(hidden))
            inner = parent.intermediate.intermediate_act_fn(hidden @ up.weight[units].T + up.bias[units])
            cut = inner @ down.weight[:, units].T + down.bias
        torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": 0.0}, "greater than 0"),
        ({"scope": ["heads"]}, "feed_forward"),
        ({"scope": []}, "at least 1"),
        ({"scope": ["attention", "attention"]}, "twice"),
        ({"start": 0.8, "end": 0.2}, "after"),
        ({"score": "movement", "end": 0}, "none before"),
        ({"pattern": "2:4", "scope": ["attention"], "sparsity": 0.4}, "0.5"),
        ({"pattern": "2:4"}, "looked up"),
        ({"pattern": "structured", "scope": ["attention"]}, "hidden units"),
        ({"pattern": "structured", "score": "wanda"}, "`wanda`"),
    ],
)
def test_impossible_requests_are_errors_of_the_configuration(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PruneConfig.model_validate(prune(**options))


SLICED = {"kind": "sparse_lora", "layers": {"0-1": {"attention": 0.5}}, "tokens": "all"}


@pytest.mark.parametrize(
    ("options", "others", "words"),
    [
        ({}, [prune()], "`prune` is listed twice"),
        ({}, [LORA, SLICED], "`sparse_lora` estimates channels"),
        ({"score": "movement"}, [LORA], "`lora` freezes them"),
        ({}, [LORA | {"train_embeddings": True}], "a copy of the embeddings"),
        ({}, [LORA | {"variant": "dora"}], "`variant: dora` of `lora` rescales"),
    ],
)
def test_conflicts_are_refused_before_any_work(options: dict[str, Any], others: list[Any], words: str) -> None:
    made = experiment(**FAMILIES["llama"], methods=[prune(**options), *others])
    config = assemble_run(experiment(**FAMILIES["llama"])).model.config  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=words):
        build_methods(made, config)


def test_two_of_four_needs_groups_of_four() -> None:
    odd = LLAMA | {"architecture": LLAMA["architecture"] | {"intermediate_size": 78}}
    method = prune(pattern="2:4", scope=["feed_forward"])
    with pytest.raises(ConfigError, match="down_proj has 78 inputs"):
        assemble_run(experiment(data=NOTES, model=odd, methods=[method]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 0.999, "pattern": "structured"}, r"prunes 80 of the 80 units in model.layers.0.mlp.down_proj"),
        ({"sparsity": 0.001, "pattern": "structured"}, r"prunes 0 of the 80 units"),
        ({"sparsity": 1e-4}, r"prunes 0 of the 2560 weights that are compared in model.layers.0.mlp.gate_proj"),
        ({"sparsity": 0.99, "score": "wanda"}, r"prunes 32 of the 32 weights that are compared"),
    ],
    ids=str,
)
def test_sparsities_that_come_to_nothing_or_all_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        assemble_run(experiment(**FAMILIES["llama"], methods=[prune(scope=["feed_forward"], **options)]))


def test_the_least_and_the_most_that_can_be_pruned() -> None:
    for sparsity, count in ((0.0063, 1), (0.9937, 79)):
        run = built("llama", scope=["feed_forward"], pattern="structured", end=0, sparsity=sparsity)
        assert [int(mask.sum()) for mask in masks_of(run)] == [count] * 2
