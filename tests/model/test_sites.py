"""The sites inside a block: each gives what a plain hook on the layer's MLP or attention gives, or is refused."""

from __future__ import annotations

import copy
import os
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import (
    Hooked,
    assert_as_exact_as_hooks,
    assert_close,
    assert_no_worse,
    build_frozen,
    generate,
    gradients,
    input_gradient,
    logits,
    randomize,
    refused,
    snapshot,
    tokens,
)
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from fused_steer import SteerConfig, patch_model
from fused_steer.config import SITES
from fused_steer.tools import coverage

INNER = ("post_attention", "pre_mlp", "post_mlp")


def tiny(model_type: str) -> Callable[[], Any]:
    return lambda: coverage.build(model_type)


def family(name: str) -> Callable[[], Any]:
    return lambda: build_frozen(name)


class Halves(LlamaDecoderLayer):
    """Its MLP is two modules, as in many vision encoders: a linear layer with its activation, and one with dropout."""

    def forward(self, hidden_states, **kwargs):
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.output(self.intermediate(self.post_attention_layernorm(hidden_states)))


def halves() -> Any:
    model = build_frozen()
    for layer in model.model.layers:
        layer.__class__ = Halves
        layer.intermediate = nn.Sequential(layer.mlp.up_proj, nn.SiLU())
        layer.output = nn.Sequential(layer.mlp.down_proj, nn.Dropout(0.0))
        del layer.mlp
    return model


#: name -> the model; the layer's attention and MLP (its first and last module, where it is several); how the outputs of
#: attention and MLP are reached.
CASES: dict[str, tuple[Callable[[], Any], str, str, str, str]] = {
    "llama": (family("llama"), "self_attn", "mlp", "fused", "fused"),
    "qwen3": (family("qwen3"), "self_attn", "mlp", "fused", "fused"),
    "gemma3": (family("gemma3"), "self_attn", "mlp", "inline", "inline"),
    "olmo2": (family("olmo2"), "self_attn", "mlp", "inline", "inline"),
    "granite": (family("granite"), "self_attn", "mlp", "inline", "inline"),
    "cohere": (family("cohere"), "self_attn", "mlp", "fused", "fused"),
    "mixtral": (family("mixtral"), "self_attn", "mlp", "fused", "fused"),
    "gpt_neox-parallel": (family("gpt_neox-parallel"), "attention", "mlp", "inline", "inline"),
    "gpt_neox-sequential": (family("gpt_neox-sequential"), "attention", "mlp", "inline", "inline"),
    "gpt2": (family("gpt2"), "attn", "mlp", "fused", "fused"),
    "falcon": (tiny("falcon"), "self_attention", "mlp", "inline", "inline"),
    "phi": (tiny("phi"), "self_attn", "mlp", "inline", "inline"),
    "opt": (tiny("opt"), "self_attn", "fc1 fc2", "inline", "inline"),
    "mbart": (tiny("mbart"), "self_attn", "fc1 fc2", "inline", "inline"),
    "gemma4": (tiny("gemma4_text"), "self_attn", "mlp", "inline", "inline"),
    # A depthwise convolution follows the attention, and one the MLP.
    "inkling": (tiny("inkling_text"), "self_attn", "mlp", "inline", "inline"),
    "halves": (halves, "self_attn", "intermediate output", "fused", "fused"),
}


def modules_of(attention: str, mlp: str) -> dict[str, str]:
    first, *_, last = [*mlp.split(), *mlp.split()]
    return {"post_attention": attention, "pre_mlp": first, "post_mlp": last}


#: All sites inside a block of every model; some alone; two at one add.
TRIED = [(name, INNER) for name in CASES] + [
    *((name, site) for name in ("llama", "gemma3", "gpt_neox-parallel") for site in INNER),
    ("llama", ("post_mlp", "post_block")),
]


