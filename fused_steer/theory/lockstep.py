"""Models run a decoder layer at a time, so that a stream can be read and changed between two layers.

`Stream` runs a model once as it is, and keeps what each layer was given beside the hidden states: masks, position
embeddings, whatever the model has. After that `advance` calls one layer after the other on the hidden states of all
batches. One hidden state per token is kept on the CPU in the model's dtype, or three at sites other than post_block.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.parameters import SITE
from ..config import SteerConfig
from ..model.decoder import Decoder, check_rows, execution_device, find_decoder, inside_peft
from ..patch import patch_model

Batch = Mapping[str, Any]


class Stream:
    """The hidden states of one model between two layers, for each batch (B, T, d).

    states: after the layer that ran last. read: what an adapter at the site reads in that layer.
    """

    def __init__(self, model: nn.Module, name: str, site: str = SITE) -> None:
        """Find the decoder; the model is not run.

        Args:
            name: of the model, for errors.
            site: the site that is looked at; but for post_block the model's layers need it when they run.
        """
        self.name, self.site = name, site
        self.decoder: Decoder = find_decoder(inside_peft(model))
        check_rows(self.decoder.module, "fit reads each token's")
        self.device = execution_device(self.decoder.module)
        self.states: list[Tensor] = []
        self.read: list[Tensor] = []
        self._calls: list[list[_Call]] = []
        self._before: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.decoder.layers)

    def enter(self, batch: Batch) -> list[Tensor]:
        """Run the model on a batch, which is the stream's next. Returns what is at the site in each layer.

        Raises:
            ValueError: a layer is given something else than what the layer before it returned, so that layers cannot
                be run one by one.
        """
        outputs: list[Tensor] = []
        read: list[Tensor] = []
        calls: list[_Call] = []

        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = _Call(args, kwargs)
            if len(calls) != len(outputs) or call.hidden is None or (outputs and call.hidden is not outputs[-1]):
                raise ValueError(
                    f"layer {len(calls)} of the {self.name} model ({type(layer).__name__}) is not given what the layer "
                    "before it returned; expected a decoder whose layers can be run one by one"
                )
            if not calls:
                self.states.append(call.hidden.cpu())
            calls.append(call)

        def after(layer: nn.Module, args: Any, output: Any) -> None:
            outputs.append(_first(output))

        with contextlib.ExitStack() as stack:
            for layer in self.decoder.layers:
                stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(after).remove)
                stack.enter_context(self._reading(layer, read))
            self.decoder.model(**self._inputs(batch), use_cache=False)
        if len(outputs) != len(self):
            raise ValueError(
                f"{len(outputs)} of the {len(self)} layers of the {self.name} model ran; expected each once"
            )
        for call in calls:
            call.forget()
        self._calls.append(calls)
        return outputs if self.site == SITE else read

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """A batch on the model's device, without labels, which a decoder does not take."""
        return {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
            if name != "labels"
        }

    def branch(self) -> Stream:
        """A stream of the same model that goes on from here by itself."""
        other = copy.copy(self)
        other.states = list(self.states)
        return other

    def advance(self, index: int) -> None:
        """Put the hidden states of all batches through the layer `index`."""
        self._before, self.read = self.states, []
        self.states = self._run(index, self.read, None)
        if self.site == SITE:
            self._before, self.read = [], self.states

    def steer(self, index: int, function: Callable[[Tensor], Tensor]) -> None:
        """Put `function` of what is at the site in its place, in the layer `index`, which ran last."""
        if self.site == SITE:
            self.states = [function(states.to(self.device)).cpu() for states in self.states]
        else:
            self.states = self._run(index, [], function)

    def _run(self, index: int, read: list[Tensor], function: Callable[[Tensor], Tensor] | None) -> list[Tensor]:
        """The hidden states after the layer; what is at its site goes to `read`, and `function` of it in its place."""
        layer = self.decoder.layers[index]
        before = self.states if function is None else self._before
        with self._reading(layer, read, function):
            return [calls[index](layer, states).cpu() for calls, states in zip(self._calls, before, strict=True)]

    @contextlib.contextmanager
    def _reading(
        self, layer: nn.Module, read: list[Tensor], function: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[None]:
        """Inside, what is at a layer's site is put into `read`; at post_block it is what the layer returns."""
        if self.site == SITE:
            yield
            return

        def at_site(site: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            place = len(args) - 1 if site.reads == "branch" else 0
            read.append(args[place].cpu())
            return None if function is None else (*args[:place], function(args[place]), *args[place + 1 :])

        handle = layer.get_submodule(self.site).register_forward_pre_hook(at_site)
        try:
            yield
        finally:
            handle.remove()


@contextlib.contextmanager
def with_site(models: Sequence[nn.Module], site: str) -> Iterator[None]:
    """Inside, the models have the site in each layer, at which nothing steers; not needed for post_block.

    Raises:
        ValueError: a model lacks it, or is steered already.
    """
    with contextlib.ExitStack() as stack:
        for model in models if site != SITE else ():
            steering = patch_model(model, SteerConfig(form="vector", site=site)).steering
            stack.callback(steering.unpatch)
            steering.use(None)
        yield


class _Call:
    """What a layer was given: the hidden state, and with it all else."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.by_name = not args
        given = kwargs.get("hidden_states") if self.by_name else args[0]
        self.hidden: Tensor | None = given if isinstance(given, Tensor) and given.ndim == 3 else None
        self.device = None if self.hidden is None else self.hidden.device
        self.args, self.kwargs = args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}

    def forget(self) -> None:
        self.hidden = None

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        hidden = hidden.to(self.device)
        if self.by_name:
            return _first(layer(hidden_states=hidden, **self.kwargs))
        return _first(layer(hidden, *self.args, **self.kwargs))


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) and output else output


@contextlib.contextmanager
def evaluating(models: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, the models are in eval mode and nothing needs gradients; afterwards their modes are as they were."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    # Compiled layers would be recompiled for the hooks, and once more without them.
    eager = torch.compiler.set_stance("force_eager")
    try:
        for model in models:
            model.eval()
        with torch.no_grad(), eager:
            yield
    finally:
        for module, training in modes:
            module.training = training
