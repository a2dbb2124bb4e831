"""Follows the batches of vLLM's two model runners, and fills in the slot and the gain of each token.

A gain is the strength of the request, or 0 if the request does not steer the token. So a strength takes no slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..serving.options import KEY, unpacked
from ..serving.requests import Request
from .adapters import Steering, Store
from .cache import put_into_cache_key
from .options import lora_of, server_options, stand_in
from .reached import reach
from .sources import room_of


def options_of(parameters: Any) -> Request | None:
    """Return the steering options of a request. `process_inputs` has converted them to plain values."""
    extra = getattr(parameters, "extra_args", None)
    values = extra.get(KEY) if extra else None
    return None if values is None else unpacked(values)


def fill(steering: Steering, rows: Iterable[tuple[int, Request | None, int, int, int]]) -> None:
    """Fill in the slots and the gains of a batch's tokens.

    Args:
        rows: of each request in the order of the batch: the number of its adapter (0: none), its options, the tokens of
            its prompt, those that are computed already, and those in this batch.
    """
    numbers, options, prompts, computed, counts = zip(*rows, strict=True)
    found = {number: steering.find(number) for number in set(numbers) if number}
    if not any(found.values()):
        steering.batch.rest()
        return
    slots, scales = [], []
    for number, asked in zip(numbers, options, strict=True):
        loaded = found.get(number)
        slots.append(-1 if loaded is None else loaded.slot)
        own = 0.0 if loaded is None else loaded.scale
        scales.append(own if asked is None or asked.scale is None else asked.scale)
    steering.batch.fill(slots, scales, options, prompts, computed, counts)


# ---------------------------------------------------------------------------------------------------- the first runner


def set_active_loras(original: Any) -> Callable[..., Any]:
    """Wrap the method of vLLM's first model runner that gives LoRA layers the adapter of each token."""

    def set_active_loras(self: Any, input_batch: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> Any:
        steering = steering_of(self)
        numbers = input_batch.request_lora_mapping[: len(input_batch.req_ids)]
        done = None
        if not steering.alone:
            done = original(self, input_batch, num_scheduled_tokens, *args, **kwargs)
        elif numbers.any():
            here = {int(number) for number in numbers if number}
            self.lora_manager.set_active_adapters(
                {input_batch.lora_id_to_lora_request[number] for number in here}, None
            )
        if not numbers.any():
            steering.batch.rest()
            return done
        fill(
            steering,
            (
                (
                    int(numbers[row]),
                    options_of(self.requests[request].sampling_params),
                    int(input_batch.num_prompt_tokens[row]),
                    int(input_batch.num_computed_tokens_cpu[row]),
                    int(num_scheduled_tokens[row]),
                )
                for row, request in enumerate(input_batch.req_ids)
            ),
        )
        return done

    return set_active_loras


# --------------------------------------------------------------------------------------------------------- both runners


def steering_of(runner: Any) -> Steering:
    """Return the steering of a runner's model."""
    steering: Steering | None = getattr(runner, "model_steering", None)
    if steering is None:
        steering = runner.model_steering = runner.get_model().steering
    return steering


def set_active_mapping(original: Any) -> Callable[..., Any]:
    """Wrap the method by which the second runner, and both runners' warm-ups, give LoRA layers the adapters."""

    def _set_active_loras(
        self: Any, prompt_lora_mapping: Any, token_lora_mapping: Any, lora_requests: Any, *args: Any, **kwargs: Any
    ) -> Any:
        steering = steering_of(self)
        if not steering.alone:
            done = original(self, prompt_lora_mapping, token_lora_mapping, lora_requests, *args, **kwargs)
        else:
            done = self.lora_manager.set_active_adapters(lora_requests, None)
        # The tokens are filled in later. A graph that is captured for adapters has the launches, another has none.
        if any(prompt_lora_mapping):
            steering.batch.idle = False
        else:
            steering.batch.rest()
        return done

    return _set_active_loras


def make_runner(original: Any) -> Callable[..., Any]:
    """Wrap the constructors of both runners: without `--enable-lora` a runner follows adapters as with it."""

    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        if vllm_config.lora_config is None and (config := stand_in(vllm_config)) is not None:
            self.lora_config = config

    return __init__


def load_model(original: Any) -> Callable[..., Any]:
    """Wrap the method that prepares a loaded model for adapters. Without `--enable-lora` the model keeps its layers."""

    def load_lora_model(self: Any, model: Any, vllm_config: Any, device: Any) -> Any:
        if lora_of(vllm_config) is not None:
            return original(self, model, vllm_config, device)
        room = room_of(vllm_config)
        # From here on vLLM captures graphs for batches with and without adapters.
        vllm_config.lora_config = self.lora_config
        if hasattr(self, "lora_capture_cases"):  # the second runner
            from vllm.v1.worker.gpu.lora_utils import get_lora_capture_cases

            self.lora_capture_cases = get_lora_capture_cases(self.lora_config, self.compilation_config)
        reached = reach(model, vllm_config, room, device)
        self.lora_manager = Store(reached, self.lora_config.max_loras)
        model.steering = self.lora_manager.steering(server_options(vllm_config))
        put_into_cache_key(model, vllm_config)
        return model

    return load_lora_model


def make_scheduler(original: Any) -> Callable[..., Any]:
    """Wrap the scheduler's constructor: a batch has at most as many adapters as slots."""

    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        if self.lora_config is None:
            self.lora_config = stand_in(vllm_config)

    return __init__


# ---------------------------------------------------------------------------------------------------- the second runner


def init_model_state(original: Any) -> Callable[..., Any]:
    """Wrap the function that makes the model state of vLLM's second runner, which sees every request and batch."""

    def init_model_state(config: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        state = original(config, model, *args, **kwargs)
        if config.lora_config is not None:
            _follow(state, model)
        return state

    return init_model_state


def _follow(state: Any, model: Any) -> None:
    known: dict[str, tuple[int, Request | None, int]] = {}
    add, remove, prepare = state.add_request, state.remove_request, state.prepare_inputs
    steering: Steering = model.steering

    def add_request(index: int, new: Any) -> Any:
        number = new.lora_request.lora_int_id if new.lora_request else 0
        # Not the tokens to be filled in: after a preemption these hold generated ones too.
        known[new.req_id] = (number, options_of(new.sampling_params), new.prompt_len)
        return add(index, new)

    def remove_request(request: str) -> Any:
        known.pop(request, None)
        return remove(request)

    def prepare_inputs(batch: Any, *args: Any, **kwargs: Any) -> Any:
        if any(known.get(request, (0,))[0] for request in batch.req_ids):  # a warm-up's requests are not known
            fill(
                steering,
                (
                    (*known[request], int(batch.num_computed_tokens_np[row]), int(batch.num_scheduled_tokens[row]))
                    for row, request in enumerate(batch.req_ids)
                ),
            )
        return prepare(batch, *args, **kwargs)

    state.add_request, state.remove_request, state.prepare_inputs = add_request, remove_request, prepare_inputs
