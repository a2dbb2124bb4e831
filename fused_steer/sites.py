"""SteeringSite: the module that sits in a decoder layer, where the layer's last residual add was."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling

from .config import DTYPES, SteerConfig
from .kernels import post_block, select_backend
from .kernels.orthogonal import project_gradient
from .kernels.planned import PlannedPostBlock
from .slots import Slots
from .watch import note_run, thread

if TYPE_CHECKING:
    from .batch import Batch
    from .patch import PatchedLayer


class Factor(nn.Module):
    """One matrix of an adapter with its bias; either may be absent.

    Not an nn.Linear: what looks for those to quantise, to adapt or to initialise must pass by.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.register_parameter("weight", None if weight is None else nn.Parameter(weight))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))


class Adapter:
    """The parameters of one adapter at one site, before they are attached: W1 and b1, W2 and b2."""

    def __init__(self, down: Factor, up: Factor) -> None:
        self.down = down
        self.up = up

    @classmethod
    def fresh(cls, config: SteerConfig, hidden: int, device: torch.device) -> Adapter:
        """A new adapter that changes nothing: W1 kaiming-uniform (a = √5) times `init_scale`, all else 0."""
        options = {"device": device, "dtype": DTYPES[config.dtype]}
        down = up = None
        if config.rank:
            down = torch.empty(config.rank, hidden, **options)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            down *= config.init_scale
            up = torch.zeros(hidden, config.rank, **options)
        down_bias = torch.zeros(config.rank or 0, **options) if config.down_bias else None
        up_bias = torch.zeros(hidden, **options) if config.up_bias else None
        return cls(Factor(down, down_bias), Factor(up, up_bias))

    @classmethod
    def shapes(cls, config: SteerConfig, hidden: int) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter that an adapter of `config` has, by its name below the site."""
        rank = config.rank or 0
        shapes = {"steer_down.weight": (rank, hidden), "steer_up.weight": (hidden, rank)} if rank else {}
        if config.down_bias:
            shapes["steer_down.bias"] = (rank,)
        if config.up_bias:
            shapes["steer_up.bias"] = (hidden,)
        return shapes

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> Adapter:
        """From tensors by their names below the site, as `shapes` has them."""
        down, up = (
            Factor(tensors.get(f"{side}.weight"), tensors.get(f"{side}.bias")) for side in ("steer_down", "steer_up")
        )
        return cls(down, up)

    def named_tensors(self) -> dict[str, Tensor]:
        named = {}
        for side, factor in (("steer_down", self.down), ("steer_up", self.up)):
            named.update({f"{side}.{name}": p.detach() for name, p in factor.named_parameters()})
        return named


class _LostGradient(torch.autograd.Function):
    """A block's branch that a gradient cannot pass: an error once the gradient is asked for, no silent 0."""

    @staticmethod
    def forward(ctx: Any, branch: Tensor, entering: Tensor) -> Tensor:
        return branch.view_as(branch)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(
            "a steered block passes no gradient from its output to its input, as modules quantised for inference do "
            "not; expected a base that can be trained through"
        )


