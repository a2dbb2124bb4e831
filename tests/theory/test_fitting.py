"""fit: the streams are those of the patched model, shares are those of its hidden states, and what is refused."""

import copy
import json
import math
import warnings

import pytest
import torch
from models import FAMILIES, HIDDEN, LAYERS, build, randomize, snapshot, tokens
from peft import LoraConfig, get_peft_model

from fused_steer import SteerConfig, patch_model
from fused_steer.adapters.files import write_adapter
from fused_steer.adapters.parameters import Place
from fused_steer.model.decoder import find_decoder, inside_peft
from fused_steer.theory import fit, fit_each, fit_within
from fused_steer.tools import coverage


def batches(count=3, seed=0, length=9):
    """The last one is padded on the right."""
    made = []
    for number in range(count):
        mask = torch.ones(4, length, dtype=torch.long)
        if number == count - 1:
            mask[1, 5:] = mask[3, 1:] = 0
        made.append({"input_ids": tokens(seed + number, batch=4, length=length), "attention_mask": mask})
    return made


def tuned_of(model, size=0.05):
    """A copy with other weights."""
    tuned = copy.deepcopy(model)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += size * parameter.std() * torch.randn_like(parameter)
    return tuned


def config(rank=4, **fields):
    return SteerConfig(rank=rank, **{"activation": "identity", "up_bias": True} | fields)


def states(model, given):
    """The hidden state after each layer, (N, d) of all tokens that count, by plain hooks."""
    found = []
    handles = [
        layer.register_forward_hook(lambda m, a, out: found.append(out[0] if isinstance(out, tuple) else out))
        for layer in find_decoder(inside_peft(model)).layers
    ]
    with torch.no_grad():
        for batch in given:
            model(**batch)
    for handle in handles:
        handle.remove()
    keep = [batch["attention_mask"].bool() for batch in given]
    layers = len(handles)
    return [torch.cat([found[b * layers + i][keep[b]] for b in range(len(given))]).double() for i in range(layers)]


def at_site(model, site, given):
    """What an adapter at the site reads, in each layer, (N, d) of all tokens that count."""
    own = hasattr(model, "steering")
    if not own:
        patch_model(model, SteerConfig(form="vector", site=site))
    found = []

    def hook(module, args):
        found.append(args[-1])

    handles = [layer.get_submodule(site).register_forward_pre_hook(hook) for layer in find_decoder(model).layers]
    with torch.no_grad():
        for batch in given:
            model(**batch)
    for handle in handles:
        handle.remove()
    if not own:
        model.steering.unpatch()
    keep = [batch["attention_mask"].bool() for batch in given]
    return [torch.cat([found[b * LAYERS + i][keep[b]] for b in range(len(given))]).double() for i in range(LAYERS)]


def shares(base, steered, tuned, given):
    """After each layer 1 − Σ‖h_tuned − h_steered‖² / Σ‖h_tuned − h_base‖², and the median of it over tokens."""
    rows = zip(states(base, given), states(steered, given), states(tuned, given), strict=True)
    squares = [((t - s).square().sum(1), (t - b).square().sum(1)) for b, s, t in rows]
    return [(1 - float(left.sum() / oracle.sum()), float((1 - left / oracle).median())) for left, oracle in squares]


def patched(model, fitted, tmp_path):
    write_adapter(tmp_path / "adapter", fitted.adapter)
    return patch_model(copy.deepcopy(model), tmp_path / "adapter")


@pytest.mark.parametrize("family", FAMILIES)
def test_fit_shares_are_those_of_the_patched_model(family, tmp_path):
    model = build(family).double()
    if "moe" in family or family == "mixtral":
        model.set_experts_implementation("eager")  # the other has no float64
    tuned, given, others = tuned_of(model), batches(), batches(2, seed=9)
    found = fit(model, tuned, given, config(), held_out=others)
    steered = patched(model, found, tmp_path)
    assert steered.steering.report()[0].kind  # loads and steers
    for layer, (fitted, _), (held_out, token) in zip(
        found.layers, shares(model, steered, tuned, given), shares(model, steered, tuned, others), strict=True
    ):
        assert layer.share == pytest.approx(fitted, abs=1e-9)
        assert layer.held_out == pytest.approx(held_out, abs=1e-9)
        assert layer.token == pytest.approx(token, abs=1e-9)
    assert found.share == found.layers[-1].share > 0.2
    assert found.tokens == (3 * 4 * 9 - 12, 2 * 4 * 9 - 12)


