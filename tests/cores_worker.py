"""Compiles the sweep's candidates for tensor cores, in a subprocess where kernels are not interpreted.

Reads from standard input a JSON list of [target, hidden, rank, and the numbers of bench.cores.Slices]. Prints a JSON
line for each: the registers and the local memory of a thread, in bytes, its instructions for each number of a hidden
state, and those of the op's kernel for the same width and rank.
"""

import json
import re
import sys
from pathlib import Path

import torch
import triton
from fused_steer.kernels import aot
from fused_steer.kernels.schedule import ResidentSchedule

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.cores import ROWS, Slices, options, prepare  # noqa: E402


def count(listing: str) -> int:
    """Count the instructions of a kernel's code."""
    return len(re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/(?!\s+NOP)", listing, flags=re.MULTILINE))


def of_the_op(target: str, hidden: int, rank: int) -> float | None:
    """Count the instructions for each number in the op's kernel that holds whole rows. None if it takes another."""
    (launch,) = aot.record_passes(aot.Case(16384, hidden, rank, torch.bfloat16, packed=True), target)["forward"][-1:]
    layout = launch.schedule
    if not isinstance(layout, ResidentSchedule):
        return None
    numbers = layout.block_n * layout.block_d * layout.chunks / (32 * layout.num_warps)
    return count(aot.disassemble(launch, target)) / numbers


def compile_one(target: str, hidden: int, rank: int, *layout: int) -> dict[str, float | None]:
    slices = Slices(*layout)

    def empty(rows: int) -> torch.Tensor:
        return torch.empty(rows, hidden, dtype=torch.bfloat16, device="meta")

    _, launch = prepare(empty(4096), empty(4096), empty(max(16, rank)), empty(max(16, rank)), rank, slices)
    compiled = triton.compile(aot._source(launch), target=aot._GPU_TARGETS[target], options=options(slices))
    cubin = compiled.asm["cubin"]
    (listing,) = aot._disassemble([cubin], target)
    numbers = aot._read_nvidia(aot._run_tool(cubin, "cuobjdump", "-res-usage"), listing)
    return {
        "registers": numbers["registers"],
        "local": numbers["local"],
        "instructions": count(listing) / (ROWS * hidden / (32 * slices.warps)),
        "of_the_op": of_the_op(target, hidden, rank),
    }


if __name__ == "__main__":
    for case in json.load(sys.stdin):
        print(json.dumps(compile_one(*case)), flush=True)
