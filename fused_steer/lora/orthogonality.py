"""Joint-Orth: keeps steering orthogonal to the subspace that LoRA writes into (arXiv 2603.00425, §5.2).

The parameters themselves satisfy the constraint W2 = (I − V Vᵀ) W2, where V is a basis of the LoRA's present column
space. So the forward pass costs nothing, and checkpoints and adapter files hold constrained parameters. Two steps
maintain the constraint:

- The site projects the gradient of W2 in the backward pass (`kernels.orthogonal.project_gradient`).
- After an optimizer step, V is computed again and W2 is projected, for all layers at once. The step moves B, and Adam's
  rescaling of each element moves W2 out of the subspace. Micro-batches and recomputation between steps see the same V.

Parameters that changed in another way (a loaded checkpoint) are noticed by their version at the next training forward
pass. They are projected only if they violate the constraint. Weights saved with the constraint are loaded bit for bit.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from ..adapters.distributed import sharder
from ..adapters.parameters import UP, UP_BIAS, ByPlace, Place
from ..config import SteerConfig
from ..kernels.backend import no_autocast
from ..kernels.derivatives import is_transformed
from ..kernels.orthogonal import MAX_WRITERS, column_space, project_out
from ..model.decoder import execution_device
from ..model.site import SteeringSite
from .layers import columns_of, lora_layers
from .writers import Writer, choose_writers

#: The constraint is violated if ‖BᵀW2‖ exceeds this share of ‖B‖ ‖W2‖ (Frobenius). The kernels are held to this bound.
TOLERANCE = 1e-5

Columns = dict[int, list[Tensor]]  # B (d, k) of each LoRA that writes into a layer's stream, by layer


def lora_columns(writers: Mapping[int, list[Writer]], config: SteerConfig) -> Columns:
    """Return LoRA's B of the active adapters on the writers that `config` selects, by layer.

    Layers without one are left out.
    """
    found = {
        i: [b for w in choose_writers(ws, config.orthogonal_modules) for b in w.columns()] for i, ws in writers.items()
    }
    return {index: columns for index, columns in found.items() if columns}


def check_carries_lora(model: nn.Module, layers: Mapping[int, nn.Module]) -> None:
    """Check, before writers are traced, that the model carries a LoRA on the layers' devices.

    Args:
        model: the model, with or without LoRA.
        layers: the steered layers, by index.

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
    """Check that steering can be kept orthogonal to the LoRA.

    Args:
        config: the adapter's config.
        writers: all writers of the steered layers, by layer.
        devices: the devices where those layers are steered.

    Raises:
        ValueError: no LoRA writes into the stream, or B has too many columns, is on another device or is not finite.
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
                raise ValueError(f"LoRA's B in layer {index} is on {b.device}; expected {devices[index]}, as its layer")
            if not b.isfinite().all():
                raise ValueError(f"LoRA's B in layer {index} is not finite; expected finite values")


class Orthogonality:
    """Keeps one adapter of a model orthogonal to the model's LoRA."""

    def __init__(
        self,
        name: str,
        config: SteerConfig,
        sites: Mapping[Place, SteeringSite],
        carries_lora: Callable[[], bool],
        trace: Callable[[list[int]], dict[int, list[Writer]]],
    ) -> None:
        """
        Args:
            name: the adapter's name.
            config: the adapter's config.
            sites: the adapter's sites, by place.
            carries_lora: returns whether the model has a LoRA now. When the adapter is trained, it has to.
            trace: returns all writers of some layers. It is called when the adapter is first trained.
        """
        self.name, self.config = name, config
        self.sites = dict(sites)
        self._carries_lora, self._trace = carries_lora, trace
        self._writers: dict[int, list[Writer]] | None = None
        self._seen: tuple[Any, ...] | None = None  # `_state` when the constraint was last enforced
        #: For each backward pass in which an optimizer stepped, whether a step moved parameters without a sign.
        self._waits: dict[int, bool] = {}
        self._watch()

    def _watch(self) -> None:
        """Register a global optimizer post-step hook through a weak reference.

        The hook is removed by `close()`, or when this object is collected.
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

    # -------------------------------------------------------------------------------------------- parameters and state

    @property
    def writers(self) -> dict[int, list[Writer]]:
        """All writers of the steered layers, by layer."""
        if self._writers is None:
            self._writers = self._trace(list(dict.fromkeys(place.layer for place in self.sites)))
        return self._writers

    def _steered(self, place: Place) -> dict[str, nn.Parameter]:
        """Return W2 and b2 of a place, by name below the site. A tensor that the adapter lacks is left out."""
        adapter = self.sites[place].adapter(self.name)
        assert adapter is not None
        if adapter.up.is_computed("weight") or adapter.up.is_computed("bias"):
            raise ValueError(
                f"W2 or b2 of adapter {self.name!r} at {place} is computed from other parameters (parametrized or "
                "pruned); expected parameters, which a projection keeps orthogonal to LoRA"
            )
        found = {UP: adapter.up.weight, UP_BIAS: adapter.up.bias}
        return {name: parameter for name, parameter in found.items() if parameter is not None}

    def _places(self, layers: Collection[int]) -> list[Place]:
        """Return the places in these layers."""
        return [place for place in self.sites if place.layer in layers]

    def _state(self, columns: Columns) -> tuple[Any, ...]:
        """Return a value that changes whenever a parameter or B may have changed."""
        tensors: list[Tensor] = [t for place in self._places(columns) for t in self._steered(place).values()]
        return *_versions(tensors), *_versions(b for bs in columns.values() for b in bs)

    @property
    def in_use(self) -> bool:
        return any(site.active == self.name for site in self.sites.values())

    @property
    def trains(self) -> bool:
        """Whether W2 or b2 is trainable."""
        return any(p.requires_grad for place in self.sites for p in self._steered(place).values())

    # ------------------------------------------------------------------------------------- enforcement during training

    def after_step(self, optimizer: Optimizer) -> None:
        """Enforce the constraint after an optimizer's step, if the step moved W2, b2 or B.

        In a backward pass, where some optimizers step as soon as a parameter's gradient is there, this waits for its
        end: the gradients of the layers before need W2 as it was.

        Raises:
            RuntimeError: the model carries no LoRA.
        """
        if not self.in_use or not self.trains or not self._moved_by(optimizer):
            return
        unseen, backward = _moves_unseen(optimizer), torch._C._current_graph_task_id()
        if backward == -1:
            self._enforce(unseen)
            return
        if backward not in self._waits:
            callback = functools.partial(self._after_backward, backward)
            torch.autograd.Variable._execution_engine.queue_callback(callback)  # not called if the backward fails
        self._waits[backward] = self._waits.get(backward, False) or unseen

    def _after_backward(self, backward: int) -> None:
        self._enforce(self._waits.pop(backward))

    def _enforce(self, unseen: bool) -> None:
        """Project all parameters if they moved. unseen: a step may have moved them without a sign."""
        columns = self._columns_to_train()
        if self._state(columns) == self._seen and not unseen:
            return
        self._project(columns, everything=True)
        self._seen = self._state(columns)

    def _moved_by(self, optimizer: Optimizer) -> bool:
        """Return whether the optimizer updates W2, b2 or LoRA's B."""
        theirs = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if any(id(p) in theirs for place in self.sites for p in self._steered(place).values()):
            return True
        if self._writers is None:
            return False
        columns = lora_columns(self._writers, self.config)
        return any(id(b if b._base is None else b._base) in theirs for found in columns.values() for b in found)

    def before_forward(self) -> None:
        """Enforce the constraint before a training forward pass, if parameters changed without an optimizer's step.

        Inside a transform of torch.func nothing is changed: the sites project what they are given.

        Raises:
            RuntimeError: the model carries no LoRA, or a transform comes before the first pass with this LoRA.
            ValueError: steering cannot be orthogonal to the LoRA, or FSDP or ZeRO has sharded the adapter.
        """
        if is_transformed():
            self._check_bases()
            return
        if self._writers is None:
            self._check_unsharded()  # before tracing, which runs a forward pass
        columns = self._columns_to_train()
        if self._state(columns) == self._seen:
            return
        self._check_unsharded()
        devices = {place.layer: next(iter(self._steered(place).values())).device for place in self.sites}
        check_lora(self.config, self.writers, devices)
        self._project(columns, everything=False)
        self._seen = self._state(columns)

    def _check_bases(self) -> None:
        columns = None if self._writers is None else lora_columns(self._writers, self.config)
        held = [] if columns is None else [b for bs in columns.values() for b in bs]
        if any(torch._C._functorch.is_functorch_wrapped_tensor(b) for b in held):
            raise RuntimeError(
                f"a transform of torch.func varies LoRA's B, which adapter {self.name!r} is kept orthogonal to; "
                "expected B to be constant"
            )
        if columns is None or self._seen is None or self._seen[len(self._seen) - len(held) :] != _versions(held):
            raise RuntimeError(
                f"adapter {self.name!r} is kept orthogonal to a LoRA that no training pass has seen; expected one "
                "before the transform of torch.func"
            )

    def _check_unsharded(self) -> None:
        # A projection needs all of B and W2, and no process has them. ZeRO would overwrite the projected values.
        for place, site in self.sites.items():
            by = sharder(site)
            if by is not None:
                raise ValueError(
                    f"{place} is sharded by {by}; expected adapter {self.name!r}, which is kept orthogonal to "
                    "LoRA, to be whole in every process (DDP)"
                )

    def _columns_to_train(self) -> Columns:
        columns = lora_columns(self.writers, self.config)
        if not columns and not self._carries_lora():
            raise RuntimeError(
                f"adapter {self.name!r} trains orthogonal to a LoRA, and the model carries none; expected a LoRA from "
                "PEFT (or freeze the adapter)"
            )
        return columns

    def release(self) -> None:
        """Drop the sites' bases when the adapter is no longer active."""
        self._seen = None
        for site in self.sites.values():
            site.basis = None

    def close(self) -> None:
        """Remove the optimizer hook when the adapter is removed."""
        self._close()

    # -------------------------------------------------------------------------------------------------- the projection

    @torch.no_grad()
    def _batches(self, columns: Columns) -> Iterator[tuple[list[Place], Tensor]]:
        """Yield the places of each device, with LoRA's B of their layers as one tensor (P, d, k), padded with zeros."""
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
            with no_autocast(device):
                wide = torch.cat(flat, 1)
            yield places, wide.unflatten(1, (len(places), most)).transpose(0, 1).contiguous()

    @torch.no_grad()
    def _project(self, columns: Columns, *, everything: bool) -> None:
        """Project all parameters in place, or only those that violate the constraint, and set V in the sites."""
        for places, writers in self._batches(columns):
            for name in self._steered(places[0]):
                parameters: list[Tensor] = [self._steered(place)[name] for place in places]
                values = _stacked(name, parameters)
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
            torch._foreach_copy_(old, bases)  # in place, for compiled or captured graphs that hold these tensors
        else:
            for place, basis in zip(places, bases, strict=True):
                self.sites[place].basis = basis

    @torch.no_grad()
    def constrained(self) -> ByPlace:
        """Return W2 and b2, projected where they violate the constraint, by place and by name below the site.

        The parameters are not changed. Parameters from a state dict may violate the constraint.

        Raises:
            ValueError: LoRA's B is not finite, or FSDP or ZeRO has sharded the adapter.
        """
        self._check_unsharded()
        found: ByPlace = {}
        for places, writers in self._batches(lora_columns(self.writers, self.config)):
            if not writers.isfinite().all():
                raise ValueError(
                    f"LoRA's B, which adapter {self.name!r} is orthogonal to, is not finite; expected finite values"
                )
            for name in self._steered(places[0]):
                values = _stacked(name, [self._steered(place)[name] for place in places])
                values = torch.where(_violates(values, writers), project_out(values, writers), values)
                for place, value in zip(places, values.unbind(0), strict=True):
                    found.setdefault(place, {})[name] = _from_columns(name, value)
        return found


