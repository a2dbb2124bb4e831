"""Benchmarks of a training step, a prefill and a decode step, with models of real sizes, steered and unsteered."""

from dataclasses import asdict

import pytest

from bench import levels, timing
from bench.contenders import MODEL_CONTENDERS, absent
from bench.geometries import FEW_LAYERS, REAL, ModelCase

RUNS = [("train", 8, 512), ("prefill", 1, 4096), ("decode", 8, 512), ("decode-graph", 8, 512)]
CASES = [
    (what, ModelCase(geometry, layers, batch, length))
    for geometry, layers in [*((name, FEW_LAYERS) for name in REAL), ("Llama-3.2-1B", 0)]
    for what, batch, length in RUNS
]


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODEL_CONTENDERS)
@pytest.mark.parametrize(("what", "case"), CASES, ids=[f"{c.geometry}-{c.layers or 'all'}-{what}" for what, c in CASES])
def test_model(benchmark, device, what: str, case: ModelCase, name: str) -> None:
    if name in (missing := absent()):
        pytest.skip(missing[name])
    prepared = levels.prepare_model(case, what, name, levels.build_base(case, device), device)
    timed = timing.Timed(name, [prepared.call])
    timed.prepare(device, graph=what == "decode-graph")
    benchmark.group = f"{what} {case}"
    benchmark.pedantic(timed.sample, args=(device,), rounds=10, setup=prepared.reset)
    benchmark.extra_info |= {"case": asdict(case), "contender": name, "seconds a call": timed.samples}
    if what == "train":
        benchmark.extra_info["bytes kept"] = levels.kept_bytes(case, prepared.model, device)
        benchmark.extra_info["peak bytes"] = timing.peak_bytes(prepared.call, device)
