"""The slot and the gain of each token of a batch, in buffers that all layers of a model read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..serving.options import token_gains
from ..serving.requests import Request

if TYPE_CHECKING:
    from .dose import Meter


class Batch:
    """The buffers of one model. Their addresses never change, because CUDA graphs read them.

    Attributes:
        ids: (most tokens,) int32, each token's slot, -1 for none.
        gains: (most tokens,) float32, each token's strength, or 0 if its request does not steer it.
        idle: whether no request of the batch is steered. Then no layer launches anything.
        meter: measures the doses of the tokens, or None.
    """

    def __init__(self, tokens: int, device: torch.device | str) -> None:
        """
        Args:
            tokens: the most tokens of a batch, padding included.
        """
        self.ids = torch.full((tokens,), -1, dtype=torch.int32, device=device)
        self.gains = torch.ones(tokens, dtype=torch.float32, device=device)
        self.idle = False  # until the first batch, so that warm-ups and captured graphs have the launches
        self.meter: Meter | None = None
        self._filled = 0  # tokens that may have a slot

    def fill(
        self,
        slots: Sequence[int],
        scales: Sequence[float],
        options: Sequence[Request | None],
        prompts: Sequence[int],
        computed: Sequence[int],
        counts: Sequence[int],
    ) -> None:
        """Fill in the tokens of a batch, in the order of its requests.

        Args:
            slots: of each request, -1 for none. For the other arguments see `token_gains`.

        Raises:
            ValueError: there are more tokens than room.
        """
        gains = token_gains(scales, options, prompts, computed, counts)
        ids = np.repeat(np.asarray(slots, dtype=np.int32), np.asarray(counts, dtype=np.int64))
        tokens = len(ids)
        if tokens > len(self.ids):
            raise ValueError(f"the batch has {tokens} tokens; expected at most {len(self.ids)}")
        self.ids[:tokens].copy_(torch.from_numpy(ids), non_blocking=True)
        self.gains[:tokens].copy_(torch.from_numpy(gains), non_blocking=True)
        if tokens < self._filled:
            self.ids[tokens : self._filled].fill_(-1)  # padding is not steered
        self._filled, self.idle = tokens, False
        if self.meter is not None:
            self.meter.look()

    def rest(self) -> None:
        """Note a batch without steered requests."""
        if self._filled:
            # A captured graph may have the launches all the same.
            self.ids[: self._filled].fill_(-1)
            self._filled = 0
        self.idle = True
        if self.meter is not None:
            self.meter.look()
