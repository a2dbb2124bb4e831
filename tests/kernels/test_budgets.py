"""Tests of the kernels' budgets: bytes and instructions, counted on code compiled ahead of time for A100 and H100.

The counts come from `kernels.predict`: bytes from recorded launches, instructions from compiled loops. `fused-steer
kernels` prints them for every target.
"""

import pytest
from compiling import run_compiling
from fused_steer.kernels.aot import GPUS
from fused_steer.kernels.predict import MEMORY_SHARE

HIDDEN = (2048, 2560, 4096, 8192)
RANKS = (1, 8, 16, 64)
MANY, FEW = (4096, 16384), (1, 8, 64)
#: target -> its GPU.
NAMES = {"sm_80": "A100", "sm_90": "H100"}

#: The kernel that holds rows in registers. It copies nothing asynchronously, and has no loop.
RESIDENT = "post_block_fwd_resident_kernel"

# The forward has no budget of L2's bytes or of instructions. Tiles of 16 rows read W1 and W2 most often, and yet they
# were the fastest on an H100. The kernel that holds rows in registers finds the weights in L1.
L2_OVER_MEMORY = {1: 1.7, 8: 1.7, 16: 1.7, 64: 3.0}  # of the backward, by rank: bytes from L2 over bytes of memory
#: Bytes of device memory of a forward, in units of N·d. The floor is 3. At rank 64, tiles of 64 rows were the fastest
#: on an H100, although those in flight exceed L2.
FORWARD_UNITS = {1: 3.05, 8: 3.55, 16: 3.55, 64: 4.7}
BUSY_OVER_MEMORY = 0.5  # of the backward: time of the loops' instructions over time of device memory
#: The exceptions to that budget, by (target, d, r, N, pass). They may not grow. They are A100's backward at rank 64.
#: The tensor cores' cycles alone are 0.488 at d = 2048: 0.312 for the three products of the columns kernel, which are
#: not padded, and 0.176 for dz, where 38 rows of one whole wave take a tile of 64. Adding the slabs takes 0.017 more.
#: Three waves of 13 rows in tiles of 16 would take 0.128 for dz. Then the rows kernel reads W2' three times as often,
#: and L2 binds it for 1.4 times as long.
BUSY_EXCEPTIONS = {
    ("sm_80", 2048, 64, 4096, "backward"): 0.51,
    ("sm_80", 2560, 64, 4096, "backward"): 0.52,
}
#: The least share of busy places for programs. The columns kernel's tiles were chosen on an H100. On A100 its blocks of
#: columns times a whole number of parts leave more places empty: most at d = 8192 and low ranks, where 128 blocks and
#: one program of daᵀ h, in one part, are 129 programs for 108 multiprocessors. No A100 was measured.
FILL = 0.9
COLUMNS_FILL = {"sm_80": 0.87, "sm_90": FILL}
FILL_EXCEPTIONS = {("sm_80", 8192, rank): 0.59 for rank in (1, 8, 16)}  # by (target, d, r). They may not fall.
SERIES = 8  # the most sequential loop trips of a program with few tokens


def cases() -> list[list]:
    found = [[t, d, r, n, "sum"] for t in NAMES for d in HIDDEN for r in RANKS for n in (*MANY, *FEW)]
    # Where W1 reads the branch, the tiles are the same.
    return found + [[t, 4096, r, n, "branch"] for t in NAMES for r in (8, 64) for n in (*MANY, 8)]


@pytest.fixture(scope="module")
def launches() -> list[dict]:
    rows = run_compiling("budget_worker.py", cases())
    asked = ("target", "hidden", "rank", "tokens", "reads")
    assert {tuple(row[name] for name in asked) for row in rows} == {tuple(case) for case in cases()}
    assert {row["pass"] for row in rows} == {"forward", "backward"}
    return rows


def passes(launches: list[dict], tokens: tuple[int, ...]) -> dict[tuple, list[dict]]:
    """Return the launches with these numbers of tokens, by (target, hidden size, rank, tokens, pass).

    If W1 is applied to branch, the key has "branch" before the pass.
    """
    found: dict[tuple, list[dict]] = {}
    for row in launches:
        if row["tokens"] in tokens:
            key = tuple(row[name] for name in ("target", "hidden", "rank", "tokens", "reads", "pass"))
            key = tuple(name for name in key if name != "sum")
            found.setdefault(key, []).append(row)
    return found


def assert_none(over: dict) -> None:
    lines = [f"{' '.join(map(str, key))}: {value}" for key, value in over.items()]
    assert not over, f"{len(over)} over budget (target, d, r, N, pass)\n" + "\n".join(lines)


