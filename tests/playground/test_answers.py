"""Tests of answers in one batch and of exporting a variant, on tiny models. Gradio is not needed."""

import copy
import json

import pytest
import torch
from models import build, randomize
from text import tokenizer as joined_by_spaces
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from fused_steer import SteerConfig, patch_model
from fused_steer.adapters.files import write_adapter
from fused_steer.diagnostics import diagnose
from fused_steer.playground import Variant, adapter_of, answers, request_body
from fused_steer.playground.answers import _Row
from fused_steer.serving.options import read_options

PROMPT = "a steered model"


def tokenizer():
    words = joined_by_spaces()
    words.backend_tokenizer.decoder = decoders.Fuse()
    return words


def steered(*configs: SteerConfig):
    """Return a tiny model with the adapters a, b, ... of random values."""
    model = None
    for seed, config in enumerate(configs):
        name = "abc"[seed]
        if model is None:
            model = patch_model(build(), config, adapter_name=name)
        else:
            model.steering.add(name, config)
        model.steering.use(name)
        randomize(model, name, seed=seed + 1)
    return model


def last(stream):
    return list(stream)[-1]


def greedy(model, adapter=None, scale=None, positions=None, tokens=6):
    """Return the text that the model generates alone."""
    words = tokenizer()
    ids = words(PROMPT, return_tensors="pt")["input_ids"]
    with model.steering.batch([adapter], scale=scale, positions=positions):
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return words.decode(found[0])[len(words.decode(ids[0])) :]


def test_answers_texts_of_tokens_decode_a_few_at_a_time():
    """The whole text was decoded for each token. Characters of several tokens, and spaces between words, stay right."""
    bytes_of = {f"<0x{byte:02X}>": byte for byte in range(256)}
    model = Tokenizer(BPE({**bytes_of, "▁a": 256, "b": 257}, [], byte_fallback=True))
    joined = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    model.decoder = decoders.Sequence(joined)  # as Llama's, which leaves out the first space
    words, most = PreTrainedTokenizerFast(tokenizer_object=model), 0

    class Counting:
        def decode(self, ids, **options):
            nonlocal most
            most = max(most, len(ids))
            return words.decode(ids, **options)

    row = _Row(Variant("base"), [], [], 0)
    for token in (256, 256, *"é🎉".encode(), 257, 256, *"日".encode(), 256) * 3:
        row.put(token, Counting())
    assert row.texts[:9] == ["a", " a", "", "é", "", "", "", "🎉", "b"]
    assert "".join(row.texts) == words.decode(row.ids) and most <= 6


def test_answers_end_at_the_positions_of_the_model():
    """PyTorch's error of an index took the place of the whole answer."""
    model = patch_model(build("gpt2"), SteerConfig(rank=4), adapter_name="a")
    variants = [Variant("base"), Variant("a", {"a": 1.0})]
    assert [len(answer.tokens) for answer in last(answers(model, tokenizer(), "a" * 60, variants))] == [64, 64]
    with pytest.raises(
        ValueError, match="the prompt has 64 tokens; expected fewer than 64, the positions of the model"
    ):
        answers(model, tokenizer(), "a" * 64, variants)


def test_answers_are_those_of_each_variant_alone():
    model = steered(SteerConfig(rank=4), SteerConfig("vector"))
    variants = [
        Variant("base"),
        Variant("a", {"a": 1.0}),
        Variant("half", {"a": 0.5}, "generated"),
        Variant("b", {"b": 2.0}),
    ]
    found = last(answers(model, tokenizer(), PROMPT, variants, max_new_tokens=6))
    wanted = [greedy(model), greedy(model, "a", 1.0), greedy(model, "a", 0.5, "generated"), greedy(model, "b", 2.0)]
    assert [answer.text for answer in found] == wanted and len(set(wanted)) == 4
    for answer in found:
        assert answer.done and "".join(token.text for token in answer.tokens) == PROMPT + answer.text


def test_answers_come_token_by_token_from_one_batch(monkeypatch):
    model = steered(SteerConfig(rank=4))
    calls, original = [], model.generate

    def counted(ids, **options):
        calls.append(len(ids))
        return original(ids, **options)

    monkeypatch.setattr(model, "generate", counted)
    stream = answers(model, tokenizer(), PROMPT, [Variant("base"), Variant("a", {"a": 1.0})], max_new_tokens=5)
    lengths = [[sum(token.generated for token in answer.tokens) for answer in now] for now in stream]
    assert lengths == [[n, n] for n in (1, 2, 3, 4, 5, 5)]
    assert calls == [2]


def mean_shift(model, ids):
    """Return the mean of ‖δ‖/‖h‖ over tokens and layers by `diagnose`, at strength 0.7."""
    model.steering.scale = 0.7
    layers = diagnose(model, [{"input_ids": ids}]).layers
    assert len(layers) == 2
    return sum(layer.shift.mean for layer in layers) / len(layers)


