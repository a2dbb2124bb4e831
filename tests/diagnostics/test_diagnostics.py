"""Tests of the diagnostics: every number against plain hooks and full matrices, the command, and its refusals."""

import copy
import json
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command import assert_refused, invoke, plain_output  # noqa: F401 (a fixture)
from models import FAMILIES, HIDDEN, LAYERS, build, randomize, refused, snapshot, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from fused_steer import SteerConfig, patch_model, save_joint
from fused_steer.adapters.parameters import SITE
from fused_steer.diagnostics import BINS, LEVELS, QUANTITIES, diagnose
from fused_steer.model.decoder import find_decoder, inside_peft
from fused_steer.tools import coverage

pytestmark = pytest.mark.filterwarnings("ignore:.*layers do nothing")  # fresh adapters

DOWN = {"gpt2": "c_proj", "gpt_neox-parallel": "dense_4h_to_h", "gpt_neox-sequential": "dense_4h_to_h"}


def with_lora(model, **options):
    """Add a LoRA that is not zero to the MLP's output projection."""
    target = [name for name, _ in model.named_modules() if name.endswith("mlp.down_proj")]
    torch.manual_seed(5)
    options = {"r": 4, "target_modules": target, "init_lora_weights": False, "lora_alpha": 6} | options
    return get_peft_model(model, LoraConfig(**options))


def masked_batches():
    """Make two batches; the second is padded on the right."""
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 4:] = mask[2, 1:] = 0
    return [{"input_ids": tokens(0)}, {"input_ids": tokens(1, batch=3, length=7), "attention_mask": mask}]


def layers_of(model):
    return find_decoder(inside_peft(model)).layers


class Seen:
    """Records a module's inputs and outputs by plain hooks, without padding."""

    def __init__(self, modules, model, batches):
        self.got = [[] for _ in modules]
        self.gave = [[] for _ in modules]
        handles = [module.register_forward_hook(self._hook(i)) for i, module in enumerate(modules)]
        with torch.no_grad():
            for batch in batches:
                keep = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
                self.keep = keep.flatten()
                model(**batch)
        for handle in handles:
            handle.remove()

    def _hook(self, i):
        def hook(module, args, output):
            self.got[i].append([self._kept(arg) for arg in args])
            self.gave[i].append(self._kept(output[0] if isinstance(output, tuple) else output))

        return hook

    def _kept(self, tensor):
        return tensor.detach().flatten(0, -2)[self.keep].double()

    def inputs(self, i):
        return [torch.cat(parts) for parts in zip(*self.got[i], strict=True)]

    def outputs(self, i):
        return torch.cat(self.gave[i])


def assert_spread(spread, values):
    """Assert that a spread agrees with independently computed values, (N,)."""
    values = values.numpy()
    assert spread.tokens == len(values)
    assert spread.mean == pytest.approx(values.mean(), rel=1e-4, abs=1e-6)
    assert list(spread.quantiles) == list(map(str, LEVELS))
    assert list(spread.quantiles.values()) == pytest.approx(np.quantile(values, LEVELS).tolist(), rel=1e-4, abs=1e-6)


# --------------------------------------------------------------------------------------------------------- each number


@pytest.mark.parametrize("family", FAMILIES)
def test_diagnostics_the_shift_and_the_mlps_share_of_each_family(family):
    """The expected y, the MLP's share of the stream, is the difference from a second run with a zero MLP."""
    model = patch_model(build(family), SteerConfig(activation="gelu", scale=0.7, up_bias=True, down_bias=True))
    randomize(model)
    batches = masked_batches()
    found = diagnose(model, batches)
    assert found.tokens == 18 + 4 + 7 + 1 and found.lora == ()
    assert [layer.layer for layer in found.layers] == list(range(LAYERS))

    sites = [layer.get_submodule(SITE) for layer in layers_of(model)]
    seen = Seen(sites, model, batches)
    for i, layer in enumerate(found.layers):
        h = sum(seen.inputs(i))
        assert_spread(layer.shift, (seen.outputs(i) - h).norm(dim=1) / h.norm(dim=1))

        mlp = layers_of(model)[i].get_submodule("mlp")
        silent = mlp.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        without = sum(Seen(sites[i : i + 1], model, batches).inputs(0))
        silent.remove()
        assert_spread(layer.mlp_share, (h - without).norm(dim=1) / h.norm(dim=1))
        w2 = sites[i].steer_up["default"].weight
        assert layer.spectral_norm == pytest.approx(torch.linalg.matrix_norm(w2.detach(), 2).item(), rel=1e-5)
        assert layer.absent.keys() == {"alignment", "cosine"} and "no active LoRA on mlp." in layer.absent["cosine"]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox-parallel"])
