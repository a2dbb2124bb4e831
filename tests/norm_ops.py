"""RMSNorm behind the op: its kinds, the definition by hook and norm, and the comparison of all results with it."""

from dataclasses import dataclass, replace

import torch
from fused_steer.kernels.aot import hidden_states
from fused_steer.kernels.post_block_norm import post_block_norm
from ops import Inputs, definition, make_inputs, relative_error
from torch import Tensor

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


@dataclass(frozen=True)
class Kind:
    """A kind of RMSNorm, as models write it."""

    weight: bool = True
    plus_one: bool = False
    rounds_first: bool = True
    eps: float = 1e-5

    def options(self) -> dict:
        return {"plus_one": self.plus_one, "rounds_first": self.rounds_first, "eps": self.eps}


LLAMA = Kind()
GEMMA = Kind(plus_one=True, rounds_first=False, eps=1e-6)
KINDS = [LLAMA, GEMMA, Kind(rounds_first=False), Kind(weight=False, eps=0.0), Kind(plus_one=True)]


def norm_definition(x: Tensor, weight: Tensor | None, kind: Kind) -> Tensor:
    """Compute the norm as transformers' models do, with autograd, in x's dtype with sums in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, F32))
    unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + kind.eps)
    if weight is None:
        return unit.to(x.dtype)
    if kind.rounds_first:
        return (1 + weight if kind.plus_one else weight).to(x.dtype) * unit.to(x.dtype)
    weight = weight.to(wide.dtype)
    return (unit * (1 + weight if kind.plus_one else weight)).to(x.dtype)


def draw_weight(inputs: Inputs, kind: Kind, seed: int = 0) -> Tensor | None:
    """Draw a norm's weight around the identity, in the hidden state's dtype."""
    if not kind.weight:
        return None
    hidden, generator = inputs.residual.shape[-1], torch.Generator().manual_seed(seed + 7)
    weight = torch.randn(hidden, generator=generator) / 4 + (0 if kind.plus_one else 1)
    return weight.to(inputs.residual.device, inputs.residual.dtype)


def fused(inputs: Inputs, weight: Tensor | None, kind: Kind, activation: str = "silu") -> tuple[Tensor, Tensor]:
    return post_block_norm(
        inputs.residual, inputs.branch, inputs.down, inputs.up, norm_weight=weight, down_bias=inputs.down_bias,
        up_bias=inputs.up_bias, activation=activation, scale=inputs.scale, gain=inputs.gain, basis=inputs.basis,
        reads=inputs.reads, **kind.options(),
    )  # fmt: skip


def unfused(inputs: Inputs, weight: Tensor | None, kind: Kind, activation: str = "silu") -> tuple[Tensor, Tensor]:
    out = definition(inputs, activation)
    return out, norm_definition(out, weight, kind)


def run(
    function, inputs: Inputs, kind: Kind, activation: str, seed: int, dtype: torch.dtype | None = None, frozen=False
) -> dict:
    """Compute both outputs and all gradients of `function`. frozen: without that of the norm's weight."""
    leaves, weight = inputs.leaves(dtype), draw_weight(inputs, kind, seed)
    if weight is not None:
        weight = weight.to(dtype or weight.dtype).requires_grad_(not frozen)
    outputs = function(leaves, weight, kind, activation)
    generator = torch.Generator().manual_seed(seed + 99)
    grads = [torch.randn(inputs.residual.shape, generator=generator) for _ in outputs]
    grads = [grad.to(inputs.residual.device, inputs.residual.dtype).to(outputs[0].dtype) for grad in grads]
    named = replace(leaves, basis=None).tensors() | ({} if weight is None or frozen else {"norm_weight": weight})
    gradients = torch.autograd.grad(outputs, list(named.values()), grads)
    found = dict(zip(("out", "normed"), (output.detach() for output in outputs), strict=True))
    return found | dict(zip(named, gradients, strict=True))


def assert_as_good_as_unfused(
    cases: list[Inputs], kind: Kind = LLAMA, activation: str = "silu", frozen: bool = False
) -> None:
    """Assert that each result's error over all cases is at most twice that of hook and norm, plus 1e-6."""
    ours, theirs, truths = [], [], []
    for seed, inputs in enumerate(cases):
        ours.append(run(fused, inputs, kind, activation, seed, frozen=frozen))
        theirs.append(run(unfused, inputs, kind, activation, seed, inputs.residual.dtype, frozen))
        truths.append(run(unfused, inputs, kind, activation, seed, F64, frozen))
    for name in ours[0]:
        value, other, truth = (
            torch.cat([result[name].double().flatten() for result in results]) for results in (ours, theirs, truths)
        )
        error, bound = relative_error(value, truth), 2 * relative_error(other, truth) + 1e-6
        assert error <= bound, f"{name}: error {error:.2e}, bound {bound:.2e}"


def cancelling(tokens: int, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Draw rows where the shift cancels all but a hundredth of the state: x = Q c, out = x − 0.99 Q (Qᵀ x)."""
    inputs = make_inputs(
        tokens, 128, rank=4, device=device, biases=False, gain=False, scale=False, basis=0, seed=seed
    )  # fmt: skip
    q = torch.linalg.qr(inputs.up)[0]
    # exact in bf16, so that nothing but the op's own rounding is seen
    q, coefficients = q.to(BF16).float(), (inputs.residual[:, :4] @ torch.eye(4, device=device)).to(BF16).float()
    x = coefficients @ q.T
    down = torch.linalg.pinv(q)
    half = (x / 2).to(dtype)
    return replace(inputs, residual=half, branch=half.clone(), down=down, up=-0.99 * q, scale=1.0)


#: A norm that amplifies the rounding of rows that nearly cancel. A larger eps would hide it.
BARE = Kind(weight=False, eps=1e-12)


def units(launches: list) -> int:
    return sum(len(hidden_states(launch)) for launch in launches)
