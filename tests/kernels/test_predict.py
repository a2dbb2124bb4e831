"""Tests of the model that predicts times: reading machine code, the clock of a multiprocessor, the work of a launch."""

from dataclasses import replace

import pytest
import torch
from fused_steer.kernels import predict
from fused_steer.kernels.aot import Case, hidden_states, record, record_passes
from fused_steer.kernels.contract import READS
from fused_steer.kernels.predict import (
    CLOCKS,
    LaunchPrediction,
    Loop,
    PassPrediction,
    Times,
    issue_cycles,
    l2_bytes,
    memory_bytes,
    program_cycles,
    read_program,
    wave_fill,
    work,
    works,
)
from fused_steer.kernels.sass import Walk, find_loops, parse

A100, H100 = CLOCKS["sm_80"], CLOCKS["sm_90"]


def listing(*lines: str) -> str:
    """Make a listing like `cuobjdump -sass`. A line is instruction | timing, such as `stall 4 sets 0 waits 0,1`."""
    text = ["\tcode for sm_90a", "\t\tFunction : some_kernel"]
    for index, line in enumerate(lines):
        instruction, _, hints = line.partition("|")
        words = hints.split()
        hint = dict(zip(words[::2], words[1::2], strict=True))
        high = int(hint.get("stall", 1)) << 41 | int(hint.get("sets", 7)) << 46 | int(hint.get("frees", 7)) << 49
        high |= sum(1 << (52 + int(board)) for board in hint.get("waits", "").split(",") if board)
        text.append(f"        /*{16 * index:04x}*/  {instruction.strip()} ;  /* 0x{0:016x} */")
        text.append(f"                                              /* 0x{high:016x} */")
    return "\n".join(text)


def cycles(*lines: str, clock=H100, warps=1, programs=1, loops=(), again=False) -> float:
    return program_cycles(read_program(listing(*lines), "some_kernel", loops, warps), programs, clock, again)


# ------------------------------------------------------------------------------------------------------- machine code


def test_predict_parse_reads_instructions_and_their_hints():
    load, product, leave = parse(
        listing(
            "LDG.E.128 R4, desc[UR4][R2.64] | stall 3 sets 2 frees 1",
            "@!P0 HMMA.16816.F32.BF16 R4, R8, R12, R4 | stall 15 waits 0,2",
            "@P1 BRA 0x0 | stall 5",
        )
    )
    assert (load.address, load.opcode, load.name, load.access_bytes) == (0, "LDG.E.128", "LDG", 16)
    assert (load.stall, load.sets, load.frees, load.waits) == (3, 2, 1, ())
    assert (product.predicate, product.stall, product.sets, product.waits) == ("@!P0", 15, None, (0, 2))
    assert (leave.address, leave.target, leave.conditional) == (0x20, 0, True)
    with pytest.raises(ValueError, match="the listing has no instruction; expected SASS"):
        parse("\tcode for sm_90a\n")


def walked(*lines: str, trips: list[int]) -> list[int]:
    """Walk a listing with these trip counts of its loops, in order of addresses, outer loops first."""
    code = parse(listing(*lines))
    found, queue = [], list(find_loops(code))
    while queue:
        loop = queue.pop(0)
        found.append(loop)
        queue = [*loop.inner, *queue]
    return [index for index, _ in Walk(code, dict(zip(found, trips, strict=True)))]


def test_predict_walk_repeats_a_loop_and_ends_with_the_program():
    assert walked("MOV", "FADD", "@P0 BRA 0x10", "MOV", "EXIT", "BRA 0x50", trips=[3]) == [0, 1, 2, 1, 2, 1, 2, 3, 4]


def test_predict_walk_of_nested_loops():
    lines = ("MOV", "FADD", "@P0 BRA 0x10", "FMUL", "@P1 BRA 0x30", "@P2 BRA 0x0", "EXIT")
    (outer,) = find_loops(parse(listing(*lines)))
    assert outer.shape == "[[][]]"
    once = [0, 1, 2, 1, 2, 3, 4, 5]
    assert walked(*lines, trips=[2, 2, 1]) == [*once, *once, 6]


@pytest.mark.parametrize("way_out", ["@P0 EXIT", "@P0 BRA 0x40", "@P0 CALL.REL.NOINC 0x40"])
def test_predict_walk_leaves_a_loop_by_its_way_out(way_out):
    """The walk leaves a loop by its exit, also if ptxas puts an unconditional branch back after the exit."""
    after = [] if "EXIT" in way_out else [4]
    assert walked("MOV", "FADD", way_out, "BRA 0x10", "EXIT", trips=[2]) == [0, 1, 2, 3, 1, 2, *after]


