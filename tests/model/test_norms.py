"""Tests of `patch_model(..., fuse_norm=True)`: the norm behind each steered layer, fused into its steering."""

import ast
import copy
import math
import pickle
import re
import threading

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from functorch.compile import make_boxed_func
from models import (
    FAMILIES,
    HIDDEN,
    LAYERS,
    Hooked,
    assert_as_exact_as_hooks,
    assert_close,
    assert_no_worse,
    build,
    build_frozen,
    difference,
    generate,
    gradients,
    logits,
    randomize,
    snapshot,
    steering_parameters,
    tokens,
)
from packaging.version import Version
from peft import LNTuningConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import config as inductor_config
from torch._inductor.utils import get_code
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from fused_steer import SteerConfig, patch_model
from fused_steer.model.decoder import find_decoder
from fused_steer.model.following import Kind, NotFused, following_norm, measure
from fused_steer.model.watch import thread

#: The model families in which every norm fuses.
RMS_NORMS = ["llama", "qwen3", "gemma3", "mixtral", "gemma2", "granite"]
#: By family, why the norm behind each layer is not fused; None if it is.
OTHERS = {
    "olmo2": ["Olmo2Attention is no RMSNorm"] * (LAYERS - 1) + [None],
    "cohere": ["CohereLayerNorm computes no RMSNorm"] * LAYERS,
    "gpt_neox-parallel": ["LayerNorm is no RMSNorm"] * LAYERS,
    "gpt_neox-sequential": ["LayerNorm is no RMSNorm"] * LAYERS,
    "gpt2": ["LayerNorm is no RMSNorm"] * LAYERS,
}


def fused(family: str = "llama", config: SteerConfig | None = None, dtype: torch.dtype = torch.float32):
    """Return a patched model with random norms and adapter, its base, and the adapter's parameters."""
    model = build(family).to(dtype)
    with torch.no_grad():  # away from 1, so that a norm without its weight shows
        for name, parameter in model.named_parameters():
            if "norm" in name:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
                parameter.add_(0.3 * noise.to(dtype))
    base = copy.deepcopy(model)
    patch_model(model, config or SteerConfig(rank=4), fuse_norm=True)
    return model, base, randomize(model)


def unfused(model: nn.Module, base: nn.Module, config: SteerConfig | None = None) -> nn.Module:
    """Return the same steered model without fused norms."""
    other = patch_model(copy.deepcopy(base), config or SteerConfig(rank=4))
    other.load_state_dict(model.state_dict())
    return other


def norms(model: nn.Module) -> list[str]:
    return [entry.norm for entry in model.steering.report()]


def taken(model: nn.Module) -> list[int]:
    return [entry.norm_calls for entry in model.steering.report()]


# ------------------------------------------------------------------------------------------------- families, numbers


@pytest.mark.parametrize("family", [*RMS_NORMS, *OTHERS])
def test_norms_of_each_family_are_fused_and_exact_or_left_with_a_reason(family):
    model, base, parameters = fused(family)
    hooked = Hooked(base, parameters)
    assert_as_exact_as_hooks(model, parameters, hooked)
    model.steering.reset_calls()
    logits(model)
    expected = OTHERS.get(family, [None] * LAYERS)
    for state, calls, reason in zip(norms(model), taken(model), expected, strict=True):
        assert (state, calls) == ("fused", 1) if reason is None else state.startswith(reason) and calls == 0


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norms_in_half_precision_are_as_exact_as_hooks(family, dtype):
    model, base, parameters = fused(family, dtype=dtype)
    with torch.no_grad():  # values that all three hold exactly
        for parameter in parameters.values():
            parameter.copy_(parameter.to(dtype))
    hooked, truth = Hooked(base, parameters), Hooked(base, parameters).double()
    for leaf in hooked.leaves.values():
        leaf.data = leaf.data.to(dtype)
    found = []
    for network in (model, hooked.model, truth.model):
        states = []
        for seed in range(4):
            with torch.no_grad():
                states.append(network(tokens(seed), output_hidden_states=True).hidden_states[-1].to(dtype))
        found.append(torch.stack(states))
    assert_no_worse(*found)
    assert taken(model) == [4] * LAYERS


@pytest.mark.parametrize("length", [9, 40])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_norms_by_the_kernels(family, length, monkeypatch):
    monkeypatch.setenv("FUSED_STEER_BACKEND", "triton")
    model, base, parameters = fused(family)
    hooked = Hooked(base, parameters)
    given = tokens(length=length)
    states = [network(given, labels=given) for network in (model, hooked.model, hooked.double().model)]
    assert_no_worse(*(state.logits.detach() for state in states))
    states[0].loss.backward()
    states[1].loss.backward()
    for name, parameter in parameters.items():
        assert_close(parameter.grad, hooked.leaves[name].grad, unsteered=(torch.ones(1), torch.ones(1) * (1 + 5e-6)))
    assert taken(model) == [1] * LAYERS


