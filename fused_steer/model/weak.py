"""References from the steering to the model that do not keep the model alive.

A model holds its steering. If the steering held the model too, both would be in a cycle, and `del model` would free the
model's memory only when Python's cyclic garbage collector next runs.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

from torch import nn

T = TypeVar("T")


def _there(found: T | None) -> T:
    if found is None:
        raise RuntimeError("the model of this steering was deleted; expected it to be kept")
    return found


class _Nothing:
    """Stands for a deleted object in the copy of a reference. It is deleted at once, too."""


def _weak(found: T | None) -> Weak[Any]:
    return Weak(_Nothing() if found is None else found)


class Weak(Generic[T]):
    """A weak reference. A copy or pickle has the copy of the object, as with an ordinary attribute.

    A reference may outlive its object: a module may have been replaced since the model was patched. Its copy has no
    object either.
    """

    __slots__ = ("reference",)

    def __init__(self, to: T) -> None:
        self.reference = weakref.ref(to)  # torch.compile traces calls of a plain reference only

    def __call__(self) -> T | None:
        """Return the object, or None if it was deleted."""
        return self.reference()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Weak) and self.reference == other.reference

    def __hash__(self) -> int:
        return hash(self.reference)

    def __deepcopy__(self, memo: dict[Any, Any]) -> Weak[Any]:
        found: Any = self()
        left_out = id(found) in memo.get(_LEFT_OUT, ()) and id(found) not in memo
        return _weak(None if left_out else copy.deepcopy(found, memo))

    def __reduce__(self) -> Any:
        return _weak, (self(),)

    def there(self) -> T:
        """Return the object.

        Raises:
            RuntimeError: it was deleted.
        """
        return _there(self())


#: The key of a deep copy's memo with the modules that its weak references leave out. Other keys are numbers.
_LEFT_OUT = "modules outside of the copied part"


def leave_out_rest(model: nn.Module, memo: dict[Any, Any]) -> None:
    """Let a deep copy of a part of a model have no weak references to the rest, which nothing would keep alive.

    Args:
        model: the whole model.
        memo: the memo of the copy, with the part's module.
    """
    modules = list(model.modules())
    inside = {id(below) for module in modules if id(module) in memo for below in module.modules()}
    memo[_LEFT_OUT] = {id(module) for module in modules} - inside


class Weakly(Generic[T]):
    """An attribute that does not keep its value alive. The instance has a `Weak` of the value in `_weak_<name>`."""

    def __init__(self, instead: Callable[[Any], T] | None = None) -> None:
        """
        Args:
            instead: returns the attribute of an instance whose value was deleted. Without it that is an error.
        """
        self._instead = instead

    def __set_name__(self, owner: type, name: str) -> None:
        self._slot = f"_weak_{name}"

    @overload
    def __get__(self, instance: None, owner: type) -> Weakly[T]: ...
    @overload
    def __get__(self, instance: Any, owner: type) -> T: ...
    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        found = instance.__dict__[self._slot].reference()
        return self._instead(instance) if found is None and self._instead is not None else _there(found)

    def __set__(self, instance: Any, value: T) -> None:
        instance.__dict__[self._slot] = Weak(value)


def what_is_left(instance: Any, name: str) -> Any:
    """Return the value of a `Weakly` attribute, or None if it was deleted, where the attribute would raise an error."""
    return vars(instance)[f"_weak_{name}"].reference()


class WeakMethod:
    """A method of an object, without a reference that keeps the object alive."""

    def __init__(self, of: Any, name: str) -> None:
        self._object, self._name = weakref.ref(of), name  # not `Weak`: this is called in each pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(_there(self._object()), self._name)(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> WeakMethod:
        return WeakMethod(copy.deepcopy(_there(self._object()), memo), self._name)

    def __reduce__(self) -> Any:
        return WeakMethod, (_there(self._object()), self._name)
