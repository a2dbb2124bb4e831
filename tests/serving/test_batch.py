"""Tests of model.steering.batch: each row of a batch answers as it would alone."""

from __future__ import annotations

import copy
import os
import threading
import traceback
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import LAYERS, assert_close, build, build_frozen, randomize, refused, snapshot, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModel, DynamicCache, EncoderDecoderCache, PreTrainedModel, StaticCache

from fused_steer import SteerConfig, patch_model
from fused_steer.serving import batch as batch_module

CONFIGS = {
    "polite": SteerConfig(rank=4, scale=0.7),
    "terse": SteerConfig(rank=2, activation="identity", layers=[1], up_bias=True),
    "vector": SteerConfig(form="vector", layers=[0, 2]),
    "biased": SteerConfig(rank=3, activation="gelu", down_bias=True),
}
NAMES = ["polite", None, "terse", "vector", "biased"]
NEW = 5


def steered(family: str = "llama", **overrides: Any) -> PreTrainedModel:
    model = build(family, **overrides)
    for seed, (name, config) in enumerate(CONFIGS.items(), 1):
        if name == "polite":
            patch_model(model, config, adapter_name=name)
        else:
            model.steering.add(name, config)
        randomize(model, name, seed)
    return model


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return steered()


PROMPTS = tokens(batch=len(NAMES), length=7)


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Return PROMPTS with 0, 1, … tokens of padding in their rows, and the mask."""
    ids, mask = PROMPTS.clone(), torch.ones_like(PROMPTS)
    for row in range(len(ids)):
        place = slice(0, row) if side == "left" else slice(ids.shape[1] - row, None)
        ids[row, place], mask[row, place] = 0, 0
    return ids, mask


def alone(model: PreTrainedModel, name: str | None, call: Any) -> Any:
    """Run a call with one adapter, without a batch."""
    active = model.steering.active
    model.steering.use(name)
    try:
        with torch.no_grad():
            return call()
    finally:
        model.steering.use(active)


def greedy(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(ids, **options)[:, ids.shape[1] :]


def logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits


def together_and_alone(base: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Run prompts with an unsteered model, as a batch and alone. Products of several rows may sum in another order."""
    return logits(base, PROMPTS), torch.cat([logits(base, row[None]) for row in PROMPTS])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gemma3", "gpt_neox-parallel", "mixtral", "qwen3_moe"])
def test_batch_rows_are_what_they_are_alone(family):
    model = steered(family)
    rows = [
        alone(model, name, lambda row=row: logits(model, row[None])) for name, row in zip(NAMES, PROMPTS, strict=True)
    ]
    words = [
        alone(model, name, lambda row=row: greedy(model, row[None])) for name, row in zip(NAMES, PROMPTS, strict=True)
    ]
    with model.steering.batch(NAMES):
        assert_close(logits(model, PROMPTS), torch.cat(rows), unsteered=together_and_alone(build_frozen(family)))
        assert torch.equal(greedy(model, PROMPTS), torch.cat(words))
    base = alone(model, None, lambda: logits(model, PROMPTS))
    assert all((base[row] - rows[row][0]).abs().max() > 1e-2 for row, name in enumerate(NAMES) if name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "cache_implementation": "static"},
        {"prefill_chunk_size": 3},
        {"num_beams": 3, "prefill_chunk_size": 3},
    ],
    ids=str,
)
def test_batch_generate_under_left_padding(model, options):
    ids, mask = padded("left")
    words = [
        alone(model, name, lambda row=row: greedy(model, ids[row : row + 1, row:], **options))
        for row, name in enumerate(NAMES)
    ]
    with model.steering.batch(NAMES):
        assert torch.equal(greedy(model, ids, attention_mask=mask, **options), torch.cat(words))


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_forward_under_padding(model, side):
    ids, mask = padded(side)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with model.steering.batch(NAMES), torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=positions).logits
    unsteered = padded_and_alone(ids, mask)
    for row, name in enumerate(NAMES):
        kept = mask[row] == 1
        one = alone(model, name, lambda row=row, kept=kept: logits(model, ids[row : row + 1, kept]))
        assert_close(out[row, kept], one[0], unsteered=unsteered)


