"""Tests of `merge_and_unload`: the merged model against the steered one, the checkpoint, and what cannot be merged."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from faults import lines_of, raise_at
from models import LAYERS, build, logits, randomize, refused, tokens
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from fused_steer import SteerConfig, patch_model
from fused_steer.steering import Steering
from fused_steer.tools import coverage

LINEAR = {"rank": 4, "activation": "identity"}
FORMS = {
    "vector": {"form": "vector"},
    "post_mlp": {**LINEAR, "site": "post_mlp"},
    "pre_mlp": {**LINEAR, "site": "pre_mlp"},
    "post_attention": {**LINEAR, "site": "post_attention"},
    "biased": {**LINEAR, "site": "post_mlp", "down_bias": True, "up_bias": True},
    "loreft": {"form": "loreft", "rank": 4, "site": "post_mlp"},
    "loreft-before": {"form": "loreft", "rank": 4, "site": "pre_mlp"},
    "three": {**LINEAR, "site": ["post_attention", "pre_mlp", "post_mlp"], "layers": [0, 2]},
}


def steered(family="llama", model=None, **fields):
    """Return a model with a random adapter of strength 0.3."""
    model = patch_model(model or build(family), SteerConfig(scale=0.3, **fields))
    randomize(model)
    return model


def error(model, want, base):
    """How far a model's logits are from the wanted ones, as a share of what steering changes."""
    return float((logits(model) - want).norm() / (want - base).norm())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox-parallel"])
def test_merged_model_and_its_checkpoint_compute_what_the_steered_one_does(family, form, tmp_path):
    """Llama gets biases by an option; GPT-2's matrices are transposed; GPT-NeoX adds attention and MLP at once."""
    model = steered(family, **FORMS[form])
    base, want, names = logits(build(family)), logits(model), list(model.state_dict())
    assert model.steering.merge_and_unload() is model
    assert not hasattr(model, "steering") and not any("steer_" in name for name in model.state_dict())
    assert error(model, want, base) < 1e-4
    assert all(p.requires_grad for p in model.parameters())
    with_biases = {name for name in model.state_dict() if name not in names}
    needed = family == "llama" and form in ("vector", "biased", "loreft", "loreft-before")
    assert bool(with_biases) == needed == bool(getattr(model.config, "mlp_bias", False))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    state = model.state_dict()
    assert {name: t.tolist() for name, t in again.state_dict().items()} == {n: t.tolist() for n, t in state.items()}
    assert error(again, want, base) < 1e-4


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3", "olmo2", "granite", "cohere", "phi3", "mixtral"])
def test_a_site_of_a_module_merges_whatever_follows_it(family):
    """Norms behind the MLP, multipliers, parallel layers, experts: the output of attention is a linear layer's."""
    fields = {**LINEAR, "site": ["post_attention"] if family == "mixtral" else ["post_attention", "post_mlp"]}
    model = steered(family, **fields)
    base, want = logits(build(family)), logits(model)
    model.steering.merge_and_unload()
    assert error(model, want, base) < 1e-4


def test_a_bfloat16_model_is_rounded_once_and_warned_of():
    model = build().bfloat16()
    base = logits(copy.deepcopy(model)).float()
    large = steered(model=copy.deepcopy(model), **FORMS["post_mlp"])
    want = logits(large).float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        large.steering.merge_and_unload()
    assert large.dtype == torch.bfloat16 and error(large, want, base) < 0.2
    small = steered(model=model, **FORMS["post_mlp"])
    small.steering.scale = 1e-3
    with pytest.warns(UserWarning, match=r"changes the adapter's shift of them by \d+%"):
        small.steering.merge_and_unload()


def test_the_strength_of_the_moment_and_a_fresh_adapter():
    model = steered(**FORMS["post_mlp"])
    model.steering.scale = -0.7
    base, want = logits(build()), logits(model)
    model.steering.merge_and_unload()
    assert error(model, want, base) < 1e-4
    model = patch_model(build(), SteerConfig(**FORMS["three"]))
    model.steering.merge_and_unload()
    assert torch.equal(logits(model), base)


def test_a_lora_is_merged_first():
    """PEFT merges it; before that, the steering is refused, also beside a LoRA that is fresh and adds nothing."""
    model = get_peft_model(build(), LoraConfig(r=2, target_modules=["down_proj", "q_proj"]))
    model = steered(model=model, **FORMS["post_mlp"])
    with refused(ValueError, "carries an adapter of PEFT; expected none", model=model):
        model.steering.merge_and_unload()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    want = logits(model)
    model = model.merge_and_unload()
    base, _ = build(), model.steering.merge_and_unload()
    assert not any("lora" in name or "steer" in name for name in model.state_dict())
    assert error(model, want, logits(base)) < 1e-4


