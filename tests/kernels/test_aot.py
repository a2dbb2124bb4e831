"""Tests that every configuration of the kernels compiles ahead of time for each target, within hardware limits."""

import json

import pytest
import torch
from compiling import run_compiling
from fused_steer.kernels.aot import (
    GPUS,
    SHARED_MEMORY,
    Case,
    compile_launch,
    hidden_states,
    occupancy,
    record,
    record_passes,
    time_floor,
)
from fused_steer.kernels.schedule import TARGETS

#: Hidden sizes with different tilings: divisible by blocks of 64, 128, 512 columns, and of all sizes.
HIDDEN = (576, 1152, 2560, 4096, 8192)
RANKS = (0, 1, 8, 12, 16, 32, 64, 128, 256)
PADDED_RANKS = (0, 8, 32, 64, 128, 256)  # one per padded rank
#: Targets with a promise of speed. The other targets use the same kinds of tiles, or fewer.
PROMISED = ("sm_80", "sm_90")
EVERYTHING = {"biases": True, "gain": True, "scale_on_device": True, "nested": True, "activation": "gelu_tanh"}
PACKED = {"packed": True}
BRANCH = {"reads": "branch"}

BACKWARD = ["post_block_bwd_rows_kernel", "post_block_bwd_columns_kernel", "post_block_bwd_finish_kernel"]


def cases() -> list[list]:
    found = []
    for target in TARGETS:
        promised = target in PROMISED
        # Every option at once costs the most registers. Many and few tokens may use different tiles.
        for hidden in HIDDEN if promised else (576, 4096):
            ranks = RANKS if promised else (*PADDED_RANKS, 12)
            found += [[target, "bfloat16", hidden, rank, n, EVERYTHING] for rank in ranks for n in (8192, 8)]
        # A patched model launches packed weights for many tokens.
        found += [[target, "bfloat16", 4096, rank, 8192, PACKED] for rank in (RANKS if promised else PADDED_RANKS)]
        for rank in PADDED_RANKS if promised else (0, 8, 64, 256):
            for dtype in ("float32", "float16"):
                found += [[target, dtype, 4096, rank, 8192, flags] for flags in (EVERYTHING, PACKED)[: 1 + promised]]
            found.append([target, "bfloat16", 4099, rank, 8192, EVERYTHING])  # masked tiles, rows not aligned
        found += [[target, "bfloat16", 4096, 8, n, {}] for n in (8192, 8)]
        # Where W1 reads the branch, the kernels of few tokens and of the backward's rows are those of above.
        for rank in (8, 64, 256) if promised else (8,):
            found.append([target, "bfloat16", 4096, rank, 8192, EVERYTHING | BRANCH])
        if promised:
            found.append([target, "float32", 4096, 8, 8192, EVERYTHING | BRANCH])
            found.append([target, "bfloat16", 4099, 8, 8192, EVERYTHING | BRANCH])
    return found


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    return run_compiling("aot_worker.py", cases())


def test_aot_every_configuration_was_compiled(compiled):
    assert {json.dumps(row["case"]) for row in compiled} == {json.dumps(case) for case in cases()}
    kernels = {row["kernel"] for row in compiled}
    forward = {f"post_block_fwd_{name}kernel" for name in ("", "down_", "up_", "vector_")}
    assert kernels == {*forward, *BACKWARD}


def assert_none(bad: list[dict]) -> None:
    assert not bad, "\n".join(map(str, bad))


