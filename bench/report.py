"""`python -m bench.report`: results as Markdown tables and SVG plots in `docs/`, and as the table in README.

No figure is typed by hand, none stands without its device, and what a CPU took is never shown as the speed of the
kernels. Everything is read and checked before anything is written; the same results give the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .geometries import DTYPES, GEOMETRIES, GroupedCase, HostCase, ModelCase, OpCase, ProjectionCase, ServeCase
from .goals import host_ratio
from .host import HOST_CONTENDERS, RIVALS_ON_HOST
from .levels import FLOOR_UNITS
from .results import FOLDER, PACKAGES, Results, Row, load

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = FOLDER.parents[1]
BEGIN, END = "<!-- results -->", "<!-- /results -->"
STAMP = b"drawn from "  # in every plot, and after it a digest of what is drawn
NOT_MEASURED = "Speed on a GPU has not been measured yet, and nothing here claims it."

#: What there is to measure on each level, and what a case of it is.
LEVELS: dict[str, tuple[type, tuple[str, ...]]] = {
    "op": (OpCase, ("forward", "backward", "both")),
    "host": (HostCase, tuple(HOST_CONTENDERS)),
    "accuracy": (OpCase, ("error",)),
    "counters": (OpCase, ("forward", "backward")),
    "model": (ModelCase, ("train", "prefill", "decode", "decode-graph")),
    "memory": (ModelCase, ("kept", "peak", "peak-total")),
    "projection": (ProjectionCase, ("step",)),
    "grouped": (GroupedCase, ("forward", "bytes")),
    "serve": (ServeCase, ("generate", "decode-graph")),
    "vllm": (ServeCase, ("generate",)),
}
BYTES = (("memory", "kept"), ("memory", "peak"), ("memory", "peak-total"), ("grouped", "bytes"))
WORDS = {
    "forward": "forward",
    "backward": "backward",
    "both": "forward and backward",
    "train": "training step",
    "prefill": "prefill",
    "decode": "decode, eager",
    "decode-graph": "decode, CUDA graph",
    "kept": "memory kept for the backward beyond the unsteered model, a layer",
    "peak": "peak memory beyond the unsteered model",
    "peak-total": "peak memory",
}
#: The order of columns and rows. Ours, the same again, what steers nothing, the rivals.
CONTENDERS = (
    "fused",
    "fused-again",
    "fused-bf16",
    "unsteered",
    "add",
    "copy",
    "no-adapter",
    "one-adapter",
    "gather-bmm",
    "hook",
    "hook-compiled",
    "hook-liger",
    "lora",
    "joint-orth",
    "loreft",
    "svd-loop",
    "svd-loop-square",
    "svd-loop-default",
)
RIVALS = CONTENDERS[CONTENDERS.index("hook") :]
#: The variant of the op that is shown first and plotted.
VARIANT = {"rank": 8, "activation": "silu", "basis": 0, "dtype": "bfloat16"}

ByContender = dict[str, Row]
Cases = dict[Any, ByContender]


@dataclass
class Run:
    """A results file, read: rows by (level, what), then by case, then by contender."""

    name: str  # of the file, without its suffix
    results: Results
    tables: dict[tuple[str, str], Cases]

    @property
    def device(self) -> str:
        return self.results.machine["device"]

    @property
    def on_gpu(self) -> bool:
        return self.results.machine["kind"] == "gpu"

    def cases(self, level: str, what: str) -> Cases:
        return self.tables.get((level, what), {})


def read_runs(folder: Path) -> list[Run]:
    """Every results file of a folder, by name; none if it is the default one and nothing was ever put there.

    Raises:
        ValueError: a file is no results file, of another schema, or has a machine or a row that means nothing here.
        FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir() and folder != FOLDER:
        raise FileNotFoundError(f"there is no folder {folder}; expected one of results files")
    return [_read_run(file) for file in sorted(folder.glob("*.json"))]


def _read_run(file: Path) -> Run:
    results = load(file)
    machine = results.machine
    if not isinstance(machine, dict) or machine.get("kind") not in ("gpu", "cpu") or not machine.get("device"):
        raise ValueError(f"{file} has the machine {machine!r}; expected a device, and as kind gpu or cpu")
    if not isinstance(results.bandwidth, (int, float, type(None))) or not 0 < (results.bandwidth or 1) < math.inf:
        raise ValueError(f"{file} has the bandwidth {results.bandwidth!r}; expected bytes a second, or null")
    if not isinstance(results.absent, dict):
        raise ValueError(f"{file} has as absent {results.absent!r}; expected contenders, and why each is")
    tables: dict[tuple[str, str], Cases] = {}
    for number, row in enumerate(results.rows):
        try:
            case = _checked_case(row)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}, row {number}: {error}") from None
        contenders = tables.setdefault((row.level, row.what), {}).setdefault(case, {})
        if row.contender in contenders:
            raise ValueError(f"{file}, row {number}: {row.contender} on this case is there before; expected it once")
        contenders[row.contender] = row
    return Run(file.stem, results, tables)


