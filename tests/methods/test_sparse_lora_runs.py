"""SparseLoRA in the step loop: what changes and what must not, switches of training, captured steps, FLOPs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_graphs import Tape, cpu_graphs  # noqa: F401
from sparse_lora_checks import PromptRows, adapted, batch_of, method, sparsity_of, with_tensors
from torch import Tensor, nn
from training_fixtures import GPT2, LORA, MOODS, NOTES, WIDTH, build_run, digests, experiment, make_loop, token_ids

from loras_bench.attention.dispatch import ModelAttention
from loras_bench.attention.patterns import Window
from loras_bench.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from loras_bench.counting import count_training
from loras_bench.data import IGNORED
from loras_bench.evaluation import evaluate
from loras_bench.graphed import Graphs, shapes_of
from loras_bench.metering.flops import MatmulCounter
from loras_bench.methods import sparse_lora
from loras_bench.methods.sparse_lora import SparseLora
from loras_bench.models.objective import Objective, unwrapped
from loras_bench.training import Loop, StepPlan, plan_batches
from loras_bench.warmup import steady_steps, warm_up

pytestmark = pytest.mark.usefixtures("places")

STEPS = 3
BOTH = pytest.mark.parametrize("implementation", ["transformers", "fused"])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the few tokens of these batches would all be dense."""
    monkeypatch.setattr(sparse_lora, "ROW_MULTIPLE", 4)


def loop_of(
    implementation: str = "transformers",
    sparse: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    rows: tuple[int, int] = (2, 2),
    graphed: bool = False,
    checkpointing: bool = False,
    pattern: Window | None = None,
    device: str = "cpu",
) -> Loop:
    """Three steps, the first dense, with prompts of several lengths. Without `sparse` plain LoRA.

    `rows` are those of a step and of a micro-batch.
    """
    model = adapted(device=device)
    base = unwrapped(model).base_model
    if pattern is not None:
        ModelAttention.of(model).set_patterns([pattern] * 2)
    methods: list[SparseLora] = []
    if sparse is not None:
        methods = [method(**{"start": 0.3} | sparse)]
        methods[0].prepare(model)
        methods[0].plan(STEPS)
    if checkpointing:
        unwrapped(model).gradient_checkpointing_enable({"use_reentrant": False})
        unwrapped(model).disable_input_require_grads()
    data = PromptRows(token_ids(12, 16), prompts=[9, 3, 13] * 4)
    loop = make_loop(model, data, StepPlan(12, *rows, STEPS, 0), methods, dtype, device, graphed)
    if implementation == "fused":
        pytest.importorskip("triton")
        from loras_bench.models.fused_llama import FusedLlama

        FusedLlama.install(base)
    return loop


def model_of(loop: Loop) -> Any:
    return loop.objective.model


def train(loop: Loop, start: int = 0, stop: int = STEPS) -> list[Tensor]:
    return [loop.step(step) for step in range(start, stop)]


@BOTH
def test_only_adapters_change_and_the_dense_steps_are_loras(implementation: str) -> None:
    sparse, plain = loop_of(implementation, {}), loop_of(implementation)
    before = digests(dict(model_of(sparse).named_parameters()))
    losses, expected = train(sparse), train(plain)
    assert losses[0] == expected[0]
    assert all(a != b for a, b in zip(losses[1:], expected[1:], strict=True))
    after = digests(dict(model_of(sparse).named_parameters()))
    assert {name for name in before if before[name] != after[name]} == {name for name in before if ".lora_" in name}


@BOTH
def test_evaluation_and_merged_weights_are_plain_loras(implementation: str) -> None:
    """In the midst of sparse steps; the same adapters in a model that was never sparse."""
    sparse, plain = loop_of(implementation, {}), loop_of(implementation)
    train(sparse)
    assert sparsity_of(model_of(sparse)).tokens is not None
    model_of(plain).load_state_dict(model_of(sparse).state_dict())
    got, expected = (evaluate(loop.objective, loop.data, "test", 4, loop.accelerator) for loop in (sparse, plain))
    assert got == expected
    model_of(sparse).train()
    for loop in (sparse, plain):
        if "forward" in (place := vars(unwrapped(model_of(loop)).base_model)):
            place["forward"].__self__.remove()
    (one,) = sparse.methods
    merged, other = (model.merge_and_unload() for model in (one.finish(model_of(sparse)), model_of(plain)))
    assert digests(merged.state_dict()) == digests(other.state_dict())
    ids_bs = token_ids(2, 8)
    assert torch.equal(merged(input_ids=ids_bs).logits, other(input_ids=ids_bs).logits)


CRITERIA = pytest.mark.parametrize(
    ("criterion", "implementation"), [("svd", "transformers"), ("random", "transformers"), ("svd", "fused")]
)


