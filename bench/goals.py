"""The performance goals on an H100 in bf16, and their judgement from a run. The worst case of each goal counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from .geometries import DTYPES, GEOMETRIES
from .levels import FLOOR_UNITS
from .results import Results, Row

MANY_TOKENS = (4096, 16384)
LOW_RANKS = (1, 8)
FEW_TOKENS = (1, 8, 64)
WHOLE = {"geometry": "Llama-3.2-1B", "layers": 0}
HOST_CALL = 0.5  # of the hooked block's host time
PROJECTION = {"layers": 32, "hidden": 4096, "writers": 8, "rank": 8}


@dataclass(frozen=True)
class Goal:
    """A performance goal.

    Attributes:
        limit, at_most: the goal is met if value <= limit or, without `at_most`, if value >= limit.
        measure: returns the worst value in the results, or None if nothing was measured.
    """

    name: str
    text: str
    limit: float
    at_most: bool
    measure: Callable[[Results], float | None]


@dataclass(frozen=True)
class Outcome:
    """The judgement of a goal. `met` is None if nothing was measured."""

    name: str
    text: str
    value: float | None
    limit: str
    met: bool | None


def _worst(values: Iterable[float], at_most: bool) -> float | None:
    found = list(values)
    return (max(found) if at_most else min(found)) if found else None


def _pairs(
    results: Results, level: str, what: str, contender: str, other: str, **case: object
) -> Iterator[tuple[Row, Row]]:
    """Yield pairs of rows of two contenders on the same case."""
    for row in results.find(level, what, contender, **case):
        for against in results.find(level, what, other, **row.case):
            yield row, against


def _ratio(row: Row, other: Row) -> float:
    assert row.median is not None and other.median is not None
    return row.median / other.median


def _many(row: Row) -> bool:
    case = row.case
    return (
        case["tokens"] in MANY_TOKENS
        and case["rank"] in LOW_RANKS
        and not case["basis"]
        and case["dtype"] == "bfloat16"
    )


def _op_ratio(what: str, contender: str, other: str, at_most: bool) -> Callable[[Results], float | None]:
    return lambda results: _worst(
        (_ratio(a, b) for a, b in _pairs(results, "op", what, contender, other) if _many(a)), at_most
    )


def floor_seconds(results: Results, row: Row) -> float:
    """Return the seconds that this row's pass takes at least: its least traffic at the measured copy bandwidth."""
    assert results.bandwidth is not None
    unit = row.case["tokens"] * row.case["hidden"] * DTYPES[row.case["dtype"]].itemsize
    return FLOOR_UNITS[row.what] * unit / results.bandwidth


def _over_floor(what: str) -> Callable[[Results], float | None]:
    def measure(results: Results) -> float | None:
        rows = [row for row in results.find("op", what, "fused") if _many(row)] if results.bandwidth else []
        return _worst((row.median / floor_seconds(results, row) for row in rows), True)

    return measure


def _fp16_error(results: Results) -> float | None:
    rows = results.find("accuracy", "error", "fused", dtype="float16")
    return _worst((ratio for row in rows for ratio in row.samples), True)


def _bandwidth_share(results: Results) -> float | None:
    over = _over_floor("forward")(results)
    return None if over is None else 1 / over


def _against(results: Results, changed: str, value: int, usual: int) -> float | None:
    """Return the worst ratio of times with many tokens: the field `changed` at `value` over the same at `usual`."""
    ratios = []
    for what in ("forward", "backward"):
        for row in results.find("op", what, "fused", **{changed: value}):
            if row.case["tokens"] in MANY_TOKENS and (changed == "rank" or row.case["rank"] in LOW_RANKS):
                for other in results.find("op", what, "fused", **{**row.case, changed: usual}):
                    ratios.append(_ratio(row, other))
    return _worst(ratios, True)


def _decode(results: Results) -> float | None:
    ratios = [
        _ratio(a, b)
        for a, b in _pairs(results, "model", "decode-graph", "fused", "unsteered")
        if a.case["batch"] in FEW_TOKENS and a.replayed and b.replayed
    ]
    return _worst(ratios, True)


def host_ratio(results: Results, what: str, contender: str, other: str) -> float | None:
    """Return the worst ratio of two contenders' host times. It compares lower deciles, as noise only adds time."""
    return _worst((_low(a) / _low(b) for a, b in _pairs(results, "host", what, contender, other)), True)


def _low(row: Row) -> float:
    low = row.quantile(0.1)
    assert low is not None
    return low


