"""`python -m bench.gpu --out DIR`: test and measure the kernels on this machine's GPU, most important first.

A run has three parts: the GPU tests of fp16, the measurements (up to nine minutes), and the other GPU tests (up to nine
minutes more). The measurements begin with the accuracy in fp16, the op at 4096 and at 8 tokens, and whole models.
`--part tests` or `--part measure` limits the run. The results file is saved after every step, and the tests' whole
output beside it. The same command resumes an interrupted run, which loses at most one step. It runs from a checkout,
without a network.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from . import counters, levels, timing
from .checkout import ROOT
from .contenders import MODEL_GROUPS, OP_CONTENDERS, absent
from .geometries import (
    FEW_LAYERS,
    REAL,
    GroupedCase,
    HostCase,
    ModelCase,
    OpCase,
    ProjectionCase,
    ServeCase,
    grouped_grid,
    op_grid,
    serve_grid,
)
from .goals import LOW_RANKS, MANY_TOKENS, evaluate
from .grouped import GROUPED_CONTENDERS, measure_grouped
from .host import HOST_CONTENDERS, measure_host
from .norm import NORM_BACKWARD_CONTENDERS, NORM_CONTENDERS, measure_norm
from .projection import PROJECTION_CONTENDERS, measure_projection
from .results import Results, Row, describe_machine, file_name, source_fingerprint, start
from .serving import SERVE_CONTENDERS, SERVE_RUNS, measure_serving

PARTS = ("tests", "measure")
COUNTS = ("passed", "failed", "error", "skipped", "xfailed")
MESSAGE = 300  # characters of a failed test's error in the results file
TRANSCRIPT = 1 << 20  # bytes of the tests' output that are kept beside the results file
COUNTED = (4096, 4096)  # tokens and width at which launches are counted; the other sizes launch the same kernels
LONGEST_STEP = 45.0  # a step begins only if this many seconds are left


@dataclass(frozen=True)
class Step:
    """One measurement: a case, and the contenders (`names`) that each make a row."""

    title: str
    level: str
    what: str
    case: OpCase | ModelCase | ProjectionCase | GroupedCase | ServeCase | HostCase
    names: tuple[str, ...]

    def is_done(self, results: Results) -> bool:
        keys = {row.key for row in results.rows}
        return all(Row(self.level, self.what, name, asdict(self.case)).key in keys for name in self.names)

    def run(self, device: torch.device, rounds: int | None) -> list[Row]:
        if isinstance(self.case, ModelCase):
            return levels.measure_model(
                self.case, self.what, device, self.names, rounds or 10, check=self.what in ("train", "prefill")
            )
        if isinstance(self.case, ProjectionCase):
            return measure_projection(self.case, device, self.names, rounds or 20)
        if isinstance(self.case, GroupedCase):
            return measure_grouped(self.case, device, self.names, rounds or 20, count=self.case.tokens == 64)
        if isinstance(self.case, ServeCase):
            return measure_serving(self.case, self.what, device, self.names, rounds or 10)
        if isinstance(self.case, HostCase):
            return measure_host(self.case, self.what, device, rounds or 60)
        if self.level == "norm":
            return measure_norm(self.case, self.what, device, self.names, rounds or 20, self.case.tokens in (4096, 8))
        if self.level == "accuracy":
            return levels.measure_accuracy(self.case, device)
        if self.level == "counters":
            return counters.measure_counters(self.case, self.what)
        count = (self.case.tokens, self.case.hidden) == COUNTED
        return levels.measure_op(self.case, self.what, device, self.names, rounds or 20, count)


def _op_step(case: OpCase, what: str, compiled: bool) -> Step:
    names = tuple(name for name in OP_CONTENDERS if compiled or name != "hook-compiled")
    read = "" if case.reads == "sum" else " of the branch"
    return Step(f"op {what} N={case.tokens} d={case.hidden} r={case.rank}{read}", "op", what, case, names)


def _model_step(what: str, case: ModelCase) -> Step:
    size = f"{case.geometry}, {case.layers or 'all'} layers, {case.batch} x {case.length}, {case.group}"
    # joint-orth differs from LoRA plus steering only in training.
    names = tuple(name for name in MODEL_GROUPS[case.group] if what == "train" or name != "joint-orth")
    return Step(f"model {what} of {size}", "model", what, case, names)


def _projection_step(case: ProjectionCase) -> Step:
    size = f"{case.layers} layers, d={case.hidden} k={case.writers} r={case.rank} {case.dtype}"
    return Step(f"projection of {size}", "projection", "step", case, tuple(PROJECTION_CONTENDERS))


def _grouped_step(case: GroupedCase) -> Step:
    kind = "prefill" if case.prefill else "decode"
    title = f"grouped op, {kind} N={case.tokens} d={case.hidden} adapters={case.adapters}"
    return Step(title, "grouped", "forward", case, tuple(GROUPED_CONTENDERS))


def _norm_step(case: OpCase, what: str = "forward") -> Step:
    title = f"op and norm, {what} N={case.tokens} d={case.hidden} r={case.rank}"
    return Step(title, "norm", what, case, tuple(NORM_CONTENDERS if what == "forward" else NORM_BACKWARD_CONTENDERS))


def _host_step(what: str, case: HostCase) -> Step:
    return Step(f"host time, {what}", "host", what, case, HOST_CONTENDERS[what])


def _serve_step(what: str, case: ServeCase) -> Step:
    size = f"{case.geometry}, {case.layers or 'all'} layers, {case.batch} rows, {case.adapters} adapters"
    return Step(f"serving, {what} of {size}", "serve", what, case, tuple(SERVE_CONTENDERS))


def _accuracy_step(case: OpCase) -> Step:
    title = f"accuracy in {case.dtype} N={case.tokens} d={case.hidden} r={case.rank}"
    return Step(title, "accuracy", "error", case, ("fused",))


def _counters_step(case: OpCase, what: str) -> Step:
    return Step(f"counters of op {what} N={case.tokens} d={case.hidden}", "counters", what, case, ("fused",))


def all_steps(counted: bool = False) -> list[Step]:
    """Return all measurements, most important first.

    The order is: accuracy in fp16, the op at 4096 and at 8 tokens, whole models, the other goals, everything else.
    counted: include the hardware counters, which need ncu.
    """
    accuracy = [
        _accuracy_step(OpCase(tokens, hidden, rank, dtype=dtype))
        for dtype in ("float16", "bfloat16", "float32")
        for tokens, hidden, rank in ((4096, 4096, 8), (8, 4096, 8), (4096, 2560, 64), (512, 1152, 1))
    ]
    telling, goals, rest = [], [], []
    for case in op_grid():
        deciding = case.tokens in MANY_TOKENS and case.activation == "silu"
        plain = deciding and not case.basis and case.rank in LOW_RANKS
        usual = case.rank == 8 and case.activation == "silu" and not case.basis and case.reads == "sum"
        for what in levels.OP_PASSES:
            # torch.compile takes seconds for each size, so it is measured only for the goals and for decoding.
            compiled = (plain and case.rank == 8) or (case.tokens == 8 and usual)
            step = _op_step(case, what, compiled)
            if usual and case.tokens in (4096, 8) and what != "both":
                telling.append(step)
            elif deciding and what != "both" and (not case.basis or case.rank == 8):
                goals.append(step)
            else:
                rest.append(step)
    telling += [_host_step(what, HostCase()) for what in HOST_CONTENDERS]
    if counted:
        telling += [_counters_step(OpCase(n, 4096), what) for n in (4096, 8) for what in ("forward", "backward")]
    goals += [_norm_step(OpCase(n, d, 8)) for n in (*MANY_TOKENS, 8) for d in (2048, 4096)]
    goals += [_norm_step(OpCase(n, d, r), "backward") for n in MANY_TOKENS for d in (2048, 4096) for r in (2, 4, 8)]
    goals.append(_projection_step(ProjectionCase()))
    rest += [_projection_step(ProjectionCase(writers=64)), _projection_step(ProjectionCase(dtype="bfloat16"))]
    whole = [
        _model_step(what, ModelCase("Llama-3.2-1B", 0, batch, length, checkpointing, group=group))
        for group in MODEL_GROUPS
        for what, batch, length, checkpointing in (
            ("train", 8, 512, False),
            *(("decode-graph", batch, 512, False) for batch in (1, 8, 64)),
            ("train", 8, 512, True),
            ("prefill", 1, 4096, False),
            ("decode", 8, 512, False),
        )
    ]
    served = [_serve_step("decode-graph", case) for case in serve_grid()]
    served += [_serve_step("generate", case) for case in serve_grid()]
    grouped = [_grouped_step(case) for case in grouped_grid()]
    cut = [
        _model_step(what, ModelCase(geometry, FEW_LAYERS, batch, length, group=group))
        for group in MODEL_GROUPS
        for geometry in reversed(REAL)
        for what, batch, length in (
            ("train", 8, 512),
            ("prefill", 1, 4096),
            ("decode", 8, 512),
            ("decode-graph", 8, 512),
        )
    ]
    return [*accuracy, *telling, *whole, *goals, *served, *grouped, *cut, *rest]


def smoke_steps() -> list[Step]:
    """Return one small step of every kind: a check, on any machine, that the run works."""
    op = OpCase(17, 64, 8, basis=4, dtype="float32")
    of_branch = OpCase(17, 64, 8, dtype="float32", reads="branch")
    return [
        _accuracy_step(op),
        *(_op_step(case, what, compiled=False) for case in (op, of_branch) for what in levels.OP_PASSES),
        *(_host_step(what, HostCase(layers=1)) for what in ("call", "pass", "train", "grouped")),
        _projection_step(ProjectionCase(2, 64, 4, 4)),
        _grouped_step(GroupedCase(9, 64, 4, dtype="float32")),
        _grouped_step(GroupedCase(300, 64, 4, prefill=True, dtype="float32")),
        *(_serve_step(what, ServeCase("small", 1, 3, 8, 2, dtype="float32")) for what in SERVE_RUNS),
        *(
            Step(
                f"model {what}",
                "model",
                what,
                ModelCase("small", 1, 1, 8, dtype="float32"),
                ("unsteered", "fused", "hook"),
            )
            for what in ("train", "prefill", "decode")
        ),
    ]


_FP16 = "((float16 and not bfloat16) or fp16)"
#: The GPU tests in groups, selected by pytest's -k, most important first. A resumed run skips the finished groups.
TEST_GROUPS = {
    "fp16": _FP16,
    "post_block": f"post_block and not {_FP16}",
    "others": f"not post_block and not {_FP16}",
}


def run_gpu_tests(which: str, seconds: float, over: Sequence[str] = ("bench.checkout",)) -> dict[str, Any]:
    """Run the GPU tests that match `which` in a subprocess; return counts, failures and the output.

    A failure is the test's name and the last line of its error.

    over: the module that runs pytest, and its options.
    """
    options = ["-m", "gpu", "-k", which, "-q", "-rfE", "--maxfail=200", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", *over, *options]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(8, os.cpu_count() or 1))]  # compiling takes most of the time
    begin = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["COLUMNS"] = "400"  # pytest cuts the lines of its summary
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            timeout=seconds,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        output, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as expired:
        output, code = expired.stdout or b"", None
        output = output.decode(errors="replace") if isinstance(output, bytes) else output
    found = re.findall(rf"(\d+) ({'|'.join(COUNTS)})", output[-400:])
    counts = {name: int(number) for number, name in found}
    return {
        "exit": code,  # None: timed out
        **counts,
        "failures": failures_in(output),
        "tail": output[-3000:] if code else "",
        "seconds": round(time.monotonic() - begin, 1),
        "output": output,
    }


def failures_in(output: str) -> list[str]:
    """Return each failed test or file in pytest's output, with the last line of its error."""
    errors: dict[str, str] = {}
    heading = ""
    for line in output.splitlines():
        title = re.fullmatch(r"_{2,} (?:ERROR collecting |ERROR at \w+ of )?(.+?) _{2,}", line)
        if title:
            heading = title.group(1)
        elif re.match(r"E {2,}\S", line):
            errors[heading] = line[1:].strip()
    failures = []
    for failed in re.findall(r"^(?:FAILED|ERROR) (.*)$", output, re.MULTILINE):
        name, _, summary = failed.partition(" - ")
        error = errors.get(name.partition("::")[2].replace("::", ".") or name, summary)
        failures.append(f"{name} - {error[:MESSAGE]}" if error else name)
    return failures


