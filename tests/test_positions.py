"""Token positions: in training those of a plain hook with an explicit mask, and in inference those of training."""

from __future__ import annotations

import contextlib
import copy
import importlib
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import (
    Hooked,
    assert_close,
    assert_no_worse,
    build,
    build_frozen,
    classifier,
    generate,
    gradients,
    logits,
    randomize,
    refused,
    snapshot,
    steering_parameters,
    tokens,
)
from peft import LoraConfig, get_peft_model
from text import tokenizer
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from trainers import trainer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorWithFlattening,
    Trainer,
)

from fused_steer import SteerConfig, SteeringTrainer, patch_model
from fused_steer.diagnostics import diagnose
from fused_steer.positions import read_positions
from fused_steer.theory import fit
from fused_steer.tools import coverage
from fused_steer.vectors import extract

PLACES = (
    "all",
    "prompt",
    "generated",
    "last_prompt",
    "first_2",
    "last_2",
    "first_2+last_1",
    "last_prompt+generated",
    "first_7+last_7",
)
PROMPT, LENGTH = 4, 9


def defined(where: str, prompt: int, length: int) -> list[float]:
    """By token of one text without padding, from the definition."""
    found = set()
    for part in where.split("+"):
        name, _, count = part.partition("_")
        found |= {
            "all": set(range(length)),
            "prompt": set(range(prompt)),
            "generated": set(range(prompt, length)),
            "first": set(range(min(int(count), prompt))) if name == "first" else set(),
            "last": set(range(max(prompt - (1 if count == "prompt" else int(count)), 0), prompt))
            if name == "last"
            else set(),
        }[name]
    return [float(i in found) for i in range(length)]


class Masked(Hooked):
    """A plain hook that steers the tokens of a mask (rows, tokens)."""

    def __init__(self, base: nn.Module, parameters: Mapping[str, Tensor], mask: Tensor, **options: Any) -> None:
        super().__init__(base, parameters, **options)
        self.mask = mask

    def _shift(self, path: str, hidden: Tensor) -> Tensor:
        return self.mask.to(hidden.dtype)[:, :, None] * super()._shift(path, hidden)


def steered(where: str, **fields: Any) -> nn.Module:
    model = patch_model(build_frozen(), SteerConfig(rank=4, positions=where, **fields))
    randomize(model)
    return model


def labelled(ids: Tensor, prompts: list[int] | int, mask: Tensor | None = None) -> Tensor:
    """-100 for the prompts, and for padding."""
    real = torch.ones_like(ids) if mask is None else mask
    lengths = torch.tensor(prompts).expand(len(ids))[:, None]
    return ids.masked_fill((real.cumsum(1) <= lengths) | (real == 0), -100)


def assert_as_masked(model: nn.Module, gain: Tensor, inputs: dict[str, Tensor], kept: Tensor | None = None) -> None:
    """Logits of the tokens `kept`, and gradients, are as exact as those of the plain hook."""
    parameters = steering_parameters(model)
    hooked = Masked(build_frozen(), parameters, gain)
    truth = Masked(build_frozen().double(), {name: p.double() for name, p in parameters.items()}, gain.double())
    results = []
    for network, leaves in ((model, parameters), (hooked.model, hooked.leaves), (truth.model, truth.leaves)):
        for leaf in leaves.values():
            leaf.grad = None
        out = network(**inputs)
        out.loss.backward()
        found = out.logits if kept is None else out.logits[kept]
        results.append((found.detach(), {name: leaf.grad.clone() for name, leaf in leaves.items()}))
    assert_no_worse(*(found for found, _ in results))
    assert_no_worse(*(gradients for _, gradients in results))


# -------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("given", "name"),
    [
        *((name, name) for name in ("all", "prompt", "generated", "last_prompt", "first_3", "last_3")),
        ("last", "last_prompt"),
        ("last_1", "last_prompt"),
        (("first", 3), "first_3"),
        (("last", 3), "last_3"),
        (("last", np.int64(3)), "last_3"),
        ("last_7+first_7", "first_7+last_7"),
        ("generated+last_prompt", "last_prompt+generated"),
        ("prompt+generated", "all"),
        ("first_2+first_5+prompt", "prompt"),
    ],
    ids=str,
)
def test_positions_have_one_name_each(given, name):
    assert read_positions(given).name == name
    assert SteerConfig(positions=given).positions == name
    assert read_positions(read_positions(given).name) == read_positions(given)


def test_positions_are_recorded_in_files(tmp_path):
    model = steered("first_7+last_7")
    model.steering.save(tmp_path)
    loaded = patch_model(build(), tmp_path)
    assert loaded.steering.config().positions == "first_7+last_7"
    assert torch.equal(logits(loaded), logits(model))
    other = steered("all")
    with refused(ValueError, "positions 'first_7+last_7'", "expected"):
        other.steering.restore(tmp_path)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("where", PLACES)
