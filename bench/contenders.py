"""The contenders, which are the implementations to compare: the fused op, its rivals, and the plain add as the floor.

A contender for the op is a function from `Operands` to the steered hidden state. A contender for models takes a fresh,
frozen model and steers it. Contenders that claim to compute the fused op's function are checked before they are
measured.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .geometries import DTYPES, GEOMETRIES, OpCase

PHI: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "identity": lambda a: a}

# ----------------------------------------------------------------------------------------------------------------- op


@dataclass
class Operands:
    """The inputs of one call of the op.

    Attributes:
        residual, branch, grad: (N, d) in the case's dtype. `branch` is the sublayer's output.
        down, up, basis: (r, d), (d, r) and (d, k). float32 for fused-steer; the case's dtype for the rivals.
        reads: the tensor that W1 is applied to, "sum" or "branch".
    """

    residual: Tensor
    branch: Tensor
    grad: Tensor
    down: Tensor
    up: Tensor
    basis: Tensor | None
    activation: str
    reads: str

    def weights_in(self, dtype: torch.dtype) -> Operands:
        """Return these operands with the adapter's weights cast to `dtype`."""
        basis = None if self.basis is None else self.basis.to(dtype)
        return replace(self, down=self.down.to(dtype), up=self.up.to(dtype), basis=basis)

    def with_leaves(self) -> tuple[Operands, list[Tensor]]:
        """Return operands that require gradients, and the list of these leaves: a hidden state, down, up.

        The hidden state is residual, because branch has the same gradient. If W1 is applied to branch, it is branch,
        because residual then has the incoming gradient.
        """
        state = "residual" if self.reads == "sum" else "branch"
        leaves = {name: getattr(self, name).detach().requires_grad_() for name in (state, "down", "up")}
        return replace(self, **leaves), list(leaves.values())


@functools.lru_cache(maxsize=8)
def _orthonormal(hidden: int, columns: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.linalg.qr(torch.randn(hidden, columns, generator=generator, device=device))[0].contiguous()


def make_operands(case: OpCase, device: torch.device, seed: int = 0) -> Operands:
    """Draw random operands; the shift is about as large as the hidden state."""
    generator = torch.Generator(device).manual_seed(seed)
    n, d, r = case.tokens, case.hidden, case.rank

    def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    residual, branch, grad = (normal(n, d, dtype=DTYPES[case.dtype]) for _ in range(3))
    # Rotating the rows of an orthonormal basis gives another orthonormal basis, without a decomposition.
    basis = _orthonormal(d, case.basis, device).roll(seed, 0) if case.basis else None
    down, up = normal(r, d) / d**0.5, normal(d, r) / r**0.5
    return Operands(residual, branch, grad, down, up, basis, case.activation, case.reads)


def fused(x: Operands) -> Tensor:
    from fused_steer import post_block

    return post_block(x.residual, x.branch, x.down, x.up, activation=x.activation, basis=x.basis, reads=x.reads)


def hook(x: Operands) -> Tensor:
    """Compute the block's residual add, then the paper's forward hook; or the hook on branch, then the add."""
    return _whole_hook(x.residual, x.branch, x.down, x.up, x.basis, x.activation, x.reads)


def _shifted(h: Tensor, down: Tensor, up: Tensor, basis: Tensor | None, activation: str) -> Tensor:
    if basis is not None:
        up = up - basis @ (basis.t() @ up)
    return h + F.linear(PHI[activation](F.linear(h, down)), up)


def _tensors_of(function: Callable[..., Tensor]) -> Callable[[Operands], Tensor]:
    def call(x: Operands) -> Tensor:
        return function(x.residual, x.branch, x.down, x.up, x.basis, x.activation, x.reads)

    return call


def _whole_hook(residual, branch, down, up, basis, activation, reads):
    if reads == "branch":
        return residual + _shifted(branch, down, up, basis, activation)
    return _shifted(residual + branch, down, up, basis, activation)


@functools.cache
def hook_compiled() -> Callable[[Operands], Tensor]:
    """Return the residual add and the hook, compiled together by torch.compile."""
    # A graph that is run backward twice must not give its buffers away.
    importlib.import_module("torch._functorch.config").donated_buffer = False
    # Every size is compiled separately, and there are more sizes than dynamo's default limit.
    dynamo = importlib.import_module("torch._dynamo.config")
    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = 1 << 14
    return _tensors_of(torch.compile(_whole_hook, fullgraph=True, dynamic=False))


def add(x: Operands) -> Tensor:
    """Compute the plain residual add: the cost of the unsteered block, and the floor of the forward pass."""
    return torch.add(x.residual, x.branch)


@dataclass(frozen=True)
class OpContender:
    """An implementation of the op, or a floor.

    Attributes:
        call: returns the function to measure.
        steers: whether it computes the op.
        master_weights: whether its adapter is in float32.
    """

    name: str
    call: Callable[[], Callable[[Operands], Tensor]]
    steers: bool = True
    master_weights: bool = False


OP_CONTENDERS: dict[str, OpContender] = {
    contender.name: contender
    for contender in (
        OpContender("fused", lambda: fused, master_weights=True),
        OpContender("fused-again", lambda: fused, master_weights=True),
        OpContender("hook", lambda: hook),
        OpContender("hook-compiled", hook_compiled),
        OpContender("add", lambda: add, steers=False),
        OpContender("copy", lambda: lambda x: x.residual.clone(), steers=False),
    )
}


def plain(case: OpCase, contender: OpContender, x: Operands) -> Operands:
    """Return the operands in the dtypes that this contender uses."""
    return x if contender.master_weights else x.weights_in(DTYPES[case.dtype])


def op_errors(
    case: OpCase, contender: OpContender, device: torch.device, gradients: bool, seed: int = 1
) -> list[tuple[float, float]]:
    """Return relative errors as pairs: the contender's and the eager hook's. The truth is the hook in float64.

    One pair for the output; with `gradients` also one each for the hidden state, W1 and W2.
    """
    x = make_operands(case, device, seed)
    wide = {name: value.double() for name, value in vars(x).items() if isinstance(value, Tensor)}

    def results(function: Callable[[Operands], Tensor], operands: Operands) -> list[Tensor]:
        if not gradients:
            with torch.no_grad():
                return [function(operands)]
        operands, leaves = operands.with_leaves()
        out = function(operands)
        return [out.detach(), *torch.autograd.grad(out, leaves, operands.grad)]

    truth = results(hook, Operands(**{**vars(x), **wide}))
    ours, theirs = (
        [float((value.double() - true).norm() / true.norm()) for value, true in zip(values, truth, strict=True)]
        for values in (results(of.call(), plain(case, of, x)) for of in (contender, OP_CONTENDERS["hook"]))
    )
    return list(zip(ours, theirs, strict=True))


# -------------------------------------------------------------------------------------------------------------- model


def build(geometry: str, layers: int, dtype: str, device: torch.device, vocabulary: int | None = None) -> Any:
    """Build a frozen causal language model of a geometry with random weights; `layers` = 0 builds all its layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, sizes = GEOMETRIES[geometry]
    sizes = {**sizes, "max_position_embeddings": 8192, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if layers:
        sizes["num_hidden_layers"] = layers
    if vocabulary:
        sizes["vocab_size"] = vocabulary
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, **sizes), dtype=DTYPES[dtype], attn_implementation="sdpa"
        )
    return model.requires_grad_(False)


def copy_of(base: Any) -> Any:
    """Copy a frozen model for a contender. The copy shares the parameters and buffers, as no contender writes them."""
    return copy.deepcopy(base, {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    return model.get_submodule("model.layers")


def adapter_weights(model: nn.Module, rank: int, seed: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Draw W1 (r, d) and W2 (d, r) of every layer, with a small shift; every contender gets the same."""
    hidden = model.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(rank, hidden, generator=generator) / hidden**0.5,
            torch.randn(hidden, rank, generator=generator) * 0.1 / rank**0.5,
        )
        for _ in decoder_layers(model)
    ]