def _checked_case(row: Row) -> OpCase | HostCase | ModelCase | ProjectionCase | GroupedCase | ServeCase:
    make, whats = LEVELS.get(row.level, (None, ()))
    if make is None or row.what not in whats:
        expected = "; ".join(f"{level}: {', '.join(whats)}" for level, (_, whats) in LEVELS.items())
        raise ValueError(f"level {row.level!r}, what {row.what!r}; expected of {expected}")
    case = make(**row.case)
    for entry in dataclasses.fields(case):
        value = getattr(case, entry.name)
        if type(value).__name__ != entry.type:
            raise ValueError(f"{entry.name} is {value!r}; expected {entry.type}")
    if case.dtype not in DTYPES:
        raise ValueError(f"dtype is {case.dtype!r}; expected one of {', '.join(DTYPES)}")
    # A peak may lie below that of the unsteered run, and a rate of hits may be 0.
    positive = (row.level, row.what) not in BYTES and row.level != "counters"
    if not all(math.isfinite(sample) and (sample > 0 or not positive) for sample in row.samples):
        raise ValueError(f"samples are {row.samples}; expected finite {'seconds above 0' if positive else 'bytes'}")
    return case


# ------------------------------------------------------------------------------------------------------- cells of text


def _number(value: float) -> str:
    """Three significant digits, never an exponent."""
    decimals = 0 if not value else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def _scaled(row: Row, units: Iterable[tuple[float, str]]) -> str:
    """`12.3 µs (12.1–12.6)`: median and 20 % to 80 % quantiles in the greatest unit that the median reaches."""
    median, low, high = row.median, row.quantile(0.2), row.quantile(0.8)
    assert median is not None and low is not None and high is not None
    units = list(units)
    size, name = next(((size, name) for size, name in units if abs(median) >= size), units[-1])
    return f"{_number(median / size)} {name} ({_number(low / size)}–{_number(high / size)})"


