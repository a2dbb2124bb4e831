"""Tests of the benchmarks: they measure the right calls, judge correctly, survive failures, and lose no results."""

import dataclasses
import gc
import importlib.util
import json
import runpy
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from _pytest.mark.expression import Expression
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
try:
    from bench import contenders, counters, geometries, goals, gpu, grouped, levels, serving, timing, vllm
    from bench.contenders import OP_CONTENDERS, Operands
    from bench.counted import Count, Counter, counted
    from bench.geometries import GroupedCase, ModelCase, OpCase, ProjectionCase, ServeCase
    from bench.grouped import GROUPED_CONTENDERS, measure_grouped
    from bench.projection import PROJECTION_CONTENDERS, check, measure_projection
    from bench.results import Results, Row, command_line, file_name, load, source_fingerprint
    from bench.serving import SERVE_CONTENDERS, SERVE_RUNS, measure_serving
finally:
    sys.path.remove(str(ROOT))

CPU = torch.device("cpu")
OP = OpCase(33, 64, 4, basis=3, dtype="float32")
MODEL = ModelCase("small", 1, 1, 8, dtype="float32")
MACHINE = {
    "kind": "gpu", "device": "A GPU", "commit": "c0ffee", "dirty": False, "sources": "s",
    "versions": {"torch": "2", "triton": "3"},
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- what is run


def test_bench_the_grid_is_that_of_real_models_and_whole():
    cases = geometries.op_grid()
    assert len(cases) == len(set(cases)) == 6 * 4 * 3 * 2 * 2 + 6
    assert {case.tokens for case in cases if case.reads == "branch"} == {1, 8, 64, 512, 4096, 16384}
    assert {case.tokens for case in cases} == {1, 8, 64, 512, 4096, 16384}
    assert {case.hidden for case in cases} == {1152, 2048, 2560, 4096}
    assert {case.rank for case in cases} == {1, 8, 64} and {case.basis for case in cases} == {0, 8}


def test_bench_gpu_run_covers_the_grid_and_every_geometry_and_begins_with_the_most_telling():
    steps = gpu.all_steps()
    assert len({(s.level, s.what, s.case) for s in steps}) == len(steps)
    assert {(s.what, s.case) for s in steps if s.level == "op"} == {
        (what, case) for what in levels.OP_PASSES for case in geometries.op_grid()
    }
    model = [s.case for s in steps if s.level == "model"]
    assert {case.geometry for case in model if case.layers} == set(geometries.REAL)
    assert {s.what for s in steps if s.level == "model" and not s.case.layers} == set(levels.MODEL_RUNS)
    assert {s.case for s in steps if s.level == "projection"} >= {ProjectionCase(32, 4096, 8, 8)}
    grouped = [s.case for s in steps if s.level == "grouped"]
    assert {c.tokens for c in grouped if not c.prefill} == {1, 8, 64, 256} and any(c.prefill for c in grouped)
    assert {c.adapters for c in grouped} >= {1, 16, 256}
    served = {(s.what, s.case.batch, s.case.adapters) for s in steps if s.level == "serve"}
    assert served >= {(what, 256, adapters) for what in SERVE_RUNS for adapters in (1, 16, 256)}
    assert {s.what for s in steps if s.level == "host"} == {"call", "pass", "train", "grouped", "compiled"}
    order = [(s.level, s.case.dtype, s.case.tokens) for s in steps if s.level in ("op", "accuracy")]
    assert order[0] == ("accuracy", "float16", 4096)
    telling = order[: order.index(("op", "bfloat16", 16384))]
    assert {tokens for level, _, tokens in telling if level == "op"} == {4096, 8}
    assert list(dict.fromkeys(s.level for s in steps))[:4] == ["accuracy", "op", "host", "model"]
    first = next(s for s in steps if s.level == "op")
    assert (first.what, first.case.tokens, first.case.rank, first.case.basis) == ("forward", 4096, 8, 0)
    assert set(first.names) == set(OP_CONTENDERS)
    assert [s.level for s in gpu.all_steps(counted=True)].count("counters") == 4


@pytest.mark.parametrize("what", levels.OP_PASSES)
def test_bench_every_contender_of_the_op_is_timed_in_turn(what):
    names = [name for name in OP_CONTENDERS if name != "hook-compiled"]
    rows = levels.measure_op(OP, what, CPU, names, rounds=3)
    assert [row.contender for row in rows] == names
    assert all(row.status == "ok" and len(row.samples) == 3 and min(row.samples) > 0 for row in rows)
    assert not any(row.replayed for row in rows) and {row.launches for row in rows} == {None}


def test_bench_the_run_itself_runs_on_the_kernels(monkeypatch):
    """A step of the GPU run checks the op against float64 and times it, here in the interpreter."""
    monkeypatch.setenv("FUSED_STEER_BACKEND", "triton")
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for what in levels.OP_PASSES:
        rows = levels.measure_op(OpCase(17, 32, 4, basis=2, dtype="float32"), what, where, ["fused", "hook"], rounds=1)
        assert [(row.contender, row.status, len(row.samples)) for row in rows] == [
            ("fused", "ok", 1),
            ("hook", "ok", 1),
        ]


@pytest.mark.parametrize("what", ["train", "prefill", "decode"])
def test_bench_models_are_steered_run_and_counted(what):
    rows = levels.measure_model(MODEL, what, CPU, ["unsteered", "fused", "hook", "lora"], rounds=2)
    timed = {row.contender: row for row in rows if row.level == "model"}
    assert all(row.status == "ok" and len(row.samples) == 2 for row in timed.values())
    kept = {row.contender: row.samples[0] for row in rows if row.what == "kept"}
    if what == "train":
        # Kept is a, (N, r) in float32. The output is kept anyway, as the next layer's input.
        assert kept["unsteered"] == 0 and kept["fused"] == 8 * MODEL.rank * 4 < kept["hook"]
    else:
        assert not kept


@pytest.mark.parametrize("reads", ["sum", "branch"])
def test_bench_backward_and_forward_of_the_fused_op_are_its_gradients(reads):
    """The timed backward pass computes the gradients of each set of operands."""
    case = dataclasses.replace(OP, reads=reads)
    sets = [contenders.make_operands(case, CPU, seed) for seed in range(2)]
    alone, both = (levels.op_calls(case, what, OP_CONTENDERS["fused"], sets) for what in ("backward", "both"))
    hooked = levels.op_calls(case, "both", OP_CONTENDERS["hook"], sets)
    for a, b, h in zip(alone, both, hooked, strict=True):
        for x, y, z in zip(a(), b(), h(), strict=True):
            assert torch.equal(x, y)
            torch.testing.assert_close(x, z, rtol=1e-4, atol=1e-4)
    assert not torch.equal(alone[0]()[0], alone[1]()[0])


def test_bench_counts_of_unsteered_hook_and_fused():
    """The counts of units and launches: PyTorch's dispatched operations, and the launcher's records."""
    found = {name: tuple((c.units, c.launches) for c in passes.values()) for name, passes in counted().items()}
    assert found == {
        "unsteered": ((3, 1), (0, 0)),
        "hook": ((8, 5), (7, 6)),
        "fused": ((3, 2), (4, 3)),
        "fused, few tokens": ((3, 1), (4, 3)),
    }


def test_bench_counts_follow_what_a_contender_does(monkeypatch):
    another = dataclasses.replace(OP_CONTENDERS["hook"], call=lambda: lambda x: contenders.hook(x) + x.branch)
    monkeypatch.setitem(OP_CONTENDERS, "hook", another)
    assert counted()["hook"]["forward"] == Count(8 + 3, 5 + 1)


def test_bench_a_basis_costs_nothing_of_the_hidden_states_size():
    def large(basis: int) -> int:
        case = OpCase(512, 64, 4, basis=basis, dtype="float32")
        x = contenders.make_operands(case, CPU)
        with Counter(512 * 64) as counter:
            for what in ("forward", "both"):
                levels.op_calls(case, what, OP_CONTENDERS["fused"], [x])[0]()
        return counter.large

    assert large(0) == large(8) > 0


# ------------------------------------------------------------------------------------------------ who is wrong or fails


def _wrong(x: Operands) -> torch.Tensor:
    return contenders.hook(x) * 1.01


def _failing(x: Operands) -> torch.Tensor:
    raise NotImplementedError("not today")


@pytest.mark.parametrize(("function", "status"), [(_wrong, "wrong: relative error"), (_failing, "failed: NotImpl")])
def test_bench_a_contender_that_is_wrong_or_fails_has_no_time_and_the_others_have(function, status, monkeypatch):
    monkeypatch.setattr(contenders, "fused", function)
    for name in ("fused", "fused-again"):
        contender = dataclasses.replace(OP_CONTENDERS[name], call=lambda: function)
        monkeypatch.setitem(OP_CONTENDERS, name, contender)
    rows = {r.contender: r for r in levels.measure_op(OP, "forward", CPU, ["fused", "fused-again", "hook"], rounds=2)}
    assert rows["fused"].status.startswith(status) and rows["fused-again"].status.startswith(status)
    assert not rows["fused"].samples and rows["hook"].status == "ok" and len(rows["hook"].samples) == 2


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


def test_bench_a_contender_with_a_wrong_gradient_has_no_backward_time(monkeypatch):
    contender = dataclasses.replace(
        OP_CONTENDERS["fused"], call=lambda: lambda x: _WrongGradient.apply(contenders.fused(x))
    )
    monkeypatch.setitem(OP_CONTENDERS, "fused", contender)
    status = {what: levels.measure_op(OP, what, CPU, ["fused"], rounds=1)[0].status for what in levels.OP_PASSES}
    assert status["forward"] == "ok"
    assert status["backward"].startswith("wrong: relative error 1.") and status["both"].startswith("wrong")


def test_bench_a_model_that_is_wrong_has_no_time(monkeypatch):
    wrong = dataclasses.replace(contenders.MODEL_CONTENDERS["fused"], steer=lambda model, rank: model)
    monkeypatch.setitem(contenders.MODEL_CONTENDERS, "fused", wrong)
    rows = {r.contender: r for r in levels.measure_model(MODEL, "prefill", CPU, ["fused", "hook"], rounds=1)}
    assert "differs from the hook" in rows["fused"].status and not rows["fused"].samples
    assert rows["hook"].status == "ok"


def _watch_models(monkeypatch) -> tuple[list, list[int]]:
    """Return weak references to every model that a contender steers and every call that is timed, and how many models
    of the measured size are alive each time that another is steered."""
    seen, alive = [], []

    def watched(steer):
        def call(model, rank):
            steered = steer(model, rank)
            seen.append(weakref.ref(steered))
            gc.collect()
            alive.append(sum(one() is not None for one in seen))
            return steered

        return call

    for name, contender in contenders.MODEL_CONTENDERS.items():
        replaced = dataclasses.replace(contender, steer=watched(contender.steer))
        monkeypatch.setitem(contenders.MODEL_CONTENDERS, name, replaced)
    real = levels.Timed

    def timed(*arguments):
        made = real(*arguments)
        seen.append(weakref.ref(made))
        return made

    monkeypatch.setattr(levels, "Timed", timed)
    return seen, alive


@pytest.mark.parametrize("group", contenders.MODEL_GROUPS)
@pytest.mark.parametrize("what", ["train", "decode"])
def test_bench_nothing_of_a_models_step_stays_alive(what, group, monkeypatch):
    names = contenders.MODEL_GROUPS[group]
    seen, alive = _watch_models(monkeypatch)
    rows = levels.measure_model(MODEL, what, CPU, names, rounds=1, check=what == "train")
    assert not [row.status for row in rows if row.status != "ok" and not row.status.startswith(("not run", "failed"))]
    assert len(seen) > len(names) and not [one for one in seen if one() is not None]
    assert max(alive) <= 2 * len(names)  # a model and its Timed for each contender


def test_bench_contenders_share_the_weights_of_one_model_and_leave_them_as_they_are():
    base = levels.build_base(MODEL, CPU)
    weights = {name: parameter.clone() for name, parameter in base.named_parameters()}
    shared = {parameter.data_ptr() for parameter in base.parameters()}
    for name in contenders.MODEL_CONTENDERS.keys() - contenders.absent().keys() - {"hook-liger"}:
        prepared = levels.prepare_model(MODEL, "train", name, base, CPU)
        prepared.call()
        own = sum(p.numel() for p in prepared.model.parameters() if p.data_ptr() not in shared)
        assert own < sum(weight.numel() for weight in weights.values()) / 4, name
        assert (own > 0) == (name != "unsteered")
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, weights[name]) and parameter.grad is None and not parameter.requires_grad


