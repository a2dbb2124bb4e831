"""Steer each row of a batch by its own adapter, with its own strength and at its own token positions."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..adapters.parameters import Place
from ..kernels.grouped import Routing
from ..kernels.registered import refuse_jit_trace
from ..model.scopes import Scopes
from ..model.site import SteeringSite
from ..positions import ALL, Positions, read_positions
from .caches import Seen, cache_length, find_cache, find_tokens, past_in_generate, past_of_a_pass, with_padding
from .continuous import ContinuousRun, checked_arguments
from .replaced import ending_streamer, replace_method
from .requests import Request
from .rows import steer_by_rows
from .slots import Held

# --------------------------------------------------------------------------------------------------- the running batch


@dataclass
class Batch:
    """A running batch: its requests, and the slots and strengths of each token in the present forward pass."""

    requests: list[Request]
    held: Held
    scopes: Scopes  # the model's scopes
    by: str = "steering.batch"  # what opened it; "generate" for an active adapter with positions
    opener: int = field(default_factory=threading.get_ident)  # the thread that opened the batch
    thread: int | None = None  # the thread that runs the model now
    ids: Tensor | None = None  # (rows, tokens) int32, each token's slot in the present or next pass
    gain: Tensor | None = None  # (rows, tokens) float32, each token's strength
    prompt: int | None = None  # columns of the prompt, padding included
    padding: Tensor | None = None  # (requests, prompt) mask that was given to `generate`
    masks: dict[int, Any] = field(default_factory=dict)  # by thread: the attention mask that the model was given
    generating: int = 0
    counted: int | None = None  # columns after the latest pass of the running `generate`, None before the first
    feeding: Seen | None = None  # the cache of the running pass outside `generate`
    seen: Seen | None = None  # the cache of the latest finished pass outside `generate`
    continuous: ContinuousRun | None = None  # the running `generate_batch`
    passing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # during a pass outside `generate`
    _decode: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _routings: dict[torch.device, tuple[Tensor, Routing]] = field(default_factory=dict)

    def __reduce__(self) -> Any:
        return type(None), ()  # a copied model is in no batch

    @functools.cached_property
    def where(self) -> list[Positions]:
        """Which tokens of each request are steered; without an adapter none is, wherever it may be."""
        everywhere = read_positions(ALL)
        return [one.positions or self.held.positions.get(one.name or "", everywhere) for one in self.requests]

    @contextlib.contextmanager
    def in_this_thread(self) -> Iterator[None]:
        """Let this thread run the model.

        Raises:
            RuntimeError: the batch belongs to another thread or task, or another thread runs the model in it.
        """
        self.scopes.check("the model runs")
        me = threading.get_ident()
        if self.thread not in (None, me) and not self.generating and not self.scopes.runs(self.thread):
            self.passing.close()  # a pass that Ctrl-C cut off: PyTorch calls no hook at its end
        earlier = self.thread
        if earlier not in (None, me):
            raise RuntimeError("another thread runs the model in this steering.batch; expected one thread at a time")
        self.thread = me
        try:
            yield
        finally:
            self.thread = earlier

    def routing(self, device: torch.device) -> Routing:
        """Return the running pass's routing on a layer's device. Layers there and steps with the same ids share it."""
        self.check_place()
        ids: Any = self.ids
        gain: Any = self.gain
        found = self._routings.get(device)
        if found is None or found[0] is not ids:
            found = self._routings[device] = (ids, Routing(ids.to(device), gain.to(device)))
        return found[1]

    def check_place(self) -> None:
        """Raise RuntimeError if the position of the pass is unknown: a model in a graph outside of `generate`."""
        if self.ids is None or self.gain is None:
            raise RuntimeError(
                "the position of a compiled or exported model in a batch is unknown outside of generate; expected "
                "model.generate, or the model as it is"
            )

    def check_capture(self) -> None:
        """Check that a CUDA graph is captured from a pass over generated tokens.

        A graph keeps the tensors that it read. Those of generated tokens live as long as the batch.

        Raises:
            RuntimeError: there was no pass before, or it was over a prompt.
        """
        if not any(ids is self.ids for ids, _ in self._decode.values()):
            raise RuntimeError(
                "a CUDA graph is captured without an earlier pass over generated tokens; expected a warm-up pass of "
                "the same shape first"
            )

    def expansion(self, rows: int) -> int:
        """Return the number of consecutive rows of a pass for each request: beams, or returned sequences."""
        times, rest = divmod(rows, len(self.requests))
        if rest or not times or (times > 1 and not self.generating):
            each = "one for each name given to steering.batch"
            if self.by == "generate":
                each = "or a multiple, as generate's input has, because the active adapter has positions"
            raise ValueError(f"the batch has {rows} rows; expected {len(self.requests)}, {each}")
        return times

    def prepare(
        self, rows: int, past: int, tokens: int, mask: Tensor | None, device: torch.device, prompt: int | None = None
    ) -> None:
        """Compute ids and gain of a pass over `tokens` columns after `past` cached ones.

        mask: (rows, at least past + tokens), 0 for padding, or None.
        prompt: columns of the pass's prompt, if it has another than the batch.
        """
        times = self.expansion(rows)
        prompt = self.prompt if prompt is None else prompt
        assert prompt is not None
        if past >= prompt:
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
        whole = real[:, :prompt]
        if whole.shape[1] < prompt:  # a prompt fed in parts
            whole = self._whole(whole, times)
        total = whole.sum(1, keepdim=True)
        order = real.cumsum(1)[:, past : past + tokens]  # 1 for a row's first token that is not padding
        real = real[:, past : past + tokens]
        first, last = (
            torch.tensor([getattr(where, end) for where in self.where], device=device).repeat_interleave(times)[:, None]
            for end in ("first", "last")
        )
        in_prompt = torch.arange(past, past + tokens, device=device) < prompt
        chosen = torch.where(in_prompt, (order <= first) | (order > total - last), generated.unsqueeze(1)) & real
        self.ids = slots.unsqueeze(1).expand(rows, tokens).contiguous()
        self.gain = strengths.unsqueeze(1) * chosen

    def prepare_packed(self, run: ContinuousRun, columns: int, device: torch.device) -> None:
        """Compute ids and gain of a pass of `generate_batch`: one row, with tokens of several requests."""
        ids, gain = run.tokens(columns, self._slots, self._strengths, self.where)
        self.ids, self.gain = ids.to(device), gain.to(device)

    def _whole(self, seen: Tensor, times: int) -> Tensor:
        """Return the mask of a whole prompt when a pass has only part of it."""
        assert self.prompt is not None
        if self.padding is not None:
            return self.padding.to(seen.device).repeat_interleave(times, 0) != 0
        if not bool(seen.all()):
            raise ValueError(
                "the prompt has padding and is fed in parts; expected attention_mask to be given to generate"
            )
        return seen.new_ones(seen.shape[0], self.prompt)

    def _of_generated(self, times: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return ids and gain of generated tokens. Each step gets the same tensors, because graphs may hold them."""
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
        """Return each row's slot, strength, and whether its generated tokens are steered."""
        return (
            torch.tensor(self._slots, dtype=torch.int32, device=device).repeat_interleave(times),
            torch.tensor(self._strengths, dtype=torch.float32, device=device).repeat_interleave(times),
            torch.tensor([where.generated for where in self.where], device=device).repeat_interleave(times),
        )

    @functools.cached_property
    def _slots(self) -> list[int]:
        """The slot of each request; -1 without an adapter."""
        return [-1 if one.name is None else self.held.numbers[one.name] for one in self.requests]

    @functools.cached_property
    def _strengths(self) -> list[float]:
        own = [0.0 if one.name is None else self.held.scales[one.name] for one in self.requests]
        return [mine if one.scale is None else one.scale for one, mine in zip(self.requests, own, strict=True)]