@pytest.mark.parametrize("site", ["post_mlp", "pre_mlp", "post_attention"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox-parallel"])
def test_fit_at_other_sites_shares_are_those_of_the_patched_model(family, site, tmp_path):
    model = build(family).double()
    tuned, given = tuned_of(model), batches()
    found = fit(model, tuned, given, config(site=site))
    steered = patched(model, found, tmp_path)
    rows = [at_site(one, site, given) for one in (model, steered, tuned)]
    down, up, bias = (
        [named[name] for named in found.adapter.tensors.values()]
        for name in ("steer_down.weight", "steer_up.weight", "steer_up.bias")
    )
    for layer, (b, s, t) in enumerate(zip(*rows, strict=True)):
        after = s + s @ down[layer].T.double() @ up[layer].T.double() + bias[layer].double()
        assert found.layers[layer].share == pytest.approx(
            1 - float((t - after).square().sum() / (t - b).square().sum()), abs=1e-9
        )
        assert found.layers[layer].rest > 0
    ends = [states(one, given)[-1] for one in (model, steered, tuned)]
    assert (ends[2] - ends[1]).norm() < (ends[2] - ends[0]).norm()


def test_fit_in_sequence_is_better_than_on_the_base_stream(tmp_path):
    model = build()
    tuned, given = tuned_of(model, 0.3), batches(8)
    in_sequence = fit(model, tuned, given, config())
    alone = fit(model, tuned, given, config(), sequence=False)
    assert alone.layers[0] == in_sequence.layers[0]
    ends = [
        shares(model, patched(model, one, tmp_path / str(i)), tuned, given)[-1]
        for i, one in enumerate((in_sequence, alone))
    ]
    assert ends[0] > ends[1]


@pytest.mark.parametrize("sequence", [True, False])
def test_fit_each_is_fit_of_each(sequence):
    model = build()
    tuned, given = tuned_of(model, 0.3), batches()
    configs = [config(rank=2), config(rank=5, layers=[1]), config(rank=5, up_bias=False)]
    together = fit_each(model, tuned, given, configs, sequence=sequence)
    for one, own in zip(together, configs, strict=True):
        alone = fit(model, tuned, given, own, sequence=sequence)
        assert one.layers == alone.layers
        for index, named in one.adapter.tensors.items():
            assert all(torch.equal(tensor, alone.adapter.tensors[index][name]) for name, tensor in named.items())


def test_fit_without_sequence_is_the_regression_of_each_oracle():
    model = build().double()
    tuned, given = tuned_of(model), batches()
    found = fit(model, tuned, given, config(rank=HIDDEN), ridge=0.0, sequence=False)
    for layer, h, wanted in zip(found.layers, states(model, given), states(tuned, given), strict=True):
        ones = torch.cat([h, torch.ones(len(h), 1, dtype=h.dtype)], 1)
        rest = wanted - h - ones @ torch.linalg.lstsq(ones, wanted - h).solution
        assert layer.share == pytest.approx(1 - float(rest.square().sum() / (wanted - h).square().sum()), abs=1e-6)
        assert layer.share == pytest.approx(layer.rest, abs=1e-9)
        assert layer.oracle == pytest.approx(float(((wanted - h).norm(dim=1) / h.norm(dim=1)).median()), rel=1e-9)


def test_fit_recovers_an_adapter_of_its_rank(tmp_path):
    model = build()
    truth = patch_model(copy.deepcopy(model), config(rank=3))
    randomize(truth)
    found = fit(model, truth, batches(6), config(rank=3), ridge=0.0)
    steered = patched(model, found, tmp_path)
    given = batches(2, seed=50)
    for ours, theirs in zip(states(steered, given), states(truth, given), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
    assert min(layer.share for layer in found.layers) > 1 - 1e-6


def test_fit_to_a_lora_and_of_some_layers(tmp_path):
    model = build().double()
    torch.manual_seed(5)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, lora_alpha=1)
    tuned = get_peft_model(copy.deepcopy(model), lora)
    found = fit(model, tuned, batches(), config(layers=[0, 2]))
    assert [place.layer for place in found.adapter.tensors] == [0, 2] and found.layers[1].rest is None
    steered = patched(model, found, tmp_path)
    for layer, truth in zip(found.layers, shares(model, steered, tuned, batches()), strict=True):
        assert (layer.share, layer.token) == pytest.approx(truth, abs=1e-9)


def test_fit_of_a_model_with_an_encoder_that_takes_no_token_ids():
    base = coverage.build("roberta")
    tuned = copy.deepcopy(base)
    torch.nn.init.normal_(tuned.roberta.encoder.layer[-1].output.dense.bias)
    found = fit(base, tuned, batches(), config())
    assert [layer.oracle > 0 for layer in found.layers] == [False] * (len(found.layers) - 1) + [True]


def test_fit_of_a_vector_is_the_mean_shift(tmp_path):
    model = build().double()
    tuned, given = tuned_of(model), batches()
    found = fit(model, tuned, given, SteerConfig(form="vector"), sequence=False)
    for index, (h, wanted) in enumerate(zip(states(model, given), states(tuned, given), strict=True)):
        vector = found.adapter.tensors[Place(index)]["steer_up.bias"]
        assert torch.allclose(vector.double(), (wanted - h).mean(0), rtol=1e-6, atol=1e-7)
    found = fit(model, tuned, given, SteerConfig(form="vector"))
    for layer, truth in zip(found.layers, shares(model, patched(model, found, tmp_path), tuned, given), strict=True):
        assert (layer.share, layer.token) == pytest.approx(truth, abs=1e-9)


def test_fit_leaves_both_models_as_they_were():
    model = build()
    tuned = tuned_of(model).train()
    before = snapshot(model), snapshot(tuned)
    fit(model, tuned, batches(), config())
    assert (snapshot(model), snapshot(tuned)) == before
    assert tuned.training and not model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for one in (model, tuned) for m in one.modules())


def test_fit_of_a_model_with_no_shift_is_an_adapter_that_does_nothing():
    model = build()
    found = fit(model, copy.deepcopy(model), batches(), config())
    assert all(not named["steer_down.weight"].any() for named in found.adapter.tensors.values())
    assert all(layer["share"] is None for layer in found.as_dict()["layers"])


def test_fit_a_median_token_is_of_those_with_an_oracle():
    base, tuned = build(), build()
    new = 5  # one token is trained, such as an added one: nothing before it in a prompt moves
    with torch.no_grad():
        tuned.get_input_embeddings().weight[new] += 0.3
    given = {"input_ids": tokens(batch=6, length=12), "attention_mask": torch.ones(6, 12, dtype=torch.long)}
    given["input_ids"][given["input_ids"] == new] = 6
    without = copy.deepcopy(given)
    given["input_ids"][:, 9] = new
    found = fit(base, tuned, [given], config(layers=[1]))
    h, wanted = (states(model, [given]) for model in (base, tuned))
    moved = (wanted[0] - h[0]).square().sum(1) > 0
    assert 0 < moved.sum() < len(moved) / 2 and found.layers[0].token == 0  # no adapter comes before
    assert all(-10 < layer.token < 1 for layer in found.layers)
    held_out = fit(base, tuned, [given], config(layers=[1]), held_out=[without])
    json.dumps(held_out.as_dict(), allow_nan=False)
    assert math.isnan(held_out.token) and held_out.missed == found.missed and found.missed[0] > 0


def test_fit_in_bfloat16_of_the_model():
    model = build().to(torch.bfloat16)
    found = fit(model, tuned_of(model, 0.3), batches(), config(dtype="bfloat16"))
    assert found.adapter.tensors[Place(0)]["steer_up.weight"].dtype == torch.bfloat16 and found.share > 0.2


def test_fit_of_a_model_of_another_family_is_told():
    """Equal sizes do not make it a tuned one. A steered model keeps the names of its layers."""
    with pytest.warns(UserWarning, match="^the tuned model has layers Qwen2DecoderLayer, the base LlamaDecoderLayer;"):
        fit(build(), build("qwen2"), batches(), config())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(build(), patch_model(build(seed=1)), batches(), config())


def nan_model():
    model = build()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("tuned", "options", "message"),
    [
        (lambda: build(num_hidden_layers=2), {}, f"2 layers of hidden size {HIDDEN}; expected {LAYERS} of {HIDDEN}"),
        (lambda: build(hidden_size=64), {}, f"{LAYERS} layers of hidden size 64; expected {LAYERS} of {HIDDEN}"),
        (build, {"config": config(rank=HIDDEN + 1)}, f"rank is {HIDDEN + 1}; expected at most {HIDDEN}"),
        (build, {"config": config(layers=[LAYERS])}, f"layers has {LAYERS}"),
        (build, {"config": SteerConfig(form="loreft", rank=2)}, "form is 'loreft'; expected 'lowrank' or 'vector'"),
        (build, {"config": config(site=("pre_mlp", "post_mlp"))}, "site is pre_mlp, post_mlp; expected one"),
        (build, {"config": config(down_bias=True)}, "down_bias is True with the activation identity"),
        (build, {"config": config(scale=2.0)}, "scale is 2.0; expected 1.0"),
        (build, {"ridge": -1.0}, "ridge is -1.0"),
        (build, {"ridge": float("nan")}, "ridge is nan; expected a finite number"),
        (lambda: patch_model(build(), SteerConfig(positions="last_2")), {}, "adapter has positions 'last_2'; expected"),
        (lambda: patch_model(build()), {"config": config(site="pre_mlp")}, "site is 'pre_mlp' and the tuned model is"),
        (build, {"batches": batches(1, length=9)[:1], "config": config(rank=24)}, "24 tokens to fit on; expected more"),
        (nan_model, {}, "the tuned model's hidden states after layer 1 are NaN or infinite"),
    ],
)
def test_fit_refusals(tuned, options, message):
    options = {"config": config(), "batches": batches()} | options
    with pytest.raises(ValueError, match=message):
        fit(build(), tuned(), options.pop("batches"), options.pop("config"), **options)


