"""Formats the results of a run as Markdown tables: first the text of cells, then the tables of each level."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from ..geometries import GEOMETRIES, ModelCase, OpCase, ServeCase
from ..goals import host_ratio
from ..host import RIVALS_ON_HOST
from ..levels import FLOOR_UNITS
from ..results import Results, Row
from .read import BYTES, LEVELS, ByContender, Cases, Run

WORDS = {
    "forward": "forward",
    "backward": "backward",
    "both": "forward and backward",
    "train": "training step",
    "prefill": "prefill",
    "decode": "decode, eager",
    "decode-graph": "decode, CUDA graph",
    "kept": "memory kept for the backward beyond the unsteered model, per layer",
    "peak": "peak memory beyond the unsteered model",
    "peak-total": "peak memory",
}
#: The order of columns and rows: the fused contenders, the unsteered ones, the rivals.
CONTENDERS = (
    "fused",
    "fused-again",
    "fused-norm",
    "fused-bf16",
    "unsteered",
    "add",
    "copy",
    "no-adapter",
    "one-adapter",
    "gather-bmm",
    "then-norm",
    "add-norm",
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
#: The variant of the op that is shown first and is plotted.
VARIANT = {"rank": 8, "activation": "silu", "basis": 0, "dtype": "bfloat16", "reads": "sum"}


# ------------------------------------------------------------------------------------------------------- cells of text


def number_text(value: float) -> str:
    """Format a number with three significant digits and no exponent."""
    decimals = 0 if not value else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


BYTE_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


def scaled_bytes(value: float) -> str:
    size, unit = next(((size, unit) for size, unit in BYTE_UNITS if value >= size), BYTE_UNITS[-1])
    return f"{number_text(value / size)} {unit}"


def _scaled(row: Row, units: Iterable[tuple[float, str]]) -> str:
    """Format `12.3 µs (12.1–12.6)`: median and 20 % to 80 % quantiles in a unit that suits the median."""
    median, low, high = row.median, row.quantile(0.2), row.quantile(0.8)
    assert median is not None and low is not None and high is not None
    units = list(units)
    size, name = next(((size, name) for size, name in units if abs(median) >= size), units[-1])
    return f"{number_text(median / size)} {name} ({number_text(low / size)}–{number_text(high / size)})"


def amount(row: Row | None) -> str:
    """Format the time or the bytes of a row, or its status if it has no samples."""
    if row is None:
        return "–"
    if not row.samples:
        # Why a contender was not run is listed once per device, and who had the memory is in the results file.
        brief = row.status.startswith(("not run:", "out of memory:"))
        status = row.status.partition(":")[0] if brief else row.status
        return escaped(status if status != "ok" else "no samples")
    if (row.level, row.what) in BYTES:
        return _scaled(row, BYTE_UNITS)
    return _scaled(row, [(1, "s"), (1e-3, "ms"), (1e-6, "µs")])


def escaped(text: Any) -> str:
    """Escape a text for a Markdown cell."""
    return re.sub(r"([|\\]|<(?=[A-Za-z/!]))", r"\\\1", " ".join(str(text).split()))


def ratio_text(row: Row | None, to: Row | None) -> str:
    """Format `2.31×`, a row's median over another's, or the row's status if it has no samples."""
    if row is None or not row.samples:
        return amount(row)
    share = ratio(row, to)
    return "–" if share is None else f"{number_text(share)}×"


def ratio(row: Row | None, to: Row | None) -> float | None:
    """Return the ratio of two rows' medians; None if a median is missing or is not above 0."""
    over, under = row.median if row else None, to.median if to else None
    return over / under if over is not None and under is not None and over >= 0 and under > 0 else None


def floor_seconds(results: Results, what: str, case: OpCase) -> float | None:
    """Return the seconds that the least memory traffic takes at the measured bandwidth of a copy."""
    if results.bandwidth is None or what not in FLOOR_UNITS:
        return None
    return FLOOR_UNITS[what] * case.unit_bytes / results.bandwidth


def against_floor(results: Results, what: str, case: OpCase, row: Row | None) -> tuple[str, str]:
    """Format a row's time as a multiple of the floor, and the inverse: its share of the copy's bandwidth."""
    floor = floor_seconds(results, what, case)
    if floor is None or row is None or row.median is None:
        return "–", "–"
    return f"{number_text(row.median / floor)}×", f"{floor / row.median:.0%}"


def layer_count(case: ModelCase) -> int:
    return case.layers or GEOMETRIES[case.geometry][1]["num_hidden_layers"]


def hidden_size(case: ModelCase) -> int:
    return GEOMETRIES[case.geometry][1]["hidden_size"]