def test_predict_walk_takes_the_branch_that_leads_to_a_loop():
    lines = ("@!P3 BRA 0x20", "BRA 0x50", "FADD", "@P0 BRA 0x20", "MOV", "EXIT")
    assert walked(*lines, trips=[2]) == [0, 2, 3, 2, 3, 4, 5]
    assert walked(*lines, trips=[0]) == [0, 1, 5], "a loop without trips is gone around"
    assert walked("@P3 BRA 0x30", "FADD", "@P0 BRA 0x10", "EXIT", trips=[0]) == [0, 3]


def test_predict_walk_refuses_a_loop_that_it_cannot_reach():
    with pytest.raises(ValueError, match="the program ends at 0x0; expected a way to the loop at 0x10, which has 2"):
        walked("EXIT", "FADD", "@P0 BRA 0x10", "EXIT", trips=[2])


# ---------------------------------------------------------------------------------------- the clock of a multiprocessor


def test_predict_clock_waits_out_stalls():
    assert cycles("FADD | stall 4", "FADD | stall 4", "EXIT") == 8


def test_predict_clock_issues_one_instruction_a_cycle_and_scheduler():
    adds = ["FADD"] * 10
    assert cycles(*adds, "EXIT", warps=4) == 10, "a warp on each scheduler"
    assert cycles(*adds, "EXIT", warps=8) == 21
    assert cycles(*adds, "EXIT", clock=A100) == 19, "A100's pipe takes a warp every second cycle"


def test_predict_clock_loads_take_the_latency_of_where_they_are_found():
    lines = ("LDG.E.128 R4, [R2] | sets 0", "FADD | waits 0", "EXIT")
    bytes_a_cycle = 512 / 64
    assert cycles(*lines) == H100.memory_latency + bytes_a_cycle + 1
    assert cycles(*lines, again=True) == H100.l2_latency + bytes_a_cycle + 1


def test_predict_clock_copies_are_waited_for_by_group():
    copy = ("LDGSTS.E.128 [R1], [R2]", "LDGDEPBAR")
    assert cycles(*copy, "DEPBAR.LE SB0, 0x0", "EXIT") > H100.memory_latency
    assert cycles(*copy, "DEPBAR.LE SB0, 0x1", "EXIT") < 20
    assert cycles(*copy, *copy, "DEPBAR.LE SB0, 0x1", "EXIT") > H100.memory_latency


def test_predict_clock_barriers_join_the_warps_of_a_program():
    alone = cycles("FADD", "BAR.SYNC 0x0", "EXIT")
    assert alone == 1 + H100.barrier
    assert cycles("FADD", "BAR.SYNC 0x0", "EXIT", warps=8) == 4 + H100.barrier, "the last of two on a scheduler"
    assert cycles("FADD", "BAR.SYNC 0x0", "EXIT", programs=8) == pytest.approx(alone, abs=4), "programs do not wait"


def test_predict_clock_products_occupy_the_tensor_core():
    products = ["HMMA.16816.F32.BF16 R4, R8, R12, R4"] * 8
    assert cycles(*products, "EXIT") == 7 * H100.product + 1
    assert cycles(*products, "EXIT", clock=A100) == 7 * A100.product + 1
    assert cycles(*["HMMA.1688.F32.BF16 R4, R8, R12, R4"] * 8, "EXIT") == 7 * H100.product // 2 + 1
    assert cycles(*["HMMA.1688.F32.TF32 R4, R8, R12, R4"] * 8, "EXIT") == 7 * H100.product + 1


@pytest.mark.parametrize("trips", [(40, 60), (9, 3), (1, 1)])
def test_predict_clock_goes_on_at_a_loops_pace(trips, monkeypatch):
    load = "LDG.E.128 R4, [R2] | sets 0"
    lines = (
        load,
        load,
        "FADD | stall 4 waits 0",
        "@P0 BRA 0x10",
        load,
        "FMUL | waits 0",
        "@P1 BRA 0x40",
        "@P2 BRA 0x0",
    )
    loops = (Loop(5, inner=(Loop(trips[0]), Loop(trips[1], again=True))),)
    short = cycles(*lines, "EXIT", warps=4, programs=3, loops=loops)
    monkeypatch.setattr(predict, "_TIMED_TRIPS", 1000)
    monkeypatch.setattr(predict, "_TIMED_OUTER_TRIPS", 1000)
    assert short == pytest.approx(cycles(*lines, "EXIT", warps=4, programs=3, loops=loops), rel=0.03)


