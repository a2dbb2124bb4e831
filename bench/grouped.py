"""Benchmark of the op with an adapter for each token, against a gather of weights with bmm, and one adapter for all.

Also with the RMSNorm that follows: by one launch, by two ops, and the norm without steering.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import timing
from .contenders import PHI
from .geometries import DTYPES, GroupedCase
from .levels import forgotten, l2_bytes, take_samples
from .results import Row
from .timing import Timed

EPS = 1e-5  # of the norm that follows


@dataclass(frozen=True)
class Tables:
    """The inputs of one call: hidden states, tables of A adapters, and each token's adapter.

    Attributes:
        residual, branch: (N, d) in the case's dtype.
        downs, ups: (A, r, d) and (A, d, r). float32 for fused-steer; the case's dtype for the rivals.
        ids: (N,) int32, the adapter of each token.
        gain: (N,) float32, the strength of each token.
        norm_weight: (d,) in the case's dtype, of the RMSNorm that follows.
    """

    residual: Tensor
    branch: Tensor
    downs: Tensor
    ups: Tensor
    ids: Tensor
    gain: Tensor
    norm_weight: Tensor
    activation: str


def make_tables(case: GroupedCase, device: torch.device, seed: int = 0) -> Tables:
    """Draw random operands. Tokens get adapters at random; the adapters' numbers of tokens differ by at most one."""
    generator = torch.Generator(device).manual_seed(seed)
    n, d, r, a = case.tokens, case.hidden, case.rank, case.adapters

    def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    ids = torch.arange(n, device=device) * a // n if case.prefill else torch.arange(n, device=device) % a
    slots = torch.randperm(a, generator=generator, device=device)
    if not case.prefill:
        ids = ids[torch.randperm(n, generator=generator, device=device)]
    residual, branch = (normal(n, d, dtype=DTYPES[case.dtype]) for _ in range(2))
    gain = torch.rand(n, generator=generator, device=device) + 0.5
    downs, ups = normal(a, r, d) / d**0.5, normal(a, d, r) / r**0.5
    norm_weight = torch.rand(d, generator=generator, device=device).to(DTYPES[case.dtype]) + 0.5
    return Tables(residual, branch, downs, ups, slots[ids].int(), gain, norm_weight, case.activation)


def fused(x: Tables) -> Tensor:
    from fused_steer.kernels.grouped import post_block_grouped

    return post_block_grouped(x.residual, x.branch, x.downs, x.ups, x.ids, activation=x.activation, gain=x.gain)


def one_adapter(x: Tables) -> Tensor:
    """Compute the op with the first adapter for every token."""
    from fused_steer import post_block

    return post_block(x.residual, x.branch, x.downs[0], x.ups[0], activation=x.activation, gain=x.gain)


def gather_bmm(x: Tables) -> Tensor:
    """Compute the op by copying each token's adapter and bmm. A token without adapter stays unchanged bit for bit."""
    h = x.residual + x.branch
    slots = x.ids.clamp(min=0)
    a = torch.bmm(x.downs[slots], h.unsqueeze(2))
    shift = torch.bmm(x.ups[slots], PHI[x.activation](a)).squeeze(2)
    shift = shift * torch.where(x.ids < 0, 0, x.gain).unsqueeze(1).to(shift.dtype)
    return torch.where(shift == 0, h, h + shift)


def add(x: Tables) -> Tensor:
    return torch.add(x.residual, x.branch)


def fused_norm(x: Tables) -> Tensor:
    """Steer, add and normalise by one launch."""
    from fused_steer.kernels.grouped_norm import post_block_grouped_norm

    return post_block_grouped_norm(
        x.residual, x.branch, x.downs, x.ups, x.ids, norm_weight=x.norm_weight, eps=EPS, activation=x.activation,
        gain=x.gain,
    )[1]  # fmt: skip


def then_norm(x: Tables) -> Tensor:
    """Steer and add, then normalise by a fused norm."""
    from fused_steer.kernels.norm import rms_norm

    return rms_norm(fused(x), x.norm_weight, eps=EPS)


def add_norm(x: Tables) -> Tensor:
    """Add and normalise by one launch without adapters, as a server's own kernel does."""
    from fused_steer.kernels.post_block_norm import post_block_norm

    return post_block_norm(
        x.residual, x.branch, None, None, up_bias=x.norm_weight, scale=0.0, norm_weight=x.norm_weight, eps=EPS
    )[1]


def _normalised(h: Tensor, weight: Tensor) -> Tensor:
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(h.dtype) * weight


@dataclass(frozen=True)
class GroupedContender:
    """An implementation of the op with an adapter for each token, or a floor.

    Attributes:
        same: whether it computes this op.
        master_weights: whether its adapters are in float32.
        norm: whether it returns the normalised state.
    """

    call: Callable[[Tables], Tensor]
    same: bool = True
    master_weights: bool = True
    norm: bool = False


