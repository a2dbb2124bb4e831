"""A vLLM plug-in that serves steering adapters. vLLM loads it if fused-steer is installed.

    vllm serve BASE --enable-lora --lora-modules polite=DIR terse=DIR2
    LLM(BASE, enable_lora=True).generate(prompts, lora_request=LoRARequest("polite", 1, DIR))

DIR is a directory of `model.steering.save`, or of `save_joint`, with LoRA and steering for one request. vLLM names,
loads, unloads, evicts and batches these adapters as it does LoRA adapters.

How it works: before vLLM looks for modules that LoRA can adapt, each decoder layer gets a child module without weights
that looks like one, and its forward passes the layer's output through the child. vLLM replaces the child by our LoRA
layer, which holds the adapters' slots and reads each token's slot and gain.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import vllm
from packaging.version import Version

#: The tested versions of vLLM.
FIRST, BELOW = "0.32", "0.33"
if not Version(FIRST) <= Version(vllm.__version__.partition("+")[0]) < Version(BELOW):
    raise ImportError(f"vllm is {vllm.__version__}; expected >={FIRST},<{BELOW} here: it serves no steering adapters")

from vllm.entrypoints.openai.models.serving import OpenAIServingModels  # noqa: E402
from vllm.lora import model_manager, utils, worker_manager  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.v1.core import kv_cache_utils  # noqa: E402
from vllm.v1.core.sched import scheduler  # noqa: E402
from vllm.v1.engine import async_llm, input_processor, llm_engine  # noqa: E402
from vllm.v1.worker import gpu_model_runner  # noqa: E402
from vllm.v1.worker.gpu import model_runner  # noqa: E402
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin  # noqa: E402

from . import endpoint, frontend, gains  # noqa: E402
from .adapters import load, steering_of_manager  # noqa: E402
from .cache import block_keys, put_into_cache_key  # noqa: E402
from .layers import SteeringWithLoRA, reach  # noqa: E402
from .options import server_options  # noqa: E402
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
        device = (
            inspect.signature(original).bind(self, model, *args, vllm_config=vllm_config, **kwargs).arguments["device"]
        )
        self.reached = reach(model, vllm_config, room_of(vllm_config), device)
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
    _wrap(OpenAIServingModels, "__init__", endpoint.make_models)
    _wrap(OpenAIServingModels, "unload_lora_adapter", endpoint.unload_adapter)
    _wrap(kv_cache_utils, "generate_block_hash_extra_keys", block_keys)
    _wrap(LoRAModelRunnerMixin, "set_active_loras", gains.set_active_loras)
    _wrap(LoRAModelRunnerMixin, "_set_active_loras", gains.set_active_mapping)
    _wrap(LoRAModelRunnerMixin, "load_lora_model", gains.load_model)
    for runner in (gpu_model_runner.GPUModelRunner, model_runner.GPUModelRunner):
        _wrap(runner, "__init__", gains.make_runner)
    _wrap(scheduler.Scheduler, "__init__", gains.make_scheduler)
    _wrap(model_runner, "init_model_state", gains.init_model_state)
