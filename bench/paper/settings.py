"""The settings that all runs share, and the learning rates to try for each method."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

#: The learning rates to try for each method. We do not have the paper's grids (F.2) and choices (Tables 8 to 10). These
#: are our own, around the default of each method's released code. `--rates` overrides them.
RATES: dict[str, tuple[float, ...]] = {
    "untrained": (0.0,),
    "full": (5e-6, 1e-5, 2e-5, 5e-5),
    "lora": (1e-4, 2e-4, 5e-4, 1e-3),
    "reft": (3e-4, 9e-4, 2e-3, 5e-3),
    "reft-post-block": (3e-4, 9e-4, 2e-3, 5e-3),
    "lofit": (1e-3, 5e-3, 1e-2, 5e-2),
    "jola": (1e-3, 5e-3, 1e-2, 5e-2),
    "lowrank": (3e-4, 9e-4, 2e-3, 5e-3),
    "rank1": (3e-4, 9e-4, 2e-3, 5e-3),
    "vector": (1e-3, 5e-3, 1e-2, 5e-2),
    "joint": (1e-4, 2e-4, 5e-4, 1e-3),
    "joint-orth": (1e-4, 2e-4, 5e-4, 1e-3),
    "joint-released": (1e-4, 2e-4, 5e-4, 1e-3),
}
#: Of the learning rate, after the warm-up.
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Settings:
    """The settings that all runs share. Defaults follow the paper's F.5 unless noted.

    Attributes:
        batch_size: examples per batch.
        accumulation: batches per AdamW step; there is no weight decay. The released code has 2.
        schedule, warmup: of the learning rate, one of `SCHEDULES` and a share of the steps; None: the method's own.
            The released code's `train.py` has a linear decay with a warm-up of 0.03.
        rank, activation: of the steering. The identity is the activation of the paper's Tables 1 and 2.
        init_scale: factor on the initial values of the steering's W1. The released code has 1e-3.
        lora_rank, lora_alpha: of LoRA on all linear projections; PEFT's defaults, as in the released code.
        reft_rank, reft_positions: pyreft's defaults for reasoning tasks.
        lofit_share, lofit_rate, lofit_l1: of LoFiT's first stage: the share of heads it selects, its learning rate, and
            the factor of its L1 penalty. The share is the LoFiT paper's. Rate and factor are its authors' choice for
            CLUTRR with Llama-2-7B. Their scripts for MQuAKE and TruthfulQA have rates of 1e-3 to 5e-3 and factors of
            5e-4 to 1e-3; their command has no penalty by default.
        new_tokens, max_length: the most tokens to generate, and of a training row; None: those of the released code.
        projection: when `joint-released` projects.
        end: whether an end-of-sequence token closes each completion (the released code has none).
        splits: "ours" or "released", the released code's (fused_steer/paper/data.py).
        chat: whether prompts and completions use the chat template (the released code does so for Gemma).
    """

    model: str
    dtype: str = "float32"
    batch_size: int = 8
    accumulation: int = 1
    epochs: int | None = None
    schedule: str | None = None
    warmup: float | None = None
    rank: int = 8
    activation: str = "identity"
    init_scale: float = 1.0
    lora_rank: int = 8
    lora_alpha: int = 8
    reft_rank: int = 8
    reft_positions: str = "first_7+last_7"
    lofit_share: float = 0.03
    lofit_rate: float = 5e-4
    lofit_l1: float = 5e-3
    new_tokens: int | None = None
    max_length: int | None = None
    projection: str = "100"
    end: bool = False
    chat: bool = False
    train_limit: int | None = None
    evaluated_limit: int | None = None
    listops_lengths: tuple[int, int] = (4, 64)
    splits: str = "ours"
    data: str | None = None

    def __post_init__(self) -> None:
        counts = ("batch_size", "rank", "lora_rank", "reft_rank", "epochs", "train_limit", "evaluated_limit")
        for name in (*counts, "accumulation", "new_tokens", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name.replace('_', ' ')} is {value}; expected at least 1")

        if not 0 < self.lofit_share <= 1:
            raise ValueError(f"LoFiT share is {self.lofit_share}; expected above 0 and at most 1")
        if not 0 < self.lofit_rate < math.inf:
            raise ValueError(f"LoFiT rate is {self.lofit_rate}; expected a number above 0")
        if not 0 <= self.lofit_l1 < math.inf:
            raise ValueError(f"LoFiT l1 is {self.lofit_l1}; expected a number of at least 0")
        if self.end and self.chat:
            raise ValueError("end is given with chat; expected one of them, because a chat template ends each answer")
        if self.splits not in ("ours", "released"):
            raise ValueError(f"splits is {self.splits!r}; expected ours or released")
        if self.splits == "released" and self.listops_lengths != Settings.listops_lengths:
            raise ValueError("ListOps lengths are given with the released splits; expected ours, which are generated")
        if self.schedule not in (None, *SCHEDULES):
            raise ValueError(f"schedule is {self.schedule!r}; expected one of {', '.join(SCHEDULES)}")
        if self.warmup is not None and not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}; expected a share of the steps, 0 or more and below 1")
        if not 0 < self.init_scale < math.inf:
            raise ValueError(f"init scale is {self.init_scale}; expected a number above 0")

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "listops_lengths": list(self.listops_lengths)}