@pytest.mark.parametrize(
    "config",
    [
        SteerConfig(form="vector"),
        SteerConfig(rank=4, form="loreft"),
        SteerConfig(rank=4, layers=[1]),
        SteerConfig(rank=4, positions="last_prompt"),
        SteerConfig(rank=4, site="post_mlp"),
        SteerConfig(rank=4, site=["post_mlp", "post_block"]),
        SteerConfig(rank=4, scale=0.0),
    ],
    ids=lambda config: f"{config.form}, {config.layers}, {config.positions}, {config.site}, {config.scale}",
)
def test_norms_of_each_form_of_adapter(config):
    model, base, _ = fused("qwen3", config)
    other = unfused(model, base, config)
    assert_close(logits(model), logits(other))
    labels = tokens()
    labels[:, :4] = -100  # the prompt
    for network in (model, other):
        network(tokens(), labels=labels).loss.backward()
    trained = [(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True) if p.requires_grad]
    assert any(p.grad.any() for p, _ in trained) or config.scale == 0
    for p, q in trained:
        assert (p.grad - q.grad).norm() <= 1e-5 * q.grad.norm()
    assert sum(taken(model)) > 0


def test_norms_behind_another_site_are_left():
    model, base, _ = fused("llama", SteerConfig(rank=4, site="post_attention"))
    assert norms(model) == ["the layer does not end at its site post_attention"] * LAYERS
    assert torch.equal(logits(model), logits(unfused(model, base, SteerConfig(rank=4, site="post_attention"))))


def test_norms_generate_gives_the_same_tokens():
    model, base, _ = fused()
    (sequence, steps), (expected, expected_steps) = generate(model), generate(unfused(model, base))
    assert torch.equal(sequence, expected)
    assert_close(steps, expected_steps)
    assert taken(model) == [6] * LAYERS


def test_norms_train_as_without():
    model, base, _ = fused()
    other = unfused(model, base)
    losses = []
    for network in (model, other):
        optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
        for step in range(4):
            optimizer.zero_grad()
            loss = network(tokens(step), labels=tokens(step)).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    assert_close(torch.stack(losses[:4]), torch.stack(losses[4:]))
    assert losses[0] != losses[3]


# ---------------------------------------------------------------------------------------------------- the hand-over


@pytest.mark.parametrize("change", ["another tensor", "a copy", "in place", "in place, without a gradient"])
def test_norms_take_over_only_for_the_very_tensor_unchanged(change):
    model, base, _ = fused()
    networks = model, unfused(model, base)

    def hook(module, args, output):
        if change == "another tensor":
            return output + 1
        if change == "a copy":
            return output.clone()
        with torch.no_grad():
            output.add_(1)
        return output

    for network in networks:
        network.model.layers[1].register_forward_hook(hook)
    found = []
    for network in networks:
        if change == "in place":
            found.append(network(tokens()).logits.detach())
        else:
            found.append(logits(network))
    assert_close(*found)
    assert taken(model) == [1, 0, 1]
    plain = unfused(model, base)
    assert max(difference(logits(plain), found[0]).values()) > 1e-3 or change == "a copy", "the change shows"


def test_norms_of_a_layer_whose_output_is_changed_in_place_before_the_backward():
    """It is refused with W1 frozen too, which only a layer without a fused norm allows."""
    model, _, parameters = fused()
    for name, parameter in parameters.items():
        parameter.requires_grad_("steer_down" not in name)
    layer = model.model.layers[0]
    with register_module_forward_hook(lambda module, args, output: output.mul_(2) if module is layer else None):
        loss = model(tokens(), labels=tokens()).loss
    with pytest.raises(RuntimeError, match="gradients of W1 and of the fused norm are computed from it; expected a"):
        loss.backward()


#: Ways to keep the first layer's output for its gradient: a handle that ends it, of a model and a list to add it to.
KEEPING = {
    "hook on the layer": lambda layers, kept: layers[0].register_forward_hook(lambda m, args, out: kept.append(out)),
    "hook on the next": lambda layers, kept: layers[1].register_forward_pre_hook(lambda m, args: kept.append(args[0])),
    "hook on the norm": lambda layers, kept: layers[1].input_layernorm.register_forward_hook(
        lambda m, args, out: kept.append(args[0])
    ),
    "retained": lambda layers, kept: register_module_forward_hook(
        lambda module, args, out: (out.retain_grad(), kept.append(out))[0] if module is layers[0] else None
    ),
    "hooked": lambda layers, kept: register_module_forward_hook(
        lambda module, args, out: (out.register_hook(kept.append), None)[1] if module is layers[0] else None
    ),
}


