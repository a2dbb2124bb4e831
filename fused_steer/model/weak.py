"""References from the steering to the model that do not keep the model alive.

A model holds its steering. If the steering held the model too, both would be in a cycle, and `del model` would free the
model's memory only when Python's cyclic garbage collector next runs.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


def _there(found: T | None) -> T:
    if found is None:
        raise RuntimeError("the model of this steering was deleted; expected it to be kept")
    return found


class _Nothing:
    """Stands for a deleted object in the copy of a reference. It is deleted at once, too."""


def _weak(found: T | None) -> Weak[Any]:
    return Weak(_Nothing() if found is None else found)


class Weak(weakref.ref[T]):
    """A weak reference. A copy or pickle has the copy of the object, as with an ordinary attribute.

    A reference may outlive its object: a module may have been replaced since the model was patched. Its copy has no
    object either.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Weak[Any]:
        return _weak(copy.deepcopy(self(), memo))

    def __reduce__(self) -> Any:
        return _weak, (self(),)

    def there(self) -> T:
        """Return the object.

        Raises:
            RuntimeError: it was deleted.
        """
        return _there(self())


class Weakly(Generic[T]):
    """An attribute that does not keep its value alive. The instance has a `Weak` of the value in `_weak_<name>`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._slot = f"_weak_{name}"

    @overload
    def __get__(self, instance: None, owner: type) -> Weakly[T]: ...
    @overload
    def __get__(self, instance: Any, owner: type) -> T: ...
    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else instance.__dict__[self._slot].there()

    def __set__(self, instance: Any, value: T) -> None:
        instance.__dict__[self._slot] = Weak(value)


class WeakMethod:
    """A method of an object, without a reference that keeps the object alive."""

    def __init__(self, of: Any, name: str) -> None:
        self._object, self._name = weakref.ref(of), name  # torch.compile traces calls of a plain reference only

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(_there(self._object()), self._name)(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> WeakMethod:
        return WeakMethod(copy.deepcopy(_there(self._object()), memo), self._name)

    def __reduce__(self) -> Any:
        return WeakMethod, (_there(self._object()), self._name)
