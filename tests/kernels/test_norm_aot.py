"""Tests of the norm's kernels as they compile for each target: resources, accesses, and bytes moved."""

import pytest
from compiling import run_compiling
from fused_steer.kernels.aot import SHARED_MEMORY
from fused_steer.kernels.schedule import TARGETS

PROMISED = {"sm_80": "A100", "sm_90": "H100"}
PACKED = {"packed": True}
RESIDENT = "post_block_fwd_resident_kernel"
ONE_PASS, TWO_PASSES = "post_block_norm_bwd_held_kernel", "post_block_norm_bwd_rows_kernel"
EVERYTHING = {"biases": True, "gain": True, "scale_on_device": True, "nested": True, "activation": "gelu_tanh"}
EVERYTHING |= {"plus_one": True, "weight_gradient": True}


def cases() -> list[list]:
    found = [[target, "bfloat16", 4096, rank, 4096, PACKED] for target in TARGETS for rank in (8, 64)]
    found += [[target, "bfloat16", 4096, rank, 4096, EVERYTHING] for target in TARGETS for rank in (8, 16)]
    for target in PROMISED:
        found += [[target, "bfloat16", 2048, 16, 8192, PACKED], [target, "bfloat16", 4096, 32, 8192, PACKED]]
        found += [[target, "bfloat16", 4096, 64, 8192, EVERYTHING], [target, "bfloat16", 16384, 0, 8192, EVERYTHING]]
        found += [
            [target, "bfloat16", hidden, rank, 16384, PACKED] for hidden, rank in ((4096, 4), (2048, 2), (8192, 1))
        ]
        found += [[target, dtype, 4096, 2, 16384, PACKED] for dtype in ("float16", "float32")]
        found.append([target, "bfloat16", 4096, 3, 16384, {**PACKED, "biases": True}])
        found.append([target, "bfloat16", 16384, 0, 8192, {}])
        for rank in (8, 16):  # rows in registers, and tiles
            found += [[target, dtype, 4096, rank, 4096, PACKED] for dtype in ("float16", "float32")]
            found += [[target, "bfloat16", 4099, rank, 4096, {}], [target, "bfloat16", 576, rank, 8192, PACKED]]
            found += [[target, "bfloat16", 4096, rank, 4096, {**PACKED, "reads": "branch"}]]
    return found


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    return run_compiling("norm_worker.py", cases())


def assert_none(bad: list[dict]) -> None:
    assert not bad, "\n".join(map(str, bad))


def test_norm_aot_every_kernel_was_compiled(compiled):
    assert {str(row["case"]) for row in compiled} == {str(case) for case in cases()}
    names = {"post_block_norm_fwd_kernel", "rms_norm_fwd_kernel", "rms_norm_bwd_kernel", "add_partial_sums_kernel"}
    assert {row["kernel"] for row in compiled} == {RESIDENT, ONE_PASS, TWO_PASSES, *names}


#: Accepted spills (registers, on AMD) and local memory (bytes a thread, of a wide norm's backward), by target, hidden
#: size and rank, with every option at once and without. They may not grow.
LOCAL = {
    ("gfx942", 4096, 8, True): 9,
    ("gfx942", 4096, 16, True): 4,
    ("sm_80", 16384, 0, True): 80,
    ("sm_90", 16384, 0, True): 96,
}
# A d just above 4096 has too many columns for a thread that holds rows in registers.
LOCAL |= {("sm_80", 4099, 8, False): 496, ("sm_90", 4099, 8, False): 56, ("sm_80", 4099, 16, False): 8}
LOCAL |= {("sm_90", 16384, 0, False): 8, ("sm_100", 4096, 64, False): 8}


def test_norm_aot_no_spill_and_no_local_memory(compiled):
    def most(row: dict) -> int:
        target, _, hidden, rank, _, flags = row["case"]
        return LOCAL.get((target, hidden, rank, flags == EVERYTHING), 0)

    assert_none([row for row in compiled if row["spills"] + row["local"] > most(row)])


def test_norm_aot_programs_fit_on_a_multiprocessor(compiled):
    assert_none([row for row in compiled if row["shared"] > SHARED_MEMORY[row["target"]]])
    assert_none([row for row in compiled if not 0 < row["occupancy"] <= 1])


