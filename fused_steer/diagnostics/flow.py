"""Finds the tensor that is all that a layer's MLP adds to the residual stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..adapters.parameters import SITE, Place
from ..config import SITES
from ..lora.writers import MIXING, Writer, choose_writers


class Flow:
    """Finds, in one pass's autograd graph, the tensor that holds the MLP's whole contribution to the residual stream.

    Module names do not suffice. A layer may normalise or scale the MLP's output, add it on either side, or add it
    together with the attention's output.
    """

    def __init__(self, layers: Mapping[int, nn.Module], hidden: int) -> None:
        self.layers, self.hidden = layers, hidden
        self.inputs: dict[int, Tensor] = {}
        self.operands: dict[int, tuple[Tensor, ...]] = {}
        self.outputs: dict[int, list[tuple[str, Tensor]]] = {index: [] for index in layers}  # in order of completion

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for index, layer in self.layers.items():
                handles = [layer.register_forward_pre_hook(self._begin(index), with_kwargs=True)]
                if SITE in layer._modules:
                    handles.append(layer.get_submodule(SITE).register_forward_pre_hook(self._add(index)))
                handles += [
                    module.register_forward_hook(self._output(index, path))
                    for path, module in layer.named_modules()
                    if path and path.partition(".")[0] not in SITES
                ]
                for handle in handles:
                    stack.callback(handle.remove)
            yield

    def _begin(self, index: int) -> Any:
        def hook(layer: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point())
            hidden = next((t for t in tensors if t.shape[-1] == self.hidden), None)
            if hidden is not None:
                self.inputs[index] = hidden

        return hook

    def _add(self, index: int) -> Any:
        def hook(site: nn.Module, args: Any) -> None:
            self.operands[index] = args if len(args) == 2 else ()

        return hook

    def _output(self, index: int, path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = first(output)
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None and tensor.shape[-1] == self.hidden:
                self.outputs[index].append((path, tensor))

        return hook

    def mlp_source(self, place: Place, of_layers: Mapping[int, list[Writer]]) -> int | str | None:
        """Find the tensor that is the MLP's output and nothing else.

        Returns:
            The operand of the last residual add (0 or 1), else the path of a module, else None. Of several modules the
            last is taken: it stands after a norm of the MLP's output. None at other sites than post_block.
        """
        index, writers = place.layer, of_layers[place.layer]
        if place.site != SITE:
            return None
        mlp = {writer.path for writer in choose_writers(writers, "mlp")}
        others = {writer.path for writer in writers} - mlp
        ends = {tensor.grad_fn: path in mlp for path, tensor in self.outputs[index] if path in mlp | others}
        start = self.inputs.get(index)
        if start is None:
            return None
        for operand, tensor in enumerate(self.operands[index]):
            if _only_from_mlp(tensor, ends, start):
                return operand
        size = start.numel()
        found = [
            path
            for path, tensor in self.outputs[index]
            if tensor.numel() == size and _only_from_mlp(tensor, ends, start)
        ]
        return found[-1] if found else None


def _only_from_mlp(tensor: Tensor, ends: Mapping[Any, bool], start: Tensor) -> bool:
    """Return whether a tensor comes from the MLP's writers alone.

    The graph is followed back through sums, scalings and norms. Other writers and the layer's input disqualify the
    tensor.
    """
    found = False
    seen: set[Any] = {None}
    todo: list[Any] = [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node is start.grad_fn or getattr(node, "variable", None) is start:
            return False
        if node in ends:
            if not ends[node]:
                return False
            found = True
        elif not MIXING.search(node.name()):
            todo += [parent for parent, _ in node.next_functions]
    return found


def first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) and output else output
