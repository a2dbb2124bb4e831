"""The schedule covers every row and column exactly once, and chooses by shape."""

import pytest
from fused_steer.kernels.schedule import (
    MAX_SPLITS,
    TARGETS,
    Device,
    column_passes,
    columns_schedule,
    finish_schedule,
    forward_schedule,
    padded_rank,
    rows_schedule,
)

HIDDEN = (1, 16, 80, 576, 1152, 2560, 4096, 4099, 7168)
RANKS = (0, 1, 8, 16, 17, 64, 128, 256)
POLICIES = {"cuda": ("bf16", "tf32", "tf32x3", "ieee"), "hip": ("bf16", "ieee")}


@pytest.mark.parametrize("device", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("tokens", [1, 17, 64, 1000, 8192, 100_000])
def test_all_of_the_hidden_state_is_covered_once(device, tokens):
    for hidden in HIDDEN:
        for rank in RANKS:
            for itemsize in (2, 4):
                forward = forward_schedule(tokens, hidden, rank, itemsize, device)
                assert forward.part % forward.block_d == 0 or forward.splits == 1
                assert (forward.splits - 1) * forward.part < hidden <= forward.splits * forward.part
                assert 1 <= forward.programs <= -(-tokens // forward.block_n)
                assert forward.block_r == padded_rank(rank)
            for policy in POLICIES[device.gpu]:
                rows = rows_schedule(tokens, hidden, rank, policy, device)
                assert (rows.programs - 1) * rows.block_n < tokens <= rows.programs * rows.block_n
                columns = columns_schedule(tokens, hidden, rank, policy, device)
                assert (columns.programs - 1) * columns.block_d < hidden <= columns.programs * columns.block_d
                assert 1 <= columns.splits <= -(-tokens // columns.block_n), "each part has a tile"
                assert tokens <= columns.splits * columns.part
                for schedule in (rows, columns):
                    assert schedule.block_r == padded_rank(rank)
            finish = finish_schedule(hidden, rank)
            assert (finish.programs - 1) * finish.block_d < hidden <= finish.programs * finish.block_d
            assert (finish.splits - 1) * finish.block_r < max(1, rank) <= finish.splits * finish.block_r


@pytest.mark.parametrize("device", [TARGETS["sm_80"], TARGETS["sm_90"]], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("hidden", [2048, 2560, 4096, 8192])
def test_parts_of_the_rows_fill_the_multiprocessors(device, hidden):
    for rank in (1, 8, 64):
        for tokens in (4096, 16384):
            columns = columns_schedule(tokens, hidden, rank, "bf16", device)
            programs = (columns.programs + 1) * columns.splits  # one of each part sums daᵀ h
            most = min(2, -(-programs // device.multiprocessors)) * device.multiprocessors
            waves = -(-programs // most)
            assert programs >= 0.9 * waves * most, (rank, tokens, programs)
            assert columns.part <= 1.1 * tokens / columns.splits + columns.block_n, "no part is much longer"


def test_few_tokens_are_split_over_columns_and_many_are_not():
    h100 = TARGETS["sm_90"]
    assert forward_schedule(1, 4096, 8, 2, h100).splits == MAX_SPLITS
    assert forward_schedule(64, 4096, 8, 2, h100).splits > 8
    assert forward_schedule(8192, 4096, 8, 2, h100).splits == 1


@pytest.mark.parametrize("device", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("hidden", [576, 4096, 5120, 7168, 8192, 16384])
def test_the_fewest_programs_share_a_tile_that_keep_all_tiles_in_l2(device, itemsize, hidden):
    for tokens in (64, 4096, 100_000):
        forward = forward_schedule(tokens, hidden, 8, itemsize, device)
        tile = forward.block_n * hidden * itemsize * 2
        assert forward.programs * tile <= 0.9 * device.l2
        tiles = -(-tokens // forward.block_n)
        if tiles < device.multiprocessors // 2:
            continue  # few tokens, split to fill the device
        fewest = next(n for n in range(1, 99) if device.multiprocessors // n * tile <= 0.9 * device.l2)
        assert forward.splits == fewest
        if tiles >= device.multiprocessors:
            busy = forward.programs * forward.splits
            assert busy > device.multiprocessors - fewest, "every multiprocessor has a program, up to rounding"


def test_large_rows_are_shared_where_l2_is_small():
    found = {
        name: [forward_schedule(8192, hidden, 8, 2, device).splits for hidden in (4096, 5120, 7168, 8192)]
        for name, device in TARGETS.items()
    }
    assert found == {"sm_80": [1, 1, 2, 2], "sm_90": [1, 1, 2, 2], "sm_100": [1] * 4, "gfx942": [1] * 4}


def test_a_tile_beyond_l2_still_has_a_program():
    small = Device("cuda", 4, 64 << 10)
    forward = forward_schedule(1000, 8192, 8, 4, small)
    assert forward.programs == 1 and forward.splits > 1


@pytest.mark.parametrize("device", TARGETS.values(), ids=TARGETS)
def test_every_thread_has_128_bits_of_a_tile(device):
    lanes = 64 if device.gpu == "hip" else 32
    for schedule_of, form in ((forward_schedule, 2), (rows_schedule, "bf16"), (columns_schedule, "bf16")):
        for hidden in (576, 1152, 4096, 8192):
            for rank in (0, 1, 16, 32, 64, 128, 256):
                for tokens in (8, 512, 8192):
                    found = schedule_of(tokens, hidden, rank, form, device)
                    assert found.block_n * found.block_d * 2 >= 16 * lanes * found.num_warps, (hidden, rank, found)


def test_ranks_are_padded_in_registers_only():
    assert [padded_rank(rank) for rank in (0, 1, 16, 17, 200, 256)] == [0, 16, 16, 32, 256, 256]


def test_each_gradient_is_computed_in_exactly_one_pass():
    h100 = TARGETS["sm_90"]
    for rank, hidden, passes in ((64, 4096, 1), (65, 4096, 2), (32, 4099, 1), (64, 4099, 2)):
        found = column_passes(columns_schedule(8192, hidden, rank, "bf16", h100), hidden)
        assert len(found) == passes
        assert [sum(part) for part in zip(*found, strict=True)] == [1, 1]
