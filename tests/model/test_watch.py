"""Tests that every call of a patched layer is steered, checked per layer, thread and call; and of lost gradients."""

from __future__ import annotations

import copy
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import (
    Hooked,
    assert_close,
    build,
    gradients,
    logits,
    randomize,
    refused,
    steering_parameters,
    tokens,
)
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from fused_steer import SteerConfig, patch_model
from fused_steer.model import layer as patch

CONFIG = SteerConfig(rank=4)


def steered(base: nn.Module | None = None, config: SteerConfig = CONFIG) -> nn.Module:
    model = patch_model(build() if base is None else base, config)
    randomize(model)
    return model


class Clamping(LlamaDecoderLayer):
    """A layer without a findable last add, which a hook steers."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(hidden_states, *args, **kwargs).clamp(-1e6, 1e6)


def of_clamping_layers() -> nn.Module:
    base = build()
    for layer in base.model.layers:
        layer.__class__ = Clamping
    return base


# ---------------------------------------------------------------------------------------------------------------------
# Runs with fewer layers, or several passes at a time


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("make", [build, of_clamping_layers], ids=["fused", "hook"])
def test_watch_threads_that_share_a_steered_model(make, frequent_switches):
    model = steered(make())
    expected, found = logits(model), []

    def run() -> None:
        try:
            found.extend(torch.equal(logits(model), expected) for _ in range(20))
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 80


def test_watch_replicas_of_data_parallel_steer():
    """Replicas of torch.nn.parallel.replicate steer. They are shallow copies with parameters as plain attributes."""
    model = steered()
    expected = logits(model)
    parts = list(model.named_modules(remove_duplicate=False))
    replicas = {name: part._replicate_for_data_parallel() for name, part in parts}
    for name, part in parts:
        for child in (child for child, module in part._modules.items() if module is not None):
            replicas[name]._modules[child] = replicas[f"{name}.{child}" if name else child]
        for key, parameter in part._parameters.items():
            replicas[name]._parameters.pop(key, None)
            setattr(replicas[name], key, None if parameter is None else parameter.detach().clone())
    assert torch.equal(logits(replicas[""]), expected)
    assert torch.equal(logits(model), expected)


def test_watch_self_speculative_decoding_leaves_early():
    model, plain = steered(), build()
    ids = tokens()[:1]
    options = {"max_new_tokens": 5, "do_sample": False}
    for one in (plain, model):
        whole = one.generate(ids, **options)
        assert torch.equal(one.generate(ids, assistant_early_exit=1, **options), whole)
        assert one.config.num_hidden_layers == 3


def test_watch_a_lowered_number_of_layers_steers_the_first():
    model = steered()
    model.config.num_hidden_layers = 2
    hooked = Hooked(build(), steering_parameters(model))
    hooked.model.config.num_hidden_layers = 2
    model.steering.reset_calls()
    assert_close(logits(model), logits(hooked.model))
    assert [row.calls for row in model.steering.report()] == [1, 1, 0]


def test_watch_layers_may_be_dropped_from_the_list():
    model = steered()
    layers = list(model.model.layers)
    model.model.layers = nn.ModuleList([layers[0], layers[2]])
    model.config.num_hidden_layers = 2
    model.steering.reset_calls()
    model(tokens(), use_cache=False)  # a cache has one entry per layer index
    assert [row.calls for row in model.steering.report()] == [1, 0, 1]


# ---------------------------------------------------------------------------------------------------------------------
# A layer that does not steer


def own_forward(layer: nn.Module) -> Callable[..., Any]:
    """Return the unpatched forward of the layer's class."""
    return functools.partial(type(layer).__bases__[0].forward, layer)


@pytest.mark.parametrize("make", [build, of_clamping_layers], ids=["fused", "hook"])
def test_watch_a_layer_that_did_not_steer_is_an_error_of_that_layer(make):
    model = steered(make())
    layer = model.model.layers[1]
    if make is build:
        layer.forward = own_forward(layer)
        mend: Callable[[], Any] = functools.partial(delattr, layer, "forward")
    else:
        hooks = dict(layer._forward_hooks)
        layer._forward_hooks.clear()
        mend = functools.partial(layer._forward_hooks.update, hooks)
    expected = (RuntimeError, f"layer 1 ({type(layer).__name__})", "did not steer")
    with refused(*expected):
        logits(model)
    with refused(*expected):  # also when the layer is called alone
        x = torch.randn(1, 3, 32)
        layer(x, position_embeddings=model.model.rotary_emb(x, torch.arange(3)[None]))
    mend()
    logits(model)


def test_watch_a_forward_replaced_on_the_patched_class_is_an_error():
    model = steered()
    cls = type(model.model.layers[0])
    forward = cls.forward
    try:
        cls.forward = cls.__bases__[0].forward
        with refused(RuntimeError, "layer 0 (LlamaDecoderLayer)", "did not steer"):
            logits(model)
    finally:
        cls.forward = forward
    logits(model)


