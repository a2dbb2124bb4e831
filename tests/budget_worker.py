"""Counts the kernels' instructions and bytes for test_budgets.py in a subprocess, where kernels are not interpreted.

Reads a JSON list of [target, hidden, rank, tokens, reads, packed, dtype] from standard input. Without the last two,
weights are packed and hidden states are bfloat16.
Prints a JSON line for each launch. Cases with the same target and rank share kernels, so they form one job.
"""

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby

import torch
from fused_steer.kernels.aot import SHARED_MEMORY, Case, compile_all, compile_launch, record_passes
from fused_steer.kernels.launch import Launch
from fused_steer.kernels.predict import (
    CLOCKS,
    async_loads,
    busy_seconds,
    compiled_program,
    fill,
    l2_bytes,
    memory_bytes,
    work,
)


def launches_of(case: list) -> tuple[list, dict[str, list[Launch]]]:
    """Return the case with its defaults, and the launches of its passes."""
    target, hidden, rank, tokens, reads, packed, dtype = whole = [*case, *(True, "bfloat16")[len(case) - 5 :]]
    of = Case(tokens, hidden, rank, getattr(torch, dtype), packed=packed, reads=reads)
    return whole, record_passes(of, target)


def describe(case: list, passes: dict[str, list[Launch]]) -> list[dict]:
    target, hidden, rank, tokens, reads, packed, dtype = case
    rows = []
    for name, launches in passes.items():
        for launch, moved in zip(launches, memory_bytes(launches, target), strict=True):
            used = compile_launch(launch, target)
            row = {"target": target, "hidden": hidden, "rank": rank, "tokens": tokens}
            row |= {"reads": reads, "pass": name, "packed": packed, "dtype": dtype, "shared": used.shared}
            row |= {"kernel": used.kernel, "grid": launch.grid, "fits": used.shared <= SHARED_MEMORY[target]}
            row |= {"l2": l2_bytes(launch), "memory": moved, "fill": fill(launch, target)}
            row["series"] = work(launch).series
            if target in CLOCKS:
                row["busy"] = busy_seconds(launch, target)
                row["loops"] = async_loads(launch, target)
                program = compiled_program(launch, target)
                loops = [loop for loop, _ in program.innermost]
                row["loads"] = [(loop.described.states, loop.described.others) for loop in loops]
                row["loaded"] = [program.loaded(loop) for loop in loops]
            rows.append(row)
    return rows


def describe_all(cases: list[list]) -> list[dict]:
    """Describe the launches of cases for one target."""
    found = [launches_of(case) for case in cases]
    compile_all([launch for _, passes in found for launches in passes.values() for launch in launches], cases[0][0])
    return [row for case, passes in found for row in describe(case, passes)]


if __name__ == "__main__":
    cases = sorted(json.load(sys.stdin), key=lambda case: (case[0], case[2]))
    jobs = [list(group) for _, group in groupby(cases, key=lambda case: (case[0], case[2]))]
    with ProcessPoolExecutor(int(sys.argv[1])) as pool:
        for rows in pool.map(describe_all, jobs):
            for row in rows:
                print(json.dumps(row))
