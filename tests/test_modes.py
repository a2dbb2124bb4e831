"""Tests of the ways to run a steered model, each against plain forward hooks or against a plain run of itself."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from fused_steer.kernels import decompositions
from models import (
    HIDDEN,
    LAYERS,
    ROUNDING,
    VOCABULARY,
    Hooked,
    assert_as_exact_as_hooks,
    assert_close,
    assert_no_worse,
    build,
    build_frozen,
    difference,
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
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    StaticCache,
    Trainer,
    TrainingArguments,
)

from fused_steer import SteerConfig, patch_model

CONFIG = SteerConfig(rank=4, down_bias=True, up_bias=True)


def steered(base: nn.Module, config: SteerConfig = CONFIG, adapter: str = "default") -> nn.Module:
    """Patch the model with a random adapter, and check that it changes the output."""
    unsteered = logits(base)
    model = patch_model(base, config, adapter_name=adapter)
    randomize(model, adapter)
    assert apart(logits(model), unsteered) > 0.1
    return model


def apart(actual: Tensor, expected: Tensor) -> float:
    return difference(actual, expected)[""]


class InFull(Hooked):
    """The truth: plain hooks that compute the shift in float64 and round it to the model's dtype."""

    def _shift(self, path: str, hidden: Tensor) -> Tensor:
        leaves = self.leaves
        self.leaves = {name: leaf.double() for name, leaf in leaves.items()}
        try:
            with torch.autocast("cpu", enabled=False):
                return super()._shift(path, hidden.double()).to(hidden.dtype)
        finally:
            self.leaves = leaves


class InDtype(Hooked):
    """Plain hooks for a model of low precision: they cast the factors to the hidden state's dtype."""

    def _shift(self, path: str, hidden: Tensor) -> Tensor:
        leaves = self.leaves
        self.leaves = {name: leaf.to(hidden.dtype) for name, leaf in leaves.items()}
        try:
            return super()._shift(path, hidden)
        finally:
            self.leaves = leaves


# ---------------------------------------------------------------------------------------------------------------------
# Compiled

#: (batch, length): eight different numbers of tokens, including a single token.
SHAPES = [(1, 5), (2, 9), (3, 7), (2, 16), (4, 11), (1, 1), (5, 3), (2, 20)]


def compiled(model: nn.Module, backend: str = "eager") -> tuple[Any, CompileCounterWithBackend]:
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, backend=counter), counter


#: The results for each of SHAPES, compiled and eager.
Ways = tuple[list[Any], list[Any]]


@torch.no_grad()
def graphs_of_inference(model: nn.Module) -> tuple[int, Ways]:
    run, counter = compiled(model)
    ways = tuple([m(tokens(0, *shape), use_cache=False).logits for shape in SHAPES] for m in (run, model))
    return counter.frame_count, ways


def graphs_of_training(model: nn.Module, parameters: Mapping[str, Tensor]) -> tuple[int, Ways]:
    run, counter = compiled(model, "aot_eager")
    ways: Ways = ([], [])
    for network, results in zip((run, model), ways, strict=True):
        for shape in SHAPES:
            ids = tokens(0, *shape if shape[1] > 1 else (1, 2))
            loss = network(ids, labels=ids, use_cache=False).loss
            found = torch.autograd.grad(loss, list(parameters.values()))
            results.append(dict(zip(parameters, found, strict=True)))
    return counter.frame_count, ways


def assert_each_close(ways: Ways, of_unsteered: Ways) -> None:
    for found, unsteered in zip(zip(*ways, strict=True), zip(*of_unsteered, strict=True), strict=True):
        assert_close(*found, unsteered=unsteered)


def test_modes_many_shapes_compile_no_more_graphs_than_unsteered():
    graphs_of_unsteered, unsteered = graphs_of_inference(build_frozen("gpt_neox-parallel", num_hidden_layers=1))
    graphs, ways = graphs_of_inference(steered(build("gpt_neox-parallel", num_hidden_layers=1)))
    assert graphs <= graphs_of_unsteered <= 3
    assert_each_close(ways, unsteered)


def test_modes_many_shapes_compile_no_more_graphs_than_unsteered_in_training():
    base = build("gpt_neox-parallel", num_hidden_layers=1)
    graphs_of_unsteered, unsteered = graphs_of_training(base, dict(base.gpt_neox.layers.named_parameters()))
    model = steered(base)
    graphs, ways = graphs_of_training(model, steering_parameters(model))
    assert graphs <= graphs_of_unsteered <= 3
    assert_each_close(ways, unsteered)


