"""The site: the module in a decoder layer that adds the sublayer's output (`branch`) and steers the sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling
from torch.fx.proxy import TraceError

from ..adapters.factors import Adapter, Factors, Rotation, read_factor
from ..adapters.parameters import SITE, Place
from ..kernels import post_block, select_backend
from ..kernels.contract import Operands
from ..kernels.derivatives import is_transformed
from ..kernels.orthogonal import project_gradient
from ..kernels.plan import no_plan
from ..kernels.planned import PlannedPostBlock
from ..kernels.planned_norm import PlannedPostBlockNorm
from ..kernels.post_block_norm import steer_and_normalise
from ..kernels.registered import refuse_symbols
from .watch import note_run, thread

_Parameter = TypeVar("_Parameter", Tensor, Tensor | None)


class _LostGradient(torch.autograd.Function):
    """The branch of a block that loses its input's gradient. Backward raises instead of returning a silent 0."""

    @staticmethod
    def forward(ctx: Any, branch: Tensor, entering: Tensor) -> Tensor:
        return branch.view_as(branch)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(
            "a steered block passes no gradient from its output to its input (modules quantised for inference do not); "
            "expected a base that can be trained through"
        )


class Site(nn.Module):
    """The module in a decoder layer that adds the block's output to the residual stream and steers the sum.

    At the sites post_mlp and post_attention it steers the block's output instead, what it adds. Where it is not at an
    add, it steers the one tensor that it is given.

    Parameters are named `steer_down.<adapter>` and `steer_up.<adapter>`, as in PEFT's layers. Subclasses choose the
    adapters that steer, in `steer` and `in_graph`.
    """

    def __init__(self, name: str = SITE) -> None:
        super().__init__()
        self.name = name  # the site's
        self.reads = "sum"  # what steers, of residual and branch: "sum" or "branch"
        self.steer_down = Factors()
        self.steer_up = Factors()
        self.patched: Any = None  # the PatchedLayer that holds this site
        self.calls = 0  # eager calls since the last reset
        self.backend: str | None = None  # the backend of the last eager call

    @property
    def place(self) -> Place:
        return Place(self.patched.index, self.name)

    def attach(self, name: str, adapter: Adapter) -> None:
        self.steer_down[name] = adapter.down.train(self.training)
        self.steer_up[name] = adapter.up.train(self.training)

    def detach(self, name: str) -> None:
        del self.steer_down[name], self.steer_up[name]

    def adapter(self, name: str) -> Adapter | None:
        """Return the adapter's parameters here, or None if it skips this layer."""
        return Adapter(self.steer_down[name], self.steer_up[name]) if name in self.steer_down else None

    def forward(self, residual: Tensor, branch: Tensor | None = None, entering: Tensor | None = None) -> Tensor:
        """Return residual + branch, steered. (..., d)

        Args:
            residual, branch: the operands of the block's last add. Without branch, `residual` is the finished sum.
            entering: the block's first argument, which tells whether a gradient has to pass through the block.
        """
        return self.in_graph(residual, branch) if is_compiling() else self.steer(residual, branch, entering)

    def steer(self, residual: Tensor, branch: Tensor | None = None, entering: Tensor | None = None) -> Tensor:
        """Compute `forward` outside of compiled graphs. A layer without hooks on its site calls this directly.

        Implementations have to call `called`, count the call and note its backend.
        """
        raise NotImplementedError

    def in_graph(self, residual: Tensor, branch: Tensor | None) -> Tensor:
        """Compute `forward` in a form that torch.compile can trace."""
        raise NotImplementedError

    def called(self, residual: Tensor, branch: Tensor | None, entering: Tensor | None) -> Tensor | None:
        """Note that the site runs. Return the branch, which raises in backward if the block would drop the gradient."""
        note_run(self)
        try:
            if branch is not None and is_grad_enabled() and not (residual.requires_grad and branch.requires_grad):
                # Only a gradient that the layer's input requires can be lost. Outside parameters may enter by one
                # operand.
                if isinstance(entering, Tensor) and entering.requires_grad:
                    return _LostGradient.apply(branch, entering)
        except TraceError:
            refuse_symbols(residual)
            raise
        return branch


class _PlannedComputed(PlannedPostBlock):
    """The op for an adapter of LoReFT, or one that is kept orthogonal to a LoRA.

    Autograd saves the basis or the rotation for its operands, so under checkpointing they may be made only once in a
    call. Therefore a call with gradients does not try the last plan first.
    """

    __slots__ = ()

    @property
    def last_trained(self) -> Any:
        return no_plan

    @last_trained.setter
    def last_trained(self, run: Any) -> None:
        pass


