"""How far a model's next-token distributions are from a tuned model's: their Kullback–Leibler divergence.

The shares of `fit` are of hidden states. A reader of the text meets the distributions that the head makes of them, and
these are what the paper's authors compare an oracle's approximation by (arXiv 2603.00425).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from ..model.decoder import execution_device, find_decoder, inside_peft
from ..positions import kept_tokens
from .lockstep import Batch, evaluating

_LOGITS = 1 << 24  # the most logits of a model that are in float32 at a time: 64 MiB


@dataclass(frozen=True)
class Divergence:
    """How far a model's next-token distributions are from a tuned model's.

    Attributes:
        kl: the mean over tokens of KL(tuned ‖ model), in nats.
        same: the share of tokens after which both models have the same likeliest next token.
        tokens: the number of tokens.
    """

    kl: float
    same: float
    tokens: int


def divergence(model: nn.Module, tuned: nn.Module, batches: Iterable[Batch]) -> Divergence:
    """Compare a model's next-token distributions with a tuned model's: Σ_v p_tuned(v) (log p_tuned(v) − log p(v)).

    Both run in eval mode; afterwards they are as they were.

    Args:
        model: a causal language model.
        tuned: another. It may have more tokens than the model, such as padding; the distributions are then those over
            the model's tokens.
        batches: inputs of both, `input_ids` (B, T) and what else their forward takes. Tokens that `attention_mask`
            (B, T) masks do not count.

    Raises:
        ValueError: there is no token, the tuned model lacks tokens of the model's, or logits are not finite.
        TypeError: a batch is no mapping with `input_ids`, or its mask is no tensor.
    """
    kl, same, tokens = 0.0, 0, 0
    with evaluating([model, tuned]):
        for batch in batches:
            kept = kept_tokens(batch)
            logits = [_logits(one, batch, kept) for one in (tuned, model)]
            size = logits[1].shape[1]
            if logits[0].shape[1] < size:
                raise ValueError(f"the tuned model has {logits[0].shape[1]} tokens; expected {size}, as the model has")
            rows = max(1, _LOGITS // size)
            for wanted, found in zip(*(part.split(rows) for part in logits), strict=True):
                p, q = wanted[:, :size].float().log_softmax(1), found.to(wanted.device).float().log_softmax(1)
                each = (p.exp() * (p - q)).sum(1)
                if not each.isfinite().all():
                    raise ValueError("a model's logits are NaN or infinite; expected finite ones")
                kl += float(each.double().sum())
                same += int((wanted[:, :size].argmax(1) == found.to(wanted.device).argmax(1)).sum())
                tokens += len(each)
    if not tokens:
        raise ValueError("the batches have no token; expected at least one")
    return Divergence(kl / tokens, same / tokens, tokens)


def _logits(model: nn.Module, batch: Batch, kept: Tensor) -> Tensor:
    """The logits of the tokens that count, (N, V)."""
    device = execution_device(find_decoder(inside_peft(model)).module)
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    inputs.pop("labels", None)
    logits = model(**inputs, use_cache=False).logits.flatten(0, 1)
    return logits[kept.to(logits.device)]