@pytest.mark.parametrize("way", [*KEEPING, "output_hidden_states"])
def test_norms_gradients_of_a_hidden_state_are_whole(way):
    """A site's autograd function gets the gradients of its two results apart. Nobody else may see the one's alone."""
    model, base, _ = fused()
    found = []
    for network in (model, unfused(model, base)):
        kept: list[Tensor] = []
        embedded = network.get_input_embeddings()(tokens()).detach().requires_grad_()
        given = {"inputs_embeds": embedded, "labels": tokens()}
        if way == "output_hidden_states":
            result = network(**given, output_hidden_states=True)
            kept.append(result.hidden_states[1])
        else:
            with KEEPING[way](network.model.layers, kept):
                result = network(**given)
        if way in ("retained", "hooked"):
            result.loss.backward()
        found.append(kept[0] if way == "hooked" else kept[0].grad if way == "retained" else None)
        if found[-1] is None:
            found[-1] = torch.autograd.grad(result.loss, kept[0])[0]
    assert_close(*found)
    assert taken(model) == ([0] * LAYERS if way == "output_hidden_states" else [0, 1, 1])
    model.steering.reset_calls()
    model(tokens(), labels=tokens())
    assert taken(model) == [1] * LAYERS, "nobody keeps it any more"


@pytest.mark.parametrize("before", [False, True])
def test_norms_gradients_are_turned_on_or_off_between_a_layer_and_its_norm(before):
    """With gradients after the layers only the last norm trains; without them its result has no gradient."""
    model, base, _ = fused()
    found, requires = [], []
    for network in (model, unfused(model, base)):
        weight, last, norm = network.model.norm.weight.requires_grad_(), network.model.layers[-1], network.model.norm

        def switch(module, args, output, last=last, norm=norm):
            if module is last:
                torch.set_grad_enabled(not before)
            elif module is norm:
                requires.append(output.requires_grad)

        with torch.set_grad_enabled(before), register_module_forward_hook(switch):
            loss = network(tokens(), labels=tokens()).loss
        if not before:
            loss.backward()
            found.append(weight.grad)
    assert requires == [not before] * 2
    if not before:
        assert_close(*found)


def test_norms_nothing_is_kept_after_a_pass():
    model, _, _ = fused()
    logits(model)
    assert thread.handed is None
    model.model.norm.register_forward_pre_hook(lambda module, args: (_ for _ in ()).throw(KeyError("stop")))
    with pytest.raises(KeyError):
        logits(model)
    assert thread.handed is None


def test_norms_in_another_thread_takes_nothing_over():
    model, base, _ = fused()
    expected = logits(unfused(model, base))
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(logits(model))) for _ in range(3)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(found) == 3
    for each in found:
        assert_close(each, expected)


def test_norms_hooks_on_a_norm_see_its_input_and_output():
    model, base, _ = fused()
    networks = model, unfused(model, base)
    seen: list[Tensor] = []
    for network in networks:
        norm = network.model.layers[1].input_layernorm
        norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        norm.register_forward_hook(lambda module, args, output: seen.append(output) or output * 2)
    results = [logits(network) for network in networks]
    assert_close(*results)
    assert_close(seen[0], seen[2])
    assert_close(seen[1], seen[3])
    assert taken(model) == [1] * LAYERS


def test_norms_output_hidden_states():
    model, base, _ = fused()
    with torch.no_grad():
        states = [
            network(tokens(), output_hidden_states=True).hidden_states for network in (model, unfused(model, base))
        ]
    assert len(states[0]) == LAYERS + 1
    for mine, expected in zip(*states, strict=True):
        assert_close(mine, expected)
    assert taken(model) == [1] * LAYERS


