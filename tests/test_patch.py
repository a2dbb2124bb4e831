"""Tests of patch_model on many families of models, against the unpatched model and against plain forward hooks."""

from __future__ import annotations

import copy
import pickle
import shutil
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import (
    DRAWS,
    FAMILIES,
    HIDDEN,
    LAYERS,
    VOCABULARY,
    Hooked,
    assert_as_exact_as_hooks,
    assert_close,
    assert_no_worse,
    build,
    build_frozen,
    generate,
    gradients,
    input_gradient,
    logits,
    randomize,
    refused,
    snapshot,
    steering_parameters,
    tokens,
)
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from fused_steer import SteerConfig, load_joint, patch_model
from fused_steer.model.decoder import find_decoder

RANK = 4
EVERYTHING = SteerConfig(rank=RANK, scale=0.7, down_bias=True, up_bias=True)


def kinds(model: nn.Module) -> list[str]:
    return [row.kind for row in model.steering.report()]


def steered_pair(base: nn.Module, config: SteerConfig = EVERYTHING) -> tuple[nn.Module, Hooked]:
    """Patch the model with a random adapter; return it and its hooked copy. The adapter changes the output."""
    unsteered = logits(base)
    original = copy.deepcopy(base)
    model = patch_model(base, config)
    activation = {"silu": F.silu, "identity": lambda a: a}[config.activation]
    hooked = Hooked(original, randomize(model), scale=config.scale, activation=activation)
    assert (logits(hooked.model) - unsteered).norm() > 0.1 * unsteered.norm()
    return model, hooked


def assert_equal_to_hooked(model: nn.Module, hooked: Hooked) -> None:
    assert_as_exact_as_hooks(model, steering_parameters(model), hooked)


def assert_hidden_states_steered(make: Callable[[], nn.Module], recorded_before: bool) -> None:
    base = make()
    if recorded_before:  # transformers then leaves its own hooks in the layers
        base(tokens(), output_hidden_states=True)
    model = patch_model(base, EVERYTHING)
    hooked = Hooked(make(), randomize(model), scale=EVERYTHING.scale)
    truth = hooked.double()
    states, expected, exact = (
        m(tokens(), output_hidden_states=True).hidden_states for m in (model, hooked.model, truth.model)
    )
    assert len(states) == len(expected) == LAYERS + 1
    for state, *of_hooks in zip(states[1:-1], *(list(h.states.values())[:-1] for h in (hooked, truth)), strict=True):
        assert_no_worse(state, *of_hooks)
    assert_no_worse(states[-1], expected[-1], exact[-1])  # after the final norm


# ---------------------------------------------------------------------------------------------------------------------
# Every family


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_patch_fresh_patch_changes_no_bit(family):
    model = build_frozen(family)
    before, (text, text_logits) = logits(model), generate(model)
    assert patch_model(model) is model
    assert kinds(model) == ["fused"] * LAYERS
    assert torch.equal(logits(model), before)
    assert all(map(torch.equal, generate(model), (text, text_logits)))


def test_patch_adapter_equals_hooks(family):
    assert_equal_to_hooked(*steered_pair(build(family)))


def test_patch_generation_with_cache_equals_generation_without(family):
    model, hooked = steered_pair(build(family))
    (text, whole), (cached_text, cached) = (generate(model, use_cache=cache) for cache in (False, True))
    assert torch.equal(cached_text, text)
    unsteered = [generate(build_frozen(family), use_cache=cache)[1] for cache in (True, False)]
    assert_close(cached, whole, unsteered=unsteered)
    hooked_text, by_hooks = generate(hooked.model)
    assert torch.equal(hooked_text, text)
    assert_no_worse(cached, by_hooks, generate(hooked.double().model)[1])


