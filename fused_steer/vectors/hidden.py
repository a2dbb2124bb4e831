"""Hidden states of texts after each decoder layer: at the last token, or their mean over the tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import checked_choice
from ..model.decoder import check_rows, execution_device, find_decoder, inside_peft

TOKENS = ("last", "mean")
Batches = Iterable[Mapping[str, Tensor]]


def checked_batches(name: str, batches: Batches, *, whole: bool = False) -> list[Mapping[str, Tensor]]:
    """Return batches of texts as a list.

    Args:
        name: the argument's name, for the error message.
        whole: refuse a text without tokens, of which there is no hidden state.

    Raises:
        TypeError, ValueError: a batch is no mapping with `input_ids` and `attention_mask`, two tensors (texts, tokens),
            there is no batch, or a text has no tokens.
    """
    expected = "expected batches with tensors input_ids and attention_mask (texts, tokens)"
    if isinstance(batches, (str, Mapping)) or not isinstance(batches, Iterable):
        raise TypeError(f"{name} is a {type(batches).__name__}; {expected}")
    found = list(batches)
    if not found:
        raise ValueError(f"{name} is empty; {expected}")
    for batch in found:
        if not isinstance(batch, Mapping):
            raise TypeError(f"{name} has a {type(batch).__name__}; {expected}")
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        if not isinstance(ids, Tensor) or not isinstance(mask, Tensor):
            raise TypeError(f"{name} has a batch of {', '.join(map(str, batch)) or 'nothing'}; {expected}")
        if ids.dim() != 2 or ids.shape != mask.shape or not ids.numel():
            raise ValueError(
                f"{name} has input_ids {tuple(ids.shape)} and attention_mask {tuple(mask.shape)}; {expected}"
            )
        if whole and not (mask != 0).any(1).all():
            raise ValueError(f"{name} has a text whose attention_mask is all 0; expected at least one token in each")
    return found


@torch.no_grad()
def hidden_states(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], token: str) -> Tensor:
    """Return the output of each decoder layer for each text, (layers, texts, d), float32 on the CPU.

    This is the stream that an adapter at `post_block` steers. After the last layer it is the stream before the final
    norm. A steered model runs without its steering.

    Args:
        model: a language model.
        batches: `input_ids` and `attention_mask` (texts, tokens), as `encode` makes them.
        token: "last", the last token that is not padding, or "mean", over the tokens that are not padding.

    Raises:
        ValueError: an unknown `token`, states that are not finite, or a model whose layers get no (texts, tokens, d).
    """
    checked_choice("token", token, TOKENS)
    decoder = find_decoder(inside_peft(model))
    check_rows(decoder.module, f"token is {token!r}")
    device = execution_device(decoder.model)
    found: list[Tensor] = []
    with running_bare(model):
        for batch in batches:
            mask = batch["attention_mask"].to(device) != 0
            outputs: dict[int, Tensor] = {}
            with contextlib.ExitStack() as stack:
                for index, layer in enumerate(decoder.layers):
                    hook = _Reading(outputs, index, mask, token)
                    stack.callback(layer.register_forward_hook(hook).remove)
                decoder.model(
                    input_ids=batch["input_ids"].to(device),
                    attention_mask=batch["attention_mask"].to(device),
                    use_cache=False,
                )
            if len(outputs) != len(decoder.layers):
                raise ValueError(f"{len(outputs)} of {len(decoder.layers)} layers ran; expected each")
            found.append(torch.stack([outputs[index] for index in range(len(decoder.layers))]))
    states = torch.cat(found, 1)
    if not states.isfinite().all():
        raise ValueError("the model's hidden states are NaN or infinite; expected finite ones")
    return states


class _Reading:
    """A hook that keeps one vector of each text from a layer's output."""

    def __init__(self, outputs: dict[int, Tensor], index: int, mask: Tensor, token: str) -> None:
        self._outputs, self._index, self._mask, self._token = outputs, index, mask, token

    def __call__(self, layer: nn.Module, args: Any, output: Any) -> None:
        states = (output[0] if isinstance(output, (tuple, list)) else output).float()
        mask = self._mask.to(states.device)
        if self._token == "last":
            last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
            kept = states[torch.arange(len(states), device=states.device), last]
        else:
            total = states.masked_fill(~mask.unsqueeze(2), 0).double().sum(1)
            kept = (total / mask.sum(1, keepdim=True)).float()
        self._outputs[self._index] = kept.cpu()


@contextlib.contextmanager
def running_bare(model: nn.Module) -> Iterator[None]:
    """Run the model in eval mode and without steering inside this context."""
    steering: Any = getattr(inside_peft(model), "steering", None)
    modes = [(module, module.training) for module in model.modules()]
    with steering.disabled() if steering is not None else contextlib.nullcontext():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
