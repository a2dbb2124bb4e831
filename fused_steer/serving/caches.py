"""Find the tokens and the key-value cache among the arguments of a forward pass, and the cache's number of tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

#: Names of arguments that belong to a cache but are not one.
_NOT_A_CACHE = re.compile(r"^use_|_(position|positions|implementation|config|kwargs)$")
_NAMED_AS_A_CACHE = re.compile(r"(^|_)(cache|caches|past|mems)(_|$)|^states?$")


def find_tokens(given: Mapping[str, Any], names: Sequence[str]) -> Tensor:
    """Return what a pass is fed, (rows, tokens, ...): ids, embeddings or hidden states.

    A stack of layers is fed hidden states if its model computes the embeddings outside of it, as BERT does.

    Args:
        given: the pass's arguments.
        names: the names of all arguments, in order.

    Raises:
        TypeError: there are none.
    """
    found = next((given[n] for n in ("inputs_embeds", "input_ids", *names[:1]) if given.get(n) is not None), None)
    if not isinstance(found, Tensor):
        raise TypeError(f"the pass has input_ids {found!r:.50}; expected a tensor, or inputs_embeds")
    return found


def with_padding(given: dict[str, Any], mask: Any, tokens: int) -> dict[str, Any]:
    """Return a pass's arguments, with an attention mask that says which tokens are padding, if there is one.

    Some models make their decoder's mask of the one that they were given: Gemma 3 a dict, BERT one of four dimensions.
    RWKV, which has no attention, gives it to nobody.

    Args:
        given: the arguments of the decoder's pass.
        mask: the mask that the model around it was given, or None.
        tokens: the pass's number of tokens.
    """
    own = given.get("attention_mask")
    if isinstance(own, Tensor) and own.dim() == 2 or not isinstance(mask, Tensor) or mask.dim() != 2:
        return given
    spans = mask.shape[1] >= tokens if find_cache(given) is not None else mask.shape[1] == tokens
    return {**given, "attention_mask": mask} if spans else given


@dataclass
class Seen:
    """A cache after a pass, with its length.

    PyTorch counts the writes to a tensor on the host, so a change by someone else shows without reading the device.

    Attributes:
        cache: the cache.
        length: the columns that it holds.
        counter: the device tensor in which the cache keeps its length, if it has one.
        version: the version of `counter` after the pass.
    """

    cache: Any
    length: int
    counter: Tensor | None = None
    version: int = -1

    def is_current(self, counter: Tensor) -> bool:
        return counter is self.counter and counter._version == self.version


def cache_length(cache: Any) -> int | Tensor | None:
    """Return the columns in a cache, as an int or as a device tensor. None if the cache does not tell."""
    if isinstance(cache, (tuple, list)):
        return int(cache[0][0].shape[-2])
    try:
        length = cache.get_seq_length()
    except (ValueError, NotImplementedError):  # raised by layers with a state of fixed size, which have no columns
        return None
    return length if isinstance(length, Tensor) else int(length)


def is_cache(value: Any) -> bool:
    """Return whether a value is a cache of transformers, or a tuple of (key, value) by layer as older versions had."""
    if isinstance(value, (tuple, list)):
        first = value[0] if value else None
        return isinstance(first, (tuple, list)) and all(
            isinstance(t, Tensor) and t.dim() == 4 for t in first[:2] or [0]
        )
    return isinstance(value, Cache)


def _looks_like_a_cache(name: str, value: Any) -> bool:
    if value is None or isinstance(value, (bool, int, float, str)) or _NOT_A_CACHE.search(name):
        return False
    if isinstance(value, (tuple, list, dict)) and not value or isinstance(value, Tensor) and value.dim() < 2:
        return False
    return "cache" in type(value).__name__.lower() or bool(_NAMED_AS_A_CACHE.search(name))


def find_cache(given: Mapping[str, Any]) -> Any:
    """Find the cache among a pass's arguments: by its type, else by its name. None if there is none.

    Raises:
        ValueError: there are several caches, and none has transformers' name for a decoder's own cache.
    """
    found = {name: value for name, value in given.items() if is_cache(value)}
    own = {name: value for name, value in found.items() if name in ("cache", "past_key_values", "cache_params")}
    chosen = list((own or found).values())
    if any(cache is not chosen[0] for cache in chosen):
        raise ValueError(f"the pass has several caches, {', '.join(own or found)}; expected one")
    if chosen:
        return chosen[0]
    return next((value for name, value in given.items() if _looks_like_a_cache(name, value)), None)


def is_empty(cache: Any) -> bool:
    """Return whether a cache without a length has seen no token. False if the cache does not tell."""
    try:
        return isinstance(cache, Cache) and not cache.has_previous_state()
    except ValueError:
        return False


def does_not_tell(cache: Any) -> str:
    return (
        f"the cache is a {type(cache).__name__} that does not tell how many tokens it holds; expected a cache of "
        "transformers that does, or that was empty when its prompt was fed in this batch"
    )


def check_begins(given: Mapping[str, Any], tokens: int) -> None:
    """Check that a pass without a cache begins a prompt, as far as its other arguments tell."""
    mask = given.get("attention_mask")
    for part in mask.values() if isinstance(mask, dict) else (mask,):
        if isinstance(part, Tensor) and part.dim() in (2, 4) and part.shape[-1] > tokens:
            raise ValueError(
                f"attention_mask spans {part.shape[-1]} columns of a pass with {tokens} and no cache among its "
                "arguments; expected a cache of transformers"
            )
    if given.get("use_cache") is False:
        return
    for name in ("cache_position", "position_ids"):
        positions = given.get(name)
        if isinstance(positions, Tensor) and positions.numel() and int(positions.min()) > 0:
            raise ValueError(
                f"{name} begins at {int(positions.min())} and no argument of the pass is a cache; expected a cache of "
                "transformers, positions from 0, or use_cache=False"
            )


def past_in_generate(counted: int | None, given: Mapping[str, Any], mask: Tensor | None, tokens: int) -> int:
    """Return the number of columns before a pass of `generate`, without reading the device.

    counted: columns after the latest pass of the running `generate`, None before the first.

    Raises:
        ValueError: the pass continues a sequence, but its cache is not found or does not tell its length.
    """
    cache = find_cache(given)
    whole = given.get("input_ids")
    columns = mask.shape[1] if mask is not None else None
    if columns is None and isinstance(whole, Tensor) and whole.dim() == 2:
        columns = whole.shape[1]
    if cache is None:
        if columns is not None and columns > tokens:
            raise ValueError(
                f"the pass has {tokens} of {columns} columns and no cache among its arguments; expected a cache of "
                "transformers"
            )
        return 0
    length = cache_length(cache) if is_cache(cache) else None
    if isinstance(length, int):
        return length
    if counted is not None:  # only generate feeds the model meanwhile
        return counted
    if mask is not None:  # the mask spans the cached columns too
        return max(mask.shape[1] - tokens, 0)
    if isinstance(length, Tensor):
        return int(length)  # read once, with the prompt
    if is_empty(cache):
        return 0
    raise ValueError(does_not_tell(cache))


def past_of_a_pass(seen: Seen | None, given: Mapping[str, Any], tokens: int) -> tuple[int, Any]:
    """Return the number of columns before a pass outside `generate`, and its cache.

    seen: the cache of the latest finished pass.

    Raises:
        ValueError: see `past_in_generate`.
    """
    cache = find_cache(given)
    if cache is None:
        check_begins(given, tokens)
        return 0, None
    length = cache_length(cache) if is_cache(cache) else None
    if isinstance(length, Tensor):
        length = seen.length if seen is not None and seen.is_current(length) else int(length)
    elif length is None:
        if is_empty(cache):
            length = 0
        elif seen is not None and seen.cache is cache:
            length = seen.length
        else:
            raise ValueError(does_not_tell(cache))
    return length, cache
