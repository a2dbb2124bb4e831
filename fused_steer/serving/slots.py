"""Slots hold several adapters of one layer in stacked tensors, for the op that steers each token by its own adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.distributed import check_whole
from ..adapters.parameters import DOWN, DOWN_BIAS, NAMES, UP, UP_BIAS, Place, shapes_of
from ..kernels import ACTIVATIONS, MAX_RANK, select_backend
from ..kernels.grouped import Routing, post_block_grouped, post_block_routed
from ..kernels.grouped_norm import post_block_grouped_norm
from ..kernels.norm_torch import Norm
from ..kernels.plan import SHARED, Plan, keep, kind_of, no_plan
from ..model.site import Site
from ..positions import Positions

#: Tensors by place, by adapter and by name below the site.
LoadedAdapters = Mapping[Place, Mapping[str, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Held:
    """The adapters of a running batch, held in slots.

    Attributes:
        numbers: each adapter's slot.
        slots: the slots of each place.
        scales: each adapter's own strength.
        positions: each adapter's own positions.
    """

    numbers: Mapping[str, int]
    slots: Mapping[Place, Slots]
    scales: Mapping[str, float]
    positions: Mapping[str, Positions]


def adapters_at(sites: Mapping[Place, Site], names: Iterable[str]) -> LoadedAdapters:
    """Return W1, b1, W2 and b2 of adapters that a model has loaded. A place that an adapter skips does not list it.

    Raises:
        ValueError: FSDP or ZeRO has sharded an adapter, so that this process has only a part of it.
    """
    names = list(names)
    for place, site in sites.items():
        for name in (name for name in names if site.adapter(name) is not None):
            check_whole(site, str(place), f"adapter {name!r}, which a batch (or generate, with positions) copies,")
    return {
        place: {name: adapter.steered() for name in names if (adapter := site.adapter(name)) is not None}
        for place, site in sites.items()
    }


class LoadedSlots:
    """Copies in slots of adapters that a model has loaded, over several places.

    Attributes:
        numbers: each adapter's slot, the same at all places.
        slots: the slots of each place that one of the adapters steers.
    """

    @torch.inference_mode(False)  # an inference tensor cannot be written to outside inference mode
    def __init__(self, places: LoadedAdapters, activations: Mapping[str, str]) -> None:
        """Make the slots and fill them.

        Args:
            places: tensors by place, by adapter and by name below the site. A place that an adapter skips does not list
                it.
            activations: φ of each adapter, by name.
        """
        self.numbers = {name: number for number, name in enumerate(activations)}
        self.slots: dict[Place, Slots] = {}
        self._kind = self._kind_of(places, activations)
        self._places: list[Tensor] = []  # the view in the slots of each tensor
        codes = torch.tensor([ACTIVATIONS.index(activation) for activation in activations.values()], dtype=torch.int32)
        for place, adapters in places.items():
            if adapters:
                slots = self.slots[place] = slots_for(adapters, len(activations))
                slots.codes.copy_(codes)
                for name, tensors in adapters.items():
                    self._places += slots.places(self.numbers[name], tensors).values()
        self.fill(places)

    def __reduce__(self) -> Any:
        return type(None), ()  # a copied model makes its own slots

    def fits(self, places: LoadedAdapters, activations: Mapping[str, str]) -> bool:
        """Return whether `fill` can copy these adapters: names, places, shapes, dtypes and devices must be the same."""
        return self._kind == self._kind_of(places, activations)

    @torch.inference_mode(False)
    @torch.no_grad()
    def fill(self, places: LoadedAdapters) -> None:
        """Copy the adapters' present values, by a few launches for all of them."""
        tensors = [t for adapters in places.values() for named in adapters.values() for t in named.values()]
        if tensors:
            torch._foreach_copy_(self._places, tensors)

    @staticmethod
    def _kind_of(places: LoadedAdapters, activations: Mapping[str, str]) -> tuple[Any, ...]:
        return tuple(activations.items()), [
            (place, name, key, tensor.shape, tensor.dtype, tensor.device)
            for place, adapters in places.items()
            for name, tensors in adapters.items()
            for key, tensor in tensors.items()
        ]