def test_predict_issue_cycles_are_those_of_the_busiest_pipe():
    assert issue_cycles(parse(listing(*["FADD"] * 8, *["IADD3"] * 2)), H100) == 10
    assert issue_cycles(parse(listing(*["FADD"] * 8, *["IADD3"] * 2)), A100) == 16
    assert issue_cycles(parse(listing("FADD", *["HMMA.16816.F32.BF16 R4, R8, R12, R4"] * 4)), A100) == 32


def test_predict_a_program_has_the_loops_of_its_description():
    text = listing("LDG.E.128 R4, [R2]", "LDG.E.128 R4, [R2]", "@P0 BRA 0x0", "EXIT")
    assert len(read_program(text, "some_kernel", (Loop(4, states=1024),), 1).code) == 4
    with pytest.raises(ValueError, match=r"the loops of some_kernel are \[\]; expected \[\]\[\], as predict.py"):
        read_program(text, "some_kernel", (Loop(4), Loop(4)), 1)
    with pytest.raises(ValueError, match="a trip of a loop of some_kernel loads 1024 bytes; expected 512"):
        read_program(text, "some_kernel", (Loop(4, states=256, others=256),), 1)


def test_predict_an_unrolled_loop_and_its_rest_are_one_loop():
    load = "LDG.E.128 R4, [R2]"
    text = listing("MOV", load, load, load, "@P0 BRA 0x10", "FADD", load, "@P1 BRA 0x60", load, "@P2 BRA 0x80", "EXIT")
    program = read_program(text, "some_kernel", (Loop(11, states=512), Loop(2, states=512)), 1)
    assert [loop.trips for loop in program.loops] == [3, 2, 2]
    assert [program.loaded(loop) for loop in program.loops] == [3 * 512, 512, 512]
    with pytest.raises(ValueError, match=r"the loops of some_kernel are \[\]\[\]\[\]; expected \[\], as predict.py"):
        read_program(text, "some_kernel", (Loop(11, states=512),), 1)


# ----------------------------------------------------------------------------------------------------- work of a launch

