"""A model shared by several processes: which of them writes an adapter, and how its sharded tensors are gathered.

DDP and tensor parallelism leave the steering whole in every process. FSDP does not: FSDP2 (`fully_shard`) makes its
parameters DTensors, FSDP1 (`FullyShardedDataParallel`) whatever stretch of a flat parameter this process has. ZeRO, of
DeepSpeed, trains flat copies of its own and writes them over the parameters, of which stage 3 leaves nothing between
passes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def in_group() -> bool:
    """Whether this process is one of several that know each other."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return not in_group() or dist.get_rank() == 0


def sharder(module: nn.Module) -> str | None:
    """What has sharded the parameters of `module`: "FSDP", 1 or 2, or "ZeRO", of any stage; None where nothing has."""
    # Sharded parameters look differently in and out of a forward pass. These marks stay, of FSDP on modules, of ZeRO 1
    # and 2, and of ZeRO 3 on parameters.
    if any(getattr(part, "_is_fsdp_managed_module", False) for part in module.modules()):
        return "FSDP"
    zero = any(hasattr(p, "_hp_mapping") or hasattr(p, "ds_id") for p in module.parameters())
    return "ZeRO" if zero else None


def check_unsharded(layers: Iterable[nn.Module], what: str) -> None:
    """Refuse decoder layers that FSDP or ZeRO has sharded. Both keep their own account of a layer's parameters: others
    that come later, or values, are lost.

    Raises:
        ValueError: it says that `what` is expected before.
    """
    for index, layer in enumerate(layers):
        by = sharder(layer)
        if by is not None:
            raise ValueError(f"layer {index} is sharded by {by}; expected {what} before it is")


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is one of PyTorch's distributed tensors."""
    module = sys.modules.get("torch.distributed.tensor")  # a DTensor has imported it
    return module is not None and isinstance(tensor, module.DTensor)


def gather(parts: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The whole tensors, from every process's part of each. All processes have to call this.

    Args:
        parts: this process's, by name.
        shapes: of the whole tensors.

    Raises:
        ValueError: the parts make no whole.
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


def _join(name: str, parts: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """FSDP1's parts are stretches of the flattened tensor in the order of the ranks, or for the moment all of it."""
    size = torch.Size(shape)
    whole = parts[0] if parts[0].numel() == size.numel() else torch.cat(parts)
    if whole.numel() != size.numel():
        raise ValueError(
            f"{name} is spread over the processes in {[part.numel() for part in parts]} elements; expected "
            f"{size.numel()} in all (inside FullyShardedDataParallel.summon_full_params each process has them)"
        )
    return whole.view(size)


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """What this process has of a tensor that all processes have whole, laid out as `like`."""
    if not is_dtensor(like):
        return whole
    # Each process has all of it: nothing is sent.
    return sys.modules["torch.distributed.tensor"].distribute_tensor(
        whole, like.device_mesh, like.placements, src_data_rank=None
    )


def first_writes(write: Callable[[], None], *, together: bool) -> None:
    """Let the first process write.

    together: all processes have called this. They then return when it is done, and what it raised is raised in each:
    none waits for one that failed.
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
