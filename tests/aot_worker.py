"""Compiles launches for GPUs in a process of its own, where kernels are not interpreted. Prints a JSON line for each.

Reads cases from standard input: a JSON list of [target, dtype, hidden, rank, tokens, flags].
"""

import dataclasses
import json
import sys
from concurrent.futures import ProcessPoolExecutor

import torch
from fused_steer.kernels.aot import Case, compile_launch, record


def compile_case(case: list) -> list[dict]:
    target, dtype, hidden, rank, tokens, flags = case
    launches = record(Case(tokens, hidden, rank, getattr(torch, dtype), **flags), target)
    return [
        {
            "case": case,
            **dataclasses.asdict(compile_launch(launch, target)),
            "tile": dataclasses.asdict(launch.schedule),
        }
        for launch in launches
    ]


if __name__ == "__main__":
    with ProcessPoolExecutor(int(sys.argv[1])) as pool:
        for rows in pool.map(compile_case, json.load(sys.stdin)):
            for row in rows:
                print(json.dumps(row), flush=True)
