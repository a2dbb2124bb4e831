"""Replace methods of one model, such as `generate`, until they are restored."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from torch import nn


def replace_method(model: nn.Module, name: str, function: Callable[..., Any], undo: contextlib.ExitStack) -> None:
    """Replace a method of this model by a function, until `undo` is closed."""
    if name in vars(model):
        undo.callback(setattr, model, name, vars(model)[name])
    undo.callback(vars(model).pop, name, None)
    setattr(model, name, _Replaced(model, name, function))


class _Replaced:
    """A replaced method of a model. A copied or pickled model gets its class's method back."""

    def __init__(self, model: nn.Module, name: str, function: Callable[..., Any]) -> None:
        self._model, self._name, self._function = model, name, function
        functools.update_wrapper(self, getattr(model, name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo[id(self._model)]
        return getattr(type(twin), self._name).__get__(twin)

    def __reduce__(self) -> Any:
        return getattr, (self._model, self._name)  # of a model that has no attributes yet, only its class


def ending_streamer(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return `generate` changed to end its streamer if it raises. A reader in another thread would wait for ever."""

    def generate(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except BaseException:
            if hasattr(kwargs.get("streamer"), "end"):
                kwargs["streamer"].end()
            raise

    return generate