@pytest.mark.parametrize("recorded_before", [False, True])
def test_patch_hidden_states_are_the_steered_ones(family, recorded_before):
    assert_hidden_states_steered(lambda: build(family), recorded_before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_patch_parameters(family, dtype):
    model = build(family).to(dtype)
    layers = find_decoder(model).path
    patch_model(model, SteerConfig(rank=RANK))
    trained = {name: (p.shape, p.dtype) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"{layers}.{i}.post_block.{factor}.default.weight": (shape, torch.float32)
        for i in range(LAYERS)
        for factor, shape in (("steer_down", (RANK, HIDDEN)), ("steer_up", (HIDDEN, RANK)))
    }
    assert trained.keys() == {name for name in model.state_dict() if "post_block" in name}


def test_patch_unpatch_leaves_no_trace(family):
    model = build(family)
    model.get_input_embeddings().requires_grad_(False)
    before, before_logits = snapshot(model), logits(model)
    for _ in range(2):
        patch_model(model)
        randomize(model)
        assert not torch.equal(logits(model), before_logits)
        assert snapshot(model) != before
        assert model.steering.unpatch() is model
        assert snapshot(model) == before
        assert torch.equal(logits(model), before_logits)


# ---------------------------------------------------------------------------------------------------------------------
# Other forms, other layers


def test_patch_layer_keeps_its_class_and_name():
    model = build()
    others = [type(module) for path, module in model.named_modules() if not path.startswith("model.layers.1")]
    patch_model(model, SteerConfig(layers=[1]))
    assert [type(module) for path, module in model.named_modules() if not path.startswith("model.layers.1")] == others
    layer = model.model.layers[1]
    assert isinstance(layer, LlamaDecoderLayer)
    assert (type(layer).__name__, type(layer).__module__) == (LlamaDecoderLayer.__name__, LlamaDecoderLayer.__module__)


def test_patch_only_some_layers():
    model, hooked = steered_pair(build(), SteerConfig(rank=RANK, layers=[1]))
    assert [row.index for row in model.steering.report()] == [1]
    assert list(hooked.states) == ["model.layers.1"]
    assert_equal_to_hooked(model, hooked)


def test_patch_vector():
    model, hooked = steered_pair(build(), SteerConfig(form="vector", scale=-1.5))
    assert {name.partition(".post_block.")[2] for name in hooked.leaves} == {"steer_up.bias"}
    assert_equal_to_hooked(model, hooked)


# ---------------------------------------------------------------------------------------------------------------------
# Layers that can only be steered by a hook


class ScalingBlock(nn.Module):
    """A block that does not return a sum."""

    def __init__(self, as_tuple: bool) -> None:
        super().__init__()
        self.mlp, self.as_tuple = nn.Linear(HIDDEN, HIDDEN), as_tuple

    def forward(self, x: Tensor) -> Any:
        x = (x + self.mlp(x)) * 0.9
        return (x, "attention") if self.as_tuple else x


class ScalingModel(nn.Module):
    """A decoder that is unknown to transformers."""

    def __init__(self, as_tuple: bool) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(hidden_size=HIDDEN, num_hidden_layers=LAYERS)
        self.embedding, self.head = nn.Embedding(VOCABULARY, HIDDEN), nn.Linear(HIDDEN, VOCABULARY)
        self.blocks = nn.ModuleList(ScalingBlock(as_tuple) for _ in range(LAYERS))

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
            if block.as_tuple:
                x, attention = x
                assert attention == "attention"
        logits = self.head(x)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return types.SimpleNamespace(logits=logits, loss=loss)


class ListingBlock(ScalingBlock):
    def forward(self, x: Tensor) -> Any:
        return list(super().forward(x))


class ClampingLayer(LlamaDecoderLayer):
    """A layer that changes the hidden state after the residual add."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs).clamp(-3, 3)


def unpatched_forward(layer: nn.Module) -> types.MethodType:
    return types.MethodType(LlamaDecoderLayer.forward, layer)


class CallingForward(ScalingModel):
    """It calls its blocks' forward itself, as SqueezeBERT's encoder does, so that no hook of theirs runs."""

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block.forward(x)
        return types.SimpleNamespace(logits=self.head(x), loss=None)


class SumBlock(ScalingBlock):
    def forward(self, x: Tensor) -> Any:
        return x + self.mlp(x)


def scaling_model(as_tuple: bool) -> nn.Module:
    torch.manual_seed(0)
    return ScalingModel(as_tuple).eval()


def model_of_listing_blocks() -> nn.Module:
    model = scaling_model(as_tuple=True)
    for block in model.blocks:
        block.__class__ = ListingBlock
    return model


def llama_of_clamping_layers() -> nn.Module:
    model = build()
    for layer in model.model.layers:
        layer.__class__ = ClampingLayer
    return model


def llama_with_forwards_on_instances() -> nn.Module:
    model = build()
    for layer in model.model.layers:
        layer.forward = unpatched_forward(layer)
    return model


HOOK_STEERED = {
    "custom": (lambda: scaling_model(as_tuple=False), "ScalingBlock.forward"),
    "custom with tuples": (lambda: scaling_model(as_tuple=True), "ScalingBlock.forward"),
    "custom with lists": (model_of_listing_blocks, "ListingBlock.forward"),
    "clamped after the add": (llama_of_clamping_layers, "ClampingLayer.forward"),
    "forward on the instance": (llama_with_forwards_on_instances, "replaced on the instance"),
}


@pytest.mark.parametrize(("make", "reason"), HOOK_STEERED.values(), ids=HOOK_STEERED)
def test_patch_layer_without_a_findable_add_is_steered_by_hook(make, reason):
    base = make()
    before = snapshot(base)
    model, hooked = steered_pair(base)
    assert kinds(model) == ["hook"] * LAYERS
    assert all(reason in row.reason and "\n" not in row.reason for row in model.steering.report())
    assert_equal_to_hooked(model, hooked)
    with model.steering.disabled():
        assert torch.equal(logits(model), logits(make().requires_grad_(False)))
    model.steering.unpatch()
    assert snapshot(model) == before


def test_patch_layers_whose_hooks_are_not_run_are_refused():
    model = CallingForward(as_tuple=False)
    parts = ("layer 0 (ScalingBlock)", "CallingForward.forward calls a forward past the hooks", "block.forward(x)")
    with refused(ValueError, *parts, model=model):
        patch_model(model)
    for block in model.blocks:
        block.__class__ = SumBlock  # its own forward steers, however it is called
    patch_model(model)
    randomize(model)
    model(tokens())
    assert [(row.kind, row.calls) for row in model.steering.report()] == [("fused", 1)] * LAYERS


@pytest.mark.parametrize("recorded_before", [False, True])
def test_patch_hidden_states_of_hook_steered_layers(recorded_before):
    assert_hidden_states_steered(llama_of_clamping_layers, recorded_before)


@pytest.mark.parametrize("form", ["lowrank", "vector", "loreft"])
def test_patch_a_layer_of_another_width_than_the_config_says_is_named(form):
    model = build()
    model.config.hidden_size = 2 * HIDDEN
    model = patch_model(model, SteerConfig(form=form, layers=[1]))
    with pytest.raises(ValueError, match="^layer 1 has hidden states of shape ") as raised:
        model(tokens())
    assert str(raised.value) == (
        f"layer 1 has hidden states of shape (2, 9, {HIDDEN}); expected (..., {2 * HIDDEN}), the hidden size in the "
        "model's config, as adapter 'default' has"
    )


def test_patch_forward_replaced_after_patching_is_an_error():
    model = patch_model(build())
    layer = model.model.layers[1]
    layer.forward = unpatched_forward(layer)
    with refused(RuntimeError, "layer 1 (LlamaDecoderLayer)", "did not steer"):
        logits(model)
    del layer.forward
    logits(model)


# ---------------------------------------------------------------------------------------------------------------------
# What else is done with models


def test_patch_other_instances_of_the_class_are_untouched():
    model, other = build(seed=0), build(seed=1)
    before, before_logits = snapshot(other), logits(other)
    patch_model(model)
    randomize(model)
    steered = logits(model)
    assert snapshot(other) == before
    assert torch.equal(logits(other), before_logits)
    patch_model(other)
    randomize(other, seed=2)
    assert torch.equal(logits(model), steered)


@pytest.mark.parametrize(
    ("make", "calls"),
    [
        (build, {2}),  # the second call is the recomputation
        (lambda: build("gemma2"), {2}),
        # Hooks run after the checkpointed forward, so they are not recomputed. Up to transformers 5.17 they are.
        (llama_of_clamping_layers, {1, 2}),
    ],
    ids=["llama", "gemma2", "hook"],
)
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["new", "reentrant"])
def test_patch_gradient_checkpointing_changes_no_gradient(make, calls, use_reentrant):
    model = patch_model(make(), EVERYTHING).train()
    parameters = randomize(model)
    expected = gradients(model, parameters, use_cache=False)
    base = make().requires_grad_(False).train()
    unsteered = input_gradient(base, use_cache=False)
    for network in (model, base):
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if use_reentrant:  # it needs an input that requires a gradient
        model.enable_input_require_grads()
    model.steering.reset_calls()
    actual = gradients(model, parameters, use_cache=False)
    (found,) = {row.calls for row in model.steering.report()}
    assert found in {DRAWS * number for number in calls}
    assert_close(actual, expected, unsteered=(input_gradient(base, use_cache=False), unsteered))


NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.mark.parametrize(
    ("family", "layers", "backend"),
    [
        ("llama", 2, "aot_eager"),
        ("gemma2", 2, "aot_eager"),
        ("gpt_neox-parallel", 2, "aot_eager"),
        pytest.param("llama", 1, "inductor", marks=NEEDS_COMPILER),
    ],
)
def test_patch_compiled_whole(family, layers, backend):
    torch.compiler.reset()
    model = patch_model(build(family, num_hidden_layers=layers), EVERYTHING)
    parameters = randomize(model)
    base = build_frozen(family, num_hidden_layers=layers)
    compiled, compiled_base = (torch.compile(m, fullgraph=True, backend=backend) for m in (model, base))
    assert_close(logits(compiled), logits(model), unsteered=(logits(compiled_base), logits(base)))
    unsteered = input_gradient(compiled_base), input_gradient(base)
    assert_close(gradients(compiled, parameters), gradients(model, parameters), unsteered=unsteered)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("make", [build, llama_of_clamping_layers], ids=["fused", "hook"])
def test_patch_copies_are_equal_and_independent(make, duplicate):
    original = make()
    before = snapshot(original)
    patch_model(original, EVERYTHING)
    randomize(original)
    steered = logits(original)
    model = duplicate(original)
    assert torch.equal(logits(model), steered)
    assert kinds(model) == kinds(original)
    model.steering.scale = 2.0
    randomize(model, seed=2)
    assert not torch.equal(logits(model), steered)
    assert torch.equal(logits(original), steered)
    original.steering.unpatch()
    assert {p for name, p in model.named_parameters() if p.requires_grad} == set(steering_parameters(model).values())
    model.steering.unpatch()
    after = snapshot(model)
    assert after["modules"] == before["modules"] and after["state"] == before["state"]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model), logits(original))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_patch_copies_of_compiled_layers_run_themselves(duplicate):
    """As copies of an unsteered layer do, they are not compiled: the compiled call would run the copied layer."""
    original = patch_model(build())
    randomize(original)
    steered = logits(original)
    for layer in original.model.layers:
        layer.compile(backend="eager")
    model = duplicate(original)
    assert torch.equal(logits(model), steered)
    randomize(model, seed=2)
    assert not torch.equal(logits(model), steered)
    model.steering.unpatch()
    assert torch.equal(logits(model), logits(build()))
    assert all(layer._compiled_call_impl is not None for layer in original.model.layers)


def test_patch_state_dict_round_trip():
    source, target = (patch_model(build(seed=seed), EVERYTHING) for seed in (0, 1))
    randomize(source)
    assert target.load_state_dict(source.state_dict()) == ([], [])
    assert torch.equal(logits(target), logits(source))


def test_patch_steering_follows_the_model_to_another_dtype():
    model = patch_model(build(), EVERYTHING)
    parameters = randomize(model)
    model.to(torch.bfloat16)
    assert {p.dtype for p in steering_parameters(model).values()} == {torch.bfloat16}
    steered = logits(model)
    assert steered.dtype == torch.bfloat16
    with model.steering.disabled():
        assert not torch.equal(logits(model), steered)
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients(model, parameters).values())


# ---------------------------------------------------------------------------------------------------------------------
# Finding the list of decoder layers


class TowerConfig(types.SimpleNamespace):
    """The config of a part that is not the decoder."""


def with_tower(layers: int, **config: Any) -> nn.Module:
    """Build a decoder beside a tower of `layers` blocks that has its own config."""
    model = scaling_model(as_tuple=False)
    model.tower = nn.Module()
    model.tower.config = TowerConfig(hidden_size=HIDDEN, num_hidden_layers=layers)
    model.tower.blocks = nn.ModuleList(ScalingBlock(as_tuple=False) for _ in range(layers))
    vars(model.config).update(config)
    return model


def with_a_norm_for_each_layer() -> nn.Module:
    model = scaling_model(as_tuple=False)
    model.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(LAYERS))
    return model


@pytest.mark.parametrize("make", [lambda: with_tower(LAYERS), with_a_norm_for_each_layer], ids=["tower", "norms"])
def test_patch_decoder_is_told_from_lists_as_long(make):
    assert find_decoder(make()).path == "blocks"
    assert_equal_to_hooked(*steered_pair(make()))


# ---------------------------------------------------------------------------------------------------------------------
# Refusals, which leave the model as it was


def tiny_t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": LAYERS, "num_heads": 4, "vocab_size": VOCABULARY}
    return T5ForConditionalGeneration(T5Config(**sizes))


def with_other_sizes(**config: Any) -> nn.Module:
    model = scaling_model(as_tuple=False)
    vars(model.config).update(config)
    return model


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: nn.Linear(4, 4), ("Linear has no config", "hidden_size", "num_hidden_layers")),
        (lambda: nn.ModuleList([nn.Linear(4, 4)]), ("ModuleList has no config",)),
        (lambda: with_other_sizes(num_hidden_layers=5), ("expected one list of 5 modules", "blocks of 3")),
        (lambda: with_other_sizes(hidden_size="32"), ("expected a decoder model's",)),
        (
            lambda: with_tower(5, num_hidden_layers=5),
            ("expected one list of 5 modules", "blocks of 3", "tower.blocks of 5 under a TowerConfig"),
        ),
        (tiny_t5, ("T5ForConditionalGeneration is an encoder-decoder", "expected a decoder-only one")),
    ],
    ids=[
        "linear",
        "list",
        "no list of that length",
        "hidden size no number",
        "only the tower's fits",
        "encoder-decoder",
    ],
)
def test_patch_refuses_what_is_no_decoder_model(make, parts):
    model = make()
    with refused(ValueError, *parts, model=model):
        patch_model(model)


@pytest.mark.parametrize("model", [None, "someone/model", LlamaDecoderLayer], ids=["None", "name", "class"])
def test_patch_refuses_what_is_no_module(model):
    with refused(TypeError, f"model is a {type(model).__name__}", "expected a torch.nn.Module"):
        patch_model(model)


@pytest.mark.parametrize(
    ("config", "error", "parts"),
    [
        (SteerConfig(layers=[0, LAYERS]), ValueError, (f"layers has {LAYERS}", f"expected indices below {LAYERS}")),
        ({"rank": 8}, TypeError, ("config is a dict", "expected a SteerConfig")),
        (8, TypeError, ("config is a int", "expected a SteerConfig")),
        ("./no/such/adapter", FileNotFoundError, ("./no/such/adapter", "adapter_config.json")),
    ],
    ids=["layer out of range", "dict", "int", "no such path"],
)
def test_patch_refuses_a_config_that_does_not_fit(config, error, parts):
    model = build()
    with refused(error, *parts, model=model):
        patch_model(model, config)


@pytest.mark.parametrize("value", ["no", [], None, 0])
def test_patch_options_that_are_no_bool_are_refused(value, tmp_path):
    model, patched = build(), patch_model(build())
    told = f"is {value!r}; expected True or False"
    for option in ("check_base", "freeze_head", "fuse_norm"):
        with refused(TypeError, f"{option} {told}", model=model):
            patch_model(model, **{option: value})
    with refused(TypeError, f"check_base {told}", model=patched):
        patched.steering.load(tmp_path, "other", check_base=value)
    with refused(TypeError, f"check_base {told}", model=patched):
        patched.steering.make_pool(check_base=value)
    with refused(TypeError, f"trainable {told}", model=model):
        load_joint(model, tmp_path, trainable=value)


def test_patch_refuses_a_second_patch():
    model = patch_model(build())
    with refused(ValueError, "patched already", "model.steering.add", model=model):
        patch_model(model)


def test_patch_refuses_names_that_the_model_uses_itself():
    model = build()
    model.model.layers[2].post_block = nn.Identity()
    with refused(ValueError, "layer 2 (LlamaDecoderLayer)", "'post_block'", "expected none", model=model):
        patch_model(model)
    model = build()
    model.steering = nn.Identity()
    with refused(ValueError, "LlamaForCausalLM", "'steering'", "expected none", model=model):
        patch_model(model)
