"""Counted matrix products against closed forms, operation for operation: equal, not close.

Per token and weight a linear layer costs 2 FLOPs forward, 2 for the gradient of its input (dX) and 2 for the gradient
of its weight (dW). What is not needed is not computed: no dW for a frozen weight, no dX where nothing before the layer
is trained. With LoRA that is so for the projections of q, k and v in the first layer, whose input is the frozen
embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from training_fixtures import HEADS, INNER, LAYERS, VOCABULARY, WIDTH, Rows, attended, task_of, tiny, token_ids

from loras_bench.attention.dispatch import ModelAttention
from loras_bench.metering.flops import MATMUL_LIKE, MatmulCounter
from loras_bench.methods.lora import Lora, LoraConfig
from loras_bench.models.objective import Objective, unwrapped

ROWS, LENGTH, RANK = 2, 16, 4
TOKENS = ROWS * LENGTH
KEYS = WIDTH // HEADS * 2  # the tiny Llama has two key heads
SHAPES = {
    "gpt2": {"q k v": [(WIDTH, 3 * WIDTH)], "rest": [(WIDTH, WIDTH), (WIDTH, INNER), (INNER, WIDTH)]},
    "llama": {
        "q k v": [(WIDTH, WIDTH), (WIDTH, KEYS), (WIDTH, KEYS)],
        "rest": [(WIDTH, WIDTH), (WIDTH, INNER), (WIDTH, INNER), (INNER, WIDTH)],
    },
}
LAST = INNER * WIDTH
"""Weights of the product that ends a layer."""


def layer_weights(family: str) -> int:
    return sum(inputs * outputs for shapes in SHAPES[family].values() for inputs, outputs in shapes)


def adapter_weights(family: str, part: str) -> int:
    return sum(RANK * (inputs + outputs) for inputs, outputs in SHAPES[family][part])


def count(model: nn.Module, family: str, device: str = "cpu") -> MatmulCounter:
    """One forward and backward pass of two rows, attention cores left out."""
    labels = None if task_of(family) == "language_modeling" else [0, 1]
    batch = Rows(token_ids(ROWS, LENGTH), labels=labels).collate("train", [0, 1])
    objective = Objective(model, task_of(family), "torch").train()
    with ModelAttention.of(model).counting(), MatmulCounter() as counter:
        loss_sum, _ = objective(**{name: tensor.to(device) for name, tensor in batch.items()})
        loss_sum.backward()
    assert not counter.unknown
    return counter


def with_lora(model: nn.Module) -> nn.Module:
    return Lora(LoraConfig(kind="lora", rank=RANK)).prepare(model)


def checkpointed(model: nn.Module) -> nn.Module:
    """As `assemble` sets it."""
    unwrapped(model).gradient_checkpointing_enable({"use_reentrant": False})
    unwrapped(model).disable_input_require_grads()
    return model


def positions_flops(family: str) -> float:
    """Rotary angles: an outer product of positions and frequencies, which some versions compute as a matrix product."""
    if family != "llama":
        return 0.0
    rotary: Any = tiny(family).model.rotary_emb
    with MatmulCounter() as counter:
        rotary(torch.zeros(1, LENGTH, WIDTH), torch.arange(LENGTH)[None])
    return counter.flops


def test_one_linear_layer() -> None:
    x_ni, layer = torch.randn(5, 6, requires_grad=True), nn.Linear(6, 7)
    with MatmulCounter() as counter:
        y_no = layer(x_ni)
    assert counter.flops == 2 * 5 * 6 * 7
    with counter:
        y_no.sum().backward()
    assert counter.flops == 3 * 2 * 5 * 6 * 7
    with MatmulCounter() as counter:
        nn.Linear(6, 7)(x_ni.detach()).sum().backward()
    assert counter.flops == 2 * 2 * 5 * 6 * 7, "nothing before the layer is trained: no dX"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_full_fine_tuning_costs_six_flops_a_token_and_weight(family: str) -> None:
    """The embedding is trained, so every layer needs dX; reading an embedding is no product, the output layer is."""
    weights = LAYERS * layer_weights(family) + VOCABULARY * WIDTH
    assert count(attended(family), family).flops == 6 * TOKENS * weights + positions_flops(family)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_lora_saves_the_weight_gradients_of_the_base_and_no_forward(family: str) -> None:
    base = 4 * TOKENS * (LAYERS * layer_weights(family) + VOCABULARY * WIDTH)  # forward and dX
    adapters = 6 * TOKENS * LAYERS * (adapter_weights(family, "q k v") + adapter_weights(family, "rest"))
    first = SHAPES[family]["q k v"]  # no dX in the first layer: neither through W0 nor through A
    not_needed = 2 * TOKENS * sum(inputs * outputs + inputs * RANK for inputs, outputs in first)
    counted = count(with_lora(attended(family)), family).flops
    assert counted == base + adapters - not_needed + positions_flops(family)
    full = count(attended(family), family).flops
    assert 1 - counted / full < 1 / 3, "the most that LoRA can save"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_checkpointing_adds_the_forward_of_the_layers(family: str) -> None:
    """The last product of a layer is not computed again: the recomputation ends with the last tensor that the backward
    pass needs, which is that product's input. The output layer and the embedding lie outside.
    """
    again = 2 * TOKENS * LAYERS * (layer_weights(family) - LAST)
    plain, recomputed = count(attended(family), family).flops, count(checkpointed(attended(family)), family).flops
    assert recomputed - plain == again

    lora = LAYERS * (adapter_weights(family, "q k v") + adapter_weights(family, "rest"))
    # with adapters the last product is that of the last B
    again = 2 * TOKENS * (LAYERS * layer_weights(family) + lora - LAYERS * RANK * WIDTH)
    adapted = count(with_lora(attended(family)), family).flops
    assert count(checkpointed(with_lora(attended(family))), family).flops - adapted == again


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "roberta", "gpt2-classifier"])
@pytest.mark.parametrize("arm", ["full", "lora", "checkpointed"])
def test_the_meta_device_counts_the_same(family: str, arm: str) -> None:
    def make() -> nn.Module:
        model = attended(family)
        return {"full": lambda: model, "lora": lambda: with_lora(model), "checkpointed": lambda: checkpointed(model)}[
            arm
        ]()

    assert count(make().to("meta"), family, "meta").flops == count(make(), family).flops > 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_it_agrees_with_torchs_counter_outside_the_attention_core(family: str) -> None:
    """Its eager attention is counted as products too: 2 forward and 4 backward, over all pairs, causal or not."""
    theirs = tiny(family)
    theirs.set_attn_implementation("eager")
    labels = None if task_of(family) == "language_modeling" else [0, 1]
    batch = Rows(token_ids(ROWS, LENGTH), labels=labels).collate("train", [0, 1])
    with FlopCounterMode(display=False) as counter:
        Objective(theirs, task_of(family), "torch").train()(**batch)[0].backward()
    core = (2 + 4) * 2 * ROWS * LENGTH**2 * WIDTH * LAYERS
    assert count(attended(family), family).flops == counter.get_total_flops() - core


def products() -> Iterator[tuple[str, Any]]:
    a_mk, b_kn = torch.randn(3, 4), torch.randn(4, 5)
    yield "mv", lambda: torch.mv(a_mk, torch.randn(4))
    yield "dot", lambda: torch.dot(torch.randn(4), torch.randn(4))
    yield "addr", lambda: torch.addr(torch.randn(3, 4), torch.randn(3), torch.randn(4))
    yield "_int_mm", lambda: torch._int_mm(torch.ones(32, 32, dtype=torch.int8), torch.ones(32, 32, dtype=torch.int8))
    yield "mystery_linear", lambda: torch.ops.loras_bench_tests.mystery_linear(a_mk, b_kn)
    yield "my_attention_forward", lambda: torch.ops.loras_bench_tests.my_attention_forward(a_mk, b_kn)


LIBRARY = torch.library.Library("loras_bench_tests", "FRAGMENT")
for _name in ("mystery_linear", "my_attention_forward", "gelu_fast"):
    if not hasattr(torch.ops.loras_bench_tests, _name):
        LIBRARY.define(f"{_name}(Tensor a, Tensor b) -> Tensor")
        LIBRARY.impl(_name, lambda a, b: a.sum() * b, "CompositeExplicitAutograd")


@pytest.mark.parametrize(("name", "product"), list(products()), ids=[name for name, _ in products()])
def test_a_product_without_a_formula_is_named_and_not_guessed(name: str, product: Any) -> None:
    with MatmulCounter() as counter:
        product()
        product()
    assert counter.flops == 0
    assert {key.rpartition(".")[2]: times for key, times in counter.unknown.items()} == {name: 2}


def test_other_operations_are_not_named() -> None:
    x_ni = torch.randn(6, 8, requires_grad=True)
    layer = nn.Sequential(nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.5))
    with MatmulCounter() as counter:
        y_no = layer(x_ni).softmax(-1) + torch.ops.loras_bench_tests.gelu_fast(torch.ones(1), torch.ones(8))
        nn.functional.cross_entropy(y_no, torch.zeros(6, dtype=torch.int64)).backward()
        parameter = nn.Parameter(torch.ones(3))
        parameter.grad = torch.ones(3)
        torch.optim.AdamW([parameter], fused=True).step()
        nn.Embedding(4, 3)(torch.zeros(2, dtype=torch.int64)).sum().backward()
    assert counter.flops == 0 and not counter.unknown


@pytest.mark.parametrize(
    ("name", "matches"),
    [
        *((name, True) for name in ("linear", "_scaled_mm", "_grouped_mm", "mm_scale", "convolution_backward")),
        ("_scaled_dot_product_cudnn_attention", True),
        *((name, False) for name in ("linspace", "addcmul", "native_layer_norm", "comm", "command", "_fused_adamw_")),
    ],
)
def test_which_names_look_like_products(name: str, matches: bool) -> None:
    assert bool(MATMUL_LIKE.search(name)) is matches


def test_products_inside_an_operator_are_counted_once() -> None:
    def matmul(a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    with MatmulCounter() as counter:
        torch.einsum("bij,bjk->bik", torch.randn(2, 3, 4), torch.randn(2, 4, 5))
        nn.functional.linear(torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5))
        matmul(torch.randn(3, 4), torch.randn(4, 5))
        torch.baddbmm(torch.randn(2, 3, 5), torch.randn(2, 3, 4), torch.randn(2, 4, 5))
    assert counter.flops == 2 * (2 * 3 * 4 * 5) * 3 + 2 * 3 * 4 * 5
    assert not counter.unknown
