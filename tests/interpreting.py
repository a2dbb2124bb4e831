"""Make Triton's interpreter faster by two changes that leave its results alone.

A launch puts the interpreter's functions into `triton.language`. Triton does it again in each call of a device
function, by a walk over all names of the language, where nothing is left to replace. And each operation builds the
table of NumPy's dtypes anew. Interpreted kernels take half the time if both
are done once.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


class _PatchedLanguage:
    """Stands in for Triton's `_patch_lang(function)`, and remembers what the launch that runs has patched."""

    def __init__(self, patch: Callable[[Callable], Any]) -> None:
        self.patch = patch
        self.patched: set[int] | None = None  # modules; None between launches
        self.languages: dict[int, tuple[dict, set[int]]] = {}  # by the address of a function's globals, kept here

    def __call__(self, function: Callable) -> Any:
        names = function.__globals__
        if id(names) not in self.languages:
            modules = {id(value) for value in names.values() if isinstance(value, ModuleType)}
            self.languages[id(names)] = names, modules & {id(tl), id(tl.core)}
        _, languages = self.languages[id(names)]
        if self.patched is not None:
            if languages <= self.patched:
                return interpreter._LangPatchScope()
            self.patched |= languages
            return self.patch(function)
        scope = self.patch(function)
        self.patched = set(languages)
        restore = scope.restore

        def forget() -> None:
            self.patched = None
            restore()

        scope.restore = forget
        return scope


def _once_for_each_name(table: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Remember NumPy's dtype for the name of a scalar dtype of Triton's. Pointers and tiles have longer names."""
    known: dict[str, Any] = {}

    def found(dtype: Any) -> Any:
        name = dtype.name
        if name not in known:
            known[name] = table(dtype)
        return known[name]

    return found


def hasten_the_interpreter() -> None:
    """Replace two functions of Triton in this process. A version of Triton without them is left as it is."""
    patch = getattr(interpreter, "_patch_lang", None)
    if patch is not None and hasattr(interpreter, "_LangPatchScope") and not isinstance(patch, _PatchedLanguage):
        interpreter._patch_lang = _PatchedLanguage(patch)
        if hasattr(interpreter, "_get_np_dtype"):
            interpreter._get_np_dtype = _once_for_each_name(interpreter._get_np_dtype)