def _host(what: str, other: str) -> Callable[[Results], float | None]:
    return lambda results: host_ratio(results, what, "fused", other)


def _host_compiled(results: Results) -> float | None:
    """Return the host time that steering adds to a layer of a compiled model, over the eager layer's host time.

    The eager time counts for at most its own goal, so that a slow eager layer cannot meet this goal.
    """
    ratios = []
    for fused, off in _pairs(results, "host", "compiled", "fused", "off"):
        for eager in results.find("host", "compiled", "eager", **fused.case):
            for hook in results.find("host", "compiled", "hook", **fused.case):
                usual = min(_low(eager), HOST_CALL * _low(hook))
                ratios.append((_low(fused) - _low(off)) / usual)
    return _worst(ratios, True)


def _train(contender: str, other: str, at_most: bool) -> Callable[[Results], float | None]:
    return lambda results: _worst(
        (_ratio(a, b) for a, b in _pairs(results, "model", "train", contender, other, checkpointing=False, **WHOLE)),
        at_most,
    )


def _busy(what: str) -> Callable[[Results], float | None]:
    """Return the worst ratio of the time on the GPU, steered over unsteered, of a whole model."""
    return lambda results: _worst(
        (_ratio(a, b) for a, b in _pairs(results, "busy", what, "fused", "unsteered", checkpointing=False, **WHOLE)),
        True,
    )


def _joint(results: Results) -> float | None:
    """Return the time of a training step with LoRA and orthogonal steering, over LoRA's step plus steering's part."""
    ratios = []
    for joint, lora in _pairs(results, "model", "train", "joint-orth", "lora", checkpointing=False, **WHOLE):
        for fused, unsteered in _pairs(results, "model", "train", "fused", "unsteered", **joint.case):
            assert joint.median and lora.median and fused.median and unsteered.median
            ratios.append(joint.median / (lora.median + fused.median - unsteered.median))
    return _worst(ratios, True)


def _projection(results: Results) -> float | None:
    """Return the microseconds of the projection of 32 layers, d = 4096, k = 8, r = 8."""
    return _worst((1e6 * row.median for row in results.find("projection", "step", "fused", **PROJECTION)), True)


def _projection_over(rival: str) -> Callable[[Results], float | None]:
    return lambda results: _worst(
        (_ratio(a, b) for a, b in _pairs(results, "projection", "step", rival, "fused", **PROJECTION)), False
    )


def _norm(rival: str) -> Callable[[Results], float | None]:
    return lambda results: _worst(
        (_ratio(a, b) for a, b in _pairs(results, "norm", "forward", rival, "fused") if _many(a)), False
    )


def _served(results: Results) -> float | None:
    """Return the time of a replayed decode step over the unsteered step: one adapter per row, or one for all rows."""
    ratios = [
        _ratio(a, b)
        for contender in ("fused", "one-adapter")
        for a, b in _pairs(results, "serve", "decode-graph", contender, "unsteered", **WHOLE)
        if a.replayed and b.replayed
    ]
    return _worst(ratios, True)


def _distinct(results: Results) -> float | None:
    """Return the time of a replayed decode step of 256 rows: 256 adapters over one adapter."""
    pairs = _pairs(results, "serve", "decode-graph", "fused", "one-adapter", adapters=256, **WHOLE)
    return _worst((_ratio(a, b) for a, b in pairs if a.replayed and b.replayed), True)


def _peak(results: Results) -> float | None:
    """Return the extra peak memory of training, in N × d tensors per layer."""
    found = []
    for row in results.find("memory", "peak", "fused", checkpointing=False):
        sizes = GEOMETRIES[row.case["geometry"]][1]
        layers = row.case["layers"] or sizes["num_hidden_layers"]
        unit = row.case["batch"] * row.case["length"] * sizes["hidden_size"] * DTYPES[row.case["dtype"]].itemsize
        found.append(row.samples[0] / (layers * unit))
    return _worst(found, True)


def _peak_checkpointed(results: Results) -> float | None:
    pairs = _pairs(results, "memory", "peak-total", "fused", "unsteered", checkpointing=True)
    return _worst((100 * (_ratio(a, b) - 1) for a, b in pairs), True)