def test_budgets_the_backward_gets_little_more_from_l2_than_from_device_memory(launches):
    ratios = {
        key: sum(row["l2"] for row in rows) / sum(row["memory"] for row in rows)
        for key, rows in passes(launches, MANY).items()
        if key[-1] == "backward"
    }
    assert_none({key: f"{ratio:.2f}" for key, ratio in ratios.items() if ratio > L2_OVER_MEMORY[key[2]]})


def test_budgets_the_forward_moves_three_units_through_device_memory(launches):
    units = {
        key: sum(row["memory"] for row in rows) / (2 * key[1] * key[3])
        for key, rows in passes(launches, MANY).items()
        if key[-1] == "forward"
    }
    assert all(least >= 3 for least in units.values())
    assert_none({key: f"{moved:.2f}" for key, moved in units.items() if moved > FORWARD_UNITS[key[2]]})


def test_budgets_the_instructions_of_the_backwards_loops_take_half_of_the_memory_time(launches):
    over, needed = {}, set()
    for key, rows in passes(launches, MANY).items():
        bandwidth = MEMORY_SHARE * GPUS[NAMES[key[0]]][1]
        memory = sum(row["memory"] for row in rows) / bandwidth
        busy = sum(row["busy"] for row in rows)
        assert busy > 0, "no instruction counted"
        if key[-1] == "forward":
            continue
        if busy > BUSY_OVER_MEMORY * memory:
            needed.add(key)
        if busy > BUSY_EXCEPTIONS.get(key, BUSY_OVER_MEMORY) * memory:
            over[key] = f"{busy / memory:.3f}"
    assert_none(over)
    assert needed == BUSY_EXCEPTIONS.keys(), "an exception that is not needed any more"


def test_budgets_both_passes_of_the_forwards_tiles_load_asynchronously(launches):
    found = {key: rows for key, rows in passes(launches, MANY).items() if key[-1] == "forward"}
    loops = {key: [loop for row in rows for loop in row["loops"]] for key, rows in found.items()}
    resident = {key for key, rows in found.items() if rows[-1]["kernel"] == RESIDENT}
    assert {key[2] for key in resident} == {1, 8} and {key[2] for key in found.keys() - resident} == {8, 16, 64}
    assert all(len(some) == (0 if key in resident else 2) for key, some in loops.items()), "two passes over d, or none"
    assert_none({key: some for key, some in loops.items() if any(not copies or waits for copies, waits in some)})


def test_budgets_waves_are_full(launches):
    """Except those of kernels with thousands of short programs, and of one that touches no hidden state."""
    skipped = {RESIDENT, "post_block_bwd_finish_kernel"}
    over, needed = {}, set()
    for key, rows in passes(launches, MANY).items():
        for row in rows:
            least = COLUMNS_FILL[key[0]] if row["kernel"] == "post_block_bwd_columns_kernel" else FILL
            if row["kernel"] in skipped or row["fill"] >= least:
                continue
            needed.add(key[:3])
            if row["fill"] < FILL_EXCEPTIONS.get(key[:3], least):
                over[(*key, row["kernel"], tuple(row["grid"]))] = f"{row['fill']:.0%}"
    assert_none(over)
    assert needed == FILL_EXCEPTIONS.keys(), "an exception that is not needed any more"


def test_budgets_tiles_fit_the_shared_memory_of_each_card(launches):
    """Cards with less shared memory get smaller tiles. Packed weights or not, sums are in one order."""
    assert all(row["fits"] for row in launches)
    cases = [["sm_86", 4096, r, 4096, "sum", packed] for r in (8, 64, 128, 256) for packed in (True, False)]
    # In fp16 some operands take four bytes. GPUs before sm_80 hold operands twice.
    cases += [["sm_75", 4096, r, n, "sum", True, "float16"] for r, n in ((64, 8), (128, 8), (256, 4096))]
    cases += [["sm_86", 4096, 256, 4096, "sum", True, "float16"]]
    larger = [row for row in run_compiling("budget_worker.py", cases) if not row["fits"]]
    names = ("target", "rank", "tokens", "dtype", "packed", "kernel")
    assert_none({tuple(row[name] for name in names): row["shared"] for row in larger})


def test_budgets_few_tokens_are_no_long_walk(launches):
    over = {
        (*key, row["kernel"]): row["series"]
        for key, rows in passes(launches, FEW).items()
        for row in rows
        if key[-1] == "forward" and row["series"] > SERIES
    }
    assert_none(over)


def test_budgets_the_description_of_the_loops_is_what_the_code_loads(launches):
    """The bytes per loop trip of `predict.work` equal the loads of the compiled loop.

    The loop loads hidden states once, in 128 bits. Other loads may be narrower, or be repeated for a second product.
    """
    checked = 0
    for row in launches:
        for (states, others), loaded in zip(row["loads"], row["loaded"], strict=True):
            checked += states > 0
            assert states <= loaded <= states + 2 * others, row
    assert checked >= len(launches) / 2
