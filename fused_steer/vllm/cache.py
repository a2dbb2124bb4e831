"""Keys of vLLM's caches: of cached blocks of keys and values, and of compiled graphs."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ..kernels import grouped
from ..serving.options import packed, steered_ranges, unpacked
from ..serving.requests import Request
from ..serving.slots import Slots
from .layers import SteeringPoint

# -------------------------------------------------------------------------------------------------------------- blocks

_MARK = "fused-steer "


def salt(given: str | None, options: Request | None, shares_prompt: bool) -> str | None:
    """Return the cache salt of a steered request.

    vLLM puts the salt into the key of a sequence's first block, and so into all of its keys. The keys contain the
    adapter already, by the path of its copy.

    Args:
        given: the salt that the client gave.
        options: None: the adapter's own strength, at every token.
        shares_prompt: whether tokens that are not steered are the base model's.
    """
    if options is None:
        return given
    return _MARK + json.dumps([given, packed(options), shares_prompt])


class _AsBase:
    """A request as it would be for the base model: without an adapter, with the client's own salt."""

    lora_request = None

    def __init__(self, request: Any, salt: str | None) -> None:
        self._request, self.cache_salt = request, salt

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


def block_keys(original: Any) -> Callable[..., Any]:
    """Wrap vLLM's function that says what a block's key contains beside its tokens.

    A block that ends before the first steered token gets the base model's key. Others contain which tokens are steered.
    """

    def generate_block_hash_extra_keys(request: Any, start: int, end: int, *args: Any, **kwargs: Any) -> Any:
        given = request.cache_salt
        if given is None or not given.startswith(_MARK):
            return original(request, start, end, *args, **kwargs)
        client, values, shares_prompt = json.loads(given.removeprefix(_MARK))
        options, prompt = unpacked(values), request.num_prompt_tokens
        if shares_prompt and not steered_ranges(options, prompt, 0, end):
            return original(_AsBase(request, client), start, end, *args, **kwargs)
        keys, *rest = original(request, start, end, *args, **kwargs)
        # Blocks before this one may have the base model's keys, without the salt. The same tokens and options are
        # steered elsewhere if the prompt ends elsewhere, as in the next turn of a chat.
        return ((*(keys or ()), ("steering", given, json.dumps(steered_ranges(options, prompt, start, end)))), *rest)

    return generate_block_hash_extra_keys


# -------------------------------------------------------------------------------------------------------------- graphs


def fingerprint(model: nn.Module) -> str:
    """Return a hash of our code and of the steered layers, which a compiled graph depends on beside vLLM's config."""
    digest = hashlib.sha256()
    for file in sorted((*Path(__file__).parent.rglob("*.py"), *Path(grouped.__file__).parent.rglob("*.py"))):
        digest.update(file.read_bytes())
    digest.update(inspect.getsource(Slots).encode())
    for path, module in model.named_modules():
        if isinstance(module, SteeringPoint) and module.slots is not None:
            link = "" if module.link is None else module.link.kind
            digest.update(f"{path} {module.state} {module.slots.count} {module.room} {link}".encode())
    return digest.hexdigest()


class _WithFingerprint:
    """Wraps an `additional_config` that is not a dict, to add our fingerprint to its hash."""

    def __init__(self, given: Any, mark: str) -> None:
        self._given, self._mark = given, mark

    def __getattr__(self, name: str) -> Any:
        return getattr(self._given, name)

    def compute_hash(self) -> str:
        return hashlib.sha256(f"{self._given.compute_hash()} {self._mark}".encode()).hexdigest()


def put_into_cache_key(model: nn.Module, config: Any) -> None:
    """Add our fingerprint to vLLM's configs, so that a graph compiled without it is not reused.

    vLLM stores compiled graphs by a hash of its config, which includes `additional_config`. Parts of the model may hold
    configs of their own.
    """
    mark = fingerprint(model)
    kept = [getattr(module, "vllm_config", None) for module in model.modules()]
    for each in {id(c): c for c in (config, *kept) if c is not None}.values():
        given = each.additional_config
        if isinstance(given, dict):
            each.additional_config = {**given, "fused_steer": mark}
        elif not isinstance(given, _WithFingerprint):
            each.additional_config = _WithFingerprint(given, mark)
