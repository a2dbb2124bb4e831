"""Steering adapters in vLLM's engine: the plug-in as vLLM loads it, with tiny models, against HF's patched ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm_compiled_on_cpu
from peft import PeftModel
from safetensors.torch import load_file, save_file
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
)
from vllm_worker import ask

from fused_steer import SteerConfig, patch_model, save_joint

pytestmark = pytest.mark.vllm

#: Of a config that was edited by hand.
NO_DIGESTS = dict.fromkeys(("config_sha256", "weights_sha256", "tensors_sha256"))

WORKER = Path(__file__).with_name("vllm_worker.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """model/, and an adapter of each of CONFIGS under its name; "lora"; and "joint": the first with that LoRA."""
    root = tmp_path_factory.mktemp("served")
    save_model(root / "model")
    for seed, (name, config) in enumerate(CONFIGS.items(), 1):
        save_adapter(root / "model", root / name, config, seed)
    save_lora(root / "lora", seed=7)
    joint(root, root / "joint", "default")
    return root


def joint(root: Path, out: Path, *loras: str) -> None:
    """Save the first adapter together with the LoRA, under each of these names."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root / "model"), root / "lora", loras[0])
    for name in loras[1:]:
        model.load_adapter(root / "lora", name)
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
    """Every prompt by every adapter, all in one batch."""
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
    # vLLM's own LoRA layers on a CPU take the slot of a request without adapter, -1, for the last of the slots.
    # Emptied, they are filled from the first, and the last of the four stays without LoRA.
    for number in engine.llm_engine.list_loras():
        engine.llm_engine.remove_lora(number)
    assert_answered(engine, folder, ["lora", None, "silu", "joint"])


def test_vllm_more_adapters_than_slots(engine, folder, tmp_path):
    """Twelve over four slots and eight places in memory, each answering as it alone would."""
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
    # The number now stands for another adapter.
    assert core.add_lora(LoRARequest("two", 300, str(folder / "biases"))) and 300 in core.list_loras()
    core.remove_lora(300)
    assert_answered(engine, folder, ["silu", None, "biases"])


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be served is refused alone


def _another_size(folder: Path, out: Path) -> None:
    save_model(out / "model", hidden_size=96, num_attention_heads=3, num_key_value_heads=1, head_dim=32)
    save_adapter(out / "model", out / "adapter", SteerConfig(rank=2), 1)


def _another_depth(folder: Path, out: Path) -> None:
    save_model(out / "model", **SIZES, num_hidden_layers=2)
    save_adapter(out / "model", out / "adapter", SteerConfig(rank=2), 1)


def _rank_above(folder: Path, out: Path) -> None:
    save_adapter(folder / "model", out / "adapter", SteerConfig(rank=9), 1)


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
    """Of another rank than the config says."""
    shutil.copytree(folder / "silu", out / "adapter")
    file = out / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **NO_DIGESTS, "rank": 5}))


def _two_loras(folder: Path, out: Path) -> None:
    joint(folder, out / "adapter", "default", "second")


def _nothing(folder: Path, out: Path) -> None:
    pass


BROKEN = {
    _another_size: "is for a model of hidden size 96; expected 64",
    _another_depth: "is for a model of number of layers 2; expected 3",
    _rank_above: "is of rank 9; expected at most 8 (--max-lora-rank)",
    _corrupt: "its contents are not those that adapter_config.json was saved with",
    _truncated: "its header is of",
    _without_weights: "has no adapter_model.safetensors; expected a saved steering adapter",
    _unknown_field: "no field 'temperature'",
    _not_finite: "has values that are NaN or infinite; expected finite ones",
    _strength_beyond_float32: "scale is 1e+39; expected at most 3.402823e+38 in magnitude",
    _other_tensors: "; expected torch.float32 (5, 64)",
    _two_loras: "holds 2 LoRA adapters; expected one, beside steering/",
    _nothing: "; expected a saved adapter",
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
    # The server loads adapters so, and not by a request.
    with pytest.raises(Exception, match="" if make is _nothing else re_escape(BROKEN[make])):
        engine.llm_engine.add_lora(LoRARequest("broken", 777, str(tmp_path / "adapter")))
    assert 777 not in engine.llm_engine.list_loras()
    assert_answered(engine, folder, [None, "silu"])


def re_escape(text: str) -> str:
    import re

    return re.escape(text)


def test_vllm_files_that_are_gone_or_changed_since(engine, folder, tmp_path):
    from vllm.exceptions import VLLMValidationError

    path = tmp_path / "adapter"
    shutil.copytree(folder / "vector", path)
    request = ("passing", str(path), PROMPTS[0])
    assert ask(engine, [request], NEW_TOKENS) == expected(folder, "vector")[:1]
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(VLLMValidationError, match="its contents are not those"):
        ask(engine, [request], NEW_TOKENS)
    shutil.rmtree(path)
    with pytest.raises(VLLMValidationError, match="no directory"):
        ask(engine, [request], NEW_TOKENS)
    assert_answered(engine, folder, ["silu", None])


# ---------------------------------------------------------------------------------------------------------------------
# Other models, and compiled


def run(out: Path, engine: dict[str, Any], requests: list[Any], **environment: str) -> tuple[list[list[int]], str]:
    """The tokens of a batch, and the log, of an engine in a process of its own."""
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


#: Un-added pairs with norms behind the MLP; finished states beside a residual that is dead; tensors; HF's own layers.
FAMILIES = {
    "gemma3": ("gemma3", {}),
    "cohere": ("cohere", {}),
    "granite": ("granite", {}),
    "llama-by-transformers": ("llama", {"model_impl": "transformers"}),
}


@pytest.mark.parametrize("name", FAMILIES)
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
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to ask the process that compiles for its key
    }
    names = [None, "silu", "linear", "vector", "biases"]
    requests = [(name, name and str(folder / name), prompt) for prompt in PROMPTS for name in names]
    right = [expected(folder, name)[index] for index in range(len(PROMPTS)) for name in names]
    for number, done in ((1, "saved AOT compiled function"), (2, "Directly load AOT compilation")):
        tokens, log = run(tmp_path / f"{number}.json", options, requests, **environment)
        assert tokens == right
        assert done in log
    # The graph's key is not that of the same config without the plug-in.
    marked, plain = json.loads((tmp_path / "1.json").read_text())["keys"]
    (factors,) = (tmp_path / "cache").rglob("cache_key_factors.json")
    assert json.loads(factors.read_text())["config_hash"] == marked != plain


