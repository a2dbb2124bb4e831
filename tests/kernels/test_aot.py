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

#: The kernels that make no product of tiles and load nothing ahead: rows held in registers, and the packing.
RESIDENT, PACK = "post_block_fwd_resident_kernel", "pack_adapter_kernel"
BACKWARD = ["post_block_bwd_rows_kernel", "post_block_bwd_columns_kernel", "post_block_bwd_finish_kernel"]


def cases(every: bool) -> list[list]:
    """Return the configurations to compile: all, or a sample that has every kernel, target, dtype and option."""
    found = []
    for target in TARGETS:
        promised = target in PROMISED
        # Every option at once costs the most registers. Many and few tokens may use different tiles. The hidden sizes
        # other than 576 and 4096 change the tiling of columns, not of ranks.
        if every:
            ranks = dict.fromkeys(HIDDEN if promised else (576, 4096), RANKS if promised else (*PADDED_RANKS, 12))
            ranks |= dict.fromkeys((1152, 2560, 8192) if promised else (), (8, 64))
        else:
            ranks = {4096: RANKS if target == "sm_90" else PADDED_RANKS if promised else (0, 8, 64, 256)}
            ranks |= {576: (8, 128), 8192: (64,), 2560: (8,)} if promised else {576: (128,)}
        for hidden, of_hidden in ranks.items():
            found += [[target, "bfloat16", hidden, rank, n, EVERYTHING] for rank in of_hidden for n in (8192, 8)]
        # With many tokens the op packs the weights.
        of_packed = RANKS if promised and every else PADDED_RANKS if promised or every else (8, 64, 256)
        found += [[target, "bfloat16", 4096, rank, 8192, PACKED] for rank in of_packed]
        sampled = PADDED_RANKS if promised and every else (0, 8, 64, 256) if every else (8, 64) if promised else (64,)
        for rank in sampled:
            for dtype in ("float32", "float16"):
                found += [[target, dtype, 4096, rank, 8192, flags] for flags in (EVERYTHING, PACKED)[: 1 + promised]]
            found.append([target, "bfloat16", 4099, rank, 8192, EVERYTHING])  # masked tiles, rows not aligned
        found += [[target, "bfloat16", 4096, rank, n, {}] for rank, n in ((8, 8192), (8, 200), (16, 8192), (16, 8))]
        # As many weights as few rows read without a launch that packs them.
        of_direct = ((8192, 4), (8192, 2), (4096, 4), (2048, 8)) if promised else ((2048, 8),)
        found += [[target, "bfloat16", hidden, rank, 8, EVERYTHING] for hidden, rank in of_direct]
        # Where W1 reads the branch, the kernels of few tokens and of the backward's rows are those of above.
        for rank in (8, 64, 256) if promised else (8,):
            found.append([target, "bfloat16", 4096, rank, 8192, EVERYTHING | BRANCH])
        if promised:
            found += [[target, dtype, 2048, 8, 8, {}] for dtype in ("bfloat16", "float16", "float32")]
            found.append([target, "float32", 4096, 8, 8192, EVERYTHING | BRANCH])
            found.append([target, "bfloat16", 4099, 8, 8192, EVERYTHING | BRANCH])
    return found


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> list[dict]:
    asked = cases(request.config.getoption("--every-kernel"))
    rows = run_compiling("aot_worker.py", asked)
    assert {json.dumps(row["case"]) for row in rows} == {json.dumps(case) for case in asked}
    return rows


def test_aot_every_kernel_was_compiled(compiled):
    kernels = {row["kernel"] for row in compiled}
    forward = {f"post_block_fwd_{name}kernel" for name in ("", "down_", "up_", "vector_", "resident_")}
    assert kernels == {*forward, *BACKWARD, PACK}


def assert_none(bad: list[dict]) -> None:
    assert not bad, "\n".join(map(str, bad))