@pytest.mark.parametrize(
    ("family", "fields", "parts"),
    [
        ("llama", {"rank": 4, "site": "post_mlp"}, ["activation 'silu'", "expected 'identity'"]),
        ("llama", LINEAR, ["form 'lowrank' at post_block", "expected form 'vector', or site post_mlp"]),
        ("llama", {**FORMS["post_mlp"], "positions": "prompt"}, ["positions 'prompt'", "expected 'all'"]),
        ("qwen3", FORMS["vector"], ["needs model.layers.0.mlp.down_proj.bias", "no option of Qwen3Config"]),
        ("gemma2", FORMS["vector"], ["layer 0 (Gemma2DecoderLayer) computes something else", "at post_block"]),
        ("granite", FORMS["vector"], ["layer 0 (GraniteDecoderLayer) computes something else"]),
        ("mixtral", FORMS["post_mlp"], ["mlp returns the output of no plain linear layers"]),
        ("mixtral", FORMS["pre_mlp"], ["mlp gives its input to no plain linear layers"]),
        ("qwen3_moe", FORMS["pre_mlp"], ["layer 0 (Qwen3MoeDecoderLayer)"]),
    ],
)
def test_what_no_weight_holds_is_refused_before_anything_changes(family, fields, parts):
    model = steered(family, **fields)
    want, state = logits(model), {name: t.clone() for name, t in model.state_dict().items()}
    config = model.config.to_dict()
    with refused(ValueError, *parts, model=model):
        model.steering.merge_and_unload()
    assert torch.equal(logits(model), want) and model.config.to_dict() == config
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


class Scaled(nn.Linear):
    """A linear layer that does not compute what its weight says."""

    def forward(self, x):
        return super().forward(x) * 2


def _shared(model):
    model.model.layers[1].mlp.down_proj = model.model.layers[0].mlp.down_proj


def _scaled(model):
    old = model.model.layers[1].mlp.down_proj
    model.model.layers[1].mlp.down_proj = Scaled(old.in_features, old.out_features, bias=False)


def _parametrized(model):
    nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.down_proj)


def _eight_bits(model):
    weight = model.model.layers[1].mlp.down_proj
    weight.weight = nn.Parameter(weight.weight.to(torch.float8_e4m3fn), requires_grad=False)
    weight.forward = lambda x: nn.functional.linear(x, weight.weight.to(x.dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_shared, "layer 0 (LlamaDecoderLayer): mlp.down_proj has a weight that several modules share"),
        (_scaled, "layer 1 (LlamaDecoderLayer) computes something else"),
        (_parametrized, "layer 1 (LlamaDecoderLayer): mlp.down_proj has a weight that is computed"),
        (_eight_bits, "layer 1 (LlamaDecoderLayer): mlp.down_proj has a weight that is a Parameter of torch.float8"),
    ],
)
def test_a_linear_layer_that_cannot_be_written_is_refused(change, message):
    model = build()
    change(model)
    form = FORMS["biased"] if change is _scaled else FORMS["post_mlp"]  # without a constant, twice is linear, too
    model = steered(model=model, **form)
    with refused(ValueError, message, model=model):
        model.steering.merge_and_unload()


def test_where_the_adapter_does_not_steer_nothing_is_merged():
    model = steered(**FORMS["post_mlp"])
    with model.steering.disabled(), refused(RuntimeError, "while steering is disabled", model=model):
        model.steering.merge_and_unload()
    with model.steering.batch([None, None]), refused(RuntimeError, "inside steering.batch", model=model):
        model.steering.merge_and_unload()
    model.steering.use(None)
    with refused(KeyError, "no adapter is in use", model=model):
        model.steering.merge_and_unload()


@pytest.mark.parametrize("form", ["vector", "post_mlp"])
def test_a_failure_while_weights_are_written_takes_them_out_again(form, monkeypatch):
    model = steered(**FORMS[form])
    want, state = logits(model), {name: t.clone() for name, t in model.state_dict().items()}

    def fail(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Steering, "unpatch", fail)
    with pytest.raises(KeyboardInterrupt):
        model.steering.merge_and_unload()
    monkeypatch.undo()
    assert torch.equal(logits(model), want) and not model.config.mlp_bias
    assert {name: t.tolist() for name, t in model.state_dict().items()} == {n: t.tolist() for n, t in state.items()}


