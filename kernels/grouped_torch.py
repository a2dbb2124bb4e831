"""The `torch` backend of `post_block_grouped`: an adapter for each token, in plain PyTorch.

The host plans the order and grouping of the tokens (`plan_tokens`) once for all layers of a pass. No adapter is copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .contract import GroupedCall
from .torch_backend import ACTIVATIONS as PHI
from .torch_backend import accumulation_dtype


@dataclass
class TokenPlan:
    """The order and grouping in which steered tokens are multiplied by their adapters.

    A span is a run of tokens with one adapter: its slot, the index of its first token, and the index after its last.

    Attributes:
        highest: the highest slot of all tokens.
        ids: (N,), the tokens' slots.
        rows: (M,) int64, the steered tokens in order, or None for all tokens in their own order without a gather.
        gain: (M, 1) float32 in that order, or None.
        spans: all spans.
        single: spans that are multiplied token by token.
        several: spans that are multiplied by one product each.
        batched: blocks of consecutive slots for one batched product: first slot, number of slots, index of the first
            token, tokens for each slot.
    """

    highest: int
    ids: Tensor
    rows: Tensor | None
    gain: Tensor | None
    spans: list[tuple[int, int, int]]
    single: list[tuple[int, int, int]]
    several: list[tuple[int, int, int]]
    batched: list[tuple[int, int, int, int]]

    def taken(self, tensor: Tensor) -> Tensor:
        """Return the steered tokens' rows of a tensor, (N, …) -> (M, …)."""
        return tensor if self.rows is None else tensor.index_select(0, self.rows)

    def slots(self) -> Tensor:
        """Return the steered tokens' slots, (M,)."""
        return self.taken(self.ids)


def plan_tokens(ids: Tensor, gain: Tensor | None) -> TokenPlan:
    """Return the plan of tokens with these slots and gains, (N,) each. Waits for the device."""
    slots: list[int] = ids.tolist()
    if gain is None:
        rows = [row for row, slot in enumerate(slots) if slot >= 0]
    else:
        gains = gain.tolist()
        rows = [row for row, slot in enumerate(slots) if slot >= 0 and gains[row] != 0]
    plan = TokenPlan(max(slots, default=-1), ids, None, None, [], [], [], [])
    as_they_lie = len(rows) == len(slots)
    each_slot_once = False
    # Grouping few tokens by adapter, or sorting them by slot, costs more than it saves.
    if len(rows) > 3:
        found = {slots[row] for row in rows}
        first, room = min(found), max(found) - min(found) + 1
        if 4 * len(found) >= 3 * room if 2 * len(found) > len(rows) else len(rows) > 8:
            before = rows.copy()
            rows.sort(key=slots.__getitem__)
            as_they_lie = as_they_lie and rows == before
            each_slot_once = len(found) == len(rows) == room
    if not as_they_lie:
        plan.rows = torch.tensor(rows, dtype=torch.int64, device=ids.device)
    if gain is not None:
        plan.gain = plan.taken(gain).to(torch.float32).unsqueeze(1)
    if each_slot_once:
        plan.spans = [(first + place, place, place + 1) for place in range(room)]
        plan.batched = [(first, room, 0, 1)]
        return plan
    blocks: list[tuple[int, int, int, int]] = []
    start, end = 0, len(rows)
    while start < end:
        slot, stop = slots[rows[start]], start + 1
        while stop < end and slots[rows[stop]] == slot:
            stop += 1
        plan.spans.append((slot, start, stop))
        if blocks and slot == blocks[-1][0] + blocks[-1][1] and stop - start == blocks[-1][3]:
            low, count, begin, tokens = blocks[-1]
            blocks[-1] = (low, count + 1, begin, tokens)
        else:
            blocks.append((slot, 1, start, stop - start))
        start = stop
    for block in blocks:
        slot, count, begin, tokens = block
        if count * tokens >= 4 and count > 1:  # a batched product costs more for fewer
            plan.batched.append(block)
        else:
            alone = plan.single if tokens <= 2 else plan.several
            alone += [(slot + n, begin + n * tokens, begin + (n + 1) * tokens) for n in range(count)]
    return plan


