"""Replace methods of one model, such as `generate`, until they are restored."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from ..model.weak import Weakly, what_is_left


class Replacement:
    """A function in place of a method of one model, until `end`. Replacements may end in another order than they began.

    Attributes:
        model: the model.
        name: the method.
        ended: whether the method is restored. Something that has kept the replacement may still call it.
    """

    model = Weakly[nn.Module]()

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name, self.ended = model, name, False
        self._earlier = vars(model).get(name)  # another library may have put one on the instance

    @property
    def original(self) -> Any:
        """The method without this replacement."""
        return getattr(type(self.model), self.name).__get__(self.model) if self._earlier is None else self._earlier

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_earlier": _outside(self._earlier)}

    def install(self) -> None:
        setattr(self.model, self.name, self)

    def end(self) -> None:
        """Restore the method. If another replacement is on top, it stays, and restores the method when it ends."""
        self.ended = True
        model = what_is_left(self, "model")
        if model is None:  # somebody keeps its decoder alone
            return
        found = _without_ended(vars(model).get(self.name))
        if found is None:
            vars(model).pop(self.name, None)
        else:
            setattr(model, self.name, found)


def _without_ended(found: Any) -> Any:
    """Return the topmost function of a chain that has not ended. Those below it that have ended leave the chain."""
    while isinstance(found, Replacement) and found.ended:
        found = found._earlier
    if isinstance(found, Replacement):
        found._earlier = _without_ended(found._earlier)
    return found


def _outside(found: Any) -> Any:
    """Return the topmost function of a chain that is not one of a scope."""
    while isinstance(found, _InScope):
        found = found._earlier
    return found


def replace_method(model: nn.Module, name: str, function: Callable[..., Any], undo: contextlib.ExitStack) -> None:
    """Replace a method of this model by a function that calls it, until `undo` is closed."""
    replaced = _InScope(model, name, function)
    undo.callback(replaced.end)
    undo.callback(replaced.end)  # once more, because an exception may interrupt the first
    replaced.install()


class _InScope(Replacement):
    """A replaced method of a model inside a scope. A copied or pickled model is in no scope."""

    def __init__(self, model: nn.Module, name: str, function: Callable[..., Any]) -> None:
        super().__init__(model, name)
        self._function = function
        functools.update_wrapper(self, self.original, updated=())  # its attributes may be those of a replacement

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.ended:
            return self.original(*args, **kwargs)
        found = self._function(*args, **kwargs)
        if self.ended:  # the passes of a compiled model do not say so
            raise RuntimeError(
                f"{self.name} ran on after its scope was left in another thread; expected it to end before"
            )
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        found, twin = _outside(self), memo[id(self.model)]
        return getattr(type(twin), self.name).__get__(twin) if found is None else copy.deepcopy(found, memo)

    def __reduce__(self) -> Any:
        found = _outside(self)
        if found is None:
            return getattr, (self.model, self.name)  # of a model that has no attributes yet, only its class
        return _unchanged, (found,)


def _unchanged(found: Any) -> Any:
    return found


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
