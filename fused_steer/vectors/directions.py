"""The direction between two sets of hidden states, and how well it separates them. In float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import checked_choice

METHODS = ("mean", "pca", "pca-center")


def check_method(method: str, paired: bool) -> None:
    """Refuse an unknown method, or one that needs pairs where there are two sets.

    Raises:
        ValueError: it is refused.
    """
    checked_choice("method", method, METHODS)
    if method != "mean" and not paired:
        raise ValueError(f"method is {method!r} for two sets of texts; expected 'mean', or pairs")


def direction(positive: Tensor, negative: Tensor, method: str) -> Tensor:
    """Return the vector from the negative to the positive states, (d,) in float64.

    Args:
        positive, negative: (texts, d). For "pca" and "pca-center" row i of both is a pair.
        method: "mean" is the difference of the means (contrastive activation addition, arXiv 2312.06681). "pca" is the
            first principal component of the pairs' differences, centred by PCA itself: repeng's `pca_diff`.
            "pca-center" is that of both sides, each less the mean of its pair: repeng's `pca_center`. Components have
            length 1; the sign is the one by which most positive texts lie above their negatives.

    Raises:
        ValueError: the sides do not differ, or PCA has too few pairs.
    """
    positive, negative = positive.double(), negative.double()
    if method == "mean":
        found = positive.mean(0) - negative.mean(0)
    else:
        difference = positive - negative
        spread = difference - difference.mean(0) if method == "pca" else difference / 2
        found = torch.linalg.svd(spread, full_matrices=False).Vh[0] if spread.any() else torch.zeros_like(spread[0])
        projected = difference @ found
        if (projected < 0).sum() > (projected > 0).sum():
            found = -found
    if not found.any():
        more = ", or of pairs in more than one way" if method == "pca" else ""
        raise ValueError(f"the sides give no direction by {method!r}; expected texts that differ{more}")
    return found


@dataclass(frozen=True)
class Separation:
    """How well projections onto a direction tell the sides apart.

    Attributes:
        d: the difference of the means, in units of the sides' pooled standard deviation (Cohen's d).
        auc: the share of (positive, negative) with the positive above; ties count half. 0.5 is chance.
    """

    d: float
    auc: float


def separation(positive: Tensor, negative: Tensor, vector: Tensor) -> Separation:
    """Return how well projections of states (texts, d) onto `vector` (d,) tell the sides apart."""
    unit = vector.double() / vector.double().norm()
    p, n = positive.double() @ unit, negative.double() @ unit
    spread = ((p.var(unbiased=False) + n.var(unbiased=False)) / 2).sqrt()
    gap = p.unsqueeze(1) - n.unsqueeze(0)
    d = float((p.mean() - n.mean()) / spread) if spread > 0 else float("inf")
    return Separation(d, float(((gap > 0).double() + (gap == 0).double() / 2).mean()))