class _PlannedWithOthers(_PlannedComputed):
    """The op with other operands than the adapter's, such as the gain of each token. No call tries the last plan."""

    __slots__ = ()

    @property
    def last(self) -> Any:
        return no_plan

    @last.setter
    def last(self, run: Any) -> None:
        pass


class _PlannedWithNorm(_PlannedWithOthers):
    """The op with the norm behind the layer: `post_block_norm` where the norm can be computed here, else the op."""

    __slots__ = ("_link", "_with_norm")

    def __init__(self, link: Any, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._link, self._with_norm = link, PlannedPostBlockNorm(*arguments)

    def infer(self, residual: Tensor, branch: Tensor | None, *weights: Tensor) -> Tensor:
        norm = self._link.norm_of_site(residual, branch)
        if norm is None:
            return super().infer(residual, branch, *weights)
        out, normed = self._with_norm.infer(residual, branch, weights, norm)
        self.backend = self._with_norm.backend
        self._link.hand_over(out, normed, norm.weight)
        return out

    def train(self, residual: Tensor, branch: Tensor | None, *weights: Tensor) -> Tensor:
        norm = self._link.norm_of_site(residual, branch)
        if norm is None:
            return super().train(residual, branch, *weights)
        out, normed = self._with_norm.train(residual, branch, weights, norm)
        self.backend = self._with_norm.backend
        self._link.hand_over(out, normed, norm.weight)
        return out


def _strength_follows(site: SteeringSite, _: Any) -> None:
    """After a load that replaces parameters on meta (`assign=True`): no file has the strength."""
    device = next((p.device for p in site.parameters()), site.strength.device)
    if device != site.strength.device:  # a new tensor would have CUDA graphs recorded again
        site._set_strength(device)


class SteeringSite(Site):
    """A site of `patch_model`. The active adapter steers every token, or in a batch each row's own adapter."""

    #: The op with its launch plans, and a function that returns the op's present operands after residual and branch:
    #: the adapter's parameters, or those of `rows`. Any assignment on the site resets it.
    _planned: tuple[Any, Callable[[], tuple[Tensor, ...]]] | None
    #: W and P of LoReFT in the last pass with gradients, and the W1 and W2 that were made of them.
    _rotated: tuple[Tensor, Tensor, tuple[Tensor, Tensor]] | None

    def __init__(self, name: str = SITE) -> None:
        super().__init__(name)
        self.__dict__["_rotated"] = None
        self.active: str | None = None  # the active adapter; None, or one that skips this layer, is a plain add
        self.enabled = True
        self.activation = "identity"  # of the active adapter
        self.scale = 1.0
        self.strength: Tensor  # a tensor, because a number would be a constant of compiled graphs
        self.register_buffer("strength", None, persistent=False)
        self._set_strength(torch.device("cpu"))
        self.register_load_state_dict_post_hook(_strength_follows)
        self.gains: Any = None  # gives the gain of each token of a pass; None: every token is steered
        #: V (d, k), which W2 and b2 are kept orthogonal to in training. It is no buffer, because it comes with the
        #: first training pass, and averages of models (AveragedModel) pair the buffers of a model and its copy. Where
        #: the model is moved, the next training pass makes another.
        self.basis: Tensor | None = None
        self.link: Any = None  # the norm behind the layer, if it is fused: see `norms.Link`
        #: The module that steers by rows while each row of a batch has its own adapter. Its `plan` fills `_planned`.
        self.rows: Any
        self.register_module("rows", None)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__["_planned"] = None
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes its own plans, and is in no batch and in no `disabled`.
        return self.__dict__ | {
            "_planned": None,
            "_rotated": None,
            "enabled": True,
            "_modules": {**self._modules, "rows": None},
        }

    def _replicate_for_data_parallel(self) -> SteeringSite:
        replica = super()._replicate_for_data_parallel()
        replica.__dict__["_planned"] = None
        return replica

    def attach(self, name: str, adapter: Adapter) -> None:
        super().attach(name, adapter)
        self.__dict__["_planned"] = None

    def detach(self, name: str) -> None:
        super().detach(name)
        self.__dict__["_planned"] = None

    def rotation(self) -> tuple[Tensor, Tensor] | None:
        """Return W and P of the adapter that steers, if it is LoReFT, else None."""
        active = self.active
        if active is None:
            return None
        # Past nn.Module's attributes, because every pass asks this of every site.
        matrix = self._modules["steer_up"]._modules[active]  # type: ignore[union-attr]
        if not isinstance(matrix, Rotation) or not self.enabled or self.rows is not None:
            return None
        down = self.steer_down[active]
        if down.is_computed("weight") or matrix.is_computed("weight"):
            return None
        return down.weight, matrix.weight  # type: ignore[return-value]

    def _weights(self, active: str) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Return W1, W2, b1 and b2 of an adapter. Those of LoReFT were perhaps made at the beginning of the pass."""
        adapter = Adapter(self.steer_down[active], self.steer_up[active])
        if not is_compiling() and isinstance(adapter.up, Rotation) and not adapter.computed():
            found = self._made_rotation(adapter.down.weight, adapter.up.weight)
            if found is not None:
                return *found, adapter.down.bias, None
        return adapter.weights()

    def _made_rotation(self, source: Tensor | None, matrix: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Return LoReFT's W1 and W2 if the pass has made them for all layers, else None.

        Checkpointing runs a layer again in the backward pass, when there is no pass of the decoder. Autograd then
        expects the tensors that the first run saved, so the site keeps them. Reentrant checkpointing first runs the
        layer without gradients; then nothing is kept, and the layer makes its own. What a pass of another model that
        Ctrl-C interrupted has left has no such site.
        """
        rotations = thread.rotations[-1] if thread.rotations else None
        found = None if rotations is None else rotations.of(self, source, matrix)
        in_backward = torch._C._current_graph_task_id() != -1
        if found is not None or (rotations is not None and not in_backward):
            self.__dict__["_rotated"] = (source, matrix, found) if found is not None and is_grad_enabled() else None
            return found
        kept = self._rotated
        return kept[2] if in_backward and kept is not None and kept[0] is source and kept[1] is matrix else None

    def use(self, name: str | None, activation: str, scale: float, gains: Any = None) -> None:
        """Make `name` the only adapter that steers and trains. None, or one that skips this layer, is a plain add.

        Args:
            gains: gives the gain of each token, by its method `of`. None: every token is steered.
        """
        active = name if name is not None and name in self.steer_down else None
        if active != self.active:
            self.__dict__["_rotated"] = None  # it keeps the earlier adapter's parameters alive
        self.active = active
        self.activation, self.scale, self.gains = activation, scale, gains
        for factors in (self.steer_down, self.steer_up):
            for other, factor in factors.items():
                factor.requires_grad_(other == self.active)
        self._set_strength(next((p.device for p in self.parameters()), self.strength.device))

    def set_scale(self, scale: float) -> None:
        """Change only the strength."""
        self.scale = scale
        self._set_strength(self.strength.device)

    def remember(self) -> Callable[[], None]:
        """Return a function that restores the site's adapters, the active one, and which parameters train."""
        named = ("active", "enabled", "activation", "scale", "gains", "basis")
        choice = {name: getattr(self, name) for name in named}
        buffers = dict(self._buffers)
        factors = [(modules, dict(modules._modules)) for modules in (self.steer_down, self.steer_up)]
        trained = [(parameter, parameter.requires_grad) for parameter in self.parameters()]

        def give_back() -> None:
            for modules, held in factors:
                modules._modules.clear()
                modules._modules.update(held)
            for parameter, required in trained:
                parameter.requires_grad_(required)
            self._buffers.update(buffers)
            for name, value in choice.items():
                setattr(self, name, value)

        return give_back

    @torch.inference_mode(False)  # an inference tensor cannot be part of a compiled training graph
    def _set_strength(self, device: torch.device) -> None:
        self.strength = torch.full((), self.scale, dtype=torch.float32, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SteeringSite:
        super()._apply(fn, recurse)
        self._set_strength(self.strength.device)  # not rounded to the new dtype
        return self

    def steer(self, residual: Tensor, branch: Tensor | None = None, entering: Tensor | None = None) -> Tensor:
        noted = self.__dict__  # bypasses nn.Module's __setattr__, which takes longer than the rest of this function
        planned = noted["_planned"]
        if planned is None:
            planned = self._plan(residual)
        noted["calls"] += 1
        graded = is_grad_enabled()
        if graded or thread.calls:
            branch = self.called(residual, branch, entering)
        if planned is not None:
            op, parameters = planned
            if isinstance(op, PlannedPostBlock):
                weights = parameters()
                if self.gains is not None:
                    weights = (*weights, self.gains.of(residual, entering))
                out = (op.train if graded else op.infer)(residual, branch, *weights)
            else:
                out = self.rows(residual, branch)
            noted["backend"] = op.backend
            return out
        noted["backend"] = select_backend(residual.device)
        return residual if branch is None else residual + branch

    def in_graph(self, residual: Tensor, branch: Tensor | None, entering: Tensor | None = None) -> Tensor:
        if self.rows is not None and self.enabled:
            return self.rows(residual, branch)
        if self.active is None or not self.enabled:
            return residual if branch is None else residual + branch
        operands = self._operands(residual, entering)
        norm = None if self.link is None or not is_compiling() else self.link.norm_in_graph(residual, branch)
        if norm is not None:
            out, normed = steer_and_normalise(residual, branch, operands, norm)
            self.link.hand_over_in_graph(out, normed)
            return out
        down, up, down_bias, up_bias, gain, _, scale, activation, _, reads = operands
        return post_block(
            residual, branch, down, up, down_bias=down_bias, up_bias=up_bias, activation=activation, gain=gain,
            scale=scale, reads=reads,
        )  # fmt: skip

    def _operands(self, residual: Tensor, entering: Tensor | None) -> Operands:
        """Return the operands of a call that is not planned."""
        assert self.active is not None
        down, up, down_bias, up_bias = self._weights(self.active)
        return Operands(
            down,
            self._constrained(up),
            down_bias,
            self._constrained(up_bias),
            activation=self.activation,
            gain=None if self.gains is None else self.gains.of(residual, entering),
            # For float64 the config's exact value is used, not the float32 one.
            scale=self.scale if residual.dtype == torch.float64 else self.strength,
            reads=self.reads,
        )

    def _plan(self, residual: Tensor) -> tuple[Any, Callable[[], tuple[Tensor, ...]]] | None:
        """Make and return `_planned`, or None if nothing steers."""
        if self.rows is not None and self.enabled:
            planned = self.__dict__["_planned"] = self.rows.plan(residual.device)
            return planned
        if self.active is None or not self.enabled:
            return None
        factors = self.steer_down[self.active], self.steer_up[self.active]
        for parameter in (p for factor in factors for p in factor.parameters()):
            if parameter.is_meta and not residual.is_meta:
                raise ValueError(
                    f"adapter {self.active!r} is on meta, as offloaded modules are; expected it on {residual.device} "
                    "(call accelerate's offloading first, then patch_model)"
                )
        # Some models have layers of another width than their config says, which only a pass shows. The op refuses
        # proxies of torch.fx.
        hidden = next((p.shape[0] for p in factors[1]._parameters.values() if p is not None), 0)  # 0: ZeRO's, computed
        if hidden and isinstance(residual, Tensor) and residual.shape[-1:] != (hidden,):
            raise ValueError(
                f"{self.place} has hidden states of shape {tuple(residual.shape)}; expected (..., {hidden}), the "
                f"hidden size in the model's config, as adapter {self.active!r} has"
            )
        # Which of W1, W2, b1 and b2 there are. To read one that is computed would compute it once more.
        there = [factor.has(name) for name in ("weight", "bias") for factor in factors]
        downs: dict[str, Any] = self.steer_down._modules
        ups: dict[str, Any] = self.steer_up._modules
        active, (down, up) = self.active, factors
        of_down: dict[str, Any] = down._parameters
        of_up: dict[str, Any] = up._parameters

        def usual() -> tuple[Tensor, ...]:
            # Looked up in each call, so that a replaced parameter or factor is used.
            if downs[active] is down and ups[active] is up:
                try:
                    return of_down["weight"], of_up["weight"]
                except KeyError:  # one is computed since
                    pass
            return general()

        def general() -> tuple[Tensor, ...]:
            (w1, b1), (w2, b2) = read_factor(downs[active]), read_factor(ups[active])
            found = w1, self._constrained(w2), b1, self._constrained(b2)
            return tuple(tensor for tensor in found if tensor is not None)

        def rotated() -> tuple[Tensor, ...]:
            return tuple(t for t in self._weights(active) if t is not None)

        plain = not any(factor.is_computed("weight") for factor in factors)
        simple = plain and there == [True, True, False, False] and self.basis is None
        turns = isinstance(up, Rotation)
        # Each call adds the gain of its tokens.
        gain = () if self.gains is None else (self.strength,)
        weights = tuple(self.strength if one else None for one in there)  # only which are None counts
        call = self.activation, self.scale, (*weights, *gain), self.reads
        if self.link is not None:
            steer: PlannedPostBlock = _PlannedWithNorm(self.link, *call)
        else:
            computed = self.basis is not None or turns
            kind = _PlannedWithOthers if gain else _PlannedComputed if computed else PlannedPostBlock
            steer = kind(*call)
        planned = self.__dict__["_planned"] = (steer, rotated if turns else usual if simple else general)
        return planned

    def _constrained(self, parameter: _Parameter) -> _Parameter:
        """Return W2 or b2, with its gradient projected if there is a basis. Its value is orthogonal already."""
        if self.basis is None or parameter is None:
            return parameter
        if not (torch.is_grad_enabled() and parameter.requires_grad) and not is_transformed():
            return parameter
        return project_gradient(parameter, self.basis)

    def extra_repr(self) -> str:
        return f"active={self.active!r}, activation={self.activation!r}, scale={self.scale}"
