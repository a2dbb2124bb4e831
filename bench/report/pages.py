"""Renders docs/benchmarks.md with its plots, and README's blocks; finds the files that are out of date.

Everything is read and checked before anything is written. The same results give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_steer.tools.demo import Figures

from .. import goals
from ..counted import PASSES, Count, counted
from ..levels import FLOOR_UNITS
from ..results import FOLDER, PACKAGES
from .plots import STAMP, Plot, draw, draw_counts, plots
from .read import ByContender, Cases, Run, read_demo, read_runs
from .tables import (
    RIVALS,
    VARIANT,
    WORDS,
    accuracy_tables,
    against_floor,
    amount,
    as_table,
    busy_tables,
    counters_tables,
    device_name,
    escaped,
    grouped_tables,
    host_tables,
    memory_tables,
    model_size,
    model_tables,
    model_text,
    norm_tables,
    number_text,
    op_tables,
    op_text,
    projection_tables,
    ratio_text,
    serve_tables,
    serve_text,
    variant_of,
)

ROOT = FOLDER.parents[1]
COUNTED_NAME = "counted.svg"
NOT_MEASURED = "Speed on a GPU has not been measured yet."


LEGEND = """\
Times and bytes are medians, with the 20 % and 80 % quantiles in parentheses. A *contender* is one of the
implementations that are compared. A contender that did not run on a case shows the reason; – means not measured.

- **Unit**: one tensor of N tokens × d in the model's dtype.
- **Floor**: the least time that the memory traffic takes, 3 units forward and 3 backward, at the bandwidth of a large
  copy on the same device (read plus written). *× floor* is the time of `fused` over the floor; *share of copy
  bandwidth* is its inverse.
- A multiple after a contender's time is that time over the time of `fused`. Above 1×, `fused` is faster.
- `fused-again` is `fused` timed a second time; it shows the noise. `add` is the plain residual add, without steering.
  `copy` copies one tensor, 2 units.
- **Models**: the contenders of a table run in turns in one process and share the model's weights. Rows *measured apart*
  were timed in another run, with an unsteered and a fused model of their own. Multiples never cross runs.
- **Added units per layer**: the time beyond the unsteered model, per layer, in units at the copy's bandwidth.
- **Time on the GPU**: the sum of a call's kernels and copies, read by PyTorch's profiler, without the gaps in which the
  GPU waits for the host.
- **Serving**: `fused` gives each row its own adapter, `fused-bf16` does so with adapters in bfloat16, `one-adapter`
  gives all rows the same one. `no-adapter` is a steered engine that gets requests without adapters. `gather-bmm`
  copies the adapter's weights for each token. Among the times of the op, `fused-norm` steers, adds and normalises by
  one launch, `then-norm` does so by two ops, and `add-norm` adds and normalises without steering. *Allocates* is the
  bytes of all tensors that a call allocates, its result excluded. On a CPU vLLM compiles nothing once LoRA is enabled,
  so its unsteered engine does not compile either.
- **Host time**: the CPU time of one call of a block that only does its residual add. It is steered by `patch_model`, or
  by a hook of four PyTorch operations. Both run in turns in one process."""

HOW_TO_RUN = """\
## How to run it

On a machine with a GPU, from the checkout's root:

```bash
pip install -c constraints.txt -e ".[test]"
python -m bench.gpu --out bench/results  # writes bench/results/<device>.json; run it again to resume
python -m bench.report                   # writes this page, its plots, and the table in README.md
```

`--part tests` and `--part measure` do one half, each with its own time limit. The tests' whole output is written to
`<device>-tests.txt` beside the results. `--rehearse` runs every step without a GPU, on small sizes, and writes no
results.

A sample of a kernel is the replay of a CUDA graph of many calls. Each call reads and writes separate memory. Together
they use twice the L2 cache, so that neither reads nor writes stay there.

Without a GPU, `python -m bench.stub -m bench.host` measures the host time of a block's call, as a ratio to the hooked
block's, and judges the goals of host time. Triton compiles and launches for real, over a driver library that does
nothing. `pytest bench -k host` does the same.

`python -m bench.vllm_host` prints the host time of a vLLM step on a CPU: idle against vanilla, and many
strengths against one. Two processes of the same engine differ for as long as they live, so it starts the engines
several times. With `--starts 7`, 256 requests and a tiny model of 8 layers (vLLM 0.32 for CPUs, torch 2.13, 2 cores,
otherwise idle), the CPU time of a step is, as the median of the starts and their range:

- idle, over vLLM without the plug-in: 1.000 (0.931–1.040), with 1.0027 times the calls;
- 256 strengths, over one: 1.015 (0.984–1.037), with 1.0000 times the calls;
- a second process without the plug-in, over the first: 0.994 (0.960–1.032), which is the noise.