def test_norm_aot_the_hidden_state_moves_in_128_bit_accesses(compiled):
    rows = [row for row in compiled if row["case"][2] % 8 == 0 and row["hidden_states"]]
    assert {row["target"] for row in rows} == TARGETS.keys()
    assert_none([row for row in rows if not row["loads_128"] + row["async_copies_128"]])
    # On AMD the matrix units produce `out` in 64 bits.
    amd = [row for row in rows if row["target"].startswith("gfx")]
    assert_none([row for row in amd if not row["stores_128"] + row["stores_64"]])
    assert_none([row for row in rows if row not in amd and not row["stores_128"]])
    # In two passes the backward stores da and h, N x r, a number for each lane.
    assert_none([r for r in rows if r["loads_16"] + r["stores_16"] > (2 if r["kernel"] == TWO_PASSES else 1)])


def test_norm_aot_the_forward_multiplies_on_tensor_cores(compiled):
    assert_none([row for row in compiled if row["kernel"] == "post_block_norm_fwd_kernel" and not row["tensor_core"]])


def units(row: dict, name: str) -> float:
    _, dtype, hidden, _, tokens, _ = row["case"]
    return row[name] / (hidden * tokens * {"bfloat16": 2, "float16": 2, "float32": 4}[dtype])


def of_many_tokens(compiled: list[dict], kernel: str) -> list[dict]:
    rows = [row for row in compiled if row["kernel"] == kernel and row["case"][5] == PACKED]
    return [row for row in rows if row["target"] in PROMISED and row["case"][1] == "bfloat16"]


def test_norm_aot_the_forward_moves_four_units_through_device_memory(compiled):
    """From rank 32 on, the tiles are too high for their second and third reading to hit L2 in full."""
    rows = of_many_tokens(compiled, "post_block_norm_fwd_kernel")
    assert len(rows) == 4 * len(PROMISED)
    assert_none([row for row in rows if units(row, "memory") > (5.3 if row["case"][3] >= 32 else 4.1)])


def test_norm_aot_rows_in_registers_are_read_once(compiled):
    rows = [row for row in of_many_tokens(compiled, RESIDENT) if row["case"][3] == 8]
    assert len(rows) == 2 * len(PROMISED)
    for row in rows:
        assert 4 <= units(row, "memory") <= 4.1, row
        assert not row["tensor_core"] and not row["async_copies"], row
        # A program of two rows reads both weights of all ranks and the norm's weight, from L2 or L1.
        assert units(row, "l2") == pytest.approx(2 + row["case"][3] + 1 / 2, rel=0.01), row


def test_norm_aot_the_backward_in_one_pass_fills_the_registers_with_eight_to_twelve_warps(compiled):
    rows = [row for row in compiled if row["kernel"] == ONE_PASS]
    assert {row["case"][3] for row in rows} == {1, 2, 3, 4}
    for row in rows:
        assert 8 <= row["occupancy"] * 64 <= 12 and row["registers"] > 128, row
        assert len(row["hidden_states"]) == 4 and 4 <= units(row, "memory") <= 4.3, row


def test_norm_aot_the_backward_in_two_passes_leaves_room_for_more_programs(compiled):
    rows = of_many_tokens(compiled, TWO_PASSES)
    assert rows
    # da and h are 128 bytes for each token beside 8 bytes for each of its numbers.
    most = {row["case"][2]: 4 + 70 / row["case"][2] for row in rows}
    assert_none(
        [row for row in rows if row["occupancy"] < 0.25 or not 4 <= units(row, "memory") <= most[row["case"][2]]]
    )


def test_norm_aot_both_passes_over_the_states_load_asynchronously(compiled):
    """The third pass does not, because it reads what its own program has just written."""
    for row in of_many_tokens(compiled, "post_block_norm_fwd_kernel"):
        (first, _), (second, _), (third, waits) = row["loops"]
        assert first and second and not third and waits, row


def test_norm_aot_the_norm_alone_moves_each_tensor_once(compiled):
    expected = {"norm_forward": 2, "norm_backward": 3, "backward": 4}
    rows = [row for row in compiled if row["pass"] in expected and row["kernel"].startswith("rms_norm")]
    rows = [row for row in rows if row["case"][5] == PACKED]
    assert rows
    for row in rows:
        # beside the hidden states only the weight and 1 / rms
        assert expected[row["pass"]] <= units(row, "memory") <= expected[row["pass"]] + 0.01, row
        assert len(row["hidden_states"]) == expected[row["pass"]]