def test_positions_in_training(where):
    model = steered(where)
    gain = torch.tensor([defined(where, PROMPT, LENGTH)]).expand(2, -1)
    assert_as_masked(model, gain, {"input_ids": tokens(), "labels": labelled(tokens(), PROMPT)})


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("placed", [False, True], ids=["mask", "mask and position ids"])
def test_positions_in_training_under_padding(where, side, placed):
    """Rows of 5, 7 and 9 tokens, 2, 3 and 4 of them the prompt's."""
    model, ids = steered(where), tokens(batch=3)
    prompts, lengths = [2, 3, 4], [5, 7, 9]
    mask, gain = torch.zeros(3, LENGTH, dtype=torch.int64), torch.zeros(3, LENGTH)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        kept = slice(LENGTH - length, None) if side == "left" else slice(length)
        mask[row, kept] = 1
        gain[row, kept] = torch.tensor(defined(where, prompt, length))
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labelled(ids, prompts, mask),
    }
    if placed:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    assert_as_masked(model, gain, inputs, kept=mask == 1)


@pytest.mark.parametrize("where", PLACES)
def test_positions_in_training_of_packed_texts(where):
    """As transformers flattens them: each text has a prompt of its own."""
    model = steered(where)
    texts, prompts = [tokens(seed, 1, length)[0] for seed, length in enumerate((5, 9, 3))], (2, 4, 1)
    rows = [{"input_ids": ids, "labels": labelled(ids[None], p)[0]} for ids, p in zip(texts, prompts, strict=True)]
    packed = DataCollatorWithFlattening(return_tensors="pt")(
        [{name: value.tolist() for name, value in row.items()} for row in rows]
    )
    packed = {name: value for name, value in packed.items() if isinstance(value, Tensor)}
    assert packed["position_ids"].tolist() == [[*range(5), *range(9), *range(3)]]
    gain = torch.tensor([[v for ids, p in zip(texts, prompts, strict=True) for v in defined(where, p, len(ids))]])
    assert_as_masked(model, gain, {**packed, "use_cache": False})


