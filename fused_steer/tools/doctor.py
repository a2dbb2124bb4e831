"""`fused-steer doctor`: checks the installed versions, the backend of each device and the numbers that it computes.

torch and Triton are imported only after their versions are checked, so that the doctor can report them as missing.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from .._version import __version__

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..kernels.launch import Launch

PACKAGE = "fused-steer"
_STEP_TOKENS, _STEP_HIDDEN, _STEP_RANK = 4096, 4096, 8  # the training step shown in the table of kernels, in bfloat16
_CHECK_TOKENS, _CHECK_HIDDEN, _CHECK_RANK = 33, 192, 8  # small enough for Triton's interpreter


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        subject: the package, device or kernel.
        found: what was found.
        expected: what was expected, or "" if the finding is as expected.
        state: why another finding is acceptable: "unused" (another device serves), "untried" (may work) or "absent"
            (optional). "" if it is not acceptable.
        mend: the command that repairs it.
    """

    subject: str
    found: str
    expected: str = ""
    state: str = ""
    mend: str = ""

    @property
    def well(self) -> bool:
        return bool(self.state) or not self.expected

    def __str__(self) -> str:
        mark = self.state or ("ok" if self.well else "NOT WELL")
        expected = f"; expected {self.expected}" if self.expected else ""
        return f"{mark:<8}  {self.subject}: {self.found}{expected}" + (f"; {self.mend}" if self.mend else "")


def _version_finding(subject: str, found: str | None, specifier: Any) -> Finding:
    supported = str(specifier) or "any version"
    mend = "" if subject == "python" else f"pip install '{subject}{specifier}'"
    if found is None:
        return Finding(subject, "not installed", supported, mend=mend)
    if specifier.contains(found, prereleases=True):
        return Finding(subject, f"{found} (supported: {supported})")
    return Finding(subject, found, supported, mend=mend)


