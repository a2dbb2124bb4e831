"""Every shipped configuration compiles ahead of time for each target, and stays within what the hardware has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fused_steer.kernels.aot import Case, compile_launch, record
from fused_steer.kernels.schedule import TARGETS

SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # bytes a program
RANKS = (0, 8, 32, 64, 128, 256)  # one for each padded rank
EVERYTHING = {"biases": True, "gain": True, "scale_on_device": True, "nested": True, "activation": "gelu_tanh"}


def cases() -> list[list]:
    found = []
    for target in TARGETS:
        for rank in RANKS:
            # 4096: the tiles as they are; 4099: masked ones, rows not aligned; 576: narrowed ones.
            found += [[target, "bfloat16", hidden, rank, 8192, EVERYTHING] for hidden in (4096, 4099)]
            found += [[target, dtype, 4096, rank, 8192, EVERYTHING] for dtype in ("float32", "float16")]
        found += [[target, "bfloat16", 576, rank, 8192, EVERYTHING] for rank in (8, 64)]
        found.append([target, "bfloat16", 4096, 8, 8, {}])
        found.append([target, "bfloat16", 4096, 8, 8192, {}])
    return found


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    worker = [sys.executable, str(Path(__file__).with_name("aot_worker.py")), str(os.cpu_count())]
    done = subprocess.run(worker, input=json.dumps(cases()), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_configuration_was_compiled(compiled):
    assert {json.dumps(row["case"]) for row in compiled} == {json.dumps(case) for case in cases()}
    kernels = {row["kernel"] for row in compiled}
    assert kernels == {"forward_kernel", "rows_kernel", "columns_kernel"}


def test_no_spill_and_no_local_memory(compiled):
    bad = [row for row in compiled if row["spills"] or row["local"] or row["local_accesses"]]
    assert not bad, "\n".join(map(str, bad))


def test_shared_memory_is_within_the_target(compiled):
    bad = [row for row in compiled if row["shared"] > SHARED_MEMORY[row["target"]]]
    assert not bad, "\n".join(map(str, bad))


def nvidia(compiled: list[dict], hidden: int = 4096) -> list[dict]:
    return [row for row in compiled if row["target"].startswith("sm_") and row["case"][2] == hidden]


def test_the_hidden_state_moves_in_128_bit_accesses(compiled):
    rows = [row for row in nvidia(compiled) if row["case"][5] == {}]
    assert rows
    for row in rows:
        assert row["loads_128"], row
        if row["kernel"] != "rows_kernel":  # which writes (N, r) blocks of fp32 alone
            assert row["stores_128"], row
        if row["kernel"] == "forward_kernel":
            assert row["async_copies"] and row["global_stores"] - row["stores_128"] <= 1, row


def test_matrix_products_run_on_tensor_cores(compiled):
    for row in nvidia(compiled):
        _, dtype, _, rank, *_ = row["case"]
        if rank and not (dtype == "float32" and rank > 128):
            assert row["tensor_core"], row


def test_tiles_in_flight_stay_inside_l2():
    for target, device in TARGETS.items():
        for hidden in (576, 1152, 2048, 4096, 5120, 8192):
            for dtype_bytes, dtype in ((2, "bfloat16"), (4, "float32")):
                import torch

                forward = record(Case(16384, hidden, 8, getattr(torch, dtype)), target)[0]
                tile = forward.schedule.block_n * hidden * dtype_bytes * 2
                # One program a multiprocessor is the least that keeps the device busy.
                assert forward.schedule.programs * tile < device.l2 or (
                    forward.schedule.programs == device.multiprocessors
                ), (target, hidden, dtype)


def test_what_is_recorded_is_what_runs():
    """The launches of a case: one forward, two backward; forward alone is split over columns for few tokens."""
    many, few = (record(Case(tokens, 4096, 8), "sm_90") for tokens in (8192, 8))
    assert [launch.kernel.__name__ for launch in many] == ["forward_kernel", "rows_kernel", "columns_kernel"]
    assert many[0].grid[1] == 1 and few[0].grid[1] > 8
    assert len(record(Case(8192, 4096, 256), "sm_90")) == 4, "two passes over the columns where one would spill"


def test_bad_input_is_one_clear_line(monkeypatch):
    with pytest.raises(ValueError, match="target is 'sm_70'; expected one of sm_80, sm_90, sm_100, gfx942"):
        record(Case(8, 64, 8), "sm_70")
    monkeypatch.setattr("fused_steer.kernels.aot.INTERPRETED", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set.*expected it unset"):
        compile_launch(record(Case(8, 64, 8), "sm_90")[0], "sm_90")
