"""`python -m bench.gpu --rehearse`: a whole GPU run without a GPU, to find mistakes before GPU time is spent.

Every step and every GPU test runs the same code at small sizes over the stub driver, while PyTorch pretends to have
CUDA. No kernel runs: wrong numbers are expected and times mean nothing. Any other failure is reported. No results file
is written.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch

from . import counters, gpu, grouped, levels, norm, projection, serving
from .geometries import GEOMETRIES, GroupedCase, HostCase, ModelCase, OpCase, ProjectionCase, ServeCase
from .goals import GOALS
from .results import Results, Row, describe_machine

#: Leaves out two tests that touch gigabytes, and one that imports the kernels a second time, past the stub.
LEFT_OUT = "not past_two_to_the_31 and not kernels_hub"
#: The tests of a rehearsal on few sizes.
FEW = "test_post_block_is_as_exact_as_the_hook"
OVER = ("bench.stub", "-m", "bench.checkout", "-p", "bench.stub.pretence")


def smaller(case: Any) -> Any:
    """Return a case of the same kind with a size that takes a CPU milliseconds."""
    if isinstance(case, OpCase):
        return dataclasses.replace(case, tokens=8 if case.tokens <= 8 else 40, hidden=72 if case.hidden % 1024 else 128)
    if isinstance(case, GroupedCase):
        tokens = 300 if case.prefill else 16
        return dataclasses.replace(case, tokens=tokens, hidden=128, adapters=min(case.adapters, 4))
    if isinstance(case, ProjectionCase):
        return dataclasses.replace(case, layers=2, hidden=128)
    if isinstance(case, ModelCase):
        return dataclasses.replace(case, layers=min(case.layers, 1), batch=min(case.batch, 2), length=16)
    if isinstance(case, ServeCase):
        return dataclasses.replace(
            case, batch=min(case.batch, 4), length=16, adapters=min(case.adapters, 2, case.batch)
        )
    assert isinstance(case, HostCase), case
    return case


def shrink_geometries() -> None:
    """Make every geometry tiny, with the same model classes, for the rest of the process."""
    for _, sizes in GEOMETRIES.values():
        sizes |= {
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 128,
        }  # fmt: skip
        if "head_dim" in sizes:
            sizes["head_dim"] = 16


def let_numbers_pass() -> None:
    """Replace the checks of contenders: drop their verdict "wrong", as no kernel computes anything; keep "failed"."""

    def by_name(check: Callable[..., dict[str, str]]) -> Callable[..., dict[str, str]]:
        return lambda *args, **kwargs: {
            name: problem for name, problem in check(*args, **kwargs).items() if not problem.startswith("wrong:")
        }

    def of_one(check: Callable[..., str]) -> Callable[..., str]:
        def call(*args: Any, **kwargs: Any) -> str:
            problem = check(*args, **kwargs)
            return "" if problem.startswith("wrong:") else problem

        return call

    levels.check_op, levels.check_models = by_name(levels.check_op), by_name(levels.check_models)
    serving.check = by_name(serving.check)
    for module in (grouped, norm, projection):
        module.check = of_one(module.check)


def one_of_each(steps: Sequence[gpu.Step]) -> list[gpu.Step]:
    """Return the first step of every kind."""
    kinds: dict[tuple[str, str], gpu.Step] = {}
    for step in steps:
        kinds.setdefault((step.level, step.what), step)
    return list(kinds.values())


class Rehearsed(gpu.Step):
    """A step that runs at a smaller size; its rows name the original size."""

    ran: ClassVar[dict[gpu.Step, list[Row]]] = {}  # the rows of each smaller size that this process has run

    def run(self, device: torch.device, rounds: int | None) -> list[Row]:
        small = gpu.Step("", self.level, self.what, smaller(self.case), self.names)
        if small not in self.ran:
            self.ran[small] = small.run(device, rounds)
        return [dataclasses.replace(row, case=asdict(self.case)) for row in self.ran[small]]


def rehearse(parts: Sequence[str], few: bool = False, say: Callable[[str], None] = print) -> int:
    """Rehearse a GPU run; return the exit code: 1 if anything but numbers failed.

    Without the stub driver, this process is replaced by one with it. few: run one step of every kind and one test.
    """
    from .stub import active

    if active() is None:
        os.execv(sys.executable, [sys.executable, "-m", "bench.stub", "-m", "bench.gpu", *sys.argv[1:]])
    say("a rehearsal: no kernel runs, nothing is measured, no results are written")
    problems: list[str] = []
    if "measure" in parts:
        prepare()
        every = gpu.all_steps()
        problems += rehearse_steps(one_of_each(every) if few else every, say)
    if "tests" in parts:
        problems += rehearse_tests(few, say)
    for problem in problems:
        say(f"  {problem}")
    say(f"rehearsal: {len(problems)} problems" if problems else "rehearsal: no problems")
    return 1 if problems else 0


def prepare() -> None:
    """Turn this process, over the stub driver, into a rehearsal for the rest of its life."""
    from .stub.pretence import pretend

    pretend()
    shrink_geometries()
    let_numbers_pass()
    counted = smaller(OpCase(*gpu.COUNTED))
    gpu.COUNTED = (counted.tokens, counted.hidden)


def rehearse_steps(steps: Sequence[gpu.Step], say: Callable[[str], None]) -> list[str]:
    """Run the steps, judge and report their results, and return the problems."""
    from . import timing
    from .contenders import absent
    from .counted import PASSES, Count
    from .report.pages import benchmarks_text, readme_text
    from .report.read import read_runs
    from .stub.pretence import NAME

    device = torch.device("cuda", 0)
    results = Results(describe_machine(device) | {"kind": NAME}, absent=absent())
    results.bandwidth = timing.copy_bandwidth(device, 1 << 20)
    lines: list[str] = []

    def progress(line: str) -> None:
        lines.append(line)
        if len(steps) < 50 or len(lines) % 50 == 0:
            say(f"step {len(lines)} of {len(steps)}: {line}")

    rehearsed = [Rehearsed(step.title, step.level, step.what, step.case, step.names) for step in steps]
    gpu.measure(results, rehearsed, device, lambda: None, lambda: math.inf, 1, progress)
    for what in ("forward", "backward"):  # the command that ncu would run
        counters.main(json.dumps(asdict(OpCase(8, 64))), what)
        counters.command(OpCase(8, 64), what)
    for goal in GOALS:
        goal.measure(results)
    list(gpu.goal_lines(results))
    # The report reads only results of a GPU, so a temporary copy of these claims to be one.
    with tempfile.TemporaryDirectory() as folder:
        Results(results.machine | {"kind": "gpu"}, results.bandwidth, results.absent, None, results.rows).save(
            Path(folder) / "rehearsal.json"
        )
        runs = read_runs(Path(folder))
        # Counting passes and launches needs a process without a pretended driver: zeros stand in.
        counts = {name: dict.fromkeys(PASSES, Count(0, 0)) for name in ("unsteered", "hook", "fused")}
        benchmarks_text(runs, counts)
        readme_text(runs)
    say(f"{len(steps)} steps on {len(Rehearsed.ran)} small sizes, {len(results.rows)} rows")
    return [
        f"{row.level} {row.what}, {row.contender}, {row.case}: {row.status}"
        for row in results.rows
        if row.status != "ok" and not row.status.startswith("not run:")
        if not (row.level == "accuracy" and row.status.startswith("wrong:"))
    ]


def rehearse_tests(few: bool, say: Callable[[str], None]) -> list[str]:
    """Run every group of GPU tests; return the failures, wrong numbers excluded."""
    problems = []
    for name, which in gpu.TEST_GROUPS.items():
        chosen = f"({which}) and {LEFT_OUT}" + (f" and {FEW}" if few else "")
        done = gpu.run_gpu_tests(chosen, 3600.0, (*OVER, "tests/kernels/test_post_block.py") if few else OVER)
        counts = ", ".join(f"{done[key]} {key}" for key in gpu.COUNTS if key in done)
        say(f"gpu tests, {name}: {counts or 'no counts'} (xfailed: over numbers); {done['seconds']} s")
        problems += done["failures"]
        if done["exit"] not in (0, 1) or not counts:
            problems.append(f"gpu tests, {name}: exit {done['exit']}: {done['tail'][-300:]}")
        if few:
            break
    return problems