#: Accepted local memory (bytes per thread) or spills (registers, on AMD) of kernels with every option, by (target,
#: dtype, kernel, rank). They may not grow. On NVIDIA they are a few bytes; on AMD they occur at ranks over 64.
LOCAL = {
    ("sm_80", "float16", "bwd_rows", 8): 8,
    ("sm_90", "bfloat16", "fwd_up", 128): 8,  # d = 576
    ("sm_90", "bfloat16", "bwd_rows", 12): 8,
    ("sm_90", "bfloat16", "fwd", 32): 8,  # d = 4099, also for the finishing kernel
    ("sm_90", "bfloat16", "bwd_finish", 128): 8,
    ("sm_100", "bfloat16", "bwd_finish", 128): 8,
    ("sm_100", "bfloat16", "bwd_finish", 256): 16,
    ("sm_100", "bfloat16", "bwd_columns", 12): 8,  # d = 576
    ("gfx942", "bfloat16", "fwd_up", 128): 39,  # d = 576, few tokens
    ("gfx942", "bfloat16", "fwd_down", 256): 2,
    ("gfx942", "bfloat16", "fwd_up", 256): 2,
}


def test_aot_no_spill_and_no_local_memory(compiled):
    def most(row: dict) -> int:
        _, dtype, _, rank, _, options = row["case"]
        kernel = row["kernel"].removeprefix("post_block_").removesuffix("_kernel")
        return LOCAL.get((row["target"], dtype, kernel, rank), 0) if options else 0

    assert_none([row for row in compiled if row["spills"] + row["local"] > most(row)])


def test_aot_shared_memory_is_within_the_target(compiled):
    assert_none([row for row in compiled if row["shared"] > SHARED_MEMORY[row["target"]]])


def test_aot_a_program_fits_on_a_multiprocessor(compiled):
    assert_none([row for row in compiled if not 0 < row["occupancy"] <= 1])


def aligned(compiled: list[dict]) -> list[dict]:
    """Return the bf16 rows with d a multiple of 8, so that hidden states can move in 128 bits."""
    return [row for row in compiled if row["case"][1] == "bfloat16" and row["case"][2] % 8 == 0]


def test_aot_the_hidden_state_moves_in_128_bit_accesses(compiled):
    rows = aligned(compiled)
    assert {row["target"] for row in rows} == TARGETS.keys()
    assert_none([row for row in rows if row["hidden_states"] and not row["loads_128"] + row["async_copies_128"]])
    writes = [row for row in rows if {"p_dx", "p_out"} & set(row["hidden_states"])]
    writes = [row for row in writes if row["kernel"] != BACKWARD[1] or "p_dx" in row["hidden_states"]]
    assert any(row["case"][5].get("reads") == "branch" for row in writes)
    amd = [row for row in writes if row["target"].startswith("gfx")]
    nvidia = [row for row in writes if not row["target"].startswith("gfx")]
    # AMD's compiler stores a matrix product in the matrix units' layout: 64 bits per lane.
    assert_none([row for row in amd if not row["stores_64"] + row["stores_128"]])
    assert_none([row for row in nvidia if not row["stores_128"]])
    # Beside the hidden state a kernel stores `a` and sums in fp32. Some sums are too small for 128 bits: in the columns
    # kernel daᵀ h, and one number per rank and per column. So are rows of a rank that is no multiple of 4.
    small = {row["kernel"]: 3 if row["kernel"] == BACKWARD[1] else 1 for row in nvidia}
    assert_none(
        [r for r in nvidia if r["case"][3] % 4 == 0 and r["global_stores"] > r["stores_128"] + small[r["kernel"]]]
    )
    # Parameters and sums are fp32, and the 128-bit accesses counted may be theirs. Beside the hidden state, da and h,
    # (N, r), are bf16. On AMD they are stored in the matrix units' layout.
    assert_none([row for row in rows if row["loads_16"]])
    narrow = [row for row in rows if row["stores_16"]]
    assert_none([r for r in narrow if not (r["target"].startswith("gfx") and r["kernel"] == BACKWARD[0])])
    # A tile with fewer than 16 bytes per thread would need narrower accesses.
    lanes = {target: 64 if device.gpu == "hip" else 32 for target, device in TARGETS.items()}
    for row in rows:
        tile = row["tile"]
        each = tile["block_n"] * tile["block_d"] * 2 / (tile["num_warps"] * lanes[row["target"]])
        assert each >= 16, row