def test_positions_in_training_of_packed_texts_of_a_model_with_images():
    """Qwen-VL takes four rows of position ids of packed texts: in the text, and in time, height and width."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    rope = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen2_5_vl", text_config={**sizes, **heads, **rope}, vision_config=vision)
    base = AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)
    ids, lengths = tokens(batch=1), (5, 4)
    model = patch_model(copy.deepcopy(base), SteerConfig(rank=4, positions="first_1+last_1"))
    gain = torch.tensor([[*defined("first_1+last_1", 3, 5), *defined("first_1+last_1", 2, 4)]])
    hooked = Masked(base, randomize(model), gain)
    labels = torch.cat([labelled(ids[:, :5], 3), labelled(ids[:, 5:], 2)], dim=1)
    places = torch.cat([torch.arange(n) for n in lengths]).expand(4, 1, -1)
    inputs = {"labels": labels, "position_ids": places, "use_cache": False}
    assert_close(model(ids, **inputs).logits, hooked.model(ids, **inputs).logits)


def test_positions_of_a_conversation_end_the_prompt_at_the_first_answer():
    model, ids = steered("last_prompt+generated"), tokens()
    labels = labelled(ids, PROMPT)
    labels[:, 6:8] = -100  # a second turn
    gain = torch.tensor([defined("last_prompt+generated", PROMPT, LENGTH)]).expand(2, -1)
    assert_as_masked(model, gain, {"input_ids": ids, "labels": labels})


def test_positions_without_an_end_of_the_prompt_are_refused():
    model = steered("last_prompt")
    with refused(ValueError, "does not say where its prompts end", "'last_prompt'", "labels with -100", "prompts(...)"):
        model(tokens())
    with refused(ValueError, "no token of the pass is a prompt's", "'last_prompt'", "labels with -100"):
        model(tokens(), labels=tokens())
    with refused(ValueError, "attention_mask does not say", "positions counts tokens"):
        model(tokens(), attention_mask=torch.zeros(2, 1, LENGTH, LENGTH), labels=labelled(tokens(), PROMPT))
    assert_as_masked(
        model,
        torch.tensor([defined("last_prompt", PROMPT, LENGTH)]).expand(2, -1),
        {"input_ids": tokens(), "labels": labelled(tokens(), PROMPT)},
    )


def test_positions_with_prompts_that_are_told():
    model, ids = steered("last_2+generated"), tokens()
    expected = model(ids, labels=labelled(ids, [3, 5])).logits
    mask = torch.arange(LENGTH)[None] < torch.tensor([[3], [5]])
    for told in ([3, 5], torch.tensor([3, 5]), mask, mask.long()):
        with model.steering.prompts(told):
            assert torch.equal(model(ids).logits, expected)
    for told, parts in (
        ([3], ("1 lengths", "expected 2")),
        (mask[:, 1:], ("(2, 8)", "(2, 9)")),
        (mask[None], ("(1, 2, 9)", "number of prompt tokens")),
        ([0.5, 1.0], ("float32", "number of prompt tokens")),
        ([3, 12], ("prompts has 12 for row 1, which has 9 tokens", "expected at most 9", "in parts")),
        ([3, -5], ("prompts has -5", "number of prompt tokens")),
        (None, ("prompts is None", "number of prompt tokens")),
        (torch.tensor([True, True]), ("dtype torch.bool", "number of prompt tokens")),
        ([3, "5"], ("prompts is [3, '5']", "number of prompt tokens")),
    ):
        with refused(ValueError, *parts), model.steering.prompts(told):
            model(ids)
    packed = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(2, -1)}
    with refused(ValueError, "rows are packed", "expected a mask"), model.steering.prompts([3, 5]):
        model(ids, **packed)
    with refused(ValueError, "does not say where"):
        model(ids)


@pytest.mark.parametrize("where", PLACES)
def test_positions_with_prompts_that_are_told_of_a_text_in_parts(where):
    """A cache has the earlier parts, which end inside of the prompts and after them."""
    model, ids = steered(where), tokens()
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    places = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=places, labels=labelled(ids, [6, 4], mask)).logits
        cache, parts = None, []
        with model.steering.prompts([6, 4]):
            for begin, end in ((0, 3), (3, 5), (5, 7), (7, LENGTH)):
                inputs = {"attention_mask": mask[:, :end], "position_ids": places[:, begin:end]}
                out = model(ids[:, begin:end], past_key_values=cache, use_cache=True, **inputs)
                cache = out.past_key_values
                parts.append(out.logits)
    assert_close(torch.cat(parts, 1)[mask == 1], expected[mask == 1])


@pytest.mark.parametrize("where", ["first_2", "last_2", "generated"])
def test_positions_of_a_patched_decoder_inside_a_model_that_generates(where):
    """The decoder alone cannot generate, and it does not see the labels of the model around it."""
    model, inner, ids = steered(where), build_frozen(), tokens()
    patch_model(inner.model, SteerConfig(rank=4, positions=where))
    inner.load_state_dict(model.state_dict())
    assert torch.equal(generate(inner)[0], generate(model)[0])
    with refused(ValueError, "does not say where its prompts end", "steering.prompts(...)"):
        inner(ids, labels=labelled(ids, PROMPT))


def test_positions_with_prompts_that_are_told_in_vain_are_refused():
    model, ids = steered("last_2"), tokens()
    with model.steering.prompts([3, 5]):
        with refused(RuntimeError, "generate is called inside steering.prompts; expected it outside"):
            generate(model)
        with refused(RuntimeError, "steering.batch is entered inside steering.prompts; expected it outside"):
            with model.steering.batch(["default"]):
                pass
    with model.steering.batch(["default"]):
        with refused(RuntimeError, "steering.prompts is entered while steering.batch runs", "expected it"):
            with model.steering.prompts([3]):
                pass
    with torch.no_grad():
        cache = model(ids[:, :4], use_cache=True).past_key_values
        with (
            model.steering.prompts(torch.ones(2, 5, dtype=torch.bool)),
            refused(ValueError, "is a mask", "a cache", "'last_2'", "number"),
        ):
            model(ids[:, 4:], past_key_values=cache)
        with model.steering.prompts([6, 6]), refused(ValueError, "(2, 5)", "2 rows of the 4 cached and the 5 new"):
            model(ids[:, 4:], past_key_values=cache, attention_mask=torch.ones(2, 5))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("embedded", [False, True])
def test_positions_under_checkpointing_with_several_passes_before_the_backward(reentrant, embedded):
    model, ids = steered("last_prompt").train(), tokens()
    labels = [labelled(ids, 2), labelled(ids, 6)]
    given = {"inputs_embeds": model.get_input_embeddings()(ids).requires_grad_()} if embedded else {"input_ids": ids}

    def both() -> dict[str, Tensor]:
        parameters = steering_parameters(model)
        for parameter in parameters.values():
            parameter.grad = None
        losses = [model(**given, labels=each, use_cache=False).loss for each in labels]
        with torch.no_grad():
            model(ids[:, :3])
        losses[0].backward()
        losses[1].backward()
        return {name: parameter.grad.clone() for name, parameter in parameters.items()}

    expected = both()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_close(both(), expected)


def test_positions_compiled_in_one_graph():
    torch.compiler.reset()  # other tests' compilations of the same code count to its limit
    model, ids = steered("first_1+last_2"), tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for prompt in (3, 6):
        labels = labelled(ids, prompt)
        assert_close(compiled(ids, labels=labels).logits, model(ids, labels=labels).logits)
    assert_close(logits(compiled), logits(model))  # without labels, a prompt
    expected = {n: g.clone() for n, g in _grads(model, ids).items()}
    assert_close(_grads(model, ids, compiled), expected)
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    assert_close(_grads(model, ids), expected)


def test_positions_under_the_transforms_of_torch_func():
    """The gradients of each text by vmap are those of the text alone."""
    model = steered("first_1+last_2").train()
    model.set_attn_implementation("eager")  # vmap refuses transformers' mask of the other
    values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    ids = tokens(batch=3, length=8)
    given = ids, labelled(ids, [3, 5, 4]), torch.ones_like(ids)
    given[2][1, -2:] = 0

    def loss(values: dict[str, Tensor], ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        inputs = {"input_ids": ids[None], "labels": labels[None], "attention_mask": mask[None], "use_cache": False}
        return functional_call(model, values, (), inputs).loss

    found = vmap(grad(loss), in_dims=(None, 0, 0, 0))(values, *given)
    for row, text in enumerate(zip(*given, strict=True)):
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        expected = torch.autograd.grad(loss(leaves, *text), list(leaves.values()))
        for name, value in zip(leaves, expected, strict=True):
            torch.testing.assert_close(found[name][row], value, rtol=1e-4, atol=1e-6)


def _grads(model: nn.Module, ids: Tensor, run: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    parameters = steering_parameters(model)
    for parameter in parameters.values():
        parameter.grad = None
    (model if run is None else run)(ids, labels=labelled(ids, PROMPT)).loss.backward()
    return {name: parameter.grad for name, parameter in parameters.items()}


def test_positions_of_a_classifier_are_of_its_text():
    model = patch_model(classifier(), SteerConfig(rank=4, positions="last_prompt"), freeze_head=True)
    parameters = randomize(model)
    gain = torch.tensor([defined("last_prompt", LENGTH, LENGTH)]).expand(2, -1)
    assert_close(logits(model), logits(Masked(classifier(), parameters, gain).model))
    model(tokens(), labels=torch.tensor([1, 2])).loss.backward()


@pytest.mark.parametrize("cls", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_positions_after_the_prompt_of_a_classifier_are_refused(cls):
    """It would steer no token, and train nothing."""
    model = patch_model(classifier(cls=cls), SteerConfig(rank=4, positions="generated"), freeze_head=True)
    parts = ("does not generate", "positions is 'generated'", "expected positions of the prompt")
    for training in (True, False):
        with torch.set_grad_enabled(training), refused(ValueError, *parts, model=model):
            model(tokens())
    for options in ({}, {"positions": ["prompt", "generated"]}):
        with refused(ValueError, *parts, model=model), model.steering.batch(["default"] * 2, **options):
            pass
    randomize(model)
    with model.steering.batch(["default", None], positions=["prompt", "generated"]):
        model(tokens())
    with model.steering.prompts([4, 4]):
        told = model(tokens()).logits
    with model.steering.disabled():
        assert not torch.equal(told, model(tokens()).logits)


def test_positions_of_labels_that_are_classes_are_of_the_text():
    """Those of a token classifier, or as many of a text as it has tokens."""
    of_tokens = classifier(cls=AutoModelForTokenClassification)
    of_text = classifier()
    of_text.config.update({"problem_type": "multi_label_classification", "num_labels": LENGTH})
    of_text.num_labels, of_text.score = LENGTH, nn.Linear(32, LENGTH, bias=False)
    for model, labels in ((of_tokens, labelled(tokens() % 3, 1)), (of_text, torch.ones(2, LENGTH))):
        model = patch_model(model, SteerConfig(rank=4, positions="last_prompt"), freeze_head=True)
        randomize(model)
        assert torch.equal(model(tokens(), labels=labels).logits, model(tokens()).logits)


def test_positions_of_an_encoder_whose_embeddings_are_outside():
    """BERT's stack of layers gets hidden states, and a mask that does not say which tokens are padding."""
    model = patch_model(encoder(), SteerConfig(rank=4, positions="last_prompt"), freeze_head=True)
    parameters, mask = randomize(model), torch.ones_like(tokens())
    mask[0, 5:] = 0
    gain = torch.tensor([defined("last_prompt", n, n) + [0.0] * (LENGTH - n) for n in (5, LENGTH)])
    with torch.no_grad():
        expected = Masked(encoder(), parameters, gain).model(tokens(), attention_mask=mask).logits
        assert_close(model(tokens(), attention_mask=mask).logits, expected)
        with model.steering.batch(["default"] * 2):
            assert_close(model(tokens(), attention_mask=mask).logits, expected)


