"""What is installed, which backend steers on each device, and whether it computes what it should.

Nothing heavy is imported before it is looked for: where torch or Triton is missing, that is what the doctor says.
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
_STEP_TOKENS, _STEP_HIDDEN, _STEP_RANK = 4096, 4096, 8  # the training step whose kernels are shown, in bfloat16
_CHECK_TOKENS, _CHECK_HIDDEN, _CHECK_RANK = 33, 192, 8  # small: Triton's interpreter has to manage it too


@dataclass(frozen=True)
class Finding:
    """What the doctor found out about one thing.

    expected: what it should have been, "" if that is so; state: why it need not be so ("unused": another will do;
    "untried": it may work; "absent": a part of fused-steer needs it), "" if it has to; mend: the command that mends it.
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
    """An installed library against the versions that were tried; an optional one may be absent."""
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
    """Python and every requirement of the installed package against the ranges that its metadata declares.

    A release that is newer than those that were tried may work.
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
            if found is not None and name in CORE and (CORE[name].includes(found) or CORE[name].precedes(found)):
                yield _library_finding(name, found)
            else:
                yield _version_finding(name, found, requirement.specifier)


def _check_optional() -> Iterator[Finding]:
    """Every optional library: its version, whether that was tried, and the command that installs one that was."""
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
    """Which backend steers tensors on each device, and whether it computes what it should."""
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
        # FUSED_STEER_BACKEND=triton rules out a CPU, which is nobody's loss where there is a GPU.
        yield Finding(_device_name(device), found, expected, "unused" if backends else "")
    for device, backend in backends.items():
        yield _check_numbers(device, backend)


def _check_numbers(device: torch.device, backend: str) -> Finding:
    name = _device_name(device)
    try:
        worst = _worst_error(device)
    except Exception as error:  # anything may be wrong with a compiler or a driver, and the doctor is asked what
        text = " ".join(str(error).split())
        return Finding(name, f"backend {backend} raises {type(error).__name__}: {text}", "a result")
    if not worst <= 1:  # NaN included
        found = f"backend {backend} is wrong: its error is {worst:.3g} times what is allowed"
        return Finding(name, found, "at most twice the error of plain PyTorch in float32, plus 1e-6")
    return Finding(name, f"backend {backend}; forward and backward equal those of plain PyTorch in float32")


def _worst_error(device: torch.device) -> float:
    """The op's worst error in float32, in forward and every gradient, as a share of what is allowed.

    The truth is float64; twice the error of the same formula in PyTorch's own float32, plus 1e-6, is allowed.
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
    """The compilation targets of the GPUs that are here, or, without one of those, all of them."""
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
    """Registers, spills, local and shared memory of a launch compiled for `target`; a finding if it is not well."""
    from ..kernels.aot import compile_launch

    subject = f"{target} {launch.kernel.__name__}"
    try:
        used = compile_launch(launch, target)
    except Exception as error:  # as above
        found, _, expected = " ".join(str(error).split()).partition("; expected ")
        return ["-"] * 4, Finding(subject, found or type(error).__name__, expected or "it to compile")
    finding = None
    if used.spills or used.local:
        finding = Finding(subject, f"{used.spills} spills, {used.local} bytes of local memory", "none of either")
    return [str(number) for number in (used.registers, used.spills, used.local, used.shared)], finding


def _launches(targets: list[str], compiled: bool) -> tuple[Table, list[Finding]]:
    """The kernels of one training step on each target; with `compiled`, what each uses, and what is not well."""
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
            sides = (plan.constants["BLOCK_N"], plan.constants["BLOCK_D"])
            grid, tile = ("x".join(map(str, extents)) for extents in (launch.grid, sides))
            table.add_row(target, launch.kernel.__name__, grid, tile, str(plan.num_warps), *used)
            findings += [finding] if finding else []
    return table, findings


def examine(console: Console, compiled: bool) -> bool:
    """Print what is found, and return whether all is well.

    Args:
        compiled: whether to compile the kernels, and to show what each uses.
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
