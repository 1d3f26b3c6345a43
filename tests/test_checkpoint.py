"""Snapshots and checkpoints: everything that a step changes comes back, and a kill at any moment leaves a whole one."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from loras_bench import checkpoint
from loras_bench.checkpoint import TrainingState, load_checkpoint, remove_checkpoint, save_checkpoint
from loras_bench.methods.base import Method, Stage
from loras_bench.optimizer import MasterAdamW


class Counter(Method):
    """A method with a tensor of its own, such as a mask or a multiplier."""

    stage = Stage.SPARSIFY

    def __init__(self):
        self.count = torch.zeros(2)

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count.copy_(state["count"])


class Trained:
    """A small model with dropout, so that a step depends on weights, moments, method and random numbers."""

    def __init__(self, dtype):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.methods = [Counter(), Counter()]
        self.optimizer = MasterAdamW(self.model, [], 1e-2, 0.01, (0.9, 0.999), dtype)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)
        self.state = TrainingState(self.optimizer, self.methods, torch.device("cpu"))
        self.dtype = dtype

    def steps(self, number):
        losses = []
        for _ in range(number):
            loss = self.model(torch.ones(3, 4, dtype=self.dtype)).square().mean()
            loss.backward()
            self.optimizer.collect_gradients(first=True)
            self.optimizer.set_rate(1.0)
            self.optimizer.step(1.0)
            for index, method in enumerate(self.methods):
                method.count += index + 1
            losses.append(float(loss.detach()))
        return losses


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def trained(request):
    return Trained(request.param)


def everything(trained):
    state = {name: tensor.clone() for name, tensor in trained.state.tensors().items()}
    return state | {f"model.{name}": tensor.clone() for name, tensor in trained.model.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_steps_after_a_snapshot_are_undone_by_it(trained):
    trained.steps(2)
    before, snapshot = everything(trained), trained.state.snapshot()
    expected = trained.steps(3)
    assert not torch.equal(everything(trained)["method.1.count"], before["method.1.count"])
    trained.state.restore(snapshot)
    assert_equal(everything(trained), before)
    assert trained.steps(3) == expected


def test_a_snapshot_before_the_first_step_can_be_restored(trained):
    """Warm-up is undone before any step of the run: the moments must go back to nothing."""
    snapshot = trained.state.snapshot()
    expected = Trained(trained.dtype).steps(3)
    torch.set_rng_state(snapshot["random.cpu"])
    trained.steps(4)
    trained.state.restore(snapshot)
    assert trained.steps(3) == expected


def test_a_checkpoint_takes_a_fresh_process_to_the_same_steps(trained, tmp_path):
    trained.steps(2)
    save_checkpoint(tmp_path, trained.state.tensors(), {"step": 2, "losses": [1.5]})
    expected = trained.steps(3)

    fresh = Trained(trained.dtype)
    facts, tensors = load_checkpoint(tmp_path)
    fresh.state.restore(tensors)
    assert (facts["step"], facts["losses"]) == (2, [1.5])
    assert fresh.steps(3) == expected
    assert_equal(everything(fresh), everything(trained))


def test_only_the_newest_checkpoint_is_kept_and_removal_leaves_nothing(trained, tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, trained.state.tensors(), {"step": step})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.json", "step3-checkpoint.safetensors"]
    (tmp_path / ".step4-checkpoint.safetensors.tmp").touch()  # what a kill may leave
    (tmp_path / ".checkpoint.json.tmp").touch()
    remove_checkpoint(tmp_path)
    assert list(tmp_path.iterdir()) == []
    remove_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path) is None


@pytest.mark.parametrize("moment", range(4))
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(trained, tmp_path, monkeypatch, moment):
    """The four writes and renames of the second save fail one after the other; in between, the process is gone."""
    trained.steps(1)
    save_checkpoint(tmp_path, trained.state.tensors(), {"step": 1})
    first = trained.state.snapshot()
    trained.steps(1)

    calls = iter(range(4))

    def dying(function):
        def call(*arguments, **options):
            if next(calls) == moment:
                raise KeyboardInterrupt
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", dying(checkpoint.save_file))
        patch.setattr(checkpoint.os, "replace", dying(checkpoint.os.replace))
        patch.setattr(checkpoint.Path, "write_text", dying(checkpoint.Path.write_text))
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, trained.state.tensors(), {"step": 2})

    facts, tensors = load_checkpoint(tmp_path)
    assert facts["step"] == 1
    assert_equal(tensors, first)
    save_checkpoint(tmp_path, trained.state.tensors(), {"step": 2})
    assert load_checkpoint(tmp_path)[0]["step"] == 2


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", "{}", '{"tensors": "absent.safetensors"}', '{"tensors": 3}'])
def test_damaged_facts_count_as_no_checkpoint(trained, tmp_path, damage):
    save_checkpoint(tmp_path, trained.state.tensors(), {"step": 1})
    (tmp_path / "checkpoint.json").write_text(damage)
    assert load_checkpoint(tmp_path) is None


@pytest.mark.parametrize("keep", [0, 5, 100])
def test_truncated_tensors_count_as_no_checkpoint(trained, tmp_path, keep):
    save_checkpoint(tmp_path, trained.state.tensors(), {"step": 1})
    file = tmp_path / json.loads((tmp_path / "checkpoint.json").read_text())["tensors"]
    file.write_bytes(file.read_bytes()[:keep])
    assert load_checkpoint(tmp_path) is None
