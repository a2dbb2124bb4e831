"""Draw the figures of a diagnosis with matplotlib. No display is needed."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..adapters.saving import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
from .records import BINS, LEVELS, LayerDiagnosis, Spread

# ------------------------------------------------------------------------------------------------------------- figures


def check_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the figures need matplotlib; `pip install 'fused-steer[demo]'`")


def empty_figure(size: tuple[float, float]) -> Any:
    """Return a matplotlib figure of this size in inches, for files only."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _layer_axes(layers: Sequence[LayerDiagnosis], **labels: str) -> tuple[Any, Axes]:
    """Return a figure and its axes, with the layers along x."""
    from matplotlib.ticker import MaxNLocator

    figure = empty_figure((min(4.5 + 0.12 * len(layers), 12), 4))
    axes = figure.add_subplot(xlabel="layer", **labels)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(layers[0].layer - 0.6, layers[-1].layer + 0.6)
    axes.grid(axis="y", alpha=0.3)
    return figure, axes


def _draw_spreads(axes: Axes, layers: Sequence[LayerDiagnosis], spreads: Sequence[Spread]) -> None:
    """Draw each layer's 5 to 95 % quantiles as a thin bar, 25 to 75 % as a wide one, its median and its mean."""
    at = [layer.layer for layer in layers]
    q = {level: [spread.quantiles[str(level)] for spread in spreads] for level in LEVELS}
    inner = np.subtract(q[0.75], q[0.25])
    axes.vlines(at, q[0.05], q[0.95], color="tab:blue", alpha=0.5, linewidth=1.5, label="5 – 95 % of tokens")
    axes.bar(at, inner, bottom=q[0.25], width=0.5, color="tab:blue", alpha=0.4, label="25 – 75 %")
    axes.plot(at, q[0.5], color="tab:blue", marker="o", markersize=4, linewidth=1, label="median")
    axes.plot(at, [spread.mean for spread in spreads], color="tab:orange", marker="x", linestyle="none", label="mean")
    axes.set_ylim(bottom=0)
    axes.figure.legend(loc="outside lower center", ncols=4, fontsize="small", frameon=False)


def _plot_mlp_share(layers: Sequence[LayerDiagnosis], file: Path) -> None:
    figure, axes = _layer_axes(
        layers, ylabel="‖y‖ / ‖h‖", title="The MLP's output y as a share of the block's output h"
    )
    _draw_spreads(axes, layers, [layer.mlp_share for layer in layers if layer.mlp_share])
    save_figure(figure, file)


#: h at each site.
_STEERED = {
    "post_attention": "the attention's output",
    "pre_mlp": "the MLP's input",
    "post_mlp": "the MLP's output",
    "post_block": "the block's output",
}


def draw_shift(layers: Sequence[LayerDiagnosis], file: Path) -> None:
    """Save ‖δ‖/‖h‖ of layers at one site as a PNG."""
    figure, axes = _layer_axes(
        layers, ylabel="‖δ‖ / ‖h‖", title=f"Size of the steering's shift δ against h, {_STEERED[layers[0].site]}"
    )
    _draw_spreads(axes, layers, [layer.shift for layer in layers if layer.shift])
    save_figure(figure, file)


def _plot_spectral_norm(layers: Sequence[LayerDiagnosis], file: Path) -> None:
    figure, axes = _layer_axes(layers, ylabel="‖W2'‖₂", title="Spectral norm of the steering's up projection")
    norms = np.array([layer.spectral_norm for layer in layers], dtype=float)  # a layer without a norm leaves a gap
    axes.plot([layer.layer for layer in layers], norms, marker="o", markersize=4)
    axes.set_ylim(bottom=0)
    save_figure(figure, file)


def _plot_cosine(layers: Sequence[LayerDiagnosis], file: Path) -> None:
    """Draw each layer's histogram of cosines as a column of colours, with its median."""
    from matplotlib.colors import PowerNorm

    figure, axes = _layer_axes(layers, ylabel="cosine of δ and ℓ", title="Steering's shift δ against the LoRA's ℓ")
    axes.grid(visible=False)
    cosines = [layer.cosine for layer in layers if layer.cosine]
    first, last = layers[0].layer, layers[-1].layer
    shares = np.full((BINS, last - first + 1), np.nan)  # a layer without cosines leaves a gap
    for layer, cosine in zip(layers, cosines, strict=True):
        shares[:, layer.layer - first] = np.array(cosine.counts) / cosine.tokens
    edges = np.linspace(-1, 1, BINS + 1)
    image = axes.pcolormesh(
        np.arange(first - 0.5, last + 1), edges, shares, cmap="Blues", norm=PowerNorm(0.5, 0, max(np.nanmax(shares), 0))
    )
    figure.colorbar(image, label=f"share of tokens (bins of {2 / BINS:.2f})")
    axes.plot(
        [layer.layer for layer in layers],
        [cosine.quantiles["0.5"] for cosine in cosines],
        color="tab:orange",
        marker="o",
        markersize=4,
        linewidth=1,
        label="median",
    )
    axes.axhline(0, color="black", linewidth=0.5)
    filled = np.flatnonzero(np.nansum(shares, axis=1))
    reach = min(1.0, 1.2 * max(abs(edges[filled[0]]), abs(edges[filled[-1] + 1]), 0.1))
    axes.set_ylim(-reach, reach)
    axes.legend(fontsize="small")
    save_figure(figure, file)


def _plot_alignment(layers: Sequence[LayerDiagnosis], file: Path) -> None:
    """Draw a square of |u_iᵀ u'_j| for each layer, headed by the layer's largest principal cosine."""
    columns = min(len(layers), max(3, math.ceil(math.sqrt(1.5 * len(layers)))))
    rows = math.ceil(len(layers) / columns)
    figure = empty_figure((max(1.5 * columns + 1.2, 5), 1.75 * rows + 1.2))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    image = None
    for axes, layer in zip(grid.flat, layers, strict=False):
        assert layer.alignment is not None
        values = np.array(layer.alignment.singular)
        extent = (0.5, values.shape[1] + 0.5, values.shape[0] + 0.5, 0.5)
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", extent=extent)
        axes.set_title(f"layer {layer.layer}\nmax {layer.alignment.principal[0]:.2g}", fontsize="small")
        for axis, count in zip((axes.xaxis, axes.yaxis), reversed(values.shape), strict=True):
            axis.set_ticks(sorted({1, count}))
    for axes in list(grid.flat)[len(layers) :]:
        axes.axis("off")
    figure.colorbar(image, ax=grid, label="|cosine| of singular vectors", shrink=0.9)
    figure.suptitle("Left singular vectors of LoRA's update and of W2 W1\n(max: largest principal cosine)", fontsize=11)
    figure.supxlabel("steering's singular vector", fontsize="medium")
    figure.supylabel("LoRA's singular vector", fontsize="medium")
    save_figure(figure, file)


_FIGURES: dict[str, Callable[[Sequence[LayerDiagnosis], Path], None]] = {
    "mlp_share": _plot_mlp_share,
    "alignment": _plot_alignment,
    "cosine": _plot_cosine,
    "spectral_norm": _plot_spectral_norm,
    "shift": draw_shift,
}
