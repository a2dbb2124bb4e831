"""Reads and checks results files; sorts their rows by case and contender."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_steer.tools.demo import Figures

from ..geometries import DTYPES, GroupedCase, HostCase, ModelCase, OpCase, ProjectionCase, ServeCase
from ..host import HOST_CONTENDERS
from ..results import FOLDER, Results, Row, load

#: Level -> the class of its cases, and the values of `what`.
LEVELS: dict[str, tuple[type, tuple[str, ...]]] = {
    "op": (OpCase, ("forward", "backward", "both")),
    "host": (HostCase, tuple(HOST_CONTENDERS)),
    "accuracy": (OpCase, ("error",)),
    "counters": (OpCase, ("forward", "backward")),
    "model": (ModelCase, ("train", "prefill", "decode", "decode-graph")),
    "busy": (ModelCase, ("train", "prefill", "decode")),
    "memory": (ModelCase, ("kept", "peak", "peak-total")),
    "projection": (ProjectionCase, ("step",)),
    "norm": (OpCase, ("forward", "backward", "bytes")),
    "grouped": (GroupedCase, ("forward", "bytes")),
    "serve": (ServeCase, ("generate", "decode-graph")),
    "vllm": (ServeCase, ("generate",)),
}
BYTES = (("memory", "kept"), ("memory", "peak"), ("memory", "peak-total"), ("norm", "bytes"), ("grouped", "bytes"))

ByContender = dict[str, Row]
Cases = dict[Any, ByContender]


@dataclass
class Run:
    """A results file with its rows sorted by (level, what), then by case, then by contender."""

    name: str  # the file's name without its suffix
    results: Results
    tables: dict[tuple[str, str], Cases]

    @property
    def device(self) -> str:
        return self.results.machine["device"]

    @property
    def on_gpu(self) -> bool:
        return self.results.machine["kind"] == "gpu"

    def cases(self, level: str, what: str) -> Cases:
        return self.tables.get((level, what), {})


def read_runs(folder: Path) -> list[Run]:
    """Read every results file of a folder, in order of names. The default folder may be missing.

    Raises:
        ValueError: a file is no results file, has another schema, or has a malformed machine or row.
        FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir() and folder != FOLDER:
        raise FileNotFoundError(f"there is no folder {folder}; expected one of results files")
    return [_read_run(file) for file in sorted(folder.glob("*.json"))]


def read_demo(folder: Path) -> Figures | None:
    """Read demo/figures.json, written by `fused-steer demo --record`; None if it is missing.

    Raises:
        ValueError: the file does not have the demo's figures.
    """
    file = folder / "demo" / "figures.json"
    return Figures.load(file) if file.is_file() else None


def _read_run(file: Path) -> Run:
    results = load(file)
    machine = results.machine
    if not isinstance(machine, dict) or machine.get("kind") not in ("gpu", "cpu") or not machine.get("device"):
        raise ValueError(f"{file} has the machine {machine!r}; expected a device, and as kind gpu or cpu")
    if not isinstance(results.bandwidth, (int, float, type(None))) or not 0 < (results.bandwidth or 1) < math.inf:
        raise ValueError(f"{file} has the bandwidth {results.bandwidth!r}; expected bytes per second, or null")
    if not isinstance(results.absent, dict):
        raise ValueError(f"{file} has as absent {results.absent!r}; expected contenders and reasons")
    tables: dict[tuple[str, str], Cases] = {}
    for number, row in enumerate(results.rows):
        try:
            case = _checked_case(row)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}, row {number}: {error}") from None
        contenders = tables.setdefault((row.level, row.what), {}).setdefault(case, {})
        if row.contender in contenders:
            raise ValueError(f"{file}, row {number}: {row.contender} on this case is repeated; expected it once")
        contenders[row.contender] = row
    return Run(file.stem, results, tables)


def _checked_case(row: Row) -> OpCase | HostCase | ModelCase | ProjectionCase | GroupedCase | ServeCase:
    make, whats = LEVELS.get(row.level, (None, ()))
    if make is None or row.what not in whats:
        expected = "; ".join(f"{level}: {', '.join(whats)}" for level, (_, whats) in LEVELS.items())
        raise ValueError(f"level {row.level!r}, what {row.what!r}; expected of {expected}")
    case = make(**row.case)
    for entry in dataclasses.fields(case):
        value = getattr(case, entry.name)
        if type(value).__name__ != entry.type:
            raise ValueError(f"{entry.name} is {value!r}; expected {entry.type}")
    if case.dtype not in DTYPES:
        raise ValueError(f"dtype is {case.dtype!r}; expected one of {', '.join(DTYPES)}")
    # Extra memory may be negative, and a hit rate may be 0.
    positive = (row.level, row.what) not in BYTES and row.level != "counters"
    if not all(math.isfinite(sample) and (sample > 0 or not positive) for sample in row.samples):
        raise ValueError(f"samples are {row.samples}; expected finite {'seconds above 0' if positive else 'bytes'}")
    return case