def test_norms_early_exit():
    """After the second layer the final norm gets a tensor whose own norm belongs to the third layer."""
    model, base, _ = fused()
    networks = model, unfused(model, base)
    for network in networks:
        del network.model.layers[2:]
    assert_close(*map(logits, networks))
    model.steering.reset_calls()
    logits(model)
    assert taken(model)[:2] == [1, 0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_norms_gradient_checkpointing(reentrant):
    model, base, parameters = fused()
    hooked = Hooked(base, parameters)
    truth = hooked.double()
    networks = model, hooked.model
    for network in networks:
        network.gradient_checkpointing_enable({"use_reentrant": reentrant})
        network.enable_input_require_grads()
        network.train()
    found = gradients(model, parameters), gradients(hooked.model, hooked.leaves), gradients(truth.model, truth.leaves)
    assert_no_worse(*found)
    if not reentrant:
        assert norms(model) == ["saved tensors are hooked, as gradient checkpointing does"] * LAYERS


def test_norms_inference_mode_is_not_fused_and_right():
    model, base, _ = fused()
    expected = logits(unfused(model, base))
    with torch.inference_mode():
        found = model(tokens()).logits
    assert_close(found.clone(), expected)
    assert all(state.startswith("changes in place of inference tensors cannot be seen") for state in norms(model))
    logits(model)
    assert norms(model) == ["fused"] * LAYERS, "the reason is that of the last call"


def test_norms_inference_mode_sees_changes_in_place():
    """An inference tensor has no version that would tell of a change, so nothing is handed over for one."""
    model, base, _ = fused()
    networks = model, unfused(model, base)
    for network in networks:
        network.model.layers[1].register_forward_hook(lambda module, args, output: output.mul_(2))
    with torch.inference_mode():
        found = [network(tokens()).logits for network in networks]
    assert_close(found[0].clone(), found[1].clone())
    assert taken(model) == [0] * LAYERS and thread.handed is None


def test_norms_inference_tensors_outside_of_inference_mode_are_fused():
    """The states that a layer gets may be inference tensors; what it returns is none."""
    model, base, _ = fused()
    with torch.inference_mode():
        embedded = model.get_input_embeddings()(tokens())
    with torch.no_grad():
        found = [network(inputs_embeds=embedded).logits for network in (model, unfused(model, base))]
    assert embedded.is_inference()
    assert_close(*found)
    assert taken(model) == [1] * LAYERS


def test_norms_a_reentrant_checkpoint_hands_over_nothing_without_a_gradient():
    """Such a checkpoint runs a layer without gradients, and its output gets one afterwards. What was computed beside it
    has none. The norms inside of checkpoints may take it, because they run again; the final norm may not, or it would
    cut off all gradients.
    """
    model, base, parameters = fused()
    plain = unfused(model, base)
    others = {name: value for name, value in plain.named_parameters() if value.requires_grad}
    for network in (model, plain):
        network.gradient_checkpointing_enable({"use_reentrant": True})
        network.enable_input_require_grads()
        network.train()
        network(tokens(), labels=tokens()).loss.backward()
    assert norms(model) == ["fused"] * LAYERS, "each site computed its norm"
    assert taken(model) == [1] * (LAYERS - 1) + [0], "the final norm computed itself"
    for parameter, other in zip(parameters.values(), others.values(), strict=True):
        assert (parameter.grad - other.grad).norm() <= 1e-5 * other.grad.norm()
    for network in (model, plain):
        network.gradient_checkpointing_disable()
    model.steering.reset_calls()
    model(tokens(), labels=tokens()).loss.backward()
    assert taken(model) == [1] * LAYERS, "without checkpoints they are handed over again"


# ------------------------------------------------------------------------------------------------- steering's own verbs


def test_norms_disabled_and_without_an_adapter_the_model_is_the_base_bit_for_bit():
    model, base, _ = fused()
    expected = logits(base.requires_grad_(False))
    with model.steering.disabled():
        assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(model), expected)
    model.steering.use(None)
    assert torch.equal(logits(model), expected)
    assert taken(model) == [1] * LAYERS


def test_norms_a_batch_by_rows_is_right():
    model, base, _ = fused()
    other = unfused(model, base)
    found = []
    for network in (model, other):
        network.steering.add("second", SteerConfig(rank=4))
        randomize(network, "second", seed=3)
        with network.steering.batch(["default", "second"]), torch.no_grad():
            found.append(network.generate(tokens(), max_new_tokens=3, do_sample=False, output_logits=True,
                                          return_dict_in_generate=True).logits)  # fmt: skip
    for mine, expected in zip(*found, strict=True):
        assert_close(mine, expected)


def test_norms_of_layers_that_a_second_adapter_adds_are_fused_too():
    model, _, _ = fused("llama", SteerConfig(rank=4, layers=[0]))
    assert norms(model) == ["fused"]
    model.steering.add("all", SteerConfig(rank=4))
    assert norms(model) == ["fused"] * LAYERS


