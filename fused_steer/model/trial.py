"""Run a model once on a few tokens, to see what its layers do. Nothing of the pass is left in the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from .decoder import execution_device
from .site import Site


@contextlib.contextmanager
def in_eval(module: nn.Module) -> Iterator[None]:
    """Put all modules into eval mode inside this context, so that there is no dropout."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for m, training in modes:
            m.training = training


def run_trial(model: nn.Module, ids: Sequence[int], shows: str) -> None:
    """Run a model on one text, in eval mode. Training modes and the sites' counts are restored.

    Args:
        model: the model, or the part of it that takes token ids and runs the layers.
        ids: the token ids.
        shows: what the pass shows, for the error message.

    Raises:
        ValueError: the pass failed, or would change the model.
    """
    name = type(model).__name__
    if hasattr(model, "set_attention_type"):  # BigBird
        raise ValueError(
            f"{name} changes its attention for good in a pass of {len(ids)} tokens; expected a model that a short "
            f"pass leaves as it is (it shows {shows})"
        )
    counts = [(m, m.calls, m.backend) for m in model.modules() if isinstance(m, Site)]
    tokens = torch.tensor([list(ids)], device=execution_device(model))
    try:
        with in_eval(model):
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name} failed on {len(ids)} tokens ({type(error).__name__}: {reason}); expected a forward pass that "
            f"shows {shows}"
        ) from error
    finally:
        for site, calls, backend in counts:
            site.calls, site.backend = calls, backend
