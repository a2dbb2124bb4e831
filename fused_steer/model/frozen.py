"""The frozen base of a patched model: freezes its parameters, and makes those train again that did before.

A parameter may have moved since: offloading puts another object in its place, and `prune` gives it another name.
`resize_token_embeddings` makes another module, and `parametrizations.weight_norm` several parameters, which are born
frozen because the old one was. Another patched model may share it, such as a second head over the same decoder.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from .site import Site
from .weak import Weak, Weakly, what_is_left


@dataclass
class _Record:
    """One parameter as it was: itself, its module and its name there, its module's path, and whether it trained."""

    parameter: Weak[nn.Parameter]
    module: Weak[nn.Module]
    name: str
    path: str
    trained: bool

    def itself(self) -> Iterator[nn.Parameter]:
        """Yield the parameter, and what is in its place in its module."""
        module = self.module()
        for found in (self.parameter(), None if module is None else module._parameters.get(self.name)):
            if found is not None:
                yield found

    def successors(self, model: nn.Module | None) -> Iterator[nn.Parameter]:
        """Yield the parameters that took its place: in another module, or those from which it is computed now."""
        try:
            there = None if model is None else model.get_submodule(self.path)
        except AttributeError:
            return
        if there is None:
            return
        found = None if there is self.module() else there._parameters.get(self.name)
        if found is not None:
            yield found
        if parametrize.is_parametrized(there, self.name):
            yield from there.parametrizations[self.name].parameters(recurse=False)  # type: ignore[union-attr,index]


class Frozen:
    """The parameters of one model that a patch freezes."""

    _model = Weakly[nn.Module]()

    def __init__(self, model: nn.Module, kept: Callable[[nn.Module], Collection[nn.Parameter]]) -> None:
        """Note which parameters train. The model is not changed.

        Args:
            kept: returns the parameters that PEFT's adapters have in a model. They are not frozen.
        """
        of_peft = kept(model)
        of_sites = [parameter for site in model.modules() if isinstance(site, Site) for parameter in site.parameters()]
        others = {id(parameter) for parameter in (*of_peft, *of_sites)}  # a site of another patch trains, too
        self._model, self._kept = model, kept
        self._adapted = bool(of_peft)  # whether PEFT has frozen the base itself
        self._on = False
        self._records = [
            _Record(Weak(p), Weak(module), name, path, p.requires_grad)
            for path, module in model.named_modules()
            for name, p in module.named_parameters(recurse=False)
            if id(p) not in others
        ]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._on:
            _frozen.add(self)

    def freeze(self) -> None:
        self._on = True
        _frozen.add(self)
        for record in self._records:
            record.module.there().get_parameter(record.name).requires_grad_(False)

    def thaw(self) -> None:
        """Restore which parameters train. After an exception it can be called again.

        One that another patch has frozen too stays frozen until that is undone. All do if PEFT, which freezes a base by
        itself, has added adapters since.
        """
        model = what_is_left(self, "_model")
        kept = () if model is None else self._kept(model)
        adapters = {id(parameter) for parameter in kept}
        stays = bool(adapters) and not self._adapted
        others: dict[int, list[_Record]] = {}
        for other in list(_frozen):
            for record in other._records if other is not self else ():
                for parameter in record.itself():
                    others.setdefault(id(parameter), []).append(record)
        for record in self._records:
            for parameter in record.itself():
                self._restore(parameter, record.trained and not stays, others.get(id(parameter), ()))
            for parameter in record.successors(model) if record.trained and not stays else ():
                if id(parameter) not in adapters:
                    self._restore(parameter, True, others.get(id(parameter), ()))
        self._on = False
        _frozen.discard(self)

    @staticmethod
    def _restore(parameter: nn.Parameter, trained: bool, others: Collection[_Record]) -> None:
        for record in others:
            record.trained |= trained
        if not others and (parameter.is_floating_point() or parameter.is_complex()):  # else quantised since
            parameter.requires_grad_(trained)


#: The `Frozen` of each model that is patched now.
_frozen: weakref.WeakSet[Frozen] = weakref.WeakSet()
