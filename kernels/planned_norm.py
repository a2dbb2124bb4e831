"""`post_block_norm` with launch plans, for a layer's site with a fused norm behind it. See planned.py.

A repeated call starts one kernel forward, and all kernels of its backward pass, without a launcher. Calls without a
plan go through `post_block_norm`'s own functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .contract import Operands
from .derivatives import is_batched
from .norm_torch import Norm
from .plan import SHARED, Plan, keep, kind_of
from .planned import planned_operands
from .post_block import saved_tensors
from .post_block_norm import Saved, backward_norm, forward_norm, may_plan, steer_and_normalise

#: `out` and `normed`
_Results = tuple[Tensor, Tensor]


class PlannedPostBlockNorm:
    """`post_block_norm` for one activation, one scale, one `reads`, one kind of norm, and an adapter with a fixed set
    of tensors.
    """

    __slots__ = ("_activation", "_inference", "_reads", "_scale", "_training", "_where", "backend")

    def __init__(self, activation: str, scale: float, weights: Sequence[Tensor | None], reads: str = "sum") -> None:
        """
        Args:
            activation, scale, weights, reads: see `PlannedPostBlock`.
        """
        self._activation, self._scale, self._reads = activation, scale, reads
        self._where = tuple(weight is not None for weight in weights)
        self._inference: dict[Any, Plan] = {}
        self._training: dict[Any, _Training] = {}
        self.backend: str | None = None  # the backend of the last call

    def infer(self, residual: Tensor, branch: Tensor | None, weights: tuple[Tensor, ...], norm: Norm) -> _Results:
        """Return `out` and `normed` without gradients.

        Args:
            weights: the adapter's weights that are not None, in their order.
        """
        states = (residual,) if branch is None else (residual, branch)
        operands = (*states, *weights, *_given(norm.weight))
        key = (branch is None, norm[1:], residual.shape)
        plan = self._inference.get(key)
        addresses = None if plan is None else plan.admit(operands)
        if plan is not None and addresses is not None:
            self.backend = "triton"
            return plan.go(addresses)
        steering = planned_operands(self._where, weights, self._scale, self._activation, self._reads)
        self.backend, plannable = may_plan(residual, branch, steering, norm)
        if not plannable:
            return steer_and_normalise(residual, branch, steering, norm)
        kind = self._kind(operands, norm)
        plan = _inference.get(kind)
        addresses = None if plan is None else plan.admit(operands)
        if plan is not None and addresses is not None:
            results = plan.go(addresses)
        else:
            results, plan = Plan.make(operands, lambda: forward_norm(residual, branch, steering, norm, False)[:2])
        if plan is not None:
            keep(_inference, kind, plan, SHARED)
            keep(self._inference, key, plan)
        return results[0], results[1]

    def train(self, residual: Tensor, branch: Tensor | None, weights: tuple[Tensor, ...], norm: Norm) -> _Results:
        """Return `out` and `normed`, with gradients for the operands that require them. See `infer`."""
        states = (residual,) if branch is None else (residual, branch)
        operands = (*states, *weights, *_given(norm.weight))
        for operand in operands:
            if operand.requires_grad:
                break
        else:
            return self.infer(residual, branch, weights, norm)
        key = (branch is None, norm[1:], residual.shape)
        training = self._training.get(key)
        addresses = None if training is None else training.forward.admit(operands)
        if addresses is not None and not torch._C._are_functorch_transforms_active():
            self.backend = "triton"
            return _apply((training, addresses, None), *operands)[:2]
        steering = planned_operands(self._where, weights, self._scale, self._activation, self._reads)
        self.backend, plannable = may_plan(residual, branch, steering, norm)
        if not plannable:
            return steer_and_normalise(residual, branch, steering, norm)
        kind = self._kind(operands, norm)
        training = _trained.get(kind)
        addresses = None if training is None else training.forward.admit(operands)
        if training is not None and addresses is not None:
            keep(self._training, key, training)
            return _apply((training, addresses, None), *operands)[:2]

        if states[0].dtype != states[-1].dtype:  # the gradients have two dtypes, which no plan gives
            return steer_and_normalise(residual, branch, steering, norm)

        def call() -> list[Tensor]:
            return [t for t in forward_norm(residual, branch, steering, norm, True) if t is not None]

        with torch.no_grad():
            results, plan = Plan.make(operands, call)
        constants = self._scale, self._activation, self._reads
        training = _Training(plan, states, weights, norm, self._where, constants)
        if plan is not None:
            keep(_trained, kind, training, SHARED)
            keep(self._training, key, training)
        return _apply((training, None, results), *operands)[:2]

    def _kind(self, operands: tuple[Tensor, ...], norm: Norm) -> Any:
        return self._activation, self._scale, self._reads, self._where, norm[1:], kind_of(operands)


def _given(weight: Tensor | None) -> tuple[Tensor, ...]:
    return () if weight is None else (weight,)


# ---------------------------------------------------------------------------------------------------------- gradients


class _Training:
    """The plans of a call and of its backward pass, and which operands need gradients. The guard checks the latter."""

    __slots__ = (
        "backward", "constants", "forward", "kind", "keeps", "last", "needs", "order", "places", "states", "where",
    )  # fmt: skip

    def __init__(
        self,
        forward: Plan | None,
        states: tuple[Tensor, ...],
        weights: tuple[Tensor, ...],
        norm: Norm,
        where: tuple[bool, ...],
        constants: tuple[float, str, str],
    ) -> None:
        """forward: None for a call that cannot be planned. Then this is kept for its backward pass alone."""
        self.forward: Any = forward
        #: The last plans by whether `out` has a gradient of its own, and all of them by the kind of call.
        self.last: dict[bool, Plan] = {}
        self.backward: dict[Any, Plan] = {}
        self.states, self.where, self.constants, self.kind = len(states), where, constants, norm[1:]
        of_states = [state.requires_grad for state in states]
        given = iter(weights)
        down, up, down_bias, up_bias, *_ = (there and next(given).requires_grad for there in where)
        of_weight = norm.weight is not None and norm.weight.requires_grad
        adapter = where[0]
        reads_branch = adapter and constants[2] == "branch"
        of_read = of_states[1] if reads_branch else any(of_states)
        of_out = of_states[0] if reads_branch else of_read and not adapter
        #: As `backward_norm` expects.
        self.needs = [of_out, of_read and adapter, down, up, down_bias, up_bias, False, False, of_weight]
        # The saved tensors: `out`, branch or none, a or none, 1 / rms; then the weights and the norm's.
        self.keeps = (reads_branch and down, adapter)
        order = {need: place for place, need in enumerate(i for i, needed in enumerate(self.needs) if needed)}
        of_residual, of_branch = (0, 1) if reads_branch else (1, 1) if adapter else (0, 0)
        #: For each operand the index of its gradient among the results, or None.
        self.places = [
            order[need] if wanted else None
            for need, wanted in zip((of_residual, of_branch), of_states, strict=False)
        ]  # fmt: skip
        self.places += [order.get(place + 2) for place, there in enumerate(where) if there]
        self.places += [order.get(8)] if norm.weight is not None else []
        #: The same for the backward plans, with None for the function's first argument.
        self.order = (None, *self.places)


class _PlannedPostBlockNorm(torch.autograd.Function):
    """The autograd function of planned calls. It saves the same tensors as `post_block_norm`'s own function."""

    @staticmethod
    def forward(ctx: Any, call: tuple[_Training, Any, Any], *operands: Tensor) -> tuple[Tensor, ...]:
        """Run the planned launches, unless their results are given. Returns `out`, `normed`, and perhaps `a`.

        `a` is the way of a second derivative: see `post_block`.

        call: the plans, and the admitted addresses or the results.
        """
        training, addresses, results = call
        if results is None:
            results = training.forward.go(addresses)
        out, normed, *kept = results
        branch = operands[1:2] if training.keeps[0] else ()
        ctx.save_for_backward(out, *branch, *kept, *operands[training.states :])
        ctx.training = training
        ctx.set_materialize_grads(False)
        return out, normed, *kept[:-1]

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_normed: Tensor | None, grad_a: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        training = ctx.training
        if grad is None and grad_normed is None and grad_a is None:
            return (None,) * len(training.order)
        saved = saved_tensors(ctx, training.constants[2])
        again = torch.is_grad_enabled() or grad_a is not None
        if grad_normed is not None and training.backward and not again:
            operands = (grad_normed, *saved) if grad is None else (grad_normed, grad, *saved)
            plan = training.last.get(grad is None)
            addresses = None if plan is None else plan.admit(operands)
            if addresses is None:
                # By its kind: layers share these plans, and their gradients may have different strides.
                plan = training.backward.get(kind_of(operands))
                addresses = None if plan is None else plan.admit(operands)
            if plan is not None and addresses is not None:
                training.last[grad is None] = plan
                return plan.go(addresses)
        again = again or is_batched(grad, grad_normed)
        found = _careful_backward(training, grad, grad_normed, saved, grad_a, again)
        return None, *(None if place is None else found[place] for place in training.places)


def _careful_backward(
    training: _Training,
    grad: Tensor | None,
    grad_normed: Tensor | None,
    saved: Sequence[Tensor],
    grad_a: Tensor | None,
    again: bool,
) -> Sequence[Tensor]:
    given = iter(saved)
    keeps_branch, keeps_a = training.keeps
    kept = Saved(next(given), next(given) if keeps_branch else None, next(given) if keeps_a else None, next(given))
    steering: Operands = planned_operands(training.where, given, *training.constants)
    norm = Norm(next(given, None), *training.kind)

    def call() -> list[Tensor]:
        return backward_norm(grad, grad_normed, kept, steering, norm, training.needs, grad_a, again)

    if grad_normed is None or again or training.forward is None:
        return call()
    operands = (grad_normed, *saved) if grad is None else (grad_normed, grad, *saved)
    found, plan = Plan.make(operands, call, training.order)
    if plan is not None:
        keep(training.backward, kind_of(operands), plan)
    return found


#: The plans of all callers, by the kind of call.
_inference: dict[Any, Plan] = {}
_trained: dict[Any, _Training] = {}

#: Bypasses the torch.func support in `Function.apply`. No plan is used under torch.func.
_apply = super(torch.autograd.Function, _PlannedPostBlockNorm).apply