@CRITERIA
def test_checkpointing_recomputes_the_same_channels(criterion: str, implementation: str) -> None:
    plain, recomputed = (loop_of(implementation, {"criterion": criterion}, checkpointing=on) for on in (False, True))
    torch.testing.assert_close(train(recomputed), train(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("criterion", ["svd", "random"])
def test_a_resumed_run_takes_the_same_steps(criterion: str, tmp_path: Path) -> None:
    """Nothing of the method is in a checkpoint: regimes and random channels are functions of the step."""
    first = loop_of(sparse={"criterion": criterion})
    begun = train(first, stop=2)
    save_checkpoint(tmp_path, TrainingState(first.optimizer, first.methods, first.device).tensors(), {"step": 2})
    expected = [*begun, *train(first, 2)]
    second = loop_of(sparse={"criterion": criterion})
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None and not any(name.startswith("method") for name in loaded[1])
    TrainingState(second.optimizer, second.methods, second.device).restore(loaded[1])
    assert [*begun, *train(second, 2)] == expected


def test_micro_batches_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """With channels that depend on the step alone, the parts of a step are those of the whole one."""
    monkeypatch.setattr(sparse_lora, "ROW_MULTIPLE", 1)
    whole, parts = (loop_of(sparse={"criterion": "random"}, rows=(4, rows)) for rows in (4, 1))
    torch.testing.assert_close(train(parts), train(whole), rtol=1e-4, atol=1e-5)


@BOTH
def test_bfloat16_follows_float32(implementation: str) -> None:
    rough, exact = loop_of(implementation, {}, dtype=torch.bfloat16), loop_of(sparse={})
    for mine, other in zip(train(rough), train(exact), strict=True):
        assert float(mine) == pytest.approx(float(other), rel=0.05)


def test_sparse_attention_goes_with_it() -> None:
    window = Window(kind="window", window=4, global_tokens=1)
    expected = train(loop_of(sparse={}, pattern=window))
    torch.testing.assert_close(train(loop_of("fused", {}, pattern=window)), expected, rtol=1e-4, atol=1e-5)
    assert all(a != b for a, b in zip(train(loop_of(sparse={})), expected, strict=True))


@pytest.mark.usefixtures("cpu_graphs")
@pytest.mark.parametrize("criterion", ["svd", "random"])
def test_replayed_steps_choose_channels_anew(criterion: str) -> None:
    """Bit for bit the eager steps, with micro-batches of several shapes."""
    eager, graphed = (loop_of(sparse={"criterion": criterion}, rows=(3, 1), graphed=on) for on in (False, True))
    assert train(graphed) == train(eager)
    ours, theirs = (digests(dict(model_of(loop).named_parameters())) for loop in (graphed, eager))
    assert ours == theirs
    assert len({shapes_of(batch) for batch in batches(graphed)}) > 1


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_steps_captured_on_a_gpu_are_the_eager_steps(dtype: torch.dtype, implementation: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    settings: dict[str, Any] = {"sparse": {"criterion": "random"}, "rows": (3, 1), "dtype": dtype, "device": "cuda"}
    graphed, eager = (train(loop_of(implementation, graphed=on, **settings)) for on in (True, False))
    torch.testing.assert_close(graphed, eager, rtol=1e-4 if dtype is torch.float32 else 2e-2, atol=1e-4)


def batches(loop: Loop) -> list[dict[str, Tensor]]:
    return [batch for step in range(STEPS) for batch in plan_batches(loop.data, loop.plan, step, methods=loop.methods)]


LLAMA = GPT2 | {
    "architecture": {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": WIDTH, "num_attention_heads": 4,
                     "num_key_value_heads": 2, "intermediate_size": 80}
}  # fmt: skip
SPARSE = {"kind": "sparse_lora", "layers": {"0-1": {"attention": 0.75, "feed_forward": 0.9}}, "rank": 4}


def run_of(*methods: dict[str, Any], steps: int = 3) -> Any:
    """Blocks of language modelling, so that every token has a label: all are sparse, after one dense step in three."""
    return build_run(experiment(data=NOTES, model=LLAMA, methods=[LORA, *methods], training={"tokens": 128 * steps}))


@pytest.mark.usefixtures("cpu_graphs")
def test_warm_up_records_both_regimes() -> None:
    run = run_of(SPARSE | {"tokens": "all", "start": 0.3}, steps=4)
    run.loop.graphs = Graphs(run.loop.device)
    warm_up(run, lambda phase: None)
    recorded = Tape.recorded
    for step in range(4):
        run.loop.step(step)
    assert Tape.recorded == recorded == 4, "a step and its update, dense and sparse; nothing in `train`"
    stepped: list[int] = []
    step = run.loop.step
    run.loop.step = lambda number: stepped.append(number) or step(number)
    steady_steps(run, 0.2, lambda phase: None)
    assert set(stepped) == {2, 3}, "what the steps of a long run are"


@pytest.mark.usefixtures("cpu_graphs")
def test_a_run_measures_its_channels_and_goes_on_with_them(tmp_path: Path) -> None:
    """Built, captured, and taken up from a checkpoint by a run that measured something else."""
    settings = SPARSE | {"tokens": "all", "start": 0.3, "criterion": "measured"}
    first, other, eager = (run_of(settings | {"calibration_tokens": count}, steps=4) for count in (64, 512, 64))
    (measured,) = (method.state_dict() for method in first.methods if isinstance(method, SparseLora))
    assert len(measured) == 6 and all(bool((score_c > 0).all()) for score_c in measured.values())
    for run in (first, other):
        run.loop.graphs = Graphs(run.loop.device)
        warm_up(run, lambda phase: None)
    expected = [eager.loop.step(step) for step in range(4)]
    begun = [first.loop.step(step) for step in range(2)]
    save_checkpoint(tmp_path, first.state.tensors(), {"step": 2})
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    other.state.restore(loaded[1])
    assert [*begun, *(other.loop.step(step) for step in (2, 3))] == expected


def test_a_classifier_measures_the_same_packed_and_padded() -> None:
    settings = SPARSE | {"tokens": "all", "criterion": "measured"}
    found = []
    for packing in ("padded", "packed"):
        made = experiment(data=MOODS | {"packing": packing}, model=LLAMA, methods=[LORA, settings])
        (measured,) = (one.state_dict() for one in build_run(made).methods if isinstance(one, SparseLora))
        found.append(measured)
    assert found[0].keys() == found[1].keys() and len(found[0]) == 6
    for name, score_c in found[0].items():
        torch.testing.assert_close(found[1][name], score_c, rtol=1e-4, atol=1e-5)


def test_the_flops_of_a_run_are_those_of_its_regimes() -> None:
    """One dense step in three; by hand what context tokens leave out, and what estimators cost."""
    dense, sparse = run_of(), run_of(SPARSE | {"tokens": "all"})
    flops = [count_training(run, torch.device("cpu"))[0].linear for run in (dense, sparse)]
    tokens, layers, r = 128, 2, 4
    q, kv, inner, keep_kv, keep_inner = 32, 16, 80, 4, 8
    # forward and dX of each frozen weight; the first layer's q, k and v have no dX
    weights = {"qkv": q + 2 * kv, "o": q, "ffn": 3 * inner}
    kept = {"qkv": 2 * keep_kv + 2 * keep_kv, "o": 2 * keep_kv, "ffn": 3 * keep_inner}
    left_out = sum((weights[name] - kept[name]) * WIDTH * (2 * layers - (name == "qkv")) for name in weights)
    samples = 4
    low = 3 * r  # z = x A of q, k and v side by side, z^T z, and that times the factor of all outputs
    attention = tokens * low * (WIDTH + low) + (q + 2 * kv) * low * low
    low = 2 * r  # of gate and up, from mean tokens
    feed_forward = samples * (tokens * WIDTH + low * (WIDTH + 2 * inner))
    assert flops[0] - flops[1] == 2 * 2 * (tokens * left_out - layers * (attention + feed_forward))


def test_the_fused_layers_leave_out_what_the_schedule_says() -> None:
    """Adapters on attention alone: a layer's frozen products for dense and context rows, by hand."""
    pytest.importorskip("triton")
    from loras_bench.models.fused_llama import FusedLlama

    counted = {}
    for share in (0.0, 0.75):
        layers = {"0-1": {"attention": share, "feed_forward": share}}
        one, model = method(criterion="random", layers=layers), adapted(("q_proj", "k_proj", "v_proj"))
        one.prepare(model)
        one.before_step(0)
        FusedLlama.install(unwrapped(model).base_model)
        batch = with_tensors(one, batch_of())
        counted[share] = forward_flops(model, batch)
    context, border = len(batch["sparse_rows"]), 16
    left_out = (64 - 16) * (WIDTH + border) - border * 64  # kept outputs have their part of u B^T; all have another
    left_out += (32 - 8) * WIDTH + 3 * (80 - 24) * WIDTH  # 20 channels, filled up with zeros to a multiple of 8
    assert counted[0.0] - counted[0.75] == 2 * 2 * context * left_out


def forward_flops(model: nn.Module, batch: dict[str, Tensor]) -> float:
    attention = ModelAttention.of(model)
    with attention.counting(), MatmulCounter() as counter, torch.no_grad():
        Objective(model, "language_modeling", "torch")(**batch)
    assert not counter.unknown and IGNORED in batch["targets"]
    return counter.flops