@pytest.mark.parametrize(("name", "site"), TRIED, ids=str)
def test_sites_equal_plain_hooks(name: str, site: Any) -> None:
    make, attention, mlp, of_attention, of_mlp = CASES[name]
    base = make()
    model = patch_model(copy.deepcopy(base), SteerConfig(rank=3, site=site, down_bias=True, up_bias=True))
    assert torch.equal(logits(model), logits(base))
    kinds = {"post_attention": of_attention, "pre_mlp": "inline", "post_mlp": of_mlp}
    assert all(r.kind == kinds[r.site] and bool(r.reason) == (r.kind == "inline" and r.site != "pre_mlp")
               for r in model.steering.report() if r.site != "post_block")  # fmt: skip
    parameters = randomize(model)
    hooked = Hooked(base, parameters, modules=modules_of(attention, mlp))
    model.steering.reset_calls()
    assert_as_exact_as_hooks(model, parameters, hooked)
    calls = {f"{r.path}.{r.site}": r.calls for r in model.steering.report()}
    assert calls == hooked.calls and all(calls.values())
    model.steering.unpatch()
    assert torch.equal(logits(model), logits(base))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox-parallel"])
def test_sites_unpatch_leaves_no_trace(name: str) -> None:
    model = CASES[name][0]()
    before = snapshot(model)
    patch_model(model, SteerConfig(rank=2, site=SITES))
    assert snapshot(model) != before
    model.steering.unpatch()
    assert snapshot(model) == before


# ---------------------------------------------------------------------------------------------------------------------
# Several adapters, each at its sites


def steered(base: nn.Module, **adapters: Any) -> Any:
    """The model with random adapters, by name at these sites; the first is in use."""
    (first, site), *others = adapters.items()
    model: Any = patch_model(base, SteerConfig(rank=3, site=site), adapter_name=first)
    for name, other in others:
        model.steering.add(name, SteerConfig(rank=2, site=other, activation="tanh", scale=0.5))
    for seed, name in enumerate(adapters):
        randomize(model, name, seed=seed)
    return model


ADAPTERS = {"block": "post_block", "mlp": "post_mlp", "several": ("post_attention", "pre_mlp", "post_mlp")}


def alone(model: Any, name: str | None, ids: Tensor) -> Tensor:
    active = model.steering.active
    model.steering.use(name)
    with torch.no_grad():
        found = model(ids).logits
    model.steering.use(active)
    return found


def test_sites_adapters_are_loaded_used_and_removed_beside_each_other(tmp_path) -> None:
    model = steered(build_frozen(), **ADAPTERS)
    for name, site in ADAPTERS.items():
        model.steering.use(name)
        trained = {path for path, p in model.named_parameters() if p.requires_grad}
        sites = (site,) if isinstance(site, str) else site
        assert trained == {path for path in trained if any(f".{one}." in path for one in sites)} and trained
        model.steering.save(tmp_path / name, name)
        other = patch_model(build_frozen(), tmp_path / name)
        assert other.steering.config() == model.steering.config(name) and other.steering.config().site == site
        assert_close(logits(other), logits(model))
        assert {r.site for r in other.steering.report()} == set(sites)
    unsteered = logits(build_frozen())
    with model.steering.disabled():
        assert torch.equal(logits(model), unsteered)
    model.steering.remove("several")
    model.steering.use(None)
    assert torch.equal(logits(model), unsteered)