def test_bench_a_model_that_runs_out_of_memory_is_freed_and_the_others_go_on(monkeypatch):
    models = []

    def too_large(model, rank):
        steered = contenders.steer_hook(model, rank)
        models.append(weakref.ref(steered))
        try:
            raise RuntimeError("the first of two errors")
        except RuntimeError:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 EiB")  # noqa: B904

    monkeypatch.setitem(
        contenders.MODEL_CONTENDERS, "lora", dataclasses.replace(contenders.MODEL_CONTENDERS["lora"], steer=too_large)
    )
    prepare, freed = levels.prepare_model, []

    def prepare_model(case, what, name, base, device):
        freed.extend(model() is None for model in models)
        return prepare(case, what, name, base, device)

    monkeypatch.setattr(levels, "prepare_model", prepare_model)
    rows = levels.measure_model(MODEL, "prefill", CPU, ["unsteered", "lora", "hook"], rounds=2, check=False)
    assert [(row.contender, row.status, len(row.samples)) for row in rows] == [
        ("unsteered", "ok", 2),
        ("lora", "out of memory", 0),
        ("hook", "ok", 2),
    ]
    assert freed == [True]


def test_bench_out_of_memory_says_who_has_the_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 15 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 14 << 30)
    listed = "GPU:0\nprocess         12 uses    61000.000 MB GPU memory"
    monkeypatch.setattr(torch.cuda, "list_gpu_processes", lambda: listed)
    told = "of 80.0 GiB PyTorch has 15.0 (14.0 in tensors), others in and beside this process 64.0"
    told += "; process 12 uses 61000.000 MB GPU memory"
    assert levels.forgotten(torch.OutOfMemoryError("no")) == f"out of memory: {told}"
    assert levels.left_in_words(torch.device("cuda")) == [f"left: {told}"]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (79 << 30, 80 << 30))
    assert levels.left_in_words(torch.device("cuda")) == [] == levels.left_in_words(CPU)


