"""Tests of `generate_batch` inside model.steering.batch: each request answers as it would alone."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from models import build, randomize, refused, snapshot
from peft import LoraConfig, get_peft_model
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.requests import RequestState

from fused_steer import SteerConfig, patch_model
from fused_steer.serving import continuous

CONFIGS = {
    "polite": SteerConfig(rank=4, scale=0.7),
    "terse": SteerConfig(rank=2, activation="identity", layers=[1], up_bias=True),
    "vector": SteerConfig(form="vector", layers=[0, 2]),
    "placed": SteerConfig(rank=3, down_bias=True, positions="last_prompt+generated"),
}
NEW = 5
#: transformers 5.17 calls it block_size.
PAGE = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"
POSITIONS = ["all", "prompt", "generated", "last_prompt", "first_2", ("last", 3), "first_1+last_2", None]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    model = build()
    for seed, (name, config) in enumerate(CONFIGS.items(), 1):
        if name == "polite":
            patch_model(model, config, adapter_name=name)
        else:
            model.steering.add(name, config)
        randomize(model, name, seed)
    return model


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 60, (length,), generator=generator).tolist() for length in lengths]


def answers(model: PreTrainedModel, inputs: list[list[int]], new: int = NEW, **options: Any) -> list[list[int]]:
    """Run `generate_batch` on small passes, so that long prompts come in parts. Return each request's tokens."""
    batching = {PAGE: 8, "num_blocks": 64, "max_batch_tokens": 16, **options}
    found = model.generate_batch(
        inputs,
        generation_config=GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(**batching),
    )
    assert all(one.error is None for one in found.values())
    return [one.generated_tokens for one in found.values()]


def alone(model: PreTrainedModel, ids: list[int], name: str | None, new: int = NEW, **options: Any) -> list[int]:
    """Generate one request's answer by `generate`, in a batch of one row."""
    with model.steering.batch([name], **options):
        out = model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False, eos_token_id=None)
    return out[0, len(ids) :].tolist()


