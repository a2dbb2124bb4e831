"""Slots: room at one layer for several adapters, as the op that steers each token by its own takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.parameters import DOWN, DOWN_BIAS, NAMES, UP, UP_BIAS, shapes_of
from ..kernels import ACTIVATIONS, MAX_RANK, select_backend
from ..kernels.grouped import Routing, post_block_grouped, post_block_routed
from ..kernels.plan import Plan, keep, no_plan
from ..model.site import Site
from ..positions import Positions

#: Tensors by layer, by adapter and by name below the site.
LoadedAdapters = Mapping[int, Mapping[str, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Held:
    """The adapters of a batch in slots, as long as it runs.

    numbers: each adapter's slot; slots: by layer; scales: each adapter's own strength; positions: and its positions.
    """

    numbers: Mapping[str, int]
    slots: Mapping[int, Slots]
    scales: Mapping[str, float]
    positions: Mapping[str, Positions]


def adapters_at(sites: Mapping[int, Site], names: Iterable[str]) -> LoadedAdapters:
    """W1, b1, W2 and b2 of adapters that a model has loaded. An adapter that skips a layer is not there."""
    names = list(names)
    return {
        index: {name: adapter.steered() for name in names if (adapter := site.adapter(name)) is not None}
        for index, site in sites.items()
    }


class LoadedSlots:
    """Adapters that a model has loaded, copied into slots of several layers.

    numbers: each adapter's slot, the same in all layers; slots: by layer, for layers that one of them steers.
    """

    @torch.inference_mode(False)  # whose tensors cannot be written to outside it
    def __init__(self, layers: LoadedAdapters, activations: Mapping[str, str]) -> None:
        """Make room, and `fill` it.

        Args:
            layers: tensors by layer, by adapter and by name below the site. An adapter that skips a layer is not there.
            activations: φ of each adapter, by name.
        """
        self.numbers = {name: number for number, name in enumerate(activations)}
        self.slots: dict[int, Slots] = {}
        self._kind = self._kind_of(layers, activations)
        self._places: list[Tensor] = []  # in the slots, of each tensor
        codes = torch.tensor([ACTIVATIONS.index(activation) for activation in activations.values()], dtype=torch.int32)
        for index, adapters in layers.items():
            if adapters:
                slots = self.slots[index] = slots_for(adapters, len(activations))
                slots.codes.copy_(codes)
                for name, tensors in adapters.items():
                    self._places += slots.places(self.numbers[name], tensors).values()
        self.fill(layers)

    def __reduce__(self) -> Any:
        return type(None), ()  # a copied model makes its own

    def fits(self, layers: LoadedAdapters, activations: Mapping[str, str]) -> bool:
        """Whether `fill` can take these: the same adapters in the same layers, of the same shapes, where they were."""
        return self._kind == self._kind_of(layers, activations)

    @torch.inference_mode(False)
    @torch.no_grad()
    def fill(self, layers: LoadedAdapters) -> None:
        """Copy the values as they are now, by one launch or a few for all of them."""
        tensors = [t for adapters in layers.values() for named in adapters.values() for t in named.values()]
        if tensors:
            torch._foreach_copy_(self._places, tensors)

    @staticmethod
    def _kind_of(layers: LoadedAdapters, activations: Mapping[str, str]) -> tuple[Any, ...]:
        return tuple(activations.items()), [
            (index, name, key, tensor.shape, tensor.dtype, tensor.device)
            for index, adapters in layers.items()
            for name, tensors in adapters.items()
            for key, tensor in tensors.items()
        ]


def slots_for(adapters: Mapping[str, Mapping[str, Tensor]], count: int) -> Slots:
    """Empty slots with room for these adapters of one layer, of their dtype where they share one, else float32."""
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


class Slots(nn.Module):
    """The adapters of one layer, A of them, ranks padded with zeros to r. A slot of zeros is an adapter that skips it.

    Buffers, none of which a state dict holds; absent ones are None:
        downs (A, r, d), ups (A, d, r): W1 and W2; without them (r = 0) the slots are for steering vectors.
        down_biases (A, r), up_biases (A, d): b1 and b2.
        codes (A,) int32: the place in `ACTIVATIONS` of each slot's φ.
    """

    downs: Tensor | None
    ups: Tensor | None
    down_biases: Tensor | None
    up_biases: Tensor | None
    codes: Tensor
    last_trained = staticmethod(no_plan)  # no call with gradients is planned

    @torch.inference_mode(False)  # whose tensors cannot be written to outside it
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
        """Empty slots.

        Args:
            count: A.
            rank: r, the highest of an adapter, at most 256; 0 for steering vectors alone, which need `up_bias`.
            hidden: d.
            dtype: of the values: float32, bfloat16 or float16.
            down_bias, up_bias: whether there is room for b1, for b2.
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
        # The buffers as the op takes them: nn.Module takes long to look each up.
        self.weights: Any = None
        self._plans: dict[Any, Callable[..., Tensor | None]] = {}
        #: The last plan: a function of residual, branch and `operands`, which gives None where it is not for them.
        self.last: Callable[..., Tensor | None] = no_plan
        self.backend: str | None = None  # that of the last call of `routed`
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
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())

    @torch.no_grad()
    def put(self, slot: int, tensors: Mapping[str, Tensor], activation: str) -> None:
        """Let a slot hold an adapter, in place of what it held; values are converted to the slots' dtype.

        Args:
            slot: below A.
            tensors: by their names below the site: steer_down.weight (k, d) and steer_up.weight (d, k) with k at most
                r, or neither; steer_down.bias (k,); steer_up.bias (d,). From any device.
            activation: φ by name; that of a vector is "identity".

        Raises:
            ValueError: what the slots have no room for, or no adapter has; nothing is written then.
        """
        self._check_slot(slot)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
        places = self.places(slot, tensors)
        self.clear(slot)  # what is above an adapter's rank is zero: φ(0) = 0, and W2 has nothing there
        for name, place in places.items():
            place.copy_(tensors[name])
        self.codes[slot] = ACTIVATIONS.index(activation)

    def places(self, slot: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Where a slot has room for an adapter's tensors, by name. Beyond an adapter's rank a slot has zeros.

        Raises:
            ValueError: see `put`.
        """
        self._check(tensors)
        rooms = {DOWN: self.downs, DOWN_BIAS: self.down_biases, UP: self.ups, UP_BIAS: self.up_biases}
        found = {}
        for name, tensor in tensors.items():
            room, ranks = rooms[name], 1 if name == UP else 0
            assert room is not None  # as `_check` saw
            found[name] = room[slot].narrow(ranks, 0, tensor.shape[ranks])
        return found

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Let a slot hold nothing: a shift of zero, which leaves the very bits."""
        self._check_slot(slot)
        for buffer in self.buffers():
            buffer[slot].zero_()

    def forward(
        self,
        residual: Tensor,
        branch: Tensor | None,
        ids: Tensor,
        gain: Tensor | None = None,
        into_branch: bool = False,
    ) -> Tensor:
        """residual + branch, each token steered by the adapter of its slot: see `post_block_grouped`.

        Args:
            residual, branch: (..., d).
            ids: (...), the slots, int32 or int64; a negative one is no adapter.
            gain: (...), strength included; None is 1.
            into_branch: write branch + shift into `branch`, and leave the residual un-added.
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
            into_branch=into_branch,
        )

    def routed(self, residual: Tensor, branch: Tensor | None, routing: Routing) -> Tensor:
        """The same of tokens whose routing is worked out, outside of compiled graphs and without a gradient.

        Args:
            residual, branch: (..., d), float32, bfloat16 or float16, on the device of the slots and the routing.
        """
        run = self._plans.get(residual.shape)
        if run is not None and branch is not None:
            out = run(residual, branch, self.operands(routing))
            if out is not None:
                self.last, self.backend = run, "triton"
                return out
        return self._routed(residual, branch, routing)

    def operands(self, routing: Routing) -> tuple[Tensor, ...]:
        """What a plan's function takes behind residual and branch."""
        if self.weights is None:
            buffers = (self.downs, self.ups, self.down_biases, self.up_biases, self.codes)
            self.weights = (buffers, tuple(b for b in buffers if b is not None))
        return (*routing.operands, *self.weights[1])

    def _routed(self, residual: Tensor, branch: Tensor | None, routing: Routing) -> Tensor:
        operands = self.operands(routing)
        buffers = self.weights[0]
        shape = (*routing.places, self.hidden)
        if residual.shape != shape or branch is not None and branch.shape != shape:
            shapes = (tuple(t.shape) for t in (residual, branch) if t is not None)
            raise ValueError(f"residual and branch have the shapes {', '.join(map(str, shapes))}; expected {shape}")
        if residual.dtype not in _DTYPES or branch is not None and branch.dtype not in _DTYPES:
            dtypes = (str(t.dtype) for t in (residual, branch) if t is not None)
            raise TypeError(f"residual and branch are {', '.join(dtypes)}; expected float32, bfloat16 or float16")
        if residual.device != buffers[4].device:
            raise ValueError(f"residual is on {residual.device}; expected {buffers[4].device}, where the slots are")
        backend = self.backend = select_backend(residual.device)
        if backend != "triton" or branch is None:
            return post_block_routed(residual, branch, buffers, routing, backend)
        (out,), plan = Plan.make(
            (residual, branch, *operands), lambda: (post_block_routed(residual, branch, buffers, routing, backend),)
        )
        if plan is not None:
            keep(self._plans, residual.shape, plan.run)
            self.last = plan.run
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Slots:
        self.weights, self.last = None, no_plan  # the buffers are other tensors then
        self._plans.clear()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"weights": None, "_plans": {}, "last": no_plan}  # copies plan for themselves

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
