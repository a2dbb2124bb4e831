"""Replace methods of one model, such as `generate`, until they are restored."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from torch import nn


def replace_method(model: nn.Module, name: str, function: Callable[..., Any], undo: contextlib.ExitStack) -> None:
    """Replace a method of this model by a function that calls it, until `undo` is closed.

    Replacements may end in another order than they began.
    """
    replaced = _Replaced(model, name, function)
    undo.callback(replaced.end)
    undo.callback(replaced.end)  # once more, because an exception may interrupt the first
    setattr(model, name, replaced)


class _Replaced:
    """A replaced method of a model. A copied or pickled model gets its class's method back."""

    def __init__(self, model: nn.Module, name: str, function: Callable[..., Any]) -> None:
        self._model, self._name, self._function = model, name, function
        self._earlier, self._original = vars(model).get(name), getattr(model, name)
        self._ended = False
        functools.update_wrapper(self, self._original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._original if self._ended else self._function)(*args, **kwargs)

    def end(self) -> None:
        """Restore the method that was there, unless another replacement is on top of this one. It restores it then."""
        self._ended = True
        found = vars(self._model).get(self._name)
        while isinstance(found, _Replaced) and found._ended:
            found = found._earlier
        if found is None:
            vars(self._model).pop(self._name, None)
        else:
            setattr(self._model, self._name, found)

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