def test_sites_an_adapter_that_fails_to_come_leaves_the_others() -> None:
    model = steered(build_frozen(), block="post_block")
    before, report = logits(model), model.steering.report()
    model.model.layers[2].post_mlp = None  # a word of the layer's own
    with refused(ValueError, "layer 2 (LlamaDecoderLayer)", "'post_mlp' of its own", model=model):
        model.steering.add("mlp", SteerConfig(site="post_mlp"))
    del model.model.layers[2].post_mlp
    assert torch.equal(logits(model), before) and len(model.steering.report()) == len(report)
    model.steering.add("mlp", SteerConfig(site="post_mlp"))
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("pooled", [False, True], ids=["loaded", "pool"])
def test_sites_rows_of_a_batch_are_what_they_are_alone(name: str, pooled: bool, tmp_path) -> None:
    model = steered(CASES[name][0](), **ADAPTERS)
    names, ids = [*ADAPTERS, None], tokens(batch=4)
    rows = torch.cat([alone(model, one, row[None]) for one, row in zip(names, ids, strict=True)])
    if pooled:
        for one in ADAPTERS:
            model.steering.save(tmp_path / one, one)
        model.steering.unpatch()
        patch_model(model, SteerConfig(rank=1))
        pool = model.steering.make_pool(slots=4, rank=3, site=SITES)
        pool.register_directory(tmp_path)
    base = CASES[name][0]()
    apart = torch.cat([base(row[None]).logits for row in ids])
    with model.steering.batch(names), torch.no_grad():
        assert_close(model(ids).logits, rows, unsteered=(base(ids).logits, apart))


def test_sites_a_pool_refuses_an_adapter_at_other_sites(tmp_path) -> None:
    model = steered(build_frozen(), mlp="post_mlp")
    model.steering.save(tmp_path / "mlp")
    pool = model.steering.make_pool(slots=2)
    pool.register("other", tmp_path / "mlp")
    with refused(ValueError, "steers post_mlp of layer 0", "expected those of the pool, [0, 1, 2]"):
        pool.load("other")


# ---------------------------------------------------------------------------------------------------------------------
# Ways to run


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_sites_on_each_backend(device: torch.device, name: str) -> None:
    base = build_frozen(name, num_hidden_layers=1).to(device)
    model = patch_model(copy.deepcopy(base), SteerConfig(rank=4, site=INNER))
    parameters, ids = randomize(model), tokens(batch=8).to(device)
    hooked = Hooked(base, parameters, modules=modules_of("self_attn", "mlp"))
    truth = hooked.double()
    weights = torch.randn(8, 9, 64, device=device)
    found = []
    for network, leaves in ((model, parameters), (hooked.model, hooked.leaves), (truth.model, truth.leaves)):
        for _ in range(2):  # the second call goes by a plan
            out = network(ids).logits
            grads = torch.autograd.grad((out * weights).sum(), list(leaves.values()))
        with torch.no_grad():
            inferred = network(ids).logits
        found.append(({"train": out.detach(), "infer": inferred}, dict(zip(leaves, grads, strict=True))))
    for results in zip(*found, strict=True):
        assert_no_worse(*results)
    (backend,) = {r.backend for r in model.steering.report()}
    assert backend == os.environ["FUSED_STEER_BACKEND"]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox-parallel", "falcon"])
def test_sites_compiled_whole(name: str) -> None:
    torch.compiler.reset()
    base, other = CASES[name][0](), CASES[name][0]()
    model = patch_model(other, SteerConfig(rank=3, site=SITES))
    parameters = randomize(model)
    compiled, compiled_base = (torch.compile(m, fullgraph=True, backend="aot_eager") for m in (model, base))
    assert_close(logits(compiled), logits(model), unsteered=(logits(compiled_base), logits(base)))
    unsteered = input_gradient(compiled_base), input_gradient(base)
    assert_close(gradients(compiled, parameters), gradients(model, parameters), unsteered=unsteered)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_sites_gradient_checkpointing_changes_no_gradient(name: str, use_reentrant: bool) -> None:
    model, base = patch_model(CASES[name][0](), SteerConfig(rank=3, site=SITES)), CASES[name][0]()
    parameters = randomize(model)
    expected, unsteered = gradients(model, parameters, use_cache=False), input_gradient(base, use_cache=False)
    for one in (model, base):
        one.train()
        one.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        one.enable_input_require_grads()
    actual = gradients(model, parameters, use_cache=False)
    assert_close(actual, expected, unsteered=(input_gradient(base, use_cache=False), unsteered))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("make", [build_frozen, lambda: replaced(build_frozen())], ids=["rewritten", "hook"])
