"""Beam search: vLLM asks its engine for one token of each beam at a time.

The prompt of such a request is that of the search with the beam's tokens behind it, and its parameters are new ones. So
each prompt gets what the positions of the steering depend on, and the steering options of the search.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..serving.options import KEY

#: The key of a `Beam` in vLLM's prompts.
_BEAM = "fused_steer_beam"


@dataclass(frozen=True)
class Beam:
    """What a search knows of a beam's request.

    Attributes:
        prompt: the tokens of the search's own prompt; None: of the request's.
        options: the steering options of the search, or None.
    """

    prompt: int | None = None
    options: Any = None


def beam_of(prompt: Any) -> Beam:
    """Return what a request's prompt says of a beam search. Other requests have a `Beam` of None."""
    return prompt.get(_BEAM, Beam()) if isinstance(prompt, Mapping) else Beam()


def parameters_of(given: Mapping[str, Any]) -> Any:
    """Return a request's parameters, those of a beam with the search's steering options.

    Args:
        given: the arguments of vLLM's method.
    """
    parameters, options = given["params"], beam_of(given["prompt"]).options
    if options is None:
        return parameters
    parameters = copy.copy(parameters)
    parameters.extra_args = {**(parameters.extra_args or {}), KEY: options}
    return parameters


def to_beam_search_params(original: Any) -> Callable[..., Any]:
    """Wrap the method that reads a search's parameters from an HTTP request: they have no field for options."""

    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = original(self, *args, **kwargs)
        parameters.steering = (self.vllm_xargs or {}).get(KEY)
        return parameters

    return to_beam_search_params


def beam_search(original: Any) -> Callable[..., Any]:
    """Wrap the server's beam search: its prompt gets the options."""

    def beam_search(self: Any, prompt: Any, request_id: str, params: Any, *args: Any, **kwargs: Any) -> Any:
        prompt = {**prompt, _BEAM: Beam(None, getattr(params, "steering", None))}
        return original(self, prompt, request_id, params, *args, **kwargs)

    return beam_search


def get_prompt(original: Any) -> Callable[..., Any]:
    """Wrap the method that makes the prompt of a beam's next request."""

    def get_prompt(self: Any) -> Any:
        search = self.orig_prompt
        decoder = search["decoder_prompt"] if search["type"] == "enc_dec" else search
        return {**original(self), _BEAM: Beam(len(decoder["prompt_token_ids"]), beam_of(search).options)}

    return get_prompt
