"""Adapters in a model that several processes share: which process writes files, and gathering sharded tensors.

With DDP and tensor parallelism every process has the whole steering. With FSDP2 (`fully_shard`) the parameters are
DTensors. With FSDP1 (`FullyShardedDataParallel`) each process has a slice of a flat parameter. DeepSpeed's ZeRO trains
its own flat copies and overwrites the parameters. Its stage 3 keeps no parameter between passes. A stage of a pipeline
trains only its own layers.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def in_group() -> bool:
    """Return whether this process belongs to a process group of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Return whether this process is the one that writes files."""
    return not in_group() or dist.get_rank() == 0


def sharder(module: nn.Module) -> str | None:
    """Return "FSDP" (1 or 2) or "ZeRO" (any stage) if it has sharded the parameters of `module`, else None."""
    # Sharded parameters look different inside and outside of a forward pass. These marks stay: of FSDP on modules, of
    # ZeRO 1 and 2 and of ZeRO 3 on parameters.
    if any(getattr(part, "_is_fsdp_managed_module", False) for part in module.modules()):
        return "FSDP"
    zero = any(hasattr(p, "_hp_mapping") or hasattr(p, "ds_id") for p in module.parameters())
    return "ZeRO" if zero else None


def check_unsharded(layers: Iterable[nn.Module], what: str) -> None:
    """Check that FSDP or ZeRO has not sharded the decoder layers. Both would lose parameters or values that come later.

    Raises:
        ValueError: a layer is sharded. The message expects `what` before that.
    """
    for index, layer in enumerate(layers):
        by = sharder(layer)
        if by is not None:
            raise ValueError(f"layer {index} is sharded by {by}; expected {what} before it is")


def check_whole(module: nn.Module, place: str, what: str) -> None:
    """Check that this process has the whole parameters of `module`, and not only its part of them.

    ZeRO has them whole in its stages 1 and 2, and small ones in stage 3.

    Args:
        place: where the module is, for the error message.
        what: what has to be whole.

    Raises:
        ValueError: FSDP or ZeRO has sharded them.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    by = sharder(module)
    if by == "FSDP" or by == "ZeRO" and any(not parameter.numel() for parameter in module.parameters()):
        raise ValueError(f"{place} is sharded by {by}; expected {what} to be whole in every process (DDP)")


#: For each DistributedDataParallel the ids of the parameters whose gradients it averages. It keeps these parameters
#: alive, so that no other object gets such an id.
_averaged: weakref.WeakKeyDictionary[nn.Module, frozenset[int]] = weakref.WeakKeyDictionary()


def check_averaged(
    name: str | None,
    steering: Callable[[], Iterable[nn.Parameter]],
    others: Callable[[nn.Module], Iterable[nn.Parameter]],
) -> None:
    """Check that DDP averages the gradients of all adapters that train, if the pass that begins runs inside DDP.

    DDP averages what trained when it wrapped the model. Of anything else each process would keep its own gradient.

    Args:
        name: the steering adapter's name. None: the steering does not run in this pass, and gets no gradient.
        steering: returns the parameters of the model's steering adapters.
        others: returns the parameters of PEFT's adapters in a model, and of heads beside them.

    Raises:
        RuntimeError: an adapter did not train then.
    """
    ddp = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if ddp is None:
        return
    left = {id(parameter) for parameter in _trained(ddp.module)} - _averaged_by(ddp)
    if not left:
        return
    own = {id(parameter) for parameter in steering()}
    of_peft = {id(parameter) for parameter in others(ddp.module)}
    left &= of_peft if name is None else own | of_peft
    for path, parameter in _not_ignored(ddp, left):
        if id(parameter) in own:
            raise _not_averaged(f"adapter {name!r} was not in use", f"steering.use({name!r})")
        raise _not_averaged(f"{path} did not train", _BY_PEFT)


def check_averaged_in(site: nn.Module) -> None:
    """Refuse to train an adapter of PEFT's at a site if DDP does not average its gradients. Asked in the site's call.

    Raises:
        RuntimeError: an adapter that trains did not train when DDP wrapped the model.
    """
    ddp = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if ddp is None:
        return
    left = {id(parameter) for parameter in site.parameters() if parameter.requires_grad} - _averaged_by(ddp)
    for path, _ in _not_ignored(ddp, left):
        raise _not_averaged(f"{path} did not train", _BY_PEFT)