def steer_fused(model: Any, rank: int, fuse_norm: bool = False) -> Any:
    from fused_steer import SteerConfig, patch_model

    patch_model(model, SteerConfig(rank=rank), fuse_norm=fuse_norm)
    set_adapter(model, "default", adapter_weights(model, rank))
    return model


@torch.no_grad()
def set_adapter(model: Any, name: str, weights: list[tuple[Tensor, Tensor]]) -> None:
    """Copy these weights into an adapter of a patched model."""
    for layer, (down, up) in zip(decoder_layers(model), weights, strict=True):
        layer.post_block.steer_down[name].weight.copy_(down)
        layer.post_block.steer_up[name].weight.copy_(up)


class _Shift(nn.Module):
    """The steering module of the paper's hook, in the model's dtype."""

    def __init__(self, down: Tensor, up: Tensor, like: Tensor) -> None:
        super().__init__()
        self.down, self.up = (nn.Parameter(w.to(like.device, like.dtype)) for w in (down, up))

    def forward(self, h: Tensor) -> Tensor:
        return h + F.linear(F.silu(F.linear(h, self.down)), self.up)


def steer_hook(model: Any, rank: int, compiled: bool = False) -> Any:
    """Steer by a forward hook on every decoder layer, as the paper does."""
    for layer, (down, up) in zip(decoder_layers(model), adapter_weights(model, rank), strict=True):
        layer.shift = _Shift(down, up, next(layer.parameters()))
        shift = torch.compile(layer.shift, dynamic=False) if compiled else layer.shift

        def steer(_: nn.Module, __: Any, output: Any, shift: Any = shift) -> Any:
            return (shift(output[0]), *output[1:]) if isinstance(output, tuple) else shift(output)

        layer.register_forward_hook(steer)
    return model