def run_batch(
    model: nn.Module,
    decoder: nn.Module,
    sites: Callable[[], Mapping[Place, SteeringSite]],
    batch: Batch,
    undo: contextlib.ExitStack,
) -> None:
    """Let `model` steer each row by its own adapter, until `undo` is closed.

    The model's `generate` and `prepare_inputs_for_generation` are wrapped on this instance. They know the prompt's
    length and the position of each pass. A hook of the decoder handles other passes.
    """
    names = tuple(inspect.signature(decoder.forward).parameters)

    def no_rows() -> None:
        for site in sites().values():
            site.rows = None

    # Each change is given to `undo` first, or on the same line, because an exception may interrupt at any point.
    undo.callback(no_rows)
    undo.callback(no_rows)  # once more, because an exception may interrupt the first
    steer_by_rows(sites(), batch, batch.held.slots)
    if model is not decoder:
        model_names = tuple(inspect.signature(model.forward).parameters)
        undo.callback((note := _Hook(_note_mask, batch, model_names)).stop)
        undo.callback(model.register_forward_pre_hook(note, with_kwargs=True).remove)
        undo.callback(model.register_forward_hook(_Hook(_forget_mask, batch), always_call=True).remove)
    before, after = _Hook(_before_forward, batch, names), _Hook(_after_forward, batch)
    undo.callback(before.stop)
    undo.callback(after.stop)
    undo.callback(decoder.register_forward_pre_hook(before, with_kwargs=True).remove)
    undo.callback(decoder.register_forward_hook(after, always_call=True).remove)
    for name, make in _WRAPPERS.items():
        if hasattr(model, name):
            replace_method(model, name, make(batch, model, getattr(model, name)), undo)


