"""Compiles kernels for GPUs ahead of time, in a subprocess where Triton does not interpret them."""

import json
import os
import subprocess
import sys
from pathlib import Path


def run_compiling(worker: str, cases: list[list]) -> list[dict]:
    """Run a worker script of this folder on the cases, on all cores; return its output, an entry per line."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name(worker)), str(os.cpu_count())]
    done = subprocess.run(command, input=json.dumps(cases), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
