"""Tests of the frozen base: which parameters train after `unpatch`, whatever was done to the model meanwhile."""

import copy

import pytest
from models import build, refused
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune

from fused_steer import SteerConfig, patch_model


def trained(model: nn.Module) -> set[str]:
    """The parameters of the base that train, without PEFT's names."""
    return {name for name, p in model.named_parameters() if p.requires_grad and ".steer_" not in name}


@pytest.mark.parametrize("first", [0, 1])
def test_frozen_base_of_two_patches_trains_after_both(first):
    """Two heads over one decoder. Each steers its own layers, and both train."""
    models = build(), build(seed=1)
    models[1].model = models[0].model
    models[0].lm_head.requires_grad_(False)
    models[0].model.norm.requires_grad_(False)
    before = [trained(model) for model in models]
    for index, model in enumerate(models):
        patch_model(model, SteerConfig(rank=2, layers=[index]))
    assert not any(map(trained, models))
    assert all(len(list(model.steering.parameters())) == 2 for model in models)
    models[first].steering.unpatch()
    assert not trained(models[1 - first])
    models[1 - first].steering.unpatch()
    assert [trained(model) for model in models] == before


def test_frozen_base_of_a_copy_is_its_own():
    model = patch_model(build())
    other = copy.deepcopy(model)
    model.steering.unpatch()
    assert not trained(other) and trained(model) == trained(build())
    other.steering.unpatch()
    assert trained(other) == trained(model)


@pytest.mark.parametrize("tied", [False, True])
def test_frozen_base_whose_embeddings_were_resized_trains(tied):
    model = build(tie_word_embeddings=tied)
    model.model.norm.requires_grad_(False)
    before = trained(model)
    patch_model(model).resize_token_embeddings(70)
    assert not trained(model)  # transformers makes a new head, as frozen as the old one
    model.steering.unpatch()
    assert trained(model) == before


def test_frozen_base_that_was_pruned_trains():
    model = patch_model(build())
    prune.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.5)
    model.steering.unpatch()
    assert "model.layers.0.mlp.up_proj.weight_orig" in trained(model)


@pytest.mark.parametrize("change", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_frozen_base_that_was_parametrized_trains(change):
    model = build()
    model.model.norm.requires_grad_(False)
    patch_model(model)
    for network in (model, plain := build()):
        change(network.model.layers[0].mlp.up_proj)
    assert not trained(model)
    model.steering.unpatch()
    assert trained(model) == trained(plain) - {"model.norm.weight"}


def test_frozen_base_stays_frozen_if_peft_has_frozen_it_since():
    wrapped = get_peft_model(patch_model(build()), LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.steering.unpatch()
    assert trained(wrapped) and all(".lora_" in name for name in trained(wrapped))


def test_frozen_second_patch_of_the_same_layers_is_refused():
    model = patch_model(build(), SteerConfig(rank=4))
    with refused(ValueError, "layer 0 (LlamaDecoderLayer) is steered at post_block already", model=model):
        patch_model(model.model, SteerConfig(rank=2))