def test_norms_unpatch_restores_every_object():
    base = build()
    before = snapshot(base)
    patch_model(base, SteerConfig(rank=4), fuse_norm=True)
    assert snapshot(base) != before
    base.steering.unpatch()
    assert snapshot(base) == before
    patch_model(base, SteerConfig(rank=4), fuse_norm=True)
    assert norms(base) == ["fused"] * LAYERS


def test_norms_are_restored_after_a_failed_patch(monkeypatch):
    base = build()
    before = snapshot(base)

    def fail(self, *args):
        raise KeyError("stop")

    monkeypatch.setattr("fused_steer.model.site.SteeringSite.use", fail)
    with pytest.raises(KeyError):
        patch_model(base, SteerConfig(rank=4), fuse_norm=True)
    assert snapshot(base) == before


def test_norms_copies_and_pickles_compute_alone():
    model, _, _ = fused()
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        with torch.no_grad():
            other.model.layers[1].input_layernorm.weight.add_(1)
        assert not torch.equal(logits(other), expected)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm", "input_layernorm"]),
        LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    ],
    ids=["modules_to_save", "LNTuning"],
)
def test_norms_that_peft_copies(config):
    model, base, _ = fused()
    plain = patch_model(base, SteerConfig(rank=4))
    randomize(model), randomize(plain)
    found, expected = (logits(get_peft_model(one, copy.deepcopy(config))) for one in (model, plain))
    assert_close(found, expected)
    assert all("has taken the place of its LlamaRMSNorm" in state for state in norms(model))


def test_norms_that_were_replaced_are_not_reported_as_fused():
    model, _, _ = fused()
    model.model.layers[1].input_layernorm = copy.deepcopy(model.model.layers[1].input_layernorm)
    model.model.norm = torch.compile(model.model.norm, backend="eager")  # holds the norm, and calls it
    model.steering.reset_calls()
    logits(model)
    assert norms(model) == ["another LlamaRMSNorm has taken the place of its LlamaRMSNorm since", "fused", "fused"]
    assert taken(model)[:2] == [0, 1]


def test_norms_copied_alone_are_not_fused_and_copy_nothing_else(monkeypatch):
    model, _, _ = fused()
    made = []
    original = nn.Parameter.__deepcopy__
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", lambda p, memo: made.append(p) or original(p, memo))
    norm = copy.deepcopy(model.model.norm)
    assert made == [model.model.norm.weight]
    x = torch.randn(2, 3, HIDDEN)
    assert torch.equal(norm(x), type(build().model.norm).forward(norm, x))
    made.clear()
    layer = copy.deepcopy(model.model.layers[1])
    assert len(made) == len(list(layer.parameters()))
    whole = copy.deepcopy(model)
    assert torch.equal(logits(whole), logits(model)) and taken(whole) == taken(model)


def test_norms_copied_alone_are_of_the_models_own_class_and_can_be_fused_again():
    """Such a copy in the model, as PEFT makes, is in the way of neither `unpatch` nor a second patch."""
    model, base, _ = fused()
    layers = model.model.layers
    layers[1].input_layernorm = copy.deepcopy(layers[1].input_layernorm)
    assert type(layers[1].input_layernorm) is type(copy.deepcopy(layers[2]).input_layernorm) is LlamaRMSNorm
    model.steering.unpatch()
    assert_close(logits(model), logits(base))
    patch_model(model, SteerConfig(rank=4), fuse_norm=True)
    assert_close(logits(model), logits(base))
    with model.steering.disabled():
        assert_close(logits(model), logits(base))
    assert taken(pickle.loads(pickle.dumps(model))) == [1] * LAYERS


def test_norms_are_off_by_default_and_not_in_the_file(tmp_path):
    model = patch_model(build(), SteerConfig(rank=4))
    assert norms(model) == [""] * LAYERS and "norm" not in str(model.steering.report())
    fused_model, _, _ = fused()
    fused_model.steering.save(tmp_path)
    assert "fuse_norm" not in (tmp_path / "adapter_config.json").read_text()
    again = patch_model(build(), tmp_path)
    assert norms(again) == [""] * LAYERS
    assert "norm: fused" in str(fused_model.steering.report())


# --------------------------------------------------------------------------------------------- models of other states


def test_norms_of_an_offloaded_model_are_left():
    base = build_frozen()
    expected = cpu_offload(copy.deepcopy(base))
    model = cpu_offload(base)
    patch_model(expected, SteerConfig(rank=4))
    patch_model(model, SteerConfig(rank=4), fuse_norm=True)
    randomize(model)
    randomize(expected)
    assert torch.equal(logits(model), logits(expected))
    assert norms(model) == ["the forward of its LlamaRMSNorm was replaced on the instance"] * LAYERS


