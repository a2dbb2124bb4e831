"""Tests of finding the modules of a layer that write into the residual stream, by tracing the layer's computation."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from models import FAMILIES, LAYERS, build, refused, snapshot
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fused_steer import SteerConfig, patch_model
from fused_steer.lora.writers import Writer, _Trace, choose_writers, trace_writers
from fused_steer.model.decoder import find_decoder
from fused_steer.tools import coverage

#: The modules that write into the stream, attention's and then the MLP's, for families with other names than Llama's.
NAMES = {
    "gpt_neox-parallel": ["attention.dense", "mlp.dense_4h_to_h"],
    "gpt_neox-sequential": ["attention.dense", "mlp.dense_4h_to_h"],
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "mixtral": ["self_attn.o_proj", "mlp.experts"],
    "qwen3_moe": ["self_attn.o_proj", "mlp.experts"],
}
USUAL = ["self_attn.o_proj", "mlp.down_proj"]


def trace(model: nn.Module) -> dict[int, list[Writer]]:
    decoder = find_decoder(model)
    return trace_writers(decoder.model, dict(enumerate(decoder.layers)), decoder.hidden)


def paths(writers: list[Writer]) -> list[str]:
    return [writer.path for writer in writers]


@pytest.mark.parametrize("lora", [False, True], ids=["bare", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_writers_of_every_family(family, lora):
    model = build(family)
    if lora:
        # The trace works also on a patched, frozen model in training mode.
        patch_model(model).train()
        get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    found = trace(model)
    expected = NAMES.get(family, USUAL)
    assert {index: paths(writers) for index, writers in found.items()} == dict.fromkeys(range(LAYERS), expected)
    assert paths(choose_writers(found[0], "all")) == expected
    assert paths(choose_writers(found[0], "mlp")) == expected[1:]


@pytest.mark.parametrize(
    ("model_type", "mlp"),
    [
        ("gemma4_text", ["mlp.down_proj"]),  # not the per-layer inputs, which are added after the MLP
        ("gemma3n_text", ["mlp.down_proj"]),  # its forward is not understood
        ("granitemoeshared", ["block_sparse_moe.experts", "shared_mlp.output_linear"]),  # one sum adds both
    ],
)
@pytest.mark.parametrize("patched", [False, True], ids=["bare", "patched"])
def test_writers_of_the_mlp_are_told_from_what_is_added_after_it_or_with_it(model_type, mlp, patched):
    model = coverage.build(model_type)
    if patched:
        patch_model(model)
    found = trace(model)
    assert all(paths(choose_writers(writers, "mlp")) == mlp for writers in found.values())
    assert all(len(writers) > len(mlp) for writers in found.values())


def test_writers_of_a_model_with_an_encoder_that_takes_no_token_ids():
    found = trace(coverage.build("roberta"))
    assert all(paths(writers) == ["attention.output.dense", "output.dense"] for writers in found.values())
    assert paths(choose_writers(found[0], "mlp")) == ["output.dense"]


def test_writers_of_a_model_that_a_short_pass_changes_are_refused():
    model = coverage.build("big_bird")
    before = snapshot(model)
    with refused(ValueError, "BigBirdModel", "changes its attention for good", "expected"):
        trace(model)
    assert snapshot(model) == before and model.bert.attention_type == "block_sparse"


def test_writers_nothing_is_left_behind():
    model = get_peft_model(build(), LoraConfig(r=2, target_modules="all-linear")).get_base_model()
    model.train()
    model.model.layers[1].eval()
    before, modes = snapshot(model), [module.training for module in model.modules()]
    trace(model)
    assert snapshot(model) == before
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_writers_a_pass_that_fails_is_refused_and_leaves_nothing(monkeypatch):
    model = build().train()
    monkeypatch.setattr(model.model.layers[1].mlp, "forward", lambda x: 1 / 0)
    before = snapshot(model)
    with refused(ValueError, "LlamaModel", "ZeroDivisionError", "expected"):
        trace(model)
    assert snapshot(model) == before and all(module.training for module in model.modules())


class Layer(nn.Module):
    """A flat layer like OPT's, without attention or MLP modules. Its gate has the hidden size but does not write."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_out, self.gate, self.up, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.LayerNorm(8)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.norm(self.attention_out(hidden))
        return 0.5 * (hidden + self.out(torch.relu(self.up(hidden)) * self.gate(hidden)))