@pytest.mark.parametrize("where", ["first_2", "prompt"])
def test_positions_of_a_model_that_keeps_its_mask_from_the_decoder(where):
    """RWKV has no attention, but its texts have padding."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("rwkv", num_hidden_layers=2, **sizes)).eval()
    mask, ids = torch.ones(2, LENGTH, dtype=torch.int64), tokens()
    mask[0, :3] = 0
    inputs = {"attention_mask": mask, "labels": labelled(ids, PROMPT, mask)}
    model = patch_model(copy.deepcopy(base), SteerConfig(rank=4, positions=where))
    gain = torch.tensor([[0.0] * (LENGTH - n) + defined(where, PROMPT, n) for n in (LENGTH - 3, LENGTH)])
    with torch.no_grad():
        expected = Masked(base, randomize(model), gain).model(ids, **inputs).logits
        assert_close(model(ids, **inputs).logits, expected)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("xlnet", "XLNetModel gives its layers (tokens, rows, d)"),
        ("gemma3n_text", "Gemma3nTextModel gives its layers (streams, rows, tokens, d)"),
        ("deepseek_v4", "DeepseekV4Model gives its layers (rows, tokens, streams, d)"),
    ],
)
def test_positions_and_rows_of_layers_of_other_shapes_are_refused(kind, shape):
    """With as many rows as tokens or streams, one was taken for the other."""
    model, parts = coverage.build(kind), (shape, "expected")
    with refused(ValueError, *parts, "positions is 'last_2'", model=model):
        patch_model(model, SteerConfig(rank=4, positions="last_2"))
    ids, mask = tokens(batch=4, length=4), torch.tensor([[0, 1, 1, 1]] + [[1] * 4] * 3)
    batch = {"input_ids": ids, "attention_mask": mask}
    with refused(ValueError, *parts, "token is 'last'", model=model):
        extract(model, [batch], [batch])
    with refused(ValueError, *parts, "fit reads each token's", model=model):
        fit(model, model, [batch])
    patch_model(model, SteerConfig(rank=4))
    randomize(model)
    with torch.no_grad():
        everywhere = model(ids).logits
    with refused(ValueError, *parts, "each row by its own adapter", model=model), model.steering.batch(["default"] * 4):
        pass
    model.steering.add("two", SteerConfig(rank=4, positions="first_1"))
    with refused(ValueError, *parts, "positions is 'first_1'", model=model):
        model.steering.use("two")
    assert model.steering.active == "default"
    with refused(ValueError, *parts, "diagnose reads each token's", model=model):
        diagnose(model, [batch])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, everywhere)


def test_positions_of_layers_with_more_tokens_than_the_text():
    """ProphetNet's layers get the tokens of several predictions in a row."""
    ids, part = tokens(), f"ProphetNetDecoder gives its layers (2, {3 * LENGTH}, 64)"
    model = patch_model(coverage.build("prophetnet"), SteerConfig(rank=4, positions="last_2"))
    with refused(ValueError, part, "positions is 'last_2'; expected 'all'", model=model), torch.no_grad():
        model(ids)
    model = patch_model(coverage.build("prophetnet"), SteerConfig(rank=4))
    with refused(ValueError, f"layer 0 has a hidden state (2, {3 * LENGTH}, 64)", f"{2 * LENGTH} tokens", model=model):
        diagnose(model, [{"input_ids": ids}])
    with refused(ValueError, f"expected (2, {LENGTH}, 64), (rows, tokens, d)", model=model), torch.no_grad():
        with model.steering.batch(["default"] * 2):
            model(ids)