def grouped_forward(call: GroupedCall, plan: TokenPlan) -> None:
    """Write `call.out`, by two products for each adapter that occurs."""
    acc = accumulation_dtype(call.residual.dtype)
    if plan.highest >= call.slots:
        raise ValueError(f"adapter_ids has {plan.highest}; expected below {call.slots}, the number of slots")
    if not call.into_branch:
        if call.branch is None:
            call.out.copy_(call.residual)
        else:
            torch.add(call.residual, call.branch, out=call.out)
    spans, of_plan = plan.spans, plan.taken
    if not spans:
        return
    if call.out.dtype == acc and not call.into_branch:
        x = of_plan(call.out)
    else:
        x = of_plan(call.residual).to(acc)
        if call.branch is not None:
            x = x + of_plan(call.branch).to(acc)
    slots = None
    if len(spans) > 1 and (
        call.down_biases is not None or call.up_biases is not None or isinstance(call.activation, Tensor)
    ):
        slots = plan.slots()
    gain = plan.gain
    if call.downs is not None and call.ups is not None:
        read = x
        if call.reads == "branch":
            assert call.branch is not None
            read = of_plan(call.branch).to(acc)
        a = _products(read, call.downs, plan, acc)
        if call.down_biases is not None:
            a = a + _of_tokens(call.down_biases, slots, spans).to(acc)
        h = _activate(a, call.activation, slots, spans)
        if gain is not None and call.up_biases is None:
            h, gain = h * gain, None  # scales r values for each token instead of d
        u = _products(h, call.ups, plan, acc)
        if call.up_biases is not None:
            u += _of_tokens(call.up_biases, slots, spans).to(acc)
    else:
        assert call.up_biases is not None
        u = _of_tokens(call.up_biases, slots, spans).to(acc).expand(x.shape).clone()  # it is written to below
    if gain is not None:
        u = u * gain
    if call.into_branch:
        assert call.branch is not None
        x = of_plan(call.branch).to(acc)
    # −0 + 0 would be +0, but −0 − 0 is −0. So x − (0 − u) keeps x bit for bit if the shift u is zero.
    torch.sub(u.new_zeros(()), u, out=u)
    if plan.rows is None and call.out.dtype == acc:
        torch.sub(x, u, out=call.out)
        return
    moved = (x - u).to(call.out.dtype)
    call.out.copy_(moved) if plan.rows is None else call.out.index_copy_(0, plan.rows, moved)


def _products(x: Tensor, weights: Tensor, plan: TokenPlan, acc: torch.dtype) -> Tensor:
    """Return x Wᵀ, (N, n), each token multiplied by its slot's W. x: (N, m). weights: (A, n, m)."""
    convert = weights.dtype != acc
    if len(plan.spans) == 1:
        weight = weights.select(0, plan.spans[0][0])
        return torch.mm(x, (weight.to(acc) if convert else weight).t())
    if len(plan.batched) == 1 and not plan.single and not plan.several:
        slot, count, _, tokens = plan.batched[0]
        weight = weights if count == len(weights) else weights.narrow(0, slot, count)
        return torch.bmm(x.view(count, tokens, -1), weight.to(acc).transpose(1, 2)).flatten(0, 1)
    out = x.new_empty(len(x), weights.shape[1])
    if plan.single:
        tokens_in, tokens_out = x.unbind(0), out.unbind(0)
        # A product of one token takes little longer than making a view, so views are made all at once if possible.
        at_once = len(weights) <= 2 * len(plan.single)
        weight_of = weights.unbind(0).__getitem__ if at_once else partial(weights.select, 0)
        for slot, start, stop in plan.single:
            weight = weight_of(slot)
            if convert:
                weight = weight.to(acc)
            for place in range(start, stop):
                torch.mv(weight, tokens_in[place], out=tokens_out[place])
    for slot, start, stop in plan.several:
        weight = weights.select(0, slot)
        torch.mm(x[start:stop], (weight.to(acc) if convert else weight).t(), out=out[start:stop])
    for slot, count, start, tokens in plan.batched:
        mine, result = (t.narrow(0, start, count * tokens).view(count, tokens, -1) for t in (x, out))
        torch.bmm(mine, weights.narrow(0, slot, count).to(acc).transpose(1, 2), out=result)
    return out


def _of_tokens(biases: Tensor, slots: Tensor | None, spans: list[tuple[int, int, int]]) -> Tensor:
    """Return each token's bias, or one bias if there is one adapter."""
    return biases[spans[0][0]] if slots is None else biases[slots]


def _activate(a: Tensor, activation: str | Tensor, slots: Tensor | None, spans: list[tuple[int, int, int]]) -> Tensor:
    if isinstance(activation, str):
        return PHI[activation][0](a)
    codes = activation.tolist()
    found = {codes[slot] for slot, _, _ in spans}
    for code in found:
        if not 0 <= code < len(ACTIVATIONS):
            raise ValueError(f"activation has {code}; expected the indices 0 to {len(ACTIVATIONS) - 1} of ACTIVATIONS")
    if len(found) == 1:
        return PHI[ACTIVATIONS[found.pop()]][0](a)
    of_tokens = activation[slots].unsqueeze(1)
    out = a
    for code in found:
        out = torch.where(of_tokens == code, PHI[ACTIVATIONS[code]][0](a), out)
    return out