def test_aot_forward_copies_asynchronously_and_stores_nothing_narrow(compiled):
    rows = [row for row in compiled if row["case"][5] == {} and row["target"].startswith("sm_")]
    forward = [row for row in rows if row["kernel"].startswith("post_block_fwd")]
    assert {row["kernel"] for row in forward} == {f"post_block_fwd_{name}kernel" for name in ("", "down_", "up_")}
    for row in forward:
        assert row["async_copies"] == row["async_copies_128"], row
        assert row["global_stores"] - row["stores_128"] <= 1, row
        if row["kernel"] == "post_block_fwd_kernel":  # both passes over d copy the hidden state and the weights
            assert row["async_copies"] > 0 and row["global_loads"] == 0, row
        else:  # few tokens: a single block
            assert row["loads_128"] > 0, row


def test_aot_matrix_products_run_on_tensor_cores(compiled):
    for row in compiled:
        _, dtype, _, rank, _, options = row["case"]
        if options.get("reads") == "branch" and row["kernel"] == BACKWARD[2]:
            assert not row["tensor_core"], "it adds, and corrects nothing"
        elif rank and not (dtype == "float32" and rank > 128 and row["target"].startswith("sm_")):
            assert row["tensor_core"], row


# ---------------------------------------------------------------------------------------------- read without compiling


def test_aot_what_is_recorded_is_what_runs():
    """A case records one forward and three backward launches. Few tokens split d, which takes two forward launches."""
    many, few = (record(Case(tokens, 4096, 8), "sm_90") for tokens in (8192, 8))
    assert [launch.kernel.__name__ for launch in many] == ["post_block_fwd_kernel", *BACKWARD]
    split = ["post_block_fwd_down_kernel", "post_block_fwd_up_kernel"]
    assert [launch.kernel.__name__ for launch in few] == [*split, *BACKWARD] and few[0].grid[1] > 8
    wide = [launch.kernel.__name__ for launch in record(Case(8192, 4096, 256), "sm_90")]
    assert wide == [*split, BACKWARD[0], BACKWARD[1], *BACKWARD[1:]], (
        "one launch of the columns kernel would spill, so there are two"
    )


SPLIT = ["p_residual p_branch", "p_residual p_branch p_out"]  # a forward of two kernels
BRANCH_SPLIT = ["p_residual", "p_residual p_branch p_out"]  # to the first branch is given in place of residual


@pytest.mark.parametrize(
    ("case", "forward", "backward"),
    [
        (Case(8192, 128, 8), ["p_residual p_branch p_out"], ["p_grad", "p_grad p_out p_dx", ""]),
        (Case(8192, 128, 8, branch=False), ["p_residual p_out"], ["p_grad", "p_grad p_out p_dx", ""]),
        (Case(8192, 128, 256), SPLIT, ["p_grad", "p_grad p_dx", "p_out", ""]),
        (Case(64, 128, 8), SPLIT, ["p_grad", "p_grad p_out p_dx", ""]),
        (Case(64, 128, 0), ["p_residual p_branch p_out"], ["p_grad", ""]),  # a vector passes the gradient on
        (Case(8, 8, 8), SPLIT, ["p_grad", "p_grad p_out p_dx", ""]),  # shapes that coincide
        (Case(8192, 128, 8, **BRANCH), ["p_residual p_branch p_out"], ["p_grad", "p_grad p_branch p_dx", ""]),
        (Case(8192, 128, 256, **BRANCH), BRANCH_SPLIT, ["p_grad", "p_grad p_dx", "p_branch", ""]),
        (Case(64, 128, 8, **BRANCH), BRANCH_SPLIT, ["p_grad", "p_grad p_branch p_dx", ""]),
        (Case(64, 128, 0, **BRANCH), ["p_residual p_branch p_out"], ["p_grad", ""]),
    ],
    ids=[
        *["lowrank", "no branch", "two passes", "few tokens", "vector", "N = d = r"],
        *["branch read", "branch read, two passes", "branch read, few tokens", "branch read, vector"],
    ],
)
def test_aot_the_hidden_states_that_a_launch_touches(case, forward, backward):
    found = {
        name: [" ".join(hidden_states(launch)) for launch in launches]
        for name, launches in record_passes(case, "sm_90").items()
    }
    assert found == {"forward": forward, "backward": backward}