@pytest.mark.parametrize("activation", ["silu", "tanh"])
def test_fit_with_a_nonlinear_activation(activation, tmp_path):
    """Shares are those of the patched model, and in the first layer larger than the linear adapter's of the rank."""
    model, given = build().double(), batches(4)
    tuned = tuned_of(model, 0.3)
    bent = fit(model, tuned, given, config(2, activation=activation, down_bias=True))
    steered = patched(model, bent, tmp_path)
    assert steered.steering.config().activation == activation
    for layer, (share, token) in zip(bent.layers, shares(model, steered, tuned, given), strict=True):
        assert (layer.share, layer.token) == pytest.approx((share, token), abs=1e-9)
    assert bent.layers[0].reach > bent.layers[0].share > fit(model, tuned, given, config(2)).layers[0].share


def test_fit_reach_is_that_of_the_oracles_leading_directions_and_growth_that_of_the_distance():
    model, given = build().double(), batches(4)
    tuned = tuned_of(model, 0.3)
    oracles = [t - b for t, b in zip(states(tuned, given), states(model, given), strict=True)]
    alone = fit(model, tuned, given, config(2), sequence=False)
    for index, oracle in enumerate(oracles):
        values = torch.linalg.svdvals(oracle - oracle.mean(0))
        reach = 1 - float(values[2:].square().sum() / oracle.square().sum())
        assert alone.layers[index].reach == pytest.approx(reach, abs=1e-9)
        assert alone.layers[index].reach > alone.layers[index].share
        growth = None if not index else pytest.approx(float(oracle.norm() / oracles[index - 1].norm()), rel=1e-9)
        assert alone.layers[index].growth == growth
    # In sequence, it is of what the adapter before has left. With all directions, all is in reach.
    layers = fit(model, tuned, given, config(HIDDEN - 1, layers=[0, 2])).layers
    left = (1 - layers[0].share) * oracles[0].square().sum()
    coming = (1 - layers[1].share) * oracles[1].square().sum()
    assert layers[1].growth == pytest.approx(float((coming / left).sqrt()), rel=1e-6)
    assert layers[1].reach is None and layers[0].reach > 0.99