def unit_bytes(case: ModelCase) -> int:
    """Return the bytes of the hidden state of batch × length tokens."""
    return OpCase(case.batch * case.length, hidden_size(case), dtype=case.dtype).unit_bytes


def variant_of(case: OpCase) -> dict[str, Any]:
    return {name: getattr(case, name) for name in VARIANT}


def variant_text(variant: dict[str, Any]) -> str:
    basis = f"basis of {variant['basis']}" if variant["basis"] else "no basis"
    read = "" if variant["reads"] == "sum" else ", W1 applied to the branch"
    return f"r = {variant['rank']}, {variant['activation']}, {basis}, {variant['dtype']}{read}"


def op_text(case: OpCase) -> str:
    return f"N = {case.tokens}, d = {case.hidden}, {variant_text(variant_of(case))}"


def model_text(case: ModelCase, what: str, layers: bool = True) -> str:
    count = [f"{layer_count(case)} layers" + ("" if case.layers else " (all)")] if layers else []
    decoding = what.startswith("decode")
    tokens = f"batch {case.batch} after {case.length} tokens" if decoding else f"{case.batch} × {case.length} tokens"
    extra = ["checkpointing"] if case.checkpointing else []
    extra += ["measured apart"] if case.group != "usual" else []
    return ", ".join([case.geometry, *count, tokens, f"r = {case.rank}", case.dtype, *extra])


def by_order(names: Iterable[str]) -> list[str]:
    known = {name: place for place, name in enumerate(CONTENDERS)}
    return sorted(set(names), key=lambda name: (known.get(name, len(known)), name))


def as_table(head: list[str], rows: Iterable[list[str]], texts: int = 1) -> str:
    """Return a Markdown table. The first `texts` columns are text, the others are right-aligned numbers."""
    rule = ["---"] * texts + ["--:"] * (len(head) - texts)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def device_name(run: Run) -> str:
    return escaped(run.device) + ("" if run.on_gpu else " (CPU)")


# -------------------------------------------------------------------------------------------------------------- tables


def op_tables(run: Run) -> Iterator[str]:
    for what in LEVELS["op"][1]:
        cases = run.cases("op", what)
        variants = sorted({tuple(variant_of(case).items()) for case in cases}, key=first_the_plotted)
        for items in variants:
            variant = dict(items)
            of_variant = {case: rows for case, rows in cases.items() if variant_of(case) == variant}
            title = f"{WORDS[what]}, {variant_text(variant)}"
            table = _op_table(run.results, what, of_variant)
            if variant == VARIANT:
                yield f"#### {device_name(run)}: {title}\n\n{table}"
            else:
                yield f'<details markdown="1"><summary>{device_name(run)}: {title}</summary>\n\n{table}\n\n</details>'


def first_the_plotted(items: tuple[tuple[str, Any], ...]) -> tuple[Any, ...]:
    return dict(items) != VARIANT, items


def _op_table(results: Results, what: str, cases: Cases) -> str:
    others = [name for name in by_order(name for rows in cases.values() for name in rows) if name != "fused"]
    head = ["N", "d", "fused", "× floor", "share of copy bandwidth", "launches", *others]
    return as_table(head, (_op_cells(results, what, case, cases[case], others) for case in by_size(cases)), texts=0)


def _op_cells(results: Results, what: str, case: OpCase, rows: ByContender, others: list[str]) -> list[str]:
    fused = rows.get("fused")
    launches = "–" if fused is None or fused.launches is None else str(fused.launches)
    floor = against_floor(results, what, case, fused)
    return [
        str(case.tokens),
        str(case.hidden),
        amount(fused),
        *floor,
        launches,
        *(_beside(rows.get(name), fused) for name in others),
    ]


def _beside(row: Row | None, fused: Row | None) -> str:
    """Format `41.2 µs (41.0–41.5), 2.31×`: a contender's time, and its multiple of fused's."""
    share = ratio(row, fused)
    return amount(row) + ("" if share is None else f", {number_text(share)}×")


def accuracy_tables(run: Run) -> Iterator[str]:
    cases = run.cases("accuracy", "error")
    lines = []
    for case in sorted(cases, key=lambda case: (case.dtype, case.hidden, case.tokens, case.rank)):
        row = cases[case].get("fused")
        if row is not None:
            ratios = [f"{number_text(sample)}×" for sample in row.samples] or [escaped(row.status)]
            lines.append([op_text(case), *ratios, *["–"] * (4 - len(ratios))])
    if lines:
        head = ["case", "output", "dx", "dW1", "dW2"]
        yield f"#### {device_name(run)}: fused's error from float64 over the eager hook's\n\n{as_table(head, lines)}"