def by_generate(model: PreTrainedModel) -> list[int]:
    out = model.generate(torch.tensor(prompts(4)), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    return out[0, 4:].tolist()


def test_continuous_each_request_is_what_it_is_alone(model):
    """Adapters, strengths, positions and lengths all differ; prompts are longer than a pass."""
    generator = torch.Generator().manual_seed(3)
    rows = 24
    names = [[*CONFIGS, None][row % 5] for row in range(rows)]
    scales = [[0.5, None, 2.0, -1.0, 0.0, 1.0, 1.5][row % 7] for row in range(rows)]
    places = [POSITIONS[row % 8] for row in range(rows)]
    inputs = prompts(*torch.randint(1, 40, (rows,), generator=generator).tolist())
    with model.steering.batch(names, scale=scales, positions=places):
        found = answers(model, inputs)
    each = zip(inputs, names, scales, places, strict=True)
    right = [alone(model, ids, name, scale=scale, positions=place) for ids, name, scale, place in each]
    assert found == right
    base = [alone(model, ids, None) for ids in inputs]
    moved = [row for row in range(rows) if names[row] and scales[row] != 0]
    assert sum(right[row] != base[row] for row in moved) > len(moved) / 2  # so the test can fail
    assert all(found[row] == base[row] for row in range(rows) if row not in moved)


def test_continuous_requests_that_are_evicted_and_begin_again(model, monkeypatch):
    """With a small cache transformers throws requests out. They go on from their tokens, which stay generated ones."""
    names, inputs, evicted = ["polite", "placed", None, "vector"], prompts(9, 12, 11, 10, seed=1), []
    again = RequestState.create_equivalent_initial_request
    monkeypatch.setattr(
        RequestState, "create_equivalent_initial_request", lambda state: evicted.append(state) or again(state)
    )
    with model.steering.batch(names, positions="generated"):
        found = answers(model, inputs, new=24, num_blocks=8, max_batch_tokens=64)
    assert evicted, "no request was evicted; expected a cache too small for all"
    each = zip(inputs, names, strict=True)
    assert found == [alone(model, ids, name, new=24, positions="generated") for ids, name in each]


def test_continuous_the_same_prompt_by_several_adapters(model):
    """No request gets blocks of the key-value cache that another adapter computed, even if sharing is allowed."""
    (ids,) = prompts(33)
    names = [None, "polite", "vector", "polite", None]
    with model.steering.batch(names):
        found = answers(model, [ids] * 5, allow_block_sharing=True)
    assert found == [alone(model, ids, name) for name in names]


def test_continuous_returned_sequences_belong_to_their_request(model):
    inputs, names = prompts(5, 9), ["polite", "vector"]
    generation = GenerationConfig(max_new_tokens=NEW, do_sample=True, top_k=1, num_return_sequences=3, eos_token_id=-1)
    config = ContinuousBatchingConfig(**{PAGE: 8}, num_blocks=64, max_batch_tokens=16)
    with model.steering.batch(names):
        found = model.generate_batch(inputs, generation_config=generation, continuous_batching_config=config)
    right = [alone(model, ids, name) for ids, name in zip(inputs, names, strict=True)]
    base = build().generate_batch(inputs, generation_config=generation, continuous_batching_config=config)
    assert list(found) == list(base)  # transformers 5.17 returns one of a request's sequences
    assert all(one.generated_tokens == right[one.prompt_ids == inputs[1]] for one in found.values())


def test_continuous_adapter_in_use_with_positions(model):
    """Without a batch the adapter in use steers all requests, at its own positions."""
    inputs = prompts(4, 20)
    model.steering.use("placed")
    try:
        found = answers(model, inputs)
    finally:
        model.steering.use("polite")
    assert found == [alone(model, ids, "placed") for ids in inputs]
    assert found != [alone(model, ids, "placed", positions="all") for ids in inputs]


def test_continuous_adapters_of_a_pool(model, tmp_path):
    model.steering.save(tmp_path / "stored", "polite")
    inputs, right = prompts(6, 3), [alone(model, ids, "polite") for ids in prompts(6, 3)]
    other = patch_model(build(), SteerConfig(rank=2, layers=[0]))
    pool = other.steering.make_pool(slots=2, rank=4, check_base=False)
    pool.register("stored", tmp_path / "stored")
    with other.steering.batch(["stored", "stored"]):
        assert answers(other, inputs) == right


def test_continuous_an_error_of_a_pass_is_raised(model, monkeypatch):
    """transformers logs the error of a pass and returns requests without tokens. Here it is raised."""
    monkeypatch.setattr(continuous, "token_gains", lambda *_: 1 / 0)
    before = snapshot(model)
    with model.steering.batch(["polite"]), pytest.raises(ZeroDivisionError):
        answers(model, prompts(4))
    monkeypatch.undo()
    assert snapshot(model) == before
    with model.steering.batch(["polite"]):
        assert answers(model, prompts(4)) == [by_generate(model)]


@pytest.mark.parametrize(
    ("names", "options", "error", "part"),
    [
        (["nobody"], {}, KeyError, "no adapter 'nobody'"),
        (["polite"], {"scale": [1.0, 2.0]}, ValueError, "scale has 2 entries; expected 1, one for each row"),
        (["polite"], {"positions": ["all", "all"]}, ValueError, "positions has 2 entries; expected 1"),
        (["polite"], {"scale": float("nan")}, ValueError, "scale is nan"),
        (["polite"], {"scale": [float("inf")]}, ValueError, "scale is inf"),
        (["polite"], {"positions": "somewhere"}, ValueError, "positions has 'somewhere'"),
    ],
)
def test_continuous_rows_are_checked_as_those_of_a_batch(model, names, options, error, part):
    before = snapshot(model)
    with refused(error, part), model.steering.batch(names, **options):
        pytest.fail("entered")
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("arguments", "error", "part"),
    [
        ({"inputs": [[1], [2]]}, ValueError, "inputs has 2 prompts; expected 1, one for each name"),
        ({"inputs": []}, ValueError, "inputs has 0 prompts; expected 1"),
        ({"inputs": [[]]}, ValueError, "inputs has no tokens in row 0"),
        ({"inputs": torch.tensor([[1, 2]])}, TypeError, "expected a list with a list of token ids"),
        ({"inputs": [5, 6]}, TypeError, "expected a list with a list of token ids"),
        ({"inputs": [[1]], "persistent_manager": True}, ValueError, "persistent manager; expected none"),
        ({"use_cuda_graph": True}, ValueError, "use_cuda_graph is True; expected it not to be set"),
        ({"use_cuda_graph": (False, True)}, ValueError, "use_cuda_graph is (False, True)"),
        ({"use_async_batching": True}, ValueError, "use_async_batching is True"),
        ({"default_compile_level": 1}, ValueError, "default_compile_level is 1"),
        ({"varlen_compile_config": CompileConfig()}, ValueError, "varlen_compile_config is "),
    ],
    ids=str,
)
def test_continuous_bad_arguments_are_refused_before_anything_runs(model, arguments, error, part):
    given = arguments if "inputs" in arguments else {"inputs": [[1, 2]]}
    if given is not arguments:
        given["continuous_batching_config"] = ContinuousBatchingConfig(**arguments)
    before, threads = snapshot(model), threading.active_count()
    with model.steering.batch(["polite"]):
        with refused(error, part):
            model.generate_batch(**given)
        assert threading.active_count() == threads
        right = by_generate(model)
        assert answers(model, prompts(4)) == [right]  # the batch goes on
    assert snapshot(model) == before


def test_continuous_a_manager_without_requests_of_a_batch_is_refused(model):
    with model.steering.batch(["polite"]), refused(RuntimeError, "init_continuous_batching", "expected generate_batch"):
        model.init_continuous_batching()


def test_continuous_another_threads_batch_is_refused(model):
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(answers(model, prompts(4)))
        except RuntimeError as error:
            found.append(str(error))

    with model.steering.batch(["polite"]):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert "of another thread or task" in found[0]


@pytest.mark.parametrize("scope", ["disabled", "mode"])
def test_continuous_inside_a_scope_computes_what_generate_does(scope):
    """transformers' thread takes part in the scope in which `generate_batch` is called."""
    model = patch_model(get_peft_model(build(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval())
    randomize(model.base_model.model, "default", seed=1)
    inner, steering = model.base_model.model, model.base_model.model.steering
    inputs = prompts(4, 9)
    steered = answers(inner, inputs)
    with steering.disabled() if scope == "disabled" else steering.mode("lora"):
        ids = [torch.tensor([one]) for one in inputs]
        right = [inner.generate(one, max_new_tokens=NEW, do_sample=False, eos_token_id=None)[0] for one in ids]
        found = answers(inner, inputs)
        with refused(ValueError, "persistent manager; expected none inside steering."):
            inner.generate_batch(inputs, persistent_manager=True)
    assert found == [one[-NEW:].tolist() for one in right] != steered
    assert answers(inner, inputs) == steered
    assert not {"generate", "generate_batch", "init_continuous_batching"} & vars(inner).keys()
