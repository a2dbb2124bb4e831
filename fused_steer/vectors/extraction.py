"""`extract`: a vector for each layer from contrasting texts, as an adapter of `form="vector"`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from ..adapters.files import AdapterFile
from ..adapters.parameters import UP_BIAS, Layout, Place
from ..config import SteerConfig, checked_bool, checked_choice, checked_number
from ..model.decoder import find_decoder, inside_peft
from .directions import check_method, direction, separation
from .hidden import TOKENS, Batches, checked_batches, hidden_states


@dataclass(frozen=True)
class LayerVector:
    """The direction in one layer.

    Attributes:
        layer: the layer's index.
        norm: the vector's length ‖v‖, before it is normalised.
        share: ‖v‖ over the median length of the texts' hidden states there.
        d, auc: see `Separation`: of the texts that were held out, or else of those that the vector was made from.
    """

    layer: int
    norm: float
    share: float
    d: float
    auc: float


@dataclass(frozen=True)
class Extraction:
    """The result of `extract`.

    Attributes:
        adapter: the adapter, for `write_adapter` or `model.steering.add_vector`.
        layers: each of the model's layers, chosen or not.
        texts: the number of positive and negative texts that the vectors were made from.
        held_out: the number of positive and negative texts that the separation was measured on, or (0, 0).
    """

    adapter: AdapterFile
    layers: tuple[LayerVector, ...]
    texts: tuple[int, int]
    held_out: tuple[int, int]

    @property
    def vectors(self) -> dict[int, Tensor]:
        """The adapter's vectors (d,), by layer."""
        return {place.layer: tensors[UP_BIAS] for place, tensors in self.adapter.tensors.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON data. An infinite d, of sides without any spread, is null."""
        rows = [asdict(row) for row in self.layers]
        for row in rows:
            row["d"] = row["d"] if math.isfinite(row["d"]) else None
        return {
            "config": self.adapter.config.to_dict(),
            "texts": list(self.texts),
            "held_out": list(self.held_out),
            "layers": rows,
        }


def extract(
    model: nn.Module,
    positive: Batches,
    negative: Batches,
    *,
    method: str = "mean",
    token: str = "last",
    layers: Sequence[int] | None = None,
    normalise: bool = False,
    scale: float = 1.0,
    held_out: float = 0.0,
    paired: bool = True,
) -> Extraction:
    """Return vectors that point from the negative to the positive texts, as an adapter.

    The model's own steering, if it has any, is off. The model is not changed.

    Args:
        model: a language model.
        positive: batches of `input_ids` and `attention_mask`, as `tools.prompts.encode` makes them.
        negative: the same for the other side.
        method: "mean", "pca" or "pca-center": see `direction`.
        token: "last" or "mean": see `hidden_states`.
        layers: the layers of the adapter. None means all. The separation is measured in every layer.
        normalise: divide each vector by its length.
        scale: the adapter's strength.
        held_out: the share of the texts, the last ones of both sides, that only the separation is measured on.
        paired: whether text i of both sides is a pair.

    Raises:
        TypeError, ValueError: an argument has another form or is out of range, a text has no token, pairs are not as
            many, or the texts give no direction.
    """
    layout = find_decoder(inside_peft(model)).layout
    checked_bool("normalise", normalise)
    config = check_extraction(layout, method, layers, scale, held_out, paired)
    checked_choice("token", token, TOKENS)
    texts = [
        checked_batches(side, given, whole=True) for side, given in (("positive", positive), ("negative", negative))
    ]
    states = [hidden_states(model, batches, token) for batches in texts]  # (layers, texts, d)
    counts = [side.shape[1] for side in states]
    if paired and counts[0] != counts[1]:
        raise ValueError(f"there are {counts[0]} positive and {counts[1]} negative texts; expected pairs, or two sets")
    ends = [count - int(held_out * count) for count in counts]
    rows, tensors = [], {}
    for index in range(layout.num_layers):
        used = [side[index, :end] for side, end in zip(states, ends, strict=True)]
        rest = [side[index, end:] for side, end in zip(states, ends, strict=True)]
        vector = direction(used[0], used[1], method)
        tested = rest if all(map(len, rest)) else used
        measured = separation(tested[0], tested[1], vector)
        length, typical = float(vector.norm()), float(states[0][index].norm(dim=1).median())
        rows.append(LayerVector(index, length, length / typical, measured.d, measured.auc))
        if config.layers is None or index in config.layers:
            kept = vector / length if normalise else vector
            tensors[Place(index)] = {UP_BIAS: kept.float()}
    outside = [count - end for count, end in zip(counts, ends, strict=True)]
    kept_out = (outside[0], outside[1]) if all(outside) else (0, 0)
    return Extraction(AdapterFile(config, layout, tensors), tuple(rows), (ends[0], ends[1]), kept_out)


def check_extraction(
    layout: Layout, method: str, layers: Sequence[int] | None, scale: float, held_out: float, paired: bool
) -> SteerConfig:
    """Check the arguments of `extract`, before a model is loaded. Return the adapter's config.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """
    check_method(method, checked_bool("paired", paired))
    held_out = checked_number("held out", held_out)
    if not 0 <= held_out < 1:
        raise ValueError(f"held out is {held_out}; expected a share of the texts, 0 or more and below 1")
    config = SteerConfig("vector", layers=layers, scale=scale)
    indices = layout.indices(config)
    return SteerConfig("vector", layers=layout.config_layers(indices), scale=scale)
