"""`sweep`: what a vector does to a model at several strengths: its perplexity, and which side's texts it prefers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import SteerConfig, checked_bool, checked_number
from ..model.decoder import find_decoder, inside_peft
from ..patch import patch_model
from .hidden import Batches, checked_batches

_NAME = "vectors-sweep"


@dataclass(frozen=True)
class Dose:
    """The effect of vectors at one strength.

    Attributes:
        layers: the steered layers.
        dose: the strength.
        perplexity: of the texts, over all of their tokens after the first. inf if the model's probabilities underflow.
        margin: the mean log-probability a token of the positive texts less that of the negative texts, in nats.
    """

    layers: tuple[int, ...]
    dose: float
    perplexity: float
    margin: float


@torch.no_grad()
def sweep(
    model: nn.Module,
    vectors: Mapping[int, Tensor],
    positive: Batches,
    negative: Batches,
    texts: Batches,
    doses: Sequence[float],
    *,
    each_layer: bool = False,
) -> list[Dose]:
    """Steer by `vectors` at each dose, and measure. The model is as before afterwards.

    Args:
        model: a language model, steered or not.
        vectors: (d,) by layer, as `Extraction.vectors` or `model.steering.add_vector` have them.
        positive: batches of one side's texts, for the margin.
        negative: batches of the other side's texts.
        texts: batches of texts for the perplexity.
        doses: strengths. 0 is the base model.
        each_layer: steer one layer at a time instead of all together.

    Raises:
        TypeError, ValueError: an argument has another form, vectors do not fit the model, or no text has a second
            token.
        RuntimeError: steering is disabled, or a batch is running.
    """
    doses, vectors = _checked_doses(doses), _checked_vectors(vectors)
    checked_bool("each_layer", each_layer)
    positive, negative, texts = (
        checked_batches(name, batches)
        for name, batches in (("positive", positive), ("negative", negative), ("texts", texts))
    )
    groups = [{layer: vector} for layer, vector in vectors.items()] if each_layer else [dict(vectors)]
    rows = []
    for group in groups:
        with _steered(model, group) as steering:
            for dose in doses:
                steering.scale = dose
                sides = [_log_probabilities(model, batches) for batches in (positive, negative)]
                margin = float(sides[0][0].mean() - sides[1][0].mean())
                each, tokens = _log_probabilities(model, texts)
                loss = -float((each * tokens).sum() / tokens.sum())
                perplexity = math.exp(loss) if loss < 700 else math.inf
                rows.append(Dose(tuple(sorted(group)), dose, perplexity, margin))
    return rows


@torch.no_grad()
def continuations(
    model: Any, tokenizer: Any, vectors: Mapping[int, Tensor], prompt: str, doses: Sequence[float], new_tokens: int
) -> list[str]:
    """Return the model's greedy continuation of a prompt at each dose, all in one batch.

    Args:
        model: as in `sweep`.
        vectors: as in `sweep`.
        doses: as in `sweep`.
        tokenizer: the model's tokenizer.
        prompt: a text.
        new_tokens: the most tokens of a continuation.
    """
    doses, vectors = _checked_doses(doses), _checked_vectors(vectors)
    if not doses:
        return []
    device = model.get_input_embeddings().weight.device
    inputs = {name: value.to(device) for name, value in tokenizer([prompt] * len(doses), return_tensors="pt").items()}
    with _steered(model, vectors) as steering, steering.batch([_NAME] * len(doses), scale=doses):
        found = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _checked_doses(doses: Any) -> list[float]:
    if isinstance(doses, str) or not isinstance(doses, Iterable):
        raise TypeError(f"doses is {doses!r:.80}; expected a list of numbers")
    return [checked_number("a dose", dose) for dose in doses]


def _checked_vectors(vectors: Any) -> dict[int, Tensor]:
    if not isinstance(vectors, Mapping):
        raise TypeError(f"vectors is a {type(vectors).__name__}; expected a vector for each layer, by its index")
    if not vectors:
        raise ValueError("vectors is empty; expected a vector for at least one layer")
    return dict(vectors)


@contextlib.contextmanager
def _steered(model: Any, vectors: Mapping[int, Tensor]) -> Iterator[Any]:
    """Let vectors steer the model inside this context, in eval mode."""
    find_decoder(inside_peft(model))  # refuses what is no model
    inner: Any = inside_peft(model)
    modes = [(module, module.training) for module in model.modules()]
    steering = getattr(inner, "steering", None)
    if steering is not None:
        steering.check_measurable("the vector is tried")
    with contextlib.ExitStack() as undo:
        if steering is None:
            config = SteerConfig("vector", layers=[next(iter(vectors))])
            steering = patch_model(model, config, adapter_name=f"{_NAME}-first").steering
            undo.callback(steering.unpatch)
        else:
            undo.callback(steering.use, steering.active)
        steering.add_vector(_NAME, vectors)
        undo.callback(steering.remove, _NAME)
        steering.use(_NAME)
        model.eval()
        for module, training in modes:
            undo.callback(setattr, module, "training", training)
        yield steering


def _log_probabilities(model: Any, batches: Batches) -> tuple[Tensor, Tensor]:
    """Return the mean log-probability of each text's tokens after the first, and their number. In float64."""
    means, counts = [], []
    device = model.get_input_embeddings().weight.device
    for batch in batches:
        ids, mask = (batch[name].to(device) for name in ("input_ids", "attention_mask"))
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        labels = ids[:, 1:].to(logits.device)
        kept = mask[:, 1:].to(logits.device).double()
        each = -F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").double() * kept
        means.append((each.sum(1) / kept.sum(1).clamp(min=1)).cpu())
        counts.append(kept.sum(1).cpu())
    tokens = torch.cat(counts)
    if not (tokens > 0).any():
        raise ValueError("no text has a second token; expected texts of at least two tokens")
    long = tokens > 0
    return torch.cat(means)[long], tokens[long]
