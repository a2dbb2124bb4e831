"""Joint-Orth at run time: steering that stays out of the subspace that LoRA writes into (arXiv 2603.00425, §5.2).

The parameters themselves satisfy the constraint, W2 = (I − V Vᵀ) W2, with V a basis of what the LoRA writes now. So the
forward pass costs nothing, and whatever reads the parameters (a checkpoint, an adapter file) has constrained ones. Two
things keep it so:

- the gradient of W2 is projected where it arises, in the site (`kernels.orthogonal.project_gradient`);
- after an optimizer step, which moves B and, as Adam rescales each element, moves W2 out of the subspace, V is found
  again and W2 projected, for all layers at once. Micro-batches and recomputation between steps see the same V.

A value that changed otherwise (a loaded checkpoint) is found by its version at the next forward pass that trains. It is
then projected only if it violates the constraint: weights that were saved constrained are loaded bit for bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from ..adapters.distributed import sharder
from ..adapters.parameters import UP, UP_BIAS, ByPlace, Place
from ..config import SteerConfig
from ..kernels.orthogonal import MAX_WRITERS, column_space, project_out
from ..model.decoder import execution_device
from ..model.site import SteeringSite
from .layers import columns_of, lora_layers
from .writers import Writer, choose_writers

#: ‖BᵀW2‖ beyond this share of ‖B‖ ‖W2‖ (Frobenius) violates the constraint: the bound that the kernels are held to.
TOLERANCE = 1e-5

Columns = dict[int, list[Tensor]]  # B (d, k) of each LoRA that writes into a layer's stream, by layer


def lora_columns(writers: Mapping[int, list[Writer]], config: SteerConfig) -> Columns:
    """B of each layer that an active LoRA writes in, of the writers that `config` chooses."""
    found = {
        i: [b for w in choose_writers(ws, config.orthogonal_modules) for b in w.columns()] for i, ws in writers.items()
    }
    return {index: columns for index, columns in found.items() if columns}


def check_carries_lora(model: nn.Module, layers: Mapping[int, nn.Module]) -> None:
    """Refuse what no writers can be traced for, before they are.

    Args:
        model: with or without LoRA.
        layers: the steered ones, by index.

    Raises:
        ValueError: the model carries no LoRA, or a layer's is on another device than the layer.
    """
    if not lora_layers(model):
        raise ValueError(
            f"orthogonal_to is 'lora' but {type(model).__name__} carries no LoRA; expected one from PEFT "
            "(get_peft_model or add_adapter) before this adapter is added"
        )
    for index, layer in layers.items():
        for path, lora in lora_layers(layer).items():
            device = execution_device(lora.base_layer)
            for b in columns_of(lora):
                if b.device != device:
                    raise ValueError(
                        f"LoRA's B of {path} in layer {index} is on {b.device}; expected {device}, as {path} itself"
                    )


def check_lora(config: SteerConfig, writers: Mapping[int, list[Writer]], devices: Mapping[int, torch.device]) -> None:
    """Refuse LoRA that steering cannot be kept orthogonal to.

    Args:
        config: what is asked for.
        writers: all writers of the steered layers, by layer.
        devices: where those layers are steered.

    Raises:
        ValueError: none writes into the stream; too many columns, on another device, or not finite.
    """
    columns = lora_columns(writers, config)
    if not columns:
        chosen = choose_writers(next(iter(writers.values())), config.orthogonal_modules)
        raise ValueError(
            "no active LoRA of the model is on a module that writes into the residual stream; expected one on "
            + " or ".join(writer.path for writer in chosen)
            + ("" if config.orthogonal_modules == "all" else ", or orthogonal_modules='all' for the attention's too")
        )
    for index, found in columns.items():
        hidden, count = found[0].shape[0], sum(b.shape[1] for b in found)
        if count >= hidden or count > MAX_WRITERS:
            raise ValueError(
                f"LoRA writes {count} directions into layer {index}; expected at most {MAX_WRITERS} and fewer than "
                f"d = {hidden}"
            )
        for b in found:
            if b.device != devices[index]:
                raise ValueError(f"LoRA's B in layer {index} is on {b.device}; expected {devices[index]}, its layer's")
            if not b.isfinite().all():
                raise ValueError(f"LoRA's B in layer {index} is not finite; expected finite values")


class Orthogonality:
    """Keeps one adapter of a model orthogonal to the model's LoRA."""

    def __init__(
        self,
        name: str,
        config: SteerConfig,
        model: nn.Module,
        sites: Mapping[Place, SteeringSite],
        trace: Callable[[list[int]], dict[int, list[Writer]]],
    ) -> None:
        """Args:
        name: the adapter's, which is attached to `sites`, by place.
        config: its config.
        model: that carries the LoRA, now or when the adapter is trained.
        trace: gives all writers of layers; asked when the adapter is first trained.
        """
        self.name, self.config, self.model = name, config, model
        self.sites = dict(sites)
        self._trace = trace
        self._writers: dict[int, list[Writer]] | None = None
        self._seen: tuple[Any, ...] | None = None  # the values as they were when the constraint was last seen to
        self._watch()

    def _watch(self) -> None:
        """Register a global optimizer post-step hook through a weak reference.

        It is removed by `close()`, or when this object is collected.
        """
        reference = weakref.ref(self)

        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            this = reference()
            if this is not None:
                this.after_step(optimizer)

        self._close = weakref.finalize(self, register_optimizer_step_post_hook(after_step).remove)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_close"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._watch()

    # ------------------------------------------------------------------------------------------------------ the values

    @property
    def writers(self) -> dict[int, list[Writer]]:
        """All writers of the steered layers, by layer."""
        if self._writers is None:
            self._writers = self._trace(list(dict.fromkeys(place.layer for place in self.sites)))
        return self._writers

    def _steered(self, place: Place) -> dict[str, nn.Parameter]:
        """W2 and b2 of a place, those that there are, by name below the site."""
        adapter = self.sites[place].adapter(self.name)
        assert adapter is not None
        found = {UP: adapter.up.weight, UP_BIAS: adapter.up.bias}
        return {name: parameter for name, parameter in found.items() if parameter is not None}

    def _places(self, layers: Collection[int]) -> list[Place]:
        """The places in these layers."""
        return [place for place in self.sites if place.layer in layers]

    def _state(self, columns: Columns) -> tuple[Any, ...]:
        """Changes whenever a value may have changed."""
        tensors = [t for place in self._places(columns) for t in self._steered(place).values()]
        tensors += [b for bs in columns.values() for b in bs]
        return tuple((t.data_ptr(), t._version, t.dtype) for t in tensors)

    @property
    def in_use(self) -> bool:
        return any(site.active == self.name for site in self.sites.values())

    @property
    def trains(self) -> bool:
        """Whether a gradient is asked of what is constrained."""
        return any(p.requires_grad for place in self.sites for p in self._steered(place).values())

    # ----------------------------------------------------------------------------------------------------- the moments

    def after_step(self, optimizer: Optimizer) -> None:
        """After a step of any optimizer: if it moved anything here, find V again and project.

        Raises:
            RuntimeError: there is no LoRA to be orthogonal to.
        """
        if not self.in_use or not self.trains or not self._moved_by(optimizer):
            return
        columns = self._columns_to_train()
        if self._state(columns) == self._seen and not _moves_unseen(optimizer):
            return
        self._project(columns, everything=True)
        self._seen = self._state(columns)

    def _moved_by(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer has what is constrained, or B."""
        theirs = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if any(id(p) in theirs for place in self.sites for p in self._steered(place).values()):
            return True
        if self._writers is None:
            return False
        columns = lora_columns(self._writers, self.config)
        return any(id(b if b._base is None else b._base) in theirs for found in columns.values() for b in found)

    def before_forward(self) -> None:
        """Before a forward pass that trains: see to what changed otherwise than by an optimizer's step.

        Raises:
            RuntimeError: there is no LoRA to be orthogonal to.
            ValueError: there is one that it cannot be orthogonal to, or FSDP or ZeRO has sharded the adapter.
        """
        if self._writers is None:
            self._check_unsharded()  # before they are traced, by a forward pass
        columns = self._columns_to_train()
        if self._state(columns) == self._seen:
            return
        self._check_unsharded()
        devices = {place.layer: next(iter(self._steered(place).values())).device for place in self.sites}
        check_lora(self.config, self.writers, devices)
        self._project(columns, everything=False)
        self._seen = self._state(columns)

    def _check_unsharded(self) -> None:
        # A projection needs all of B and of W2, which no process has; ZeRO writes its copies over what was projected.
        for place, site in self.sites.items():
            by = sharder(site)
            if by is not None:
                raise ValueError(
                    f"{place} is sharded by {by}; expected adapter {self.name!r}, which is kept orthogonal to "
                    "LoRA, to be whole in every process (DDP)"
                )

    def _columns_to_train(self) -> Columns:
        columns = lora_columns(self.writers, self.config)
        if not columns and not lora_layers(self.model):
            raise RuntimeError(
                f"adapter {self.name!r} is to train orthogonal to LoRA, and the model carries none; expected a LoRA "
                "from PEFT (freeze the adapter to train without)"
            )
        return columns

    def release(self) -> None:
        """The adapter is not in use any more: the sites keep no basis of its own."""
        self._seen = None
        for site in self.sites.values():
            site.basis = None

    def close(self) -> None:
        """The adapter is gone."""
        self._close()

    # -------------------------------------------------------------------------------------------------- the projection

    @torch.no_grad()
    def _batches(self, columns: Columns) -> Iterator[tuple[list[Place], Tensor]]:
        """Places with the B of their layer side by side, (P, d, k), for each device; fewer columns end in zeros."""
        for device in dict.fromkeys(found[0].device for found in columns.values()):
            places = [place for place in self._places(columns) if columns[place.layer][0].device == device]
            counts = [sum(b.shape[1] for b in columns[place.layer]) for place in places]
            most = max(counts)
            flat: list[Tensor] = []
            for place, count in zip(places, counts, strict=True):
                flat += columns[place.layer]
                if count < most:
                    flat.append(flat[-1].new_zeros(flat[-1].shape[0], most - count))
            # One copy of all, however many they are, and one that puts each place's together.
            yield places, torch.cat(flat, 1).unflatten(1, (len(places), most)).transpose(0, 1).contiguous()

    @torch.no_grad()
    def _project(self, columns: Columns, *, everything: bool) -> None:
        """Project the parameters in place, all of them or those that violate the constraint, and set V in the sites."""
        for places, writers in self._batches(columns):
            for name in self._steered(places[0]):
                parameters: list[Tensor] = [self._steered(place)[name] for place in places]
                values = torch.stack([_as_columns(name, p) for p in parameters])
                projected = project_out(values, writers)
                if not everything:
                    projected = torch.where(_violates(values, writers), projected, values)
                torch._foreach_copy_(parameters, [_from_columns(name, value) for value in projected.unbind(0)])
            self._set_bases(places, writers)
        for place, site in self.sites.items():
            if place.layer not in columns:
                site.basis = None

    @torch.no_grad()
    def _set_bases(self, places: list[Place], writers: Tensor) -> None:
        bases = list(column_space(writers).unbind(0))
        old = [site.basis for site in (self.sites[place] for place in places) if site.basis is not None]
        if [(b.shape, b.dtype, b.device) for b in old] == [(b.shape, b.dtype, b.device) for b in bases]:
            torch._foreach_copy_(old, bases)  # in place, for graphs that were compiled or captured with them
        else:
            for place, basis in zip(places, bases, strict=True):
                self.sites[place].basis = basis

    @torch.no_grad()
    def constrained(self) -> ByPlace:
        """What is constrained, projected where it violates the constraint, by place and by name below the site.

        The parameters stay as they are. Values that did not come by training, as from a state dict, may violate it.

        Raises:
            ValueError: LoRA's B is not finite, or FSDP or ZeRO has sharded the adapter.
        """
        self._check_unsharded()
        found: ByPlace = {}
        for places, writers in self._batches(lora_columns(self.writers, self.config)):
            if not writers.isfinite().all():
                raise ValueError(
                    f"LoRA's B, which adapter {self.name!r} is orthogonal to, is not finite; expected it so"
                )
            for name in self._steered(places[0]):
                values = torch.stack([_as_columns(name, self._steered(place)[name]) for place in places])
                values = torch.where(_violates(values, writers), project_out(values, writers), values)
                for place, value in zip(places, values.unbind(0), strict=True):
                    found.setdefault(place, {})[name] = _from_columns(name, value)
        return found


def _moves_unseen(optimizer: Optimizer) -> bool:
    """Whether the step was of PyTorch's fused kernels: what has a gradient has moved, and its version tells nothing."""
    groups = (group for group in optimizer.param_groups if group.get("fused"))
    return any(p.grad is not None for group in groups for p in group["params"])


def _as_columns(name: str, parameter: Tensor) -> Tensor:
    """(d, r): W2 as it is, b2 as one column."""
    return parameter.unsqueeze(1) if name == UP_BIAS else parameter


def _from_columns(name: str, columns: Tensor) -> Tensor:
    return columns.squeeze(1) if name == UP_BIAS else columns


def _violates(values: Tensor, writers: Tensor) -> Tensor:
    """Whether ‖BᵀW‖ > 1e-5 ‖B‖ ‖W‖ in each layer, (L, 1, 1); what is stored in less than float32 is allowed its eps."""
    tolerance = max(TOLERANCE, torch.finfo(values.dtype).eps)
    b, w = writers.double(), values.double()
    overlap = torch.bmm(b.transpose(1, 2), w).flatten(1).norm(dim=1)
    return (overlap > tolerance * b.flatten(1).norm(dim=1) * w.flatten(1).norm(dim=1)).view(-1, 1, 1)