#: Goals of host time, measured on a GPU or over the stub driver.
HOST_GOALS = (
    Goal("host", "host time of a block's call without gradient, over the hooked block's", HOST_CALL, True,
         _host("call", "hook")),
    Goal("host, pass", "host time of a layer's call among a model's other work, over the hooked layer's", 0.75, True,
         _host("pass", "hook")),
    Goal("host, training", "host time of forward and backward in a model, over the hooked model's", 0.75, True,
         _host("train", "hook")),
    Goal("host, rows", "host time with one adapter per row, over a hook with gather and bmm", 0.4, True,
         _host("grouped", "gather-bmm")),
    Goal("host, compiled", "host time of a compiled layer, over the eager layer's (at most its goal)", 1.5, True,
         _host_compiled),
)  # fmt: skip

GOALS = (
    Goal("forward", "op forward, >= 4096 tokens, r <= 16: time over the plain add's", 1.15, True,
         _op_ratio("forward", "fused", "add", True)),
    Goal("forward / hook", "op forward: speed-up over the eager hook", 2.4, False,
         _op_ratio("forward", "hook", "fused", False)),
    Goal("forward / compiled", "op forward: speed-up over the compiled hook", 1.6, False,
         _op_ratio("forward", "hook-compiled", "fused", False)),
    Goal("forward bandwidth", "op forward: share of the copy bandwidth", 0.85, False, _bandwidth_share),
    Goal("backward", "op backward, >= 4096 tokens, r <= 16: time over its floor", 1.4, True, _over_floor("backward")),
    Goal("backward / hook", "op backward: speed-up over the eager hook", 2.0, False,
         _op_ratio("backward", "hook", "fused", False)),
    Goal("rank 64", "op, r = 64, >= 4096 tokens: time over r = 8", 1.3, True, lambda r: _against(r, "rank", 64, 8)),
    Goal("basis", "op with a basis, k = 8, >= 4096 tokens: time over none", 1.05, True,
         lambda r: _against(r, "basis", 8, 0)),
    Goal("decode", "decode step, 1-64 tokens, replayed: time over unsteered", 1.02, True, _decode),
    Goal("train", "training step, Llama-3.2-1B: time over unsteered, frozen", 1.03, True,
         _train("fused", "unsteered", True)),
    Goal("train, GPU", "training step, Llama-3.2-1B: time on the GPU over unsteered", 1.03, True, _busy("train")),
    Goal("decode, GPU", "eager decode step, Llama-3.2-1B: time on the GPU over unsteered", 1.02, True, _busy("decode")),
    Goal("train / hook", "training step: speed-up over the hooks", 1.15, False, _train("hook", "fused", False)),
    Goal("norm / hook", "op and norm, >= 4096 tokens: speed-up over add, hook and Hugging Face's norm", 4.0, False,
         _norm("hook")),
    Goal("norm / liger", "op and norm, >= 4096 tokens: speed-up over add, hook and Liger's norm", 1.8, False,
         _norm("hook-liger")),
    Goal("train, norms fused", "training step with fused norms: time over unsteered, eager, frozen", 1.0, True,
         _train("fused-norm", "unsteered", True)),
    Goal("joint", "training step, joint-orth: time over LoRA's step plus steering's part", 1.02, True, _joint),
    Goal("projection", "projection of 32 layers, d = 4096, k = r = 8: microseconds", 100, True, _projection),
    Goal("projection / svd", "projection: speed-up over a loop of thin SVDs", 100, False,
         _projection_over("svd-loop")),
    Goal("serving", "decode step, one adapter per row, 1-256 adapters, replayed: time over unsteered", 1.02, True,
         _served),
    Goal("256 adapters", "decode step with 256 adapters: time over one adapter for all rows", 1.10, True, _distinct),
    Goal("fp16 error", "fp16, output and gradients: error from float64 over the hook's", 1.0, True, _fp16_error),
    Goal("peak memory", "peak memory beyond unsteered: N x d tensors per layer", 1.0, True, _peak),
    Goal("peak, checkpointing", "peak memory beyond unsteered, per cent", 0.5, True, _peak_checkpointed),
    *HOST_GOALS,
)  # fmt: skip


def evaluate(results: Results) -> list[Outcome]:
    """Judge every goal by a run. A run on a CPU judges none, because no kernel was timed."""
    return judge(GOALS, results if results.machine["kind"] == "gpu" else Results(results.machine))


def judge(goals: Iterable[Goal], results: Results) -> list[Outcome]:
    """Judge the goals by the measurements in `results`."""
    outcomes = []
    for goal in goals:
        value = goal.measure(results)
        met = None if value is None else (value <= goal.limit if goal.at_most else value >= goal.limit)
        limit = f"{'<=' if goal.at_most else '>='} {goal.limit:g}"
        outcomes.append(Outcome(goal.name, goal.text, value, limit, met))
    return outcomes
