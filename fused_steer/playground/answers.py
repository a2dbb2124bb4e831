"""Answers of several variants of a model to one prompt: one batch, one row for each variant, token by token."""

from __future__ import annotations

import contextlib
import contextvars
import queue
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.files import write_adapter
from ..diagnostics.measure import steered_state, unscaled_shift
from ..joint import steering_of
from ..model.decoder import find_decoder, inside_peft
from ..model.site import SteeringSite
from ..steering import Steering
from ..tools.prompts import Prompt, encode, room_of
from .exporting import Variant, adapter_of

_MOST_TOKENS = 2**31 - 1  # a prompt is not cut


@dataclass(frozen=True)
class Token:
    """A token of a text.

    Attributes:
        id: its number in the vocabulary.
        text: its characters. Those of a character that several tokens encode are with the last of them.
        shift: ‖δ‖/‖h‖ of the token, the mean over the places that the variant steers. None if it is not known yet, as
            for the newest token, or if nothing steers.
        generated: whether the model wrote it.
    """

    id: int
    text: str
    shift: float | None
    generated: bool


@dataclass(frozen=True)
class Answer:
    """What a variant has answered so far.

    Attributes:
        variant: how the model was steered.
        tokens: the prompt's tokens and the generated ones, without an end-of-sequence token.
        done: whether the answer has ended.
    """

    variant: Variant
    tokens: tuple[Token, ...]
    done: bool

    @property
    def text(self) -> str:
        """The generated text."""
        return "".join(token.text for token in self.tokens if token.generated)

    @property
    def shift(self) -> float | None:
        """The mean of the tokens' ‖δ‖/‖h‖, or None."""
        known = [token.shift for token in self.tokens if token.shift is not None]
        return sum(known) / len(known) if known else None


