"""What a diagnosis records of a layer: plain numbers, as JSON has them."""

from __future__ import annotations

from dataclasses import dataclass

from ..adapters.parameters import SITE

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 101  # of the cosine, over [-1, 1]; odd, so that 0 is inside one
LEADING = 8  # singular vectors compared


@dataclass(frozen=True)
class Spread:
    """A quantity over the tokens for which it is defined: how many, their mean, and their quantiles at LEVELS."""

    tokens: int
    mean: float
    quantiles: dict[str, float]


@dataclass(frozen=True)
class Cosine(Spread):
    """counts: tokens in each of BINS equal bins of [-1, 1]."""

    counts: tuple[int, ...]


@dataclass(frozen=True)
class Alignment:
    """Of LoRA's update and steering's.

    singular: |u_iᵀ u'_j|, a row for each leading left singular vector u_i of LoRA's, a column for each of steering's.
    principal: the cosines of the principal angles between the two column spaces, largest first.
    """

    singular: tuple[tuple[float, ...], ...]
    principal: tuple[float, ...]


@dataclass(frozen=True)
class LayerDiagnosis:
    """One site of a steered layer. What it has not is None, and `absent` says why, by name.

    mlp_source: what y was: "residual add", the operand of the block's last add; or the path of the module whose output
    it was.
    """

    layer: int
    kind: str
    mlp_source: str | None
    mlp_share: Spread | None
    alignment: Alignment | None
    cosine: Cosine | None
    spectral_norm: float | None
    shift: Spread | None
    absent: dict[str, str]
    site: str = SITE