def encoder() -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.2}
    config = AutoConfig.for_model("bert", num_hidden_layers=3, num_attention_heads=4, num_labels=3, **sizes)
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).eval()


def test_positions_beside_a_lora_that_is_kept_orthogonal():
    model = get_peft_model(build(), LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False))
    model = patch_model(model, SteerConfig(rank=4, positions="last_prompt", orthogonal_to="lora"))
    expected = logits(model)
    parameters = steering_parameters(model)
    loss = model.train()(input_ids=tokens(), labels=labelled(tokens(), PROMPT)).loss
    loss.backward()
    assert all(p.grad is not None for p in parameters.values())
    assert torch.equal(logits(model.eval()), expected)


# ----------------------------------------------------------------------------------------------------------- inference


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=str)
def test_positions_generate_is_the_pass_of_training(where, options):
    model = steered(where)
    words, scores = generate(model, **options)
    labels = labelled(words, LENGTH)
    out = model(words, labels=labels).logits[:, LENGTH - 1 : -1]
    assert_close(scores.transpose(0, 1), out.detach(), unsteered=_both_ways(options))
    with torch.no_grad():  # step by step, outside of generate
        cache = model(words[:, :LENGTH], use_cache=True)
        following = model(words[:, LENGTH:], past_key_values=cache.past_key_values).logits
    assert_close(torch.cat([cache.logits[:, -1:], following[:, :-1]], 1), out.detach(), unsteered=_both_ways(options))