def test_bench_a_goal_compares_contenders_of_one_group():
    def row(group: str, name: str, seconds: float) -> Row:
        case = dataclasses.asdict(ModelCase("Llama-3.2-1B", 0, 8, 512, group=group))
        return Row("model", "train", name, case, [seconds])

    def judged(*rows: Row) -> dict[str, float | None]:
        return {o.name: o.value for o in goals.evaluate(Results({**MACHINE, "kind": "gpu"}, rows=list(rows)))}

    usual, others = row("usual", "unsteered", 1.0), row("others", "unsteered", 2.0)
    assert judged(usual, others, row("usual", "fused", 1.01), row("others", "fused", 2.04))["train"] == 1.02
    assert judged(usual, row("others", "fused", 1.01))["train"] is None
    assert judged(usual, row("usual", "hook", 1.2), row("others", "fused", 1.0))["train / hook"] is None


def test_bench_every_contender_of_models_is_in_a_group_with_what_it_is_compared_with():
    groups = contenders.MODEL_GROUPS
    assert set().union(*groups.values()) == contenders.MODEL_CONTENDERS.keys()
    assert all(names[:2] == ("unsteered", "fused") and len(names) <= 6 for names in groups.values())
    steps = [s for s in gpu.all_steps() if s.level == "model" and not s.case.layers]
    assert [s.case.group for s in steps] == ["usual"] * 7 + ["others"] * 7
    assert steps[0].names == ("unsteered", "fused", "hook", "fused-norm", "lora", "joint-orth")


def test_bench_what_does_not_fit_is_out_of_memory_and_the_run_goes_on(monkeypatch, tmp_path):
    real = levels.make_operands

    def small_only(case, *rest):
        if case.tokens > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 EiB\nsomething")
        return real(case, *rest)

    monkeypatch.setattr(levels, "make_operands", small_only)
    results, saved = Results(MACHINE), []
    names = ("fused", "hook")
    steps = [gpu.Step(f"N={n}", "op", "forward", OpCase(n, 64, 4, dtype="float32"), names) for n in (33, 16)]
    assert gpu.measure(results, steps, CPU, lambda: saved.append(1), lambda: 1e9, 2, lambda _: None) == 0
    assert [row.status for row in results.rows] == ["out of memory"] * 2 + ["ok"] * 2 and len(saved) == 2


def test_bench_who_is_not_installed_is_listed_with_the_way_to_get_it(monkeypatch):
    found = importlib.util.find_spec
    rivals = ("liger_kernel", "peft", "pyreft", "pyvene")
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda n: None if n in rivals else found(n))
    missing = contenders.absent()
    assert missing.keys() == {"hook-liger", "lora", "joint-orth", "loreft"}
    assert "`pip install 'fused-steer[bench]'`" in missing["hook-liger"]
    assert "pip install --no-deps pyreft==0.1.0" in missing["loreft"]
    row = levels.measure_model(MODEL, "prefill", CPU, ["lora"], rounds=1, check=False)[0]
    assert row.status == f"not run: {missing['lora']}" and not row.samples


# --------------------------------------------------------------------------------------------------------------- goals


def _op_row(what: str, contender: str, seconds: float, **case) -> Row:
    sizes = {"tokens": 4096, "hidden": 2048, "rank": 8, "activation": "silu", "basis": 0, "dtype": "bfloat16", **case}
    return Row("op", what, contender, sizes, [seconds * 0.9, seconds, seconds * 1.1])


def _outcome(results: Results, name: str) -> goals.Outcome:
    return next(outcome for outcome in goals.evaluate(results) if outcome.name == name)


