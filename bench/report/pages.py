"""The pages: docs/benchmarks.md with its plots, and the block in README; what of them is not as it should be.

Everything is read and checked before anything is written; the same results give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..results import FOLDER, PACKAGES
from .plots import STAMP, Plot, draw, plots
from .read import ByContender, Cases, Run, read_runs
from .tables import (
    RIVALS,
    VARIANT,
    WORDS,
    accuracy_tables,
    against_floor,
    amount,
    as_table,
    counters_tables,
    device_name,
    escaped,
    grouped_tables,
    host_tables,
    memory_tables,
    model_size,
    model_tables,
    model_text,
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
BEGIN, END = "<!-- results -->", "<!-- /results -->"
NOT_MEASURED = "Speed on a GPU has not been measured yet, and nothing here claims it."


LEGEND = """\
Times and bytes are medians, with the 20 % and 80 % quantiles in parentheses. One unit is one tensor of N tokens × d in
the model's dtype. The floor is the bytes that must be moved at least, 3 units forward and 3 backward, at the bandwidth
of a large copy on the same device, read plus written. *× floor* is fused's time as a multiple of it; *share of copy
bandwidth* is the floor's bytes a second as a share of that bandwidth. A multiple after another contender's time is that
time over fused's: above 1× fused is faster. `fused-again` is the same version timed twice, and shows the noise. `add`
is the plain residual add, which steers nothing; `copy` copies one tensor, 2 units. *Added units a layer* is the time
above the unsteered model, a layer, in passes of the hidden state at the copy's bandwidth. In serving, `fused` gives
each row its own of so many adapters, `fused-bf16` the same with adapters in bfloat16, `one-adapter` all rows the same
one, `no-adapter` none where there could be one, and `gather-bmm` copies an adapter's weights for each token; *makes* is
the bytes of all tensors that a call makes beside its result. On a CPU, where vLLM compiles nothing once LoRA is
enabled, its unsteered engine does not compile either. *Host time* is CPU time of one call of a block that does nothing
but its residual add, steered by `patch_model` or by a hook of four PyTorch operations, in turns in one process. A
contender that did not run on a case has there the reason instead of a figure, and – where it was not measured."""

HOW_TO_RUN = """\
## How to run it

On a machine with a GPU, from the checkout's root:

```bash
pip install -c constraints.txt -e ".[test]"
python -m bench.gpu --out bench/results  # bench/results/<device>.json, most telling first; again: it goes on
python -m bench.report                   # writes this file, its plots, and the table in README.md
```

`--part tests` and `--part measure` do one of its halves, each in a time of its own. `--rehearse` runs all of it without
a GPU, on small sizes, and writes nothing.

A sample of a kernel is the replay of a CUDA graph of many calls. Each call reads inputs of its own and writes an output
of its own; together they are twice the L2 cache, so that neither reads nor writes stay there.

`python -m bench.stub -m bench.host` prints the host time of a block's call as ratios to the hooked block, and whether
its goals are met, on a machine without a GPU: Triton compiles and launches for real, over a driver library that does
nothing. `pytest bench -k host` does the same.