def _both_ways(options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    words, scores = generate(build_frozen(), **options)
    with torch.no_grad():
        return scores.transpose(0, 1), build_frozen()(words).logits[:, LENGTH - 1 : -1]


@pytest.mark.parametrize(("where", "width"), [("last_2", LENGTH), ("generated", 5)])
@pytest.mark.parametrize("batch", [False, True])
def test_positions_under_guidance_are_those_of_both_prompts(where, width, batch):
    """The passes of classifier-free guidance have a prompt and a cache of their own."""

    def alone(ids: Tensor, mask: Tensor) -> Tensor:
        whole = torch.cat([mask, torch.ones_like(ids[:, mask.shape[1] :])], 1)
        positions = (whole.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad(), model.steering.prompts(mask.sum(1)):
            logits = model(ids, attention_mask=whole, position_ids=positions).logits
        return logits[:, mask.shape[1] - 1 : -1].log_softmax(-1)

    model, ids, negative = steered(where), tokens(), tokens(length=width, seed=7)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"guidance_scale": 3.0, "negative_prompt_ids": negative, "output_scores": True}
    options |= {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "attention_mask": mask}
    with model.steering.batch(["default", None]) if batch else contextlib.nullcontext():
        found = model.generate(ids, **options)
    other = torch.cat([negative, found.sequences[:, LENGTH:]], 1)
    expected = []
    for name in ("default", None if batch else "default"):
        model.steering.use(name)
        main, unconditional = alone(found.sequences, mask), alone(other, torch.ones_like(negative))
        expected.append(3.0 * (main - unconditional) + unconditional)
    assert_close(torch.stack(found.scores, 1), torch.stack([expected[row][row] for row in range(2)]))


def test_positions_of_a_processors_pass_with_other_rows_are_refused():
    model = steered("last_2")
    with refused(ValueError, "the batch has 3 rows; expected 2", "as generate's input has", "has positions"):
        generate(model, logits_processor=[lambda ids, scores: model(tokens(batch=3)) and scores])


def test_positions_are_an_adapters_own_in_batches_and_pools(tmp_path):
    model = steered("last_prompt+generated")
    alone, _ = generate(model)
    with model.steering.batch(["default", "default"]):
        assert torch.equal(generate(model)[0], alone)
    model.steering.save(tmp_path / "a")
    pool = model.steering.make_pool(slots=2, rank=4)
    pool.register("kept", tmp_path / "a")
    with model.steering.batch(["kept", "default"]):
        together, scores = generate(model)
    assert torch.equal(together, alone)
    with model.steering.batch(["kept", "default"], positions="all"):
        assert not torch.equal(generate(model)[1], scores)
    with model.steering.batch(["kept", "default"], positions=[None, "last"]):
        assert torch.equal(generate(model)[1][:, 0], scores[:, 0])


def stopped(*_: Any) -> None:
    """A hook that Ctrl-C interrupts."""
    raise KeyboardInterrupt


@pytest.mark.parametrize("reentrant", [False, True])
def test_positions_under_checkpointing_with_an_interrupted_pass_before_the_backward(reentrant):
    """PyTorch calls no hook at the end of a pass that Ctrl-C interrupts."""
    model = steered("prompt").train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()

    def pass_of(first: int) -> Tensor:
        return model(tokens(), labels=labelled(tokens(), first), use_cache=False).loss

    found = []
    for interrupted in (False, True):
        loss = pass_of(3)
        if interrupted:
            handle = model.model.layers[1].register_forward_hook(stopped)
            with pytest.raises(KeyboardInterrupt), torch.no_grad():
                pass_of(7)
            handle.remove()
        loss.backward()
        found.append({name: p.grad for name, p in steering_parameters(model).items()})
        model.zero_grad()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_positions_under_checkpointing_with_offloaded_activations_are_refused():
    model = steered("prompt").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda kept: kept):
        loss = model(tokens(), labels=labelled(tokens(), 3), use_cache=False).loss
    with refused(RuntimeError, "runs again in the backward pass with another input tensor", "offloaded activations"):
        loss.backward()


def test_positions_labels_of_an_interrupted_pass_are_not_those_of_the_decoder_called_next():
    model = steered("prompt")
    handle = model.model.layers[1].register_forward_hook(stopped)
    with pytest.raises(KeyboardInterrupt):
        model(tokens(), labels=labelled(tokens(), 3))
    handle.remove()
    with refused(ValueError, "does not say where its prompts end", model=model):
        model.model(tokens())


def test_positions_come_and_go_with_the_adapter_in_use():
    base = build_frozen()
    before = snapshot(base)["modules"]
    model = patch_model(base, SteerConfig(rank=4, positions="last_prompt"))
    randomize(model)
    expected = logits(model)
    model.steering.add("other", SteerConfig(rank=2))
    model.steering.use("other")
    assert "generate" not in vars(model)
    assert torch.equal(logits(model), logits(build()))
    model(tokens())  # with gradients, and nothing said of prompts
    model.steering.use("default")
    assert torch.equal(logits(model), expected)
    model.steering.scale = 0.0
    assert torch.equal(logits(model), logits(build()))
    model.steering.scale = 1.0
    with model.steering.disabled():
        assert torch.equal(model(tokens()).logits, build()(tokens()).logits)
        assert torch.equal(generate(model)[0], generate(build())[0])
    twin = copy.deepcopy(model)
    model.steering.unpatch()
    assert torch.equal(logits(twin), expected) and twin.generate.model is twin
    assert snapshot(model)["modules"] == before
    assert torch.equal(logits(model), logits(build()))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_positions_leave_no_trace_in_an_unpatched_copy(duplicate):
    base = build()
    before = snapshot(base)["modules"]
    twin = duplicate(patch_model(base, SteerConfig(rank=4, positions="last_2")))
    twin.steering.unpatch()
    assert snapshot(twin)["modules"] == before