def test_aot_a_vector_that_reads_the_branch_is_the_same_launches():
    """And with few tokens the first kernel is that of a finished state, whatever it is given."""

    def jobs(case: Case) -> list:
        """All that the compiler is told of each launch."""
        found = record(case, "sm_90")
        given = [[None if value is None else type(value) for value in launch.arguments] for launch in found]
        return [(f.kernel.__name__, f.constants, f.schedule, kinds) for f, kinds in zip(found, given, strict=True)]

    assert jobs(Case(8192, 128, 0, **BRANCH)) == jobs(Case(8192, 128, 0))
    assert jobs(Case(8, 128, 8, **BRANCH))[0] == jobs(Case(8, 128, 8, branch=False))[0]
    assert jobs(Case(8, 128, 8, **BRANCH))[1:3] == jobs(Case(8, 128, 8))[1:3], "the second, and the backward's rows"
    with pytest.raises(ValueError, match="reads is 'branch' but branch is None"):
        record(Case(8, 64, 8, branch=False, **BRANCH), "sm_90")


def test_aot_the_time_floor_is_bytes_over_bandwidth():
    one = 4096 * 8192 * 2  # bytes of a hidden state
    for dtype, factor in ((torch.bfloat16, 1), (torch.float32, 2)):
        passes = record_passes(Case(4096, 8192, 8, dtype), "sm_90")
        assert time_floor(passes["forward"], "H100") == pytest.approx(3 * factor * one / 3.35e12)
        assert time_floor(passes["backward"], "H200") == pytest.approx(4 * factor * one / 4.8e12)
    assert {target for target, _ in GPUS.values()} <= TARGETS.keys()


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "expected"),
    [
        ("sm_80", 128, 48 << 10, 4, 12 / 64),  # 3 x 49 KiB of 164
        ("sm_80", 32, 0, 4, 64 / 64),
        ("sm_80", 32, 0, 1, 32 / 64),  # 32 programs at most
        ("sm_80", 33, 0, 4, 48 / 64),  # 40 registers are taken
        ("sm_90", 255, 0, 8, 8 / 64),
        ("sm_90", 40, 113 << 10, 8, 16 / 64),  # 2 x 114 KiB of 228
        ("sm_90", 40, (113 << 10) + 1, 8, 8 / 64),
        ("sm_90", 40, 228 << 10, 8, 0),
        ("sm_75", 128, 48 << 10, 4, 4 / 32),  # one of 64 KiB
        ("sm_89", 64, 0, 4, 32 / 48),
        ("sm_86", 40, 49 << 10, 4, 8 / 48),  # 2 x 50 KiB of 100
        ("gfx942", 142, 16 << 10, 4, 12 / 32),
        ("gfx942", 64, 0, 4, 32 / 32),
        ("gfx942", 64, 33 << 10, 4, 4 / 32),
    ],
)
def test_aot_occupancy(target, registers, shared, warps, expected):
    assert occupancy(target, registers, shared, warps) == expected


def test_aot_bad_input_is_one_clear_line(monkeypatch):
    with pytest.raises(
        ValueError, match="target is 'sm_70'; expected one of sm_80, sm_90, sm_100, gfx942, sm_75, sm_86, sm_89"
    ):
        record(Case(8, 64, 8), "sm_70")
    with pytest.raises(ValueError, match="gpu is 'T4'; expected one of A100, A100-40GB, H100, H200"):
        time_floor([], "T4")
    monkeypatch.setattr("fused_steer.kernels.aot.INTERPRETED", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set.*expected it unset"):
        compile_launch(record(Case(8, 64, 8), "sm_90")[0], "sm_90")
