"""A vLLM plug-in that serves steering adapters. vLLM loads it if fused-steer is installed.

    vllm serve BASE --enable-lora --lora-modules polite=DIR terse=DIR2
    LLM(BASE, enable_lora=True).generate(prompts, lora_request=LoRARequest("polite", 1, DIR))
    vllm serve BASE --additional-config '{"steering": {"adapters": DIR_OF_DIRS}}'

DIR is a directory of `model.steering.save`, or of `save_joint`, with LoRA and steering for one request. With
`--enable-lora` vLLM names, loads, unloads, evicts and batches these adapters as it does LoRA adapters. Without it the
model keeps its own layers, and `Store` takes the place of vLLM's manager.

How it works: each decoder layer of a loaded model gets a child module without weights, and its forward passes the
layer's output through the child. The child holds the adapters' slots, and reads the slot and the gain of each token
from buffers that are filled in before each step. With `--enable-lora` the child looks like a module that LoRA can
adapt, so that vLLM's manager writes adapters into its slots.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import vllm
from packaging.version import Version

#: The tested versions of vLLM: see docs/serving.md for what was run with which.
FIRST, BELOW = "0.31", "0.34"
#: What the plug-in replaces or calls, beside the names that it imports.
NAMES = {
    "vllm.entrypoints.generate.beam_search.online": ("BeamSearchOnlineMixin.beam_search",),
    "vllm.entrypoints.generate.beam_search.utils": ("BeamSearchSequence.get_prompt",),
    "vllm.entrypoints.openai.chat_completion.protocol": ("ChatCompletionRequest.to_beam_search_params",),
    "vllm.entrypoints.openai.completion.protocol": ("CompletionRequest.to_beam_search_params",),
    "vllm.entrypoints.openai.models.serving": (
        "OpenAIServingModels.load_lora_adapter",
        "OpenAIServingModels.unload_lora_adapter",
    ),
    "vllm.lora.model_manager": ("LoRAModelManager.activate_adapter", "LRUCacheLoRAModelManager"),
    "vllm.lora.utils": ("_all_lora_classes", "get_adapter_absolute_path"),
    "vllm.lora.worker_manager": (
        "WorkerLoRAManager._load_adapter",
        "WorkerLoRAManager.set_active_adapters",
        "LRUCacheWorkerLoRAManager.add_adapter",
    ),
    "vllm.v1.core.kv_cache_utils": ("generate_block_hash_extra_keys",),
    "vllm.v1.core.sched.scheduler": ("Scheduler",),
    "vllm.v1.engine.async_llm": (
        "AsyncLLM.add_request",
        "AsyncLLM._add_streaming_input_request",
        "AsyncLLM.add_lora",
        "AsyncLLM.remove_lora",
    ),
    "vllm.v1.engine.input_processor": ("InputProcessor.process_inputs",),
    "vllm.v1.engine.llm_engine": ("LLMEngine.add_request", "LLMEngine.add_lora", "LLMEngine.remove_lora"),
    "vllm.v1.worker.gpu.lora_utils": ("get_lora_capture_cases",),
    "vllm.v1.worker.gpu.model_runner": ("GPUModelRunner", "init_model_state"),
    "vllm.v1.worker.gpu_model_runner": ("GPUModelRunner",),
    "vllm.v1.worker.lora_model_runner_mixin": (
        "LoRAModelRunnerMixin.load_lora_model",
        "LoRAModelRunnerMixin.set_active_loras",
        "LoRAModelRunnerMixin._set_active_loras",
    ),
}


def missing_names() -> list[str]:
    """Return the names of `NAMES` that this vLLM lacks."""
    missing = []
    for module, names in NAMES.items():
        try:
            found = importlib.import_module(module)
        except ImportError:
            missing.append(module)
            continue
        for name in names:
            try:
                functools.reduce(getattr, name.split("."), found)
            except AttributeError:
                missing.append(f"{module}.{name}")
    return missing


if _missing := missing_names():
    raise ImportError(f"vllm {vllm.__version__} lacks {', '.join(_missing)}: it serves no steering adapters")
if not Version(FIRST) <= Version(vllm.__version__.partition("+")[0]) < Version(BELOW):
    warnings.warn(
        f"vllm is {vllm.__version__}; steering was tested with >={FIRST},<{BELOW}. All names that it uses are there",
        stacklevel=2,
    )

from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin  # noqa: E402
from vllm.entrypoints.generate.beam_search.utils import BeamSearchSequence  # noqa: E402
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest  # noqa: E402
from vllm.entrypoints.openai.completion.protocol import CompletionRequest  # noqa: E402
from vllm.entrypoints.openai.models.serving import OpenAIServingModels  # noqa: E402
from vllm.lora import model_manager, utils, worker_manager  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.v1.core import kv_cache_utils  # noqa: E402
from vllm.v1.core.sched import scheduler  # noqa: E402
from vllm.v1.engine import async_llm, input_processor, llm_engine  # noqa: E402
from vllm.v1.worker import gpu_model_runner  # noqa: E402
from vllm.v1.worker.gpu import model_runner  # noqa: E402
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin  # noqa: E402

from . import beams, endpoint, frontend, gains  # noqa: E402
from .adapters import load, steering_of_manager  # noqa: E402
from .cache import block_keys, put_into_cache_key  # noqa: E402
from .layers import SteeringWithLoRA  # noqa: E402
from .options import server_options  # noqa: E402
from .reached import reach  # noqa: E402
from .sources import find_source, room_of  # noqa: E402


def _wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace a method by `make(original)`, once, because a process may load its plug-ins repeatedly."""
    original = getattr(owner, name)
    if getattr(original, "_fused_steer", False):
        return
    wrapped: Any = functools.wraps(original)(make(original))
    wrapped._fused_steer = True
    setattr(owner, name, wrapped)


