"""`python -m bench.fit`: how much of a LoRA can fitted steering adapters express? ListOps, SmolLM2-135M, on a CPU.

A LoRA on every linear projection learns the demo's task. Then `fused_steer.theory.fit` fits adapters of several ranks
to its hidden states, in closed form, and all are tested on the same held-out expressions. A rank that is in the results
file is not fitted again, so that the same command goes on where it stopped. `--report` writes the table and pictures of
`docs/theory.md`.

The expressions that the adapters are fitted on are neither trained on nor tested with, and have no answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import joint

OPERATORS, DEPTH = ("MAX", "MIN"), 2  # the demo's task


@dataclass(frozen=True)
class Settings:
    """All that a result depends on, beside the rank and the machine."""

    model: str | None = None
    steps: int = 110
    batch_size: int = 8
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_lr: float = 1e-3
    tested: int = 100
    fitted: int = 300
    ridge: float = 1e-6
    seed: int = 0


def draw(settings: Settings) -> tuple[list[Any], list[Any], list[Any]]:
    """The expressions to test with, to train on, and to fit on; none is drawn twice."""
    from fused_steer.tools.listops import distinct

    trained = settings.tested + settings.steps * settings.batch_size
    drawn = distinct(trained + settings.fitted, operators=OPERATORS, depth=DEPTH, seed=settings.seed)
    return drawn[: settings.tested], drawn[settings.tested : trained], drawn[trained:]


def train_lora(base: Any, encoder: Any, settings: Settings, folder: Path) -> None:
    """Train a LoRA on every linear projection, and save it in `folder`. `base` is left with the LoRA in it."""
    _, training, _ = draw(settings)
    size = settings.batch_size
    batches = [encoder.training_batch(training[i : i + size]) for i in range(0, len(training), size)]
    names = ("steps", "batch_size", "lora_rank", "lora_alpha", "lora_lr")
    as_joint = joint.Settings(**{name: getattr(settings, name) for name in names})
    model, groups = joint.adapt(base, "lora", as_joint, settings.seed)
    joint.train(model, groups, batches, as_joint, "LoRA")
    model.save_pretrained(folder)