class _Hook:
    """A decoder hook of a batch. The hook of a copied model does nothing, because a copy is in no batch."""

    def __init__(self, function: Callable[..., None], *first: Any) -> None:
        self._function, self._first = function, first

    def __call__(self, *args: Any) -> None:
        self._function(*self._first, *args)

    def stop(self) -> None:
        """Do nothing from now on. PyTorch may still call a hook that is removed while hooks run."""
        self._function = _nothing

    def __reduce__(self) -> Any:
        return _Hook, (_nothing,)


def _nothing(*_: Any) -> None:
    pass


def _generate(batch: Batch, model: nn.Module, original: Any) -> Any:
    def generate(*args: Any, **kwargs: Any) -> Any:
        with batch.in_this_thread():
            return run(*args, **kwargs)

    def run(*args: Any, **kwargs: Any) -> Any:
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
            columns = 1  # generate makes up a first token
        before = (batch.prompt, batch.padding, batch.counted)
        batch.counted = batch.feeding = batch.seen = batch.ids = batch.gain = None
        batch.padding = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        # The mask spans the cached columns too, even if only the new tokens are given.
        batch.prompt = columns if batch.padding is None else batch.padding.shape[1]
        batch.generating += 1
        try:
            return original(*args, **kwargs)
        finally:
            batch.generating -= 1
            batch.prompt, batch.padding, batch.counted = before
            batch.ids = batch.gain = None

    return ending_streamer(generate)


def _generate_batch(batch: Batch, model: nn.Module, original: Any) -> Any:
    parameters = inspect.signature(original)

    def generate_batch(*args: Any, **kwargs: Any) -> Any:
        bound = parameters.bind_partial(*args, **kwargs).arguments
        given = checked_arguments(model, len(batch.requests), {**bound, **bound.pop("kwargs", {})})
        with batch.in_this_thread():  # no other thread runs the model now
            pass
        run = batch.continuous = ContinuousRun([len(ids) for ids in given["inputs"]], batch.in_this_thread)
        batch.generating += 1
        try:
            results = original(**given)
        finally:
            run.close()
            batch.generating -= 1
            batch.continuous = batch.ids = batch.gain = None
        run.check()
        return results

    return generate_batch