def test_sites_copies_are_equal_and_independent(make: Any, duplicate: Any) -> None:
    model = patch_model(make(), SteerConfig(rank=3, site=INNER))
    randomize(model)
    before, twin = logits(model), duplicate(model)
    assert torch.equal(logits(twin), before)
    randomize(twin, seed=5)
    assert torch.equal(logits(model), before) and not torch.equal(logits(twin), before)
    twin.steering.unpatch()
    assert torch.equal(logits(twin), logits(build_frozen())) and torch.equal(logits(model), before)


def test_sites_dropout_between_the_mlp_and_the_add_is_as_under_hooks() -> None:
    base = coverage.build("opt")
    base.config.dropout = 0.5
    for layer in base.model.decoder.layers:
        layer.dropout = 0.5
    base.train()
    model = patch_model(copy.deepcopy(base), SteerConfig(rank=3, site=("post_attention", "post_mlp"), up_bias=True))
    parameters = randomize(model)
    assert_as_exact_as_hooks(model, parameters, Hooked(base, parameters, modules=modules_of("self_attn", "fc1 fc2")))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_sites_loreft_and_positions(name: str) -> None:
    """The prompt keeps its bits, and a layer that is run again for its gradients steers the same tokens."""
    base = CASES[name][0]()
    model = patch_model(CASES[name][0](), SteerConfig("loreft", rank=3, site=INNER, positions="generated"))
    parameters, ids = randomize(model), tokens()
    labels = ids.clone()
    labels[:, :4] = -100  # the prompt

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        out = model(ids, labels=labels, use_cache=False)
        return out.logits, dict(zip(parameters, torch.autograd.grad(out.loss, list(parameters.values())), strict=True))

    found, expected = run()
    plain = base(ids).logits
    assert torch.equal(found[:, :4], plain[:, :4]) and not torch.equal(found[:, 4], plain[:, 4])
    unsteered = input_gradient(base, use_cache=False)
    for one in (model, base):
        one.train().gradient_checkpointing_enable({"use_reentrant": False})
    assert_close(run()[1], expected, unsteered=(unsteered, input_gradient(base, use_cache=False)))


def test_sites_generation_with_a_cache_equals_generation_without() -> None:
    model = patch_model(build_frozen(), SteerConfig(rank=3, site=INNER))
    randomize(model)
    (text, whole), (cached_text, cached) = (generate(model, use_cache=cache) for cache in (False, True))
    assert torch.equal(cached_text, text)
    assert_close(cached, whole, unsteered=[generate(build_frozen(), use_cache=cache)[1] for cache in (True, False)])


# ---------------------------------------------------------------------------------------------------------------------
# Layers whose forward was replaced, and layers that are not steered


def replaced(model: Any) -> Any:
    """Each layer with another forward on the instance, which does the same."""
    for layer in model.model.layers:
        layer.forward = types.MethodType(LlamaDecoderLayer.forward, layer)
    return model


def test_sites_a_replaced_forward_is_steered_by_hooks_on_its_modules() -> None:
    base = replaced(build_frozen())
    model = patch_model(replaced(build_frozen()), SteerConfig(rank=3, site=SITES, up_bias=True))
    assert {(r.kind, r.reason) for r in model.steering.report()} == {
        ("hook", "its forward was replaced on the instance")
    }
    assert torch.equal(logits(model), logits(base))
    parameters = randomize(model)
    hooked = Hooked(base, parameters, modules=modules_of("self_attn", "mlp"))
    assert_as_exact_as_hooks(model, parameters, hooked)
    layer = model.model.layers[1]
    layer.mlp = copy.deepcopy(layer.mlp)
    with refused(RuntimeError, "layer 1 has another mlp", "expected the model to be unpatched before"):
        logits(model)