def test_groups(
    results: Results,
    names: Sequence[str],
    save: Callable[[], None],
    time_left: Callable[[], float],
    say: Callable[[str], None] = print,
    transcript: Path | None = None,
) -> int:
    """Run the groups of GPU tests that `results` lacks, saving after each; return the number of groups that remain.

    A group runs again if it was stopped, or if the test files have changed since.

    transcript: the file to which the tests' output is added.
    """
    digest = source_fingerprint(folders=("tests",))
    groups = dict((results.tests or {}).get("groups", {}))
    remaining = 0
    for name in names:
        done = groups.get(name)
        if done is not None and done["exit"] is not None and done["tests"] == digest:
            continue
        if time_left() < LONGEST_STEP:
            remaining += 1
            continue
        ran = run_gpu_tests(TEST_GROUPS[name], time_left())
        output = ran.pop("output")
        if transcript is not None:
            _add_to(transcript, f"==== gpu tests, {name}\n{output}\n")
        groups[name] = {**ran, "tests": digest}
        results.tests = _tests_together(groups)
        save()
        counts = ", ".join(f"{groups[name][key]} {key}" for key in COUNTS if key in groups[name])
        say(f"{groups[name]['seconds']:6.1f} s  gpu tests, {name}: {counts or 'no counts'}")
        remaining += groups[name]["exit"] is None
    return remaining