def padded_and_alone(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Run the unsteered model on the rows in one padded batch, and on each row alone without padding."""
    base = build_frozen()
    with torch.no_grad():
        together = base(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
    rows = zip(ids, mask == 1, strict=True)
    return together[mask == 1], torch.cat([logits(base, row[None, kept])[0] for row, kept in rows])


def test_batch_none_and_strength_0_keep_every_bit(model):
    base = alone(model, None, lambda: logits(model, PROMPTS))
    with model.steering.batch(NAMES, scale=[0, None, 0.0, 1.0, 0]):
        out = logits(model, PROMPTS)
    untouched = [0, 1, 2, 4]
    assert torch.equal(out[untouched], base[untouched]) and not torch.equal(out[3], base[3])


def test_batch_strengths_of_rows_and_of_all(model):
    with model.steering.batch(["polite"] * 5, scale=[None, 2.0, 1, -0.5, 0.7]):
        out = logits(model, PROMPTS)
    with model.steering.batch(["polite"] * 5, scale=2.0):
        all_two = logits(model, PROMPTS)
    model.steering.use("polite")
    unsteered = together_and_alone(build_frozen())
    for row, strength in enumerate([0.7, 2.0, 1, -0.5, 0.7]):
        model.steering.scale = strength
        assert_close(out[row : row + 1], logits(model, PROMPTS[row : row + 1]), unsteered=unsteered)
    model.steering.scale = 2.0
    assert_close(all_two, logits(model, PROMPTS))
    model.steering.scale = 0.7


# ---------------------------------------------------------------------------------------------------------- positions

WHERE = ["all", "prompt", "generated", "last", ("first", 1), ("first", 3), ("last", 2), ("last", 99)]


def chosen(where: Any, prompt: int, length: int) -> list[bool]:
    """Return, for each token of an unpadded row, whether `where` chooses it, by the definition."""
    first, count = where if isinstance(where, tuple) else (where, None)
    of = {
        "all": lambda i: True,
        "prompt": lambda i: i < prompt,
        "generated": lambda i: i >= prompt,
        "first": lambda i: i < min(count, prompt),
        "last": lambda i: prompt - (count or 1) <= i < prompt,
    }[first]
    return [of(i) for i in range(length)]


def by_hooks(model: PreTrainedModel, name: str, ids: Tensor, gain: Tensor) -> Tensor:
    """Compute the logits with plain hooks that steer the tokens of gain 1."""
    base = build()
    for index in range(LAYERS):
        adapter = model.model.layers[index].post_block.adapter(name)

        def hook(module: Any, args: Any, out: Tensor, adapter: Any = adapter) -> Tensor:
            if adapter is None:
                return out
            named = adapter.named_tensors()
            a = torch.nn.functional.silu(out @ named["steer_down.weight"].T)
            return out + CONFIGS[name].scale * gain[:, :, None] * (a @ named["steer_up.weight"].T)

        base.model.layers[index].register_forward_hook(hook)
    with torch.no_grad():
        return base(ids).logits


@pytest.mark.parametrize("where", WHERE, ids=str)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prefill_chunk_size": 3}], ids=str)
def test_batch_positions(model, where, options):
    """Each generated token is the most likely one of a model with hooks that steer the chosen tokens."""
    ids, mask = padded("left")
    with model.steering.batch(["polite"] * 5, positions=where):
        words = greedy(model, ids, attention_mask=mask, **options)
    differ = False
    for row in range(5):
        prompt = ids[row, row:]
        whole = torch.cat([prompt, words[row]])[None]
        gain = torch.tensor([chosen(where, len(prompt), whole.shape[1])], dtype=torch.float32)
        right = by_hooks(model, "polite", whole, gain)[0, len(prompt) - 1 : -1].argmax(-1)
        assert torch.equal(words[row], right)
        other = by_hooks(model, "polite", whole, 1 - gain)[0, len(prompt) - 1 : -1].argmax(-1)
        differ |= not torch.equal(right, other)
    assert differ or where == "all"


@pytest.mark.parametrize("where", [w for w in WHERE if w != "generated"], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_positions_of_a_prompt_under_padding(model, where, side):
    ids, mask = padded(side)
    with model.steering.batch(["polite"] * 5, positions=where), torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
    unsteered = padded_and_alone(ids, mask)
    for row in range(5):
        kept = mask[row] == 1
        length = int(kept.sum())
        gain = torch.tensor([chosen(where, length, length)], dtype=torch.float32)
        by_hook = by_hooks(model, "polite", ids[row : row + 1, kept], gain)[0]
        assert_close(out[row, kept], by_hook, unsteered=unsteered)


def test_batch_rows_of_different_positions(model):
    places = ["all", "generated", ("first", 2), "last", "prompt"]
    with model.steering.batch(["polite"] * 5, positions=places):
        together = greedy(model, PROMPTS)
    for row, where in enumerate(places):
        with model.steering.batch(["polite"], positions=where):
            assert torch.equal(together[row : row + 1], greedy(model, PROMPTS[row : row + 1]))


@pytest.mark.parametrize("where", ["last", ("first", 3), "generated"], ids=str)
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "prefill_chunk_size": 3}], ids=str)
def test_batch_positions_of_beams_under_padding(model, where, options):
    """Each row of beams answers as its prompt does alone, without padding and in one piece."""
    ids, mask = padded("left")
    with model.steering.batch(["polite"] * 5, positions=where):
        together = greedy(model, ids, attention_mask=mask, **options)
    for row in range(5):
        with model.steering.batch(["polite"], positions=where):
            assert torch.equal(together[row], greedy(model, ids[row : row + 1, row:], num_beams=3)[0])


def test_batch_chunks_of_a_padded_prompt_need_its_mask(model):
    ids, _ = padded("left")
    with model.steering.batch(NAMES, positions="last"):
        with pytest.raises(ValueError, match="fed in parts; expected attention_mask to be given to generate"):
            greedy(model, ids, prefill_chunk_size=3)
    assert vars(model).keys().isdisjoint({"generate", "prepare_inputs_for_generation"})


# ------------------------------------------------------------------------------------------------- ways of generating


def test_batch_samples_of_one_row(model):
    with model.steering.batch(["polite", None]):
        out = model.generate(PROMPTS[:2], do_sample=True, top_k=1, num_return_sequences=3, max_new_tokens=NEW)
    words = [alone(model, n, lambda i=i: greedy(model, PROMPTS[i : i + 1])) for i, n in enumerate(["polite", None])]
    assert torch.equal(out[:, 7:], torch.cat(words).repeat_interleave(3, 0))


@pytest.mark.parametrize("whole", [True, False], ids=["all ids", "new ids"])
@pytest.mark.parametrize("where", ["all", "generated", "last", ("first", 2)], ids=str)
def test_batch_turns_that_go_on(model, where, whole):
    """A second turn continues on the first turn's cache. All earlier tokens are its prompt; cached ones stay as is."""
    more = tokens(seed=3, batch=2, length=3)

    def turns(name: str, row: int, batch: bool) -> Tensor:
        cache = DynamicCache(config=model.config)
        rows = slice(row, row + 1) if not batch else slice(0, 2)
        first = model.generate(PROMPTS[:2][rows], past_key_values=cache, do_sample=False, max_new_tokens=3)
        ids = torch.cat([first, more[rows]], 1)
        mask = torch.ones_like(ids)
        given = ids if whole else ids[:, cache.get_seq_length() :]
        out = model.generate(given, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=NEW)
        return torch.cat([first, out[:, given.shape[1] :]], 1)

    singles = []
    for row, name in enumerate(["polite", "biased"]):
        with model.steering.batch([name], positions=where):
            singles.append(turns(name, row, batch=False))
    with model.steering.batch(["polite", "biased"], positions=where):
        assert torch.equal(turns("", 0, batch=True), torch.cat(singles))


@pytest.mark.parametrize("whole", [True, False], ids=["all ids", "new ids"])
def test_batch_the_last_token_of_a_second_turn_is_its_own(model, whole):
    cache = DynamicCache(config=model.config)
    with model.steering.batch(["polite"], positions="last"):
        first = model.generate(PROMPTS[:1], past_key_values=cache, do_sample=False, max_new_tokens=3)
        ids = torch.cat([first, tokens(seed=3, batch=1, length=3)], 1)
        given = ids if whole else ids[:, cache.get_seq_length() :]
        options = {"attention_mask": torch.ones_like(ids), "past_key_values": cache, "do_sample": False}
        words = model.generate(given, max_new_tokens=1, **options)[:, given.shape[1] :]
    gain = torch.zeros(1, ids.shape[1])
    gain[0, [6, -1]] = 1  # of the first turn, when it was cached, and of the second
    assert torch.equal(words[0], by_hooks(model, "polite", ids, gain)[0, -1:].argmax(-1))


def test_batch_embeddings_in_place_of_ids(model):
    embeddings = model.get_input_embeddings()(PROMPTS)
    with model.steering.batch(NAMES):
        out = model.generate(inputs_embeds=embeddings, do_sample=False, max_new_tokens=NEW)
        assert torch.equal(out, greedy(model, PROMPTS))


def test_batch_guesses_of_an_assistant(model):
    ids = PROMPTS[:1].repeat(1, 3)
    with model.steering.batch(["polite"], positions="generated"):
        assert torch.equal(greedy(model, ids, prompt_lookup_num_tokens=2), greedy(model, ids))


def test_batch_step_by_step_without_generate(model):
    with model.steering.batch(NAMES, positions="generated"), torch.no_grad():
        expected = greedy(model, PROMPTS)
        cache, ids, words = DynamicCache(config=model.config), PROMPTS, []
        for _ in range(NEW):
            ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            words.append(ids)
    assert torch.equal(torch.cat(words, 1), expected)


# ---------------------------------------------------------------------------------------------- where a pass's cache is


def by_hand(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: Any, name: str = "past_key_values") -> Tensor:
    """Decode greedily by a hand-written loop with padding; pass the cache as the argument `name`."""
    words = []
    for _ in range(NEW):
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        out = model(ids, attention_mask=mask, position_ids=positions, use_cache=True, **{name: cache})
        ids = out.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        words.append(ids)
    return torch.cat(words, 1)


class Renamed(torch.nn.Module):
    """A model with a decoder that names its cache argument differently from transformers."""

    def __init__(self, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.inner, original = model.model, model.model.forward

        def forward(input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, memory: Any = None):
            return original(input_ids, attention_mask, position_ids, past_key_values=memory, use_cache=True)

        monkeypatch.setattr(model.model, "forward", forward)
        self.head = model.lm_head

    def forward(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor, use_cache: bool, **cache: Any) -> Any:
        (memory,) = cache.values()
        where = {} if "positional" in cache else {"memory": memory}
        args = (memory,) if "positional" in cache else ()
        hidden = self.inner(ids, attention_mask, position_ids, *args, **where).last_hidden_state
        return SimpleNamespace(logits=self.head(hidden))


@pytest.mark.parametrize("where", ["all", "generated", "last", ("first", 2)], ids=str)
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_batch_cache_in_a_loop_under_left_padding(model, where, cache_class):
    ids, mask = padded("left")
    room = {"max_cache_len": ids.shape[1] + NEW} if cache_class is StaticCache else {}
    with model.steering.batch(NAMES, positions=where), torch.no_grad():
        expected = greedy(model, ids, attention_mask=mask)
        assert torch.equal(by_hand(model, ids, mask, cache_class(config=model.config, **room)), expected)


@pytest.mark.parametrize("name", ["memory", "positional"])
def test_batch_cache_under_another_name(model, monkeypatch, name):
    ids, mask = padded("left")
    with model.steering.batch(NAMES, positions="generated"), torch.no_grad():
        expected = greedy(model, ids, attention_mask=mask)
    renamed = Renamed(model, monkeypatch)
    with model.steering.batch(NAMES, positions="generated"), torch.no_grad():
        assert torch.equal(by_hand(renamed, ids, mask, DynamicCache(config=model.config), name), expected)


def test_batch_cache_is_found_by_its_type():
    key = torch.zeros(2, 1, 4, 8)
    cache, layers = DynamicCache(), ((key, key), (key, key))
    cache.update(key, key, 0)
    both = EncoderDecoderCache(cache, DynamicCache())
    for held in (cache, both, layers):
        given = {"input_ids": torch.ones(2, 1), "use_cache": True, "position_embeddings": (key, key), "kept": held}
        assert batch_module.find_cache(given) is held and batch_module.cache_length(held) == 4
    assert batch_module.find_cache({"cache_position": key[0, 0], "cache": None, "use_cache": True}) is None
    assert batch_module.find_cache({"encoder_cache": DynamicCache(), "cache": cache}) is cache
    with refused(ValueError, "the pass has several caches, one, other; expected one"):
        batch_module.find_cache({"one": DynamicCache(), "other": DynamicCache()})


def test_batch_cache_of_states_of_fixed_size():
    """A state-space model's cache does not have a length. The batch counts the passes that filled it."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "eos_token_id": None}
    mamba = patch_model(
        MambaForCausalLM(MambaConfig(**sizes)).eval(), SteerConfig(rank=2, scale=9), adapter_name="polite"
    )
    randomize(mamba, "polite")

    def step(ids: Tensor, **cache: Any) -> tuple[Tensor, dict[str, Any]]:
        out = mamba(ids, use_cache=True, **cache)
        return out.logits[:, -1:].argmax(-1), {name: out[name] for name in out if name != "logits"}

    differ = []
    for where in ("all", "prompt", "generated"):
        with mamba.steering.batch(["polite", None], positions=where), torch.no_grad():
            expected = greedy(mamba, PROMPTS[:2])
            assert torch.equal(greedy(mamba, PROMPTS[:2], use_cache=False), expected)
            token, cache = step(PROMPTS[:2])
            words = [token]
            for _ in range(NEW - 1):
                token, cache = step(token, **cache)
                words.append(token)
            assert torch.equal(torch.cat(words, 1), expected)
            differ.append(expected)
        with mamba.steering.batch(["polite", None], positions=where), torch.no_grad():
            with refused(ValueError, "does not tell how many tokens it holds; expected"):
                step(token, **cache)
    assert not torch.equal(differ[0], differ[1]) and not torch.equal(differ[0], differ[2])


class Memory:
    """A custom cache of keys and values."""


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"attention_mask": torch.ones(1, 8)}, ["attention_mask spans 8 columns of a pass with 1 and no cache"]),
        ({"attention_mask": torch.ones(1, 1, 1, 8)}, ["attention_mask spans 8 columns"]),
        ({"position_ids": torch.tensor([[7]])}, ["position_ids begins at 7 and no argument of the pass is a cache"]),
        ({"cache_position": torch.tensor([7])}, ["cache_position begins at 7"]),
        ({"kv_cache": Memory()}, ["the cache is a Memory that does not tell how many tokens it holds; expected"]),
        ({"state": [torch.zeros(1, 2, 3)]}, ["the cache is a list that does not tell"]),
    ],
    ids=["mask", "mask of four dimensions", "position_ids", "cache_position", "unknown object", "list"],
)
def test_batch_cache_that_cannot_be_found(model, given, parts):
    with model.steering.batch(["polite"]), torch.no_grad():
        with refused(ValueError, *parts, model=model):
            model.model(PROMPTS[:1, :1], **given)


def test_batch_cache_that_is_not_used(model):
    """With use_cache=False, positions may begin at any number."""
    given = {"position_ids": torch.arange(3, 10)[None], "use_cache": False}
    expected = alone(model, "polite", lambda: model(PROMPTS[:1], **given).logits)
    with model.steering.batch(["polite"]), torch.no_grad():
        assert_close(model(PROMPTS[:1], **given).logits, expected)


def test_batch_cache_that_generate_hides(model, monkeypatch):
    """A model that keeps its cache inside and gets only the last token is refused in generate."""
    monkeypatch.setattr(model, "prepare_inputs_for_generation", lambda input_ids, **_: {"input_ids": input_ids[:, -1:]})
    with model.steering.batch(["polite"]):
        model.steering._batch.generating = 1
        for given in ({}, {"attention_mask": torch.ones(1, 7), "use_cache": True}):
            with refused(ValueError, "the pass has 1 of 7 columns and no cache among its arguments; expected a cache"):
                model.prepare_inputs_for_generation(PROMPTS[:1], **given)


class Reads(TorchDispatchMode):
    """Records each line of the package that reads a value from the device and so makes the host wait."""

    looks_inside = True

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            callers = [f for f in traceback.extract_stack()[:-1] if f"{os.sep}torch{os.sep}" not in f.filename]
            if os.path.dirname(callers[-1].filename) == os.path.dirname(batch_module.__file__):
                self.found.append(f"{callers[-1].name}: {callers[-1].line}")
        return function(*args, **kwargs or {})


def test_batch_static_cache_is_not_read_in_a_decoding_step(model):
    ids, mask = padded("left")
    room = ids.shape[1] + NEW
    with model.steering.batch(NAMES, positions="generated"), torch.no_grad():
        expected = greedy(model, ids, attention_mask=mask)
        cache = StaticCache(config=model.config, max_cache_len=room)
        with Reads() as reads:
            assert torch.equal(by_hand(model, ids, mask, cache), expected)
            assert torch.equal(greedy(model, ids, attention_mask=mask, cache_implementation="static"), expected)
            assert torch.equal(greedy(model, PROMPTS, cache_implementation="static"), greedy(model, PROMPTS))
        assert not reads.found
        cache.reset()
        by_hand(model, ids, mask, cache)
        cache.reset()
        with Reads() as reads:  # a prompt of one token: the batch must read the mask, or it would count as generated
            first = model(PROMPTS[:, :1], past_key_values=cache, use_cache=True).logits
        assert reads.found
        assert_close(first, model(PROMPTS[:, :1]).logits)


def test_batch_static_cache_in_inference_mode(model):
    """In inference mode PyTorch does not count writes to a tensor, so the batch reads the cache's length."""
    ids, mask = padded("left")
    with model.steering.batch(NAMES, positions="generated"), torch.inference_mode():
        expected = greedy(model, ids, attention_mask=mask)
        cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + NEW)
        for _ in range(2):
            assert torch.equal(by_hand(model, ids, mask, cache), expected)
            cache.reset()


def test_batch_a_captured_step_holds_on_to_what_is_there(model, monkeypatch):
    """While a CUDA graph is captured the batch computes nothing new, and its tensors keep their addresses."""
    with model.steering.batch(NAMES), torch.no_grad():
        batch = model.steering._batch
        cache = DynamicCache(config=model.config)
        model(PROMPTS, past_key_values=cache)
        with monkeypatch.context() as capturing:
            capturing.setattr(batch_module, "_is_capturing", lambda device: True)
            with pytest.raises(RuntimeError, match="without an earlier pass over generated tokens"):
                model(PROMPTS[:, :1], past_key_values=cache)
        model(PROMPTS[:, :1], past_key_values=cache)
        held = (batch.ids, batch.gain)
        with monkeypatch.context() as capturing:
            capturing.setattr(batch_module, "_is_capturing", lambda device: True)
            capturing.setattr(DynamicCache, "get_seq_length", lambda *_: pytest.fail("asks for a length"))
            model.model(inputs_embeds=torch.zeros(len(NAMES), 1, model.config.hidden_size), use_cache=False)
        assert batch.ids is held[0] and batch.gain is held[1]


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_batch_a_step_on_a_static_cache_replays(where):
    """A step of a hand-written loop needs nothing from the host, so that a CUDA graph can replay it on a GPU."""
    model, prompts, length = steered().to(where), PROMPTS.to(where), PROMPTS.shape[1]
    room, rows = length + NEW, len(NAMES)
    position = torch.tensor([length], device=where)
    cache = StaticCache(config=model.config, max_cache_len=room)

    def step() -> Tensor:
        mask = (torch.arange(room, device=where) <= position).expand(rows, 1, 1, room)
        out = model(
            token, position_ids=position.expand(rows, 1), cache_position=position, attention_mask=mask,
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        return out.logits[:, -1:].argmax(-1)

    def back() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)

    with model.steering.batch(NAMES), torch.no_grad():
        expected = greedy(model, prompts)
        token = model(prompts, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        replay = step
        if where == "cuda":
            step()  # warms up
            back()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                following = step()
            back()

            def replay() -> Tensor:
                graph.replay()
                return following

        words = [token.clone()]
        while len(words) < NEW:
            token.copy_(replay())
            words.append(token.clone())
            position += 1
    assert torch.equal(torch.cat(words, 1), expected)


def test_batch_compiled_within_generate(model):
    torch._dynamo.reset()  # beyond a number of compilations PyTorch runs a model uncompiled
    compiled = copy.deepcopy(model)
    compiled.forward = torch.compile(compiled.forward, backend="aot_eager")
    with model.steering.batch(NAMES, positions=[("first", 3), *["all"] * 4]):
        expected = greedy(model, PROMPTS, cache_implementation="static")
    with compiled.steering.batch(NAMES, positions=[("first", 3), *["all"] * 4]):
        assert torch.equal(greedy(compiled, PROMPTS, cache_implementation="static"), expected)
        with pytest.raises(Exception, match="expected model.generate, or the model as it is"):
            logits(compiled, PROMPTS)
    torch._dynamo.reset()


def test_batch_within_peft(model):
    peft = pytest.importorskip("peft")
    base = build()
    lora = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    patch_model(lora, CONFIGS["polite"], adapter_name="polite")
    randomize(lora, "polite", 1)
    words = [alone(base, n, lambda i=i: greedy(lora, PROMPTS[i : i + 1])) for i, n in enumerate(["polite", None])]
    with base.steering.batch(["polite", None]):
        assert torch.equal(greedy(lora, PROMPTS[:2]), torch.cat(words))
        with pytest.raises(ValueError, match="the batch has 5 rows"):
            greedy(lora, PROMPTS)


def test_batch_of_an_encoder_whose_embeddings_are_outside():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.2}
    config = AutoConfig.for_model("bert", num_hidden_layers=LAYERS, num_attention_heads=4, **sizes)
    bert = patch_model(AutoModel.from_config(config).eval(), SteerConfig(rank=4))
    randomize(bert)
    run = lambda: bert(PROMPTS[:2]).last_hidden_state  # noqa: E731
    expected = [alone(bert, name, run)[row] for row, name in enumerate([None, "default"])]
    with torch.no_grad(), bert.steering.batch([None, "default"]):
        assert_close(run(), torch.stack(expected))


def test_batch_layers_steered_by_a_hook(model):
    hooked = steered()
    expected = greedy_in_batch(model)
    other = build()
    layer = other.model.layers[1]
    layer.forward = layer.forward  # a forward on the instance makes patch_model steer by a hook
    for seed, (name, config) in enumerate(CONFIGS.items(), 1):
        patch_model(other, config, adapter_name=name) if seed == 1 else other.steering.add(name, config)
        randomize(other, name, seed)
    assert [row.kind for row in other.steering.report()] == ["fused", "hook", "fused"]
    assert torch.equal(greedy_in_batch(other), expected)
    assert torch.equal(greedy_in_batch(hooked), expected)


def greedy_in_batch(model: PreTrainedModel) -> Tensor:
    with model.steering.batch(NAMES):
        return greedy(model, PROMPTS)


# ----------------------------------------------------------------------------------------------- what goes on meanwhile


def test_batch_all_is_as_it_was_afterwards(model):
    before, active = snapshot(model), model.steering.active
    expected = logits(model, PROMPTS)
    with pytest.raises(ZeroDivisionError), model.steering.batch(NAMES):
        greedy(model, PROMPTS)
        raise ZeroDivisionError
    assert snapshot(model) == before and model.steering.active == active
    assert all(layer.post_block.rows is None for layer in model.model.layers)
    assert torch.equal(logits(model, PROMPTS), expected)


def test_batch_a_users_own_generate_is_called_and_comes_back(model):
    words = {name: alone(model, name, lambda: greedy(model, PROMPTS[:1])) for name in ("polite", None)}
    called: list[int] = []

    def generate(*args: Any, **kwargs: Any) -> Any:
        called.append(len(args))
        return type(model).generate(model, *args, **kwargs)

    model.generate = generate
    with model.steering.batch(["polite", None]):
        out = greedy(model, PROMPTS[:1].expand(2, -1))
        assert model.generate is not generate
    assert called == [1] and vars(model)["generate"] is generate
    assert torch.equal(out, torch.cat([words["polite"], words[None]]))
    with pytest.raises(ZeroDivisionError), model.steering.batch(["polite"]):
        raise ZeroDivisionError
    assert vars(model)["generate"] is generate
    del model.generate


def test_batch_disabled_used_and_loaded_within(model, tmp_path):
    model.steering.save(tmp_path / "saved", "biased")
    with model.steering.batch(NAMES):
        expected, words = logits(model, PROMPTS), greedy(model, PROMPTS, num_beams=2)
        with model.steering.disabled():
            assert torch.equal(logits(model, PROMPTS), logits(build_frozen(), PROMPTS))
        assert torch.equal(greedy(model, PROMPTS, num_beams=2), words)
        model.steering.use("vector")
        model.steering.load(tmp_path / "saved", name="another")
        assert torch.equal(logits(model, PROMPTS), expected)
        with refused(ValueError, "'terse' is in use by a running batch; expected it to be removed afterwards"):
            model.steering.remove("terse")
        with refused(ValueError, "'biased' is in use by a running batch; expected it to be restored afterwards"):
            model.steering.restore(tmp_path / "saved", "biased")
        with refused(RuntimeError, "steering.scale is set while steering.batch runs", "before or afterwards"):
            model.steering.scale = 3.0
        model.steering.remove("another")
        with refused(RuntimeError, "a batch is running; expected the model to be unpatched afterwards"):
            model.steering.unpatch()
        with refused(RuntimeError, "a batch is running already"), model.steering.batch(NAMES):
            pass
        assert torch.equal(logits(model, PROMPTS), expected)
    model.steering.use("polite")


def test_batch_layers_that_are_first_steered_within():
    """A new site follows the batch, not the adapter that is in use."""
    model = patch_model(build(), SteerConfig(rank=4, layers=[0]), adapter_name="a")
    randomize(model, "a")
    with model.steering.batch(["a", None]):
        expected = logits(model, PROMPTS[:2])
        model.steering.add_vector("v", {2: torch.ones(32)})
        model.steering.use("v")
        assert torch.equal(logits(model, PROMPTS[:2]), expected)
    other = patch_model(build(), SteerConfig(form="vector"))
    other.steering.add_vector("v", {2: torch.ones(32)})
    other.steering.use("v")
    assert torch.equal(logits(model, PROMPTS[:2]), logits(other, PROMPTS[:2]))


def test_batch_report_counts_and_copies(model):
    model.steering.reset_calls()
    with model.steering.batch(NAMES):
        logits(model, PROMPTS)
    assert [row.calls for row in model.steering.report()] == [1, 1, 1]
    assert torch.equal(logits(copy.deepcopy(model), PROMPTS), logits(model, PROMPTS))


def test_batch_threads_take_turns(model):
    """Batches of two threads take turns and both are correct. A third thread's pass is refused while one runs."""
    expected = {name: alone(model, name, lambda: greedy(model, PROMPTS[:1])) for name in ("polite", "vector")}
    wrong: list[Any] = []

    def serve(name: str) -> None:
        for _ in range(4):
            with model.steering.batch([name]):
                if not torch.equal(greedy(model, PROMPTS[:1]), expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=serve, args=[name]) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    refusals: list[str] = []

    def outside(call: Any) -> None:
        try:
            call()
        except RuntimeError as error:
            refusals.append(str(error))

    with model.steering.batch(["polite"]):
        for call in (lambda: logits(model, PROMPTS[:1]), lambda: greedy(model, PROMPTS[:1])):
            thread = threading.Thread(target=outside, args=[call])
            thread.start()
            thread.join()
    assert len(refusals) == 2
    assert all("the model runs inside steering.batch of another thread or task; expected" in r for r in refusals)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("names", "options", "error", "parts"),
    [
        (["polite", "kind"], {}, KeyError, ["no adapter 'kind'; expected one of ['polite'"]),
        ([], {}, ValueError, ["names is empty"]),
        ("polite", {}, TypeError, ["names is 'polite'; expected a list"]),
        ([3], {}, TypeError, ["names has 3"]),
        (["polite"], {"scale": "much"}, TypeError, ["scale is 'much'; expected a number"]),
        (["polite"], {"scale": [float("nan")]}, ValueError, ["scale is nan; expected a finite number"]),
        (["polite"], {"scale": [1.0, 2.0]}, ValueError, ["scale has 2 entries; expected 1"]),
        (["polite", None], {"positions": ["all"]}, ValueError, ["positions has 1 entries; expected 2"]),
        (["polite"], {"positions": "middle"}, ValueError, ["positions has 'middle'; expected 'all', 'prompt'"]),
        (["polite"], {"positions": ("first", 0)}, ValueError, ["positions has ('first', 0)", "at least 1"]),
        (["polite"], {"positions": [("last", True)]}, ValueError, ["positions has ('last', True)"]),
    ],
    ids=str,
)
def test_batch_what_cannot_be_asked(model, names, options, error, parts):
    with refused(error, *parts, model=model), model.steering.batch(names, **options):
        pass
    assert torch.equal(greedy_in_batch(model), greedy_in_batch(model))