`python -m bench.vllm --out bench/results` measures vLLM, in an environment that has it
([docs/serving.md](serving.md#vllm)), on a GPU or a CPU. On a machine without a GPU `python -m bench.serving --out
bench/results` measures serving as far as it can be there, and `pytest bench -m "not gpu"` checks what must hold
anywhere.

`python -m bench.report --check` writes nothing and fails if a file is not what the results give."""


def benchmarks_text(runs: list[Run]) -> str:
    """`docs/benchmarks.md`."""
    gpus, cpus = [run for run in runs if run.on_gpu], [run for run in runs if not run.on_gpu]
    parts = [
        "<!-- Written by `python -m bench.report` from bench/results. Do not edit. -->",
        "# Benchmarks",
        LEGEND if runs else "",
        *([] if gpus else [f"No run on a GPU has been committed. {NOT_MEASURED}"]),
        *(part for run in gpus + cpus for part in _run_parts(run)),
        HOW_TO_RUN,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _run_parts(run: Run) -> Iterator[str]:
    if run.on_gpu:
        yield f"## {device_name(run)}"
    else:
        yield f"## {device_name(run)}: the torch backend or Triton's interpreter on a CPU"
        yield "**This says nothing of the kernels.** It shows that the benchmarks run, and no speed of fused-steer."
    yield _machine_text(run)
    if run.on_gpu:
        yield _goals_text(run)
        yield "\n\n".join(f"![{escaped(plot.title)}](benchmarks/{_svg_name(run, plot)})" for plot in plots(run))
    for title, tables in (
        ("The op", op_tables),
        ("Accuracy", accuracy_tables),
        ("Counters", counters_tables),
        ("Host time", host_tables),
        ("Models", model_tables),
        ("Memory", memory_tables),
        ("Joint-Orth's projection", projection_tables),
        ("An adapter for each token", grouped_tables),
        ("Serving", serve_tables),
    ):
        texts = list(tables(run))
        if texts:
            yield f"### {title} on {device_name(run)}"
            yield from texts
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


def _goals_text(run: Run) -> str:
    from ..goals import evaluate

    words = {True: "met", False: "**missed**", None: "not measured"}
    rows = [
        [
            escaped(goal.name),
            escaped(goal.text),
            "–" if goal.value is None else number_text(goal.value),
            escaped(goal.limit),
            words[goal.met],
        ]
        for goal in evaluate(run.results)
    ]
    table = as_table(["goal", "in words", "measured", "limit", ""], rows, texts=2)
    return f"### Goals on {device_name(run)}\n\n{table}"


def _absent_text(run: Run) -> str:
    if not run.results.absent:
        return ""
    lines = [f"- `{name}`: {escaped(reason)}" for name, reason in sorted(run.results.absent.items())]
    return f"### Not run on {device_name(run)}\n\n" + "\n".join(lines)


@dataclass(frozen=True)
class Line:
    """A line of README's table. base: the contender that steers nothing, if there is one."""

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
            base = "unsteered" if level == "model" else ""  # whose peak beyond itself is nothing
            yield Line(device_name(run), WORDS[what], model_text(case, what), ("–", "–"), base, rows)


def _largest(cases: Cases, size: Callable[[Any], Any]) -> list[tuple[Any, ByContender]]:
    """The largest case on which fused ran, or none."""
    ran = [case for case, rows in cases.items() if "fused" in rows and rows["fused"].samples]
    return [(case, cases[case]) for case in sorted(ran, key=size)[-1:]]


def readme_text(runs: list[Run]) -> str:
    """What stands between README's markers: one table of what GPUs took, or that none has been measured."""
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

The largest case of each that ran; medians, with the 20 % and 80 % quantiles in parentheses. Right of them, the others'
time or bytes as a multiple of fused's: above 1× fused is better. *Again* is fused timed twice: the noise. The floor is
the bytes that must be moved, at the bandwidth of a copy on the same device. All cases, goals met and missed, versions,
and how to run it: [docs/benchmarks.md](docs/benchmarks.md)."""


def with_block(text: str, block: str, readme: Path) -> str:
    """README's text with `block` between its markers.

    Raises:
        ValueError: it has not one pair of markers.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{readme} has no pair of markers; expected {BEGIN} and after it {END}, each once")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"


# ------------------------------------------------------------------------------------------------------------- command


def render(results: Path, docs: Path, readme: Path) -> dict[Path, bytes | None]:
    """Every file that the results give, with its content; None: a plot that they no longer give.

    Raises:
        ValueError: a results file is none, or README has no pair of markers.
        OSError: a file cannot be read.
    """
    runs = read_runs(results)
    folder = docs / "benchmarks"
    # Plots of an earlier run, known by their stamp.
    files: dict[Path, bytes | None] = dict.fromkeys(f for f in folder.glob("*.svg") if STAMP in f.read_bytes())
    files[readme] = with_block(readme.read_bytes().decode("utf-8"), readme_text(runs), readme).encode()
    files[docs / "benchmarks.md"] = benchmarks_text(runs).encode()
    for run in runs:
        for plot in plots(run):
            files[folder / _svg_name(run, plot)] = draw(plot)
    return dict(sorted(files.items()))


def differing(files: dict[Path, bytes | None]) -> list[Path]:
    """Those that are not yet as they should be."""
    return [file for file, content in files.items() if not _is_same(file, content)]


def _is_same(file: Path, content: bytes | None) -> bool:
    if content is None or not file.is_file():
        return content is None and not file.exists()
    old = file.read_bytes()
    if old == content or file.suffix != ".svg":
        return old == content
    # Another matplotlib draws the same in other bytes, and which one there is depends on the Python.
    drawn_by, drawn_from = (re.compile(p) for p in (rb"Matplotlib v[\w.+]+", rb"drawn from \w+"))
    return drawn_by.findall(old) != drawn_by.findall(content) and drawn_from.findall(old) == drawn_from.findall(content)