def _versions(tensors: Iterable[Tensor]) -> tuple[Any, ...]:
    return tuple((t.data_ptr(), t._version, t.dtype) for t in tensors)


def _moves_unseen(optimizer: Optimizer) -> bool:
    """Return whether the step may have moved parameters without changing their version.

    PyTorch's fused kernels do, and optimizers of other libraries with kernels of their own, such as bitsandbytes'.
    """
    own = type(optimizer).__module__.startswith("torch.optim.")
    groups = (group for group in optimizer.param_groups if not own or group.get("fused"))
    return any(p.grad is not None for group in groups for p in group["params"])


def _stacked(name: str, parameters: Sequence[Tensor]) -> Tensor:
    """Return W2 or b2 of several places as one tensor, (P, d, r) or (P, d, 1)."""
    with no_autocast(parameters[0].device):  # it refuses to stack tensors of another narrow dtype than its own
        return torch.stack([_as_columns(name, p) for p in parameters])


def _as_columns(name: str, parameter: Tensor) -> Tensor:
    """Return W2 (d, r) unchanged, or b2 as one column (d, 1)."""
    return parameter.unsqueeze(1) if name == UP_BIAS else parameter


def _from_columns(name: str, columns: Tensor) -> Tensor:
    return columns.squeeze(1) if name == UP_BIAS else columns


def _violates(values: Tensor, writers: Tensor) -> Tensor:
    """Return whether ‖BᵀW‖ > 1e-5 ‖B‖ ‖W‖ in each layer, (L, 1, 1). A larger eps of the dtype replaces 1e-5."""
    tolerance = max(TOLERANCE, torch.finfo(values.dtype).eps)
    b, w = writers.double(), values.double()
    overlap = torch.bmm(b.transpose(1, 2), w).flatten(1).norm(dim=1)
    return (overlap > tolerance * b.flatten(1).norm(dim=1) * w.flatten(1).norm(dim=1)).view(-1, 1, 1)
