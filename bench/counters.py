"""Hardware counters of the fused kernels, read by Nsight Compute (`ncu`): L2 hit rate and stall reasons.

`ncu` runs `python -m bench.counters` in a separate process, which calls the op once on cold inputs. The counters help
to explain the timings. They are not timings themselves, because ncu replays every kernel many times.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict

import torch
import typer

from .checkout import ROOT
from .contenders import OP_CONTENDERS, make_operands
from .geometries import OpCase
from .results import Row

L2_HIT_RATE = "lts__t_sector_hit_rate.pct"
DRAM_BYTES = ("dram__bytes_read.sum", "dram__bytes_write.sum")
STALLS = "smsp__average_warps_issue_stalled_(.+)_per_issue_active.ratio"
NOT_HERE = "ncu is not here: no L2 hit rate and no stall reasons (it comes with the CUDA toolkit)"


def is_here() -> bool:
    return shutil.which("ncu") is not None


def command(case: OpCase, what: str) -> list[str]:
    counted = ["--metrics", ",".join((L2_HIT_RATE, *DRAM_BYTES)), "--section", "WarpStateStats"]
    # Count only between cudaProfilerStart and cudaProfilerStop: no launches of the compilation or of making inputs.
    # The clocks stay as they are: others may use the machine.
    options = "--csv --page raw --print-units base --clock-control none --profile-from-start off".split()
    return ["ncu", *options, *counted, sys.executable, "-m", "bench.counters", json.dumps(asdict(case)), what]


def read(text: str) -> list[tuple[str, dict[str, float]]]:
    """Return (kernel, counters by name) for each launch in ncu's CSV: the metrics, and a stall ratio for each reason.

    Raises:
        ValueError: the text has no table of launches.
    """
    lines = text.splitlines()
    begin = next((place for place, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        said = [line for line in lines if line.startswith("==ERROR==")] or lines[-1:]
        raise ValueError(f"ncu gave no table: {' '.join(said)[:200]}")
    found = []
    for row in csv.DictReader(io.StringIO("\n".join(lines[begin:]))):
        if not row["ID"]:  # the line of units
            continue
        figures = {}
        for name, value in row.items():
            stall = re.fullmatch(STALLS, name or "")
            # ncu adds the least, mean and greatest of the memory channels to each sum.
            wanted = name if name in (L2_HIT_RATE, *DRAM_BYTES) else stall and f"stall {stall.group(1)}"
            if wanted and value not in (None, "", "n/a"):
                figures[wanted] = float(value.replace(",", ""))
        found.append((row["Kernel Name"].partition("(")[0], figures))
    if not found:
        raise ValueError("ncu counted no launch; expected the op's launches")
    return found


def measure_counters(case: OpCase, what: str) -> list[Row]:
    """Run ncu and return a row for each launch and counter. The row `fused` has the L2 hit rate of each launch."""
    done = subprocess.run(command(case, what), cwd=ROOT, capture_output=True, text=True)
    whole = Row("counters", what, "fused", asdict(case))
    try:
        launches = read(done.stdout)
    except ValueError as error:
        whole.status = f"failed: {error}"
        return [whole]
    whole.samples = [figures[L2_HIT_RATE] for _, figures in launches if L2_HIT_RATE in figures]
    rows = {}
    for kernel, figures in launches:
        for name, value in figures.items():
            rows[f"{kernel}: {name}"] = Row("counters", what, f"{kernel}: {name}", asdict(case), [value])
    return [whole, *rows.values()]


def main(case: str, what: str) -> None:
    """Run the pass that ncu counts: one forward or backward of the fused op, after one that compiles it."""
    from .levels import op_calls

    of_case, device = OpCase(**json.loads(case)), torch.device("cuda")
    warm, cold = op_calls(of_case, what, OP_CONTENDERS["fused"], [make_operands(of_case, device, s) for s in (0, 1)])
    warm()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    cold()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    typer.run(main)