def _init_manager(original: Any) -> Any:
    def __init__(self: Any, model: Any, *args: Any, vllm_config: Any, **kwargs: Any) -> None:
        given = inspect.signature(original).bind(self, model, *args, vllm_config=vllm_config, **kwargs).arguments
        self.reached = reach(model, vllm_config, room_of(vllm_config), given["device"])
        original(self, model, *args, vllm_config=vllm_config, **kwargs)
        model.steering = steering_of_manager(self, server_options(vllm_config))
        put_into_cache_key(model, vllm_config)

    return __init__


def _load_adapter(original: Any) -> Any:
    def _load_adapter(self: Any, lora_request: LoRARequest) -> Any:
        source = find_source(utils.get_adapter_absolute_path(lora_request.lora_path))
        return original(self, lora_request) if source is None else load(self, lora_request, source, original)

    return _load_adapter


def _add_adapter(original: Any) -> Any:
    """Skip loading for an adapter that is in its slot already.

    In every step vLLM asks for each adapter of a batch whether it is loaded, and builds a dict of all loaded ones each
    time. Without this the cost grows with the square of their number.
    """

    def add_adapter(self: Any, lora_request: LoRARequest) -> bool:
        models, number = self._adapter_manager, lora_request.lora_int_id
        here = number in models._active_adapters and number in models._registered_adapters
        if here and not lora_request.load_inplace:
            models.get_adapter(number)
            models.activate_adapter(number)
            return True
        return original(self, lora_request)

    return add_adapter


def register() -> None:
    """Install the plug-in. vLLM calls it in each process, as an entry point of `vllm.general_plugins`."""
    if SteeringWithLoRA not in utils._all_lora_classes:
        utils._all_lora_classes = (SteeringWithLoRA, *utils._all_lora_classes)
    _wrap(model_manager.LoRAModelManager, "__init__", _init_manager)
    _wrap(worker_manager.WorkerLoRAManager, "_load_adapter", _load_adapter)
    _wrap(worker_manager.LRUCacheWorkerLoRAManager, "add_adapter", _add_adapter)
    _wrap(input_processor.InputProcessor, "process_inputs", frontend.process_inputs)
    for engine in (llm_engine.LLMEngine, async_llm.AsyncLLM):
        for name in ("add_request", "add_lora", "remove_lora", "pin_lora", "list_loras"):
            _wrap(engine, name, getattr(frontend, name))
    _wrap(async_llm.AsyncLLM, "_add_streaming_input_request", frontend.stream_request)
    for protocol in (ChatCompletionRequest, CompletionRequest):
        _wrap(protocol, "to_beam_search_params", beams.to_beam_search_params)
    _wrap(BeamSearchOnlineMixin, "beam_search", beams.beam_search)
    _wrap(BeamSearchSequence, "get_prompt", beams.get_prompt)
    _wrap(OpenAIServingModels, "__init__", endpoint.make_models)
    _wrap(OpenAIServingModels, "load_lora_adapter", endpoint.load_adapter)
    _wrap(OpenAIServingModels, "unload_lora_adapter", endpoint.unload_adapter)
    _wrap(kv_cache_utils, "generate_block_hash_extra_keys", block_keys)
    _wrap(LoRAModelRunnerMixin, "set_active_loras", gains.set_active_loras)
    _wrap(LoRAModelRunnerMixin, "_set_active_loras", gains.set_active_mapping)
    _wrap(LoRAModelRunnerMixin, "load_lora_model", gains.load_model)
    for runner in (gpu_model_runner.GPUModelRunner, model_runner.GPUModelRunner):
        _wrap(runner, "__init__", gains.make_runner)
    _wrap(scheduler.Scheduler, "__init__", gains.make_scheduler)
    _wrap(model_runner, "init_model_state", gains.init_model_state)