def test_bench_goals_are_judged_by_their_worst_case():
    rows = [_op_row("forward", "add", 1.0), _op_row("forward", "add", 1.0, hidden=4096)]
    results = Results(MACHINE, bandwidth=3 * 4096 * 2048 * 2 / 0.9, rows=[*rows, _op_row("forward", "fused", 1.1)])
    assert _outcome(results, "forward") == goals.Outcome(
        "forward", _outcome(results, "forward").text, pytest.approx(1.1), "<= 1.15", True
    )
    assert _outcome(results, "forward bandwidth").value == pytest.approx(0.9 / 1.1)
    assert _outcome(results, "forward bandwidth").met is False
    results.put(_op_row("forward", "fused", 1.3, hidden=4096))
    assert _outcome(results, "forward").value == pytest.approx(1.3) and _outcome(results, "forward").met is False
    # Few tokens and high ranks belong to other goals.
    results.put(_op_row("forward", "fused", 9.0, tokens=8))
    results.put(_op_row("forward", "fused", 1.4, rank=64))
    results.put(_op_row("forward", "add", 1.0, rank=64))
    assert _outcome(results, "forward").value == pytest.approx(1.3)
    assert _outcome(results, "rank 64").value == pytest.approx(1.4 / 1.1)
    assert _outcome(results, "basis").met is None
    results.put(_op_row("forward", "fused", 1.2, basis=8))
    assert _outcome(results, "basis").value == pytest.approx(1.2 / 1.1) and _outcome(results, "basis").met is False


def test_bench_every_contender_of_the_projection_leaves_the_same():
    case = ProjectionCase(3, 96, 5, 4)
    rows = measure_projection(case, CPU, list(PROJECTION_CONTENDERS), rounds=3)
    assert [row.contender for row in rows] == list(PROJECTION_CONTENDERS)
    assert all(row.status == "ok" and len(row.samples) == 3 for row in rows), rows


def test_bench_a_contender_of_the_projection_that_does_nothing_is_found_out(monkeypatch):
    monkeypatch.setitem(PROJECTION_CONTENDERS, "fused", lambda matrices: lambda: None)
    assert check(ProjectionCase(3, 96, 5, 4), "fused", CPU).startswith("wrong: it differs")
    (row,) = measure_projection(ProjectionCase(3, 96, 5, 4), CPU, ["fused"])
    assert row.status.startswith("wrong") and not row.samples


GROUPED = GroupedCase(24, 64, 6, dtype="float32")
SERVED = ServeCase("small", 1, 3, 8, 2, dtype="float32")


@pytest.mark.parametrize("case", [GROUPED, dataclasses.replace(GROUPED, prefill=True)], ids=["decode", "prefill"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bench_an_adapter_for_each_token_is_timed_against_its_rivals_and_what_they_make_counted(
    case, backend, monkeypatch
):
    where = torch.device("cuda" if torch.cuda.is_available() and backend == "triton" else "cpu")
    monkeypatch.setenv("FUSED_STEER_BACKEND", backend)
    rows = measure_grouped(case, where, list(GROUPED_CONTENDERS), rounds=2)
    times, made = ([row for row in rows if row.what == what] for what in ("forward", "bytes"))
    assert [row.contender for row in times] == list(GROUPED_CONTENDERS)
    assert all(row.status == "ok" and len(row.samples) == 2 for row in times), times
    nbytes = {row.contender: row.samples[0] for row in made}
    copies = 2 * case.tokens * case.rank * case.hidden * 4
    assert nbytes["gather-bmm"] > copies and nbytes["add"] == 0
    if where.type == "cuda" or backend == "torch":  # Triton's interpreter allocates more tensors
        assert nbytes["fused"] < copies


def test_bench_tokens_and_adapters_are_as_the_case_says():
    mixed, together = (grouped.make_tables(dataclasses.replace(GROUPED, prefill=p), CPU).ids for p in (False, True))
    for ids in (mixed, together):
        assert torch.bincount(ids, minlength=6).tolist() == [4] * 6
    assert (together.diff() != 0).sum() == 5 < (mixed.diff() != 0).sum()


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda x: grouped.gather_bmm(x) * 1.01, "wrong: relative error"),
        (lambda x: grouped.gather_bmm(dataclasses.replace(x, ids=x.ids.clamp(min=0))), "wrong: relative error"),
        (lambda x: grouped.gather_bmm(x) + 1e-7, "wrong: a token without adapter is changed"),
    ],
    ids=["values", "no adapter", "bits"],
)
def test_bench_a_grouped_contender_that_is_wrong_has_no_time(change, status, monkeypatch):
    monkeypatch.setitem(GROUPED_CONTENDERS, "fused", grouped.GroupedContender(change))
    row = measure_grouped(GROUPED, CPU, ["fused"], rounds=1)[0]
    assert row.status.startswith(status) and not row.samples


@pytest.mark.parametrize("what", SERVE_RUNS)
def test_bench_a_batch_served_is_timed_a_token(what):
    rows = measure_serving(SERVED, what, CPU, list(SERVE_CONTENDERS), rounds=2)
    assert [row.contender for row in rows] == list(SERVE_CONTENDERS)
    assert all(row.status == "ok" and len(row.samples) == 2 for row in rows), rows


def test_bench_rows_that_are_not_steered_have_no_time(monkeypatch):
    monkeypatch.setitem(SERVE_CONTENDERS, "fused", serving.by_one_adapter)
    rows = {r.contender: r for r in measure_serving(SERVED, "generate", CPU, ["unsteered", "fused"], rounds=1)}
    assert "differs from gather-bmm" in rows["fused"].status and not rows["fused"].samples
    assert rows["unsteered"].samples


def test_bench_goals_of_serving():
    def case(adapters: int) -> dict:
        return dataclasses.asdict(ServeCase("Llama-3.2-1B", 0, 256, 256, adapters))

    seconds = {256: (1.0, 1.01, 1.12), 1: (1.0, 1.01, 1.015)}
    names = ("unsteered", "one-adapter", "fused")
    rows = [
        Row("serve", "decode-graph", name, case(adapters), [value], replayed=True)
        for adapters, values in seconds.items()
        for name, value in zip(names, values, strict=True)
    ]
    judged = {o.name: (o.value, o.met) for o in goals.evaluate(Results(MACHINE, rows=rows))}
    assert judged["serving"] == (pytest.approx(1.12), False)
    assert judged["256 adapters"] == (pytest.approx(1.12 / 1.01), False)
    judged = {o.name: (o.value, o.met) for o in goals.evaluate(Results(MACHINE, rows=rows[3:]))}
    assert judged["serving"] == (pytest.approx(1.015), True) and judged["256 adapters"] == (None, None)