CASES = [
    Case(n, d, r, dtype, **options)
    for n, d in ((1, 2048), (64, 4096), (4096, 4096), (5000, 576))
    for r in (0, 1, 8, 64, 256)
    for dtype, options in (
        (torch.bfloat16, {}),
        (torch.float32, {"biases": True, "gain": True, "scale_on_device": True}),
        (torch.float16, {"branch": False, "nested": n % 2 == 0}),
        (torch.bfloat16, {"biases": True, "reads": "branch"}),
    )
]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942", "sm_75"])
def test_predict_work_describes_every_launch(target):
    for case in CASES:
        for launch in record(case, target):
            done = work(launch)
            assert done.programs == torch.Size(launch.grid).numel(), launch.kernel.__name__
            assert 0 < done.share <= 1 and done.series >= 0
            named = {*done.reads, *done.writes}
            assert named <= set(launch.kernel.arg_names), "names of arguments"


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_predict_work_reads_in_loops_what_l2_sends(target, rank, reads):
    """Trips times bytes per trip equal the hidden states' bytes, padding rows of tiles included.

    test_budgets checks the bytes per trip against the compiled code.
    """
    for tokens in (64, 4096, 16384):
        for launch in record(Case(tokens, 4096, rank, reads=reads, packed=True), target):
            done = work(launch)
            states = {name: t for name, t in hidden_states(launch).items() if name not in done.writes}
            sent = sum(t.nbytes * done.reads.get(name, 1) for name, t in states.items())

            def read(loops):
                return sum(loop.trips * (read(loop.inner) if loop.inner else loop.states) for loop in loops)

            names = {**dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)), **launch.constants}
            kernel = launch.kernel.__name__
            if kernel in ("pack_adapter_kernel", "post_block_fwd_resident_kernel"):
                programs = 1 if kernel == "pack_adapter_kernel" else -(-tokens // names["BLOCK_N"])
                weights = programs * 2 * rank * 4096 * names["p_down"].element_size()  # without the padding ranks
                assert not done.loops and l2_bytes(launch) == pytest.approx(sent + weights), kernel
                continue
            if names.get("AT_ONCE"):
                assert not done.loops and tokens == 64, "one block, read once"
                continue
            height = names.get("height", names.get("BLOCK_N"))
            padded = -(-tokens // height) * names["BLOCK_N"] / tokens
            total = read(done.loops) * (done.programs - done.aside) * done.share
            assert total == pytest.approx(sent * padded), kernel
            assert l2_bytes(launch) >= sent


def test_predict_work_finds_in_l2_what_an_earlier_launch_has_read():
    """With few tokens the second kernel reads again what the first read: of branch alone, if W1 is applied to it."""
    for tokens in (8, 64):
        for rank in (16, 256):  # one block, and a loop
            both, of_branch = (
                works(record_passes(Case(tokens, 4096, rank, reads=reads), "sm_90")["forward"]) for reads in READS
            )
            assert [done.again for done in both] == [False, True]
            assert [done.again for done in of_branch] == [False, False]
            assert all(loop.again for loop in both[1].loops) and not any(loop.again for loop in of_branch[1].loops)


def test_predict_memory_is_read_once_and_again_where_l2_has_lost_it():
    unit = 4096 * 4096 * 2
    passes = record_passes(Case(4096, 4096, 8), "sm_90")
    assert sum(memory_bytes(passes["forward"], "sm_90")) == pytest.approx(3 * unit, rel=0.02)
    assert sum(memory_bytes(passes["backward"], "sm_90")) == pytest.approx(4 * unit, rel=0.15)
    passes = record_passes(Case(4096, 4096, 8, reads="branch"), "sm_90")
    assert sum(memory_bytes(passes["forward"], "sm_90")) == pytest.approx(3 * unit, rel=0.02)
    assert sum(memory_bytes(passes["backward"], "sm_90")) == pytest.approx(4 * unit, rel=0.15)
    huge = Case(16384, 65536, 8, torch.float32)  # tiles of 16 rows of which L2 holds a part
    both, one = (
        sum(memory_bytes(record_passes(replace(huge, reads=reads), "sm_80")["forward"], "sm_80")) for reads in READS
    )
    assert one < both, "of residual nothing is read twice"
    few = record_passes(Case(64, 4096, 8), "sm_90")["backward"]
    first, *rest = memory_bytes(few, "sm_90")
    assert first >= few[0].arguments[0].nbytes
    again = memory_bytes(few[1:], "sm_90")
    assert sum(rest) <= sum(again) - few[0].arguments[0].nbytes, "G is in L2 still"


def test_predict_waves_are_full_or_not():
    assert wave_fill(264, 2, 132) == wave_fill(132, 2, 132) == 1
    assert wave_fill(265, 2, 132) == 265 / (2 * 264)
    assert wave_fill(128, 4, 132) == 128 / 132
    assert wave_fill(546, 2, 132) == 546 / (3 * 264), "2.07 waves are 3"


def test_predict_an_unknown_kernel_is_one_clear_line():
    (launch, *_) = record(Case(8, 64, 16), "sm_90")

    class Other:
        __name__ = "other_kernel"

    with pytest.raises(ValueError, match="kernel is other_kernel; expected one that kernels/predict.py describes: "):
        work(replace(launch, kernel=Other()))
    constants = {name: value for name, value in launch.constants.items() if name != "BLOCK_D"}
    with pytest.raises(ValueError, match="has no argument BLOCK_D; expected one, as kernels/predict.py describes it"):
        work(replace(launch, constants=constants))
    with pytest.raises(ValueError, match="gpu is 'T4'; expected one of A100, A100-40GB, H100, H200"):
        predict.predict([launch], "T4")


# ---------------------------------------------------------------------------------------------------------- predictions


@pytest.mark.parametrize(
    ("launches", "binds", "seconds", "floors"),
    [
        ([(6.0, 4.0, 5.0, 1.0)], "memory", 7.0, 2.0),
        ([(1.0, 4.0, 3.0, 1.0)], "l2", 5.0, 4 / 3),
        ([(1.0, 4.0, 3.0, 1.0), (1.0, 2.0, 5.0, 1.0)], "issue", 11.0, 3.0),
        ([(0.1, 0.2, 0.5, 0.8), (0.1, 0.2, 0.5, 0.8)], "host", 2.6, 1 / 3),
    ],
)
def test_predict_a_pass_says_what_binds_it(launches, binds, seconds, floors):
    each = tuple(LaunchPrediction("some_kernel", Times(*times), busy=0.1, fill=1.0) for times in launches)
    found = PassPrediction("H100", each, floor=3.0)
    assert (found.binds, found.seconds, found.floors) == (binds, pytest.approx(seconds), pytest.approx(floors))
