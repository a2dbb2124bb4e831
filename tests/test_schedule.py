"""The schedule covers every row and column exactly once, and chooses by shape."""

import pytest
from fused_steer.kernels.schedule import (
    MAX_SPLITS,
    TARGETS,
    column_passes,
    columns_schedule,
    forward_schedule,
    padded_rank,
    rows_schedule,
)

HIDDEN = (1, 16, 80, 576, 1152, 2560, 4096, 4099, 7168)
RANKS = (0, 1, 8, 16, 17, 64, 128, 256)


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
                rows = rows_schedule(tokens, hidden, rank, itemsize, device)
                assert (rows.programs - 1) * rows.block_n < tokens <= rows.programs * rows.block_n
                columns = columns_schedule(tokens, hidden, rank, itemsize, device)
                assert (columns.programs - 1) * columns.block_d < hidden <= columns.programs * columns.block_d
                assert (columns.splits - 1) * columns.part < tokens <= columns.splits * columns.part
                for schedule in (forward, rows, columns):
                    assert schedule.block_r == padded_rank(rank)


def test_few_tokens_are_split_over_columns_and_many_are_not():
    h100 = TARGETS["sm_90"]
    assert forward_schedule(1, 4096, 8, 2, h100).splits == MAX_SPLITS
    assert forward_schedule(64, 4096, 8, 2, h100).splits > 8
    assert forward_schedule(8192, 4096, 8, 2, h100).splits == 1


def test_ranks_are_padded_in_registers_only():
    assert [padded_rank(rank) for rank in (0, 1, 16, 17, 200, 256)] == [0, 16, 16, 32, 256, 256]


def test_each_gradient_is_computed_in_exactly_one_pass():
    h100 = TARGETS["sm_90"]
    for rank, hidden, passes in ((64, 4096, 1), (65, 4096, 2), (32, 4099, 1), (64, 4099, 2)):
        found = column_passes(rank, columns_schedule(8192, hidden, rank, 2, h100), hidden)
        assert len(found) == passes
        assert [sum(part) for part in zip(*found, strict=True)] == [1, 1]