def counter_text(name: str, value: float) -> str:
    """Format a counter in its unit: bytes of device memory, a hit rate in per cent, or stalled warps per issue."""
    if "dram__bytes" in name:
        return scaled_bytes(value)
    return f"{number_text(value)} %" if name.endswith(".pct") else number_text(value)


def counters_tables(run: Run) -> Iterator[str]:
    lines = [
        [
            WORDS[what],
            op_text(case),
            escaped(name),
            escaped(row.status) if row.median is None else counter_text(name, row.median),
        ]
        for what in LEVELS["counters"][1]
        for case, rows in run.cases("counters", what).items()
        for name, row in rows.items()
        if name != "fused" or row.status != "ok"
    ]
    if lines:
        head = ["pass", "case", "kernel: counter", "value"]
        yield f"#### {device_name(run)}: hardware counters, by ncu\n\n{as_table(head, lines, texts=3)}"


def host_tables(run: Run) -> Iterator[str]:
    lines = []
    for what in LEVELS["host"][1]:
        for case, rows in run.cases("host", what).items():
            for name in by_order(rows):
                row = rows[name]
                low = row.quantile(0.1)
                time = "–" if low is None else f"{number_text(1e6 * low)} µs"
                share = host_ratio(run.results, what, name, RIVALS_ON_HOST[what])
                against = "–" if share is None else f"{number_text(share)}×"
                launches = "–" if row.launches is None else str(row.launches)
                size = f"{case.tokens} rows, {case.layers} layers, r = {case.rank}"
                lines.append([what, size, name, time, against, RIVALS_ON_HOST[what], launches])
    if lines:
        head = ["call", "case", "contender", "host time", "× rival", "rival", "launches"]
        yield f"#### {device_name(run)}: a block's call, lower decile of CPU time\n\n{as_table(head, lines, texts=3)}"


def by_size(cases: Iterable[OpCase]) -> list[OpCase]:
    return sorted(cases, key=lambda case: (case.hidden, case.tokens))


def model_size(case: ModelCase) -> tuple[Any, ...]:
    return (
        hidden_size(case),
        layer_count(case),
        case.batch * case.length,
        case.batch,
        not case.checkpointing,
        case.group == "usual",
        dataclasses.astuple(case),
    )


def model_tables(run: Run) -> Iterator[str]:
    for what in LEVELS["model"][1]:
        cases = run.cases("model", what)
        # In decoding the hidden state is only kilobytes, so its traffic does not explain steering's cost.
        with_units = what in ("train", "prefill") and run.results.bandwidth is not None
        head = ["case", "contender", "time", "× unsteered", "× fused"]
        head += ["added units per layer"] if with_units else []
        lines = []
        for case in sorted(cases, key=model_size):
            rows = cases[case]
            for name in by_order(rows):
                row = rows[name]
                cells = [amount(row), ratio_text(row, rows.get("unsteered")), ratio_text(row, rows.get("fused"))]
                if with_units:
                    cells.append(_added_units(run.results, case, row, rows.get("unsteered")))
                lines.append([model_text(case, what), name, *cells])
        if lines:
            yield f"#### {device_name(run)}: {WORDS[what]}\n\n{as_table(head, lines, texts=2)}"


def busy_tables(run: Run) -> Iterator[str]:
    for what in LEVELS["busy"][1]:
        cases = run.cases("busy", what)
        lines = [
            [
                model_text(case, what), name, amount(row),
                ratio_text(row, cases[case].get("unsteered")), ratio_text(row, cases[case].get("fused")),
            ]
            for case in sorted(cases, key=model_size)
            for name, row in ((name, cases[case][name]) for name in by_order(cases[case]))
        ]  # fmt: skip
        if lines:
            head = ["case", "contender", "time on the GPU", "× unsteered", "× fused"]
            yield f"#### {device_name(run)}: {WORDS[what]}, time on the GPU\n\n{as_table(head, lines, texts=2)}"


def _added_units(results: Results, case: ModelCase, row: Row, unsteered: Row | None) -> str:
    """Format the time that steering adds to a layer, in units: passes of the hidden state at copy bandwidth."""
    before = unsteered.median if unsteered else None
    if row.median is None or before is None or row is unsteered or results.bandwidth is None:
        return "–"
    return number_text((row.median - before) / layer_count(case) * results.bandwidth / unit_bytes(case))


def memory_tables(run: Run) -> Iterator[str]:
    for what in LEVELS["memory"][1]:
        cases = run.cases("memory", what)
        head = ["case", "contender", "memory", "units of N × d", "× fused"]
        lines = []
        for case in sorted(cases, key=model_size):
            rows = cases[case]
            for name in by_order(rows):
                median = rows[name].median
                units = "–" if median is None else number_text(median / unit_bytes(case))
                lines.append(
                    [model_text(case, what), name, amount(rows[name]), units, ratio_text(rows[name], rows.get("fused"))]
                )
        if lines:
            yield f"#### {device_name(run)}: {WORDS[what]}\n\n{as_table(head, lines, texts=2)}"