def test_an_exception_at_any_line_leaves_the_steered_the_base_or_the_merged_model(request):
    """The base model after a second `unpatch`, which goes on where the first ended. A sample, or with --every-line."""
    base, vector = logits(build()), {"form": "vector", "layers": [0]}
    model = steered(**vector)
    want = logits(model)
    lines = lines_of(lambda: model.steering.merge_and_unload())  # noqa: B023
    merged = logits(model)
    step = 1 if request.config.getoption("--every-line") else len(lines) // 12
    for line in lines[::step]:
        model = steered(**vector)
        if not raise_at(line, lambda: model.steering.merge_and_unload()):  # noqa: B023
            continue
        steering = getattr(model, "steering", None)
        if steering is None:
            whole = torch.equal(logits(model), merged) and model.config.mlp_bias
            assert whole or torch.equal(logits(model), base) and not model.config.mlp_bias, line
            continue
        assert any(torch.equal(logits(model), one) for one in (want, base)) and not model.config.mlp_bias, line
        steering.unpatch()
        assert torch.equal(logits(model), base), line


def test_the_modes_of_training_stay_as_they_were():
    model = steered("gpt2", **FORMS["three"]).train()
    model.transformer.h[1].eval()
    modes = {path: not path.startswith("transformer.h.1") for path, _ in build("gpt2").named_modules()}
    model.steering.merge_and_unload()
    assert {path: m.training for path, m in model.named_modules()} == modes


def test_a_merged_model_can_be_steered_again():
    model = steered(**FORMS["post_mlp"])
    want = logits(model)
    model.steering.merge_and_unload()
    patch_model(model, SteerConfig(**FORMS["vector"]))
    assert len(model.steering.report()) == LAYERS and torch.allclose(logits(model), want, atol=1e-4)
    model(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in model.steering.parameters())


def test_biases_train_afterwards_as_before_patching():
    """A new one as its weight does."""
    for family in ("gpt2", "llama"):
        model = build(family)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.endswith("bias") if family == "gpt2" else "layers.1" in name
        trained = {name: p.requires_grad for name, p in model.named_parameters()}
        steered(model=model, **FORMS["vector"]).steering.merge_and_unload()
        for name, parameter in model.named_parameters():
            like = name if name in trained else name.replace(".bias", ".weight")
            assert parameter.requires_grad == trained[like], name


def test_the_model_is_returned_without_the_wrapper_of_a_merged_lora(tmp_path):
    """The wrapper would save an empty adapter in place of the merged model."""
    wrapped = get_peft_model(build(), LoraConfig(r=2, target_modules=["q_proj"]))
    steered(model=wrapped, **FORMS["post_mlp"])
    model = wrapped.merge_and_unload()
    assert model.steering.merge_and_unload() is model is not wrapped


def test_the_wrapper_of_soft_prompts_is_returned():
    wrapped = get_peft_model(build(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    model = steered(model=wrapped, **FORMS["post_mlp"])
    want = logits(model)
    assert model.steering.merge_and_unload() is wrapped
    assert torch.allclose(logits(wrapped), want, atol=1e-4)


def test_a_compiled_layer_is_merged():
    """A compiled graph runs no hooks that were added afterwards."""
    model = steered(**FORMS["post_mlp"])
    model.model.layers[0].compile(backend="eager")
    base, want = logits(build()), logits(model)
    model.steering.merge_and_unload()
    assert error(model, want, base) < 1e-4


@pytest.mark.parametrize("form", ["post_attention", "post_mlp", "pre_mlp", "biased"])
def test_a_block_of_zeros_is_merged_into(form):
    """Blocks that are added to a model start with zeros, in which the shift may not show."""
    model = build()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        nn.init.zeros_(model.model.layers[1].get_submodule(name).weight)
    base, model = logits(model), steered(model=model, **FORMS[form])
    want = logits(model)
    model.steering.merge_and_unload()
    assert error(model, want, base) < 1e-4


def test_an_option_that_the_config_refuses_when_it_is_read_is_not_set():
    model = coverage.build("internlm3").eval()
    with refused(ValueError, "no option of InternLM3Config", model=steered(model=model, **FORMS["vector"])):
        model.steering.merge_and_unload()
    assert not model.config.bias
