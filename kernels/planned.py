"""`post_block` with launch plans, for a caller that steers by the same adapter repeatedly, as a layer's site does.

`PlannedPostBlock` gives the same results as `post_block`, with and without gradients. It keeps a plan for each shape
(see plan.py), so that a repeated call costs the host a check, an allocation and a launch. Calls without a plan go
through `post_block`'s own functions.

The layers of a model make the same kinds of call, and all start the same plan of a kind. Between two layers' calls the
model does so much else that a plan of the layer's own would have left the processor's caches. It would take twice as
long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .backend import select_backend
from .contract import Operands
from .derivatives import is_batched, is_transformed
from .plan import SHARED, Plan, keep, kind_of, no_plan
from .post_block import backward, check_operands, forward, post_block, saved_tensors
from .registered import is_described, is_watched, is_wrapped, refuse_symbols

#: Arguments of `forward`: residual, branch, operands.
_Call = tuple[Tensor, Tensor | None, Operands]


class PlannedPostBlock:
    """`post_block` for one activation, one scale, one `reads`, and an adapter with a fixed set of tensors.

    Compiled graphs (torch.compile) call `post_block` instead.
    """

    __slots__ = (
        "_activation", "_inference", "_reads", "_scale", "_training", "_where", "backend", "last", "last_trained",
    )  # fmt: skip

    def __init__(self, activation: str, scale: float, weights: tuple[Tensor | None, ...], reads: str = "sum") -> None:
        """
        Args:
            activation: φ by name.
            scale: s.
            weights: W1 (r, d), W2 (d, r), b1 (r,) and b2 (d,), or None for a missing one, and perhaps the gain of each
                token, g (...), as a fifth. Only which of them are None is stored; each call passes its own. The gain
                gets no gradient.
            reads: the tensor that W1 is applied to, "sum" or "branch".
        """
        self._activation, self._scale, self._reads = activation, scale, reads
        self._where = tuple(weight is not None for weight in weights)
        self._inference: dict[Any, Callable[..., Tensor | None]] = {}
        #: The last plan of a call with a branch: a function of residual, branch and a tuple of the weights. It returns
        #: None if the plan does not apply.
        self.last: Callable[..., Tensor | None] = no_plan
        self._training: dict[Any, _Training] = {}
        #: The last plan of a call with gradients for both residual and branch.
        self.last_trained: Callable[..., Tensor | None] = no_plan
        self.backend: str | None = None  # the backend of the last call

    def infer(self, residual: Tensor, branch: Tensor | None, *weights: Tensor) -> Tensor:
        """Return residual + branch, steered, without gradients: see `post_block`.

        Args:
            weights: the weights that are not None, in their order.
        """
        states = (residual,) if branch is None else (residual, branch)
        operands = (*states, *weights)
        key = (len(states), residual.shape)
        try:
            run = self._inference.get(key)
        except TypeError:  # symbolic sizes have no hash, and no kernel runs for them
            return self._ordinary(self._call(states, weights))
        out = None if run is None else run(*operands[:2], operands[2:])
        if out is not None:
            self.backend = "triton"
        else:
            call = self._call(states, weights)
            if not self._may_plan(call):
                return self._ordinary(call)
            kind = self._kind(operands)
            run = _inference.get(kind)
            out = None if run is None else run(*operands[:2], operands[2:])
            if out is None:
                (out,), plan = Plan.make(operands, lambda: forward(*call, keep_a=False)[:1])
                run = None if plan is None else plan.run
            if run is not None:
                keep(_inference, kind, run, SHARED)
                keep(self._inference, key, run)
        if run is not None and len(states) == 2:
            self.last = run
        return out

    def train(self, residual: Tensor, branch: Tensor | None, *weights: Tensor) -> Tensor:
        """Return residual + branch, steered, with gradients for the operands that require them."""
        states = (residual,) if branch is None else (residual, branch)
        for operand in (*states, *weights):
            if operand.requires_grad:
                return self._with_gradient(states, weights)
        return self.infer(residual, branch, *weights)

    def _with_gradient(self, states: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> Tensor:
        operands = (*states, *weights)
        key = (len(states), states[0].shape)
        try:
            training = self._training.get(key)
        except TypeError:
            return self._ordinary(self._call(states, weights))
        if training is not None:
            addresses = training.forward.admit(operands)
            if addresses is not None and not torch._C._are_functorch_transforms_active():
                self.backend = "triton"
                if training.whole:
                    self.last_trained = training.run
                return _apply((training, addresses, None), *operands)[0]
        call = self._call(states, weights)
        if not self._may_plan(call):
            return self._ordinary(call)
        kind = self._kind(operands)
        training = _trained.get(kind)
        addresses = None if training is None else training.forward.admit(operands)
        if training is not None and addresses is not None:
            keep(self._training, key, training)
            return _apply((training, addresses, None), *operands)[0]

        if states[0].dtype != states[-1].dtype:  # the gradients have two dtypes, which no plan gives
            return self._ordinary(call)

        # Planned below autograd, because checkpointing compares the saved tensors of a call and of its repetition.
        with torch.no_grad():
            results, plan = Plan.make(operands, lambda: [t for t in forward(*call, keep_a=True) if t is not None])
        training = _Training(plan, states, weights, self._where, (self._scale, self._activation, self._reads))
        if plan is not None:
            keep(_trained, kind, training, SHARED)
            keep(self._training, key, training)
        return _apply((training, None, tuple(results)), *operands)[0]

    def _call(self, states: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> _Call:
        operands = planned_operands(self._where, weights, self._scale, self._activation, self._reads)
        return states[0], states[1] if len(states) == 2 else None, operands

    def _kind(self, operands: tuple[Tensor, ...]) -> Any:
        return self._activation, self._scale, self._reads, self._where, kind_of(operands)

    def _may_plan(self, call: _Call) -> bool:
        """Return whether a kernel runs this call. `post_block` handles all others, errors included."""
        residual, branch, operands = call
        refuse_symbols(residual)
        self.backend = select_backend(residual.device)
        if is_described(residual) or is_watched() or self.backend != "triton" or is_transformed():
            return False
        if is_wrapped(residual, branch, *operands):
            return False
        check_operands(residual, branch, operands)
        return operands.down is None or operands.rank > 0

    def _ordinary(self, call: _Call) -> Tensor:
        residual, branch, operands = call
        return post_block(
            residual, branch, operands.down, operands.up, down_bias=operands.down_bias, up_bias=operands.up_bias,
            activation=self._activation, gain=operands.gain, scale=self._scale, reads=self._reads,
        )  # fmt: skip


def planned_operands(
    where: tuple[bool, ...], weights: Iterable[Tensor], scale: float, activation: str, reads: str
) -> Operands:
    """Return the operands of a planned call. `where` tells which of W1, W2, b1, b2 and the gain the weights are."""
    given = iter(weights)
    down, up, down_bias, up_bias, *others = [next(given) if there else None for there in where]
    gain = others[0] if others else None
    return Operands(down, up, down_bias, up_bias, gain, scale=scale, activation=activation, reads=reads)


# ---------------------------------------------------------------------------------------------------------- gradients


class _Training:
    """The plans of a call and of its backward pass, and which operands need gradients. The guard checks the latter."""

    __slots__ = (
        "backward", "constants", "dtype", "forward", "kept", "keeps_branch", "last", "needs", "order", "passed",
        "places", "saves", "shape", "states", "where", "whole",
    )  # fmt: skip

    def __init__(
        self,
        forward: Plan | None,
        states: tuple[Tensor, ...],
        weights: tuple[Tensor, ...],
        where: tuple[bool, ...],
        constants: tuple[float, str, str],
    ) -> None:
        """forward: None for a call that cannot be planned. Then this is kept for its backward pass alone."""
        self.forward: Any = forward
        self.backward: dict[Any, Plan] = {}
        #: The last backward plan.
        self.last: Plan | None = None
        self.states, self.where, self.constants = len(states), where, constants
        self.shape, self.dtype = states[0].shape, states[0].dtype  # of the result
        of_states = [state.requires_grad for state in states]
        self.whole = len(states) == 2 and all(of_states)  # the gradient of the block's input is complete
        given = iter(weights)
        down, up, down_bias, up_bias, *_ = (there and next(given).requires_grad for there in where)
        adapter = where[0]
        reads_branch = adapter and constants[2] == "branch"
        of_x = of_states[1] if reads_branch else any(of_states)
        #: For x, down, up, down_bias, up_bias, gain, scale, as `backward` expects.
        self.needs = [of_x and adapter, down, up, down_bias, up_bias, False, False]
        # The saved tensors of post_block in its order: `out` or branch, `a`, weights.
        self.saves = (down, adapter and any(self.needs[:4]), any(self.needs))
        self.keeps_branch = reads_branch and down
        # slice of the forward's results to save
        self.kept = slice(0 if down and not reads_branch else 1, 2 if self.saves[1] else 1)
        #: For each operand the index of its gradient among the results, -1 for the incoming gradient, or None.
        order = [place for place, need in enumerate(self.needs) if need]
        of_read = order.index(0) if self.needs[0] else -1
        of_each = (-1, of_read) if reads_branch else (of_read,) * len(of_states)
        self.places: list[int | None] = [x if want else None for x, want in zip(of_each, of_states, strict=True)]
        present = [place + 1 for place, there in enumerate(where) if there]
        self.places += [order.index(place) if self.needs[place] else None for place in present]
        #: The same for the backward plans, with None for the function's first argument and for the incoming gradient.
        self.order = (None, *(None if place == -1 else place for place in self.places))
        #: The function's arguments that get the incoming gradient.
        self.passed = tuple(1 + argument for argument, place in enumerate(self.places) if place == -1)

    def complete(self, gradients: Any, grad: Tensor) -> Any:
        """Return the gradients of a backward plan with the incoming gradient in the places of `passed`."""
        completed = list(gradients)
        for argument in self.passed:
            completed[argument] = grad
        return tuple(completed)

    def run(self, residual: Tensor, branch: Tensor, weights: tuple[Tensor, ...]) -> Tensor | None:
        """Run the call by its plan. Return None if the plan does not apply."""
        operands = (residual, branch, *weights)
        addresses = self.forward.admit(operands)
        if addresses is None or torch._C._are_functorch_transforms_active():
            return None
        return _apply((self, addresses, None), *operands)[0]


class _PlannedPostBlock(torch.autograd.Function):
    """The autograd function of planned calls. It saves the same tensors as `post_block`'s own function."""

    @staticmethod
    def forward(ctx: Any, call: tuple[_Training, Any, Any], *operands: Tensor) -> tuple[Tensor, ...]:
        """Run the planned launches, unless their results are given. Returns `out`, and `a` for a second derivative.

        call: the plans, and the admitted addresses or the results. They are one argument, because autograd spends time
        on each argument.
        """
        training, addresses, results = call
        if results is None:
            results = training.forward.go(addresses)
        if training.keeps_branch:
            ctx.save_for_backward(operands[1], *results[training.kept], *operands[training.states :])
        elif training.saves[2]:
            ctx.save_for_backward(*results[training.kept], *operands[training.states :])
        ctx.training = training
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_a: Tensor | None = None) -> tuple[Tensor | None, ...]:
        training = ctx.training
        places = training.places
        if torch.is_grad_enabled() or grad_a is not None:
            return None, *_differentiate_again(ctx, grad, grad_a)
        if grad is None:
            return None, *[None for _ in places]
        saved = saved_tensors(ctx, training.constants[2])
        operands = (grad, *saved)
        plan = training.last  # read once: another thread's backward pass may put its own plan there meanwhile
        if plan is not None:
            addresses = plan.admit(operands)
            if addresses is not None:
                gradients = plan.go(addresses)
                return training.complete(gradients, grad) if training.passed else gradients
        found: Any = ()
        if training.saves[2]:
            # By its kind, not its shape: layers share these plans, and their gradients may have different strides.
            plan = training.backward.get(kind_of(operands)) if training.backward else None
            addresses = plan.admit(operands) if plan is not None else None
            if plan is not None and addresses is not None:
                training.last = plan
                gradients = plan.go(addresses)
                return training.complete(gradients, grad) if training.passed else gradients
            if is_batched(grad):
                return None, *_differentiate_again(ctx, grad, None)
            found = _careful_backward(training, operands)
        return None, *_placed(places, grad, found)