def test_fit_within_takes_the_first_rank_that_is_enough():
    model, given = build(), batches(8)
    tuned, others = tuned_of(model, 0.3), batches(2, seed=30)
    by_rank = {rank: fit(model, tuned, given, config(rank), held_out=others).missed for rank in (1, 2, 4, 8)}
    for rank, (missed, layer) in by_rank.items():
        if missed > min(by_rank[one][0] for one in by_rank if one <= rank):
            continue  # more rank, and worse on prompts held out
        found = fit_within(model, tuned, iter(given), config(), missed + 1e-9, held_out=iter(others))
        assert (found.adapter.config.rank, found.missed) == (rank, (missed, layer))
        assert 1 - found.layers[layer].held_out == missed
    told = "ranks 1, 2, 4 to 32, rank .* missing .* of the oracle after layer .; expected an error above that"
    with pytest.raises(ValueError, match=told):
        fit_within(model, tuned, given, config(), 1e-6, held_out=others)
    with pytest.raises(ValueError, match="ranks 1, 2, 4 to 7, rank"):
        fit_within(model, tuned, [{"input_ids": tokens(batch=1)}], config(), 1e-6, held_out=others)
    with pytest.raises(ValueError, match="error is 1.0; expected a share"):
        fit_within(model, tuned, given, config(), 1.0)


