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
from itertools import chain, groupby

import torch
from fused_steer.kernels.aot import (
    Case,
    Resources,
    compilation,
    compile_all,
    hidden_states,
    record,
    record_grouped,
    record_projection,
)
from fused_steer.kernels.launch import Launch

TOGETHER = 16  # kernels that one process compiles at once


def launches(case: list) -> list[Launch]:
    target, dtype, hidden, rank, tokens, flags = case
    if "writers" in flags:
        return record_projection(flags["layers"], hidden, rank, flags["writers"], getattr(torch, dtype), target)
    if "slots" in flags:
        options = (flags["everything"], flags.get("norm", False))
        return record_grouped(tokens, hidden, rank, flags["slots"], getattr(torch, dtype), target, *options)
    return record(Case(tokens, hidden, rank, getattr(torch, dtype), **flags), target)


def target_of(job: tuple[list, int]) -> str:
    return job[0][0]


def compile_some(jobs: list[tuple[list, int]]) -> list[Resources]:
    """Compile launches for one target."""
    return compile_all([launches(case)[index] for case, index in jobs], target_of(jobs[0]))


if __name__ == "__main__":
    rows, jobs = [], {}
    for case in json.load(sys.stdin):
        for index, launch in enumerate(launches(case)):
            key = dataclasses.replace(compilation(launch, case[0]), source=None)
            jobs.setdefault(key, (case, index))
            seen = {"hidden_states": list(hidden_states(launch)), "tile": dataclasses.asdict(launch.schedule)}
            rows.append((key, {"case": case, **seen}))
    jobs = dict(sorted(jobs.items(), key=lambda item: target_of(item[1])))
    some = []
    for _, group in groupby(jobs.values(), target_of):
        of_target = list(group)
        some += [of_target[begin : begin + TOGETHER] for begin in range(0, len(of_target), TOGETHER)]
    with ProcessPoolExecutor(int(sys.argv[1])) as pool:
        compiled = dict(zip(jobs, chain.from_iterable(pool.map(compile_some, some)), strict=True))
    for key, row in rows:
        print(json.dumps({**row, **dataclasses.asdict(compiled[key])}))
