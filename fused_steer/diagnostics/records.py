"""The measured quantities of one layer, as plain numbers that JSON can hold."""

from __future__ import annotations

from dataclasses import dataclass

from ..adapters.parameters import SITE

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 101  # bins of the cosine over [-1, 1]; an odd number, so that 0 is inside a bin
ASLEEP = 1e-3  # a layer does nothing if its median ‖δ‖/‖h‖ is smaller
LEADING = 8  # number of singular vectors compared


@dataclass(frozen=True)
class Spread:
    """The distribution of a quantity over tokens.

    Attributes:
        tokens: the number of tokens for which the quantity is defined.
        mean: the mean over these tokens.
        quantiles: the quantiles at LEVELS, by level.
    """

    tokens: int
    mean: float
    quantiles: dict[str, float]


@dataclass(frozen=True)
class Cosine(Spread):
    """The distribution of the cosine between the steering's shift and the LoRA's.

    Attributes:
        counts: the number of tokens in each of BINS equal bins of [-1, 1].
    """

    counts: tuple[int, ...]


@dataclass(frozen=True)
class Alignment:
    """The angles between the column spaces of LoRA's update and of steering's.

    Attributes:
        singular: |u_iᵀ u'_j|. Row i is LoRA's left singular vector u_i, column j is steering's u'_j, leading first.
        principal: the cosines of the principal angles between the two column spaces, largest first.
    """

    singular: tuple[tuple[float, ...], ...]
    principal: tuple[float, ...]


@dataclass(frozen=True)
class LayerDiagnosis:
    """The quantities of one site of a steered layer. A quantity that is not defined there is None.

    Attributes:
        layer: the layer's index.
        kind: how the layer is steered, as in `Steering.report`.
        mlp_source: where the MLP's output y was read: "residual add" for an operand of the block's last add, or the
            path of a module.
        absent: why each missing quantity is missing, by its name.
        site: the site's name.
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