@pytest.mark.parametrize("adapters", [0, 4])
def test_bench_more_adapters_than_rows_are_refused(adapters):
    with pytest.raises(ValueError, match=f"adapters is {adapters}; expected 1 to 3"):
        dataclasses.replace(SERVED, adapters=adapters)


def test_bench_what_vllm_answers_is_looked_at():
    case = ServeCase("small", 0, 20, 8, 2, dtype="float32")
    base, one, two = ([[n, row] for row in range(20)] for n in range(3))
    mixed = [(one, two)[row % 2][row] for row in range(20)]
    right = {"unsteered": base, "no-adapter": base, "one-adapter": one, "fused": mixed, "fused-again": mixed}
    assert vllm.wrong(case, right) == {}
    few, many = ([*base[:n], *mixed[n:]] for n in (2, 3))
    assert "first adapter" in vllm.wrong(case, right | {"fused": few})["fused"]
    assert "3 rows have the unsteered" in vllm.wrong(case, right | {"fused": many})["fused"]
    assert "unsteered tokens" in vllm.wrong(case, right | {"one-adapter": base})["one-adapter"]
    assert "without the plug-in" in vllm.wrong(case, right | {"no-adapter": one})["no-adapter"]
    in_bf16 = dataclasses.replace(case, dtype="bfloat16")
    assert vllm.wrong(in_bf16, right | {"fused": few, "no-adapter": one}) == {}


@pytest.mark.parametrize("module", [serving, vllm], ids=["serving", "vllm"])
def test_bench_bad_input_to_what_measures_serving_is_one_line(module, tmp_path, monkeypatch):
    import typer

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    app = typer.Typer()
    app.command()(module.main)
    taken = tmp_path / "taken"
    taken.write_text("")
    bad = [(("--out", taken), "a file; expected a directory"), (("--out", tmp_path, "--rounds", 0), "at least 1")]
    if module is vllm:
        bad += [
            (("--out", tmp_path, "--batches", "8"), "batches is '8'; expected rows:adapters"),
            (("--out", tmp_path, "--batches", "8:9"), "batches has 8:9; expected 1 to 8 adapters"),
            (("--out", tmp_path, "--geometry", "Llama-9"), "geometry is 'Llama-9'; expected one of"),
        ]
    for arguments, expected in bad:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == 1 and expected in result.stderr and result.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_bench_serving_on_a_cpu_is_measured_into_a_file_of_its_own(tmp_path, monkeypatch):
    import typer

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(serving, "cpu_cases", lambda: [GROUPED, SERVED])
    app = typer.Typer()
    app.command()(serving.main)
    result = CliRunner().invoke(app, ["--out", str(tmp_path), "--rounds", "1"])
    assert result.exit_code == 0, result.output
    (file,) = tmp_path.iterdir()
    found = load(file)
    assert {row.level for row in found.rows} == {"grouped", "serve"} and file.name.endswith("-serving.json")
    assert found.machine["command"].startswith("python -m bench.serving")
    assert "gather-bmm" in result.output and "x)" in result.output


def test_bench_goals_of_joint_adaptation():
    size = dataclasses.asdict(ProjectionCase())
    train = dataclasses.asdict(ModelCase("Llama-3.2-1B", 0, 8, 512))
    seconds = {"unsteered": 1.0, "fused": 1.1, "lora": 1.5, "joint-orth": 1.632}
    rows = [Row("model", "train", name, train, [value]) for name, value in seconds.items()]
    rows += [Row("projection", "step", name, size, [s]) for name, s in (("fused", 9e-5), ("svd-loop", 8e-3))]
    judged = {o.name: (o.value, o.met) for o in goals.evaluate(Results(MACHINE, rows=rows))}
    assert judged["joint"] == (pytest.approx(1.02), True)
    assert judged["projection"] == (pytest.approx(90), True)
    assert judged["projection / svd"] == (pytest.approx(8e-3 / 9e-5), False)


def test_bench_model_goals():
    case = dataclasses.asdict(ModelCase("Llama-3.2-1B", 0, 8, 512))
    unit = 8 * 512 * 2048 * 2
    rows = [
        Row("model", "train", "fused", case, [1.02]),
        Row("model", "train", "unsteered", case, [1.0]),
        Row("model", "train", "hook", case, [1.1]),
        Row("memory", "peak", "fused", case, [16 * unit * 0.5]),
        Row("memory", "peak-total", "fused", {**case, "checkpointing": True}, [1010]),
        Row("memory", "peak-total", "unsteered", {**case, "checkpointing": True}, [1000]),
        Row("model", "decode-graph", "fused", {**case, "batch": 1}, [1.01], replayed=True),
        Row("model", "decode-graph", "unsteered", {**case, "batch": 1}, [1.0], replayed=True),
    ]
    results = Results(MACHINE, rows=rows)
    judged = {o.name: (o.value, o.met) for o in goals.evaluate(results)}
    assert judged["train"] == (pytest.approx(1.02), True)
    assert judged["train / hook"] == (pytest.approx(1.1 / 1.02), False)
    assert judged["peak memory"] == (pytest.approx(0.5), True)
    assert judged["peak, checkpointing"] == (pytest.approx(1.0), False)
    assert judged["decode"] == (pytest.approx(1.01), True)
    assert len(list(gpu.goal_lines(results))) <= 40


def test_bench_host_goals_go_by_the_lower_decile_and_an_eager_call_counts_for_its_goal_at_most():
    case = dataclasses.asdict(geometries.HostCase(layers=8))

    def rows(what, **lows):
        return [Row("host", what, n.replace("_", "-"), case, [low] * 2 + [9.0] * 9) for n, low in lows.items()]

    found = rows("call", fused=0.6, hook=1.0) + rows("train", fused=0.6, hook=1.0) + rows("pass", fused=0.9, hook=1.0)
    found += rows("grouped", fused=0.3, gather_bmm=1.0) + rows("compiled", fused=0.8, eager=3.0, hook=1.0, off=0.1)
    judged = {o.name: (o.value, o.met) for o in goals.judge(goals.HOST_GOALS, Results({"kind": "stub"}, rows=found))}
    assert judged == {
        "host": (pytest.approx(0.6), False),
        "host, pass": (pytest.approx(0.9), False),
        "host, training": (pytest.approx(0.6), True),
        "host, rows": (pytest.approx(0.3), True),
        "host, compiled": (pytest.approx((0.8 - 0.1) / 0.5), True),
    }
    found = rows("compiled", fused=0.8, eager=0.4, hook=1.0, off=0.1)
    judged = {o.name: (o.value, o.met) for o in goals.judge(goals.HOST_GOALS, Results({"kind": "stub"}, rows=found))}
    assert judged["host, compiled"] == (pytest.approx(0.7 / 0.4), False) and judged["host"] == (None, None)