def projection_tables(run: Run) -> Iterator[str]:
    cases = run.cases("projection", "step")
    names = by_order(name for rows in cases.values() for name in rows)
    sizes = sorted(cases, key=lambda case: (case.writers, case.dtype, case.layers, case.hidden, case.rank))
    lines = []
    for case in sizes:
        rows = cases[case]
        others = (_beside(rows.get(name), rows.get("fused")) for name in names if name != "fused")
        size = map(str, (case.layers, case.hidden, case.writers, case.rank))
        lines.append([case.dtype, *size, amount(rows.get("fused")), *others])
    if lines:
        head = ["dtype of B", "layers", "d", "k", "r", "fused", *(name for name in names if name != "fused")]
        yield f"#### {device_name(run)}: W2' of all layers, once per optimizer step\n\n{as_table(head, lines)}"


def norm_tables(run: Run) -> Iterator[str]:
    made = run.cases("norm", "bytes")
    for what in ("forward", "backward"):
        cases = run.cases("norm", what)
        others = [name for name in by_order(name for rows in cases.values() for name in rows) if name != "fused"]
        allocated = ("fused", "hook") if what == "forward" else ()
        lines = []
        for case in by_size(cases):
            rows = cases[case]
            times = (_beside(rows.get(name), rows.get("fused")) for name in others)
            sizes = (amount(made.get(case, {}).get(name)) for name in allocated)
            size = map(str, (case.tokens, case.hidden, case.rank))
            lines.append([*size, amount(rows.get("fused")), *times, *sizes])
        if lines:
            head = ["N", "d", "r", "fused", *others, *(f"{name} allocates" for name in allocated)]
            title = f"{device_name(run)}: the op and the RMSNorm behind it, {what}"
            yield f"#### {title}\n\n{as_table(head, lines, texts=0)}"


def grouped_tables(run: Run) -> Iterator[str]:
    made = run.cases("grouped", "bytes")
    for prefill in (False, True):
        cases = {case: rows for case, rows in run.cases("grouped", "forward").items() if case.prefill == prefill}
        others = [name for name in by_order(name for rows in cases.values() for name in rows) if name != "fused"]
        lines = []
        for case in sorted(cases, key=lambda case: (case.dtype, case.hidden, case.tokens, case.adapters)):
            rows, sizes = cases[case], made.get(case, {})
            times = (_beside(rows.get(name), rows.get("fused")) for name in others)
            size = map(str, (case.tokens, case.hidden, case.rank, case.adapters))
            both = (amount(sizes.get(name)) for name in ("fused", "gather-bmm"))
            lines.append([f"{case.activation}, {case.dtype}", *size, amount(rows.get("fused")), *times, *both])
        if lines:
            head = ["", "N", "d", "r", "adapters", "fused", *others, "fused allocates", "gather-bmm allocates"]
            kind = "tokens of an adapter together, as in prefill" if prefill else "adapters mixed, as in decoding"
            yield f"#### {device_name(run)}: an adapter for each token, {kind}\n\n{as_table(head, lines)}"


def serve_text(case: ServeCase) -> str:
    layers = f"{layer_count(case.model)} layers" + ("" if case.layers else " (all)")
    adapters = f"{case.adapters} adapter" + ("s" if case.adapters > 1 else "")
    return f"{case.geometry}, {layers}, {case.batch} × {case.length} tokens, {adapters}, r = {case.rank}, {case.dtype}"


def serve_tables(run: Run) -> Iterator[str]:
    titles = {
        ("serve", "generate"): "transformers' generate, per token of every row",
        ("serve", "decode-graph"): "transformers, a decode step, CUDA graph",
        ("vllm", "generate"): "vLLM, per token of every row",
    }
    for (level, what), title in titles.items():
        cases = run.cases(level, what)
        lines = []
        for case in sorted(cases, key=lambda case: (model_size(case.model), case.adapters)):
            rows = cases[case]
            for name in by_order(rows):
                row = rows[name]
                speed = "–" if row.median is None else number_text(case.batch / row.median)
                against = (ratio_text(row, rows.get(other)) for other in ("unsteered", "one-adapter", "fused"))
                lines.append([serve_text(case), name, amount(row), speed, *against])
        if lines:
            head = ["case", "contender", "time", "tokens per second", "× unsteered", "× one adapter", "× fused"]
            yield f"#### {device_name(run)}: {title}\n\n{as_table(head, lines, texts=2)}"
