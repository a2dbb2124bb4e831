"""Bounds the relative dose of steering: |scale| · ‖shift‖ / ‖h‖ of a token in a layer, h before the shift.

`highest_dose` bounds it before a request runs, from the norms of the adapter. `Meter` measures it in each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from vllm.logger import init_logger

from ..adapters.parameters import DOWN, DOWN_BIAS, UP, UP_BIAS, ByPlace
from ..serving.slots import Slots
from .options import CLAMP, KEY, Dose

logger = init_logger(f"vllm.{__name__}")


def highest_dose(places: ByPlace, activation: str, norm: float | None) -> float:
    """Return a bound of ‖shift‖ / ‖h‖ over all h and all layers, at strength 1.

    |φ(a)| ≤ |a| for every activation, so ‖W2 φ(W1 h + b1) + b2‖ ≤ ‖W2‖ (‖W1‖ ‖h‖ + ‖b1‖) + ‖b2‖, in spectral norms. If
    φ is the identity, ‖W2 W1‖ takes the place of ‖W2‖ ‖W1‖.

    Args:
        places: W1, b1, W2 and b2 by place.
        activation: the name of φ.
        norm: the least ‖h‖, for biases. None: 0, so that the bound of an adapter with biases is infinite.
    """
    return max((_highest(tensors, activation, norm) for tensors in places.values()), default=0.0)


def _highest(tensors: dict[str, Tensor], activation: str, norm: float | None) -> float:
    dose = constant = 0.0
    if DOWN in tensors:
        down, up = tensors[DOWN].double(), tensors[UP].double()
        down_norm, up_norm = (float(torch.linalg.matrix_norm(weight, 2)) for weight in (down, up))
        if activation == "identity":
            triangle = torch.linalg.qr(up, mode="r").R  # (r, r) with the singular values of W2
            dose = float(torch.linalg.matrix_norm(triangle @ down, 2))
        else:
            dose = up_norm * down_norm
        if DOWN_BIAS in tensors:
            constant = up_norm * float(tensors[DOWN_BIAS].double().norm())
    if UP_BIAS in tensors:
        constant += float(tensors[UP_BIAS].double().norm())
    if constant:
        dose += math.inf if norm is None else constant / norm
    return dose


def refusal(highest: float, scale: float, dose: Dose) -> str | None:
    """Return why a request of this strength is refused, or None if it is not.

    Args:
        highest: the bound at strength 1.
    """
    if abs(scale) * highest <= dose.limit or not scale:
        return None
    if math.isinf(highest):
        missing = f"no bound without {KEY}.dose.norm, because the adapter has biases or is a vector"
        return f"scale is {scale:g}, and the relative dose has {missing}; expected at most {dose.limit:g} ({KEY}.dose)"
    return (
        f"scale is {scale:g}, with a relative dose of up to {abs(scale) * highest:.3g}; expected at most "
        f"{dose.limit:g} ({KEY}.dose), a scale of at most {dose.limit / highest:.3g} in magnitude"
    )


class Meter:
    """Measures the relative dose of each token in each layer, and counts those above the limit. No step waits for it.

    Attributes:
        peaks: (slots + 1,) float32, the highest dose of each slot before it was lowered, over all layers. The last
            entry is for tokens without an adapter.
        above: (slots + 1,) int64, how many times a token in a layer was above the limit.
    """

    def __init__(self, dose: Dose, slots: int, device: torch.device, name_of: Callable[[int], str | None]) -> None:
        """
        Args:
            dose: the limit, and whether it is kept.
            slots: their number.
            name_of: returns the name of the adapter in a slot.
        """
        self._dose, self._slots, self._name_of = dose, slots, name_of
        self.peaks = torch.zeros(slots + 1, dtype=torch.float32, device=device)
        self.above = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        pinned = device.type == "cuda"
        self._host = torch.zeros(slots + 1, dtype=torch.float32, pin_memory=pinned)
        self._copied = torch.cuda.Event() if pinned else None
        self._copying = False
        self._said: set[int] = set()

    def gains(self, slots: Slots, hidden: Tensor, residual: Tensor | None, ids: Tensor, gains: Tensor) -> Tensor:
        """Measure the doses of a layer's tokens; return their gains, lowered to the limit if the action is "clamp".

        Args:
            slots: those of the layer.
            hidden, residual: (N, d), h = hidden + residual.
            ids, gains: (N,), each token's slot and its gain times strength.

        Returns:
            (N,). A gain that is not lowered keeps its bits.
        """
        h = hidden.float()
        if residual is not None:
            h = h + residual.float()
        shift = (slots(h, None, ids, gains) - h).norm(dim=1)
        doses = torch.where(shift == 0, shift, shift / h.norm(dim=1))
        numbers = torch.where(ids < 0, self._slots, ids).long()
        is_above = doses > self._dose.limit
        self.peaks.scatter_reduce_(0, numbers, doses, "amax")
        self.above.index_add_(0, numbers, is_above.long())
        return torch.where(is_above, gains * (self._dose.limit / doses), gains) if self._dose.action == CLAMP else gains

    def forget(self, slot: int) -> None:
        """Begin with a slot's next adapter."""
        self.peaks[slot].zero_()
        self.above[slot].zero_()
        self._said.discard(slot)
        self._copying = False  # what is being copied is the former adapter's

    def look(self) -> None:
        """Log the adapters that were above the limit, once each. It sees the doses of an earlier step."""
        if self._copying and (self._copied is None or self._copied.query()):
            self._copying = False
            kept = "was held to the limit" if self._dose.action == CLAMP else "was not lowered"
            for slot in torch.nonzero(self._host[: self._slots] > self._dose.limit).flatten().tolist():
                if slot in self._said or (name := self._name_of(slot)) is None:
                    continue
                self._said.add(slot)
                peak = float(self._host[slot])
                text = "Adapter %r reached a relative dose of %.3g, above the limit %.3g (%s.dose); it %s"
                logger.warning(text, name, peak, self._dose.limit, KEY, kept)
        if not self._copying:
            self._host.copy_(self.peaks, non_blocking=True)
            if self._copied is not None:
                self._copied.record()
            self._copying = True
