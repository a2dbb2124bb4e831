"""Fills in the gain of each token before a forward pass, for both of vLLM's model runners.

A gain is the strength of the request, or 0 if the request does not steer the token. So a strength takes no slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..serving.options import KEY, token_gains, unpacked
from ..serving.requests import Request
from .adapters import strength_of
from .layers import SteeringWithLoRA, gains_of


def options_of(parameters: Any) -> Request | None:
    """Return the steering options of a request. `process_inputs` has converted them to plain values."""
    extra = getattr(parameters, "extra_args", None)
    values = extra.get(KEY) if extra else None
    return None if values is None else unpacked(values)


class Filler:
    """Fills in the gains of a model's batches."""

    def __init__(self, model: Any) -> None:
        """
        Args:
            model: vLLM's, with its LoRA layers in place.
        """
        self._adapters = model.lora_manager
        point = next((m for m in model.modules() if isinstance(m, SteeringWithLoRA)), None)
        self._gains = None if point is None else gains_of(point.punica_wrapper)

    def fill(self, rows: Iterable[tuple[int, Request | None, int, int, int]]) -> None:
        """Fill in the gains of a batch's tokens.

        Args:
            rows: of each request in the order of the batch: the number of its adapter (0: none), its options, the
                tokens of its prompt, those that are computed already, and those in this batch.
        """
        if self._gains is None:
            return
        listed = list(rows)
        own = {number: strength_of(self._adapters, number) for number in {row[0] for row in listed}}
        scales = []
        for number, asked, *_ in listed:
            strength = own[number]
            scales.append(
                1.0 if strength is None else strength if asked is None or asked.scale is None else asked.scale
            )
        _, options, prompts, computed, counts = zip(*listed, strict=True)
        gains = torch.from_numpy(token_gains(scales, options, prompts, computed, counts))
        self._gains[: len(gains)].copy_(gains, non_blocking=True)


def set_active_loras(original: Any) -> Callable[..., Any]:
    """Wrap the method of vLLM's first model runner that gives LoRA layers the adapter of each token."""

    def set_active_loras(self: Any, input_batch: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> Any:
        done = original(self, input_batch, num_scheduled_tokens, *args, **kwargs)
        if not input_batch.request_lora_mapping[: len(input_batch.req_ids)].any():
            return done
        filler: Filler | None = getattr(self, "steering_filler", None)
        if filler is None:
            filler = self.steering_filler = Filler(self.get_model())
        filler.fill(
            (
                int(input_batch.request_lora_mapping[row]),
                options_of(self.requests[request].sampling_params),
                int(input_batch.num_prompt_tokens[row]),
                int(input_batch.num_computed_tokens_cpu[row]),
                int(num_scheduled_tokens[row]),
            )
            for row, request in enumerate(input_batch.req_ids)
        )
        return done

    return set_active_loras


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
    filler: Filler | None = None

    def add_request(index: int, new: Any) -> Any:
        number = new.lora_request.lora_int_id if new.lora_request else 0
        # Not the tokens to be filled in: after a preemption these hold generated ones too.
        known[new.req_id] = (number, options_of(new.sampling_params), new.prompt_len)
        return add(index, new)

    def remove_request(request: str) -> Any:
        known.pop(request, None)
        return remove(request)

    def prepare_inputs(batch: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal filler
        if any(known.get(request, (0,))[0] for request in batch.req_ids):  # a warm-up's requests are not known
            if filler is None:
                filler = Filler(model)
            filler.fill(
                (*known[request], int(batch.num_computed_tokens_np[row]), int(batch.num_scheduled_tokens[row]))
                for row, request in enumerate(batch.req_ids)
            )
        return prepare(batch, *args, **kwargs)

    state.add_request, state.remove_request, state.prepare_inputs = add_request, remove_request, prepare_inputs