def test_vllm_target_modules_that_leave_steering_out(folder, tmp_path):
    """Said at once, when the adapter is loaded."""
    options = engine_options(folder / "model", lora_target_modules=["q_proj"])
    request = ("silu", str(folder / "silu"), PROMPTS[0])
    with pytest.raises(AssertionError, match="steers, and --lora-target-modules leaves steering out; expected"):
        run(tmp_path / "out.json", options, [request])


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the plug-in


def test_vllm_what_layers_return():
    from vllm.model_executor.models import commandr, exaone4, gemma3, llama, longcat_flash, phimoe, qwen3_next

    from fused_steer.vllm import FINISHED, UNADDED, Unreachable, returned_state

    for cls in (llama.LlamaDecoderLayer, gemma3.Gemma3DecoderLayer, qwen3_next.Qwen3NextDecoderLayer):
        assert returned_state(cls) == UNADDED
    # Whose second value is a residual that was added already.
    for cls in (commandr.CohereDecoderLayer, exaone4.Exaone4DecoderLayer, phimoe.PhiMoEDecoderLayer):
        assert returned_state(cls) == FINISHED
    # A sum of two branches beside its residual: it may be either.
    with pytest.raises(Unreachable, match="not known to be"):
        returned_state(longcat_flash.FlashDecoderLayer)


def test_vllm_the_cache_key_has_all_that_a_graph_depends_on(folder):
    """vLLM's own hash changes with the steered layers, their kind and slots, and with a user's additional_config."""
    import types

    from torch import nn
    from vllm.engine.arg_utils import EngineArgs

    from fused_steer.vllm import SteeringPoint, SteeringWithLoRA, put_into_cache_key

    def key(state: str, slots: int, layers: int, additional: Any) -> str:
        config = EngineArgs(**engine_options(folder / "model")).create_engine_config()
        config.additional_config = additional
        before = config.compute_hash()
        inner = types.SimpleNamespace(additional_config=additional, compute_hash=None)
        model = nn.ModuleList()
        for index in range(layers):
            point = SteeringWithLoRA(SteeringPoint(nn.Linear(64, 64), index, f"layers.{index}", 64, state))
            point.create_lora_weights(slots, types.SimpleNamespace(max_lora_rank=8))
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
    cases += [("unadded", 4, 2, {"mine": 1}), ("unadded", 4, 2, Given("x")), ("unadded", 4, 2, Given("y"))]
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


def test_vllm_registering_again_changes_nothing():
    from vllm.lora import model_manager, utils, worker_manager
    from vllm.v1.engine import input_processor

    from fused_steer.vllm import SteeringWithLoRA, register

    def state() -> list[Any]:
        return [
            utils._all_lora_classes,
            model_manager.LoRAModelManager.__init__,
            worker_manager.WorkerLoRAManager._load_adapter,
            worker_manager.LRUCacheWorkerLoRAManager.add_adapter,
            input_processor.InputProcessor._validate_lora,
        ]

    register()
    before = state()
    register()
    assert state() == before and utils._all_lora_classes.count(SteeringWithLoRA) == 1
