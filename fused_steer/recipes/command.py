"""`fused-steer train`: trains by a recipe and tells what came of it."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING

from .recipe import SHIPPED, read_recipe, shipped
from .running import check, train

if TYPE_CHECKING:
    from rich.console import Console


def run(source: str, changes: list[str], resume: bool, only_check: bool, console: Console) -> None:
    """Train by a recipe, or check it alone.

    Raises:
        ValueError, TypeError, FileNotFoundError, ImportError, RuntimeError: see `read_recipe` and `train`.
    """

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    recipe = read_recipe(source, changes)
    if only_check:
        plan = check(recipe)
        say(f"recipe    {source} is well: {len(plan.train)} rows ({plan.kind}), {len(plan.held_out)} to evaluate on")
        return
    found = train(recipe, resume=resume, say=say)
    _leave_processes()
    if int(os.environ.get("RANK", "0")):
        return
    if found.loss_before is not None and found.loss_after is not None:
        say(f"loss      {found.loss_before:.4f} before, {found.loss_after:.4f} after, of the rows held out")
    if found.diagnosis is not None:
        medians = [layer.shift.quantiles["0.5"] for layer in found.diagnosis.layers if layer.shift is not None]
        if medians:
            say(f"shifts    ‖δ‖/‖h‖ of a median token: {min(medians):.3f} to {max(medians):.3f} by layer")
    say(f"adapter   {recipe.out}")
    for file in found.files:
        say(f"wrote     {file}")


def _leave_processes() -> None:
    """Destroy the process group of a launcher's processes, so that each can exit.

    PyTorch waits forever or aborts if the group's threads outlive the interpreter, or the group its wrapped model.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        gc.collect()  # the trainer, which has the wrapped model
        dist.destroy_process_group()


def list_shipped(console: Console) -> None:
    """Print the name and the first line of each recipe that comes with the package."""
    for name in shipped():
        line = (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        console.print(f"{name:<16} {line}", markup=False, highlight=False, soft_wrap=True)
