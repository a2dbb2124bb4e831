"""A batch whose rows are steered each by an adapter, with a strength and at token positions of its own."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .config import SteerConfig, checked_number
from .kernels.grouped import Routing
from .slots import Slots

if TYPE_CHECKING:
    from .sites import SteeringSite

#: Words for the tokens of a row that are steered; and ("first", k) and ("last", k), tokens of the prompt.
POSITIONS = ("all", "prompt", "generated", "last")
_EVERY = 2**31 - 1  # more tokens than there are


@dataclass(frozen=True)
class Held:
    """The adapters of a batch in slots, as long as it runs.

    numbers: each adapter's slot; slots: by layer; scales: each adapter's own strength.
    """

    numbers: Mapping[str, int]
    slots: Mapping[int, Slots]
    scales: Mapping[str, float]


# --------------------------------------------------------------------------------------------------- what a caller asks


@dataclass(frozen=True)
class Request:
    """One row: by which adapter, how strongly (None: its own strength), and where.

    Where: of the prompt's tokens those after the first `after`, up to the `until`-th (both from the end where
    `from_end`), and whether of the generated ones.
    """

    name: str | None
    scale: float | None
    after: int
    until: int
    from_end: bool
    generated: bool


def checked_requests(names: Any, scale: Any, positions: Any, known: Callable[[str], Any]) -> list[Request]:
    """The rows that `Steering.batch` is asked for; `known` refuses an adapter that there is not.

    Raises:
        TypeError, ValueError, KeyError: what is no list of names, strengths or positions, or does not fit the others.
    """
    if isinstance(names, (str, bytes)) or not isinstance(names, Sequence):
        raise TypeError(f"names is {names!r}; expected a list with an adapter's name, or None, for each row")
    if not names:
        raise ValueError("names is empty; expected one for each row of the batch")
    for name in names:
        if name is not None and not isinstance(name, str):
            raise TypeError(f"names has {name!r}; expected names of adapters, and None for no adapter")
        if name is not None:
            known(name)
    scales = list(scale) if isinstance(scale, (list, tuple)) else [scale] * len(names)
    places = list(positions) if isinstance(positions, list) else [positions] * len(names)
    for what, values in (("scale", scales), ("positions", places)):
        if len(values) != len(names):
            raise ValueError(f"{what} has {len(values)} entries; expected {len(names)}, one for each row")
    strengths = [None if value is None else checked_number("scale", value) for value in scales]
    return [
        Request(name, strength, **_checked_position(place))
        for name, strength, place in zip(names, strengths, places, strict=True)
    ]


def _checked_position(position: Any) -> dict[str, Any]:
    whole = {"after": 0, "until": _EVERY, "from_end": False, "generated": True}
    if position == "all":
        return whole
    if position == "prompt":
        return {**whole, "generated": False}
    if position == "generated":
        return {**whole, "until": 0}
    if position == "last":
        position = ("last", 1)
    if isinstance(position, tuple) and len(position) == 2 and position[0] in ("first", "last"):
        count = position[1]
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"positions has {position!r}; expected a number of tokens of at least 1")
        return {"after": 0, "until": count, "from_end": position[0] == "last", "generated": False}
    raise ValueError(
        f"positions has {position!r}; expected {', '.join(map(repr, POSITIONS))}, ('first', k) or ('last', k), or a "
        "list with one for each row"
    )


# ------------------------------------------------------------------------------------------------------- while it runs


class Lock:
    """A lock that a copied model has anew: copies and other processes share none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: Any) -> None:
        self._lock.release()

    def __reduce__(self) -> Any:
        return Lock, ()


