"""Benchmarks of the op at all sizes, one contender at a time. For ratios use `bench.gpu`, which interleaves them."""

from dataclasses import asdict

import pytest
import torch

from bench import levels, timing
from bench.contenders import OP_CONTENDERS
from bench.geometries import OpCase, op_grid


@pytest.mark.gpu
@pytest.mark.parametrize("what", levels.OP_PASSES)
@pytest.mark.parametrize(
    "case", op_grid(), ids=lambda c: f"N{c.tokens}-d{c.hidden}-r{c.rank}-{c.activation}-k{c.basis}"
)
@pytest.mark.parametrize("name", OP_CONTENDERS)
def test_op(benchmark, device, name: str, case: OpCase, what: str) -> None:
    contender = OP_CONTENDERS[name]
    assert levels.check_op(case, what, [name], device) == {}
    units = 2 if what == "forward" else 3
    count = timing.input_sets(units * case.unit_bytes, levels.l2_bytes(device))
    sets = [levels.make_operands(case, device, seed) for seed in range(count)]
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        timed = timing.Timed(name, levels.op_calls(case, what, contender, sets))
    timed.prepare(device, graph=True, stream=stream)
    benchmark.group = f"{what} {case}"
    # pytest-benchmark times a replay of all calls, launch included; the seconds per call are in extra_info.
    benchmark.pedantic(timed.sample, args=(device,), rounds=20)
    benchmark.extra_info |= {"case": asdict(case), "contender": name, "calls": count, "seconds a call": timed.samples}