def test_norms_with_a_forward_that_another_library_wrapped_since_are_right():
    model, base, _ = fused()
    expected = logits(unfused(model, base))
    for module in list(model.modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            add_hook_to_module(module, ModelHook())
    assert_close(logits(model), expected)
    assert norms(model) == ["the LlamaRMSNorm was replaced since"] * LAYERS
    remove_hook_from_submodules(model)
    assert_close(logits(model), expected)


def test_norms_a_weight_of_another_dtype_is_the_models_own():
    """A float32 weight over a bfloat16 state gives float32, as Llama's norm has it."""
    model, base, _ = fused()
    for network in (model, base):
        network.to(torch.bfloat16)
    model.model.layers[1].input_layernorm.float()
    seen = []
    model.model.layers[1].input_layernorm.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with pytest.raises(RuntimeError):  # the projection behind it does not take float32, as without steering
        logits(model)
    assert seen == [torch.float32]
    assert norms(model)[0] == "the norm's weight is torch.float32, and the hidden state torch.bfloat16"


def _without_parameter(norm: nn.Module) -> None:
    """Leave a plain tensor in the weight's place, as FSDP1 does during a pass."""
    weight = norm._parameters.pop("weight")
    norm.weight = weight.detach()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        _without_parameter,
        lambda norm: prune.l1_unstructured(norm, "weight", 0.5),
        lambda norm: parametrize.register_parametrization(norm, "weight", nn.Tanh()),
    ],
    ids=["FSDP1", "pruned", "parametrized"],
)
def test_norms_whose_weight_is_no_parameter_are_right(change, grad):
    model, base, _ = fused()
    other = unfused(model, base)
    for network in (model, other):
        change(network.model.layers[1].input_layernorm)
    with torch.set_grad_enabled(grad):
        assert_close(model(tokens()).logits, other(tokens()).logits)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_norms_whose_eps_is_changed_are_the_models_own(compiled):
    """The eps at the time of the patch was used for good."""
    model, base, _ = fused()
    other = unfused(model, base)
    run = torch.compile(model, backend="eager") if compiled else model
    with torch.no_grad():
        assert_close(run(tokens()).logits, other(tokens()).logits)
        for network in (model, other):
            network.model.layers[1].input_layernorm.variance_epsilon = 0.5
        assert_close(run(tokens()).logits, other(tokens()).logits)
    if not compiled:
        assert norms(model) == ["the eps of its LlamaRMSNorm was changed since", "fused", "fused"]


def test_norms_a_replaced_norm_is_right():
    model, base, _ = fused()
    other = unfused(model, base)
    for network in (model, other):
        network.model.norm = nn.Identity()
    assert_close(logits(model), logits(other))


# ----------------------------------------------------------------------------------------------------- kinds of norms