class Functional(nn.Module):
    """An MLP with a last projection that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_out, self.up = nn.Linear(8, 8), nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.ones(8, 8))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention_out(hidden)
        return hidden + torch.relu(self.up(hidden)) @ self.weight


class Experts(nn.Module):
    """A mixture of experts that runs only its first expert."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_out = nn.Linear(8, 8)
        self.moe = nn.Module()
        self.moe.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(3))
        self.moe.shared = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention_out(hidden)
        moved = torch.zeros_like(hidden).index_add_(1, torch.tensor([0]), self.moe.experts[0](hidden[:, :1]))
        return hidden + (moved + self.moe.shared(hidden))


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(4, 8), nn.ModuleList(layers)

    def forward(self, input_ids: Tensor, **options: Any) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def traced(*layers: nn.Module) -> list[Writer]:
    stack = Stack(*layers)
    return trace_writers(stack, dict(enumerate(stack.layers)), 8)[len(layers) - 1]


def test_writers_a_flat_layer():
    found = traced(Layer(), Layer())
    assert paths(found) == ["attention_out", "out"]
    assert paths(choose_writers(found, "mlp")) == ["out"]


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class EndingInAFunction(Layer):
    def forward(self, hidden: Tensor) -> Tensor:
        return _Twice.apply(super().forward(hidden))


def test_writers_of_a_last_layer_that_ends_in_an_autograd_function(monkeypatch):
    """The output is alive while its graph is read. Without it PyTorch before 2.13 frees the node of the function."""
    layer, outputs, read = EndingInAFunction(), [], _Trace.writers
    layer.register_forward_hook(lambda _, __, output: outputs.append(weakref.ref(output)))

    def writers(self: _Trace, index: int) -> list[str]:
        assert [output() is not None for output in outputs] == [True]
        return read(self, index)

    monkeypatch.setattr(_Trace, "writers", writers)
    assert paths(traced(layer)) == ["attention_out", "out"]
    assert outputs[0]() is None


def test_writers_what_comes_before_a_product_does_not_write():
    assert paths(traced(Functional())) == ["attention_out"]


def test_writers_all_experts_are_writers_though_two_tokens_visit_few():
    found = traced(Experts())
    assert paths(found) == ["attention_out", "moe.experts.0.2", "moe.experts.1.2", "moe.experts.2.2", "moe.shared"]
    assert paths(choose_writers(found, "mlp")) == paths(found)[1:]


def test_writers_a_layer_that_writes_nothing_is_refused():
    with refused(ValueError, "layer 0", "Identity", "expected"):
        traced(nn.Identity())


def test_writers_columns_of_what_is_active():
    model = build()
    writer = trace(model)[0][-1]
    assert writer.columns() == []
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"], lora_bias=True))
    wrapped.add_adapter("more", LoraConfig(r=3, target_modules=["down_proj"]))
    b = writer.module.lora_B
    assert [tuple(column.shape) for column in writer.columns()] == [(32, 2), (32, 1)]
    assert writer.columns()[0] is b["default"].weight and torch.equal(writer.columns()[1][:, 0], b["default"].bias)
    wrapped.base_model.set_adapter(["default", "more"])
    assert [tuple(column.shape) for column in writer.columns()] == [(32, 2), (32, 1), (32, 3)]
    wrapped.unload()
    assert writer.columns() == []


def test_writers_lora_on_expert_parameters_is_refused():
    model = build("mixtral")
    get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"]))
    with refused(ValueError, "mlp.experts", "parameters of its experts", "expected", model=model):
        patch_model(model, SteerConfig(orthogonal_to="lora"))


def test_writers_of_a_layer_that_mixes_streams_are_not_all_known():
    """DeepSeek-V4: the attention's output projection is behind a product of the streams."""
    model = coverage.build("deepseek_v4")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["o_b_proj", "down_proj"]))
    with refused(ValueError, "mixes several residual streams", "expected orthogonal_modules='mlp'", model=model):
        patch_model(model, SteerConfig(orthogonal_to="lora", orthogonal_modules="all"))
    patch_model(model, SteerConfig(orthogonal_to="lora"))