@pytest.mark.parametrize("positions", [None, "generated", "last_prompt"])
def test_answers_shifts_are_the_diagnosis(positions):
    """The shift of each token is that which `diagnose` measures over the whole text, and 0 where nothing steers."""
    model = steered(SteerConfig(rank=4, layers=[0, 2]))
    (found,) = last(answers(model, tokenizer(), PROMPT, [Variant("a", {"a": 0.7}, positions)], max_new_tokens=4))
    shifts = [token.shift for token in found.tokens]
    prompt = len(PROMPT)
    assert shifts.pop() is None  # the newest token has not been through the model
    if positions is None:
        ids = torch.tensor([[token.id for token in found.tokens[:-1]]])
        truth, plain = (mean_shift(one, ids) for one in (copy.deepcopy(model).double(), model))
        assert abs(sum(shifts) / len(shifts) - truth) <= 2 * abs(plain - truth) + 1e-6 * truth
    steers = {None: range(len(shifts)), "generated": range(prompt, len(shifts)), "last_prompt": [prompt - 1]}
    assert [position for position, shift in enumerate(shifts) if shift] == list(steers[positions])


def test_answers_of_a_sum_leave_the_model_as_it_was():
    model = steered(SteerConfig(rank=2, activation="identity"), SteerConfig("vector"))
    both = Variant("both", {"a": 0.5, "b": -1.5})
    found = last(answers(model, tokenizer(), PROMPT, [Variant("base"), both], max_new_tokens=6))
    assert model.steering.names == ["a", "b"] and model.steering.active == "b"
    model.steering.combine({"a": 0.5, "b": -1.5}, "sum")
    assert found[1].text == greedy(model, "sum") != found[0].text


def test_answers_closed_early_stop_the_model():
    model = steered(SteerConfig(rank=2))
    stream = answers(model, tokenizer(), PROMPT, [Variant("a", {"a": 1.0})], max_new_tokens=40)
    next(stream)
    stream.close()
    model.steering.use(None)  # refused while a batch runs
    assert not any(site._forward_hooks for site in model.modules() if type(site).__name__ == "SteeringSite")


def test_answers_sample_by_the_seed_alone():
    model = steered(SteerConfig(rank=2))
    state = torch.get_rng_state()
    texts = [
        last(answers(model, tokenizer(), PROMPT, [Variant("base")], temperature=2.0, seed=seed))[0].text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "prompt, variants, options, error, message",
    [
        (PROMPT, [], {}, ValueError, "variants is empty"),
        (PROMPT, ["base"], {}, TypeError, "a variant is 'base'; expected a Variant"),
        ("", [Variant("base")], {}, ValueError, "the prompt has no tokens"),
        (PROMPT, [Variant("d", {"d": 1.0})], {}, KeyError, "no adapter 'd'; expected one of a, b, c"),
        (PROMPT, [Variant("s", {"a": 1.0, "c": 1.0})], {}, ValueError, "ranks of two activations cannot be stacked"),
        (PROMPT, [Variant("base")], {"max_new_tokens": 0}, ValueError, "max_new_tokens is 0"),
        (PROMPT, [Variant("base")], {"temperature": -1.0}, ValueError, "temperature is -1.0"),
        ([{"role": "user", "content": "a"}], [Variant("base")], {}, ValueError, "no chat template"),
    ],
)
def test_answers_refuse_at_once(prompt, variants, options, error, message):
    model = steered(SteerConfig(rank=2), SteerConfig("vector"), SteerConfig(rank=1, activation="tanh"))
    with pytest.raises(error, match=message):
        answers(model, tokenizer(), prompt, variants, **options)


@pytest.mark.parametrize(
    "fields, message", [({"strengths": {"a": float("nan")}}, "finite"), ({"positions": "some"}, "positions has")]
)
def test_variant_refuses_bad_values(fields, message):
    with pytest.raises(ValueError, match=message):
        Variant("a", **fields)


@pytest.mark.parametrize("strengths", [{"a": 0.5}, {"a": 0.5, "b": -1.5}, {"b": 3.0}])
def test_export_answers_as_the_variant_did(strengths, tmp_path):
    """The saved adapter of a variant gives the variant's answer with its own strength and positions."""
    model = steered(SteerConfig(rank=2, activation="identity", scale=0.0), SteerConfig("vector"))
    variant = Variant("found", strengths, "generated")
    said = last(answers(model, tokenizer(), PROMPT, [variant], max_new_tokens=6))[0].text
    write_adapter(tmp_path, adapter_of(model, variant))
    fresh = patch_model(build(), tmp_path, adapter_name="found")
    assert greedy(fresh, "found") == said != greedy(fresh)


def test_export_refuses_the_base_model():
    with pytest.raises(ValueError, match="'base' is the base model"):
        adapter_of(steered(SteerConfig(rank=2)), Variant("base"))


def test_request_body_has_the_options_that_the_server_reads():
    body = request_body(Variant("a × 0.5", {"a": 0.5}, "last_3+generated"), "base/model", "Hi", max_tokens=8)
    options = read_options(body["vllm_xargs"]["steering"])
    assert (options.scale, options.positions.name) == (0.5, "last_3+generated")
    assert (body["model"], body["prompt"], body["max_tokens"]) == ("a", "Hi", 8)
    messages = [{"role": "user", "content": "Hi"}]
    assert request_body(Variant("base"), "base/model", messages) == {"model": "base/model", "messages": messages}
    assert request_body(Variant("sum", {"a": 1.0, "b": 1.0}), "base/model", "Hi") == {"model": "sum", "prompt": "Hi"}
    assert json.loads(request_body(Variant("a", {"a": 2.0}), "", "Hi")["vllm_xargs"]["steering"]) == {"scale": 2.0}