def _init_continuous_batching(batch: Batch, model: nn.Module, original: Any) -> Any:
    def init_continuous_batching(*args: Any, **kwargs: Any) -> Any:
        run = batch.continuous
        if run is None or run.manager is not None:
            raise RuntimeError(
                "init_continuous_batching takes requests without adapters; expected generate_batch inside "
                "steering.batch"
            )
        return run.take(original(*args, **kwargs))

    return init_continuous_batching


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
            past = past_in_generate(batch.counted, given, mask, fed.shape[1])
            batch.prepare(fed.shape[0], past, fed.shape[1], mask, fed.device)
            batch.counted = past + fed.shape[1]
        return inputs

    return prepare_inputs_for_generation


_WRAPPERS: dict[str, Callable[[Batch, nn.Module, Any], Any]] = {
    "generate": _generate,
    "prepare_inputs_for_generation": _prepare_inputs,
    "generate_batch": _generate_batch,
    "init_continuous_batching": _init_continuous_batching,
}


def _note_mask(
    batch: Batch, names: Sequence[str], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if not torch.compiler.is_compiling():
        batch.masks[threading.get_ident()] = {**dict(zip(names, args, strict=False)), **kwargs}.get("attention_mask")


def _forget_mask(batch: Batch, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if not torch.compiler.is_compiling():
        batch.masks.pop(threading.get_ident(), None)


def _before_forward(
    batch: Batch, names: Sequence[str], decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Before an eager pass that `generate` has not prepared, find its position in the batch.

    Inside `generate` this is a pass of something that `generate` calls, such as classifier-free guidance. It has a
    prompt and a cache of its own.

    names: the names of the decoder's arguments, in order.
    """
    if torch.compiler.is_compiling():
        return
    refuse_jit_trace()
    run = batch.continuous
    if run is not None and run.is_here:
        fed = find_tokens({**dict(zip(names, args, strict=False)), **kwargs}, names)
        try:
            batch.prepare_packed(run, fed.shape[1], fed.device)
        except Exception as error:
            run.note(error)
            raise
        return
    inside = batch.generating and batch.thread == threading.get_ident()
    if inside and batch.ids is not None:
        return
    if not inside:
        batch.passing.enter_context(batch.in_this_thread())
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    fed = find_tokens(given, names)
    given = with_padding(given, batch.masks.get(threading.get_ident()), fed.shape[1])
    batch.feeding = None
    if _is_capturing(fed.device):
        batch.check_capture()
        return
    mask = given.get("attention_mask")
    past, cache = past_of_a_pass(batch.seen, given, fed.shape[1])
    prompt = past or fed.shape[1]
    if not inside and (past == 0 or batch.prompt is None):
        batch.prompt = prompt
    if isinstance(mask, Tensor) and mask.dim() != 2 or isinstance(mask, dict):
        if any(where.counts for where in batch.where):
            raise ValueError(
                "attention_mask does not say which tokens are padding, and positions counts tokens; expected one of "
                "two dimensions"
            )
        mask = None
    batch.prepare(fed.shape[0], past, fed.shape[1], mask, fed.device, prompt if inside else None)
    if not inside:
        batch.feeding, batch.seen = Seen(cache, past + fed.shape[1]), None


def _after_forward(batch: Batch, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """After an eager pass outside `generate`, note its cache's length, to spare the next pass reading the device."""
    compiling = torch.compiler.is_compiling()
    if not compiling and batch.thread != threading.get_ident():
        return
    if batch.generating and batch.continuous is None:
        batch.ids = batch.gain = None  # `generate` prepares each pass
    if compiling or batch.generating:
        return
    batch.passing.close()
    if batch.feeding is None:
        return
    seen, batch.feeding = batch.feeding, None
    if seen.cache is None and isinstance(output, Mapping):  # the model made the cache
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