def test_positions_of_the_adapter_in_use_need_no_pool():
    """`generate` steers by the adapter as it is, whatever rank, sites and dtype the pool's slots have."""
    model = steered("first_5+generated")
    expected = generate(model)[1]
    for options in ({"rank": 1}, {"rank": 4, "dtype": "bfloat16"}, {"rank": 4, "layers": [0]}):
        model.steering.make_pool(slots=1, **options)
        assert torch.equal(generate(model)[1], expected)
        model.steering.close_pool()


@pytest.mark.parametrize(
    ("scope", "duplicate"), [("disabled", copy.deepcopy), ("batch", lambda model: pickle.loads(pickle.dumps(model)))]
)
def test_positions_that_begin_or_end_inside_a_scope(scope, duplicate):
    """The generating methods are those of the adapter in use, whichever of their replacements ends first."""
    base = build()
    before = snapshot(base)["modules"]
    model = patch_model(base, SteerConfig(rank=4, positions="last_2"))
    model.steering.add("all", SteerConfig(rank=4))
    randomize(model), randomize(model, "all", 2)
    expected = {}
    for name in ("default", "all"):
        model.steering.use(name)
        expected[name] = generate(model, prefill_chunk_size=3)[1]  # only a batch knows where a prompt in parts ends
    for first, then in (("all", "default"), ("default", "all")):
        model.steering.use(first)
        with model.steering.disabled() if scope == "disabled" else model.steering.batch([None, None]):
            twin = duplicate(model)
            model.steering.use(then)
            other = duplicate(model)
        for found, name in ((model, then), (twin, first), (other, then)):
            assert torch.equal(generate(found, prefill_chunk_size=3)[1], expected[name])
        other.steering.unpatch()
        if then == "default":
            assert "generate" not in vars(other)
    model.steering.unpatch()
    assert snapshot(model)["modules"] == before


def test_positions_copy_of_a_layer_leaves_the_model_out():
    model, memo = steered("last_2"), {}
    layer = copy.deepcopy(model.model.layers[1], memo)
    assert id(model) not in memo and id(model.model) not in memo
    with refused(RuntimeError, "outside of a pass", "has positions"):
        layer.post_block(torch.zeros(1, 2, 32), torch.zeros(1, 2, 32))


def test_positions_changes_while_generate_runs_are_refused(tmp_path):
    """Its batch has the adapter and the strength that it began with."""
    model = steered("first_5+generated")
    model.steering.save(tmp_path)

    def scale() -> None:
        model.steering.scale = 8.0

    for change, error, parts in (
        (scale, RuntimeError, ("steering.scale is set while generate runs", "before or afterwards")),
        (lambda: model.steering.restore(tmp_path), ValueError, ("'default' is in use by generate", "restored")),
        (lambda: model.steering.use(None), RuntimeError, ("steering.use is called while generate runs", "expected it")),
    ):
        with refused(error, *parts, model=model):
            generate(model, logits_processor=[lambda ids, scores, change=change: change() or scores])
        change()
    assert torch.equal(logits(model), logits(build()))


def test_positions_survive_an_unpatching_that_is_refused():
    model = steered("last_prompt")
    expected, layer = logits(model), model.model.layers[0]
    ours = type(layer)
    layer.__class__ = type("Other", (ours,), {})
    with refused(RuntimeError, "layer 0 is now a"):
        model.steering.unpatch()
    layer.__class__ = ours
    assert torch.equal(logits(model), expected)
    model.steering.unpatch()
    assert torch.equal(model(tokens()).logits, build()(tokens()).logits)


def test_positions_where_nothing_tells_them_are_refused(tmp_path):
    from fused_steer.peft import PostBlockConfig

    model = steered("last_prompt")
    with refused(RuntimeError, "init_continuous_batching", "'last_prompt'", "expected generate_batch"):
        model.init_continuous_batching()
    with refused(RuntimeError, "outside of a pass", "has positions", "expected the model to be called"):
        model.model.layers[0].post_block(torch.zeros(1, 2, 32), torch.zeros(1, 2, 32))
    with refused(ValueError, "positions is 'last_prompt'", "expected 'all'"):
        get_peft_model(build(), PostBlockConfig(r=4, positions="last_prompt"))


# ------------------------------------------------------------------------------------------------------------ trainers


