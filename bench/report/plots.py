"""Draws the plots of a run as SVG."""

from __future__ import annotations

import contextlib
import hashlib
import io
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..counted import Count
from ..levels import FLOOR_UNITS
from ..results import Row
from .read import Cases, Run
from .tables import (
    WORDS,
    by_order,
    by_size,
    first_the_plotted,
    layer_count,
    model_size,
    model_text,
    number_text,
    ratio,
    variant_of,
    variant_text,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STAMP = b"drawn from "  # in every plot; a digest of its data follows


@dataclass(frozen=True)
class Series:
    """A series of points with whiskers from low to high.

    Attributes:
        colour: the index in the palette; None for black.
        style: matplotlib's format string.
    """

    label: str
    points: tuple[tuple[float, float, float, float], ...]  # x, y, low, high
    colour: int | None = None
    style: str = "o-"


@dataclass(frozen=True)
class Panel:
    """One pair of axes. With `ticks`, the names of x = 0, 1, …, it is a bar chart, otherwise a line chart."""

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
    """Return the plots that have data. A run on a CPU has none, as its times are not those of the kernels."""
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
    """Return the name and the cases of the plotted variant: VARIANT if it was measured, else another."""
    cases = run.cases("op", what)
    variants = sorted({tuple(variant_of(case).items()) for case in cases}, key=first_the_plotted)
    if not variants:
        return "", {}
    return variant_text(dict(variants[0])), {c: cases[c] for c in by_size(cases) if variant_of(c) == dict(variants[0])}


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
            label = f"floor: {FLOOR_UNITS[what]} units at {number_text(bandwidth / 1e9)} GB/s"  # type: ignore[operator]
            series.insert(0, Series(label, floor, None, "-"))
            x = "bytes of the floor, MB"
            yield Panel(f"{WORDS[what]}\n{text}", x, "time, µs", tuple(series), log_x=True, log_y=True)


def _memory_panels(run: Run) -> Iterator[Panel]:
    for what in ("peak", "kept"):
        groups: dict[str, Cases] = {}
        for case, rows in sorted(run.cases("memory", what).items(), key=lambda item: model_size(item[0])):
            groups.setdefault(model_text(case, what, layers=False), {})[case] = rows
        for text, cases in groups.items():
            series = []
            for place, name in enumerate(by_order(name for rows in cases.values() for name in rows)):
                points = tuple(
                    _point(layer_count(case), rows[name], 2.0**-20)
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
        names = [n for n in by_order(name for rows in cases.values() for name in rows) if n != "unsteered"]
        series = []
        for place, case in enumerate(sorted(cases, key=model_size)):
            rows = cases[case]
            base = rows["unsteered"].median if "unsteered" in rows else None
            points = tuple(
                _point(x, rows[name], 100 / base, -100)
                for x, name in enumerate(names)
                if base and name in rows and rows[name].samples
            )
            if points:
                series.append(Series(model_text(case, what), points, place))
        if series:
            y = "time above the unsteered model, %"
            yield Panel(WORDS[what], "", y, tuple(series), ticks=tuple(names), level=0.0)


def _stamp(drawn: object) -> str:
    return STAMP.decode() + hashlib.sha256(repr(drawn).encode()).hexdigest()[:32]


@contextlib.contextmanager
def _own_settings(name: str) -> Iterator[None]:
    """Give matplotlib our settings inside the `with` block; ignore the user's matplotlibrc."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 8})
        yield


def _svg(figure: Figure, drawn: object) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Description": _stamp(drawn)})
    return stream.getvalue()


def draw(plot: Plot) -> bytes:
    """Draw a plot as SVG. The same plot gives the same bytes, independent of the user's matplotlibrc."""
    from matplotlib.figure import Figure

    with _own_settings(plot.name):
        height = 3.6 * len(plot.panels)
        figure = Figure(figsize=(8.5, height))
        # Fixed margins: automatic layout would depend on the installed fonts.
        figure.subplots_adjust(left=0.1, right=0.62, bottom=0.6 / height, top=1 - 0.8 / height, hspace=0.45)
        figure.suptitle(plot.title, y=1 - 0.1 / height, fontsize=11)
        for place, panel in enumerate(plot.panels):
            _draw_panel(figure.add_subplot(len(plot.panels), 1, place + 1), panel)
        return _svg(figure, plot)


COUNTED = ("unsteered", "hook", "fused")
_COLOURS = ("#b0b0b0", "#d9822b", "#2a6fbb")


def draw_counts(counts: dict[str, dict[str, Count]]) -> bytes:
    """Draw README's picture: bars of the units and launches of one layer, forward and backward."""
    from matplotlib.figure import Figure

    titles = {"units": "passes of the hidden state through memory", "launches": "kernel launches"}
    with _own_settings("counted"):
        figure = Figure(figsize=(8.5, 2.9))
        figure.subplots_adjust(left=0.09, right=0.97, bottom=0.16, top=0.8, wspace=0.28)
        figure.suptitle("The end of one decoder layer, more than 64 tokens: counted, not timed", y=0.97, fontsize=11)
        for place, (what, title) in enumerate(titles.items()):
            axes = figure.add_subplot(1, 2, place + 1)
            for row, name in enumerate(COUNTED):
                values = [getattr(counts[name][passed], what) for passed in counts[name]]
                heights = [len(COUNTED) * -x - row + 0.7 * -x for x in range(len(values))]
                bars = axes.barh(heights, values, 0.85, color=_COLOURS[row])
                axes.bar_label(bars, [f"{name}: {value}" for value in values], padding=3, fontsize=8)
            axes.set_yticks([-1, -1 - len(COUNTED) - 0.7], list(counts["fused"]))
            axes.tick_params(axis="y", length=0, labelsize=9)
            axes.set_xlim(0, 1.3 * max(getattr(c, what) for name in COUNTED for c in counts[name].values()))
            axes.set_xticks([])
            axes.set_title(f"{title}, per layer", fontsize=9)
            for side in ("top", "right", "bottom"):
                axes.spines[side].set_visible(False)
        return _svg(figure, {name: counts[name] for name in COUNTED})


def _draw_panel(axes: Axes, panel: Panel) -> None:
    for place, series in enumerate(panel.series):
        colour = "black" if series.colour is None else f"C{series.colour % 10}"
        label = textwrap.fill(series.label, 36)
        xs, ys, lows, highs = zip(*series.points, strict=True)
        # Rounding can put the median slightly outside its quantiles, but a whisker cannot have a negative length.
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
        if not panel.ticks:  # x is tokens or layers: a few whole numbers
            measured = sorted({point[0] for series in panel.series for point in series.points})
            axes.set_xticks(measured, [f"{x:.0f}" for x in measured])
            axes.minorticks_off()
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), fontsize=7, frameon=False)