def steer_hook_liger(model: Any, rank: int) -> Any:
    """Steer by hooks, and replace every RMSNorm of the model by Liger's fused kernel."""
    from liger_kernel.transformers import LigerRMSNorm

    gemma = "gemma" in model.config.model_type
    options = {"offset": 1.0, "casting_mode": "gemma", "init_fn": "zeros"} if gemma else {}
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6))
                fast = LigerRMSNorm(norm.weight.numel(), eps=eps, **options)
                fast.weight = norm.weight
                setattr(parent, name, fast)
    return steer_hook(model, rank)


def steer_lora(model: Any, rank: int) -> Any:
    """Add PEFT's LoRA, r = 8, to all linear layers."""
    from peft import LoraConfig, get_peft_model

    # get_peft_model returns a wrapper; the benchmark calls the model inside it.
    wrapped = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"), autocast_adapter_dtype=False)
    return wrapped.base_model.model


def steer_joint(model: Any, rank: int) -> Any:
    """Add LoRA and steering; the steering is kept orthogonal to the LoRA at every training step."""
    from fused_steer import SteerConfig, patch_model

    return patch_model(steer_lora(model, rank), SteerConfig(rank=rank, orthogonal_to="lora"))


class _Reft(nn.Module):
    """A ReftModel with the interface of the model inside it, intervening at every position."""

    def __init__(self, reft: Any) -> None:
        super().__init__()
        self.reft = reft
        self.inner, self.config = [reft.model], reft.model.config  # a list: a module's parameters are counted once
        self.interventions = nn.ModuleList(reft.interventions.values())

    def get_input_embeddings(self) -> nn.Module:
        return self.inner[0].get_input_embeddings()

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        self.inner[0].gradient_checkpointing_enable(**options)

    def train(self, mode: bool = True) -> _Reft:
        self.inner[0].train(mode)
        return self

    def forward(self, **inputs: Any) -> Any:
        # Without locations pyvene intervenes everywhere.
        return self.reft(base=inputs, unit_locations=None)[1]


def steer_loreft(model: Any, rank: int) -> Any:
    """Add pyreft's LoReFT to every block's output."""
    import pyreft

    hidden, dtype = model.config.hidden_size, model.dtype
    representations = [
        {
            "layer": index,
            "component": "block_output",
            "low_rank_dimension": rank,
            "intervention": pyreft.LoreftIntervention(embed_dim=hidden, low_rank_dimension=rank, dtype=dtype),
        }
        for index in range(len(decoder_layers(model)))
    ]
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations), set_device=False)
    reft.set_device(model.device)
    return _Reft(reft)


@dataclass(frozen=True)
class ModelContender:
    """A way to steer a model.

    Attributes:
        steer: takes (model, rank) and returns the steered model.
        needs: the packages that it imports.
        same: whether it computes the same function as fused-steer.
    """

    name: str
    steer: Callable[[Any, int], Any]
    needs: tuple[str, ...] = ()
    same: bool = False


MODEL_CONTENDERS: dict[str, ModelContender] = {
    contender.name: contender
    for contender in (
        ModelContender("unsteered", lambda model, rank: model),
        ModelContender("fused", steer_fused, same=True),
        ModelContender("fused-again", steer_fused, same=True),
        ModelContender("fused-norm", functools.partial(steer_fused, fuse_norm=True), same=True),
        ModelContender("hook", steer_hook, same=True),
        ModelContender("hook-compiled", lambda model, rank: steer_hook(model, rank, compiled=True), same=True),
        ModelContender("hook-liger", steer_hook_liger, ("liger_kernel",), same=True),
        ModelContender("lora", steer_lora, ("peft",)),
        ModelContender("joint-orth", steer_joint, ("peft",)),
        ModelContender("loreft", steer_loreft, ("pyreft", "pyvene")),
    )
}
#: The contenders that are measured together, in turns. Each group is a step of its own, the more important one first.
MODEL_GROUPS: dict[str, tuple[str, ...]] = {
    "usual": ("unsteered", "fused", "hook", "fused-norm", "lora", "joint-orth"),
    "others": ("unsteered", "fused", "fused-again", "hook-compiled", "hook-liger", "loreft"),
}
_EXTRA = "pip install 'fused-steer[bench]'"
_INSTALL = {
    "liger_kernel": _EXTRA,
    "peft": _EXTRA,
    "pyvene": _EXTRA,
    "pyreft": "pip install --no-deps pyreft==0.1.0",  # it pins a transformers of years ago, and works with ours
}


def absent() -> dict[str, str]:
    """Return the contenders that cannot run here: name -> reason, with the command to install what is missing."""
    reasons: dict[str, str] = {}
    for contender in MODEL_CONTENDERS.values():
        lacking = [package for package in contender.needs if importlib.util.find_spec(package) is None]
        if lacking:
            commands = dict.fromkeys(_INSTALL[package] for package in sorted(lacking, reverse=True))
            reasons[contender.name] = f"{', '.join(lacking)} not installed; `{' && '.join(commands)}`"
            continue
        for package in contender.needs:
            try:
                importlib.import_module(package)
            except Exception as error:  # a library made for other versions may fail in any way
                line = " ".join(str(error).split())[:160]
                reasons[contender.name] = f"{package} cannot be imported: {type(error).__name__}: {line}"
                break
    return reasons
