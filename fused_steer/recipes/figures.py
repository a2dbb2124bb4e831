"""Draws a training run: the losses by step, and the size of the shifts by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..adapters.saving import save_figure
from ..diagnostics.diagnosis import Diagnosis
from ..diagnostics.figures import draw_shift, empty_figure


def draw_losses(history: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Save the losses of the Trainer's log as a PNG.

    Raises:
        ValueError: the log has no loss.
    """
    losses = [(row["step"], row["loss"]) for row in history if "loss" in row]
    evaluated = [(row["step"], row["eval_loss"]) for row in history if "eval_loss" in row]
    if not losses:
        raise ValueError("the log has no loss; expected at least one logged step")
    figure = empty_figure((6, 4))
    axes = figure.add_subplot(xlabel="step", ylabel="loss", title="Training")
    axes.plot(*zip(*losses, strict=True), color="tab:blue", linewidth=1, label="trained on")
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), "o-", color="tab:orange", markersize=4, linewidth=1, label="held out")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, file)


def draw_shifts(diagnosis: Diagnosis, folder: Path, name: str) -> list[Path]:
    """Save ‖δ‖/‖h‖ of each layer as a PNG for each site. Return the files."""
    sites = list(dict.fromkeys(layer.site for layer in diagnosis.layers if layer.shift is not None))
    files = []
    for site in sites:
        file = folder / (name if len(sites) == 1 else f"{Path(name).stem}-{site}.png")
        layers = [layer for layer in diagnosis.layers if layer.site == site and layer.shift is not None]
        draw_shift(layers, file)
        files.append(file)
    return files
