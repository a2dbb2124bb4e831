"""The methods: what each adds to a model, what of it trains, at which rate, under which schedule.

`attach` gives a model its method's parameters and returns stages, which are trained one after the other; LoFiT has two,
all others one. Steering is this project's; LoRA is PEFT's; full fine-tuning is transformers'.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from fused_steer import SteerConfig, lora_parameters, patch_model, steering_parameters

from . import heads, reft
from .released import ReleasedProjection
from .settings import Settings

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RELEASED_INIT = 1e-3  # the factor on W1's initial values in the released code


@dataclass
class Stage:
    """One training. penalty: added to each step's loss. after: done when it has ended."""

    parameters: Sequence[nn.Parameter]
    rate: float
    penalty: Callable[[], Tensor] | None = None
    callbacks: Sequence[TrainerCallback] = ()
    after: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Method:
    """schedule and warmup: of the learning rate (F.5), the warm-up as a share of the steps."""

    title: str
    attach: Callable[[Any, Settings, float], tuple[Any, list[Stage]]]
    schedule: str = "constant"
    warmup: float = 0.0
    steers: bool = field(default=False, kw_only=True)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _untrained(model: Any, settings: Settings, rate: float) -> tuple[Any, list[Stage]]:
    return model.requires_grad_(False), []


def _full(model: Any, settings: Settings, rate: float) -> tuple[Any, list[Stage]]:
    return model, [Stage(_trained(model.requires_grad_(True)), rate)]


def _with_lora(model: Any, settings: Settings) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=list(LINEARS), task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def _lora(model: Any, settings: Settings, rate: float) -> tuple[Any, list[Stage]]:
    model = _with_lora(model, settings)
    return model, [Stage(lora_parameters(model), rate)]


def _reft(model: Any, settings: Settings, rate: float) -> tuple[Any, list[Stage]]:
    reft.attach(model, settings.reft_rank, settings.reft_positions)
    return model, [Stage(_trained(model), rate)]


def _lofit(model: Any, settings: Settings, rate: float) -> tuple[Any, list[Stage]]:
    edits = heads.attach(model, heads.Lofit, "lofit")
    scales, offsets = [e.scale for e in edits], [e.offset for e in edits]
    first = Stage(
        scales,
        settings.lofit_rate,
        penalty=lambda: settings.lofit_l1 * sum(scale.abs().sum() for scale in scales),
        after=lambda: heads.select_heads(edits, settings.lofit_share),
    )
    return model, [first, Stage(offsets, rate)]


def _jola(model: Any, settings: Settings, rate: float) -> tuple[Any, list[Stage]]:
    edits = heads.attach(model, heads.Jola, "jola")
    return model, [Stage(_trained(model), rate, penalty=heads.JolaPenalty(edits))]


def _steering(model: Any, settings: Settings, rate: float, **fields: Any) -> tuple[Any, list[Stage]]:
    fields = {"rank": settings.rank, "activation": settings.activation} | fields
    model = patch_model(model, SteerConfig(**{k: v for k, v in fields.items() if v is not None}))
    return model, [Stage(steering_parameters(model), rate)]


def _joint(
    model: Any, settings: Settings, rate: float, as_released: bool = False, **fields: Any
) -> tuple[Any, list[Stage]]:
    model = _with_lora(model, settings)
    model, (stage,) = _steering(model, settings, rate, **fields)
    stage.parameters = [*lora_parameters(model), *stage.parameters]
    if as_released:
        stage.callbacks = [ReleasedProjection(settings.projection)]
    return model, [stage]


def _cosine(title: str, attach: Any, warmup: float, **options: Any) -> Method:
    return Method(title, attach, "cosine", warmup, **options)


METHODS: dict[str, Method] = {
    "untrained": Method("untrained", _untrained),
    "full": _cosine("full fine-tuning", _full, 0.1),
    "lora": _cosine("LoRA", _lora, 0.06),
    "reft": Method("ReFT", _reft),
    "lofit": Method("LoFiT", _lofit),
    "jola": Method("JoLA", _jola),
    "lowrank": Method("post-block", _steering, steers=True),
    "rank1": Method("post-block, rank 1", functools.partial(_steering, rank=1), steers=True),
    "vector": Method(
        "post-block, vector", functools.partial(_steering, form="vector", rank=None, activation=None), steers=True
    ),
    # As the released code has it for joint training: LoRA's schedule for both.
    "joint": _cosine("naive joint", _joint, 0.06, steers=True),
    "joint-orth": _cosine("Joint-Orth", functools.partial(_joint, orthogonal_to="lora"), 0.06, steers=True),
    "joint-released": _cosine(
        "joint as released", functools.partial(_joint, as_released=True, init_scale=RELEASED_INIT), 0.06, steers=True
    ),
}