class SteeringSite(nn.Module):
    """Adds a block's output to the residual stream and steers the sum by the adapter in use.

    Parameters live under `steer_down.<adapter>` and `steer_up.<adapter>`, as PEFT's layers have theirs.
    """

    #: What steers, with its plans, and a function that gives the operands behind residual and branch as they are now:
    #: the adapter's parameters, or, in a batch, each token's slot and what the slots hold. Any assignment drops it.
    _planned: tuple[PlannedPostBlock | Slots, Callable[[], tuple[Tensor, ...]]] | None

    def __init__(self) -> None:
        super().__init__()
        self.steer_down = nn.ModuleDict()
        self.steer_up = nn.ModuleDict()
        self.active: str | None = None  # the adapter in use; None, or one that skips this layer: a plain add
        self.enabled = True
        self.activation = "identity"  # of the active adapter, as is scale
        self.scale = 1.0
        self.patched: PatchedLayer | None = None  # the layer that it sits in
        self.calls = 0  # eager ones since reset
        self.backend: str | None = None  # that of the last eager call
        self.strength: Tensor  # scale as an input of compiled graphs: as a number it would be a constant of each
        self.register_buffer("strength", None, persistent=False)
        self._set_strength(torch.device("cpu"))
        self.basis: Tensor | None  # V (d, k) float32, where W2 and b2 are kept orthogonal to it while they train
        self.register_buffer("basis", None, persistent=False)
        self.batch: Batch | None = None  # while rows are steered each by its own adapter; then `slots` has those
        self.slots: Slots | None
        self.register_module("slots", None)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__["_planned"] = None
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_planned": None}  # copies and pickles plan for themselves

    def _replicate_for_data_parallel(self) -> SteeringSite:
        replica = super()._replicate_for_data_parallel()
        replica.__dict__["_planned"] = None
        return replica

    def attach(self, name: str, adapter: Adapter) -> None:
        self.steer_down[name] = adapter.down.train(self.training)
        self.steer_up[name] = adapter.up.train(self.training)
        self.__dict__["_planned"] = None

    def detach(self, name: str) -> None:
        del self.steer_down[name], self.steer_up[name]
        self.__dict__["_planned"] = None

    def adapter(self, name: str) -> Adapter | None:
        """The adapter's parameters here; None if it skips this layer."""
        return Adapter(self.steer_down[name], self.steer_up[name]) if name in self.steer_down else None

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """W1 and W2 of the adapter in use; None where none is, or it is a vector."""
        if self.active is None or not self.enabled:
            return None
        down, up = self.steer_down[self.active].weight, self.steer_up[self.active].weight
        return None if down is None or up is None else (down, up)

    def use(self, name: str | None, activation: str, scale: float) -> None:
        """Let the adapter `name` steer and train, and no other. None, or one that skips this layer, is a plain add."""
        self.active = name if name in self.steer_down else None
        self.activation, self.scale = activation, scale
        for factors in (self.steer_down, self.steer_up):
            for other, factor in factors.items():
                factor.requires_grad_(other == self.active)
        self._set_strength(next((p.device for p in self.parameters()), self.strength.device))

    @torch.inference_mode(False)  # whose tensors no compiled graph that trains may keep
    def _set_strength(self, device: torch.device) -> None:
        self.strength = torch.full((), self.scale, dtype=torch.float32, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SteeringSite:
        super()._apply(fn, recurse)
        self._set_strength(self.strength.device)  # not rounded to another dtype
        return self

    def forward(self, residual: Tensor, branch: Tensor | None = None, entering: Tensor | None = None) -> Tensor:
        """residual + branch, steered. (..., d)

        Args:
            residual, branch: what the block adds up at its end. Without branch, `residual` is the finished sum.
            entering: what the block was given, its first argument; it tells whether a gradient has to pass the block.
        """
        return self._in_graph(residual, branch) if is_compiling() else self.steer(residual, branch, entering)

    def steer(self, residual: Tensor, branch: Tensor | None = None, entering: Tensor | None = None) -> Tensor:
        """`forward` outside of compiled graphs. A layer calls it directly where nobody hooked the site."""
        noted = self.__dict__  # past nn.Module's __setattr__, which takes longer than all the rest here
        planned = noted["_planned"]
        if planned is None:
            planned = self._plan(residual)
        noted["calls"] += 1
        graded = is_grad_enabled()
        if graded or not thread.quiet:
            branch = self._called(residual, branch, entering)
        if planned is not None:
            op, parameters = planned
            if isinstance(op, Slots):
                out = self._by_rows(noted["batch"], residual, branch)
            else:
                weights = parameters()
                pack = thread.packs[-1] if thread.packs else None
                packed = None if pack is None else pack.of(self, residual, *weights[:2])
                out = (op.train if graded else op.infer)(residual, branch, *weights, packed=packed)
            noted["backend"] = op.backend
            return out
        noted["backend"] = select_backend(residual.device)
        return residual if branch is None else residual + branch

    def _in_graph(self, residual: Tensor, branch: Tensor | None) -> Tensor:
        """`forward` as torch.compile reads it."""
        if self.batch is not None and self.enabled:
            return self._by_rows(self.batch, residual, branch)
        if self.active is None or not self.enabled:
            return residual if branch is None else residual + branch
        down, up = self.steer_down[self.active], self.steer_up[self.active]
        return post_block(
            residual,
            branch,
            down.weight,
            self._constrained(up.weight),
            down_bias=down.bias,
            up_bias=self._constrained(up.bias),
            activation=self.activation,
            # float64 is multiplied by what the config says, not by its rounded value.
            scale=self.scale if residual.dtype == torch.float64 else self.strength,
        )

    def _plan(self, residual: Tensor) -> tuple[PlannedPostBlock | Slots, Callable[[], tuple[Tensor, ...]]] | None:
        """Make `_planned`; None where nothing steers."""
        if self.batch is not None and self.enabled:
            return self._plan_rows(self.batch, residual.device)
        if self.active is None or not self.enabled:
            return None
        factors = self.steer_down[self.active], self.steer_up[self.active]
        (w1, b1), (w2, b2) = ((factor.weight, factor.bias) for factor in factors)
        for parameter in (w1, w2, b1, b2):
            if parameter is not None and parameter.is_meta and not residual.is_meta:
                raise ValueError(
                    f"adapter {self.active!r} is on meta, as what is offloaded; expected it on {residual.device} "
                    "(offload the model before it is patched)"
                )
        names = [
            (factor, name, factor is factors[1])
            for factor, name, parameter in zip(
                factors * 2, ("weight",) * 2 + ("bias",) * 2, (w1, w2, b1, b2), strict=True
            )
            if parameter is not None
        ]
        downs, ups, active = self.steer_down._modules, self.steer_up._modules, self.active
        (down, of_down), (up, of_up) = ((factor, factor._parameters) for factor in factors)

        def usual() -> tuple[Tensor, ...]:
            # Looked up in each call: a parameter or factor that was replaced since shows.
            if downs[active] is down and ups[active] is up:
                return of_down["weight"], of_up["weight"]  # type: ignore[return-value]
            return downs[active].weight, ups[active].weight

        def general() -> tuple[Tensor, ...]:
            found = ((getattr(factor, name), constrained) for factor, name, constrained in names)
            return tuple(self._constrained(value) if constrained else value for value, constrained in found)

        plain = all("weight" in factor._parameters for factor in factors)
        simple = plain and w1 is not None and b1 is None and b2 is None and self.basis is None
        steer = PlannedPostBlock(self.activation, self.scale, (w1, w2, b1, b2))
        planned = self.__dict__["_planned"] = (steer, usual if simple else general)
        return planned

    def _plan_rows(self, batch: Batch, device: torch.device) -> Any:
        slots = self.slots
        if slots is None:  # no adapter of the batch steers this layer
            return None

        ids: Any = ()
        weights: Any = None
        found: tuple[Tensor, ...] = ()

        def operands() -> tuple[Tensor, ...]:
            # The same in all steps that have the same ids.
            nonlocal ids, weights, found
            if batch.ids is not ids or slots.weights is not weights:
                found = slots.operands(batch.routing(device))
                ids, weights = batch.ids, slots.weights
            return found

        planned = self.__dict__["_planned"] = (slots, operands)
        return planned

    def _by_rows(self, batch: Batch, residual: Tensor, branch: Tensor | None) -> Tensor:
        """Each row by its own adapter, in slots: for inference."""
        batch.check_place()
        slots: Any = self._modules["slots"]
        if slots is None:  # no adapter of the batch steers this layer
            return residual if branch is None else residual + branch
        if is_grad_enabled() and (residual.requires_grad or branch is not None and branch.requires_grad):
            raise RuntimeError("steering.batch is for inference; expected torch.no_grad() around the model")
        if is_compiling():
            return slots(residual, branch, batch.ids.to(residual.device), batch.gain.to(residual.device))
        return slots.routed(residual, branch, batch.routing(residual.device))

    def _called(self, residual: Tensor, branch: Tensor | None, entering: Tensor | None) -> Tensor | None:
        """Say that the site runs. Returns the branch, so wrapped that backward raises where the block has lost the
        gradient of its input."""
        note_run(self)
        if branch is not None and is_grad_enabled() and not (residual.requires_grad and branch.requires_grad):
            # What trains outside the layer may enter by one of the two: only a gradient that the layer's input asks for
            # can be lost.
            if isinstance(entering, Tensor) and entering.requires_grad:
                return _LostGradient.apply(branch, entering)
        return branch

    def _constrained(self, parameter: Tensor | None) -> Tensor | None:
        """W2 or b2, which is orthogonal to the basis already: what has to be projected is its gradient."""
        if self.basis is None or parameter is None or not (torch.is_grad_enabled() and parameter.requires_grad):
            return parameter
        return project_gradient(parameter, self.basis)

    def extra_repr(self) -> str:
        return f"active={self.active!r}, activation={self.activation!r}, scale={self.scale}"