def _amount(row: Row | None) -> str:
    """Time or bytes of a row, or its status in words."""
    if row is None:
        return "–"
    if not row.samples:
        # Why a contender was not run at all is said once a device, and not in every cell.
        status = row.status.partition(":")[0] if row.status.startswith("not run:") else row.status
        return _escaped(status if status != "ok" else "no samples")
    if (row.level, row.what) in BYTES:
        return _scaled(row, [(2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")])
    return _scaled(row, [(1, "s"), (1e-3, "ms"), (1e-6, "µs")])


def _escaped(text: Any) -> str:
    """Text of a results file as one Markdown cell."""
    return re.sub(r"([|\\]|<(?=[A-Za-z/!]))", r"\\\1", " ".join(str(text).split()))


def _ratio(row: Row | None, to: Row | None) -> str:
    """`2.31×`: a row as a multiple of another; its status where it has no samples."""
    if row is None or not row.samples:
        return _amount(row)
    share = ratio(row, to)
    return "–" if share is None else f"{_number(share)}×"


def ratio(row: Row | None, to: Row | None) -> float | None:
    """The median of a row as a multiple of another's; None where either has none, or where bytes are not above 0."""
    over, under = row.median if row else None, to.median if to else None
    return over / under if over is not None and under is not None and over >= 0 and under > 0 else None


def floor_seconds(results: Results, what: str, case: OpCase) -> float | None:
    """The seconds that the bytes of the floor take at the measured bandwidth of a copy."""
    if results.bandwidth is None or what not in FLOOR_UNITS:
        return None
    return FLOOR_UNITS[what] * case.unit_bytes / results.bandwidth


def _against_floor(results: Results, what: str, case: OpCase, row: Row | None) -> tuple[str, str]:
    """Time as a multiple of the floor, and the floor's bytes a second as a share of the copy's bandwidth."""
    floor = floor_seconds(results, what, case)
    if floor is None or row is None or row.median is None:
        return "–", "–"
    return f"{_number(row.median / floor)}×", f"{floor / row.median:.0%}"


def _layer_count(case: ModelCase) -> int:
    return case.layers or GEOMETRIES[case.geometry][1]["num_hidden_layers"]


def _hidden(case: ModelCase) -> int:
    return GEOMETRIES[case.geometry][1]["hidden_size"]


def _unit_bytes(case: ModelCase) -> int:
    """Bytes of the hidden state of batch × length tokens."""
    return OpCase(case.batch * case.length, _hidden(case), dtype=case.dtype).unit_bytes


def _variant(case: OpCase) -> dict[str, Any]:
    return {name: getattr(case, name) for name in VARIANT}


def _variant_text(variant: dict[str, Any]) -> str:
    basis = f"basis of {variant['basis']}" if variant["basis"] else "no basis"
    return f"r = {variant['rank']}, {variant['activation']}, {basis}, {variant['dtype']}"


def _op_text(case: OpCase) -> str:
    return f"N = {case.tokens}, d = {case.hidden}, {_variant_text(_variant(case))}"


def _model_text(case: ModelCase, what: str, layers: bool = True) -> str:
    count = [f"{_layer_count(case)} layers" + ("" if case.layers else " (all)")] if layers else []
    decoding = what.startswith("decode")
    tokens = f"batch {case.batch} after {case.length} tokens" if decoding else f"{case.batch} × {case.length} tokens"
    extra = ["checkpointing"] if case.checkpointing else []
    return ", ".join([case.geometry, *count, tokens, f"r = {case.rank}", case.dtype, *extra])


def _by_order(names: Iterable[str]) -> list[str]:
    known = {name: place for place, name in enumerate(CONTENDERS)}
    return sorted(set(names), key=lambda name: (known.get(name, len(known)), name))


def _table(head: list[str], rows: Iterable[list[str]], texts: int = 1) -> str:
    """A Markdown table; the first `texts` columns are text, the others numbers."""
    rule = ["---"] * texts + ["--:"] * (len(head) - texts)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


# -------------------------------------------------------------------------------------------------------------- tables


def _op_tables(run: Run) -> Iterator[str]:
    for what in LEVELS["op"][1]:
        cases = run.cases("op", what)
        variants = sorted({tuple(_variant(case).items()) for case in cases}, key=_first_the_plotted)
        for items in variants:
            variant = dict(items)
            of_variant = {case: rows for case, rows in cases.items() if _variant(case) == variant}
            title = f"{WORDS[what]}, {_variant_text(variant)}"
            table = _op_table(run.results, what, of_variant)
            if variant == VARIANT:
                yield f"#### {_device(run)}: {title}\n\n{table}"
            else:
                yield f"<details><summary>{_device(run)}: {title}</summary>\n\n{table}\n\n</details>"


def _first_the_plotted(items: tuple[tuple[str, Any], ...]) -> tuple[Any, ...]:
    return dict(items) != VARIANT, items


def _op_table(results: Results, what: str, cases: Cases) -> str:
    others = [name for name in _by_order(name for rows in cases.values() for name in rows) if name != "fused"]
    head = ["N", "d", "fused", "× floor", "share of copy bandwidth", "launches", *others]
    return _table(head, (_op_cells(results, what, case, cases[case], others) for case in _by_size(cases)), texts=0)


def _op_cells(results: Results, what: str, case: OpCase, rows: ByContender, others: list[str]) -> list[str]:
    fused = rows.get("fused")
    launches = "–" if fused is None or fused.launches is None else str(fused.launches)
    floor = _against_floor(results, what, case, fused)
    return [
        str(case.tokens),
        str(case.hidden),
        _amount(fused),
        *floor,
        launches,
        *(_beside(rows.get(name), fused) for name in others),
    ]


def _beside(row: Row | None, fused: Row | None) -> str:
    """`41.2 µs (41.0–41.5), 2.31×`: another contender, and it as a multiple of ours."""
    share = ratio(row, fused)
    return _amount(row) + ("" if share is None else f", {_number(share)}×")


def _accuracy_tables(run: Run) -> Iterator[str]:
    cases = run.cases("accuracy", "error")
    lines = []
    for case in sorted(cases, key=lambda case: (case.dtype, case.hidden, case.tokens, case.rank)):
        row = cases[case].get("fused")
        if row is not None:
            ratios = [f"{_number(sample)}×" for sample in row.samples] or [_escaped(row.status)]
            lines.append([_op_text(case), *ratios, *["–"] * (4 - len(ratios))])
    if lines:
        head = ["case", "output", "dx", "dW1", "dW2"]
        yield f"#### {_device(run)}: fused's error from float64 over the eager hook's\n\n{_table(head, lines)}"


def _counters_tables(run: Run) -> Iterator[str]:
    lines = [
        [
            WORDS[what],
            _op_text(case),
            _escaped(name),
            _escaped(row.status) if row.median is None else _number(row.median),
        ]
        for what in LEVELS["counters"][1]
        for case, rows in run.cases("counters", what).items()
        for name, row in rows.items()
        if name != "fused" or row.status != "ok"
    ]
    if lines:
        head = ["pass", "case", "kernel: counter", "value"]
        yield f"#### {_device(run)}: hardware counters, by ncu\n\n{_table(head, lines, texts=3)}"


def _host_tables(run: Run) -> Iterator[str]:
    lines = []
    for what in LEVELS["host"][1]:
        for case, rows in run.cases("host", what).items():
            for name in _by_order(rows):
                row = rows[name]
                low = row.quantile(0.1)
                time = "–" if low is None else f"{_number(1e6 * low)} µs"
                share = host_ratio(run.results, what, name, RIVALS_ON_HOST[what])
                against = "–" if share is None else f"{_number(share)}×"
                launches = "–" if row.launches is None else str(row.launches)
                size = f"{case.tokens} rows, {case.layers} layers, r = {case.rank}"
                lines.append([what, size, name, time, against, RIVALS_ON_HOST[what], launches])
    if lines:
        head = ["call", "case", "contender", "host time", "× rival", "rival", "launches"]
        yield f"#### {_device(run)}: a block's call, lower decile of CPU time\n\n{_table(head, lines, texts=3)}"


def _by_size(cases: Iterable[OpCase]) -> list[OpCase]:
    return sorted(cases, key=lambda case: (case.hidden, case.tokens))


def _model_size(case: ModelCase) -> tuple[Any, ...]:
    return (
        _hidden(case),
        _layer_count(case),
        case.batch * case.length,
        case.batch,
        not case.checkpointing,
        dataclasses.astuple(case),
    )


def _model_tables(run: Run) -> Iterator[str]:
    for what in LEVELS["model"][1]:
        cases = run.cases("model", what)
        # In decoding the hidden state is a few kilobytes: nothing of what steering costs there is its traffic.
        with_units = what in ("train", "prefill") and run.results.bandwidth is not None
        head = ["case", "contender", "time", "× unsteered", "× fused", *(["added units a layer"] if with_units else [])]
        lines = []
        for case in sorted(cases, key=_model_size):
            rows = cases[case]
            for name in _by_order(rows):
                row = rows[name]
                cells = [_amount(row), _ratio(row, rows.get("unsteered")), _ratio(row, rows.get("fused"))]
                if with_units:
                    cells.append(_added_units(run.results, case, row, rows.get("unsteered")))
                lines.append([_model_text(case, what), name, *cells])
        if lines:
            yield f"#### {_device(run)}: {WORDS[what]}\n\n{_table(head, lines, texts=2)}"


def _added_units(results: Results, case: ModelCase, row: Row, unsteered: Row | None) -> str:
    """What steering adds to a layer, in units: one is one pass of its hidden state through memory at copy speed."""
    before = unsteered.median if unsteered else None
    if row.median is None or before is None or row is unsteered or results.bandwidth is None:
        return "–"
    return _number((row.median - before) / _layer_count(case) * results.bandwidth / _unit_bytes(case))


def _memory_tables(run: Run) -> Iterator[str]:
    for what in LEVELS["memory"][1]:
        cases = run.cases("memory", what)
        head = ["case", "contender", "memory", "units of N × d", "× fused"]
        lines = []
        for case in sorted(cases, key=_model_size):
            rows = cases[case]
            for name in _by_order(rows):
                median = rows[name].median
                units = "–" if median is None else _number(median / _unit_bytes(case))
                lines.append(
                    [_model_text(case, what), name, _amount(rows[name]), units, _ratio(rows[name], rows.get("fused"))]
                )
        if lines:
            yield f"#### {_device(run)}: {WORDS[what]}\n\n{_table(head, lines, texts=2)}"


def _projection_tables(run: Run) -> Iterator[str]:
    cases = run.cases("projection", "step")
    names = _by_order(name for rows in cases.values() for name in rows)
    sizes = sorted(cases, key=lambda case: (case.writers, case.dtype, case.layers, case.hidden, case.rank))
    lines = []
    for case in sizes:
        rows = cases[case]
        others = (_beside(rows.get(name), rows.get("fused")) for name in names if name != "fused")
        size = map(str, (case.layers, case.hidden, case.writers, case.rank))
        lines.append([case.dtype, *size, _amount(rows.get("fused")), *others])
    if lines:
        head = ["dtype of B", "layers", "d", "k", "r", "fused", *(name for name in names if name != "fused")]
        yield f"#### {_device(run)}: W2' of all layers, once an optimizer step\n\n{_table(head, lines)}"


def _grouped_tables(run: Run) -> Iterator[str]:
    made = run.cases("grouped", "bytes")
    for prefill in (False, True):
        cases = {case: rows for case, rows in run.cases("grouped", "forward").items() if case.prefill == prefill}
        others = [name for name in _by_order(name for rows in cases.values() for name in rows) if name != "fused"]
        lines = []
        for case in sorted(cases, key=lambda case: (case.dtype, case.hidden, case.tokens, case.adapters)):
            rows, sizes = cases[case], made.get(case, {})
            times = (_beside(rows.get(name), rows.get("fused")) for name in others)
            size = map(str, (case.tokens, case.hidden, case.rank, case.adapters))
            both = (_amount(sizes.get(name)) for name in ("fused", "gather-bmm"))
            lines.append([f"{case.activation}, {case.dtype}", *size, _amount(rows.get("fused")), *times, *both])
        if lines:
            head = ["", "N", "d", "r", "adapters", "fused", *others, "fused makes", "gather-bmm makes"]
            kind = "tokens of an adapter together, as in prefill" if prefill else "adapters mixed, as in decoding"
            yield f"#### {_device(run)}: an adapter for each token, {kind}\n\n{_table(head, lines)}"


def _serve_text(case: ServeCase) -> str:
    layers = f"{_layer_count(case.model)} layers" + ("" if case.layers else " (all)")
    adapters = f"{case.adapters} adapter" + ("s" if case.adapters > 1 else "")
    return f"{case.geometry}, {layers}, {case.batch} × {case.length} tokens, {adapters}, r = {case.rank}, {case.dtype}"


def _serve_tables(run: Run) -> Iterator[str]:
    titles = {
        ("serve", "generate"): "transformers' generate, a token of every row",
        ("serve", "decode-graph"): "transformers, a decode step, CUDA graph",
        ("vllm", "generate"): "vLLM, a token of every row",
    }
    for (level, what), title in titles.items():
        cases = run.cases(level, what)
        lines = []
        for case in sorted(cases, key=lambda case: (_model_size(case.model), case.adapters)):
            rows = cases[case]
            for name in _by_order(rows):
                row = rows[name]
                speed = "–" if row.median is None else _number(case.batch / row.median)
                against = (_ratio(row, rows.get(other)) for other in ("unsteered", "one-adapter", "fused"))
                lines.append([_serve_text(case), name, _amount(row), speed, *against])
        if lines:
            head = ["case", "contender", "time", "tokens a second", "× unsteered", "× one adapter", "× fused"]
            yield f"#### {_device(run)}: {title}\n\n{_table(head, lines, texts=2)}"


# --------------------------------------------------------------------------------------------------------------- plots


@dataclass(frozen=True)
class Series:
    """Points (x, y) with whiskers from low to high. colour and style: places in the palette, None for black."""

    label: str
    points: tuple[tuple[float, float, float, float], ...]  # x, y, low, high
    colour: int | None = None
    style: str = "o-"


@dataclass(frozen=True)
class Panel:
    """One pair of axes. ticks: the names of x = 0, 1, … of a bar chart; without them it is a line chart."""

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    ticks: tuple[str, ...] = ()
    log_x: bool = False
    log_y: bool = False
    level: float | None = None  # a horizontal line to compare with


@dataclass(frozen=True)
class Plot:
    name: str
    title: str
    panels: tuple[Panel, ...]


def plots(run: Run) -> list[Plot]:
    """The plots for which there are rows; of a CPU none, so that nobody takes one for the kernels'."""
    if not run.on_gpu:
        return []
    makers: tuple[tuple[str, str, Callable[[Run], Iterator[Panel]]], ...] = (
        ("speedup-by-tokens", "speed-up by tokens", _speedup_panels),
        ("roofline", "time by bytes, and the floor", _roofline_panels),
        ("memory-by-layers", "memory by layers", _memory_panels),
        ("decode-overhead", "decode overhead", _decode_panels),
    )
    made = [Plot(name, f"{run.device}: {title}", tuple(panels(run))) for name, title, panels in makers]
    return [plot for plot in made if plot.panels]


def _plotted(run: Run, what: str) -> tuple[str, Cases]:
    """The cases of the variant that is plotted, VARIANT if it was measured, and its name."""
    cases = run.cases("op", what)
    variants = sorted({tuple(_variant(case).items()) for case in cases}, key=_first_the_plotted)
    if not variants:
        return "", {}
    return _variant_text(dict(variants[0])), {c: cases[c] for c in _by_size(cases) if _variant(c) == dict(variants[0])}


def _point(x: float, row: Row, scale: float = 1.0, offset: float = 0.0) -> tuple[float, float, float, float]:
    median, low, high = row.median, row.quantile(0.2), row.quantile(0.8)
    assert median is not None and low is not None and high is not None
    return x, median * scale + offset, low * scale + offset, high * scale + offset


def _speedup_panels(run: Run) -> Iterator[Panel]:
    for what in FLOOR_UNITS:
        text, cases = _plotted(run, what)
        series = []
        for place, hidden in enumerate(sorted({case.hidden for case in cases})):
            for name, style in (("hook", "o-"), ("hook-compiled", "s--"), ("fused-again", "x:")):
                points = []
                for case, rows in cases.items():
                    fused, other = rows.get("fused"), rows.get(name)
                    share = ratio(other, fused)
                    if case.hidden == hidden and fused and other and share is not None:
                        points.append(_point(case.tokens, other, 1 / fused.median))  # type: ignore[operator]
                if points:
                    series.append(Series(f"{name}, d = {hidden}", tuple(points), place, style))
        if series:
            y = "time as a multiple of fused"
            yield Panel(f"{WORDS[what]}\n{text}", "tokens N", y, tuple(series), log_x=True, level=1.0)


def _roofline_panels(run: Run) -> Iterator[Panel]:
    bandwidth = run.results.bandwidth
    for what in FLOOR_UNITS if bandwidth else ():
        text, cases = _plotted(run, what)
        series = []
        for place, name in enumerate(("fused", "hook", "hook-compiled", "add")):
            points = tuple(
                _point(FLOOR_UNITS[what] * case.unit_bytes / 1e6, rows[name], 1e6)
                for case, rows in cases.items()
                if name in rows and rows[name].samples
            )
            if points:
                series.append(Series(name, tuple(sorted(points)), place, "o"))
        if series:
            ends = sorted({point[0] for one in series for point in one.points})
            floor = tuple((x, x * 1e12 / bandwidth, x * 1e12 / bandwidth, x * 1e12 / bandwidth) for x in ends)  # type: ignore[operator]
            label = f"floor: {FLOOR_UNITS[what]} units at {_number(bandwidth / 1e9)} GB/s"  # type: ignore[operator]
            series.insert(0, Series(label, floor, None, "-"))
            x = "bytes of the floor, MB"
            yield Panel(f"{WORDS[what]}\n{text}", x, "time, µs", tuple(series), log_x=True, log_y=True)


def _memory_panels(run: Run) -> Iterator[Panel]:
    for what in ("peak", "kept"):
        groups: dict[str, Cases] = {}
        for case, rows in sorted(run.cases("memory", what).items(), key=lambda item: _model_size(item[0])):
            groups.setdefault(_model_text(case, what, layers=False), {})[case] = rows
        for text, cases in groups.items():
            series = []
            for place, name in enumerate(_by_order(name for rows in cases.values() for name in rows)):
                points = tuple(
                    _point(_layer_count(case), rows[name], 2.0**-20)
                    for case, rows in cases.items()
                    if name in rows and rows[name].samples
                )
                if points:
                    series.append(Series(name, points, place))
            if series:
                yield Panel(f"{WORDS[what]}\n{text}", "layers", "MiB", tuple(series))


def _decode_panels(run: Run) -> Iterator[Panel]:
    for what in ("decode", "decode-graph"):
        cases = run.cases("model", what)
        names = [n for n in _by_order(name for rows in cases.values() for name in rows) if n != "unsteered"]
        series = []
        for place, case in enumerate(sorted(cases, key=_model_size)):
            rows = cases[case]
            base = rows["unsteered"].median if "unsteered" in rows else None
            points = tuple(
                _point(x, rows[name], 100 / base, -100)
                for x, name in enumerate(names)
                if base and name in rows and rows[name].samples
            )
            if points:
                series.append(Series(_model_text(case, what), points, place))
        if series:
            y = "time above the unsteered model, %"
            yield Panel(WORDS[what], "", y, tuple(series), ticks=tuple(names), level=0.0)


def _stamp(plot: Plot) -> str:
    return STAMP.decode() + hashlib.sha256(repr(plot).encode()).hexdigest()[:32]


def draw(plot: Plot) -> bytes:
    """The plot as SVG; the same plot gives the same bytes, whatever the user's matplotlibrc."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": plot.name, "svg.fonttype": "none", "font.size": 8})
        height = 3.6 * len(plot.panels)
        figure = Figure(figsize=(8.5, height))
        # Fixed margins: layout by the extent of text would hang on the fonts.
        figure.subplots_adjust(left=0.1, right=0.62, bottom=0.6 / height, top=1 - 0.8 / height, hspace=0.45)
        figure.suptitle(plot.title, y=1 - 0.1 / height, fontsize=11)
        for place, panel in enumerate(plot.panels):
            _draw_panel(figure.add_subplot(len(plot.panels), 1, place + 1), panel)
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Description": _stamp(plot)})
    return stream.getvalue()


def _draw_panel(axes: Axes, panel: Panel) -> None:
    for place, series in enumerate(panel.series):
        colour = "black" if series.colour is None else f"C{series.colour % 10}"
        label = textwrap.fill(series.label, 36)
        xs, ys, lows, highs = zip(*series.points, strict=True)
        # A whisker has no negative length; the median lies between its quantiles but for rounding.
        whiskers = [
            [max(0.0, y - low) for y, low in zip(ys, lows, strict=True)],
            [max(0.0, high - y) for y, high in zip(ys, highs, strict=True)],
        ]
        if panel.ticks:
            width = 0.8 / len(panel.series)
            xs = tuple(x + (place + 0.5) * width - 0.4 for x in xs)
            axes.bar(xs, ys, width, yerr=whiskers, color=colour, label=label)
        else:
            axes.errorbar(xs, ys, whiskers, fmt=series.style, color=colour, label=label, markersize=4, linewidth=1)
    if panel.level is not None:
        axes.axhline(panel.level, color="black", linewidth=0.8)
    if panel.ticks:
        axes.set_xticks(range(len(panel.ticks)), panel.ticks, rotation=15)
    if panel.log_x:
        axes.set_xscale("log")
    if panel.log_y:
        axes.set_yscale("log")
    else:
        if not panel.ticks:  # tokens or layers: few, and whole numbers
            measured = sorted({point[0] for series in panel.series for point in series.points})
            axes.set_xticks(measured, [f"{x:.0f}" for x in measured])
            axes.minorticks_off()
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), fontsize=7, frameon=False)


# ----------------------------------------------------------------------------------------------------------- documents

LEGEND = """\
Times and bytes are medians, with the 20 % and 80 % quantiles in parentheses. One unit is one tensor of N tokens × d in
the model's dtype. The floor is the bytes that must be moved at least, 3 units forward and 3 backward, at the bandwidth
of a large copy on the same device, read plus written. *× floor* is fused's time as a multiple of it; *share of copy
bandwidth* is the floor's bytes a second as a share of that bandwidth. A multiple after another contender's time is that
time over fused's: above 1× fused is faster. `fused-again` is the same version timed twice, and shows the noise. `add`
is the plain residual add, which steers nothing; `copy` copies one tensor, 2 units. *Added units a layer* is the time
above the unsteered model, a layer, in passes of the hidden state at the copy's bandwidth. In serving, `fused` gives
each row its own of so many adapters, `fused-bf16` the same with adapters in bfloat16, `one-adapter` all rows the same
one, `no-adapter` none where there could be one, and `gather-bmm` copies an adapter's weights for each token; *makes* is
the bytes of all tensors that a call makes beside its result. On a CPU, where vLLM compiles nothing once LoRA is
enabled, its unsteered engine does not compile either. *Host time* is CPU time of one call of a block that does nothing
but its residual add, steered by `patch_model` or by a hook of four PyTorch operations, in turns in one process. A
contender that did not run on a case has there the reason instead of a figure, and – where it was not measured."""

HOW_TO_RUN = """\
## How to run it

On a machine with a GPU, from the checkout's root:

```bash
pip install -c constraints.txt -e ".[test]"
python -m bench.gpu --out bench/results  # bench/results/<device>.json, most telling first; again: it goes on
python -m bench.report                   # writes this file, its plots, and the table in README.md
```

`--part tests` and `--part measure` do one of its halves, each in a time of its own. `--rehearse` runs all of it without
a GPU, on small sizes, and writes nothing.

A sample of a kernel is the replay of a CUDA graph of many calls. Each call reads inputs of its own and writes an output
of its own; together they are twice the L2 cache, so that neither reads nor writes stay there.

`python -m bench.stub -m bench.host` prints the host time of a block's call as ratios to the hooked block, and whether
its goals are met, on a machine without a GPU: Triton compiles and launches for real, over a driver library that does
nothing. `pytest bench -k host` does the same.

`python -m bench.vllm --out bench/results` measures vLLM, in an environment that has it
([docs/serving.md](serving.md#vllm)), on a GPU or a CPU. On a machine without a GPU `python -m bench.serving --out
bench/results` measures serving as far as it can be there, and `pytest bench -m "not gpu"` checks what must hold
anywhere.

`python -m bench.report --check` writes nothing and fails if a file is not what the results give."""


def benchmarks_text(runs: list[Run]) -> str:
    """`docs/benchmarks.md`."""
    gpus, cpus = [run for run in runs if run.on_gpu], [run for run in runs if not run.on_gpu]
    parts = [
        "<!-- Written by `python -m bench.report` from bench/results. Do not edit. -->",
        "# Benchmarks",
        LEGEND if runs else "",
        *([] if gpus else [f"No run on a GPU has been committed. {NOT_MEASURED}"]),
        *(part for run in gpus + cpus for part in _run_parts(run)),
        HOW_TO_RUN,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _device(run: Run) -> str:
    return _escaped(run.device) + ("" if run.on_gpu else " (CPU)")


def _run_parts(run: Run) -> Iterator[str]:
    if run.on_gpu:
        yield f"## {_device(run)}"
    else:
        yield f"## {_device(run)}: the torch backend or Triton's interpreter on a CPU"
        yield "**This says nothing of the kernels.** It shows that the benchmarks run, and no speed of fused-steer."
    yield _machine_text(run)
    if run.on_gpu:
        yield _goals_text(run)
        yield "\n\n".join(f"![{_escaped(plot.title)}](benchmarks/{_svg_name(run, plot)})" for plot in plots(run))
    for title, tables in (
        ("The op", _op_tables),
        ("Accuracy", _accuracy_tables),
        ("Counters", _counters_tables),
        ("Host time", _host_tables),
        ("Models", _model_tables),
        ("Memory", _memory_tables),
        ("Joint-Orth's projection", _projection_tables),
        ("An adapter for each token", _grouped_tables),
        ("Serving", _serve_tables),
    ):
        texts = list(tables(run))
        if texts:
            yield f"### {title} on {_device(run)}"
            yield from texts
    yield _absent_text(run)


def _svg_name(run: Run, plot: Plot) -> str:
    return f"{run.name}-{plot.name}.svg"


def _machine_text(run: Run) -> str:
    machine = run.results.machine
    versions = machine.get("versions") or {}
    commit = machine.get("commit") or "unknown"
    bandwidth = run.results.bandwidth
    facts = [
        ("device", run.device),
        ("driver", machine.get("driver")),
        ("multiprocessors", machine.get("multiprocessors")),
        ("cores", None if run.on_gpu else machine.get("cores")),
        ("bandwidth of a large copy", None if bandwidth is None else f"{_number(bandwidth / 1e9)} GB/s"),
        ("fused-steer", machine.get("fused_steer")),
        ("python", machine.get("python")),
        *((name, versions.get(name)) for name in _version_names(versions)),
        ("commit", commit + (" with uncommitted changes" if machine.get("dirty") else "")),
        ("digest of the sources", machine.get("sources")),
        ("date", machine.get("date")),
    ]
    text = "; ".join(f"{name} {_escaped(value)}" for name, value in facts if value is not None)
    lines = [f"{text}; command `{machine.get('command')}`; file `{run.name}.json`."]
    if run.results.tests:
        lines.append(_tests_text(run.results.tests))
    return "\n\n".join(lines)


def _tests_text(tests: dict[str, Any]) -> str:
    counts = [f"{tests[name]} {name}" for name in ("passed", "failed", "error", "skipped") if name in tests]
    end = "stopped when their time was up" if tests.get("exit") is None else f"exit code {tests['exit']}"
    failures = [f"- failed: {_escaped(name)}" for name in tests.get("failures", [])]
    return "\n".join([f"Tests on this device (`pytest -m gpu`): {', '.join([*counts, end])}.", *failures])


def _version_names(versions: dict[str, Any]) -> list[str]:
    return [*PACKAGES, *sorted(versions.keys() - set(PACKAGES))]


def _goals_text(run: Run) -> str:
    from .goals import evaluate

    words = {True: "met", False: "**missed**", None: "not measured"}
    rows = [
        [
            _escaped(goal.name),
            _escaped(goal.text),
            "–" if goal.value is None else _number(goal.value),
            _escaped(goal.limit),
            words[goal.met],
        ]
        for goal in evaluate(run.results)
    ]
    table = _table(["goal", "in words", "measured", "limit", ""], rows, texts=2)
    return f"### Goals on {_device(run)}\n\n{table}"


def _absent_text(run: Run) -> str:
    if not run.results.absent:
        return ""
    lines = [f"- `{name}`: {_escaped(reason)}" for name, reason in sorted(run.results.absent.items())]
    return f"### Not run on {_device(run)}\n\n" + "\n".join(lines)


@dataclass(frozen=True)
class Line:
    """A line of README's table. base: the contender that steers nothing, if there is one."""

    device: str
    what: str
    case: str
    floor: tuple[str, str]
    base: str
    rows: ByContender


def _readme_lines(run: Run) -> Iterator[Line]:
    for what in ("forward", "backward"):
        cases = _largest(run.cases("op", what), lambda case: (_variant(case) == VARIANT, case.hidden, case.tokens))
        for case, rows in cases:
            floor = _against_floor(run.results, what, case, rows["fused"])
            yield Line(_device(run), WORDS[what], _op_text(case), floor, "add", rows)
    for case, rows in _largest(
        run.cases("serve", "decode-graph"), lambda case: (_model_size(case.model), case.adapters)
    ):
        yield Line(_device(run), "decode step by rows, CUDA graph", _serve_text(case), ("–", "–"), "unsteered", rows)
    for level, what in (("model", "train"), ("model", "decode"), ("model", "decode-graph"), ("memory", "peak")):
        for case, rows in _largest(run.cases(level, what), _model_size):
            base = "unsteered" if level == "model" else ""  # whose peak beyond itself is nothing
            yield Line(_device(run), WORDS[what], _model_text(case, what), ("–", "–"), base, rows)


def _largest(cases: Cases, size: Callable[[Any], Any]) -> list[tuple[Any, ByContender]]:
    """The largest case on which fused ran, or none."""
    ran = [case for case, rows in cases.items() if "fused" in rows and rows["fused"].samples]
    return [(case, cases[case]) for case in sorted(ran, key=size)[-1:]]


def readme_text(runs: list[Run]) -> str:
    """What stands between README's markers: one table of what GPUs took, or that none has been measured."""
    lines = [line for run in runs if run.on_gpu for line in _readme_lines(run)]
    if not lines:
        return f"{NOT_MEASURED} How to measure it: [docs/benchmarks.md](docs/benchmarks.md)."
    rivals = [name for name in RIVALS if any(name in line.rows for line in lines)]
    head = [
        "device",
        "what",
        "case",
        "fused",
        "× floor",
        "share of copy bandwidth",
        "again",
        "add or unsteered",
        *rivals,
    ]
    table = _table(
        head,
        (
            [line.device, line.what, line.case, _amount(line.rows["fused"]), *line.floor]
            + [_ratio(line.rows.get(name), line.rows["fused"]) for name in ("fused-again", line.base, *rivals)]
            for line in lines
        ),
        texts=3,
    )
    return f"""\
{table}

The largest case of each that ran; medians, with the 20 % and 80 % quantiles in parentheses. Right of them, the others'
time or bytes as a multiple of fused's: above 1× fused is better. *Again* is fused timed twice: the noise. The floor is
the bytes that must be moved, at the bandwidth of a copy on the same device. All cases, goals met and missed, versions,
and how to run it: [docs/benchmarks.md](docs/benchmarks.md)."""


def _with_block(text: str, block: str, readme: Path) -> str:
    """README's text with `block` between its markers.

    Raises:
        ValueError: it has not one pair of markers.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{readme} has no pair of markers; expected {BEGIN} and after it {END}, each once")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"


# ------------------------------------------------------------------------------------------------------------- command


def render(results: Path, docs: Path, readme: Path) -> dict[Path, bytes | None]:
    """Every file that the results give, with its content; None: a plot that they no longer give.

    Raises:
        ValueError: a results file is none, or README has no pair of markers.
        OSError: a file cannot be read.
    """
    runs = read_runs(results)
    folder = docs / "benchmarks"
    # Plots of an earlier run, known by their stamp.
    files: dict[Path, bytes | None] = dict.fromkeys(f for f in folder.glob("*.svg") if STAMP in f.read_bytes())
    files[readme] = _with_block(readme.read_bytes().decode("utf-8"), readme_text(runs), readme).encode()
    files[docs / "benchmarks.md"] = benchmarks_text(runs).encode()
    for run in runs:
        for plot in plots(run):
            files[folder / _svg_name(run, plot)] = draw(plot)
    return dict(sorted(files.items()))


def differing(files: dict[Path, bytes | None]) -> list[Path]:
    """Those that are not yet as they should be."""
    return [file for file, content in files.items() if not _is_same(file, content)]


def _is_same(file: Path, content: bytes | None) -> bool:
    if content is None or not file.is_file():
        return content is None and not file.exists()
    old = file.read_bytes()
    if old == content or file.suffix != ".svg":
        return old == content
    # Another matplotlib draws the same in other bytes, and which one there is depends on the Python.
    drawn_by, drawn_from = (re.compile(p) for p in (rb"Matplotlib v[\w.+]+", rb"drawn from \w+"))
    return drawn_by.findall(old) != drawn_by.findall(content) and drawn_from.findall(old) == drawn_from.findall(content)


app = typer.Typer(add_completion=False)


@app.command()
def main(
    results: Annotated[Path, typer.Option(help="Folder of results files.")] = FOLDER,
    docs: Annotated[Path, typer.Option(help="Folder for benchmarks.md and its plots.")] = ROOT / "docs",
    readme: Annotated[Path, typer.Option(help="README with the markers.")] = ROOT / "README.md",
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit code 1 if a file differs.")] = False,
) -> None:
    """Turn results into tables and plots."""
    try:
        files = render(results, docs, readme)
        changed = differing(files)
        names = ", ".join(map(str, changed))
        if check and changed:
            raise ValueError(f"not what the results give: {names}; expected `python -m bench.report` to be run")
        for file in changed:
            content = files[file]
            if content is None:
                file.unlink()
            else:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"bench.report: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"written: {names}" if changed else "nothing to change")


if __name__ == "__main__":
    app()