def test_bench_a_cpu_meets_no_goal():
    rows = [_op_row("forward", "add", 1.0), _op_row("forward", "fused", 1.0)]
    outcomes = goals.evaluate(Results({**MACHINE, "kind": "cpu"}, bandwidth=1.0, rows=rows))
    assert {(outcome.value, outcome.met) for outcome in outcomes} == {(None, None)}


# --------------------------------------------------------------------------------------------------------------- timing


def test_bench_contenders_take_turns_and_every_call_has_its_own_inputs():
    order = []
    timed = [timing.Timed(n, [lambda n=n, i=i: order.append(f"{n}{i}") for i in range(2)]) for n in "ab"]
    for one in timed:
        one.prepare(CPU, graph=True)
    order.clear()
    timing.interleave(timed, CPU, 40)
    rounds = {tuple(order[start : start + 4]) for start in range(0, 160, 4)}
    assert rounds == {("a0", "a1", "b0", "b1"), ("b0", "b1", "a0", "a1")}
    assert [len(one.samples) for one in timed] == [40, 40]
    firsts = [timing.in_turn("abcd", number)[0] for number in range(400)]
    assert all(60 < firsts.count(name) < 140 for name in "abcd")


def addresses(outputs):
    """Return the addresses of all tensors in a call's result."""
    if isinstance(outputs, torch.Tensor):
        return [outputs.data_ptr()]
    return [address for output in outputs for address in addresses(output)]


@pytest.mark.parametrize("what", levels.OP_PASSES)
def test_bench_outputs_of_the_calls_of_a_sample_lie_apart(what):
    """The outputs of a sample's calls do not share memory. Reused memory would still be in the cache."""
    case = OpCase(256, 64, 4, dtype="float32")
    sets = [contenders.make_operands(case, CPU, seed) for seed in range(6)]
    for name in OP_CONTENDERS.keys() - {"hook-compiled"}:
        written = []
        calls = levels.op_calls(case, what, OP_CONTENDERS[name], sets)

        def noted(call, written=written):
            outputs = call()
            written.extend(addresses(outputs))
            return outputs

        timed = timing.Timed(name, [lambda call=call: noted(call) for call in calls])
        timed.prepare(CPU, graph=True)
        written.clear()
        timed.sample(CPU)
        of_call = {"forward": 1, "backward": 3, "both": 3}[what]
        if not OP_CONTENDERS[name].steers:
            of_call = 2 if what == "both" else 1  # outputs of the floor
        assert len(written) == of_call * len(sets) == len(set(written)), name


def test_bench_outputs_of_the_grouped_op_lie_apart():
    case = GroupedCase(64, 64, 4, dtype="float32")
    written = []
    for contender in GROUPED_CONTENDERS.values():
        calls = [grouped._without_gradient(contender.call, grouped.make_tables(case, CPU, seed)) for seed in range(4)]
        outputs = timing.Timed("", calls)._all()
        written.append(len(set(addresses(outputs))))
    assert set(written) == {4}


def test_bench_inputs_rotate_until_none_is_in_the_cache():
    assert timing.input_sets(1 << 20, 50 << 20) == 100
    assert timing.input_sets(1 << 30, 50 << 20) == 2
    assert timing.input_sets(16, 50 << 20) == timing.MAX_SETS


def test_bench_kept_bytes_are_counted_once_and_without_parameters():
    model = torch.nn.Linear(8, 4, bias=False)
    x = torch.randn(3, 8, requires_grad=True)
    with timing.counting_kept(model, x) as kept:
        y = model(x)  # keeps x and the weight, neither counted
        assert kept() == 0
        z = y.sigmoid()
        _ = z * z  # keeps z, twice the same storage
        assert kept() == 3 * 4 * 4


def test_bench_kept_bytes_are_freed_after_they_are_counted():
    """A node that kept its own output by a hook would never be freed, nor would the whole graph before it."""
    model = levels.train_call(MODEL, levels.build_base(MODEL, CPU), CPU).model

    def living() -> int:
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    before = living()
    assert levels.kept_bytes(MODEL, model, CPU) > 0
    assert living() == before


# ----------------------------------------------------------------------------------------------------- files, resuming


def test_bench_results_come_back_as_they_were(tmp_path):
    results = Results(MACHINE, 1e12, {"loreft": "not installed"}, {"exit": 0}, [_op_row("forward", "fused", 1.0)])
    file = tmp_path / "new" / file_name("NVIDIA H100 80GB HBM3")
    assert file.name == "nvidia-h100-80gb-hbm3.json"
    results.save(file)
    assert load(file) == results and [p.name for p in file.parent.iterdir()] == [file.name]


def test_bench_a_save_that_fails_leaves_the_file_as_it_was(tmp_path):
    file = tmp_path / "r.json"
    Results(MACHINE).save(file)
    before = file.read_bytes()
    with pytest.raises(TypeError):
        Results({**MACHINE, "device": object()}).save(file)
    assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "is no JSON"),
        ("[]", "has schema None; expected 1"),
        ('{"schema": 0}', "has schema 0; expected 1"),
        ('{"schema": 1, "rows": []}', "has the keys ['rows']; expected"),
        (json.dumps({"schema": 1, **dataclasses.asdict(Results(MACHINE)), "rows": [{}]}), "a malformed row"),
    ],
)
def test_bench_a_file_that_is_no_results_file_is_refused(content, expected, tmp_path):
    file = tmp_path / "r.json"
    file.write_text(content)
    with pytest.raises(ValueError) as caught:
        load(file)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_bench_a_run_goes_on_where_it_was_stopped():
    steps = [gpu.Step(str(n), "op", "forward", OpCase(n, 64, 4, dtype="float32"), ("fused", "add")) for n in (5, 6, 7)]
    results, left = Results(MACHINE), iter([1e9, 0.0])
    assert gpu.measure(results, steps, CPU, lambda: None, lambda: next(left), 1, lambda _: None) == 2
    first = [row.samples for row in results.rows]
    said: list[str] = []
    assert gpu.measure(results, steps, CPU, lambda: None, lambda: 1e9, 1, said.append) == 0
    assert len(said) == 2 and len(results.rows) == 6 and [row.samples for row in results.rows[:2]] == first


