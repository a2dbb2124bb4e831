"""Draws an extraction: the separation and the length of each layer's vector, and the sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..adapters.saving import save_figure
from ..diagnostics.figures import empty_figure
from .extraction import Extraction
from .sweeping import Dose

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(extraction: Extraction, doses: Sequence[Dose], file: Path) -> None:
    """Save the picture as a PNG. Without doses it has the layers' panels only."""
    from matplotlib.ticker import MaxNLocator

    figure = empty_figure((11 if doses else 5.5, 6))
    grid = figure.subplots(2, 2 if doses else 1, squeeze=False)
    index = [row.layer for row in extraction.layers]
    chosen = sorted(extraction.vectors)
    measured = "held-out texts" if any(extraction.held_out) else "the texts themselves"
    for axes, name, title in (
        (grid[0, 0], "auc", f"Separation of the sides (AUC, {measured})"),
        (grid[1, 0], "share", "Length of the vector against the hidden state, ‖v‖ / ‖h‖"),
    ):
        values = [getattr(row, name) for row in extraction.layers]
        axes.plot(index, values, color="tab:blue", linewidth=1)
        axes.plot(chosen, [values[layer] for layer in chosen], "o", color="tab:orange", label="in the adapter")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    grid[0, 0].axhline(0.5, color="black", linewidth=0.5, linestyle="--")
    grid[1, 0].set_ylim(bottom=0)
    grid[0, 0].legend(fontsize="small")
    if doses:
        _draw_doses(grid[0, 1], grid[1, 1], doses)
    save_figure(figure, file)


def _draw_doses(above: Axes, below: Axes, doses: Sequence[Dose]) -> None:
    from matplotlib import colormaps

    groups = list(dict.fromkeys(dose.layers for dose in doses))
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(groups)))
    for axes, name, title in (
        (above, "perplexity", "Perplexity of the texts"),
        (below, "margin", "Log-probability a token, positive less negative texts"),
    ):
        for group, colour in zip(groups, colours, strict=True):
            rows = sorted((dose for dose in doses if dose.layers == group), key=lambda dose: dose.dose)
            values = [getattr(row, name) for row in rows]
            label = f"layer {group[0]}" if len(group) == 1 else f"{len(group)} layers"
            axes.plot([row.dose for row in rows], values, "o-", color=colour, markersize=4, linewidth=1, label=label)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("strength")
        axes.grid(alpha=0.3)
    above.set_yscale("log")
    below.legend(fontsize="x-small", ncols=2)