class _OfOurOwn(nn.Module):
    """An RMSNorm with names that no model has."""

    def __init__(self, hidden: int, small: float, *, outside: bool = False, centred: bool = False) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.zeros(hidden))
        self.small, self.outside, self.centred = small, outside, centred

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() - (x.float().mean(-1, keepdim=True) if self.centred else 0)
        square = wide.square().mean(-1, keepdim=True)
        root = square.sqrt() + self.small if self.outside else (square + self.small).sqrt()
        return ((wide / root) * (1 + self.scales.float())).to(x.dtype)


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        (LlamaRMSNorm(64, eps=1e-5), Kind("weight", 1e-5)),
        (LlamaRMSNorm(64, eps=1e-12), Kind("weight", 1e-12)),
        (Gemma3RMSNorm(64, eps=1e-6), Kind("weight", 1e-6, True, False)),
        (Olmo2RMSNorm(64, eps=1e-6), Kind("weight", 1e-6, False, False)),
        (nn.RMSNorm(64, eps=1e-3), Kind("weight", 1e-3, False, False)),
        (nn.RMSNorm(64), Kind("weight", torch.finfo(torch.float32).eps, False, False)),
        (nn.RMSNorm(64, eps=1e-5, elementwise_affine=False), Kind(None, 1e-5)),
        (_OfOurOwn(64, 3e-6), Kind("scales", 3e-6, True, False)),
    ],
    ids=str,
)
def test_norms_measure_tells_a_kind_by_its_numbers(norm, kind):
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    assert measure(norm, 64) == kind
    assert measure(norm.to(torch.bfloat16), 64) == kind
    assert all(torch.equal(value.to(torch.bfloat16), norm.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (nn.LayerNorm(64), "LayerNorm is no RMSNorm: it has other tensors"),
        (nn.LayerNorm(64, bias=False), "LayerNorm computes no RMSNorm"),
        (nn.Identity(), "Identity computes no RMSNorm"),
        (nn.Linear(64, 64), "Linear is no RMSNorm: it has other tensors"),
        (_OfOurOwn(64, 1e-5, centred=True), "_OfOurOwn computes no RMSNorm"),
        (_OfOurOwn(64, 1e-5, outside=True), "the eps of its _OfOurOwn is not under the root"),
        (LlamaRMSNorm(32), "LlamaRMSNorm is no RMSNorm: it has other tensors"),
        (LlamaRMSNorm(64).to("meta"), "the weight of its LlamaRMSNorm is on meta"),
        (
            LlamaRMSNorm(64).requires_grad_(False).to(torch.float8_e4m3fn),
            "the weight of its LlamaRMSNorm is torch.float8",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_norms_measure_refuses_what_is_no_such_norm(norm, reason):
    with pytest.raises(NotFused) as error:
        measure(norm, 64)
    assert str(error.value).startswith(reason) and "\n" not in str(error.value)


def test_norms_measure_a_norm_that_fails_is_refused_in_one_line():
    class Failing(LlamaRMSNorm):
        def forward(self, hidden_states):
            raise NotImplementedError("needs\na GPU")

    with pytest.raises(NotFused, match=r"^its Failing cannot be tried here \(NotImplementedError\)$"):
        measure(Failing(64), 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_the_following_norm_is_found_in_every_family(family):
    model = build(family)
    decoder = find_decoder(model)
    found = [type(following_norm(decoder, {}, index)).__name__ for index in range(LAYERS)]
    assert "Norm" in found[-1], "the final norm"
    assert all("Attention" in name if family == "olmo2" else "Norm" in name for name in found[:-1])


# ----------------------------------------------------------------------------------------------------- compiled graphs


def traced(model: nn.Module, *, gradients: bool = False) -> tuple[Tensor, list[str]]:
    """Return a compiled model's logits, and the operations of its graphs after functionalisation. No graph breaks."""
    graphs = []

    def keep(graph, example):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.set_grad_enabled(gradients):
        found = compiled(tokens(), use_cache=False).logits
    return found, [str(node.target) for graph in graphs for node in graph.graph.nodes]


def count(operations: list[str], name: str) -> int:
    return sum(name in operation for operation in operations)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_norms_compiled_are_one_op_with_the_steering(family):
    """The graph has an op for each layer, and the norms behind the layers are gone from it."""
    model, base, _ = fused(family)
    expected = logits(model)
    _, unsteered = traced(base.requires_grad_(False))
    found, operations = traced(model)
    assert_close(found, expected)
    assert count(operations, "post_block_norm") == count(operations, "post_block") == LAYERS
    assert count(operations, "rsqrt") == count(unsteered, "rsqrt") - LAYERS


def states_moved(code: str, numel: int) -> int:
    """Count the hidden states, tensors of `numel` numbers, that generated code reads from and writes to memory.

    A kernel reads or writes each of its tensors once, as if its caches held a row. Matrix products are not counted.
    """
    kernels = re.findall(r"^(cpp_\w+) = async_compile\.cpp_pybinding\(.*?kernel\((.*?)\)\s*\{", code, re.M | re.S)
    takes = {name: [p.strip().rpartition("*")[2].split()[-1] for p in body.split(",")] for name, body in kernels}
    shaped = (
        r"(\w+) = empty_strided_cpu\(\((.*?)\)", r"(\w+) = reinterpret_tensor\(\w+, \((.*?)\)",
        r"assert_(?:size_stride|tensor_metadata)\((\w+), \((.*?)\)",
    )  # fmt: skip
    sizes: dict[str, int] = {}
    moved = 0
    for line in map(str.strip, code.splitlines()):
        for pattern in shaped:
            for name, shape in re.findall(pattern, line):
                sizes[name] = math.prod(int(extent) for extent in shape.split(",") if extent.strip())
        if grouped := re.match(r"assert_size_stride_grouped\(\((.*?)\), (\(\(.*?\)\)), \(", line):  # torch 2.14
            names = (name.strip() for name in grouped[1].split(",") if name.strip())
            sizes |= zip(names, map(math.prod, ast.literal_eval(grouped[2])), strict=True)
        for name, other in re.findall(r"^(\w+) = (\w+)(?:;.*)?$", line):
            sizes[name] = sizes.get(other, 0)
        if call := re.match(r"(cpp_\w+)\((.*)\)$", line):
            given = zip(call[2].split(", "), takes[call[1]], strict=True)
            moved += sum(1 + taken.startswith("in_out") for name, taken in given if sizes.get(name) == numel)
        if call := re.search(r"torch\.ops\.fused_steer\.(\w+)\.default\((.*)\)$", line):
            operands = re.sub(r"reinterpret_tensor\((\w+), [^)]*\), [^)]*\), \d+\)", r"\1", call[2]).split(", ")
            read = sum(sizes.get(name) == numel for name in operands)
            assert read == 2, "residual and branch"
            moved += read + (2 if call[1] == "post_block_norm" else 1)
    assert takes and moved
    return moved


def test_norms_compiled_move_no_more_than_the_unsteered_model():
    """Counted in the code that Inductor generates for the CPU: 30 hidden states, unsteered 32. The norm unfused: 32."""
    found = {}
    for name in ("unsteered", "fused", "unfused"):
        model = build_frozen(num_hidden_layers=2)
        if name != "unsteered":
            patch_model(model, SteerConfig(rank=4), fuse_norm=name == "fused")
        torch._dynamo.reset()
        states = torch.randn(2, 20, HIDDEN)  # no other tensor has as many numbers
        compiled = torch.compile(model, fullgraph=True, dynamic=False)
        with torch.no_grad(), inductor_config.patch(force_disable_caches=True):  # cached code would not be generated
            code, *_ = get_code(compiled, inputs_embeds=states, use_cache=False)
        found[name] = states_moved(code, states.numel())
    assert found["fused"] <= found["unsteered"]
    assert found["fused"] < found["unfused"]


def test_norms_compiled_gradients():
    model, base, parameters = fused()
    hooked = Hooked(base, parameters)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    truth = hooked.double()
    found = [
        gradients(network, leaves, draws=2, use_cache=False)
        for network, leaves in ((compiled, parameters), (hooked.model, hooked.leaves), (truth.model, truth.leaves))
    ]
    assert_no_worse(*found)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("change", ["another tensor", "in place"])
def test_norms_compiled_take_over_only_for_the_very_tensor_unchanged(change, backend):
    model, base, _ = fused()
    networks = model, unfused(model, base)

    def hook(module, args, output):
        return output.add_(1) if change == "in place" else output + 1

    for network in networks:
        network.model.layers[1].register_forward_hook(hook)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        assert_close(compiled(tokens(), use_cache=False).logits, logits(networks[1]))


@pytest.mark.parametrize("positions", ["all", "generated"])
def test_norms_compiled_with_checkpointed_layers_are_one_graph_and_right(positions):
    """A checkpointed layer cannot hand anything over to the norm outside of its own graph."""
    whole = Version(torch.__version__) >= Version("2.13")  # Dynamo refused any side effect in a checkpoint before
    if positions != "all" and not whole:
        pytest.skip("the backward pass outside of the graph is refused with positions")
    config = SteerConfig(rank=4, positions=positions)
    model, base, parameters = fused(config=config)
    other = unfused(model, base, config).train()
    layers = set(model.train().model.layers)
    apply_activation_checkpointing(model, check_fn=layers.__contains__)
    torch._dynamo.reset()
    labels = tokens().where(torch.arange(9) > 3, -100)
    losses = []
    for network in (torch.compile(model, backend="aot_eager", fullgraph=whole), other):
        losses.append(network(tokens(), labels=labels, use_cache=False).loss)
        losses[-1].backward()
    assert_close(*losses)
    expected = {name: p.grad for name, p in steering_parameters(other).items()}
    assert_close({name: p.grad for name, p in parameters.items()}, expected)


def test_norms_compiled_leave_a_sharded_weight_to_its_own_layer():
    model, _, _ = fused()
    norm, site = model.model.layers[1].input_layernorm, model.model.layers[0].post_block
    x = torch.randn(1, 2, HIDDEN)
    site.link.graph.begin()
    assert site.link.norm_in_graph(x, x) is not None
    norm._parameters["weight"] = norm.weight.as_subclass(type("Sharded", (Tensor,), {}))
    assert site.link.norm_in_graph(x, x) is None


def test_norms_of_layers_compiled_one_by_one_are_right():
    model, base, _ = fused()
    expected = logits(unfused(model, base))
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    for _ in range(2):
        assert_close(logits(model), expected)


def test_norms_eager_after_compiled_and_back():
    model, _, _ = fused()
    expected = logits(model)
    traced(model)
    model.steering.reset_calls()
    assert torch.equal(logits(model), expected)
    assert taken(model) == [1] * LAYERS
