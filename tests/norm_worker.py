"""Compiles the norm's kernels for GPUs in a subprocess, where kernels are not interpreted, and counts their work.

Reads a JSON list of [target, dtype, hidden, rank, tokens, flags] from standard input. Prints a JSON line for each
launch of `post_block_norm` and `rms_norm`, without those of post_block alone.
"""

import dataclasses
import json
import sys
from concurrent.futures import ProcessPoolExecutor

import torch
from fused_steer.kernels.aot import Case, compile_all, compile_launch, hidden_states, record_norm_passes
from fused_steer.kernels.launch import Launch
from fused_steer.kernels.predict import CLOCKS, async_loads, l2_bytes, memory_bytes


def is_counted(launch: Launch) -> bool:
    kernel = launch.kernel.__name__
    return "norm" in kernel or kernel in ("post_block_fwd_resident_kernel", "add_partial_sums_kernel")


def describe(case: list) -> list[dict]:
    target, dtype, hidden, rank, tokens, flags = case
    options = dict(flags)
    kinds = {name: options.pop(name) for name in ("plus_one", "weight_gradient") if name in options}
    passes = record_norm_passes(Case(tokens, hidden, rank, getattr(torch, dtype), **options), target, **kinds)
    rows = []
    counted = [launch for launches in passes.values() for launch in launches if is_counted(launch)]
    compile_all(counted, target)
    for name, launches in passes.items():
        for launch, moved in zip(launches, memory_bytes(launches, target), strict=True):
            if not is_counted(launch):
                continue
            row = {"case": case, "pass": name, "hidden_states": list(hidden_states(launch))}
            row |= {"l2": l2_bytes(launch), "memory": moved}
            row |= dataclasses.asdict(compile_launch(launch, target))
            if target in CLOCKS and launch.kernel.__name__ == "post_block_norm_fwd_kernel":
                row |= {"loops": async_loads(launch, target)}
            rows.append(row)
    return rows


if __name__ == "__main__":
    with ProcessPoolExecutor(int(sys.argv[1])) as pool:
        for rows in pool.map(describe, json.load(sys.stdin)):
            for row in rows:
                print(json.dumps(row))