def test_fit_without_a_mask_all_tokens_count():
    model = build()
    tuned = tuned_of(model)
    given = [{"input_ids": tokens(batch=4), "attention_mask": None}]
    masked = [{**given[0], "attention_mask": torch.ones(4, 9, dtype=torch.long)}]
    assert fit(model, tuned, given, config()).layers == fit(model, tuned, masked, config()).layers


def test_fit_refuses_what_is_no_batch_and_a_steered_base():
    model = build()
    with pytest.raises(TypeError, match="a batch is a Tensor; expected a mapping"):
        fit(model, model, [tokens()], config())
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 8\); expected \(2, 9\)"):
        fit(model, model, [{"input_ids": tokens(), "attention_mask": torch.ones(2, 8)}], config())
    with pytest.raises(TypeError, match="attention_mask is a list; expected a tensor"):
        fit(model, model, [{"input_ids": tokens(), "attention_mask": torch.ones(2, 9).tolist()}], config())
    with pytest.raises(ValueError, match="the base model is steered"):
        fit(patch_model(model), build(), batches(), config())


def test_fit_of_a_model_in_a_batch_is_refused():
    tuned = patch_model(build())
    with tuned.steering.batch([None, None]), pytest.raises(RuntimeError, match=r"fit is called inside steering\.batch"):
        fit(build(), tuned, batches(), config())
    with pytest.raises(TypeError, match="sequence is 'no'; expected True or False"):
        fit(build(), tuned, batches(), config(), sequence="no")


def test_fit_refuses_layers_that_are_not_a_chain():
    model = build()
    model.model.layers[1].register_forward_pre_hook(lambda m, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True)
    with pytest.raises(ValueError, match="layer 1 of the base model .* is not given what the layer before it returned"):
        fit(model, build(), batches(), config())