@pytest.mark.parametrize("site", INNER)
def test_sites_a_layer_that_ran_unsteered_is_an_error(site: str) -> None:
    model = patch_model(build_frozen(), SteerConfig(site=site))
    layer = model.model.layers[1]
    layer.forward = types.MethodType(LlamaDecoderLayer.forward, layer)
    with refused(RuntimeError, "layer 1 (LlamaDecoderLayer)", f"did not steer at {site};"):
        logits(model)


class Alone(LlamaDecoderLayer):
    """A layer without attention."""

    def forward(self, hidden_states, **kwargs):
        residual = hidden_states
        hidden_states = self.mlp(self.post_attention_layernorm(hidden_states))
        return residual + hidden_states


class Macaron(LlamaDecoderLayer):
    """Half an MLP before the attention and half of one after it, as in Conformers."""

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + 0.5 * self.shared(self.input_layernorm(hidden_states))
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + 0.5 * self.mlp(self.post_attention_layernorm(hidden_states))


class Bound(LlamaDecoderLayer):
    """Its MLP is called by a method, which is not followed."""

    def feed(self, hidden_states):
        return self.mlp(self.post_attention_layernorm(hidden_states))

    def forward(self, hidden_states, **kwargs):
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.feed(hidden_states)


class Both(LlamaDecoderLayer):
    """Two MLPs together."""

    def forward(self, hidden_states, **kwargs):
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + (self.mlp(normed) + self.shared(normed))


def with_layer(cls: type) -> Any:
    model = build_frozen()
    for layer in model.model.layers[1:]:
        layer.__class__ = cls
        layer.shared = copy.deepcopy(layer.mlp)
    return model


@pytest.mark.parametrize(
    ("make", "layer", "sites", "part"),
    [
        (tiny("mamba"), "layer 0 (MambaBlock)", INNER, "has one sublayer, self.mixer"),
        (tiny("nemotron_h"), "layer 0 (NemotronHBlock)", INNER, "has one sublayer, self.mixer"),
        (tiny("bloom"), "layer 0 (BloomBlock)", INNER, "returns what is no sum with its input"),
        (tiny("bert"), "layer 0 (BertLayer)", INNER, "gives self.feed_forward_chunk to a function"),
        (tiny("granitemoe_swa"), "layer 0", ("pre_mlp", "post_mlp"), "self.block_sparse_moe, self.shared_mlp make"),
        (
            tiny("deepseek_v4"),
            "layer 0",
            ("post_attention",),
            "changes its input by self.ffn_hc, and adds what that makes",
        ),
        (tiny("falcon_h1"), "layer 0", ("post_attention",), "self.mamba, self.self_attn make together"),
        (lambda: with_layer(Alone), "layer 1 (Alone)", INNER, "has one sublayer, self.mlp"),
        (
            lambda: with_layer(Macaron),
            "layer 1 (Macaron)",
            ("post_attention",),
            "adds self.self_attn after self.shared",
        ),
        (lambda: with_layer(Bound), "layer 1 (Bound)", INNER, "calls self.feed, which is not followed"),
        (lambda: with_layer(Both), "layer 1 (Both)", ("pre_mlp", "post_mlp"), "adds what self.mlp, self.shared make"),
    ],
    ids=[
        "mamba",
        "nemotron_h",
        "bloom",
        "bert",
        "shared-experts",
        "several-streams",
        "two-mixers",
        "alone",
        "macaron",
        "method",
        "two-mlps",
    ],
)
def test_sites_that_a_layer_lacks_are_refused(make: Any, layer: str, sites: tuple[str, ...], part: str) -> None:
    model = make()
    for site in sites:
        with refused(ValueError, layer, f"cannot be steered at {site}", part, model=model):
            patch_model(model, SteerConfig(site=site))
    patch_model(model)
    with refused(ValueError, f"cannot be steered at {sites[0]}", model=model):
        model.steering.add("other", SteerConfig(site=("post_block", sites[0])))