_BY_PEFT = "PEFT's set_adapter or enable_adapters"


def _averaged_by(ddp: Any) -> frozenset[int]:
    """Return which parameters have their gradients averaged by a DistributedDataParallel, as their ids."""
    found = _averaged.get(ddp)
    if found is None:
        buckets = ddp.reducer._get_zeros_like_grad_buckets()
        found = _averaged[ddp] = frozenset(id(parameter) for bucket in buckets for parameter in bucket.parameters())
    return found


def _not_ignored(ddp: Any, left: set[int]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters with these ids, but those that the user told DDP to ignore, and averages otherwise."""
    if left:
        for path, parameter in ddp.module.named_parameters():
            if id(parameter) in left and path not in ddp.parameters_to_ignore:
                yield path, parameter


def _not_averaged(what: str, after: str) -> RuntimeError:
    return RuntimeError(
        f"{what} when DistributedDataParallel wrapped the model, so its gradients would not be averaged over the "
        f"processes; expected the model to be wrapped (again) after {after}"
    )


def _trained(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that train. It runs in each pass, in a quarter of the time that `parameters()` takes."""
    modules, seen = [module], {module}
    for part in modules:
        yield from (p for p in part._parameters.values() if p is not None and p.requires_grad)
        new = {child for child in part._modules.values() if child is not None} - seen
        modules += new
        seen |= new


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether a tensor is a distributed tensor of PyTorch."""
    module = sys.modules.get("torch.distributed.tensor")  # a DTensor's existence means that the module was imported
    return module is not None and isinstance(tensor, module.DTensor)


def gather(parts: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the whole tensors, gathered from every process's part. All processes have to call this.

    Args:
        parts: this process's parts, by name.
        shapes: the shapes of the whole tensors.

    Raises:
        ValueError: the parts do not form a whole tensor.
    """
    whole = {name: part.full_tensor() for name, part in parts.items() if is_dtensor(part)}
    flat = {name: part.reshape(-1).cpu() for name, part in parts.items() if name not in whole}
    if flat:
        of_ranks: list[Any] = [flat]
        if in_group():
            of_ranks = [None] * dist.get_world_size()
            dist.all_gather_object(of_ranks, flat)
        for name in flat:
            whole[name] = _join(name, [theirs[name] for theirs in of_ranks], shapes[name])
    return whole


def merge(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of all processes, by name, the first one's where several have one. All have to call this."""
    mine = {name: (part.full_tensor() if is_dtensor(part) else part).cpu() for name, part in parts.items()}
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    return {name: tensor for theirs in reversed(of_ranks) for name, tensor in theirs.items()}


def _join(name: str, parts: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Join the parts of FSDP1: slices of the flattened tensor in the order of the ranks, or each the whole tensor."""
    size = torch.Size(shape)
    whole = parts[0] if parts[0].numel() == size.numel() else torch.cat(parts)
    if whole.numel() != size.numel():
        raise ValueError(
            f"{name} is spread over the processes in {[part.numel() for part in parts]} elements; expected "
            f"{size.numel()} in all (inside FullyShardedDataParallel.summon_full_params each process has them)"
        )
    return whole.view(size)


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a tensor, laid out as `like`. All processes have the whole tensor."""
    if not is_dtensor(like):
        return whole
    # Each process has the whole tensor, so nothing is sent.
    return sys.modules["torch.distributed.tensor"].distribute_tensor(
        whole, like.device_mesh, like.placements, src_data_rank=None
    )


def first_writes(write: Callable[[], None], *, together: bool) -> None:
    """Let only the first process of a process group write.

    With `together`, all processes have to call this. They return when it is done, and each raises what the first one
    raised, so that none waits for a failed one.
    """
    if not together or not in_group():
        if is_first():
            write()
        return
    outcome: list[Exception | None] = [None]
    if is_first():
        try:
            write()
        except Exception as error:
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if outcome[0] is not None:
        raise outcome[0]