def test_diagnostics_other_sites(family, tmp_path):
    """h is what the site steers: the output or the input of the MLP, the output of the attention."""
    sites = ("post_attention", "pre_mlp", "post_mlp")
    model = get_peft_model(build(family), LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    patch_model(model, SteerConfig(rank=3, site=sites, scale=0.7, up_bias=True))
    randomize(model)
    batches = masked_batches()
    found = diagnose(model, batches)
    assert [(one.layer, one.site) for one in found.layers] == [(i, site) for i in range(LAYERS) for site in sites]
    steering = [layer.get_submodule(site) for layer in layers_of(model.get_base_model()) for site in sites]
    seen = Seen(steering, model, batches)
    for i, (one, site) in enumerate(zip(found.layers, steering, strict=True)):
        h, total = seen.inputs(i)[-1], sum(seen.inputs(i))
        assert_spread(one.shift, (seen.outputs(i) - total).norm(dim=1) / h.norm(dim=1))
        assert ("cosine" in one.absent, "alignment" in one.absent) == (one.site != "post_mlp", one.site == "pre_mlp")
        assert "post_block" in one.absent["mlp_share"] and len(seen.inputs(i)) == 1 + (site.reads == "branch")
    assert {file.name for file in found.save(tmp_path)} >= {"shift-pre_mlp.png", "cosine-post_mlp.png"}


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_diagnostics_layers_that_a_hook_steers(family):
    """In such layers the MLP's output is a module's output: that of the norm after the MLP, if there is one."""
    fused = patch_model(build(family))
    hooked = build(family)
    for layer in hooked.model.layers:
        layer.forward = layer.forward  # on the instance, so that it cannot be rewritten
    patch_model(hooked)
    for model in (fused, hooked):
        randomize(model)
    one, other = (diagnose(model, masked_batches()) for model in (fused, hooked))
    source = "post_feedforward_layernorm" if family == "gemma2" else "mlp"
    for a, b in zip(one.layers, other.layers, strict=True):
        assert (a.kind, a.mlp_source, b.kind, b.mlp_source) == ("fused", "residual add", "hook", source)
        for name in ("mlp_share", "shift"):
            assert getattr(a, name).mean == pytest.approx(getattr(b, name).mean, rel=1e-5)


def with_another_lora(model):
    """Add a second active LoRA with another scaling."""
    torch.manual_seed(7)
    target = [name for name, _ in inside_peft(model).named_modules() if name.endswith("mlp.down_proj")]
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=16, target_modules=target, init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    return model


@pytest.mark.parametrize("options", [{}, {"two": True}, {"lora_bias": True}, {"use_dora": True}], ids=str)
def test_diagnostics_the_cosine_of_the_two_shifts(options):
    two = options.get("two", False)
    model = with_another_lora(with_lora(build())) if two else with_lora(build(), **options)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:  # DoRA's initial magnitudes would make it equal to LoRA
            parameter.data.mul_(torch.linspace(0.5, 2, len(parameter)))
    model = patch_model(model)
    randomize(inside_peft(model))
    batches = masked_batches()
    found = diagnose(model, batches)
    assert found.lora == (("default", "other") if two else ("default",))

    layers = layers_of(model)
    sites = Seen([layer.get_submodule(SITE) for layer in layers], model, batches)
    projections = [layer.mlp.down_proj for layer in layers]
    adapted = Seen(projections, model, batches)
    bases = Seen([module.base_layer for module in projections], model, batches)
    for i, layer in enumerate(found.layers):
        delta = sites.outputs(i) - sum(sites.inputs(i))
        cosines = F.cosine_similarity(delta, adapted.outputs(i) - bases.outputs(i))
        assert_spread(layer.cosine, cosines)
        counts = np.histogram(cosines.numpy(), BINS, (-1, 1))[0]
        assert np.abs(np.array(layer.cosine.counts) - counts).sum() <= 2  # one on an edge may count on either side
        assert sum(layer.cosine.counts) == found.tokens


@pytest.mark.parametrize("two", [False, True], ids=["one adapter", "two adapters"])
def test_diagnostics_the_alignment_of_the_two_updates(two):
    """The alignment agrees with the SVDs of the full d × k and d × d products."""
    model = with_lora(build(), use_rslora=True)
    if two:
        with_another_lora(model)
    patch_model(model, SteerConfig(rank=3))
    randomize(inside_peft(model))
    found = diagnose(model, masked_batches())
    assert found.lora == (("default", "other") if two else ("default",))
    rank = 6 if two else 4
    for layer, diagnosed in zip(layers_of(model), found.layers, strict=True):
        site = layer.get_submodule(SITE)
        update = sum(layer.mlp.down_proj.get_delta_weight(name) for name in found.lora).detach().double()
        product = (site.steer_up["default"].weight @ site.steer_down["default"].weight).detach().double()
        u, v = torch.linalg.svd(update).U[:, :rank], torch.linalg.svd(product).U[:, :3]
        assert torch.tensor(diagnosed.alignment.singular).shape == (rank, 3)
        assert torch.allclose(torch.tensor(diagnosed.alignment.singular).double(), (u.T @ v).abs(), atol=1e-4)
        # cosines of principal angles: the singular values of the product of the two projections
        cosines = torch.linalg.svdvals((u @ u.T) @ (v @ v.T))[:3]
        assert diagnosed.alignment.principal == pytest.approx(cosines.tolist(), abs=1e-5)


def trained(orthogonal_to):
    model = patch_model(with_lora(build()), SteerConfig(rank=4, orthogonal_to=orthogonal_to))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for step in range(4):
        model(tokens(step), labels=tokens(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_diagnostics_orthogonal_updates_are_seen_to_be_orthogonal(dtype):
    """Orthogonality shows also with a base in bfloat16, where rounding spoils the difference of two outputs."""
    orthogonal, naive = trained("lora"), trained(None)
    for model in (orthogonal, naive):
        for name, parameter in model.named_parameters():
            if "lora_" not in name and SITE not in name:
                parameter.data = parameter.data.to(dtype)
    bases = [layer.get_submodule(SITE).basis for layer in layers_of(orthogonal)]
    found = diagnose(orthogonal, masked_batches())
    assert all(
        basis is not None and layer.get_submodule(SITE).basis is basis
        for basis, layer in zip(bases, layers_of(orthogonal), strict=True)
    )
    for layer in found.layers:
        assert max(layer.alignment.principal) <= 1e-5
        assert max(max(row) for row in layer.alignment.singular) <= 1e-5
        assert max(map(abs, layer.cosine.quantiles.values())) <= 1e-5
        assert layer.cosine.counts[BINS // 2] == layer.cosine.tokens
        assert layer.shift.mean > 1e-3  # the steering has an effect
    for layer in diagnose(naive, masked_batches()).layers:
        assert max(layer.alignment.principal) > 0.1
        assert layer.cosine.quantiles["0.95"] - layer.cosine.quantiles["0.05"] > 0.05


def test_diagnostics_equal_subspaces_are_seen_to_be_equal():
    model = patch_model(with_lora(build()), SteerConfig(rank=4))
    for layer in layers_of(model):
        with torch.no_grad():
            layer.get_submodule(SITE).steer_up["default"].weight.copy_(layer.mlp.down_proj.lora_B["default"].weight)
    for layer in diagnose(model, masked_batches()).layers:
        assert layer.alignment.principal == pytest.approx([1.0] * 4)


# ------------------------------------------------------------------------------------------------------ what is absent


def test_diagnostics_a_vector_has_shifts_and_no_matrices():
    model = patch_model(with_lora(build()), SteerConfig(form="vector", scale=2.0))
    randomize(inside_peft(model))
    batches = masked_batches()
    sites = Seen([layer.get_submodule(SITE) for layer in layers_of(model)], model, batches)
    for i, layer in enumerate(diagnose(model, batches).layers):
        b2 = layers_of(model)[i].get_submodule(SITE).steer_up["default"].bias.detach().double()
        assert_spread(layer.shift, (2 * b2).norm() / sum(sites.inputs(i)).norm(dim=1))
        assert layer.cosine.tokens == 30
        assert layer.absent == {"alignment": "a vector has no W2 W1", "spectral_norm": "a vector has no W2"}


@pytest.mark.parametrize("positions", ["last_prompt", "first_2+last_1", "generated", "prompt"])
def test_diagnostics_only_tokens_at_the_adapters_positions_are_measured(positions):
    """The second batch has answers of one and two tokens; without labels its tokens are all the prompt's."""
    model = patch_model(build(), SteerConfig(positions=positions))
    randomize(model)
    batches = masked_batches()
    labels = torch.full((3, 7), -100)
    labels[0, 3], labels[1, 5:] = 5, 6
    sites = [layer.get_submodule(SITE) for layer in layers_of(model)]
    counts = {"last_prompt": (2, 3), "first_2+last_1": (6, 7), "generated": (0, 3), "prompt": (18, 9)}[positions]
    told = [batches[0], {**batches[1], "labels": labels}]
    if positions == "generated":
        told = told[1:]
    found = diagnose(model, told)
    assert found.tokens == sum(counts)
    norms = [[] for _ in sites]
    for batch in told:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        prompt = mask & (batch["labels"] == -100) if "labels" in batch else mask
        at, last = prompt.cumsum(1), prompt.sum(1, keepdim=True)
        steered = {
            "last_prompt": prompt & (at == last),
            "first_2+last_1": prompt & ((at <= 2) | (at == last)),
            "generated": mask & ~prompt,
            "prompt": prompt,
        }[positions]
        with model.steering.prompts(prompt):
            seen = Seen(sites, model, [{name: value for name, value in batch.items() if name != "labels"}])
        for i in range(len(sites)):
            h = sum(seen.inputs(i))
            norms[i].append(((seen.outputs(i) - h).norm(dim=1) / h.norm(dim=1))[steered[mask]])
    for layer, expected in zip(found.layers, norms, strict=True):
        expected = torch.cat(expected)
        assert expected.min() > 0
        assert_spread(layer.shift, expected)


def test_diagnostics_no_token_at_the_adapters_positions():
    model = patch_model(build(), SteerConfig(positions="generated"))
    with refused(ValueError, "no token at the adapter's positions, generated", model=model):
        diagnose(model, masked_batches())
    ids = tokens()
    for kind, labels, parts in (
        (TypeError, ids.tolist(), ("labels is a list", "a tensor (2, 9)")),
        (ValueError, ids[:, :5], ("labels is (2, 5)", "(2, 9), as input_ids")),
    ):
        with refused(kind, *parts, model=model):
            diagnose(model, [{"input_ids": ids, "labels": labels}])


def test_diagnostics_layers_that_do_nothing_are_named():
    model = patch_model(build())
    randomize(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not diagnose(model, masked_batches()).asleep
    sites = [layer.get_submodule(SITE) for layer in layers_of(model)]
    seen = Seen(sites, model, masked_batches())
    for i, size in ((0, 1.01e-3), (2, 0.99e-3)):  # shifts that are just large enough, and just too small
        h, out = sum(seen.inputs(i)), seen.outputs(i)
        with torch.no_grad():
            sites[i].steer_up["default"].weight *= size / np.quantile((out - h).norm(dim=1) / h.norm(dim=1), 0.5)
        seen = Seen(sites, model, masked_batches())
    with pytest.warns(UserWarning, match=r"^1 of 3 steered layers do nothing, with a median .* below 0.001: 2$"):
        found = diagnose(model, masked_batches())
    assert [layer.layer for layer in found.asleep] == [2]
    assert found.to_json()["asleep"] == [{"layer": 2, "site": "post_block"}]


def test_diagnostics_layers_of_several_sites_that_do_nothing_are_named():
    model = patch_model(build(), SteerConfig(site=["pre_mlp", "post_mlp"]))
    randomize(model)
    with torch.no_grad():
        layers_of(model)[1].get_submodule("post_mlp").steer_up["default"].weight.zero_()
    with pytest.warns(UserWarning, match=r"^1 of 6 steered layers do nothing.*: 1 \(post_mlp\)$"):
        diagnose(model, masked_batches())


def test_diagnostics_a_fresh_adapter_beside_a_fresh_lora():
    model = patch_model(with_lora(build(), init_lora_weights=True))
    for layer in diagnose(model, masked_batches()).layers:
        assert layer.shift.mean == layer.spectral_norm == 0.0
        assert layer.absent == {
            "alignment": "LoRA's update is zero",
            "cosine": "the steering's shift or the LoRA's is zero on every token",
        }


def test_diagnostics_of_a_model_with_an_encoder_that_takes_no_token_ids():
    model = coverage.build("roberta").train()
    target = [name for name, _ in model.named_modules() if name.endswith("output.dense")]
    model = patch_model(with_lora(model, target_modules=target), SteerConfig(rank=2, orthogonal_to="lora"))
    randomize(model)
    diagnosis = diagnose(model, [{"input_ids": tokens()}])
    assert [layer.mlp_source for layer in diagnosis.layers] == ["output.dropout"] * LAYERS
    assert not any(layer.absent for layer in diagnosis.layers) and all(m.training for m in model.modules())


def test_diagnostics_only_steered_layers_are_shown():
    model = patch_model(build(), SteerConfig(layers=[0, 2]))
    model.steering.add("other", SteerConfig(layers=[1]))
    assert [layer.layer for layer in diagnose(model, masked_batches()).layers] == [0, 2]
    model.steering.use("other")
    assert [layer.layer for layer in diagnose(model, masked_batches()).layers] == [1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.base_model.disable_adapter_layers(), "no active LoRA on mlp.down_proj"),
        (lambda model: model.merge_adapter(), "its LoRA is merged into the weights"),
    ],
    ids=["disabled", "merged"],
)
def test_diagnostics_a_lora_that_adds_nothing_of_its_own(change, reason):
    model = patch_model(with_lora(build()))
    change(model)
    assert {layer.absent["cosine"] for layer in diagnose(model, masked_batches()).layers} == {reason}


def test_diagnostics_a_lora_on_other_modules_alone():
    model = patch_model(with_lora(build(), target_modules=["o_proj"]))
    for layer in diagnose(model, masked_batches()).layers:
        assert set(layer.absent) == {"alignment", "cosine"}


def test_diagnostics_a_lora_on_the_parameters_of_experts():
    model = build("mixtral")
    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"], init_lora_weights=False)
    model = patch_model(get_peft_model(model, config))
    randomize(inside_peft(model))
    for layer in diagnose(model, masked_batches()).layers:
        assert layer.absent == dict.fromkeys(("alignment", "cosine"), "its LoRA is on the parameters of experts")
        assert layer.mlp_share.mean > 0


class Routed(torch.nn.Module):
    """An MLP with two expert modules. Each sees some of the tokens."""

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(HIDDEN, HIDDEN) for _ in range(2))

    def forward(self, x):
        flat = x.flatten(0, -2)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = ((flat[:, 0] > 0) == bool(number)).nonzero().squeeze(1)
            if len(rows):
                out = out.index_add(0, rows, expert(flat[rows]))
        return out.view_as(x)


def test_diagnostics_a_lora_on_experts_that_are_modules():
    """LoRAs on expert modules are aligned together. Their shifts have no cosine, as they see different tokens."""
    model = build()
    for layer in model.model.layers:
        layer.mlp = Routed()
    model = patch_model(with_lora(model, r=3, target_modules=["experts.0", "experts.1"]), SteerConfig(rank=2))
    randomize(inside_peft(model))
    for layer, diagnosed in zip(layers_of(model), diagnose(model, masked_batches()).layers, strict=True):
        assert diagnosed.absent == {"cosine": "its LoRA is on experts, which see some of the tokens each"}
        site = layer.get_submodule(SITE)
        update = torch.cat([expert.get_delta_weight("default") for expert in layer.mlp.experts], 1).double()
        product = (site.steer_up["default"].weight @ site.steer_down["default"].weight).double()
        overlap = torch.linalg.svd(update).U[:, :6].T @ torch.linalg.svd(product).U[:, :2]
        assert torch.allclose(torch.tensor(diagnosed.alignment.singular).double(), overlap.abs(), atol=1e-4)


def test_diagnostics_what_is_not_finite_is_absent_and_never_in_json():
    model = patch_model(with_lora(build()))
    randomize(inside_peft(model))
    with torch.no_grad():
        layers_of(model)[1].get_submodule(SITE).steer_up["default"].weight[0, 0] = float("nan")
    found = diagnose(model, masked_batches())
    assert not found.layers[0].absent
    assert found.layers[1].absent == {
        "alignment": "W2 W1 is not finite",
        "cosine": "not finite on 30 of 30 tokens",
        "spectral_norm": "W2 is not finite",
        "shift": "not finite on 30 of 30 tokens",
    }
    assert found.layers[2].absent["mlp_share"].startswith("not finite on 30 of 30")
    json.loads(json.dumps(found.to_json(), allow_nan=False))


# ------------------------------------------------------------------------------------------------------ how it is run


def test_diagnostics_bf16_shifts_are_not_lost_in_rounding():
    """A shift of a thousandth of h is measured exactly, although out − h in bf16 would be only rounding."""
    model = patch_model(with_lora(build()))
    randomize(inside_peft(model))
    for layer in layers_of(model):
        with torch.no_grad():
            layer.get_submodule(SITE).steer_up["default"].weight.mul_(1e-3)
    exact = diagnose(model, masked_batches())
    half = copy.deepcopy(model).to(torch.bfloat16)
    for layer in layers_of(half):
        layer.get_submodule(SITE).float()
    for a, b in zip(exact.layers, diagnose(half, masked_batches()).layers, strict=True):
        assert b.shift.mean == pytest.approx(a.shift.mean, rel=0.03)
        assert b.mlp_share.mean == pytest.approx(a.mlp_share.mean, rel=0.03)
        assert list(b.cosine.quantiles.values()) == pytest.approx(list(a.cosine.quantiles.values()), abs=0.03)


def test_diagnostics_padding_and_batching_change_nothing():
    model = patch_model(with_lora(build()))
    randomize(inside_peft(model))
    rows = tokens(batch=4, length=8)
    mask = torch.ones_like(rows)
    mask[1, 3:] = 0
    given = []
    find_decoder(inside_peft(model)).module.register_forward_pre_hook(
        lambda module, args, kwargs: given.append("labels" in kwargs), with_kwargs=True
    )
    together = diagnose(model, [{"input_ids": rows, "attention_mask": mask, "labels": rows}])
    assert given and not any(given)
    apart = [{"input_ids": rows[i : i + 1, : int(mask[i].sum())]} for i in range(4)]
    for a, b in zip(together.layers, diagnose(model, apart).layers, strict=True):
        for name in ("mlp_share", "shift", "cosine"):
            assert getattr(a, name).tokens == getattr(b, name).tokens == 27
            assert getattr(a, name).mean == pytest.approx(getattr(b, name).mean, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_diagnostics_the_model_is_left_as_it_was(training):
    model = patch_model(with_lora(build(attention_dropout=0.5), lora_dropout=0.5), SteerConfig(orthogonal_to="lora"))
    randomize(inside_peft(model))  # violates the constraint; diagnose must not restore it
    model.train(training)
    layers_of(model)[1].mlp.eval()
    model.steering.reset_calls()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    before, report = snapshot(model), model.steering.report()

    first = diagnose(model, masked_batches())
    assert diagnose(model, masked_batches()) == first  # no dropout
    assert snapshot(model) == before and [module.training for module in model.modules()] == modes
    assert model.steering.report() == report
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())

    def broken():
        yield masked_batches()[0]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        diagnose(model, broken())
    assert snapshot(model) == before and [module.training for module in model.modules()] == modes
    assert model.steering.report() == report


def test_diagnostics_a_compiled_model_is_observed_too():
    model = patch_model(build())
    randomize(model)
    expected = diagnose(model, masked_batches())
    compiled, graphs = torch.compile(model, backend="eager"), []
    for layer in model.model.layers:
        layer.compile(backend=lambda graph, inputs: graphs.append(graph) or graph)
    with torch.no_grad():
        model(**masked_batches()[0])
    count = len(graphs)
    assert diagnose(compiled, masked_batches()).layers == diagnose(model, masked_batches()).layers == expected.layers
    assert len(graphs) == count > 0  # the hooks caused no recompilation


def test_diagnostics_refusals_of_diagnose():
    model = build()
    with refused(ValueError, "LlamaForCausalLM is not steered", "patch_model", model=model):
        diagnose(model, masked_batches())
    patch_model(model)
    with refused(TypeError, "a batch is a Tensor", "input_ids", model=model):
        diagnose(model, [tokens()])
    with refused(ValueError, "hold no token", model=model):
        diagnose(model, [])
    with refused(ValueError, "hold no token", model=model):
        diagnose(model, [{"input_ids": tokens(), "attention_mask": torch.zeros(2, 9)}])
    with refused(ValueError, "attention_mask is (2, 8)", "(2, 9)", model=model):
        diagnose(model, [{"input_ids": tokens(), "attention_mask": torch.ones(2, 8)}])
    with refused(TypeError, "attention_mask is a list", "a tensor (2, 9), as input_ids", model=model):
        diagnose(model, [{"input_ids": tokens(), "attention_mask": torch.ones(2, 9).tolist()}])
    with refused(ValueError, "input_ids is (9,)", "(rows, tokens)", model=model):
        diagnose(model, [{"input_ids": tokens()[0]}])
    with model.steering.disabled(), refused(RuntimeError, "diagnose is called while steering is disabled", model=model):
        diagnose(model, masked_batches())
    with model.steering.batch([None, None]), refused(RuntimeError, "diagnose is called inside steering.batch"):
        diagnose(model, masked_batches())
    model.model.layers[1]._is_fsdp_managed_module = True  # as FSDP marks what it shards
    with refused(ValueError, "layer 1 is sharded by FSDP", "diagnose to be called before it is", model=model):
        diagnose(model, masked_batches())
    model.steering.use(None)
    with refused(ValueError, "no adapter of the model is in use", "default", model=model):
        diagnose(model, masked_batches())


# -------------------------------------------------------------------------------------------------------------- files


def assert_png(file):
    from matplotlib.image import imread

    pixels = imread(file)
    assert min(pixels.shape[:2]) > 300 and pixels[..., :3].std() > 0.02  # the picture is not blank


def test_diagnostics_saving_both_and_then_without_lora(tmp_path):
    out = tmp_path / "made" / "here"
    model = patch_model(with_lora(build()))
    randomize(inside_peft(model))
    found = diagnose(model, masked_batches())
    files = found.save(out)
    assert sorted(files) == sorted(out.iterdir())
    assert [file.name for file in files] == ["diagnostics.json", *(f"{name}.png" for name in QUANTITIES)]
    for file in files[1:]:
        assert_png(file)
    saved = json.loads((out / "diagnostics.json").read_text(), parse_constant=pytest.fail)
    assert saved == found.to_json()
    assert len(saved["cosine_bin_edges"]) == BINS + 1 and len(saved["layers"]) == LAYERS

    alone = patch_model(build())
    diagnose(alone, masked_batches()).save(out)
    assert {file.stem for file in out.iterdir()} == {"diagnostics", "mlp_share", "spectral_norm", "shift"}
    saved = json.loads((out / "diagnostics.json").read_text())
    assert saved["layers"][0]["cosine"] is None and "no active LoRA" in saved["layers"][0]["absent"]["cosine"]
    (tmp_path / "file").write_text("")
    with refused(NotADirectoryError, "is a file"):
        found.save(tmp_path / "file")


def test_diagnostics_without_matplotlib_nothing_is_written(tmp_path, monkeypatch):
    found = diagnose(patch_model(build()), masked_batches())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused(ImportError, "need matplotlib", "fused-steer[demo]"):
        found.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------------- the command

WORDS = ["<eos>", "<unk>", *"a b c d e f g h".split()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Save a model with tokenizer, a steering adapter and a LoRA (separately and together), and prompts."""
    folder = tmp_path_factory.mktemp("diagnose")
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(
        folder / "model"
    )
    build(eos_token_id=0).save_pretrained(folder / "model")
    model = type(build()).from_pretrained(folder / "model")
    model = with_lora(model, target_modules=["down_proj"])
    model.save_pretrained(folder / "lora")
    patch_model(model)
    randomize(inside_peft(model))
    model.steering.save(folder / "adapter")
    save_joint(model, folder / "joint")
    (folder / "prompts.txt").write_text("a b c\n\nd e f g h\r\na\n")
    lines = [json.dumps({"prompt": "a b c", "text": "h h"}), json.dumps({"prompt": "d", "text": "g"}), ""]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder


def test_diagnostics_the_command_with_both_parts(place, tmp_path):
    """Separate parts and one joint directory give the same numbers as `diagnose`."""
    common = ["diagnose", place / "model", "--prompts", place / "prompts.txt", "--device", "cpu", "--batch-size", 2]
    apart = invoke(*common, "--adapter", place / "adapter", "--lora", place / "lora", "--out", tmp_path / "apart")
    assert apart.exit_code == 0, apart.output
    joint = invoke(*common, "--joint", place / "joint", "--out", tmp_path / "joint")
    assert joint.exit_code == 0, joint.output
    one, other = (json.loads((tmp_path / name / "diagnostics.json").read_text()) for name in ("apart", "joint"))
    assert one["layers"] == other["layers"]
    model = type(build()).from_pretrained(place / "model")
    model = patch_model(PeftModel.from_pretrained(model, place / "lora"), place / "adapter")
    batches = [
        {"input_ids": torch.tensor([[2, 3, 4, 0, 0], [5, 6, 7, 8, 9]]), "attention_mask": torch.ones(2, 5)},
        {"input_ids": torch.tensor([[2]])},
    ]
    batches[0]["attention_mask"][0, 3:] = 0
    expected = diagnose(model, batches).to_json()
    assert one["layers"] == expected["layers"] and one["tokens"] == 9

    for line in ("LoRA      default", "prompts   3 of ", ", 9 tokens", "‖δ‖/‖h‖", f"wrote     {tmp_path / 'apart'}"):
        assert line in apart.stdout
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in apart.stdout.splitlines() if "│" in line]
    for layer in expected["layers"]:
        medians = [layer[name]["quantiles"]["0.5"] for name in ("mlp_share", "shift", "cosine")]
        numbers = [*medians[:2], layer["spectral_norm"], medians[2], layer["alignment"]["principal"][0]]
        assert [str(layer["layer"]), "fused", *(f"{number:.3g}" for number in numbers)] in rows
    assert {file.suffix for file in (tmp_path / "apart").iterdir()} == {".png", ".json"}
    assert "absent" not in apart.stdout


def test_diagnostics_the_command_names_layers_that_do_nothing(place, tmp_path):
    model = patch_model(type(build()).from_pretrained(place / "model"), place / "adapter")
    with torch.no_grad():
        layers_of(model)[1].get_submodule(SITE).steer_up["default"].weight.zero_()
    model.steering.save(tmp_path / "asleep")
    arguments = ("--prompts", place / "prompts.txt", "--out", tmp_path / "out", "--device", "cpu")
    result = invoke("diagnose", place / "model", "--adapter", tmp_path / "asleep", *arguments)
    assert result.exit_code == 0, result.output
    said = "warning   1 of 3 steered layers do nothing, with a median ‖δ‖/‖h‖ below 0.001: 1"
    assert said in result.output.replace("\n", " ") and result.output.count("do nothing") == 1


def test_diagnostics_the_command_without_lora(place, tmp_path):
    arguments = ("--adapter", place / "adapter", "--prompts", place / "prompts.jsonl", "--out", tmp_path / "out")
    result = invoke("diagnose", place / "model", *arguments, "--field", "text", "--max-prompts", 1, "--max-length", 1)
    assert result.exit_code == 0, result.output
    assert "1 tokens" in result.stdout and "LoRA      none" in result.stdout
    assert "absent    cosine: no active LoRA on mlp.down_proj (layers 0, 1, 2)" in result.stdout
    assert not (tmp_path / "out" / "cosine.png").exists()


def test_diagnostics_refusals_of_the_command(place, tmp_path, monkeypatch):
    out = tmp_path / "out"
    adapter, txt, jsonl = place / "adapter", place / "prompts.txt", place / "prompts.jsonl"

    def refuses(*parts, prompts=txt, adapter=adapter, model=place / "model", more=()):
        given = () if adapter is None else ("--adapter", adapter)
        result = invoke("diagnose", model, *given, "--prompts", prompts, "--out", out, "--device", "cpu", *more)
        assert_refused(result, *parts)
        assert not out.exists()

    empty, broken, listed, other = (tmp_path / name for name in ("e.txt", "b.jsonl", "l.jsonl", "prompts.csv"))
    empty.write_text("\n  \n")
    broken.write_text('{"prompt": "a"}\n{"prompt"\n')
    listed.write_text("[1]\n")
    other.write_text("a")
    refuses("no file", tmp_path / "nowhere.txt", prompts=tmp_path / "nowhere.txt")
    refuses(other, "expected a .txt", prompts=other)
    refuses("holds no prompt", prompts=empty)
    refuses("line 2 is no JSON", prompts=broken)
    refuses("line 1 has a list", "'prompt'", prompts=listed)
    refuses("line 1 has the fields prompt, text", "'question'", prompts=jsonl, more=("--field", "question"))
    refuses("no adapter directory", adapter=tmp_path / "none")
    refuses("adapter or joint", "neither is", adapter=None)
    refuses("adapter or joint", "both are", more=("--joint", place / "joint"))
    refuses("joint and lora are given", adapter=None, more=("--joint", place / "joint", "--lora", place / "lora"))
    for other in (tmp_path / "none", adapter):
        refuses(f"{other} has no joint.json", adapter=None, more=("--joint", other))
    refuses(tmp_path / "none", more=("--lora", tmp_path / "none"))
    refuses(tmp_path / "none", model=tmp_path / "none")
    refuses("batch size is 0", more=("--batch-size", 0))
    refuses("max prompts is 0", more=("--max-prompts", 0))
    refuses("device is 'tpu'", more=("--device", "tpu"))
    refuses("is a file", more=("--out", txt))


def test_diagnostics_the_prompts_are_checked_before_the_model_is_loaded(place, tmp_path, monkeypatch):
    monkeypatch.setattr("fused_steer.tools.demo.load_model", lambda *arguments: pytest.fail("loaded"))
    bad = ("--adapter", place / "adapter", "--prompts", tmp_path / "none.txt")
    assert_refused(invoke("diagnose", place / "model", *bad), "no file")
    bad = ("--adapter", place / "lora", "--prompts", place / "prompts.txt")
    assert_refused(invoke("diagnose", place / "model", *bad), "adapter_config.json cannot be loaded")
    build(num_hidden_layers=2).save_pretrained(tmp_path / "model")  # the adapters do not fit it
    for given in (("--adapter", place / "adapter"), ("--joint", place / "joint")):
        bad = (*given, "--prompts", place / "prompts.txt", "--no-check-base")
        assert_refused(invoke("diagnose", tmp_path / "model", *bad), "3", "expected", "2")
