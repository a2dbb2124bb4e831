"""The table of `fused-steer coverage`: its rows, its summary, docs/coverage.md."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers

from .._version import __version__
from ..adapters.parameters import SITE

#: Largest relative error, by norm, of steered logits against those of plain forward hooks, in float32.
TOLERANCE = 1e-5

#: The outcomes of a model type, with their meaning.
OUTCOMES = {
    "fused": "passes; fused into each layer's last residual add",
    "inline": "passes; by a launch of its own in each layer's forward, for the reason given",
    "mixed": "passes; some layers are fused, the others are not, for the reason given",
    "hook": "passes; every layer is steered by a hook, for the reason given",
    "refused": "`patch_model` refuses it and leaves it as it was",
    "raises": "patched, it raises this error when it runs",
    "unbuilt": "transformers itself does not build or run it here",
    "wrong": "patched, it silently gives a wrong result",
}


@dataclass(frozen=True)
class Row:
    """The result of checking one model type at one site.

    reason: why the outcome is not "fused". error: the largest relative error against plain hooks.
    post_mlp: the result at that site, in the row of post_block.
    norms: the layers with `fuse_norm=True` behind which the norm is computed in the steering's pass. norm_reason: why
    not behind the others.
    """

    model_type: str
    model_class: str
    outcome: str
    reason: str = ""
    note: str = ""
    layers: int = 0
    hooked: int = 0
    error: float = 0.0
    seconds: float = 0.0
    post_mlp: Row | None = None
    norms: int = 0
    norm_reason: str = ""

    @property
    def passes(self) -> bool:
        return self.outcome in ("fused", "inline", "mixed", "hook")


def counts(rows: Sequence[Row]) -> dict[str, int]:
    """Count the model types of each outcome."""
    counter = Counter(row.outcome for row in rows)
    return {outcome: counter[outcome] for outcome in OUTCOMES}


def fused_norms(rows: Sequence[Row]) -> tuple[int, int]:
    """Return the number of classes that fuse the norm behind every layer, and of those that do behind some."""
    of_class: dict[str, list[Row]] = {}
    for row in rows:
        if row.passes:
            of_class.setdefault(row.model_class, []).append(row)
    every = sum(all(row.norms == row.layers for row in group) for group in of_class.values())
    return every, sum(any(row.norms for row in group) for group in of_class.values()) - every


def at_post_mlp(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of that site."""
    return [row.post_mlp for row in rows if row.post_mlp is not None]


def summary(rows: Sequence[Row]) -> str:
    """Return a line for each site, with the number of model types that passed and of each outcome."""
    lines = []
    for site, these in ((SITE, rows), ("post_mlp", at_post_mlp(rows))):
        if these:
            found = ", ".join(f"{n} {outcome}" for outcome, n in counts(these).items())
            lines.append(f"{site}: {sum(row.passes for row in these)} of {len(these)} pass: {found}")
    every, some = fused_norms(rows)
    lines.append(f"fuse_norm: {every} classes fuse the norm behind every layer, {some} behind some layers")
    return "\n".join(lines)


def markdown(rows: Sequence[Row]) -> str:
    """Return the text of docs/coverage.md: the table of model types and its explanation."""
    versions = f"fused-steer {__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    classes = {row.model_class for row in rows}
    passing = classes - {row.model_class for row in rows if not row.passes}
    passed, inner = sum(row.passes for row in rows), at_post_mlp(rows)
    lines = [
        "# Coverage",
        "",
        "Every model type that `AutoModelForCausalLM` knows, built tiny with random weights from its config class,",
        "patched in every layer, and checked on a CPU in float32: at the default site, `post_block`, and at",
        "`post_mlp`. A fresh patch, and the model unpatched again, give the logits and the greedy generation of the",
        "model as it came, bit for bit. With a random adapter, logits, generation and the adapter's gradients equal",
        "those of plain forward hooks on the layers, or on their MLPs (relative error by norm at most "
        f"{TOLERANCE:.0e};",
        "where rounding alone moves a gradient further, its error against float64 is at most twice that of the hooks),",
        "and each layer steers as often as there. Written by `fused-steer coverage --out docs/coverage.md`.",
        "",
        f"Versions: {versions}, Python {platform.python_version()}.",
        "",
        f"**{passed} of {len(rows)} model types pass**, {len(passing)} of {len(classes)} classes;",
        f"the largest relative error is {max((row.error for row in rows), default=0.0):.1e}.",
        f"At `post_mlp` {sum(row.passes for row in inner)} of {len(inner)} pass; the largest relative error is "
        f"{max((row.error for row in inner), default=0.0):.1e}.",
        "With `fuse_norm=True` {} classes fuse the norm behind every layer, and {} behind some layers;".format(
            *fused_norms(rows)
        ),
        f"logits and generation equal those without it (relative error by norm at most {TOLERANCE:.0e}).",
        "",
        "| outcome | model types | at `post_mlp` | meaning |",
        "|---|---|---|---|",
        *(
            f"| {outcome} | {n} | {there} | {OUTCOMES[outcome]} |"
            for (outcome, n), there in zip(counts(rows).items(), counts(inner).values(), strict=True)
        ),
        "",
        "| class | model type | outcome | why | at `post_mlp` | why | norms fused | why not all |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row.model_type):
        there = row.post_mlp or Row(row.model_type, row.model_class, "-")
        lines.append(
            f"| {row.model_class} | {row.model_type} | {row.outcome} | {_why(row.reason, row.note)} "
            f"| {there.outcome} | {_why(there.reason)} "
            f"| {f'{row.norms} of {row.layers}' if row.passes else '-'} | {_why(row.norm_reason)} |"
        )
    return "\n".join(lines) + "\n"


def _why(*parts: str) -> str:
    return "; ".join(filter(None, parts)).replace("|", "\\|")