#: Accepted local memory (bytes per thread) or spills (registers, on AMD) of kernels with every option, by (target,
#: dtype, kernel, rank). They may not grow. On NVIDIA they are a few bytes; on AMD they occur at ranks over 64.
#: The tiles of post_block_fwd_kernel were the fastest on an H100, where they keep none at d = 4096.
LOCAL = {
    ("sm_80", "bfloat16", "fwd", 64): 8,
    ("sm_100", "bfloat16", "fwd", 32): 32,
    ("sm_80", "float16", "bwd_rows", 8): 8,
    ("sm_90", "bfloat16", "fwd_up", 128): 8,  # d = 576
    ("sm_90", "bfloat16", "bwd_rows", 12): 8,
    ("sm_90", "bfloat16", "fwd", 8): 8,  # d = 4099
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
    """Return the bf16 rows with d a multiple of 8, so that hidden states can move in 128 bits. Packing moves none.

    A thread that reads W2 as it lies has four columns, 64 bits of a hidden state.
    """
    rows = [row for row in compiled if row["case"][1] == "bfloat16" and row["case"][2] % 8 == 0]
    return [row for row in rows if row["kernel"] != PACK and not row["tile"].get("direct")]


def test_aot_few_rows_read_the_weights_in_128_bit_accesses(compiled):
    """W1, W2 and no pack. The states are read and written in 64 bits."""
    rows = [row for row in compiled if row["tile"].get("direct") and row["case"][5] == {}]
    assert {row["case"][1] for row in rows} == {"bfloat16", "float16", "float32"}
    for row in rows:
        _, dtype, hidden, rank, _, _ = row["case"]
        weights = 2 * rank * hidden * 4 // (16 * 32 * row["num_warps"])
        states = 2 * row["tile"]["chunks"]  # of residual and branch
        assert row["loads_128"] == weights + states * (dtype == "float32"), row
        assert row["global_loads"] == weights + states, row
        if row["target"].startswith("sm_"):
            assert row["first_loads"] == row["global_loads"], "all are in flight before the first barrier"
            # One walk for all sums, and one for each block of columns. Triton 3.8 and 3.9 add a barrier.
            assert row["barriers"] <= 4 + 2 * row["tile"]["chunks"]


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
    # kernel daᵀ h, and one number per rank and per column. So are rows of a rank that is no multiple of 4. The kernel
    # that holds rows in registers stores `a` one rank at a time.
    small = dict.fromkeys((row["kernel"] for row in nvidia), 1) | {BACKWARD[1]: 3, RESIDENT: 8}
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
    rows = [row for row in rows if not row["tile"].get("direct")]
    forward = [row for row in rows if row["kernel"].startswith("post_block_fwd")]
    names = {f"post_block_fwd_{name}kernel" for name in ("", "down_", "up_", "resident_")}
    assert {row["kernel"] for row in forward} == names
    for row in forward:
        assert row["async_copies"] == row["async_copies_128"], row
        of_a = row["case"][3] if row["kernel"] == RESIDENT else 1  # stores of `a`, of one rank or of all
        assert row["global_stores"] - row["stores_128"] <= of_a, row
        if row["kernel"] == "post_block_fwd_kernel":  # both passes over d copy the hidden state and the weights
            assert row["async_copies"] > 0 and row["global_loads"] == 0, row
        else:  # a single block, or rows that go to registers
            assert row["loads_128"] > 0 and not (row["async_copies"] and row["kernel"] == RESIDENT), row


def test_aot_matrix_products_run_on_tensor_cores(compiled):
    for row in compiled:
        _, dtype, _, rank, _, options = row["case"]
        if options.get("reads") == "branch" and row["kernel"] == BACKWARD[2]:
            assert not row["tensor_core"], "it adds, and corrects nothing"
        elif row["kernel"] in (RESIDENT, PACK):
            assert not row["tensor_core"], "up to rank 8 its sums take less time than the memory"
        elif rank and not (dtype == "float32" and rank > 128 and row["target"].startswith("sm_")):
            assert row["tensor_core"], row


# ---------------------------------------------------------------------------------------------- read without compiling


def test_aot_what_is_recorded_is_what_runs():
    """A forward is one launch, or two if few tokens or a high rank split d, and one that packs where that pays."""

    def names(tokens: int, rank: int, **options: bool) -> list[str]:
        return [launch.kernel.__name__ for launch in record(Case(tokens, 4096, rank, **options), "sm_90")]

    split = ["post_block_fwd_down_kernel", "post_block_fwd_up_kernel"]
    assert names(8192, 8) == names(8192, 64) == [PACK, "post_block_fwd_kernel", *BACKWARD]
    assert names(8, 7) == names(1000, 2) == names(8192, 4) == names(8193, 8) == [PACK, RESIDENT, *BACKWARD]
    assert names(8, 8, packed=True) == names(8, 1) == [RESIDENT, *BACKWARD], "W2' of rank 1 is a row"
    assert names(8, 8) == names(132, 4) == [RESIDENT, *BACKWARD], "W2' as it lies"
    assert names(133, 4) == [PACK, RESIDENT, *BACKWARD]
    assert names(8192, 1) == [PACK, RESIDENT, *BACKWARD]
    assert names(2048, 8) == ["post_block_fwd_kernel", *BACKWARD], "too few tokens to pack, too many for few rows"
    assert names(8, 16) == [*split, *BACKWARD] and record(Case(8, 4096, 16), "sm_90")[0].grid[1] > 8
    assert names(8192, 256) == [PACK, *split, BACKWARD[0], BACKWARD[1], *BACKWARD[1:]], (
        "one launch of the columns kernel would spill, so there are two"
    )


ONE = "p_residual p_branch p_out"
SPLIT = ["p_residual p_branch", "p_residual p_branch p_out"]  # a forward of two kernels
BRANCH_SPLIT = ["p_residual", "p_residual p_branch p_out"]  # to the first branch is given in place of residual


@pytest.mark.parametrize(
    ("case", "forward", "backward"),
    [
        (Case(8192, 128, 16), ["", ONE], ["p_grad", "p_grad p_out p_dx", ""]),  # the first packs the weights
        (Case(8192, 128, 16, **PACKED), [ONE], ["p_grad", "p_grad p_out p_dx", ""]),
        (Case(8192, 128, 16, branch=False, **PACKED), ["p_residual p_out"], ["p_grad", "p_grad p_out p_dx", ""]),
        (Case(8192, 128, 256, **PACKED), SPLIT, ["p_grad", "p_grad p_dx", "p_out", ""]),
        (Case(64, 128, 16), SPLIT, ["p_grad", "p_grad p_out p_dx", ""]),
        (Case(64, 128, 1), [ONE], ["p_grad", "p_grad p_out p_dx", ""]),  # rows in registers
        (Case(64, 128, 0), [ONE], ["p_grad", ""]),  # a vector passes the gradient on
        (Case(16, 16, 16), SPLIT, ["p_grad", "p_grad p_out p_dx", ""]),  # shapes that coincide
        (Case(8192, 128, 16, **PACKED, **BRANCH), [ONE], ["p_grad", "p_grad p_branch p_dx", ""]),
        (Case(8192, 128, 256, **PACKED, **BRANCH), BRANCH_SPLIT, ["p_grad", "p_grad p_dx", "p_branch", ""]),
        (Case(64, 128, 16, **BRANCH), BRANCH_SPLIT, ["p_grad", "p_grad p_branch p_dx", ""]),
        (Case(64, 128, 8, **BRANCH), [ONE], ["p_grad", "p_grad p_branch p_dx", ""]),
        (Case(64, 128, 7, **BRANCH), ["", ONE], ["p_grad", "p_grad p_branch p_dx", ""]),
        (Case(64, 128, 0, **BRANCH), [ONE], ["p_grad", ""]),
    ],
    ids=[
        *["packs", "lowrank", "no branch", "two passes", "few tokens", "rank 1", "vector", "N = d = r", "branch read"],
        *[f"branch read, {what}" for what in ("two passes", "few tokens", "rows in registers", "rank 7", "vector")],
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
    assert jobs(Case(8, 128, 16, **BRANCH))[0] == jobs(Case(8, 128, 16, branch=False))[0]
    assert jobs(Case(8, 128, 16, **BRANCH))[1:3] == jobs(Case(8, 128, 16))[1:3], "the second, and the backward's rows"
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


def test_aot_kernels_disassembled_together_are_those_disassembled_alone():
    for row in run_compiling("listing_worker.py", [["sm_90", "sm_100"]]):
        assert len(row["together"]) > 3
        assert row["together"] == row["alone"]


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