def slots_for(adapters: Mapping[str, Mapping[str, Tensor]], count: int) -> Slots:
    """Return empty slots with room for these adapters at one place. Mixed dtypes become float32."""
    tensors = [tensor for named in adapters.values() for tensor in named.values()]
    dtypes = {tensor.dtype for tensor in tensors}
    downs = [named[DOWN] for named in adapters.values() if DOWN in named]
    hidden = next(t.shape[0] for named in adapters.values() for name, t in named.items() if name in (UP, UP_BIAS))
    return Slots(
        count,
        max((down.shape[0] for down in downs), default=0),
        hidden,
        dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,
        device=tensors[0].device,
        down_bias=any(DOWN_BIAS in named for named in adapters.values()),
        up_bias=any(UP_BIAS in named for named in adapters.values()),
    )


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: The plans of all slots by the kind of call. The layers of a model share them, so that they stay in the processor's
#: caches between two layers.
_shared: dict[Any, Callable[..., Tensor | None]] = {}


class Slots(nn.Module):
    """The A adapters of one place, in stacked tensors. Ranks are padded with zeros to r.

    A slot of zeros is an adapter that skips the place. The buffers are not in the state dict. Missing ones are None.

    Attributes:
        downs, ups: W1 (A, r, d) and W2 (A, d, r). None at r = 0, for steering vectors.
        down_biases, up_biases: b1 (A, r) and b2 (A, d).
        codes: (A,) int32, the index in `ACTIVATIONS` of each slot's φ.
    """

    downs: Tensor | None
    ups: Tensor | None
    down_biases: Tensor | None
    up_biases: Tensor | None
    codes: Tensor
    last_trained = staticmethod(no_plan)  # a call with gradients has no plan

    @torch.inference_mode(False)  # an inference tensor cannot be written to outside inference mode
    def __init__(
        self,
        count: int,
        rank: int,
        hidden: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        down_bias: bool = False,
        up_bias: bool = False,
    ) -> None:
        """Make empty slots.

        Args:
            count: A.
            rank: r, the highest rank of an adapter, at most 256. 0 for steering vectors only, which need `up_bias`.
            hidden: d.
            dtype: float32, bfloat16 or float16.
            device: the device of the buffers.
            down_bias, up_bias: whether there is room for b1 and for b2.
        """
        super().__init__()
        if count < 1:
            raise ValueError(f"count is {count}; expected at least one slot")
        if not 0 <= rank <= MAX_RANK:
            raise ValueError(f"rank is {rank}; expected 0 to {MAX_RANK}")
        if not rank and (down_bias or not up_bias):
            raise ValueError(
                f"down_bias is {down_bias} and up_bias {up_bias} with rank 0, of vectors; expected False and True"
            )
        if dtype not in _DTYPES:
            raise TypeError(f"dtype is {dtype}; expected float32, bfloat16 or float16")
        self.count, self.rank, self.hidden = count, rank, hidden
        # The buffers as the op takes them, because looking each up in nn.Module is slow.
        self.weights: Any = None
        self._plans: dict[Any, Callable[..., Tensor | None]] = {}
        #: The last plan: a function of residual, branch and `operands` that returns None if it does not apply.
        self.last: Callable[..., Tensor | None] = no_plan
        self.backend: str | None = None  # the backend of the last call of `routed`
        for name, there, shape in (
            ("downs", rank > 0, (count, rank, hidden)),
            ("ups", rank > 0, (count, hidden, rank)),
            ("down_biases", down_bias, (count, rank)),
            ("up_biases", up_bias, (count, hidden)),
        ):
            values = torch.zeros(shape, dtype=dtype, device=device) if there else None
            self.register_buffer(name, values, persistent=False)
        self.register_buffer("codes", torch.zeros(count, dtype=torch.int32, device=device), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that adapters are converted to."""
        return next(buffer.dtype for buffer in self.buffers() if buffer.is_floating_point())

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())

    @torch.no_grad()
    def put(self, slot: int, tensors: Mapping[str, Tensor], activation: str) -> None:
        """Write an adapter into a slot. Values are converted to the slots' dtype.

        Args:
            slot: the slot, below A.
            tensors: by name below the site, from any device. steer_down.weight (k, d) and steer_up.weight (d, k) with k
                at most r, or neither; steer_down.bias (k,); steer_up.bias (d,).
            activation: the name of φ, "identity" for a vector.

        Raises:
            ValueError: the slots have no room for a tensor, or an adapter has no such tensor. Nothing is written.
        """
        self._check_slot(slot)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
        places = self.places(slot, tensors)
        self.clear(slot)  # so that W1 and W2 are zero above the adapter's rank, and φ(0) = 0
        for name, place in places.items():
            place.copy_(tensors[name])
        self.codes[slot] = ACTIVATIONS.index(activation)

    def places(self, slot: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the views of a slot that an adapter's tensors go to, by name.

        Raises:
            ValueError: see `put`.
        """
        self._check(tensors)
        rooms = {DOWN: self.downs, DOWN_BIAS: self.down_biases, UP: self.ups, UP_BIAS: self.up_biases}
        found = {}
        for name, tensor in tensors.items():
            room, ranks = rooms[name], 1 if name == UP else 0
            assert room is not None  # `_check` has refused such a tensor
            found[name] = room[slot].narrow(ranks, 0, tensor.shape[ranks])
        return found

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Empty a slot. An empty slot keeps a token's hidden state bit for bit."""
        self._check_slot(slot)
        for buffer in self.buffers():
            buffer[slot].zero_()

    def forward(
        self,
        residual: Tensor,
        branch: Tensor | None,
        ids: Tensor,
        gain: Tensor | None = None,
        reads: str = "sum",
        into_branch: bool = False,
    ) -> Tensor:
        """Return residual + branch, each token steered by the adapter of its slot: see `post_block_grouped`.

        Args:
            residual, branch: (..., d).
            ids: (...), int32 or int64, each token's slot. A negative one means no adapter.
            gain: (...), each token's gain times strength. None means 1.
            reads: what steers, "sum" or "branch".
            into_branch: write branch + shift into `branch`, and do not add the residual.
        """
        return post_block_grouped(
            residual,
            branch,
            self.downs,
            self.ups,
            ids,
            down_biases=self.down_biases,
            up_biases=self.up_biases,
            activation=self.codes,
            gain=gain,
            reads=reads,
            into_branch=into_branch,
        )

    def normalised(
        self, residual: Tensor, branch: Tensor, ids: Tensor, gain: Tensor | None, norm: Norm
    ) -> tuple[Tensor, Tensor]:
        """Steer as `forward` does, and normalise, in place of both: see `post_block_grouped_norm`.

        Args:
            residual, branch, ids, gain: as in `forward`.
            norm: the RMSNorm.

        Returns:
            residual, which is the steered sum now, and branch, which is the normalised one.
        """
        weight, eps, plus_one, rounds_first = norm
        return post_block_grouped_norm(
            residual,
            branch,
            self.downs,
            self.ups,
            ids,
            norm_weight=weight,
            eps=eps,
            plus_one=plus_one,
            rounds_first=rounds_first,
            down_biases=self.down_biases,
            up_biases=self.up_biases,
            activation=self.codes,
            gain=gain,
            in_place=True,
        )

    def routed(self, residual: Tensor, branch: Tensor | None, routing: Routing, reads: str = "sum") -> Tensor:
        """Steer tokens by a routing that is already computed, outside of compiled graphs and without gradients.

        `reads` is the same in all calls.

        Args:
            residual, branch: (..., d), float32, bfloat16 or float16, on the device of the slots and the routing.
            routing: the tokens sorted by slot.
        """
        run = self._plans.get(residual.shape)
        if run is not None and branch is not None:
            out = run(residual, branch, self.operands(routing))
            if out is not None:
                self.last, self.backend = run, "triton"
                return out
        return self._routed(residual, branch, routing, reads)

    def operands(self, routing: Routing) -> tuple[Tensor, ...]:
        """Return the arguments of a plan's function after residual and branch."""
        if self.weights is None:
            buffers = (self.downs, self.ups, self.down_biases, self.up_biases, self.codes)
            self.weights = (buffers, tuple(b for b in buffers if b is not None))
        return (*routing.operands, *self.weights[1])

    def _routed(self, residual: Tensor, branch: Tensor | None, routing: Routing, reads: str) -> Tensor:
        operands = self.operands(routing)
        buffers = self.weights[0]
        shape = (*routing.places, self.hidden)
        if residual.shape != shape or branch is not None and branch.shape != shape:
            shapes = (tuple(t.shape) for t in (residual, branch) if t is not None)
            raise ValueError(
                f"residual and branch have the shapes {', '.join(map(str, shapes))}; expected {shape}, (rows, tokens, "
                "d): each row has its own adapter"
            )
        if residual.dtype not in _DTYPES or branch is not None and branch.dtype not in _DTYPES:
            dtypes = (str(t.dtype) for t in (residual, branch) if t is not None)
            raise TypeError(f"residual and branch are {', '.join(dtypes)}; expected float32, bfloat16 or float16")
        if residual.device != buffers[4].device:
            raise ValueError(f"residual is on {residual.device}; expected {buffers[4].device}, as the slots")
        backend = self.backend = select_backend(residual.device)
        if backend != "triton" or branch is None:
            return post_block_routed(residual, branch, buffers, routing, backend, reads)
        there = tuple(buffer is not None for buffer in buffers)
        kind = (reads, there, routing.gain is None, kind_of((residual, branch, *operands)))
        run = _shared.get(kind)
        out = None if run is None else run(residual, branch, operands)
        if out is None:
            (out,), plan = Plan.make(
                (residual, branch, *operands),
                lambda: (post_block_routed(residual, branch, buffers, routing, backend, reads),),
            )
            run = None if plan is None else plan.run
        if run is not None:
            keep(_shared, kind, run, SHARED)
            keep(self._plans, residual.shape, run)
            self.last = run
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Slots:
        self.weights, self.last = None, no_plan  # the buffers are replaced
        self._plans.clear()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"weights": None, "_plans": {}, "last": no_plan}  # a copy makes its own plans

    def extra_repr(self) -> str:
        return f"count={self.count}, rank={self.rank}, hidden={self.hidden}, nbytes={self.nbytes}"

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.count:
            raise ValueError(f"slot is {slot}; expected 0 to {self.count - 1}")

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        for name in tensors:
            if name not in NAMES:
                raise ValueError(f"tensors has {name!r}; expected names among {', '.join(NAMES)}")
        down = tensors.get(DOWN)
        if (down is None) != (UP not in tensors):
            raise ValueError(f"tensors has one of {DOWN} and {UP}; expected both or neither")
        if down is None and UP_BIAS not in tensors:
            raise ValueError(f"tensors has {list(tensors)}; expected {DOWN} and {UP}, or {UP_BIAS}")
        if down is None and DOWN_BIAS in tensors:
            raise ValueError(f"tensors has {DOWN_BIAS} without {DOWN}; expected both or neither")
        rank = down.shape[0] if down is not None and down.dim() else 0
        if rank > self.rank:
            raise ValueError(f"{DOWN} is of rank {rank}; expected at most {self.rank}, the rank of the slots")
        for name, room in ((DOWN_BIAS, self.down_biases), (UP_BIAS, self.up_biases)):
            if name in tensors and room is None:
                raise ValueError(f"tensors has {name}; expected none, as the slots have no room for it")
        for name, shape in shapes_of(rank, self.hidden).items():
            if name in tensors and tuple(tensors[name].shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}; expected {shape}")