GROUPED_CONTENDERS: dict[str, GroupedContender] = {
    "fused": GroupedContender(fused),
    "fused-again": GroupedContender(fused),
    "one-adapter": GroupedContender(one_adapter, same=False),
    "gather-bmm": GroupedContender(gather_bmm, master_weights=False),
    "add": GroupedContender(add, same=False),
    "fused-norm": GroupedContender(fused_norm, norm=True),
    "then-norm": GroupedContender(then_norm, norm=True),
    "add-norm": GroupedContender(add_norm, same=False, norm=True),
}


def plain(case: GroupedCase, name: str, x: Tables) -> Tables:
    """Return the operands in the dtypes that this contender uses."""
    if GROUPED_CONTENDERS[name].master_weights:
        return x
    return replace(x, downs=x.downs.to(DTYPES[case.dtype]), ups=x.ups.to(DTYPES[case.dtype]))


def check(case: GroupedCase, name: str, device: torch.device) -> str:
    """Return what is wrong with a contender, or "".

    Its error from float64 must be at most twice that of gather-bmm in the same dtype, plus 1e-6. Tokens without adapter
    must stay unchanged bit for bit.
    """
    small = replace(case, tokens=min(case.tokens, 512), adapters=min(case.adapters, case.tokens, 64))
    x = make_tables(small, device, seed=1)
    x = replace(x, ids=x.ids.masked_fill(torch.arange(small.tokens, device=device) % 7 == 3, -1))
    wide = replace(x, **{n: v.double() for n, v in vars(x).items() if isinstance(v, Tensor) and v.is_floating_point()})
    truth = gather_bmm(wide)
    out, usual = (GROUPED_CONTENDERS[n].call(plain(small, n, x)) for n in (name, "gather-bmm"))
    is_norm = GROUPED_CONTENDERS[name].norm
    if is_norm:
        truth, usual = _normalised(truth, wide.norm_weight), _normalised(usual, x.norm_weight)
    ours, theirs = (float((value.double() - truth).norm() / truth.norm()) for value in (out, usual))
    if not ours <= 2 * theirs + 1e-6:
        return f"wrong: relative error {ours:.2e}; expected at most twice gather-bmm's, {theirs:.2e}"
    if not is_norm and not torch.equal(out[x.ids < 0], add(x)[x.ids < 0]):
        return "wrong: a token without adapter is changed; expected it unchanged bit for bit"
    return ""


class _Allocations(TorchDispatchMode):
    """Counts the bytes of the tensors that operations allocate, also inside of this package's ops."""

    looks_inside = True

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func.namespace == "fused_steer":
            from fused_steer.kernels.registered import implementation

            with self:
                return implementation(func)(*args, **kwargs)
        given = {
            t.untyped_storage().data_ptr()
            for values in (args, kwargs.values())
            for value in values
            for t in (value if isinstance(value, (list, tuple)) else [value])
            if isinstance(t, Tensor)
        }
        out = func(*args, **kwargs)
        for t in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given:
                self.nbytes += t.untyped_storage().nbytes()
        return out


def made_bytes(call: Callable[[], Tensor]) -> int:
    """Return the bytes of all tensors that a call allocates, its result excluded. Exact on any machine."""
    with torch.no_grad(), _Allocations() as made:
        out = call()
    return made.nbytes - out.untyped_storage().nbytes()


def measure_grouped(
    case: GroupedCase, device: torch.device, names: Sequence[str], rounds: int = 20, count: bool = False
) -> list[Row]:
    """Time each contender, interleaved, and count the bytes it allocates. A contender that is wrong gets no figures."""
    rows = {name: Row("grouped", "forward", name, asdict(case)) for name in names}
    sizes = []
    try:
        table = case.adapters * case.rank * case.hidden * DTYPES[case.dtype].itemsize
        sets_of = timing.input_sets(2 * case.unit_bytes + 2 * table, l2_bytes(device))
        sets = [make_tables(case, device, seed) for seed in range(sets_of)]
    except torch.OutOfMemoryError as error:
        for row in rows.values():
            row.status = forgotten(error)
        return list(rows.values())
    ready = []
    for name, row in rows.items():
        contender = GROUPED_CONTENDERS[name]
        try:
            if contender.same:
                row.status = check(case, name, device) or "ok"
            if row.status != "ok":
                continue
            operands = [plain(case, name, x) for x in sets]
            calls = [_without_gradient(contender.call, x) for x in operands]
            timed = Timed(name, calls)
            timed.prepare(device, graph=True)
            row.launches = timing.count_launches(calls[0], device) if count else None
            sizes.append(Row("grouped", "bytes", name, asdict(case), [made_bytes(calls[0])]))
        except Exception as error:  # a rival may fail in any way, and the run goes on
            row.status = forgotten(error)
            continue
        ready.append(timed)
    take_samples(ready, rows, device, rounds)
    return [*rows.values(), *sizes]


def _without_gradient(function: Callable[[Tables], Tensor], x: Tables) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return function(x)

    return call
