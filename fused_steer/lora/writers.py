"""Find the modules that write into the residual stream, from a layer's computation rather than its modules' names.

Autograd records one forward pass of two tokens. From a layer's output its graph is followed back through sums, scalings
and norms. The modules where that ends are the layer's writers: the output projections of attention and MLP, whatever
their names. A writer's LoRA is looked up each time it is needed, so a LoRA may be added, removed or changed later.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..model.layer import own_class
from ..model.residual import ResidualNotFound
from ..model.site import Site
from ..model.sublayers import matrices, mlp_in, parts_of
from ..model.trial import run_trial
from .layers import columns_of, is_lora

#: Parts of the names of autograd nodes that mix features. The input of such a node does not itself enter the stream.
MIXING = re.compile(r"mm|linear|matmul|dot|attention|softmax|convolution|embedding", re.IGNORECASE)


@dataclass(frozen=True)
class Writer:
    """A place in a decoder layer where a module writes into the residual stream.

    It holds the place and not the module, because PEFT adds a LoRA by replacing the module.

    Attributes:
        layer: the decoder layer.
        path: the module's path inside the layer.
        of_mlp: whether it is a part of the layer's MLP.
        mixed: whether the layer mixes several residual streams, so that its other writers are not found.
    """

    layer: nn.Module
    path: str
    of_mlp: bool
    mixed: bool = False

    @functools.cached_property
    def _place(self) -> tuple[nn.Module, str]:
        parent, _, name = self.path.rpartition(".")
        return self.layer.get_submodule(parent), name

    @property
    def module(self) -> nn.Module:
        parent, name = self._place  # read before every training forward pass, so it has to be fast
        return parent._modules[name]  # type: ignore[return-value]

    def columns(self) -> list[Tensor]:
        """Return LoRA's B (d, k) of every active adapter here, and its bias (d, 1) if it has one. Empty without a LoRA.

        Scaling (α/r, rsLoRA's α/√r, DoRA's magnitudes) is left out, because V is the basis of B itself (arXiv
        2603.00425, §5.2).

        Raises:
            ValueError: a LoRA on expert parameters, where B is not one matrix.
        """
        module = self.module
        if is_lora(module) and hasattr(module, "parameter_name"):
            raise ValueError(
                f"{self.path} carries a LoRA on the parameters of its experts ({type(module).__name__}); expected LoRA "
                "on linear modules (an expert's update has no single column space)"
            )
        return columns_of(module) if is_lora(module) else []


# ---------------------------------------------------------------------------------------------------------- the trace


class _Trace:
    """Records, in one forward pass, where each layer begins and ends, and which module made which autograd node."""

    def __init__(self, layers: Mapping[int, nn.Module], hidden: int) -> None:
        self.layers, self.hidden = layers, hidden
        self.starts: dict[int, Any] = {}
        self.ends: dict[int, Any] = {}
        self.outputs: list[Any] = []  # kept, as a Function's node does not keep its graph alive before PyTorch 2.13
        self.made: dict[Any, tuple[int, str, int]] = {}  # node -> (layer, path in the layer, number of the call)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        try:
            for index, layer in self.layers.items():
                handles.append(layer.register_forward_pre_hook(self._begin(index), with_kwargs=True))
                handles.append(layer.register_forward_hook(self._end(index)))
                for path, module in _makers(layer):
                    handles.append(module.register_forward_hook(self._made(index, path)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, index: int) -> Any:
        def hook(layer: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point())
            hidden = next((t for t in tensors if t.shape[-1] == self.hidden), None)
            if hidden is not None:
                if not hidden.requires_grad:
                    hidden.requires_grad_(True)  # without it autograd records nothing, as the base is frozen
                self.starts[index] = hidden.grad_fn

        return hook

    def _end(self, index: int) -> Any:
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            self.ends[index] = _first(output).grad_fn
            self.outputs.append(output)

        return hook

    def _made(self, index: int, path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = _first(output)
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None and tensor.shape[-1] == self.hidden:
                # An outer module may return an inner module's tensor. The inner one finishes first and is kept.
                self.made.setdefault(tensor.grad_fn, (index, path, len(self.made)))

        return hook

    def writers(self, index: int) -> tuple[list[str], bool]:
        """Return the paths of the layer's writers, in the order of their calls, and whether its input was reached."""
        found: dict[str, int] = {}
        start = self.starts.get(index)
        seen: set[Any] = {None}
        todo: list[Any] = [self.ends.get(index)]
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if node is start:
                continue
            made = self.made.get(node)
            if made is not None and made[0] == index:
                found[made[1]] = made[2]
            elif not MIXING.search(node.name()):
                todo += [parent for parent, _ in node.next_functions]
        # The input of a first layer is no result: its node would add up its gradient.
        reached = start in seen if start is not None else any(node and "AccumulateGrad" in node.name() for node in seen)
        return sorted(found, key=found.__getitem__), reached


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _makers(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each module of a layer that mixes features, with its path. A LoRA can only be on such a module."""
    inside: list[str] = []  # paths of LoRA layers and sites; their submodules are skipped
    for path, module in layer.named_modules():
        if any(path.startswith(outer) for outer in inside):
            continue
        held = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if isinstance(module, Site):
            inside.append(f"{path}.")
        elif is_lora(module):
            inside.append(f"{path}.")
            yield path, module
        elif path and any(tensor.dim() > 1 for tensor in held):
            yield path, module


def trace_writers(module: nn.Module, layers: Mapping[int, nn.Module], hidden: int) -> dict[int, list[Writer]]:
    """Find the writers of each of `layers`, in the order of their calls, by one forward pass of two tokens.

    Args:
        module: the model, or the part of it that takes token ids and runs the layers.
        layers: the layers to trace, by index.
        hidden: d.

    Raises:
        ValueError: the pass failed or would change the model, or a layer's writers were not found.
    """
    trace = _Trace(layers, hidden)
    with trace.watching(), torch.enable_grad():
        run_trial(module, [0, 0], "which modules write into the residual stream")
    found = {}
    for index, layer in layers.items():
        paths, reached = trace.writers(index)
        if not paths:
            raise ValueError(
                f"layer {index} ({type(layer).__name__}) has no module that is seen to write into the residual stream; "
                "expected an MLP's output projection"
            )
        mlp = _mlp(layer, paths)
        mixed = not reached and len({path.partition(".")[0] for path in paths}) == 1
        found[index] = [
            Writer(layer, path, any(f"{path}.".startswith(f"{one}.") for one in mlp), mixed)
            for path in _with_all_experts(layer, paths)
        ]
    return found


def _mlp(layer: nn.Module, paths: Sequence[str]) -> Sequence[str]:
    """Return the paths of the modules that are the layer's MLP, given its writers in the order of their calls.

    If its forward is not understood, that is the child of the layer that writes last. A lone linear layer does not
    count after two larger children, which are attention and MLP (Gemma 3n's per-layer inputs).
    """
    cls = own_class(layer)
    with contextlib.suppress(ResidualNotFound):
        mlp = mlp_in(cls, parts_of(layer, cls))
        if any(f"{path}.".startswith(f"{one}.") for path in paths for one in mlp):
            return mlp
    children = list(dict.fromkeys(path.partition(".")[0] for path in paths))
    larger = [child for child in children if matrices(layer.get_submodule(child)) > 1]
    return larger[-1:] if len(larger) > 1 else children[-1:]


def _with_all_experts(layer: nn.Module, paths: Iterable[str]) -> list[str]:
    """Add the other experts after each expert's path, because two tokens reach only some experts."""
    modules = {path for path, _ in _makers(layer)}
    found: dict[str, None] = {}
    for path in paths:
        parts = path.split(".")
        fellows: list[list[str]] = [[]]
        for depth, part in enumerate(parts):
            holder = layer.get_submodule(".".join(parts[:depth]))
            names = list(dict(holder.named_children())) if isinstance(holder, nn.ModuleList) else [part]
            fellows = [[*fellow, name] for fellow in fellows for name in names]
        found.update(dict.fromkeys([path, *(p for p in map(".".join, fellows) if p in modules)]))
    return list(found)


def choose_writers(writers: list[Writer], which: str) -> list[Writer]:
    """Choose from a layer's writers: "all" of them, or the MLP's with "mlp".

    Raises:
        ValueError: not all are known (DeepSeek-V4).
    """
    if which == "all" and any(writer.mixed for writer in writers):
        raise ValueError(
            f"{type(writers[0].layer).__name__} mixes several residual streams by a product, so that only its MLP is "
            "seen to write into them; expected orthogonal_modules='mlp'"
        )
    return writers if which == "all" else [writer for writer in writers if writer.of_mlp]