def _library_finding(library: str, found: str | None) -> Finding:
    """Compare an installed library with the versions that were tried. An optional library may be absent."""
    from .._requirements import OPTIONAL, TRIED

    tried = TRIED[library]
    use = f" (for {tried.use})" if library in OPTIONAL else ""
    if found is None:
        return Finding(library, f"not installed{use}", state="absent", mend=tried.command)
    if tried.includes(found):
        return Finding(library, f"{found} (tried: {tried})")
    return Finding(library, f"{found}{use}", f"one that was tried: {tried}", "untried", tried.command)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _check_versions() -> Iterator[Finding]:
    """Check Python and every requirement of the installed package against the ranges in its metadata.

    A release newer than the tried ones may work.
    """
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    from .._requirements import CORE

    own = _installed(PACKAGE)
    yield _version_finding(PACKAGE, own, SpecifierSet(f"=={__version__}"))
    if own is None:
        return
    about: Any = metadata.metadata(PACKAGE)
    supported = SpecifierSet(about.get("Requires-Python", ""))
    yield _version_finding("python", ".".join(map(str, sys.version_info[:3])), supported)
    for requirement in map(Requirement, metadata.requires(PACKAGE) or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            name, found = requirement.name, _installed(requirement.name)
            may_work = found is not None and (
                requirement.specifier.contains(found, prereleases=True) or name in CORE and CORE[name].precedes(found)
            )
            if name in CORE and may_work:
                yield _library_finding(name, found)
            else:
                yield _version_finding(name, found, requirement.specifier)


def _check_optional() -> Iterator[Finding]:
    """Check each optional library, and name the command that installs a tried version."""
    from .._requirements import OPTIONAL, installed

    for library in OPTIONAL:
        yield _library_finding(library, installed(library))


def _devices() -> list[torch.device]:
    import torch

    devices = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        devices += [torch.device(accelerator.type, i) for i in range(torch.accelerator.device_count())]
    return devices


def _device_name(device: torch.device) -> str:
    import torch

    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return f"{device} ({name(device)})" if name and device.type != "cpu" else str(device)


def _check_devices(devices: list[torch.device]) -> Iterator[Finding]:
    """Check the backend of each device, and the numbers that it computes."""
    from ..kernels import select_backend

    backends: dict[torch.device, str] = {}
    refusals: dict[torch.device, str] = {}
    for device in devices:
        try:
            backends[device] = select_backend(device)
        except RuntimeError as error:
            refusals[device] = str(error)
    for device, refusal in refusals.items():
        found, _, expected = refusal.partition("; expected ")
        # FUSED_STEER_BACKEND=triton rules out the CPU, which does not matter where there is a GPU.
        yield Finding(_device_name(device), found, expected, "unused" if backends else "")
    for device, backend in backends.items():
        yield _check_numbers(device, backend)


def _check_numbers(device: torch.device, backend: str) -> Finding:
    name = _device_name(device)
    try:
        worst = _worst_error(device)
    except Exception as error:  # a compiler or driver may fail in any way, and the doctor reports it
        text = " ".join(str(error).split())
        return Finding(name, f"backend {backend} raises {type(error).__name__}: {text}", "a result")
    if not worst <= 1:  # NaN included
        found = f"backend {backend} is wrong: its error is {worst:.3g} times what is allowed"
        return Finding(name, found, "at most twice the error of plain PyTorch in float32, plus 1e-6")
    return Finding(name, f"backend {backend}; forward and backward equal those of plain PyTorch in float32")


def _worst_error(device: torch.device) -> float:
    """Return the op's largest error in float32, over forward and every gradient, as a share of the allowed error.

    The truth is float64. The allowed error is twice that of the same formula in PyTorch's float32, plus 1e-6.
    """
    import torch

    from ..kernels import post_block

    n, d, r = _CHECK_TOKENS, _CHECK_HIDDEN, _CHECK_RANK
    generator = torch.Generator().manual_seed(0)
    residual, branch, down, up, grad = (
        torch.randn(shape, generator=generator) for shape in ((n, d), (n, d), (r, d), (d, r), (n, d))
    )
    operands = [residual, branch, down / math.sqrt(d), up]

    def plain(residual: Tensor, branch: Tensor, down: Tensor, up: Tensor) -> Tensor:
        x = residual + branch
        return x + torch.nn.functional.silu(x @ down.t()) @ up.t()

    def results(op: Any, **to: Any) -> list[Tensor]:
        leaves = [tensor.to(**to).requires_grad_() for tensor in operands]
        out = op(*leaves)
        return [t.cpu().double() for t in (out.detach(), *torch.autograd.grad(out, leaves, grad.to(**to)))]

    rows = zip(
        results(plain, device="cpu", dtype=torch.float64),
        results(plain, device=device),
        results(post_block, device=device),
        strict=True,
    )
    shares = [(ours - truth).norm() / (2 * (eager - truth).norm() + 1e-6 * truth.norm()) for truth, eager, ours in rows]
    return float(torch.stack(shares).max())


def _check_compiler() -> Iterator[Finding]:
    """How a layer's kernels are started in a graph of torch.compile."""
    from ..kernels.inductor import missing

    reason = missing()
    if reason is None:
        yield Finding("torch.compile", "generated code starts a layer's kernels itself")
    else:
        found = f"a layer's kernels are started through PyTorch's dispatcher, which takes the host longer ({reason})"
        yield Finding("torch.compile", found, "an Inductor that fused-steer knows", "untried")


def _targets(devices: list[torch.device]) -> list[str]:
    """Return the compilation targets of this machine's GPUs, or all targets if it has none."""
    import torch

    from ..kernels.aot import TARGETS

    here = set()
    for device in devices:
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            here.add(
                properties.gcnArchName.split(":")[0]
                if torch.version.hip
                else f"sm_{properties.major}{properties.minor}"
            )
    return [target for target in TARGETS if target in here] or list(TARGETS)


def _compile(launch: Launch, target: str) -> tuple[list[str], Finding | None]:
    """Compile a launch. Return its registers, spills, local and shared memory, and a finding if it spills."""
    from ..kernels.aot import compile_launch

    subject = f"{target} {launch.kernel.__name__}"
    try:
        used = compile_launch(launch, target)
    except Exception as error:  # a compiler may fail in any way
        found, _, expected = " ".join(str(error).split()).partition("; expected ")
        return ["-"] * 4, Finding(subject, found or type(error).__name__, expected or "it to compile")
    finding = None
    if used.spills or used.local:
        finding = Finding(subject, f"{used.spills} spills, {used.local} bytes of local memory", "none of either")
    return [str(number) for number in (used.registers, used.spills, used.local, used.shared)], finding


def _launches(targets: list[str], compiled: bool) -> tuple[Table, list[Finding]]:
    """Return a table of one training step's kernels on each target. `compiled` adds resources and findings."""
    import torch

    from ..kernels.aot import Case, record

    table = Table("target", "kernel", "grid", "tile", "warps", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("regs", "spills", "local", "shared") if compiled else ():
        table.add_column(column, justify="right")
    findings = []
    for target in targets:
        for launch in record(Case(_STEP_TOKENS, _STEP_HIDDEN, _STEP_RANK, torch.bfloat16), target):
            plan = launch.schedule
            used, finding = _compile(launch, target) if compiled else ([], None)
            sides = [plan.constants[side] for side in ("BLOCK_N", "BLOCK_D") if side in plan.constants]
            grid, tile = ("x".join(map(str, extents)) for extents in (launch.grid, sides))
            table.add_row(target, launch.kernel.__name__, grid, tile, str(plan.num_warps), *used)
            findings += [finding] if finding else []
    return table, findings


def examine(console: Console, compiled: bool) -> bool:
    """Print the doctor's report. Return whether all is well.

    Args:
        compiled: compile the kernels and show the resources that each uses.
    """
    findings: list[Finding] = []

    def report(found: Iterable[Finding]) -> None:
        for finding in found:
            findings.append(finding)
            style = "yellow" if finding.state == "untried" else None if finding.well else "bold red"
            console.print(str(finding), markup=False, soft_wrap=True, style=style)

    report(_check_versions())
    report(_check_optional())
    devices = _devices()
    report(_check_devices(devices))
    report(_check_compiler())
    table, amiss = _launches(_targets(devices), compiled)
    console.print(
        f"\nKernels of a training step: N = {_STEP_TOKENS} tokens, d = {_STEP_HIDDEN}, r = {_STEP_RANK}, bfloat16"
    )
    console.print(table)
    report(amiss)
    return all(finding.well for finding in findings)