def test_watch_a_layer_is_watched_whatever_other_threads_run(frequent_switches):
    """A replaced layer is an error in one thread even while another thread keeps running steered layers."""
    model = steered()
    layer = model.model.layers[1]
    x = torch.randn(1, 3, 32)
    position = model.model.rotary_emb(x, torch.arange(3)[None])
    stop = threading.Event()

    def steer() -> None:
        with torch.no_grad():
            while not stop.is_set():
                layer.post_block(x, x)

    thread = threading.Thread(target=steer)
    thread.start()
    try:
        layer.forward = own_forward(layer)
        for _ in range(50):
            with torch.no_grad(), refused(RuntimeError, "layer 1", "did not steer"):
                layer(x, position_embeddings=position)
    finally:
        stop.set()
        thread.join()


def test_watch_a_wrapped_forward_that_calls_the_patched_one_steers():
    model = steered()
    expected = logits(model)
    layer = model.model.layers[1]
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    assert torch.equal(logits(model), expected)
    layer.forward = inner
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox-parallel"])
def test_watch_a_layer_as_it_was_patched_is_not_watched(family, monkeypatch):
    """A layer with its patched forward is not watched, because watching takes time in each call."""
    model = steered(build(family))
    monkeypatch.setattr(patch, "call_watched", lambda *_, **__: pytest.fail("a layer is watched"))
    logits(model)
    assert all("forward" not in vars(row.layer) for row in model.steering._patched.layers.values())


def test_watch_a_compiled_forward_on_a_layer_is_no_false_alarm():
    model = steered()
    expected = logits(model)
    for layer in model.model.layers:
        layer.forward = functools.partial(torch.compile(layer.forward, backend="eager"))
    assert_close(logits(model), expected)


def test_watch_a_replaced_layer_is_an_error_unless_it_holds_the_patched_one():
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    model = steered()
    expected = logits(model)
    layer = model.model.layers[1]
    model.model.layers[1] = copy.deepcopy(build().model.layers[1])
    for _ in range(2):
        with refused(RuntimeError, "layer 1 is now a LlamaDecoderLayer", "expected the layer that patch_model steered"):
            logits(model)
    model.model.layers[1] = Wrapper(layer)
    assert torch.equal(logits(model), expected)
    model.model.layers[1] = layer
    assert torch.equal(logits(model), expected)


def test_watch_a_layer_that_is_not_steered_may_be_replaced():
    model = steered(config=SteerConfig(rank=4, layers=[0]))
    model.model.layers[1] = build(seed=1).model.layers[1]
    logits(model)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients that a layer loses


def test_watch_a_vector_on_the_output_of_an_mlp_trains_beside_steering():
    """A vector that trains on the output of an MLP gets its gradient, also if the layer's input needs none."""

    def with_vector(model: nn.Module, layer: nn.Module) -> Tensor:
        vector = nn.Parameter(torch.zeros(32))
        layer.mlp.register_forward_hook(lambda module, args, output: output + vector)
        return vector

    model = steered()
    hooked = Hooked(build(), steering_parameters(model))
    found = []
    for one, leaves in ((model, steering_parameters(model)), (hooked.model, hooked.leaves)):
        vector = with_vector(one, one.model.layers[0])
        found.append({**gradients(one, leaves), "vector": torch.autograd.grad(loss(one), vector)[0]})
    assert_close(*found)


def loss(model: nn.Module) -> Tensor:
    return model(tokens(), labels=tokens()).loss


def test_watch_prefix_tuning_with_a_parallel_residual():
    def prefixed(seed: int) -> nn.Module:
        base = build("gpt_neox-parallel")
        torch.manual_seed(seed)
        return get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))

    model = patch_model(prefixed(0), CONFIG)
    randomize(model)
    loss(model).backward()
    assert model.prompt_encoder["default"].embedding.weight.grad.norm() > 0


class Lossy(nn.Module):
    """A linear layer that passes no gradient, like kernels for inference."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.detach())


LOST = (RuntimeError, "a steered block passes no gradient", "expected a base that can be trained through")


@pytest.mark.parametrize("lossy", ["branch", "both"])
def test_watch_a_gradient_that_the_input_asks_for_and_the_block_loses_is_an_error(lossy):
    model = steered()
    layer = model.model.layers[1]
    layer.mlp.down_proj = Lossy(layer.mlp.down_proj)
    if lossy == "both":
        layer.self_attn.o_proj = Lossy(layer.self_attn.o_proj)
        norm = layer.input_layernorm.forward
        layer.input_layernorm.forward = lambda x: norm(x.detach())
    one = loss(model)  # the forward pass still works
    with refused(*LOST):
        one.backward()


def test_watch_the_first_layer_has_no_gradient_to_lose():
    model = steered()
    layer = model.model.layers[0]
    layer.mlp.down_proj = Lossy(layer.mlp.down_proj)
    loss(model).backward()
    assert all(p.grad is not None for p in model.steering.parameters())


def test_watch_a_lost_gradient_is_an_error_beside_lora_in_the_layer():
    """A gradient lost in the MLP is an error, also if a LoRA on the attention of the same layer gets gradients."""
    from peft import LoraConfig

    model = get_peft_model(build(), LoraConfig(r=2, target_modules=["q_proj"]))
    for layer in model.base_model.model.model.layers:
        layer.mlp.down_proj = Lossy(layer.mlp.down_proj)
    one = loss(patch_model(model, CONFIG))
    with refused(*LOST):
        one.backward()