def test_bench_gpu_run_goes_on_after_a_step_that_fails(monkeypatch):
    steps = [gpu.Step(str(n), "op", "forward", OpCase(n, 64, 4, dtype="float32"), ("fused", "add")) for n in (5, 6)]
    measured = levels.measure_op

    def fails_first(case, *arguments):
        if case.tokens == 5:
            raise TypeError("a wrong argument")
        return measured(case, *arguments)

    monkeypatch.setattr(levels, "measure_op", fails_first)
    results = Results(MACHINE)
    assert gpu.measure(results, steps, CPU, lambda: None, lambda: 1e9, 1, lambda _: None) == 0
    assert [row.status for row in results.rows] == ["failed: TypeError: a wrong argument"] * 2 + ["ok"] * 2


FAILED = """\
==================================== ERRORS ====================================
___________________ ERROR collecting tests/test_positions.py ___________________
ImportError while importing test module 'tests/test_positions.py'.
E   ModuleNotFoundError: No module named 'trl'
=================================== FAILURES ===================================
____________________________ test_a[gpu-few tokens] ____________________________
[gw1] linux -- Python 3.12.3 python
E       assert False
E        +  where False = equal(1, 2)
_________________________________ Some.test_b __________________________________
E   torch.OutOfMemoryError: CUDA out of memory.
=========================== short test summary info ============================
FAILED tests/test_a.py::test_a[gpu-few tokens] - assert False
FAILED tests/test_a.py::Some::test_b - torch.OutOfMemoryError: CUDA out...
FAILED tests/test_a.py::test_c - worker 'gw0' crashed
ERROR tests/test_positions.py
2 failed, 1 error in 3.00s
"""


def test_bench_gpu_tests_that_fail_are_listed_with_the_last_line_of_their_error(monkeypatch, tmp_path):
    asked = {}

    def run(command, **options):
        asked.update(options, command=command)
        return subprocess.CompletedProcess(command, 1, stdout=FAILED)

    monkeypatch.setattr(gpu.subprocess, "run", run)
    monkeypatch.setattr(gpu, "TRANSCRIPT", 2000)
    results, file = Results(MACHINE), tmp_path / "out" / "gpu-tests.txt"
    assert gpu.test_groups(results, ["fp16"], lambda: None, lambda: 1e9, lambda _: None, file) == 0
    assert results.tests["failures"] == [
        "tests/test_a.py::test_a[gpu-few tokens] - +  where False = equal(1, 2)",
        "tests/test_a.py::Some::test_b - torch.OutOfMemoryError: CUDA out of memory.",
        "tests/test_a.py::test_c - worker 'gw0' crashed",
        "tests/test_positions.py - ModuleNotFoundError: No module named 'trl'",
    ]
    assert asked["env"]["COLUMNS"] == "400" and "-rfE" in asked["command"]
    assert file.read_text() == f"==== gpu tests, fp16\n{FAILED}\n" and "output" not in results.tests["groups"]["fp16"]
    assert gpu.test_groups(results, ["post_block"], lambda: None, lambda: 1e9, lambda _: None, file) == 0
    assert file.stat().st_size == 2000 and file.read_text().endswith(f"==== gpu tests, post_block\n{FAILED}\n")


def test_bench_gpu_tests_go_on_with_the_group_where_they_were_stopped(monkeypatch):
    ran, saved, exits = [], [], iter([0, None, 1, 0])

    def group(which, seconds):
        ran.append(which)
        return {"exit": next(exits), "passed": 3, "failures": [], "tail": "", "seconds": 1.0, "output": ""}

    monkeypatch.setattr(gpu, "run_gpu_tests", group)
    results, names = Results(MACHINE), list(gpu.TEST_GROUPS)

    def run(some, seconds=1e9):
        return gpu.test_groups(results, some, lambda: saved.append(1), lambda: seconds, lambda _: None)

    assert run(names[:2]) == 1
    assert results.tests["exit"] is None and results.tests["passed"] == 6 and len(saved) == 2
    assert run(names) == 0
    assert ran == [gpu.TEST_GROUPS[name] for name in (*names[:2], *names[1:])]
    assert results.tests["exit"] == 1 and results.tests["passed"] == 9
    assert run(names) == 0 and len(ran) == 4
    results.tests["groups"][names[0]]["tests"] = "others"
    assert run(names, seconds=0.0) == 1 and len(ran) == 4


@pytest.mark.parametrize(
    ("file", "test", "group"),
    [
        ("test_post_block.py", "test_a[gpu-torch.float16]", "fp16"),
        ("test_grouped.py", "test_b[gpu-fp16]", "fp16"),
        ("test_post_block.py", "test_a[gpu-torch.bfloat16]", "post_block"),
        ("test_batch.py", "test_c[gpu]", "others"),
    ],
)
def test_bench_gpu_test_groups_take_each_test_once(file, test, group):
    def has(name, **_):  # as pytest reads -k
        return name in file or name in test

    assert [name for name, k in gpu.TEST_GROUPS.items() if Expression.compile(k).evaluate(has)] == [group]


NCU = """\
==PROF== Connected to process 1
"ID","Kernel Name","lts__t_sector_hit_rate.pct","dram__bytes_read.avg","dram__bytes_read.sum",\
"smsp__average_warps_issue_stalled_wait_per_issue_active.ratio"
"","","%","byte","byte","inst"
"0","forward_kernel(int, int)","48.5","12.5","1,024","0.75"
"""


def test_bench_counters_are_read_by_kernel():
    assert counters.read(NCU) == [
        ("forward_kernel", {counters.L2_HIT_RATE: 48.5, "dram__bytes_read.sum": 1024.0, "stall wait": 0.75})
    ]
    for text, said in (
        ("==ERROR== ERR_NVGPUCTRPERM\n", "gave no table: ==ERROR== ERR_NVGPUCTRPERM"),
        ("\n".join(NCU.splitlines()[:3]), "counted no launch"),
    ):
        with pytest.raises(ValueError, match=said):
            counters.read(text)