def _placed(places: list[int | None], grad: Tensor, found: Any) -> list[Tensor | None]:
    """Return the gradient of each operand: the incoming one, or one of those found."""
    return [None if place is None else grad if place < 0 else found[place] for place in places]


def _differentiate_again(ctx: Any, grad: Tensor | None, grad_a: Tensor | None) -> list[Tensor | None]:
    """Return the gradients of the operands in a form that autograd differentiates again. See `post_block`'s own."""
    training = ctx.training
    if grad is None:
        if grad_a is None:
            return [None for _ in training.places]
        grad = grad_a.new_zeros(training.shape, dtype=training.dtype)
    found: list[Tensor] = []
    if training.saves[2]:
        kept, a, steering = _unpacked(training, saved_tensors(ctx, training.constants[2]))
        found = backward(grad, kept, a, steering, training.needs, grad_a, again=True)
    return _placed(training.places, grad, found)


def _unpacked(training: _Training, saved: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None, Operands]:
    """Return `out` or branch, `a` and the adapter from the saved tensors."""
    given = iter(saved)
    save_kept, save_a, _ = training.saves
    kept, a = next(given) if save_kept else None, next(given) if save_a else None
    return kept, a, planned_operands(training.where, given, *training.constants)


def _careful_backward(training: _Training, operands: tuple[Tensor, ...]) -> Any:
    grad, *saved = operands
    kept, a, steering = _unpacked(training, tuple(saved))

    def call() -> Any:
        return backward(grad, kept, a, steering, training.needs)

    if training.forward is None:
        return call()
    found, plan = Plan.make(operands, call, training.order)
    if plan is not None:
        keep(training.backward, kind_of(operands), plan)
    return found


#: The plans of all callers, by the kind of call: without gradients the plan's function.
_inference: dict[Any, Callable[..., Tensor | None]] = {}
_trained: dict[Any, _Training] = {}

#: Bypasses the torch.func support in `Function.apply`. No plan is used under torch.func.
_apply = super(torch.autograd.Function, _PlannedPostBlock).apply