def test_batch_strengths_in_a_tensor_are_those_of_a_list(model):
    with model.steering.batch(NAMES[:2], scale=[0.5, 2.0]):
        expected = logits(model, PROMPTS[:2])
    for strengths in (torch.tensor([0.5, 2.0]), np.array([0.5, 2.0])):
        with model.steering.batch(NAMES[:2], scale=strengths):
            assert torch.equal(logits(model, PROMPTS[:2]), expected)


def test_batch_of_another_length(model):
    with model.steering.batch(NAMES[:2]):
        for call in (
            lambda: logits(model, PROMPTS),
            lambda: greedy(model, PROMPTS),
            lambda: logits(model, PROMPTS[:4]),
        ):
            with refused(ValueError, "rows; expected 2, one for each name given to steering.batch"):
                call()
        with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 4\); expected 2 rows"):
            logits(model, PROMPTS[:2], torch.ones(2, 4))
    with model.steering.batch(NAMES[:2], positions="last"):
        with refused(ValueError, "positions counts tokens; expected one of two dimensions"):
            logits(model, PROMPTS[:2], torch.ones(2, 1, 7, 7))


def test_batch_float64_and_gradients(model):
    double = patch_model(build().double(), SteerConfig(rank=2))
    with refused(TypeError, "the model is float64; expected"), double.steering.batch(["default"]):
        pass
    with model.steering.batch(NAMES):
        embeddings = model.get_input_embeddings()(PROMPTS).detach().requires_grad_()
        with refused(RuntimeError, "steering.batch is for inference; expected torch.no_grad()"):
            model(inputs_embeds=embeddings)