def answers(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    variants: Sequence[Variant],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[list[Answer]]:
    """Answer a prompt by all variants in one batch. Yield the answers so far, after each token.

    A variant of several adapters is added to the model as one adapter while the answers are made. Closing the iterator
    ends the generation. So does the model's last position, if it has a learned table of them. The model is left as it
    was.

    Args:
        model: a model of `patch_model`.
        prompt: text, or the messages of a chat.
        temperature: of the sampling; 0 is greedy.
        seed: PyTorch's seed for the sampling.

    Raises:
        KeyError: the model has no such adapter.
        TypeError, ValueError: there is no variant, a prompt without tokens or with too many, max_new_tokens below 1, a
            temperature below 0, or adapters that cannot be added up.
        RuntimeError: another thread runs the model.
    """
    if not variants:
        raise ValueError("variants is empty; expected at least one, such as Variant('base')")
    for variant in variants:
        if not isinstance(variant, Variant):
            raise TypeError(f"a variant is {variant!r:.80}; expected a Variant, such as Variant('base')")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; expected at least 0")
    encoded = encode(tokenizer, [prompt], _MOST_TOKENS, 1)
    if not encoded:
        raise ValueError("the prompt has no tokens; expected text")
    given, most = encoded[0]["input_ids"].shape[1], room_of(model)
    if most is not None and given >= most:
        raise ValueError(f"the prompt has {given} tokens; expected fewer than {most}, the positions of the model")
    for variant in variants:
        if len(variant.strengths) != 1:
            if variant.strengths:
                adapter_of(model, variant)  # refuses what cannot be added up before anything runs
        elif (name := next(iter(variant.strengths))) not in steering_of(model).names:
            raise KeyError(f"no adapter {name!r}; expected one of {', '.join(steering_of(model).names)}")
    new = max_new_tokens if most is None else min(max_new_tokens, most - given)
    return _stream(model, tokenizer, encoded[0]["input_ids"], list(variants), new, temperature, seed)


# --------------------------------------------------------------------------------------------------------- one answer


@dataclass
class _Row:
    """One row of the batch: the token ids so far, and their shifts as far as they are known.

    `read` is the number of tokens whose characters are complete, and `start` that number at the time before.
    """

    variant: Variant
    ids: list[int]
    texts: list[str]
    prompt: int
    shifts: list[float | None] = field(default_factory=list)
    start: int = 0
    read: int = 0
    done: bool = False

    def put(self, token: int, tokenizer: Any) -> None:
        """Add a token. Its text is what it adds to the text before it.

        The text before is that of the last tokens: to decode all for each token would take long for a long prompt.
        Without any, a tokenizer would leave out a space at the beginning.
        """
        self.ids.append(token)
        before, text = (
            tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            for ids in (self.ids[self.start : self.read], self.ids[self.start :])
        )
        if text.endswith("\ufffd"):  # part of a character
            self.texts.append("")
            return
        self.texts.append(text[len(before) :])
        self.start, self.read = self.read, len(self.ids)

    def answer(self) -> Answer:
        shifts = self.shifts + [None] * (len(self.ids) - len(self.shifts))
        tokens = (
            Token(number, text, shift, position >= self.prompt)
            for position, (number, text, shift) in enumerate(zip(self.ids, self.texts, shifts, strict=True))
        )
        return Answer(self.variant, tuple(tokens), self.done)


class _Shifts:
    """Collects ‖δ‖/‖h‖ of each token of a pass, by hooks on the sites while a batch runs."""

    def __init__(self, names: Sequence[str | None], activations: Sequence[str]) -> None:
        self.names, self.activations = names, activations
        self._sums: list[Tensor | None] = []
        self._counts: list[int] = []
        self._start = 0
        self._clear()

    def _clear(self) -> None:
        self._sums, self._counts = [None] * len(self.names), [0] * len(self.names)

    def __call__(self, site: SteeringSite, args: tuple[Tensor, ...], output: Tensor) -> None:
        batch = site.rows.batch
        state = steered_state(site, args)
        self._start = batch.counted - state.shape[1]
        for row, (name, activation) in enumerate(zip(self.names, self.activations, strict=True)):
            adapter = None if name is None else site.adapter(name)
            if adapter is None:
                continue
            h = state[row]
            size = unscaled_shift(adapter, activation, h).norm(dim=1) * batch.gain[row].abs().to(h)
            ratio = size / h.norm(dim=1).clamp_min(torch.finfo(h.dtype).tiny)
            so_far = self._sums[row]
            self._sums[row] = ratio if so_far is None else so_far + ratio.to(so_far.device)
            self._counts[row] += 1

    def take(self) -> list[tuple[int, list[float]]]:
        """Return, for each row, where its tokens of the last pass begin, and their ratios. Empty: nothing steers."""
        means = [
            [] if total is None else (total / count).tolist()
            for total, count in zip(self._sums, self._counts, strict=True)
        ]
        self._clear()
        return [(self._start, mean) for mean in means]


# ---------------------------------------------------------------------------------------------------------- the stream


def _stream(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    variants: list[Variant],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> Iterator[list[Answer]]:
    ends = _end_tokens(model, tokenizer)
    rows = [_Row(variant, [], [], ids.shape[1]) for variant in variants]
    for row in rows:
        for token in ids[0].tolist():
            row.put(token, tokenizer)
    # The batch is opened in the thread that generates: its scope belongs to one context, and the consumer of an
    # iterator may go on in another.
    stop, sent = threading.Event(), queue.SimpleQueue[Any]()
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    options = {"max_new_tokens": max_new_tokens, "eos_token_id": ends or None, "pad_token_id": pad, **sampling}
    work = threading.Thread(
        target=contextvars.copy_context().run, args=(_generate, model, ids, variants, seed, options, stop, sent)
    )
    work.start()
    try:
        while not isinstance(event := sent.get(), _Ended):
            tokens, shifts = event
            for row, token, (start, values) in zip(rows, tokens, shifts, strict=True):
                if row.done:
                    continue
                if values:
                    row.shifts[start:] = values
                if token in ends:
                    row.done = True
                else:
                    row.put(token, tokenizer)
            yield [row.answer() for row in rows]
        if event.error is not None:
            raise event.error
        for row in rows:
            row.done = True
        yield [row.answer() for row in rows]
    finally:
        stop.set()
        work.join()


@dataclass(frozen=True)
class _Ended:
    """The last event of a generation."""

    error: BaseException | None


class _Streamer:
    """Sends each step's tokens and the shifts of its pass. transformers' own streamers take one row."""

    def __init__(self, sent: queue.SimpleQueue[Any], shifts: _Shifts) -> None:
        self._sent, self._shifts = sent, shifts
        self._began = False

    def put(self, tokens: Tensor) -> None:
        if self._began:  # the first are the prompt's
            self._sent.put((tokens.tolist(), self._shifts.take()))
        self._began = True

    def end(self) -> None:
        pass


@torch.no_grad()
def _generate(
    model: Any,
    ids: Tensor,
    variants: list[Variant],
    seed: int,
    options: dict[str, Any],
    stop: threading.Event,
    sent: queue.SimpleQueue[Any],
) -> None:
    """Generate in this thread, and send the tokens. The last event is `_Ended`, whatever happens."""

    def stopped(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), stop.is_set(), device=input_ids.device)

    error: BaseException | None = None
    steering = steering_of(model)
    try:
        with contextlib.ExitStack() as stack:
            names = [_adapter_name(steering, model, variant, stack) for variant in variants]
            scales = [next(iter(v.strengths.values())) if len(v.strengths) == 1 else None for v in variants]
            activations = ["" if name is None else steering.config(name).activation for name in names]
            shifts = _Shifts(names, activations)
            decoder = find_decoder(inside_peft(model))
            for layer in decoder.layers:
                for site in (module for module in layer.children() if isinstance(module, SteeringSite)):
                    stack.callback(site.register_forward_hook(shifts).remove)
            stack.enter_context(_in_eval_mode(model))
            stack.enter_context(_seeded(seed, model))
            positions = [variant.positions for variant in variants]
            stack.enter_context(steering.batch(names, scale=scales, positions=positions))
            fed = ids.expand(len(variants), -1).to(next(model.parameters()).device)
            model.generate(
                fed,
                attention_mask=torch.ones_like(fed),
                streamer=_Streamer(sent, shifts),
                stopping_criteria=[stopped],
                **options,
            )
    except BaseException as raised:
        error = raised
    finally:
        sent.put(_Ended(error))


def _adapter_name(steering: Steering, model: Any, variant: Variant, stack: contextlib.ExitStack) -> str | None:
    """Return the adapter that steers as the variant does, but for its strength. Several are added up until `stack`
    is closed."""
    if len(variant.strengths) < 2:
        return next(iter(variant.strengths), None)
    taken = {name.lower() for name in steering.names}
    name = next(name for name in (f"sum_{i}" for i in range(len(taken) + 1)) if name not in taken)
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(folder, adapter_of(model, variant))
        steering.load(folder, name)
    stack.callback(steering.remove, name)
    return name


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _seeded(seed: int, model: nn.Module) -> Iterator[None]:
    """Seed PyTorch's generators inside the context, and restore those of the CPU and of the model's devices."""
    devices = list({p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")})
    with torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"):
        torch.manual_seed(seed)
        yield


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer, by the model's generation config and by the tokenizer."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = own if isinstance(own, list) else [own]
    return sorted({token for token in (*found, tokenizer.eos_token_id) if token is not None})