class Told:
    """Notes the gain of each pass with gradients."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[tuple[dict[str, Tensor], Tensor]] = []
        self.model, self.gains = model, model.steering._gains
        model.register_forward_hook(self._see, with_kwargs=True)
        model.model.layers[0].register_forward_hook(self._note)

    def _note(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self.gain = self.gains._here.gain

    def _see(self, _: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        if torch.is_grad_enabled():
            self.seen.append((kwargs, self.gain))


def test_positions_with_the_trainer(tmp_path):
    model = steered("last_prompt+generated")
    told = Told(model)
    rows = [{"input_ids": ids, "labels": labelled(ids[None], 2 + i % 5)[0]} for i, ids in enumerate(tokens(batch=32))]
    run: Trainer = trainer(model, tmp_path, SteeringTrainer)
    run.train_dataset = rows
    run.train()
    assert len(told.seen) == 12
    for given, gain in told.seen:
        expected = [defined("last_prompt+generated", int((row == -100).sum()), LENGTH) for row in given["labels"]]
        assert torch.equal(gain, torch.tensor(expected))
    loaded = patch_model(build(), tmp_path / "checkpoint-6")
    assert loaded.steering.config().positions == "last_prompt+generated"
    assert torch.equal(generate(loaded)[0], generate(model.eval())[0])


@pytest.mark.parametrize(
    "options", [{}, {"padding_free": True, "max_length": None}, {"packing": True, "max_length": 24}], ids=str
)
def test_positions_with_trls_completions(tmp_path, options):
    """Loss of completions alone, in padded rows, flattened ones and packs."""
    model = steered("first_2+last_1")
    told = Told(model)
    sums = [("1+1=", "2"), ("12+30=", "42"), ("7+8=", "15"), ("100+200=", "300")] * 4
    trl = pytest.importorskip("trl", reason="needs TRL (the extra trl)")
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to="none", disable_tqdm=True,
        completion_only_loss=True, **options,
    )  # fmt: skip
    data = importlib.import_module("datasets").Dataset.from_list([{"prompt": p, "completion": c} for p, c in sums])
    trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer()).train()
    prompts = {tuple(tokenizer()(p)["input_ids"]) for p, _ in sums}
    assert len(told.seen) == 2
    for given, gain in told.seen:
        texts = 0
        for ids, labels, steered_here, where in zip(*_rows(given, gain), strict=True):
            starts = [i for i, p in enumerate(where) if p == 0 and (labels[i] == -100)]
            for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
                prompt = next((i for i in range(start, end) if labels[i] != -100), end) - start
                if tuple(ids[start : start + prompt]) in prompts:
                    texts += 1
                    assert steered_here[start : start + prompt] == defined("first_2+last_1", prompt, prompt)
                    assert not any(steered_here[start + prompt : end])
        assert texts >= 4


def _rows(given: dict[str, Tensor], gain: Tensor) -> tuple[list[Any], ...]:
    """Ids, labels, gains and places of the tokens of each row, without padding."""
    mask = given.get("attention_mask")
    mask = torch.ones_like(given["input_ids"]) if mask is None else mask
    places = given.get("position_ids")
    places = mask.cumsum(1) - 1 if places is None else places
    kept = [row == 1 for row in mask]
    return tuple(
        [row[k].tolist() for row, k in zip(t, kept, strict=True)]
        for t in (given["input_ids"], given["labels"], gain, places)
    )


def test_positions_of_passes_by_the_decoder_alone():
    """As losses that never make all logits call it."""
    model, ids = steered("last_prompt"), tokens()
    expected = model(ids, labels=labelled(ids, PROMPT), output_hidden_states=True).hidden_states[-1]
    with model.steering.prompts([PROMPT, PROMPT]):
        assert torch.equal(model.model(ids).last_hidden_state, expected)
    with refused(ValueError, "does not say where"):
        model.model(ids)


def test_positions_with_a_mask_of_one_row_for_all():
    model, ids = steered("last_2"), tokens()
    mask = torch.ones(1, LENGTH, dtype=torch.long)  # with zeros transformers refuses it
    with torch.no_grad():
        one, each = (model.model(ids, attention_mask=given).last_hidden_state for given in (mask, mask.expand(2, -1)))
    assert torch.equal(one, each)


def test_positions_with_activation_and_scale_of_their_own():
    model = steered("last_2", activation="tanh", scale=0.4)
    gain = torch.tensor([defined("last_2", LENGTH, LENGTH)]).expand(2, -1)
    hooked = Masked(build(), steering_parameters(model), gain, scale=0.4, activation=F.tanh)
    assert_close(logits(model), logits(hooked.model))


def test_positions_leave_gradients_without_them_alone(tmp_path: Path):
    with_all, without = steered("all"), patch_model(build_frozen(), SteerConfig(rank=4))
    randomize(without)
    found, expected = (gradients(m, steering_parameters(m)) for m in (with_all, without))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