@dataclass
class Batch:
    """A batch that runs: what its layers read in each forward pass, and what that is worked out from."""

    requests: list[Request]
    held: Held
    thread: int = field(default_factory=threading.get_ident)
    ids: Tensor | None = None  # (rows, tokens) int32, of the pass that runs or comes next
    gain: Tensor | None = None  # (rows, tokens) float32
    prompt: int | None = None  # columns of the prompt, padding included
    padding: Tensor | None = None  # (requests, prompt) of that prompt's mask, where `generate` was given one
    generating: int = 0
    counted: int | None = None  # columns after the passes of the `generate` that runs; None: there was none yet
    feeding: Seen | None = None  # the cache of the pass outside `generate` that runs
    seen: Seen | None = None  # and of the one before, once it was through
    _decode: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _routings: dict[torch.device, tuple[Tensor, Routing]] = field(default_factory=dict)

    def check_thread(self) -> None:
        if threading.get_ident() != self.thread:
            raise RuntimeError(
                "the model runs in another thread than the one that opened its batch; expected one thread at a time"
            )

    def routing(self, device: torch.device) -> Routing:
        """Of the pass that runs, on a layer's device: worked out once for all layers there, and for all steps that have
        the same ids."""
        self.check_place()
        found = self._routings.get(device)
        if found is None or found[0] is not self.ids:
            found = self._routings[device] = (self.ids, Routing(self.ids.to(device), self.gain.to(device)))
        return found[1]

    def check_place(self) -> None:
        """Raises RuntimeError where a compiled model runs outside of `generate`: nothing said where in the batch."""
        if self.ids is None or self.gain is None:
            raise RuntimeError(
                "a compiled model does not say where in a batch it is outside of generate; expected model.generate, or "
                "the model uncompiled"
            )

    def check_capture(self) -> None:
        """A CUDA graph cannot ask where it is, and holds on to what it reads: the tensors of the pass before, which
        have to stay. Those of generated tokens do, as long as the batch runs.

        Raises:
            RuntimeError: there was no pass before, or it was over a prompt.
        """
        if not any(ids is self.ids for ids, _ in self._decode.values()):
            raise RuntimeError(
                "a CUDA graph is captured of a pass that does not follow one over generated tokens; expected such a "
                "pass of the same shape first, to warm up"
            )

    def expansion(self, rows: int) -> int:
        """How many rows of a pass belong to each row asked for, one after the other: beams, or sequences returned."""
        times, rest = divmod(rows, len(self.requests))
        if rest or not times or (times > 1 and not self.generating):
            raise ValueError(
                f"the batch has {rows} rows; expected {len(self.requests)}, one for each name given to steering.batch"
            )
        return times

    def prepare(self, rows: int, past: int, tokens: int, mask: Tensor | None, device: torch.device) -> None:
        """Work out ids and gain of a pass over `tokens` columns after `past` cached ones.

        mask: (rows, at least past + tokens), 0 for padding; None: there is none.
        """
        times = self.expansion(rows)
        assert self.prompt is not None
        if past >= self.prompt:
            self.ids, self.gain = self._of_generated(times, tokens, device)
            return
        slots, strengths, generated = self._rows(times, device)
        if mask is None:
            mask = torch.ones(rows, past + tokens, dtype=torch.int64, device=device)
        elif mask.shape[0] != rows or mask.shape[1] < past + tokens:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}; expected {rows} rows of the {past} cached and the "
                f"{tokens} new columns"
            )
        real = mask.to(device) != 0
        whole = real[:, : self.prompt]
        if whole.shape[1] < self.prompt:  # a prompt that is fed in parts
            whole = self._whole(whole, times)
        total = whole.sum(1, keepdim=True)
        order = real.cumsum(1)[:, past : past + tokens]  # 1 for a row's first token that is no padding
        real = real[:, past : past + tokens]
        after, until = (
            torch.tensor([getattr(r, name) for r in self.requests], device=device).repeat_interleave(times).unsqueeze(1)
            for name in ("after", "until")
        )
        from_end = torch.tensor([r.from_end for r in self.requests], device=device).repeat_interleave(times)
        place = torch.where(from_end.unsqueeze(1), total + 1 - order, order)
        in_prompt = torch.arange(past, past + tokens, device=device) < self.prompt
        chosen = torch.where(in_prompt, (place > after) & (place <= until), generated.unsqueeze(1)) & real
        self.ids = slots.unsqueeze(1).expand(rows, tokens).contiguous()
        self.gain = strengths.unsqueeze(1) * chosen

    def _whole(self, seen: Tensor, times: int) -> Tensor:
        """The mask of a whole prompt, of which a pass has seen a part."""
        assert self.prompt is not None
        if self.padding is not None:
            return self.padding.to(seen.device).repeat_interleave(times, 0) != 0
        if not bool(seen.all()):
            raise ValueError(
                "the prompt has padding and is fed in parts; expected attention_mask to be given to generate"
            )
        return seen.new_ones(seen.shape[0], self.prompt)

    def _of_generated(self, times: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The same tensors in each step, which a compiled graph or a CUDA graph may hold on to."""
        key = (times, tokens, device)
        if key not in self._decode:
            slots, strengths, generated = self._rows(times, device)
            shape = (len(slots), tokens)
            self._decode[key] = (
                slots.unsqueeze(1).expand(shape).contiguous(),
                (strengths * generated).unsqueeze(1).expand(shape).contiguous(),
            )
        return self._decode[key]

    def _rows(self, times: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Each row's slot, strength, and whether its generated tokens are steered."""
        slots, strengths, generated = [], [], []
        for request in self.requests:
            slots.append(-1 if request.name is None else self.held.numbers[request.name])
            own = 0.0 if request.name is None else self.held.scales[request.name]
            strengths.append(own if request.scale is None else request.scale)
            generated.append(request.generated)
        return (
            torch.tensor(slots, dtype=torch.int32, device=device).repeat_interleave(times),
            torch.tensor(strengths, dtype=torch.float32, device=device).repeat_interleave(times),
            torch.tensor(generated, device=device).repeat_interleave(times),
        )


@contextlib.contextmanager
def running(
    model: nn.Module, decoder: nn.Module, sites: Mapping[int, SteeringSite], requests: list[Request], held: Held
) -> Iterator[Batch]:
    """Inside, `model` steers by rows. Afterwards, also after an exception, all is as it was.

    Its `generate` and `prepare_inputs_for_generation` are wrapped, on this instance: there the prompt's length and
    each pass's place in it are known. Other passes are seen by a hook of the decoder.
    """
    batch = Batch(requests, held)
    with contextlib.ExitStack() as stack:
        for index, site in sites.items():
            site.batch, site.slots = batch, held.slots.get(index)
            stack.callback(_clear, site)
        names = tuple(inspect.signature(decoder.forward).parameters)
        before = decoder.register_forward_pre_hook(functools.partial(_before_forward, batch, names), with_kwargs=True)
        stack.callback(before.remove)
        after = decoder.register_forward_hook(functools.partial(_after_forward, batch))
        stack.callback(after.remove)
        for name, make in (("generate", _generate), ("prepare_inputs_for_generation", _prepare_inputs)):
            if hasattr(model, name):
                stack.enter_context(_wrapped(model, name, functools.partial(make, batch, model)))
        yield batch


def _clear(site: SteeringSite) -> None:
    site.batch = site.slots = None


@contextlib.contextmanager
def _wrapped(model: nn.Module, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Have `model.<name>` wrapped on the instance."""
    own = vars(model).get(name)
    original = getattr(model, name)
    setattr(model, name, functools.wraps(original)(make(original)))
    try:
        yield
    finally:
        delattr(model, name)
        if own is not None:
            setattr(model, name, own)


def _generate(batch: Batch, model: nn.Module, original: Any) -> Any:
    def generate(*args: Any, **kwargs: Any) -> Any:
        batch.check_thread()
        given = dict(kwargs)
        if args:
            given["inputs"] = args[0]
        prompt = _first(given, "inputs_embeds", "inputs", "input_ids")
        mask = given.get("attention_mask")
        if isinstance(prompt, Tensor):
            if prompt.shape[0] != len(batch.requests):
                raise ValueError(
                    f"the batch has {prompt.shape[0]} rows; expected {len(batch.requests)}, one for each name given to "
                    "steering.batch"
                )
            columns = prompt.shape[1]
        else:
            columns = 1  # a beginning that generate makes up
        before = (batch.prompt, batch.padding, batch.counted)
        batch.counted = batch.feeding = batch.seen = None
        batch.padding = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        # The mask spans the cached columns also where the new tokens alone are given.
        batch.prompt = columns if batch.padding is None else batch.padding.shape[1]
        batch.generating += 1
        try:
            return original(*args, **kwargs)
        finally:
            batch.generating -= 1
            batch.prompt, batch.padding, batch.counted = before
            batch.ids = batch.gain = None

    return generate


def _prepare_inputs(batch: Batch, model: nn.Module, original: Any) -> Any:
    parameters = inspect.signature(original)

    def prepare_inputs_for_generation(*args: Any, **kwargs: Any) -> Any:
        given = parameters.bind(*args, **kwargs).arguments
        given = {**given, **given.pop("kwargs", {}), **given.pop("model_kwargs", {})}
        inputs = original(*args, **kwargs)
        if batch.generating:
            fed = _first(inputs, "inputs_embeds", "input_ids")
            mask = given.get("attention_mask")
            mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
            past = _past_in_generate(batch, given, mask, fed.shape[1])
            batch.prepare(fed.shape[0], past, fed.shape[1], mask, fed.device)
            batch.counted = past + fed.shape[1]
        return inputs

    return prepare_inputs_for_generation


def _before_forward(
    batch: Batch, names: Sequence[str], decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Before each eager pass: outside generate, work out where it is; inside, that is known.

    names: of the decoder's arguments, in order.
    """
    if torch.compiler.is_compiling():
        return
    batch.check_thread()
    if batch.generating:
        return
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    fed = _first(given, "inputs_embeds", "input_ids")
    batch.feeding = None
    if _is_capturing(fed.device):
        batch.check_capture()
        return
    mask = given.get("attention_mask")
    past, cache = _past_of_a_pass(batch, given, fed.shape[1])
    if past == 0:
        batch.prompt = fed.shape[1]
    elif batch.prompt is None:
        batch.prompt = past
    if isinstance(mask, Tensor) and mask.dim() != 2 or isinstance(mask, dict):
        if any(request.until < _EVERY and request.until > 0 for request in batch.requests):
            raise ValueError(
                "attention_mask does not say which tokens are padding, and positions counts tokens; expected one of "
                "two dimensions"
            )
        mask = None
    batch.prepare(fed.shape[0], past, fed.shape[1], mask, fed.device)
    batch.feeding, batch.seen = Seen(cache, past + fed.shape[1]), None


def _after_forward(batch: Batch, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """After each eager pass outside generate: note what its cache holds, so that the next need not ask the device."""
    if torch.compiler.is_compiling() or batch.feeding is None:
        return
    seen, batch.feeding = batch.feeding, None
    if seen.cache is None and isinstance(output, Mapping):  # one that the model has made
        seen.cache = find_cache(output)
    if not isinstance(seen.cache, Cache):
        return
    batch.seen = seen
    length = cache_length(seen.cache)
    if isinstance(length, Tensor) and not length.is_inference():
        seen.counter, seen.version = length, length._version


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _first(given: Mapping[str, Any], *names: str) -> Any:
    return next((given[name] for name in names if given.get(name) is not None), None)


# ------------------------------------------------------------------------------------------- how far a pass has come

#: Arguments that belong to a cache and are none.
_NOT_A_CACHE = re.compile(r"^use_|_(position|positions|implementation|config|kwargs)$")
_NAMED_AS_A_CACHE = re.compile(r"(^|_)(cache|caches|past|mems)(_|$)|^states?$")


@dataclass
class Seen:
    """A cache after a pass: how many columns it holds, and by what a change from elsewhere shows.

    counter: the tensor in which the cache keeps its length, if on the device, and its version after the pass: PyTorch
    counts the writes to a tensor on the host.
    """

    cache: Any
    length: int
    counter: Tensor | None = None
    version: int = -1

    def is_current(self, counter: Tensor) -> bool:
        return counter is self.counter and counter._version == self.version


def cache_length(cache: Any) -> int | Tensor | None:
    """The columns in a cache: an int, or a tensor that nobody has read yet. None: the cache does not say."""
    if isinstance(cache, (tuple, list)):
        return int(cache[0][0].shape[-2])
    try:
        length = cache.get_seq_length()
    except (ValueError, NotImplementedError):  # of layers that keep a state of fixed size, and no columns
        return None
    return length if isinstance(length, Tensor) else int(length)


def _is_cache(value: Any) -> bool:
    """Whether it is one of transformers' caches, or of the tuples (key, value) by layer that came before them."""
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
    """The cache among a pass's arguments, by its type; else an argument that looks like one; None: there is neither.

    Raises:
        ValueError: there are several, and none has a name that transformers gives to a decoder's own.
    """
    found = {name: value for name, value in given.items() if _is_cache(value)}
    own = {name: value for name, value in found.items() if name in ("cache", "past_key_values", "cache_params")}
    chosen = list((own or found).values())
    if any(cache is not chosen[0] for cache in chosen):
        raise ValueError(f"the pass has several caches, {', '.join(own or found)}; expected one")
    if chosen:
        return chosen[0]
    return next((value for name, value in given.items() if _looks_like_a_cache(name, value)), None)


def _is_empty(cache: Any) -> bool:
    """Whether a cache that tells no length has seen no token either; False where it does not tell that."""
    try:
        return isinstance(cache, Cache) and not cache.has_previous_state()
    except ValueError:
        return False


def _past_in_generate(batch: Batch, given: Mapping[str, Any], mask: Tensor | None, tokens: int) -> int:
    """The columns before a pass of `generate`, without reading the device.

    Raises:
        ValueError: the pass goes on with what is in no cache that can be found, or in one that does not tell.
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
    length = cache_length(cache) if _is_cache(cache) else None
    if isinstance(length, int):
        return length
    if batch.counted is not None:  # generate alone feeds the model meanwhile
        return batch.counted
    if mask is not None:  # which spans the cached columns too
        return max(mask.shape[1] - tokens, 0)
    if isinstance(length, Tensor):
        return int(length)  # once, with the prompt
    if _is_empty(cache):
        return 0
    raise ValueError(_does_not_tell(cache))


def _past_of_a_pass(batch: Batch, given: Mapping[str, Any], tokens: int) -> tuple[int, Any]:
    """The columns before a pass outside `generate`, and its cache.

    Raises:
        ValueError: as above.
    """
    cache, seen = find_cache(given), batch.seen
    if cache is None:
        _check_begins(given, tokens)
        return 0, None
    length = cache_length(cache) if _is_cache(cache) else None
    if isinstance(length, Tensor):
        length = seen.length if seen is not None and seen.is_current(length) else int(length)
    elif length is None:
        if _is_empty(cache):
            length = 0
        elif seen is not None and seen.cache is cache:
            length = seen.length
        else:
            raise ValueError(_does_not_tell(cache))
    return length, cache


def _does_not_tell(cache: Any) -> str:
    return (
        f"the cache is a {type(cache).__name__} that does not tell how many tokens it holds; expected a cache of "
        "transformers that does, or that was empty when its prompt was fed in this batch"
    )


def _check_begins(given: Mapping[str, Any], tokens: int) -> None:
    """That a pass without a cache begins a prompt, as far as its other arguments tell."""
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


# ---------------------------------------------------------------------------------------------------- adapters in slots

#: Puts adapters into slots for as long as a batch runs.
Hold = Callable[[Sequence[str]], AbstractContextManager[Held]]


@contextlib.contextmanager
def hold_loaded(sites: Mapping[int, SteeringSite], configs: Mapping[str, SteerConfig], names: Sequence[str]) -> Any:
    """Adapters that the model has loaded, copied into slots of their own: a `Hold` once sites and configs are given."""
    numbers = {name: number for number, name in enumerate(names)}
    slots = {}
    for index, site in sites.items():
        here = {name: adapter for name in names if (adapter := site.adapter(name)) is not None}
        if here:
            slots[index] = slots_for({name: adapter.named_tensors() for name, adapter in here.items()}, len(names))
        for name, adapter in here.items():
            slots[index].put(numbers[name], adapter.named_tensors(), configs[name].activation or "identity")
    yield Held(numbers, slots, {name: configs[name].scale for name in names})


def slots_for(adapters: Mapping[str, Mapping[str, Tensor]], count: int) -> Slots:
    """Empty slots with room for these adapters of one layer, of their dtype where they share one, else float32."""
    tensors = [tensor for named in adapters.values() for tensor in named.values()]
    dtypes = {tensor.dtype for tensor in tensors}
    downs = [named["steer_down.weight"] for named in adapters.values() if "steer_down.weight" in named]
    hidden = next(t.shape[0] for named in adapters.values() for name, t in named.items() if name.startswith("steer_up"))
    return Slots(
        count,
        max((down.shape[0] for down in downs), default=0),
        hidden,
        dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,
        device=tensors[0].device,
        down_bias=any("steer_down.bias" in named for named in adapters.values()),
        up_bias=any("steer_up.bias" in named for named in adapters.values()),
    )