`python -m bench.vllm --out bench/results` measures vLLM on a GPU or a CPU, in an environment that
[has vLLM](serving.md#vllm). Without a GPU, `python -m bench.serving --out bench/results` compares PyTorch
implementations of serving, and `pytest bench -m "not gpu"` checks properties that hold on any machine.

`python -m bench.report --check` writes nothing and fails if a file is out of date."""


INTRO = """\
This page shows how fast fused-steer is: the performance goals, the counted memory traffic, and every measurement in
`bench/results`. Steering adds a small computation to the end of each decoder layer. *Fused* is fused-steer, which does
it inside the layer's residual add. The *hook* is the usual PyTorch forward hook."""

GOALS_INTRO = """\
The goals are for an H100 in bf16 unless they say otherwise. The worst case of each counts. *Counted* shows the memory
traffic behind a goal, in units: passes of the hidden state through memory. Host times, measured over a driver that does
nothing, and times predicted by a model are in [What a call costs](speed.md)."""

COUNTED = f"""\
![Units and launches of one layer: unsteered, hook, fused](benchmarks/{COUNTED_NAME})

These figures are **counted**, not timed: the memory traffic and the kernel launches at the end of one decoder layer. A
unit is one tensor of N tokens × d that a kernel reads or writes. The hook's operations are counted as PyTorch
dispatches them, the fused kernels as the launcher starts them (`bench/counted.py`). Where a tile is read twice, the
second read should come from L2 and is not counted. At ranks 2 to 8 one launch of the forward packs the weights, unless
there are few tokens."""


def benchmarks_text(runs: list[Run], counts: dict[str, dict[str, Count]]) -> str:
    """Return the text of `docs/benchmarks.md`: the goals, the pictures, and every table, folded."""
    gpus, cpus = [run for run in runs if run.on_gpu], [run for run in runs if not run.on_gpu]
    parts = [
        "<!-- Written by `python -m bench.report` from bench/results. Do not edit. -->",
        "# Benchmarks",
        INTRO,
        *([] if gpus else [f"No run on a GPU has been committed. {NOT_MEASURED}"]),
        "## Goals",
        _goals_text(gpus, counts),
        "## Pictures",
        COUNTED,
        _counts_table(counts),
        *(f"![{escaped(plot.title)}](benchmarks/{_svg_name(run, plot)})" for run in gpus for plot in plots(run)),
        *(part for run in gpus + cpus for part in _run_parts(run)),
        f"## How to read the tables\n\n{LEGEND}" if runs else "",
        HOW_TO_RUN,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _counts_table(counts: dict[str, dict[str, Count]]) -> str:
    head = ["one layer, counted", "forward: units", "launches", "backward: units", "launches"]
    rows = (
        [name, *(str(n) for c in passes.values() for n in (c.units, c.launches))] for name, passes in counts.items()
    )
    return as_table(head, rows)


def _run_parts(run: Run) -> Iterator[str]:
    if run.on_gpu:
        yield f"## {device_name(run)}"
    else:
        # Headings are link targets, so several runs on one machine need different headings.
        yield f"## {device_name(run)}: {run.name}"
        yield (
            "**These figures say nothing about the kernels**: a CPU runs the torch backend or Triton's interpreter. "
            "They show that the benchmarks run."
        )
    yield _machine_text(run)
    for title, tables in (
        ("The op", op_tables),
        ("Accuracy", accuracy_tables),
        ("Counters", counters_tables),
        ("Host time", host_tables),
        ("The op and the norm behind it", norm_tables),
        ("Models", model_tables),
        ("Models: time on the GPU", busy_tables),
        ("Memory", memory_tables),
        ("Joint-Orth's projection", projection_tables),
        ("An adapter for each token", grouped_tables),
        ("Serving", serve_tables),
    ):
        texts = list(tables(run))
        if texts:
            yield f'<details markdown="1"><summary>{title} on {device_name(run)}</summary>'
            yield from texts
            yield "</details>"
    yield _absent_text(run)


def _svg_name(run: Run, plot: Plot) -> str:
    return f"{run.name}-{plot.name}.svg"


def _machine_text(run: Run) -> str:
    machine = run.results.machine
    versions = machine.get("versions") or {}
    commit = machine.get("commit") or "unknown"
    bandwidth = run.results.bandwidth
    facts = [
        ("device", run.device),
        ("driver", machine.get("driver")),
        ("multiprocessors", machine.get("multiprocessors")),
        ("cores", None if run.on_gpu else machine.get("cores")),
        ("bandwidth of a large copy", None if bandwidth is None else f"{number_text(bandwidth / 1e9)} GB/s"),
        ("fused-steer", machine.get("fused_steer")),
        ("python", machine.get("python")),
        *((name, versions.get(name)) for name in _version_names(versions)),
        ("commit", commit + (" with uncommitted changes" if machine.get("dirty") else "")),
        ("digest of the sources", machine.get("sources")),
        ("date", machine.get("date")),
    ]
    text = "; ".join(f"{name} {escaped(value)}" for name, value in facts if value is not None)
    lines = [f"{text}; command `{machine.get('command')}`; file `{run.name}.json`."]
    if run.results.tests:
        lines.append(_tests_text(run.results.tests))
    return "\n\n".join(lines)


def _tests_text(tests: dict[str, Any]) -> str:
    counts = [f"{tests[name]} {name}" for name in ("passed", "failed", "error", "skipped") if name in tests]
    end = "stopped when their time was up" if tests.get("exit") is None else f"exit code {tests['exit']}"
    failures = [f"- failed: {escaped(name)}" for name in tests.get("failures", [])]
    return "\n".join([f"Tests on this device (`pytest -m gpu`): {', '.join([*counts, end])}.", *failures])


def _version_names(versions: dict[str, Any]) -> list[str]:
    return [*PACKAGES, *sorted(versions.keys() - set(PACKAGES))]


def _goals_text(gpus: list[Run], counts: dict[str, dict[str, Count]]) -> str:
    """Return the table of goals, with the counted traffic and the measurement of every GPU run."""
    words = {True: "met", False: "**missed**", None: "not measured"}
    known = _counted_of_goals(counts)
    judged = [goals.evaluate(run.results) for run in gpus]
    rows = []
    for place, goal in enumerate(goals.GOALS):
        outcomes = [outcomes[place] for outcomes in judged]
        cells = [f"{number_text(o.value)}, {words[o.met]}" if o.value is not None else words[None] for o in outcomes]
        limit = f"{'<=' if goal.at_most else '>='} {goal.limit:g}"
        rows.append(
            [
                escaped(goal.name),
                escaped(goal.text),
                escaped(limit),
                known.get(goal.name, "–"),
                *(cells or [words[None]]),
            ]
        )
    devices = [f"measured on {device_name(run)}" for run in gpus] or ["measured on a GPU"]
    return f"{GOALS_INTRO}\n\n{as_table(['goal', 'in words', 'limit', 'counted', *devices], rows, texts=2)}"


def _counted_of_goals(counts: dict[str, dict[str, Count]]) -> dict[str, str]:
    """Return the counted units behind each goal. If only memory bandwidth mattered, times would have these ratios."""
    fused, hook, add = (counts[name] for name in ("fused", "hook", "unsteered"))
    texts = {"forward": f"{fused['forward'].units} units, the add {add['forward'].units}"}
    texts["backward"] = f"{fused['backward'].units} units, the floor {FLOOR_UNITS['backward']}"
    for what in PASSES:
        texts[f"{what} / hook"] = f"{hook[what].units} units, fused {fused[what].units}"
    return texts


def _absent_text(run: Run) -> str:
    if not run.results.absent:
        return ""
    lines = [f"- `{name}`: {escaped(reason)}" for name, reason in sorted(run.results.absent.items())]
    return f"### Not run on {device_name(run)}\n\n" + "\n".join(lines)


@dataclass(frozen=True)
class Line:
    """A line of README's table. `base` names the unsteered contender, or is ""."""

    device: str
    what: str
    case: str
    floor: tuple[str, str]
    base: str
    rows: ByContender


def _readme_lines(run: Run) -> Iterator[Line]:
    for what in ("forward", "backward"):
        cases = _largest(run.cases("op", what), lambda case: (variant_of(case) == VARIANT, case.hidden, case.tokens))
        for case, rows in cases:
            floor = against_floor(run.results, what, case, rows["fused"])
            yield Line(device_name(run), WORDS[what], op_text(case), floor, "add", rows)
    for case, rows in _largest(
        run.cases("serve", "decode-graph"), lambda case: (model_size(case.model), case.adapters)
    ):
        yield Line(device_name(run), "decode step by rows, CUDA graph", serve_text(case), ("–", "–"), "unsteered", rows)
    for level, what in (("model", "train"), ("model", "decode"), ("model", "decode-graph"), ("memory", "peak")):
        for case, rows in _largest(run.cases(level, what), model_size):
            base = "unsteered" if level == "model" else ""  # memory is already counted beyond the unsteered model
            yield Line(device_name(run), WORDS[what], model_text(case, what), ("–", "–"), base, rows)


def _largest(cases: Cases, size: Callable[[Any], Any]) -> list[tuple[Any, ByContender]]:
    """Return a list of the largest case on which fused ran; empty if there is none."""
    ran = [case for case, rows in cases.items() if "fused" in rows and rows["fused"].samples]
    return [(case, cases[case]) for case in sorted(ran, key=size)[-1:]]


def readme_text(runs: list[Run]) -> str:
    """Return README's block of results: one table of GPU measurements, or a sentence that there are none."""
    lines = [line for run in runs if run.on_gpu for line in _readme_lines(run)]
    if not lines:
        return f"{NOT_MEASURED} How to measure it: [docs/benchmarks.md](docs/benchmarks.md)."
    rivals = [name for name in RIVALS if any(name in line.rows for line in lines)]
    head = [
        "device",
        "what",
        "case",
        "fused",
        "× floor",
        "share of copy bandwidth",
        "again",
        "add or unsteered",
        *rivals,
    ]
    table = as_table(
        head,
        (
            [line.device, line.what, line.case, amount(line.rows["fused"]), *line.floor]
            + [ratio_text(line.rows.get(name), line.rows["fused"]) for name in ("fused-again", line.base, *rivals)]
            for line in lines
        ),
        texts=3,
    )
    return f"""\
{table}

Each line is the largest case that ran. Figures are medians, with the 20 % and 80 % quantiles in parentheses. Columns to
the right show another contender's time or bytes over fused's: above 1×, fused is better. *Again* is a second timing of
fused; it shows the noise. The floor is the least time that the memory traffic takes at the bandwidth of a copy on the
same device. [docs/benchmarks.md](docs/benchmarks.md) has all cases, the goals, the versions, and the commands."""


def demo_text(figures: Figures) -> str:
    """Return README's block of the demo: a table of the figures that the demo wrote."""
    where = f"{figures.cores} CPU cores" if figures.device == "cpu" else figures.device
    row = [
        f"{figures.exact_before} of {figures.held_out}",
        f"**{figures.exact_after} of {figures.held_out}**",
        f"{figures.trained:,} of {figures.parameters:,} ({figures.trained / figures.parameters:.2%})",
        f"{figures.adapter_bytes / 1e6:.2f} MB",
        f"{sum(figures.seconds.values()) / 60:.1f} minutes, {figures.cpu_seconds / 60:.1f} of CPU time, on {where}",
    ]
    head = ["exact match before", "after", "trained parameters", "adapter file", "the whole demo"]
    return f"""\
{as_table(head, [row], texts=5)}

{figures.model}, {figures.task}, {figures.steps} steps of {figures.batch_size}; {figures.held_out} held-out expressions;
fused-steer {figures.versions["fused_steer"]}, torch {figures.versions["torch"]}."""


def with_block(text: str, name: str, block: str, readme: Path) -> str:
    """Return README's text with `block` between the markers `<!-- name -->` and `<!-- /name -->`.

    Raises:
        ValueError: README does not have exactly one pair of markers.
    """
    begin, end = markers(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{readme} has no pair of markers; expected {begin} and after it {end}, each once")
    before, after = text.partition(begin)[0], text.partition(end)[2]
    return f"{before}{begin}\n\n{block}\n\n{end}{after}"


def markers(name: str) -> tuple[str, str]:
    """Return the two comments that enclose a block of README."""
    return f"<!-- {name} -->", f"<!-- /{name} -->"


# ------------------------------------------------------------------------------------------------------------- command


def render(results: Path, docs: Path, readme: Path) -> dict[Path, bytes | None]:
    """Render every file from the results; return path -> content, or None for a plot to delete.

    Raises:
        ValueError: a results file or the demo's figures are malformed, or README lacks a pair of markers.
        OSError: a file cannot be read.
    """
    runs = read_runs(results)
    folder = docs / "benchmarks"
    # Plots of an earlier run, recognised by their stamp.
    files: dict[Path, bytes | None] = dict.fromkeys(f for f in folder.glob("*.svg") if STAMP in f.read_bytes())
    text = with_block(readme.read_bytes().decode("utf-8"), "results", readme_text(runs), readme)
    figures = read_demo(results)
    if figures is not None:
        text = with_block(text, "demo", demo_text(figures), readme)
    counts = counted()
    files[readme] = text.encode()
    files[docs / "benchmarks.md"] = benchmarks_text(runs, counts).encode()
    files[folder / COUNTED_NAME] = draw_counts(counts)
    for run in runs:
        for plot in plots(run):
            files[folder / _svg_name(run, plot)] = draw(plot)
    return dict(sorted(files.items()))


def differing(files: dict[Path, bytes | None]) -> list[Path]:
    """Return the files that are out of date."""
    return [file for file, content in files.items() if not _is_same(file, content)]


def _is_same(file: Path, content: bytes | None) -> bool:
    if content is None or not file.is_file():
        return content is None and not file.exists()
    old = file.read_bytes()
    if old == content or file.suffix != ".svg":
        return old == content
    # Different versions of matplotlib write different bytes for the same drawing.
    drawn_by, drawn_from = (re.compile(p) for p in (rb"Matplotlib v[\w.+]+", rb"drawn from \w+"))
    return drawn_by.findall(old) != drawn_by.findall(content) and drawn_from.findall(old) == drawn_from.findall(content)
