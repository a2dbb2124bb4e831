"""Subprocess of test_stub.py over the stub driver. Prints one line of JSON."""

import dataclasses
import json
import os

import torch
from fused_steer.kernels import select_backend

from bench import gpu, rehearsal
from bench.geometries import HostCase
from bench.host import measure_host
from bench.stub import arm
from fused_steer import post_block

stub = arm()
D, R, LAYERS = 512, 8, 3
REHEARSED = {
    ("accuracy", "error"), ("op", "forward"), ("op", "backward"), ("host", "call"), ("grouped", "forward"),
    ("projection", "step"), ("model", "decode"),
}  # fmt: skip
down, up = torch.randn(R, D), torch.randn(D, R)


def launches(tokens: int, training: bool = False) -> list[dict]:
    residual, branch = (torch.randn(tokens, D, dtype=torch.bfloat16, requires_grad=training) for _ in "xb")
    with stub.launched() as found:
        out = post_block(residual, branch, down.requires_grad_(training), up.requires_grad_(training))
        if training:
            out.backward(torch.ones_like(out))
    return [dataclasses.asdict(launch) for launch in found]


def host_rows(what: str) -> dict[str, dict]:
    rows = measure_host(HostCase(layers=LAYERS), what, torch.device("cpu"), rounds=2)
    return {row.contender: {"launches": row.launches, "samples": row.samples} for row in rows}


def refused(call) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def rehearsed() -> dict:
    """Rehearse a cheap step of each level, then a step with a wrong name in its code.

    This runs last, because it changes the process.
    """
    rehearsal.prepare()
    steps = [s for s in rehearsal.one_of_each(gpu.all_steps()) if (s.level, s.what) in REHEARSED]
    said: list[str] = []
    found = {"steps": len(steps), "problems": rehearsal.rehearse_steps(steps, said.append)}
    found["cuda"] = torch.cuda.is_available() and torch.zeros(1, device="cuda").device.type
    del torch.profiler.profile  # the first step uses it to count launches
    rehearsal.Rehearsed.ran.clear()
    forward = [s for s in steps if (s.level, s.what) == ("op", "forward")]
    return found | {"said": said, "misspelt": rehearsal.rehearse_steps(forward, said.append)}


before = stub.launches
print(
    json.dumps(
        {
            "backend": select_backend(torch.device("cpu")),
            "interpret": os.environ.get("TRITON_INTERPRET"),
            "few": launches(8),
            "many": launches(4096),
            "training": launches(64, training=True),
            "counted": stub.launches - before,
            "host": {what: host_rows(what) for what in ("call", "pass", "train", "grouped", "compiled")},
            "rehearsal": rehearsed(),
            "last": refused(lambda: stub.last(1 << 20)),
            "device": refused(lambda: arm("sm_75")),
        }
    )
)