@torch.no_grad()
def test_modes_strength_compiles_nothing_and_each_adapter_one_graph():
    base = build_frozen(num_hidden_layers=2)
    bare = compiled(base)[0](tokens()).logits
    unsteered = bare, logits(base)
    model = steered(build(num_hidden_layers=2))
    for seed, (name, config) in enumerate(
        {"tanh": SteerConfig(activation="tanh"), "one": SteerConfig(layers=[1])}.items()
    ):
        model.steering.add(name, config)
        randomize(model, name, seed)
    run, counter = compiled(model)
    seen = []

    def assert_equal_to_eager() -> None:
        expected = logits(model)
        assert not any(torch.equal(expected, other) for other in seen)
        seen.append(expected)
        assert_close(run(tokens()).logits, expected, unsteered=unsteered)

    for strength in (1.0, -2, 0.5, 0.25, 0, 3.0, 0.7, 1.5, 2.5, 4.0):  # more values than PyTorch's limit of 8 graphs
        model.steering.scale = strength
        assert_equal_to_eager()
    assert counter.frame_count == 1
    for name in ("tanh", "one"):
        model.steering.use(name)
        assert_equal_to_eager()
    assert counter.frame_count == 3
    with model.steering.disabled():
        assert torch.equal(run(tokens()).logits, bare)
    assert counter.frame_count == 4
    for name in ("default", "tanh", "one"):  # again
        model.steering.use(name)
        model.steering.scale = 0.3
        assert_equal_to_eager()
    assert counter.frame_count == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_modes_strength_in_a_compiled_graph_is_not_rounded(dtype):
    model = steered(build(num_hidden_layers=1), SteerConfig(rank=4, scale=0.7)).to(dtype)
    site = model.get_submodule("model.layers.0.post_block")
    run, counter = compiled(site)
    residual, branch = torch.randn(2, 2, 9, HIDDEN, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(run(residual, branch), site(residual, branch))
    assert counter.frame_count == 1


@torch.no_grad()
def test_modes_compiled_decoding_with_a_static_cache():
    model = steered(build(num_hidden_layers=2))
    run, counter = compiled(model)
    ids = tokens(length=12)

    def decoded(run: Any) -> Tensor:
        cache = StaticCache(config=model.config, max_cache_len=16)
        return torch.cat([run(part, past_key_values=cache).logits for part in (ids[:, :6], *ids[:, 6:].split(1, 1))], 1)

    found = decoded(run)
    assert counter.frame_count == 2  # one for the prompt, one for all later tokens
    base = build_frozen(num_hidden_layers=2)
    unsteered = decoded(compiled(base)[0]), base(ids).logits
    assert_close(found, model(ids).logits, unsteered=unsteered)


# ---------------------------------------------------------------------------------------------------------------------
# Autocast, inference mode, functional calls


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_modes_autocast(family, dtype):
    base = build(family).to(dtype)
    model = steered(copy.deepcopy(base))
    seen = []
    model.get_submodule("model.layers.0.post_block").register_forward_hook(lambda *call: seen.append(call[1:]))
    parameters = steering_parameters(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert_as_exact_as_hooks(model, parameters, Hooked(base, parameters), InFull(base, parameters))
        assert logits(model).dtype == torch.bfloat16
    (residual, branch), out = seen[-1]
    assert out.dtype == (residual + branch).dtype == dtype  # not autocast's dtype
    if dtype == torch.float32:  # autocast affects the base but not the steering, which stays exact
        with torch.autocast("cpu", torch.bfloat16):
            exact = logits(InFull(base, parameters).model)
            assert_close(logits(model), exact)
            assert apart(logits(Hooked(base, parameters).model), exact) > 1e-3


def test_modes_inference_mode():
    base = build()
    with torch.inference_mode():
        model = patch_model(base, CONFIG)  # made outside inference mode, so its parameters can train
        parameters = randomize(model)
        expected = model(tokens()).logits
        assert expected.is_inference()
        model.steering.scale = 0.5
    model.steering.scale = 1.0
    assert torch.equal(logits(model), expected)
    assert_as_exact_as_hooks(model, parameters, Hooked(build(), parameters))


def functional_loss(model: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda values: functional_call(model, values, (tokens(),), {"labels": tokens()}).loss


def substitutes(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.randn_like(p) for name, p in model.named_parameters() if p.requires_grad}


def test_modes_functional_call():
    model = steered(build())
    before, values = logits(model), substitutes(model)
    names = {name: name.replace(".default", "") for name in values}
    hooked = Hooked(build(), {names[name]: value for name, value in values.items()})
    truth = hooked.double()
    called = functional_call(model, values, (tokens(),)).logits.detach()
    assert_no_worse(called, *(logits(h.model) for h in (hooked, truth)))
    expected, exact = (
        {name: drawn[0] for name, drawn in gradients(h.model, h.leaves, draws=1).items()} for h in (hooked, truth)
    )

    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    found = torch.autograd.grad(functional_loss(model)(leaves), list(leaves.values()))
    assert_no_worse({names[name]: g for name, g in zip(leaves, found, strict=True)}, expected, exact)
    for found in (grad(functional_loss(model))(values), vjp(functional_loss(model), values)[1](torch.tensor(1.0))[0]):
        assert_no_worse({names[name]: g for name, g in found.items()}, expected, exact)
        assert not any(g.requires_grad for g in found.values())
    assert torch.equal(logits(model), before)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("fuse_norm", [False, True])
def test_modes_the_gradients_of_each_sample_by_vmap(fuse_norm):
    """Under PyTorch's transforms a fused norm computes by itself."""
    model = patch_model(build(), CONFIG, fuse_norm=fuse_norm)
    values = substitutes(model)

    def loss(values: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, values, (row[None],), {"labels": row[None], "use_cache": False}).loss

    found = vmap(grad(loss), in_dims=(None, 0))(values, tokens())
    for index, row in enumerate(tokens()):
        for name, expected in grad(loss)(values, row).items():
            torch.testing.assert_close(found[name][index], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fuse_norm", [False, True])
@pytest.mark.filterwarnings("error:adapter 'default' is in use but does not train")
def test_modes_autograd_of_an_ensemble_by_vmap(fuse_norm):
    """Autograd is outside of vmap, where the model's own parameters do not train."""
    model = patch_model(build(), CONFIG, fuse_norm=fuse_norm).train()
    values, loss = substitutes(model), functional_loss(model)
    values["model.norm.weight"] = model.model.norm.weight.detach() * 2
    stacked = {name: torch.stack([value, value / 2]).requires_grad_() for name, value in values.items()}
    vmap(loss, randomness="same")(stacked).sum().backward()  # `loss` draws its tokens
    for index, factor in enumerate((1, 1 / 2)):
        for name, expected in grad(loss)({name: factor * value for name, value in values.items()}).items():
            torch.testing.assert_close(stacked[name].grad[index], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fuse_norm", [False, True])
def test_modes_compiled_gradients_of_a_functional_call(fuse_norm):
    model = patch_model(build(), CONFIG, fuse_norm=fuse_norm)
    values, slopes = substitutes(model), grad(functional_loss(model))
    found = torch.compile(slopes)(values)
    torch._dynamo.reset()  # PyTorch marks the code that it could not compile
    for name, expected in slopes(values).items():
        assert expected.any()
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)


def by_autograd(loss: Callable[[dict[str, Tensor]], Tensor], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of the sum of the gradients' squares."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    first = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), list(leaves.values()))
    return dict(zip(leaves, second, strict=True))


def by_transforms(loss: Callable[[dict[str, Tensor]], Tensor], values: dict[str, Tensor]) -> dict[str, Tensor]:
    return grad(lambda of: torch.stack([g.square().sum() for g in grad(loss)(of).values()]).sum())(values)


def by_autograd_of_a_transform(
    loss: Callable[[dict[str, Tensor]], Tensor], values: dict[str, Tensor]
) -> dict[str, Tensor]:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    length = torch.stack([g.square().sum() for g in grad(loss)(leaves).values()]).sum()
    return dict(zip(leaves, torch.autograd.grad(length, list(leaves.values())), strict=True))


def by_forward_mode(loss: Callable[[dict[str, Tensor]], Tensor], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of the squares are twice the Hessian times the gradient."""
    first = grad(loss)(values)
    return {name: 2 * value for name, value in jvp(grad(loss), (values,), (first,))[1].items()}


@pytest.mark.parametrize("way", [by_autograd, by_transforms, by_autograd_of_a_transform, by_forward_mode])
@pytest.mark.parametrize("fuse_norm", [False, True])
def test_modes_second_derivatives(fuse_norm, way):
    base = build(attn_implementation="eager")  # PyTorch's fused attention has none
    model = patch_model(copy.deepcopy(base), CONFIG, fuse_norm=fuse_norm)
    values = {name: 0.3 * value for name, value in substitutes(model).items()}
    model(tokens(), labels=tokens()).loss.backward()  # by plans where there are kernels
    hooked = Hooked(base, {name.replace(".default", ""): value for name, value in values.items()})
    expected, exact = (_second_derivatives(h) for h in (hooked, hooked.double()))
    found = {name.replace(".default", ""): value for name, value in way(functional_loss(model), values).items()}
    assert_no_worse(found, expected, exact)


def _second_derivatives(hooked: Hooked) -> dict[str, Tensor]:
    leaves = list(hooked.leaves.values())
    first = torch.autograd.grad(hooked.model(tokens(), labels=tokens()).loss, leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    return dict(zip(hooked.leaves, second, strict=True))


@pytest.mark.parametrize("graded", [True, False])
@pytest.mark.parametrize("fuse_norm", [False, True])
def test_modes_forward_mode(fuse_norm, graded):
    """Without gradients the layers' plans would start kernels, which see no tangent."""
    base = build(attn_implementation="eager")
    model = patch_model(copy.deepcopy(base), CONFIG, fuse_norm=fuse_norm)
    parameters = randomize(model)
    hooked = Hooked(base, parameters)

    def tangent(network: nn.Module) -> Tensor:
        entering = network.get_input_embeddings()(tokens()).detach()
        with torch.set_grad_enabled(graded):
            network(inputs_embeds=entering)
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(entering, entering.sin())
                return forward_ad.unpack_dual(network(inputs_embeds=dual).logits).tangent.detach()

    assert_no_worse(*(tangent(network) for network in (model, hooked.model, hooked.double().model)))


EXPORTED = {
    "lowrank": ("llama", CONFIG, {}),
    "fused norm": ("gemma2", CONFIG, {"fuse_norm": True}),
    "loreft": ("llama", SteerConfig(form="loreft", rank=4, activation="identity"), {}),
    "positions": ("gpt_neox-parallel", SteerConfig(rank=4, positions="first_2+last_1"), {}),
}


@pytest.mark.parametrize(("family", "config", "options"), EXPORTED.values(), ids=EXPORTED)
def test_modes_exported_and_as_operations_of_pytorch_alone(family, config, options):
    """For any number of rows and tokens."""
    model = patch_model(build(family), config, **options)
    randomize(model)
    automatic = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    given = {"input_ids": tokens(), "use_cache": False}
    with torch.no_grad():
        program = torch.export.export(model, (), given, dynamic_shapes={"input_ids": automatic, "use_cache": None})
        table = torch.export.default_decompositions()
        table.update(decompositions())
        plain = program.run_decompositions(table)
        assert any("fused_steer" in str(node.target) for node in program.graph.nodes)
        assert not any("fused_steer" in str(node.target) for node in plain.graph.nodes)
        for ids in (tokens(), tokens(batch=3, length=5)):
            expected = model(ids, use_cache=False).logits
            for run in (program, plain):
                found = run.module()(input_ids=ids, use_cache=False).logits
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_modes_compiled_after_a_state_dict_took_the_place_of_meta():
    torch._dynamo.reset()
    source = steered(build())
    with torch.device("meta"):
        model = patch_model(build(), CONFIG)
    model.load_state_dict(source.state_dict(), assign=True)
    model.model.rotary_emb = source.model.rotary_emb  # no file has its buffers, either
    assert_close(logits(torch.compile(model, fullgraph=True, backend="aot_eager")), logits(source))


def test_modes_exported_in_a_batch_is_refused():
    model = steered(build())
    with torch.no_grad(), model.steering.batch(["default", None]):
        with refused(RuntimeError, "compiled or exported model in a batch", "expected model.generate", model=model):
            torch.export.export(model, (), {"input_ids": tokens(), "use_cache": False})


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("by_peft", [False, True])
def test_modes_symbolic_trace_is_refused(device, by_peft, graded, ran):
    """Of a site or what holds it. PyTorch cannot trace transformers' layers themselves."""
    model = build() if by_peft else steered(build())
    if by_peft:
        from fused_steer.peft import PostBlockConfig

        get_peft_model(model, PostBlockConfig(r=4))
    model.to(device)
    with torch.set_grad_enabled(graded):
        if ran:
            model(tokens().to(device))
        with refused(RuntimeError, "torch.fx.symbolic_trace cannot record", "expected torch.export", model=model):
            torch.fx.symbolic_trace(model.model.layers[0].post_block)


def test_modes_exported_to_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = steered(build())
    with torch.no_grad():
        program = torch.export.export(model, (), {"input_ids": tokens(), "use_cache": False})
    table = torch.export.default_decompositions()
    table.update(decompositions())
    path = tmp_path / "model.onnx"
    torch.onnx.export(program.run_decompositions(table), dynamo=True).save(path)
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: tokens().numpy()})
    torch.testing.assert_close(torch.from_numpy(found), logits(model), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Caches, padding, packing


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox-parallel"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_modes_caches(family, cache):
    base = build(family)
    model = steered(copy.deepcopy(base))
    ways = {"cache_implementation": cache}, {"use_cache": False}
    (cached_text, cached), (text, whole) = (generate(model, **way) for way in ways)
    assert torch.equal(cached_text, text)
    assert_close(cached, whole, unsteered=[generate(build_frozen(family), **way)[1] for way in ways])
    hooked = Hooked(base, steering_parameters(model))
    hooked_text, by_hooks = generate(hooked.model, **ways[0])
    assert torch.equal(cached_text, hooked_text)
    assert_no_worse(cached, by_hooks, generate(hooked.double().model, **ways[0])[1])


REQUESTS = [tokens(seed, 1, length)[0] for seed, length in enumerate((9, 4, 1))]


def padded(side: str) -> dict[str, Tensor]:
    """Return the requests as one padded batch."""
    ids = torch.zeros(len(REQUESTS), max(map(len, REQUESTS)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(REQUESTS):
        part = slice(-len(request), None) if side == "left" else slice(len(request))
        ids[row, part], mask[row, part] = request, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_modes_padded_rows_equal_requests_alone(side, attention):
    batch = padded(side)

    def together_and_alone(model: nn.Module) -> tuple[Tensor, Tensor]:
        alone = torch.cat([model(request[None]).logits[0] for request in REQUESTS])
        return model(**batch).logits[batch["attention_mask"].bool()], alone

    unsteered = together_and_alone(build_frozen(attn_implementation=attention))
    assert_close(*together_and_alone(steered(build(attn_implementation=attention))), unsteered=unsteered)


def test_modes_padding_changes_no_gradient():
    batch = padded("right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    longer = [request[None] for request in REQUESTS if len(request) > 1]
    count = sum(request.numel() - 1 for request in longer)

    def together_and_alone(model: nn.Module, parameters: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        losses = [model(request, labels=request).loss * (request.numel() - 1) for request in longer]
        found = (
            torch.autograd.grad(loss, list(parameters.values()))
            for loss in (model(**batch, labels=labels).loss, sum(losses) / count)
        )
        return [dict(zip(parameters, of, strict=True)) for of in found]

    base, model = build_frozen(), steered(build())
    unsteered = together_and_alone(base, {"": base.get_input_embeddings().requires_grad_(True).weight})
    assert_close(*together_and_alone(model, steering_parameters(model)), unsteered=unsteered)


def test_modes_generation_of_a_left_padded_batch():
    model = steered(build())
    options = {"max_new_tokens": 5, "do_sample": False}
    found = model.generate(**padded("left"), **options)[:, -5:]
    for row, request in enumerate(REQUESTS):
        assert torch.equal(found[row], model.generate(request[None], **options)[0, -5:])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_modes_packed_sequences_equal_requests_alone(attention):
    positions = torch.cat([torch.arange(len(request)) for request in REQUESTS])

    def packed_and_alone(model: nn.Module) -> tuple[Tensor, Tensor]:
        packed = model(torch.cat(REQUESTS)[None], position_ids=positions[None], use_cache=False).logits[0]
        return packed, torch.cat([model(request[None]).logits[0] for request in REQUESTS])

    unsteered = packed_and_alone(build_frozen(attn_implementation=attention))
    assert_close(*packed_and_alone(steered(build(attn_implementation=attention))), unsteered=unsteered)


# ---------------------------------------------------------------------------------------------------------------------
# accelerate's hooks: offloading, and a device map

MAP = {name: "cpu" for name in ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")}
MAP |= {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(LAYERS)}

OFFLOADS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "cpu": lambda model, path: cpu_offload(model),
    "disk": lambda model, path: disk_offload(model, path),
    "map": lambda model, path: dispatch_model(model, MAP, main_device="cpu", offload_dir=path),
}


def hooked_in_place(model: nn.Module) -> nn.Module:
    """Add accelerate's hooks as for several devices: they move a layer's inputs to its device and offload nothing."""
    return dispatch_model(model, dict.fromkeys(MAP, "cpu"), main_device="cpu", force_hooks=True)


def layers_on_meta(model: nn.Module) -> list[int]:
    found = [i for i, layer in enumerate(model.model.layers) if any(p.is_meta for p in layer.parameters())]
    assert all(not p.is_meta for p in steering_parameters(model).values())
    return found


@pytest.mark.parametrize("name", OFFLOADS)
def test_modes_offloaded_and_then_patched(name, tmp_path):
    expected = steered(build())
    model = build()
    model.model.norm.requires_grad_(False)
    OFFLOADS[name](model, tmp_path)
    before, bare = snapshot(model)["modules"], logits(model)
    # An offloaded model's weights may have another memory layout and be multiplied in another order.
    bases = OFFLOADS[name](build_frozen(), tmp_path / "unsteered"), build_frozen()
    unsteered = [logits(base) for base in bases], [input_gradient(base) for base in bases]
    patch_model(model, CONFIG)
    assert layers_on_meta(model) == ([1] if name == "map" else list(range(LAYERS)))
    assert {row.kind for row in model.steering.report()} == {"fused"}
    parameters = randomize(model)
    steered_logits = logits(model)
    assert_close(steered_logits, logits(expected), unsteered=unsteered[0])
    found = gradients(model, parameters), gradients(expected, steering_parameters(expected))
    assert_close(*found, unsteered=unsteered[1])
    (text, by_step), (expected_text, expected_by_step) = generate(model), generate(expected)
    assert torch.equal(text, expected_text)
    assert_close(by_step, expected_by_step, unsteered=unsteered[0])
    model.steering.save(tmp_path / "adapter")
    model.steering.unpatch()
    assert snapshot(model)["modules"] == before
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"model.norm.weight"}
    assert torch.equal(logits(model), bare)
    patch_model(model, tmp_path / "adapter")
    assert torch.equal(logits(model), steered_logits)


@pytest.mark.parametrize("name", OFFLOADS)
def test_modes_patched_and_then_offloaded_is_refused(name, tmp_path):
    model = steered(build())
    OFFLOADS[name](model, tmp_path)
    with refused(
        ValueError, "adapter 'default' is on meta", "expected it on cpu", "call accelerate's offloading first"
    ):
        logits(model)
    model.steering.unpatch()
    assert torch.equal(logits(model), logits(OFFLOADS[name](build(), tmp_path / "unpatched")))


@pytest.mark.parametrize("patched_first", [False, True], ids=["hooks first", "patched first"])
def test_modes_hooks_of_a_device_map(patched_first):
    expected = logits(steered(build()))
    model = build()
    model = hooked_in_place(steered(model)) if patched_first else steered(hooked_in_place(model))
    assert {row.kind for row in model.steering.report()} == {"fused"}
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    model.steering.unpatch()
    assert torch.equal(logits(model), logits(build()))
    steered(model)
    assert torch.equal(logits(model), expected)
    remove_hook_from_submodules(model)  # this leaves the forward on the instance
    assert torch.equal(logits(model), expected)
    model.steering.unpatch()
    assert torch.equal(logits(model), logits(build()))


def test_modes_loaded_with_a_device_map(tmp_path):
    build().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=MAP, offload_folder=tmp_path)
    bare = logits(model.requires_grad_(False))
    assert torch.equal(logits(patch_model(model, CONFIG)), bare)
    assert layers_on_meta(model) == [1]
    randomize(model)
    assert_close(logits(model), logits(steered(build())), unsteered=(bare, logits(build_frozen())))


def adapted(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False))


def test_modes_joint_adaptation_beside_offloaded_embeddings(tmp_path):
    places = dict.fromkeys(MAP, "cpu") | {"model.embed_tokens": "disk"}
    models = [dispatch_model(build(), places, main_device="cpu", offload_dir=tmp_path), build()]
    found, unsteered = [], []
    for model in map(adapted, models):
        unsteered.append(input_gradient(model))
        patch_model(model, SteerConfig(rank=4, orthogonal_to="lora"))
        randomize(model)
        found.append(gradients(model, {name: p for name, p in model.named_parameters() if p.requires_grad}))
    assert_close(*found, unsteered=unsteered)


def test_modes_joint_adaptation_of_an_offloaded_layer_is_refused(tmp_path):
    model = adapted(cpu_offload(build()))
    with refused(ValueError, "LoRA's B of mlp.down_proj in layer 0 is on meta; expected cpu", model=model):
        patch_model(model, SteerConfig(orthogonal_to="lora"))


# ---------------------------------------------------------------------------------------------------------------------
# Quantised bases

WIDE = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes quantises in blocks of 64


def _bits(dtype: torch.dtype, **fields: Any) -> Callable[[Path], PreTrainedModel]:
    def load(path: Path) -> PreTrainedModel:

        config = BitsAndBytesConfig(**fields)
        return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=dtype, device_map="cpu")

    return load


def _torchao(name: str, dtype: torch.dtype = torch.float32) -> Callable[[Path], PreTrainedModel]:
    def load(path: Path) -> PreTrainedModel:

        quantization = importlib.import_module("torchao.quantization")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).requires_grad_(False)
        quantization.quantize_(model, getattr(quantization, name)())
        return model

    return load


QUANTISED = {
    "bitsandbytes nf4": _bits(torch.float32, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes nf4 bf16": _bits(
        torch.bfloat16,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    "bitsandbytes int8": _bits(torch.float32, load_in_8bit=True),
    "torchao int8": _torchao("Int8WeightOnlyConfig"),
    "torchao int8 bf16": _torchao("Int8WeightOnlyConfig", torch.bfloat16),
    "torchao float8": _torchao("Float8WeightOnlyConfig"),
}

#: Quantises the layers' inputs too, and passes no gradient.
DYNAMIC = "torchao int8 dynamic"
DYNAMIC_BASE = _torchao("Int8DynamicActivationInt8WeightConfig")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wide")
    build(**WIDE).save_pretrained(path)
    return path


@pytest.mark.parametrize("name", QUANTISED)
def test_modes_training_on_a_quantised_base(name, wide, tmp_path):
    base, other = (QUANTISED[name](wide).train() for _ in range(2))  # some repack weights at the first inference
    structure = snapshot(base)
    model = patch_model(base, CONFIG)
    parameters = randomize(model)
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    truth, hooked = InFull(other, parameters), InDtype(other, parameters)
    networks = ((model, parameters), (hooked.model, hooked.leaves), (truth.model, truth.leaves))
    assert_no_worse(*(gradients(network, leaves) for network, leaves in networks))

    optimizer = torch.optim.AdamW(model.steering.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.steering.save(tmp_path)
    assert torch.equal(logits(patch_model(other.eval(), tmp_path)), logits(model.eval()))
    model.train().steering.unpatch()
    assert snapshot(model) == structure


@pytest.mark.parametrize("name", [*QUANTISED, DYNAMIC])
def test_modes_inference_on_a_quantised_base(name, wide):
    base, other = (QUANTISED.get(name, DYNAMIC_BASE)(wide).eval().requires_grad_(False) for _ in range(2))
    before = logits(base)
    assert apart(before, logits(build(**WIDE).to(base.dtype))) > 1e-3  # the base really is quantised
    model = patch_model(base, CONFIG)
    assert {row.kind for row in model.steering.report()} == {"fused"}
    assert torch.equal(logits(model), before)
    parameters = randomize(model)
    hooked, truth = (logits(hooks(other, parameters).model) for hooks in (InDtype, InFull))
    assert_no_worse(logits(model), hooked, truth)
    assert apart(truth, before) > 0.1
    assert model.steering.unpatch() is model
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", [*QUANTISED, DYNAMIC])
def test_modes_norms_of_a_quantised_base_are_fused(name, wide):
    """Norms are not quantised, so each is fused. The results are as exact as those of hooks."""
    base, other = (QUANTISED.get(name, DYNAMIC_BASE)(wide).train().requires_grad_(False) for _ in range(2))
    model = patch_model(base, CONFIG, fuse_norm=True)
    parameters = randomize(model)
    truth, hooked = InFull(other, parameters), InDtype(other, parameters)
    assert_no_worse(*map(logits, (model, hooked.model, truth.model)))
    assert [(row.norm, row.norm_calls) for row in model.steering.report()] == [("fused", 1)] * LAYERS
    if name != DYNAMIC:  # which passes no gradient
        networks = ((model, parameters), (hooked.model, hooked.leaves), (truth.model, truth.leaves))
        assert_no_worse(*(gradients(network, leaves) for network, leaves in networks))


@pytest.mark.parametrize("name", QUANTISED)
def test_modes_gradients_pass_through_a_quantised_base(name, wide):
    """For y = x W, dL/dx is dL/dy Wᵀ with the module's own W. Plain hooks are no reference, as they share the base."""
    model = QUANTISED[name](wide).train()
    for path in ("self_attn.q_proj", "mlp.down_proj"):
        module = model.model.layers[0].get_submodule(path)
        with torch.no_grad():
            w = module(torch.eye(module.in_features, dtype=model.dtype))
        x = torch.randn(5, module.in_features, dtype=model.dtype, requires_grad=True)
        y = module(x)
        dy = torch.randn_like(y)
        # bitsandbytes computes 8-bit products in float16.
        precision = torch.finfo(torch.float16 if "int8" in name else model.dtype).eps
        assert apart(torch.autograd.grad(y, x, dy)[0], dy @ w.T) <= 4 * max(precision, ROUNDING)


def test_modes_a_base_that_passes_no_gradient_is_run_and_not_trained_through(wide):
    model = patch_model(DYNAMIC_BASE(wide), CONFIG)
    model.lm_head = nn.Linear(WIDE["hidden_size"], VOCABULARY)
    loss = model(tokens(), labels=tokens()).loss
    with refused(RuntimeError, "a steered block passes no gradient", "expected a base that can be trained through"):
        loss.backward()


def test_modes_quantised_base_with_the_trainer(wide, tmp_path):
    """The Trainer requires a PEFT model on a quantised base, and accepts a steered model as one."""
    from fused_steer.peft import PostBlockConfig

    model = get_peft_model(QUANTISED["bitsandbytes nf4"](wide), PostBlockConfig(r=4))
    row = {"input_ids": tokens()[0], "labels": tokens()[0]}
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=10,
        learning_rate=1e-1,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=[row] * 8)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


# ---------------------------------------------------------------------------------------------------------------------
# Vision-language and encoder-decoder models

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
# As many layers as the decoder, so that the number does not distinguish them.
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
_IMAGE = {"image_size": 16, "patch_size": 8}
IMAGE_TOKEN = 5

#: model type -> its config, and the path of its vision tower.
VISION_LANGUAGE: dict[str, tuple[dict[str, Any], str]] = {
    "llava": (
        {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": {"model_type": "clip_vision_model", **_VISION, **_IMAGE},
            "image_token_index": IMAGE_TOKEN,
            "vision_feature_layer": -1,
        },
        "model.vision_tower",
    ),
    "gemma3": (
        {
            "text_config": {**_TEXT, "head_dim": 8},
            "vision_config": {"model_type": "siglip_vision_model", **_VISION, **_IMAGE},
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE_TOKEN,
        },
        "model.vision_tower",
    ),
    "idefics3": (
        {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": {**_VISION, **_IMAGE},
            "image_token_id": IMAGE_TOKEN,
            "scale_factor": 1,
        },
        "model.vision_model",
    ),
    "qwen2_vl": (
        {
            "text_config": {
                **_TEXT,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            },
            "vision_config": {
                "depth": LAYERS,
                "embed_dim": 32,
                "hidden_size": HIDDEN,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
            "image_token_id": IMAGE_TOKEN,
            "vision_start_token_id": 6,
            "vision_end_token_id": 7,
            "video_token_id": 8,
        },
        "model.visual",
    ),
}


def vision_language(model_type: str) -> PreTrainedModel:
    torch.manual_seed(0)
    fields, _ = VISION_LANGUAGE[model_type]
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **fields)).eval()
    for name, parameter in model.named_parameters():
        if "projector" in name:  # Gemma's projector starts at zero and would hide the image
            nn.init.normal_(parameter, std=0.2)
    return model


def image_and_text(model_type: str, seed: int = 0) -> dict[str, Tensor]:
    """Make inputs of one 16 x 16 image (four tokens) with text on both sides."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([[11, 12, *[IMAGE_TOKEN] * 4, 13, 14, 15]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model_type == "qwen2_vl":
        image = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
        types = (ids == IMAGE_TOKEN).long()
        return inputs | {"pixel_values": image, "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": types}
    image = torch.randn(1, 3, 16, 16, generator=generator)
    if model_type == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE_TOKEN).long()
    return inputs | {"pixel_values": image[None] if model_type == "idefics3" else image}


@pytest.mark.parametrize("model_type", VISION_LANGUAGE)
def test_modes_the_text_decoder_of_a_vision_language_model_is_steered(model_type):
    tower = VISION_LANGUAGE[model_type][1]
    base = vision_language(model_type).requires_grad_(False)
    inputs = image_and_text(model_type)
    run = lambda model, **other: model(**inputs | other)  # noqa: E731
    with torch.no_grad():
        unsteered, blind = (
            run(base).logits,
            run(base, pixel_values=image_and_text(model_type, 1)["pixel_values"]).logits,
        )
    assert apart(blind, unsteered) > 1e-3  # the image has an effect
    before, seen = snapshot(base), tower_output(base, tower, inputs)

    model = patch_model(copy.deepcopy(base), CONFIG)
    parameters = randomize(model)
    assert [row.kind for row in model.steering.report()] == ["fused"] * LAYERS
    assert not any(name.startswith(tower) for name in parameters)
    assert not any(p.requires_grad for p in model.get_submodule(tower).parameters())
    assert all(map(torch.equal, tower_output(model, tower, inputs), seen))
    hooked = Hooked(base, parameters)
    truth = hooked.double()
    with torch.no_grad():
        assert apart(run(model).logits, unsteered) > 0.1
        assert_no_worse(*(run(m).logits for m in (model, hooked.model, truth.model)))
        options = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(**inputs, **options), hooked.model.generate(**inputs, **options))
    found = []
    for network, leaves in ((model, parameters), (hooked.model, hooked.leaves), (truth.model, truth.leaves)):
        loss = run(network, labels=inputs["input_ids"]).loss
        found.append(dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)))
    assert_no_worse(*found)
    model.steering.unpatch()
    after = snapshot(model)
    assert (after["modules"], after["state"]) == (before["modules"], before["state"])


def test_modes_positions_of_a_vision_language_model_under_padding():
    """Gemma 3 makes a dict of masks for its decoder, which does not say which tokens are padding."""
    model = patch_model(vision_language("gemma3"), SteerConfig(rank=4, positions="last_2"))
    randomize(model)
    inputs = image_and_text("gemma3")
    padded = {n: v if n == "pixel_values" else torch.nn.functional.pad(v, (2, 0)) for n, v in inputs.items()}
    with torch.no_grad():
        expected = model(**inputs).logits
        assert_close(model(**padded).logits[:, 2:], expected)
        with model.steering.batch(["default"]):
            assert_close(model(**padded).logits[:, 2:], expected)
    labels = padded["input_ids"].where(torch.arange(11) > 8, -100)
    model(**padded, labels=labels).loss.backward()


def tower_output(model: nn.Module, tower: str, inputs: dict[str, Tensor]) -> list[Tensor]:
    seen: list[Tensor] = []

    def record(module: nn.Module, args: Any, output: Any) -> None:
        seen.extend(value for value in output.values() if isinstance(value, Tensor))

    handle = model.get_submodule(tower).register_forward_hook(record)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    assert seen
    return seen


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("t5", {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}),
        (
            "bart",
            {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
            | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": VOCABULARY},
        ),
    ],
)
def test_modes_encoder_decoder_models_are_refused(model_type, fields):
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(model_type, **fields))
    with refused(ValueError, "is an encoder-decoder model; expected a decoder-only one", model=model):
        patch_model(model)


def test_modes_a_language_model_that_is_an_encoder_decoder_is_refused():
    """The config of InstructBLIP itself does not say what its language model is."""
    t5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    formers = {"vision_config": {**_VISION, **_IMAGE}, "qformer_config": {**_VISION, "encoder_hidden_size": 32}}
    config = AutoConfig.for_model("instructblip", text_config=t5, num_query_tokens=4, **formers)
    model = AutoModelForImageTextToText.from_config(config)
    with refused(ValueError, "is an encoder-decoder model; expected a decoder-only one", model=model):
        patch_model(model)


# --------------------------------------------------------------------------------------- modes of PyTorch's dispatcher


def _step(model: nn.Module, parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the loss and the gradients of a training step."""
    loss = model(tokens(), labels=tokens(), use_cache=False).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(parameters.values()))]


@pytest.mark.parametrize("fuse_norm", [False, True], ids=["op", "fused norm"])
def test_modes_flops_are_those_of_hooks(device, fuse_norm):
    base = build_frozen().to(device)
    model = patch_model(copy.deepcopy(base), CONFIG, fuse_norm=fuse_norm)
    parameters = randomize(model)
    hooked = Hooked(base, parameters)
    counts = []
    for run in (
        lambda: _step(model, parameters),
        lambda: _step(hooked.model, hooked.leaves),
        lambda: logits(model),
        lambda: logits(hooked.model),
    ):
        with FlopCounterMode(display=False) as counter:
            run()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > counts[2] == counts[3] > 0


@pytest.mark.parametrize("saved", ["every op", "sums", "the steering", "none"])
@pytest.mark.parametrize("fuse_norm", [False, True], ids=["op", "fused norm"])
def test_modes_selective_checkpoint(device, fuse_norm, saved):
    """With activations of chosen ops saved, a step has the same bits as without a checkpoint.

    A norm is not fused there, so that it sums in another order.
    """
    model = patch_model(build_frozen().to(device), CONFIG, fuse_norm=fuse_norm)
    parameters = randomize(model)
    ops = torch.ops.fused_steer
    policy = {
        "every op": lambda *_, **__: CheckpointPolicy.MUST_SAVE,
        "sums": [torch.ops.aten.add.Tensor, torch.ops.aten.mm.default],
        "the steering": [ops.post_block.default, ops.post_block_norm.default],
        "none": [],
    }[saved]
    expected = _step(model, parameters)
    runs: list[str] = []

    def loss() -> Tensor:
        runs.append("pass")
        return model(tokens(), labels=tokens(), use_cache=False).loss

    contexts = partial(create_selective_checkpoint_contexts, policy)
    value = checkpoint(loss, use_reentrant=False, context_fn=contexts)
    found = [value.detach(), *torch.autograd.grad(value, list(parameters.values()))]
    assert runs == ["pass"] * 2, "the backward repeated the pass"
    for one, other in zip(found, expected, strict=True):
        if fuse_norm:
            assert_close(one, other)
        else:
            assert torch.equal(one, other)


@torch.no_grad()
def test_modes_flops_of_a_batch_with_an_adapter_for_each_row(device):
    model = patch_model(build_frozen().to(device), SteerConfig(rank=4))
    randomize(model)
    with FlopCounterMode(display=False) as alone:
        expected = model(tokens()).logits
    with FlopCounterMode(display=False) as counter, model.steering.batch(["default", None]):
        found = model(tokens()).logits
    assert_close(found[0], expected[0])
    assert counter.get_total_flops() == alone.get_total_flops(), "rows without an adapter are counted like the others"
