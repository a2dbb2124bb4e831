"""Tests that a steered model's memory is freed when the model is deleted, without Python's cyclic garbage collector."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import build, logits, randomize, steering_parameters, tokens
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fused_steer.peft
from fused_steer import SteerConfig, patch_model
from fused_steer.model.weak import Weak

CONFIG = SteerConfig(rank=4)
PROMPT = torch.full_like(tokens(), -100)
PROMPT[:, 4:] = tokens()[:, 4:]


@pytest.fixture(autouse=True)
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def used(model: nn.Module) -> nn.Module:
    """Train a step, run a pass without gradient, and generate."""
    model(tokens(), labels=PROMPT, use_cache=False).loss.backward()
    logits(model)
    model.generate(input_ids=tokens(), max_new_tokens=2, pad_token_id=0)
    return model


def steered(base: nn.Module | None = None, **options: Any) -> nn.Module:
    fuse_norm = options.pop("fuse_norm", False)
    return used(patch_model(build() if base is None else base, SteerConfig(rank=4, **options), fuse_norm=fuse_norm))


def with_lora() -> nn.Module:
    return get_peft_model(build(), LoraConfig(r=2, target_modules=["o_proj", "down_proj"]))


def without_head() -> nn.Module:
    """A LlamaModel. Its own forward runs the layers."""
    model = patch_model(build().model, CONFIG)
    model(tokens()).last_hidden_state.sum().backward()
    return model


def unpatched(model: nn.Module) -> nn.Module:
    steering = model.steering
    steering.unpatch()
    return used(model.requires_grad_(True))


def served() -> nn.Module:
    model = steered()
    with model.steering.batch(["default", None]), torch.no_grad():
        model(tokens())
    with model.steering.disabled():
        logits(model)
    model.steering.make_pool(slots=2, rank=4)
    model.steering.add("another", CONFIG)
    model.steering.use("another")
    model.steering.remove("default")
    return model


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "post_block": steered,
    "post_mlp": lambda: steered(site="post_mlp"),
    "pre_mlp": lambda: steered(site="pre_mlp"),
    "attention and block": lambda: steered(site=("post_attention", "post_block")),
    "vector": lambda: used(patch_model(build(), SteerConfig(form="vector"))),
    "loreft": lambda: steered(form="loreft", activation="identity"),
    "positions": lambda: steered(positions="last_prompt"),
    "fused norm": lambda: steered(fuse_norm=True),
    "beside a LoRA": lambda: steered(with_lora()),
    "orthogonal": lambda: steered(with_lora(), orthogonal_to="lora"),
    "PEFT's method": lambda: used(get_peft_model(build(), fused_steer.peft.PostBlockConfig(rank=4))),
    "without a head": without_head,
    "served": served,
    "unpatched": lambda: unpatched(steered()),
    "unpatched with all": lambda: unpatched(steered(fuse_norm=True, positions="last_prompt")),
    "copy": lambda: copy.deepcopy(steered()),
    "pickle": lambda: pickle.loads(pickle.dumps(steered())),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_weak_deleted_models_free_their_base(make):
    model = make()
    base = [weakref.ref(p) for name, p in model.named_parameters() if ".steer_" not in name and "norm" not in name]
    assert len(base) >= 22
    del model
    assert not [parameter() for parameter in base if parameter() is not None]


@pytest.mark.parametrize("double", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("fuse_norm", [False, True])
def test_weak_copies_do_not_need_the_model(double, fuse_norm, tmp_path):
    model = patch_model(build(), SteerConfig(rank=4, positions="last_prompt"), fuse_norm=fuse_norm)
    randomize(model)
    inputs = {"input_ids": tokens(), "labels": PROMPT, "use_cache": False}
    expected = model(**inputs).loss
    twin = double(model)
    del model
    assert torch.equal(twin(**inputs).loss, expected)
    assert twin.steering._model is twin and twin.steering._decoder.module is twin.model
    twin.steering.save(tmp_path)
    assert len(twin.steering.report()) == len(twin.model.layers)
    with twin.steering.disabled():
        assert not torch.equal(twin(**inputs).loss, expected)
    twin.steering.unpatch()
    assert torch.equal(logits(twin), logits(build()))


@pytest.mark.parametrize("another_list", [False, True])
def test_weak_layers_that_are_dropped_stay_until_the_model_is_unpatched(tmp_path, another_list):
    model = patch_model(build(), CONFIG)
    wanted = {name: p.detach().clone() for name, p in randomize(model).items()}
    layer = weakref.ref(model.model.layers[1])
    if another_list:
        model.model.layers = nn.ModuleList([model.model.layers[0], model.model.layers[2]])
    else:
        del model.model.layers[1]
    model.config.num_hidden_layers = 2
    model(tokens(), use_cache=False)
    if another_list:
        model.steering.save(tmp_path)
        whole = steering_parameters(patch_model(build(), tmp_path))
        assert all(torch.equal(whole[name], value) for name, value in wanted.items())
    assert len(model.steering.report()) == 3
    dropped, steering = layer(), model.steering
    steering.unpatch()
    assert type(dropped) is type(model.model.layers[0]), "it was unpatched too"


KEPT: dict[str, Callable[[], nn.Module]] = {
    "post_block": lambda: patch_model(build(), CONFIG),
    "positions": lambda: patch_model(build(), SteerConfig(rank=4, positions="prompt")),
    "fused norm": lambda: patch_model(build(), CONFIG, fuse_norm=True),
    "loreft": lambda: patch_model(build(), SteerConfig(rank=4, form="loreft", activation="identity")),
    "orthogonal": lambda: patch_model(with_lora(), SteerConfig(rank=4, orthogonal_to="lora")),
}


def last_state(decoder: nn.Module) -> torch.Tensor:
    return decoder(tokens(), use_cache=False).last_hidden_state


@pytest.mark.parametrize("make", KEPT.values(), ids=KEPT)
def test_weak_decoder_that_outlives_its_model_goes_on_being_steered(make, tmp_path):
    model = make()
    randomize(model)
    steering = model.steering
    with steering.prompts([4, 4]):
        decoder = steering._decoder.module
        expected = last_state(decoder)
        head = weakref.ref(model.get_output_embeddings().weight)
        del model
        assert head() is None
        doubles = [double(decoder) for double in (copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part)))]
        assert torch.equal(last_state(decoder), expected)
        last_state(decoder.train()).sum().backward()
        assert all(p.grad is not None for name, p in decoder.named_parameters() if ".steer_up" in name)
        with steering.disabled():
            base = last_state(decoder)
        assert not torch.equal(base, expected)
    steering.save(tmp_path / "adapter")
    decoder.save_pretrained(tmp_path / "decoder")
    for place in ("adapter", "decoder/fused_steer/default" if "lora" in make.__code__.co_names else "decoder"):
        assert patch_model(build().model, tmp_path / place).steering.names == ["default"]
    assert f"{type(decoder).__name__}:" in repr(steering)
    assert steering.unpatch() is decoder
    assert torch.equal(last_state(decoder), base)
    assert "save_pretrained" not in vars(decoder)
    if make is not KEPT["positions"]:  # copies are in no `prompts`
        assert all(torch.equal(last_state(double), expected) for double in doubles)


@pytest.mark.parametrize("double", [copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))])
@pytest.mark.parametrize("fuse_norm", [False, True])
def test_weak_decoder_is_copied_without_the_rest_of_its_model(double, fuse_norm, monkeypatch):
    model = patch_model(build(), CONFIG, fuse_norm=fuse_norm)
    randomize(model)
    expected = last_state(model.model)
    if double is copy.deepcopy:  # a pickle does not tell where it begins
        monkeypatch.setattr(type(model), "__deepcopy__", None, raising=False)
    twin = double(model.model)
    assert torch.equal(last_state(twin), expected)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(last_state(model.model), expected) and not torch.equal(last_state(twin), expected)


def test_weak_decoder_is_saved_with_its_adapter_and_no_warning(tmp_path):
    model = patch_model(build(), CONFIG)
    randomize(model)
    model.model.save_pretrained(tmp_path)
    again = patch_model(build(seed=1).model, tmp_path)
    assert all(
        torch.equal(p, dict(model.model.named_parameters())[n]) for n, p in again.named_parameters() if "steer" in n
    )
    model.steering.unpatch()
    assert "save_pretrained" not in vars(model.model)


def test_weak_steering_of_a_deleted_model_says_so():
    steering = patch_model(build(), CONFIG).steering
    assert repr(steering) == "Steering of a deleted model"
    with pytest.raises(RuntimeError, match="the model of this steering was deleted; expected it to be kept"):
        steering.unpatch()
    with pytest.raises(RuntimeError, match="the model of this steering was deleted"), steering.disabled():
        pass


def test_weak_references_are_equal_if_their_objects_are_the_same():
    one, other = nn.Identity(), nn.Identity()
    assert Weak(one) == Weak(one) != Weak(other)
    assert Weak(one)() is one is Weak(one).there()


REPLACED: dict[str, Callable[[nn.Module], Any]] = {
    "embeddings": lambda model: model.resize_token_embeddings(70),
    "head": lambda model: model.set_output_embeddings(nn.Linear(model.config.hidden_size, 64, bias=False)),
    "projection": lambda model: setattr(
        model.model.layers[1].self_attn, "q_proj", copy.deepcopy(model.model.layers[1].self_attn.q_proj)
    ),
}


@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED)
@pytest.mark.parametrize(
    "double",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), lambda model: AveragedModel(model).module],
    ids=["deepcopy", "pickle", "average"],
)
def test_weak_copies_of_a_model_in_which_a_module_was_replaced(replace, double):
    model = patch_model(build(), CONFIG)
    randomize(model)
    replace(model)
    twin = double(model)
    assert torch.equal(logits(twin), logits(model))
    again = copy.deepcopy(twin)
    for one in (model, twin, again):
        one.steering.unpatch()
    assert torch.equal(logits(again), logits(model))
    assert again.model.layers[0].mlp.up_proj.weight.requires_grad


@pytest.mark.parametrize("kept", [False, True], ids=["the wrapper is deleted", "the wrapper is kept"])
def test_weak_model_that_is_taken_out_of_its_peft_wrapper(tmp_path, kept):
    wrapper = patch_model(with_lora(), CONFIG)
    wanted = {name.removeprefix("base_model.model."): p.detach().clone() for name, p in randomize(wrapper).items()}
    model = wrapper.merge_and_unload()
    if not kept:
        del wrapper
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    model.save_pretrained(tmp_path)
    for one in (model, twin):
        assert one.steering.unpatch() is (wrapper if kept and one is model else one)
        assert not hasattr(one, "steering") and "save_pretrained" not in vars(one)
    saved = patch_model(model, tmp_path, check_base=False)  # the adapter was written beside the whole model
    assert all(torch.equal(p, wanted[name]) for name, p in steering_parameters(saved).items())
    assert torch.equal(logits(saved), expected)


@pytest.mark.parametrize("scope", ["disabled", "batch", "mode"])
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_weak_scopes_end_without_an_error_when_their_model_is_deleted(scope):
    model = patch_model(with_lora() if scope == "mode" else build(), SteerConfig(rank=4, positions="prompt"))
    opened = {"disabled": (), "batch": (["default", None],), "mode": ("lora",)}
    model.scope = getattr(model.steering, scope)(*opened[scope])
    model.scope.__enter__()
    freed = weakref.ref(model)
    del model
    gc.collect()
    assert freed() is None
