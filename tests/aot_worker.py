"""Compiles launches for GPUs in a subprocess, where kernels are not interpreted. Prints a JSON line for each.

Reads cases from standard input: a JSON list of [target, dtype, hidden, rank, tokens, flags]. The flags select the op:
with writers `project_out` (`column_space` at rank 0), with slots `post_block_grouped` (and the norm that
follows), otherwise `post_block`. A kernel
that several cases share is compiled once.
"""

import dataclasses
import json
import sys
from concurrent.futures import ProcessPoolExecutor

import torch
from fused_steer.kernels.aot import (
    Case,
    Resources,
    compilation,
    compile_launch,
    hidden_states,
    record,
    record_grouped,
    record_projection,
)
from fused_steer.kernels.launch import Launch


def launches(case: list) -> list[Launch]:
    target, dtype, hidden, rank, tokens, flags = case
    if "writers" in flags:
        return record_projection(flags["layers"], hidden, rank, flags["writers"], getattr(torch, dtype), target)
    if "slots" in flags:
        options = (flags["everything"], flags.get("norm", False))
        return record_grouped(tokens, hidden, rank, flags["slots"], getattr(torch, dtype), target, *options)
    return record(Case(tokens, hidden, rank, getattr(torch, dtype), **flags), target)


def compile_one(job: tuple[list, int]) -> Resources:
    case, index = job
    return compile_launch(launches(case)[index], case[0])


if __name__ == "__main__":
    rows, jobs = [], {}
    for case in json.load(sys.stdin):
        for index, launch in enumerate(launches(case)):
            key = dataclasses.replace(compilation(launch, case[0]), source=None)
            jobs.setdefault(key, (case, index))
            seen = {"hidden_states": list(hidden_states(launch)), "tile": dataclasses.asdict(launch.schedule)}
            rows.append((key, {"case": case, **seen}))
    with ProcessPoolExecutor(int(sys.argv[1])) as pool:
        compiled = dict(zip(jobs, pool.map(compile_one, jobs.values()), strict=True))
    for key, row in rows:
        print(json.dumps({**row, **dataclasses.asdict(compiled[key])}))
