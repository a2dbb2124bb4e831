"""Benchmarks of the torch backend on a CPU, against other PyTorch implementations. No kernel runs here."""

import statistics

import pytest
import torch

from bench import levels, timing
from bench.contenders import MODEL_CONTENDERS, absent
from bench.geometries import GroupedCase, ModelCase, ProjectionCase
from bench.grouped import measure_grouped
from bench.projection import PROJECTION_CONTENDERS, measure_projection
from bench.serving import cpu_cases

CPU = torch.device("cpu")
CASE = ModelCase("small", 0, batch=32, length=128, dtype="float32")
PAIRS = 60


@pytest.fixture(autouse=True)
def torch_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_STEER_BACKEND", "torch")


def test_a_training_step_is_no_slower_than_the_hooks(benchmark) -> None:
    assert levels.check_models(CASE, ["fused", "hook"], CPU) == {}
    base = levels.build_base(CASE, CPU)
    fused, hook = (
        timing.Timed(name, [levels.prepare_model(CASE, "train", name, base, CPU).call]) for name in ("fused", "hook")
    )
    for timed in (fused, hook):
        timed.prepare(CPU, graph=False)
    benchmark.pedantic(timing.interleave, args=([fused, hook], CPU, PAIRS), rounds=1)
    ratios = [ours / theirs for ours, theirs in zip(fused.samples, hook.samples, strict=True)]
    benchmark.extra_info |= {
        "fused, s": fused.samples,
        "hook, s": hook.samples,
        "median ratio": statistics.median(ratios),
    }
    assert statistics.median(ratios) <= 1.0, f"{statistics.median(ratios):.3f} times the hook's step"


def test_the_projection_is_faster_than_the_loop_that_it_replaces(benchmark) -> None:
    """The rivals are the paper's released loop and a loop over `torch.linalg.svd` with its defaults.

    The loop of thin SVDs is only recorded: on a CPU it takes milliseconds itself.
    """
    rows = benchmark.pedantic(
        measure_projection, args=(ProjectionCase(), CPU, list(PROJECTION_CONTENDERS)), kwargs={"rounds": 10}, rounds=1
    )
    median = {row.contender: row.median for row in rows}
    assert all(row.status == "ok" for row in rows), rows
    ratios = {name: value / median["fused"] for name, value in median.items()}
    benchmark.extra_info |= {"seconds": median, "times fused": ratios}
    assert min(ratios["svd-loop-square"], ratios["svd-loop-default"]) >= 20, ratios


def test_a_joint_step_costs_no_more_than_its_parts(benchmark) -> None:
    base = levels.build_base(CASE, CPU)
    names = ("unsteered", "fused", "lora", "joint-orth")
    timed = [timing.Timed(name, [levels.prepare_model(CASE, "train", name, base, CPU).call]) for name in names]
    for one in timed:
        one.prepare(CPU, graph=False)
    benchmark.pedantic(timing.interleave, args=(timed, CPU, PAIRS), rounds=1)
    rounds = zip(*(one.samples for one in timed), strict=True)
    ratios = [joint / (lora + fused - unsteered) for unsteered, fused, lora, joint in rounds]
    benchmark.extra_info |= {f"{one.name}, s": one.samples for one in timed} | {"median": statistics.median(ratios)}
    assert statistics.median(ratios) <= 1.02, f"{statistics.median(ratios):.3f} times the sum of its parts"


def test_a_training_step_with_fused_norms_is_no_slower_than_without(benchmark) -> None:
    base = levels.build_base(CASE, CPU)
    names = ("fused-norm", "fused")
    timed = [timing.Timed(name, [levels.prepare_model(CASE, "train", name, base, CPU).call]) for name in names]
    for one in timed:
        one.prepare(CPU, graph=False)
    benchmark.pedantic(timing.interleave, args=(timed, CPU, PAIRS), rounds=1)
    ratios = [ours / theirs for ours, theirs in zip(*(one.samples for one in timed), strict=True)]
    benchmark.extra_info |= {f"{one.name}, s": one.samples for one in timed} | {"median": statistics.median(ratios)}
    assert statistics.median(ratios) <= 1.0, f"{statistics.median(ratios):.3f} times the model's own norms"


@pytest.mark.parametrize("name", MODEL_CONTENDERS)
def test_bytes_kept_for_the_backward(benchmark, name: str) -> None:
    """No rival keeps fewer bytes than the fused op, and with fused norms it keeps fewer. Exact on any machine."""
    if name in (missing := absent()):
        pytest.skip(missing[name])
    if name == "hook-liger":
        pytest.skip("its kernels need a GPU")
    base = levels.build_base(CASE, CPU)

    def kept(which: str) -> int:
        return levels.kept_bytes(CASE, levels.prepare_model(CASE, "train", which, base, CPU).model, CPU)

    theirs = benchmark.pedantic(kept, args=(name,), rounds=1)
    benchmark.extra_info |= {"contender": name, "bytes kept": theirs}
    if name == "fused-norm":
        assert theirs < kept("fused") and theirs < kept("unsteered")
    else:
        assert name == "unsteered" or kept("fused") <= theirs


@pytest.mark.parametrize(
    "case",
    [case for case in cpu_cases() if isinstance(case, GroupedCase)],
    ids=lambda case: f"N{case.tokens}-d{case.hidden}-A{case.adapters}-{'prefill' if case.prefill else 'decode'}",
)
def test_an_adapter_for_each_token_is_no_slower_than_a_gather_and_makes_no_copies(benchmark, case: GroupedCase) -> None:
    rows = benchmark.pedantic(
        measure_grouped, args=(case, CPU, ["fused", "gather-bmm", "one-adapter"]), kwargs={"rounds": 80}, rounds=1
    )
    assert all(row.status == "ok" for row in rows), rows
    samples = {row.contender: row.samples for row in rows if row.what == "forward"}
    nbytes = {row.contender: row.samples[0] for row in rows if row.what == "bytes"}
    ratios = {
        name: statistics.median(ours / theirs for ours, theirs in zip(samples["fused"], samples[name], strict=True))
        for name in ("gather-bmm", "one-adapter")
    }
    benchmark.extra_info |= {"case": str(case), "seconds": samples, "times": ratios, "bytes": nbytes}
    copies = 2 * case.tokens * case.rank * case.hidden * 4
    assert nbytes["fused"] <= nbytes["gather-bmm"] - copies + 2 * case.unit_bytes
    assert ratios["gather-bmm"] <= 1.0, f"{ratios['gather-bmm']:.3f} times gather-bmm"