def _add_to(file: Path, text: str) -> None:
    """Add a text to a file. The file keeps its last `TRANSCRIPT` bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    before = file.read_bytes() if file.exists() else b""
    file.write_bytes((before + text.encode(errors="replace"))[-TRANSCRIPT:])


def _tests_together(groups: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return one summary of all groups. `exit` is None while a group is missing or was stopped."""
    codes = [groups[name]["exit"] if name in groups else None for name in TEST_GROUPS]
    counted = [key for key in COUNTS if any(key in of for of in groups.values())]
    return {
        "exit": None if None in codes else next((code for code in codes if code), 0),
        **{key: sum(of.get(key, 0) for of in groups.values()) for key in counted},
        "failures": [failure for of in groups.values() for failure in of["failures"]],
        "tail": "".join(of["tail"] for of in groups.values()),
        "seconds": round(sum(of["seconds"] for of in groups.values()), 1),
        "groups": groups,
    }


def measure(
    results: Results,
    steps: list[Step],
    device: torch.device,
    save: Callable[[], None],
    time_left: Callable[[], float],
    rounds: int | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Run the steps that `results` lacks, saving after each; return the number of steps for which no time was left.

    If a step fails, its rows say so and the run goes on.
    """
    pending = [step for step in steps if not step.is_done(results)]
    for number, step in enumerate(pending):
        if time_left() < LONGEST_STEP:
            return len(pending) - number
        begin = time.monotonic()
        try:
            rows = step.run(device, rounds)
        except Exception as error:  # GPU time is expensive: measure the other steps
            status = levels.forgotten(error)
            rows = [Row(step.level, step.what, name, asdict(step.case), status=status) for name in step.names]
        levels.release(device)
        _check_alive(device, step)
        for row in rows:
            results.put(row)
        save()
        bad = sorted({row.status for row in rows if row.status != "ok"})
        bad += levels.left_in_words(device)
        say(f"{time.monotonic() - begin:6.1f} s  {step.title}" + "".join(f"; {status[:240]}" for status in bad))
    return 0


def _check_alive(device: torch.device, step: Step) -> None:
    """Check that the GPU still works. After an illegal memory access every later result of the process is invalid.

    Raises:
        RuntimeError: the GPU does not answer any more.
    """
    try:
        timing.synchronize(device)
    except RuntimeError as error:
        line = " ".join(str(error).split())[:120]
        raise RuntimeError(f"the GPU failed at {step.title}: {line}; the earlier results are kept") from None


def goal_lines(results: Results) -> Iterator[str]:
    """Yield the closing table of a run: each goal, its measured value, and whether it is met."""
    machine = results.machine
    yield f"{machine['device']}, torch {machine['versions']['torch']}, triton {machine['versions']['triton']}"
    bandwidth = "not measured" if results.bandwidth is None else f"{results.bandwidth / 1e9:.0f} GB/s"
    yield f"copy bandwidth {bandwidth}; commit {machine['commit']}{' (changed)' if machine['dirty'] else ''}"
    tests = results.tests
    if tests is None:
        yield "gpu tests: not run"
    else:
        how = "not all were run" if tests["exit"] is None else f"exit {tests['exit']}"
        counts = ", ".join(f"{tests[name]} {name}" for name in COUNTS if name in tests)
        yield f"gpu tests: {how}; {counts or 'no counts'}; {tests['seconds']} s"
        yield from (f"  {failure[:240]}" for failure in tests["failures"][:20])
    yield f"{'goal':<20} {'limit':>8} {'measured':>9}  met"
    for outcome in evaluate(results):
        value = "-" if outcome.value is None else f"{outcome.value:.3f}"
        met = {True: "yes", False: "NO", None: "not measured"}[outcome.met]
        yield f"{outcome.name:<20} {outcome.limit:>8} {value:>9}  {met:<12} {outcome.text}"
    missed = sum(row.status != "ok" for row in results.rows)
    if missed:
        yield f"{missed} rows have no figures (not run, out of memory or failed); the results file has the reasons"


def _device(smoke: bool) -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if smoke:
        return torch.device("cpu")
    raise RuntimeError("there is no CUDA or ROCm GPU; expected one (--smoke shows on a CPU that the run works)")


def main(
    out: Annotated[Path | None, typer.Option(help="Directory for the results file.")] = None,
    minutes: Annotated[float, typer.Option(help="Time limit of the measurements. Run again to go on.")] = 9.0,
    test_minutes: Annotated[float, typer.Option(help="Time limit of the GPU tests, beside --minutes.")] = 9.0,
    part: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(PARTS)}. Default: both.")] = None,
    smoke: Annotated[bool, typer.Option(help="Small sizes only, also on a CPU, to check that the run works.")] = False,
    rehearse: Annotated[
        bool, typer.Option(help="Run every step without a GPU, over a driver that does nothing. Writes no results.")
    ] = False,
) -> None:
    """Test and measure everything on this machine's GPU, most important first, and judge the goals."""
    # A package that imports JAX would take three quarters of the GPU's memory for the rest of the process.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    parts = part or list(PARTS)
    if rehearse and not set(parts) - set(PARTS) and out is None:
        from .rehearsal import rehearse as run_rehearsal

        raise typer.Exit(run_rehearsal(parts, few=smoke))
    try:
        for name, value in (("minutes", minutes), ("test-minutes", test_minutes)):
            if not value > 0:
                raise ValueError(f"{name} is {value}; expected more than 0")
        for name in parts:
            if name not in PARTS:
                raise ValueError(f"part is {name!r}; expected one of {', '.join(PARTS)}")
        if rehearse:
            raise ValueError(f"out is {str(out)!r}; expected none, as a rehearsal writes no results")
        if out is None:
            raise ValueError("out is missing; expected a directory for the results file")
        if out.exists() and not out.is_dir():
            raise ValueError(f"out is {str(out)!r}, a file; expected a directory")
        device = _device(smoke)
        file = out / file_name(describe_machine(device)["device"])
        results = start(file, describe_machine(device))
    except (ValueError, RuntimeError, OSError) as error:
        typer.echo(f"bench.gpu: {error}", err=True)
        raise typer.Exit(1) from None
    results.absent = absent()
    interrupted, remaining = run_parts(
        results,
        parts,
        device,
        lambda: results.save(file),
        60 * minutes,
        60 * test_minutes,
        smoke,
        file.with_name(f"{file.stem}-tests.txt"),
    )
    for line in goal_lines(results):
        typer.echo(line)
    if remaining or interrupted:
        typer.echo(f"{interrupted}{remaining or 'some'} steps remain; run the same command to go on")
    typer.echo(f"results: {file}")
    if interrupted or (results.tests or {}).get("exit"):
        raise typer.Exit(1)


def run_parts(
    results: Results,
    parts: Sequence[str],
    device: torch.device,
    save: Callable[[], None],
    seconds: float,
    test_seconds: float,
    smoke: bool = False,
    transcript: Path | None = None,
) -> tuple[str, int]:
    """Run the parts that `results` lacks: the tests of fp16, the measurements, the other tests.

    Returns:
        Why the run ended early ("" if it did not), and the number of steps that remain.
    """
    testing, measuring = _clock(test_seconds), _clock(seconds)
    first, *others = TEST_GROUPS
    tested = "tests" in parts and device.type == "cuda"
    remaining = 0
    try:
        if tested:
            with testing as left:
                remaining += test_groups(results, [first], save, left, transcript=transcript)
        if "measure" in parts:
            with measuring as left:
                if results.bandwidth is None:
                    results.bandwidth = timing.copy_bandwidth(device, 1 << 24 if smoke else 1 << 30)
                    save()
                counted = counters.is_here()
                if not counted:
                    print(counters.NOT_HERE)
                steps = smoke_steps() if smoke else all_steps(counted)
                remaining += measure(results, steps, device, save, left, rounds=2 if smoke else None)
        if tested:
            with testing as left:
                remaining += test_groups(results, others, save, left, transcript=transcript)
    except KeyboardInterrupt:
        return "interrupted; ", remaining
    except RuntimeError as error:
        return f"{error}; ", remaining
    return "", remaining


class _clock:
    """A timer that counts down inside its `with` block and may be entered several times."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> Callable[[], float]:
        self.begin = time.monotonic()
        return lambda: self.seconds - (time.monotonic() - self.begin)

    def __exit__(self, *_: object) -> None:
        self.seconds -= time.monotonic() - self.begin


if __name__ == "__main__":
    typer.run(main)
