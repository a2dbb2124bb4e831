"""Compiles the sweep's candidates for tensor cores, in a subprocess where kernels are not interpreted.

Reads from standard input a JSON list of [target, hidden, rank, and the numbers of bench.cores.Slices]. Prints a JSON
line for each: the registers and the local memory of a thread, in bytes, and its instructions for each number of a
hidden state.
"""

import json
import re
import sys
from pathlib import Path

import torch
import triton
from fused_steer.kernels import aot

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.cores import ROWS, Slices, options, prepare  # noqa: E402


def compile_one(target: str, hidden: int, rank: int, *layout: int) -> dict[str, float]:
    slices = Slices(*layout)

    def empty(rows: int) -> torch.Tensor:
        return torch.empty(rows, hidden, dtype=torch.bfloat16, device="meta")

    _, launch = prepare(empty(4096), empty(4096), empty(max(16, rank)), empty(max(16, rank)), rank, slices)
    compiled = triton.compile(aot._source(launch), target=aot._GPU_TARGETS[target], options=options(slices))
    listing = aot._cuobjdump(compiled.asm["cubin"])
    numbers = aot._read_nvidia(listing)
    instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/(?!\s+NOP)", listing, flags=re.MULTILINE))
    return {
        "registers": numbers["registers"],
        "local": numbers["local"],
        "instructions": instructions / (ROWS * hidden / (32 * slices.warps)),
    }


if __name__ == "__main__":
    for case in json.load(sys.stdin):
        print(json.dumps(compile_one(*case)), flush=True)