def test_bench_counters_that_cannot_be_read_are_a_row_that_says_so(monkeypatch):
    done = subprocess.CompletedProcess([], 1, stdout="==ERROR== no permission\n", stderr="")
    monkeypatch.setattr(counters.subprocess, "run", lambda *a, **k: done)
    (row,) = counters.measure_counters(OP, "forward")
    assert row.status == "failed: ncu gave no table: ==ERROR== no permission" and not row.samples


def test_bench_accuracy_is_pooled_over_draws(monkeypatch):
    errors = iter([[(3.0, 1.0)], [(4.0, 1.0)], [(0.0, 1.0)], [(0.0, 1.0)]])
    monkeypatch.setattr(levels, "op_errors", lambda *arguments: next(errors))
    (row,) = levels.measure_accuracy(dataclasses.replace(OP, dtype="float16"), CPU)
    assert row.samples == [2.5]
    judged = {o.name: (o.value, o.met) for o in goals.evaluate(Results(MACHINE, rows=[row]))}
    assert judged["fp16 error"] == (2.5, False)


@pytest.fixture
def command(monkeypatch, tmp_path):
    import typer

    app = typer.Typer()
    app.command()(gpu.main)
    few = [gpu.Step("op", "op", "forward", OpCase(5, 64, 4, dtype="float32"), ("fused", "add"))]
    monkeypatch.setattr(gpu, "smoke_steps", lambda: few)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


def test_bench_the_command_ends_with_the_goals_and_goes_on(command, tmp_path):
    first = command("--smoke", "--out", tmp_path)
    assert first.exit_code == 0, first.output
    assert len(first.output.splitlines()) <= 40 and "not measured" in first.output
    (file,) = tmp_path.iterdir()
    before = load(file)
    assert before.machine["kind"] == "cpu" and before.machine["versions"]["torch"] == torch.__version__
    assert command("--smoke", "--out", tmp_path).exit_code == 0
    assert load(file).rows == before.rows


def test_bench_an_interrupted_run_keeps_what_it_measured(command, tmp_path, monkeypatch):
    def interrupt(results, steps, device, save, *rest, **options):
        results.put(_op_row("forward", "fused", 1.0))
        save()
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "measure", interrupt)
    result = command("--smoke", "--out", tmp_path)
    assert result.exit_code == 1 and "interrupted" in result.output
    assert len(load(next(tmp_path.iterdir())).rows) == 1


def test_bench_bad_input_is_one_clear_line_and_nothing_is_written(command, tmp_path):
    folder = tmp_path / "out"
    taken = tmp_path / "taken"
    taken.write_text("")
    for arguments, expected in (
        (("--out", folder), "there is no CUDA or ROCm GPU; expected one"),
        (("--smoke", "--out", taken), "a file; expected a directory"),
        (("--smoke", "--out", folder, "--minutes", "0"), "minutes is 0.0; expected more than 0"),
        (("--smoke", "--out", folder, "--part", "all"), "part is 'all'; expected one of tests, measure"),
    ):
        result = command(*arguments)
        assert result.exit_code == 1 and expected in result.stderr and result.stderr.count("\n") == 1
    assert not folder.exists()


def test_bench_results_of_other_sources_are_not_mixed_with_these(command, tmp_path):
    assert command("--smoke", "--out", tmp_path).exit_code == 0
    (file,) = tmp_path.iterdir()
    results = load(file)
    results.machine["sources"] = "others"
    results.save(file)
    before = file.read_bytes()
    result = command("--smoke", "--out", tmp_path)
    assert result.exit_code == 1 and "measured with sources 'others'; expected" in result.stderr
    assert result.stderr.count("\n") == 1 and file.read_bytes() == before


def test_bench_fingerprint_changes_with_any_source_in_any_folder(tmp_path):
    files = [tmp_path / name for name in ("kernels/a.py", "fused_steer/model/layer.py", "bench/stub/driver.py")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1")
    seen = {source_fingerprint(tmp_path)}
    for file in files:
        file.write_text("2")
        seen.add(source_fingerprint(tmp_path))
    assert len(seen) == 1 + len(files) and source_fingerprint() == source_fingerprint(ROOT)


@pytest.mark.parametrize(("field", "value"), [("geometry", "Llama-9"), ("dtype", "int8")])
def test_bench_an_unknown_model_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} is '{value}'; expected one of"):
        dataclasses.replace(MODEL, **{field: value})


def test_bench_an_unknown_run_or_contender_is_refused():
    with pytest.raises(ValueError, match="run is 'sleep'; expected one of train"):
        levels.prepare_model(MODEL, "sleep", "fused", None, CPU)
    with pytest.raises(ValueError, match="contender is 'magic'; expected one of unsteered"):
        levels.prepare_model(MODEL, "train", "magic", None, CPU)


def test_bench_a_checkout_runs_without_being_installed():
    """`bench.checkout` runs from the checkout alone, without the paths that an installation adds to sys.path."""
    program = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; "
        "import bench; from fused_steer.kernels import post_block; from fused_steer import patch_model, post_block; "
        "import fused_steer.kernels.aot; print(fused_steer.kernels.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(ROOT / "kernels" / "__init__.py")


def test_bench_a_checkouts_tests_find_it_in_every_process(monkeypatch):
    given = []
    monkeypatch.setattr(pytest, "main", lambda arguments: given.extend(arguments) or 7)
    monkeypatch.setattr(sys, "argv", ["checkout", "-m", "gpu", "-n", "2"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "bench" / "checkout.py"), run_name="__main__")
    assert ended.value.code == 7 and given == ["-p", "bench.checkout", "-m", "gpu", "-n", "2"]


def test_bench_every_geometry_is_one_that_patch_model_takes():
    for name in geometries.REAL:
        with torch.device("meta"):
            model = contenders.build(name, 2, "bfloat16", torch.device("meta"), 64)
        assert model.config.hidden_size in geometries.WIDTHS
        from fused_steer import patch_model

        patch_model(model)
        assert {row.kind for row in model.steering.report()} == {"fused"}


def test_bench_the_recorded_command_names_no_folder_of_a_machine(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["bench.study", "--out", str(tmp_path / "out"), "--groups", "sites"])
    assert command_line("bench.study") == "python -m bench.study --out out --groups sites"
