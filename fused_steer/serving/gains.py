"""Find the steered tokens of a pass, if the active adapter has positions.

In training the labels separate prompt and answer: a text's prompt ends before its first label that is not -100. In a
packed row a text begins where `position_ids` do not increase by one. In inference without labels, a pass without cached
tokens is a prompt, and later passes are generated tokens. `generate` runs inside a batch of the active adapter, which
knows the place of each pass.

Checkpointing runs a layer again in the backward pass, perhaps after other passes of the model. The layer's input is the
same tensor as before, and the layer's gain is found by its address. A pass gets a copy of `inputs_embeds` that an
earlier pass had too, so that each has an address of its own.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.hooks import RemovableHandle

from ..kernels.registered import refuse_jit_trace
from ..model.decoder import check_rows
from ..model.weak import Weakly, what_is_left
from ..positions import Positions, chosen_by_lengths, chosen_tokens
from .caches import (
    cache_length,
    check_begins,
    does_not_tell,
    find_cache,
    find_tokens,
    is_cache,
    is_empty,
    with_padding,
)
from .replaced import Replacement

_NO_LABEL = -100
_SAY = "labels with -100 for the prompt, or steering.prompts(...) around the pass"


class _Pass:
    """The state of the running pass.

    Attributes:
        labels, mask: the model's arguments labels and attention_mask.
        model: the module that was called with them.
        gain: (rows, tokens) float32, or None.
        runs: whether a pass of the decoder runs.
        prompts: the argument of `Steering.prompts`, or None.
    """

    labels: Any = None
    mask: Any = None
    model: weakref.ref[nn.Module] | None = None
    gain: Tensor | None = None
    runs = False
    prompts: Tensor | None = None


class _PassOfThread(_Pass, threading.local):
    pass


class Gains:
    """Computes the gain of each token in the passes of one model, for the sites of the active adapter."""

    _model = Weakly[nn.Module](lambda self: self._decoder)
    _decoder = Weakly[nn.Module]()

    def __init__(
        self,
        model: nn.Module,
        decoder: nn.Module,
        idle: Callable[[], bool],
        tracing: Callable[[], bool],
        batch: Callable[[int], contextlib.AbstractContextManager[None]],
    ) -> None:
        """
        Args:
            model: the whole model.
            decoder: its module that runs the layers.
            idle: returns whether a batch steers the passes now, or nothing does.
            tracing: returns whether the pass only records which modules run. Then every token is steered.
            batch: opens a batch with this number of rows, all steered by the active adapter.
        """
        self._model, self._decoder, self._batch = model, decoder, batch
        self._idle, self._tracing = idle, tracing
        self._names = tuple(inspect.signature(decoder.forward).parameters)
        self._model_names = tuple(inspect.signature(model.forward).parameters)
        # The labels of such a model, perhaps one for each token, are classes. It is asked here, outside of graphs.
        self._classifies = not getattr(model, "can_generate", lambda: True)() and not _predicts_tokens(model)
        self.positions: Positions | None = None
        self._handles: list[RemovableHandle] = []
        self._methods: list[_Method] = []
        self._here = _PassOfThread()
        self._traced = _Pass()  # for compiled graphs, which cannot read thread-local state
        self._kept: dict[int, tuple[StorageWeakRef, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # PyTorch cannot copy the handle of a hook whose module was deleted, such as a model of which a decoder is left.
        handles = [handle for handle in self._handles if handle.hooks_dict_ref() is not None]
        return {**self.__dict__, "_here": None, "_traced": None, "_kept": {}, "_handles": handles}

    def __deepcopy__(self, memo: dict[int, Any]) -> Gains:
        """Copy this with its model or decoder. A copy of a single layer keeps it, and so leaves the model out."""
        if not any(id(what_is_left(self, name)) in memo for name in ("_model", "_decoder")):
            return self
        twin = memo[id(self)] = object.__new__(Gains)
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _here=_PassOfThread(), _traced=_Pass())

    # ------------------------------------------------------------------------------------------------- while it is used

    def use(self, positions: Positions | None) -> None:
        """Watch the model's passes for these positions, or (None) stop watching.

        Raises:
            ValueError: the layers' hidden states are not (rows, tokens, d).
        """
        if positions is not None:
            check_rows(self._decoder, f"positions is {positions.name!r}", "'all'")
        if (positions is None) == (self.positions is None):
            self.positions = positions
            return
        if positions is None:
            for handle in self._handles:
                handle.remove()
            for method in self._methods:
                method.end()
            self._handles, self._methods, self.positions = [], [], None
            return
        self.positions = positions
        if self._model is not self._decoder:
            self._handles.append(self._model.register_forward_pre_hook(self._before_model, with_kwargs=True))
            self._handles.append(self._model.register_forward_hook(self._after_model, always_call=True))
        self._handles.append(self._decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True))
        self._handles.append(self._decoder.register_forward_hook(self._after_decoder, always_call=True))
        for name in ("generate", "generate_batch", "init_continuous_batching"):
            if hasattr(self._model, name):
                self._methods.append(_Method(self._model, name, self))
                self._methods[-1].install()

    @contextlib.contextmanager
    def prompts(self, given: Any) -> Iterator[None]:
        """Set the prompts of this thread's passes inside the context. See `Steering.prompts`."""
        prompts = _prompts(given)
        earlier = self._here.prompts
        self._here.prompts = self._traced.prompts = prompts
        try:
            yield
        finally:
            self._here.prompts = self._traced.prompts = earlier

    @property
    def told(self) -> bool:
        """Whether this thread is inside `prompts`."""
        return self._here.prompts is not None

    def of(self, residual: Tensor, entering: Tensor | None) -> Tensor:
        """Return the gain (rows, tokens) for a layer's hidden state (rows, tokens, d).

        Args:
            entering: the layer's input.

        Raises:
            RuntimeError: no pass runs, and no earlier pass gave this input to the layer.
            ValueError: the hidden state is of another shape than (rows, tokens, d) of the pass.
        """
        if is_compiling():
            gain = self._traced.gain
        elif self._here.runs and not self._runs_again(entering):
            gain = self._here.gain
            # Reentrant checkpointing first runs the layer without gradients. torch.func cannot checkpoint.
            if (
                gain is not None
                and isinstance(entering, Tensor)
                and (torch.is_grad_enabled() or entering.requires_grad)
                and not torch._C._are_functorch_transforms_active()
            ):
                self._kept[entering.data_ptr()] = (StorageWeakRef(entering.untyped_storage()), gain)
        else:
            gain = self._kept_of(entering)
        if gain is None and not is_compiling() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "a checkpointed layer runs again in the backward pass with another input tensor than before, as with "
                "offloaded activations, and its adapter has positions; expected the same tensor (checkpointing alone)"
            )
        if gain is None:
            raise RuntimeError(
                "a layer runs outside of a pass of the model, and its adapter has positions; expected the model to be "
                "called"
            )
        if residual.shape[:-1] != gain.shape:  # such as ProphetNet's, with the tokens of several predictions in a row
            check_rows(self._decoder, f"positions is {self._name!r}", "'all'", residual.shape)
        return gain.to(residual.device)

    def _runs_again(self, entering: Tensor | None) -> bool:
        """Return whether the backward pass runs a layer again. A pass that Ctrl-C interrupted still seems to run then,
        because PyTorch calls no hook at its end."""
        return torch._C._current_graph_task_id() != -1 and self._kept_of(entering) is not None

    def _kept_of(self, entering: Tensor | None) -> Tensor | None:
        """Return the gain of the pass that gave this input to a layer, or None."""
        found = self._kept.get(entering.data_ptr()) if isinstance(entering, Tensor) else None
        return None if found is None or found[0].expired() else found[1]

    # ---------------------------------------------------------------------------------------------------- around a pass

    @property
    def _now(self) -> _Pass:
        return self._traced if is_compiling() else self._here

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now, given = self._now, {**dict(zip(self._model_names, args, strict=False)), **kwargs}
        now.labels, now.mask = given.get("labels"), given.get("attention_mask")
        if not is_compiling():
            now.model = weakref.ref(module)

    def _after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        self._now.labels = self._now.mask = None

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now = self._now
        now.gain, now.runs = None, True
        if self.positions is None or self._idle():
            return None
        if not is_compiling():
            refuse_jit_trace()
            left = now.labels is not None or now.mask is not None
            if left and now.model is not None and not _is_called(now.model()):
                now.labels = now.mask = None
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        now.gain = self._gain(self.positions, given)
        if not is_compiling():
            self._traced.gain = now.gain  # for layers that are compiled individually
            self._kept = {at: kept for at, kept in self._kept.items() if not kept[0].expired()}
            fed = given.get("inputs_embeds")
            if self._kept and isinstance(fed, Tensor) and not torch._C._are_functorch_transforms_active():
                if fed.data_ptr() in self._kept:  # the first layer of an earlier pass may still run again
                    return (), {**given, "inputs_embeds": fed.clone()}
        return None

    def _after_decoder(self, module: nn.Module, args: Any, output: Any) -> None:
        self._now.gain, self._now.runs = None, False

    def _gain(self, positions: Positions, given: dict[str, Any]) -> Tensor:
        fed = find_tokens(given, self._names)
        rows, columns = fed.shape[:2]
        given = with_padding(given, self._now.mask, columns)
        if self._tracing():
            return torch.ones(rows, columns, device=fed.device)
        real = self._real(positions, given.get("attention_mask"), rows, columns, fed.device)
        starts = _starts(given.get("position_ids"), rows, columns)
        prompts = self._now.prompts
        if prompts is not None and prompts.dim() == 1:
            _check_lengths(prompts, real, starts)
            before = _before(given, real)
            told = before is None
            if told and (torch.is_grad_enabled() or given.get("use_cache") is False):
                _check_within(prompts, real)
            chosen, prompt = chosen_by_lengths(positions, real, prompts.to(fed.device), 0 if before is None else before)
        else:
            answer, told = self._answer(real, starts, given)
            chosen, prompt = chosen_tokens(positions, real, answer, starts)
        if told and (positions.first or positions.last) and _known(prompt) and not prompt.any():
            raise ValueError(
                f"no token of the pass is a prompt's, and positions is {positions.name!r}; expected {_SAY}"
            )
        return chosen.to(torch.float32)

    def _real(self, positions: Positions, mask: Any, rows: int, columns: int, device: torch.device) -> Tensor:
        if mask is None or not isinstance(mask, Tensor) or mask.dim() != 2:
            if mask is not None and positions.counts:
                raise ValueError(
                    "attention_mask does not say which tokens are padding, and positions counts tokens; expected one "
                    "of two dimensions"
                )
            return torch.ones(rows, columns, dtype=torch.bool, device=device)
        real = mask[:, -columns:].to(device) != 0  # the mask includes cached columns
        return real.expand(rows, -1) if len(real) == 1 else real  # models accept one row for all

    def _answer(self, real: Tensor, starts: Tensor | None, given: Mapping[str, Any]) -> tuple[Tensor, bool]:
        """Return a mask of the answers' tokens, and whether labels or prompts gave it."""
        prompts, labels = self._now.prompts, self._now.labels
        if prompts is not None:
            if prompts.shape != real.shape:
                raise ValueError(f"prompts has shape {tuple(prompts.shape)}; expected {tuple(real.shape)}, the pass's")
            if self.positions is not None and self.positions.counts and _before(given, real) is not None:
                raise ValueError(
                    f"prompts is a mask, the pass continues a cache, and positions is {self._name!r}; expected the "
                    "number of prompt tokens of each row"
                )
            return prompts.to(real.device) == 0, True
        if isinstance(labels, Tensor) and labels.shape == real.shape and not self._classifies:
            return labels.to(real.device) != _NO_LABEL, True
        # A classifier's text is all prompt. A model without a head does not tell: the one around it may generate.
        if self._has_only_prompts():
            self.check_steers(self.positions, ", or steering.prompts(...) around the pass")
            return torch.zeros_like(real), False
        if torch.is_grad_enabled():
            raise ValueError(
                f"the pass does not say where its prompts end, and positions is {self._name!r}; expected {_SAY}, or "
                "torch.no_grad() for inference"
            )
        return torch.full_like(real, _cached(given, real.shape[1]) > 0), False

    def check_steers(self, positions: Positions | None, otherwise: str = "") -> None:
        """Raise ValueError if these positions are after the prompt, and the model's texts are prompts alone.

        otherwise: what else is expected, at the end of the message.
        """
        if positions is not None and not (positions.first or positions.last) and self._has_only_prompts():
            raise ValueError(
                f"{type(self._model).__name__} does not generate, so that its text is all prompt, and positions is "
                f"{positions.name!r}; expected positions of the prompt{otherwise}"
            )

    def _has_only_prompts(self) -> bool:
        return not self._is_headless() and not getattr(self._model, "can_generate", lambda: True)()

    def _is_headless(self) -> bool:
        """Return whether the model is the decoder, or transformers' base model around it (OPTModel)."""
        model = self._model
        return model is self._decoder or bool(getattr(model, "base_model_prefix", "")) and model.base_model is model

    @property
    def _name(self) -> str:
        return "" if self.positions is None else self.positions.name

    # --------------------------------------------------------------------------------------------------------- generate

    def run(self, name: str, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a generating method inside a batch of the active adapter, unless idle."""
        if self.positions is None or self._idle():
            return original(*args, **kwargs)
        if self.told:
            raise RuntimeError(
                f"{name} is called inside steering.prompts; expected it outside: its prompt is its input"
            )
        if name == "init_continuous_batching":
            raise RuntimeError(
                f"{name} puts requests together by itself, and positions is {self._name!r}; expected generate_batch"
            )
        given = {"inputs": args[0]} if args else {}
        prompt = next(
            (v for n in ("inputs_embeds", "inputs", "input_ids") if (v := {**kwargs, **given}.get(n)) is not None), None
        )
        if name == "generate_batch" and isinstance(prompt, (list, tuple)) and not prompt:
            return original(*args, **kwargs)  # no prompts, no answers
        with self._batch(len(prompt) if isinstance(prompt, (Tensor, list, tuple)) else 1):
            method: Any = getattr(self._model, name)  # wrapped by the batch
            return method(*args, **kwargs)


class _Method(Replacement):
    """A generating method of a model, while the active adapter has positions."""

    def __init__(self, model: nn.Module, name: str, gains: Gains) -> None:
        super().__init__(model, name)
        self.gains = gains

    @property
    def __wrapped__(self) -> Any:
        return self.original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.ended:
            return self.original(*args, **kwargs)
        return self.gains.run(self.name, self.original, args, kwargs)


def _predicts_tokens(model: Any) -> bool:
    return hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None


def _prompts(given: Any) -> Tensor:
    expected = "expected the number of prompt tokens of each row, or a mask (rows, tokens)"
    try:
        prompts = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # PyTorch's errors do not say what was expected
        raise ValueError(f"prompts is {given!r:.80}; {expected}") from None
    kinds = (1, 2) if prompts.dtype != torch.bool else (2,)  # True is no number of tokens
    if prompts.dim() not in kinds or prompts.is_floating_point() or prompts.is_complex():
        raise ValueError(f"prompts has shape {tuple(prompts.shape)} and dtype {prompts.dtype}; {expected}")
    if prompts.dim() == 1 and prompts.device.type == "cpu" and bool((prompts < 0).any()):
        raise ValueError(f"prompts has {int(prompts.min())}; {expected}")
    return prompts


def _is_called(module: nn.Module | None) -> bool:
    """Return whether a call of the module runs in this thread. PyTorch calls no hook at the end of one that Ctrl-C
    interrupts."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals["self"] is module:
            return True
        if frame.f_code.co_name.startswith("torch_dynamo_resume"):  # perhaps the rest of its call
            return True
        frame = frame.f_back
    return False


def _check_lengths(prompts: Tensor, real: Tensor, starts: Tensor | None) -> None:
    if len(prompts) != len(real):
        raise ValueError(f"prompts has {len(prompts)} lengths; expected {len(real)}, one for each row of the pass")
    if starts is not None and bool((starts & real).sum() > (real.any(1)).sum()):
        raise ValueError("prompts has a length for each row, and rows are packed; expected a mask (rows, tokens)")


def _check_within(prompts: Tensor, real: Tensor) -> None:
    """Refuse lengths beyond the rows of a pass that has the whole texts. In inference a prompt may be fed in parts."""
    if not _known(real):
        return
    for row, (length, there) in enumerate(zip(prompts.tolist(), real.sum(1).tolist(), strict=True)):
        if length > there:
            raise ValueError(
                f"prompts has {length} for row {row}, which has {there} tokens without padding; expected at most "
                f"{there} (torch.no_grad() and a cache for a prompt that is fed in parts)"
            )


def _known(tensor: Tensor) -> bool:
    """Return whether a tensor's values can be read: not in a graph, nor under vmap."""
    return not is_compiling() and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _before(given: Mapping[str, Any], real: Tensor) -> Tensor | int | None:
    """Return the number of tokens of each row in the cache, (rows, 1) or for all. None if the pass continues no cache.

    Raises:
        ValueError: the mask does not have the cached columns; or see `_cached`.
    """
    rows, columns = real.shape
    past = 0 if find_cache(given) is None else _cached(given, columns)
    mask = given.get("attention_mask")
    if not past or not isinstance(mask, Tensor) or mask.dim() != 2:
        return past or None
    if mask.shape[0] != rows or mask.shape[1] < past + columns:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; expected {rows} rows of the {past} cached and the "
            f"{columns} new columns"
        )
    return (mask[:, :past].to(real.device) != 0).sum(1, keepdim=True)


def _starts(positions: Any, rows: int, columns: int) -> Tensor | None:
    """Return a mask of the first tokens of a packed row's texts. None: no position ids tell them.

    Models with rotary positions in several dimensions (Qwen-VL) take (3, rows, tokens), in which images have positions
    of their own; of packed rows (4, rows, tokens), with the positions in the text first.
    """
    if isinstance(positions, Tensor) and positions.dim() == 3 and len(positions) > 3:
        positions = positions[0]
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] != columns:
        return None
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    return begins.expand(rows, columns)


def _cached(given: Mapping[str, Any], tokens: int) -> int:
    """Return the number of cached columns before a pass.

    Raises:
        ValueError: the pass continues a text, and no cache is found, or the cache does not tell its length.
    """
    cache = find_cache(given)
    if cache is None:
        check_begins(given, tokens)
        return 0
    length = cache_length(cache) if is_cache(cache) else None
    if length is not None:
        return int(length)
    if is_empty(cache):
        return 0
    raise ValueError(does_not_tell(cache))
