"""Hooks that run before and after each eager forward pass of a steered model's decoder."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from ..adapters.factors import Rotation
from ..kernels.derivatives import is_transformed
from .decoder import Decoder
from .layer import PatchedLayer
from .passes import Passes
from .scopes import Scopes
from .watch import LayerList, thread
from .weak import Weakly


class DecoderHooks:
    """Hooks of the module that runs the decoder layers.

    Before a pass they check that it may run in this thread and that no steered layer was replaced. They watch forwards
    that other libraries set on layers, enforce constraints on trained adapters, and make LoReFT's rotations for all
    layers. After the pass they drop the rotations.

    The decoder keeps its hooks alive, and they keep the steering alive, by `before_training`. So a decoder that
    outlives the rest of its model goes on being steered.
    """

    _module = Weakly[nn.Module]()

    def __init__(
        self,
        decoder: Decoder,
        patched: Mapping[int, PatchedLayer],
        scopes: Scopes,
        before_training: Callable[[bool], None],
        graph: Any = None,
    ) -> None:
        """
        Args:
            decoder: the model's decoder.
            patched: the steered layers by index. The mapping is read at each pass.
            scopes: the model's scopes, which count passes.
            before_training: called before a pass with gradients, with the decoder's training mode.
            graph: told when the whole decoder is traced: see `norms.Graph`. None if no norms are fused.
        """
        self._module, self._patched, self._before_training = decoder.module, patched, before_training
        self._scopes, self._graph = scopes, graph
        self._list = decoder.path.rpartition(".")[2]
        self._layer_list = LayerList(decoder.module, self._list)
        self._passes = Passes()
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        # One statement each, so that `remove` removes the first if an exception interrupts.
        self._handles.append(self._module.register_forward_pre_hook(self._before))
        self._handles.append(self._module.register_forward_hook(self._after, always_call=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, args: Any) -> None:
        if is_compiling():
            # A checkpointed layer is a graph of its own, which may hand nothing over to the norm outside.
            if self._graph is not None and not any(map(_is_checkpointed, getattr(module, self._list))):
                self._graph.begin()
            return
        if self._graph is not None:
            self._graph.end()  # a layer that is compiled alone is in no graph of the decoder
        # DataParallel runs replicas in its own threads while the calling thread waits. A missing attribute is looked up
        # in the dictionary, because nn.Module takes long to miss it.
        self._scopes.begin_pass(checked=not module.__dict__.get("_is_replica"))
        self._layer_list.check(self._patched)
        for patched in self._patched.values():
            patched.watch()
        if torch.is_grad_enabled():
            self._before_training(module.training)
        self._rotate()  # the last call that may raise, so that `end` always follows

    def _rotate(self) -> None:
        rotations = {}
        if Rotation.exist and not is_transformed():  # transforms of torch.func rotate in each layer
            sites = (site for patched in self._patched.values() for site in patched.sites.values())
            rotations = {site: pair for site in sites if (pair := site.rotation()) is not None}
        self._passes.begin(rotations)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if is_compiling():
            if self._graph is not None:
                self._graph.end()
        else:
            self._passes.end()
            thread.handed = None  # of a pass that ended early
            self._scopes.end_pass()  # the last call, because it may raise


def _is_checkpointed(layer: nn.Module) -> bool:
    """Return whether activation checkpointing runs the layer: transformers' own, or PyTorch's wrapper."""
    return (
        hasattr(layer, "_checkpoint_wrapped_module")
        or layer.training
        and getattr(layer, "gradient_checkpointing", False)
    )


def warn_of_frozen(name: str) -> None:
    """Warn that an adapter is in use and does not train, although the model does."""
    warnings.warn(
        f"adapter {name!r} is in use but does not train; adding a LoRA freezes all else: "
        f"model.steering.use({name!r}) makes it train again",
        stacklevel=2,
    )
