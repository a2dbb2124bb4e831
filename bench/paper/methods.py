"""The methods: the parameters that each adds to a model and trains, and their learning-rate schedules.

`attach` adds a method's parameters to a model and returns training stages, which run one after the other. LoFiT has two
stages, the other methods have one. Steering and LoReFT are this project's, LoRA is PEFT's, full fine-tuning is
transformers'.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from fused_steer import SteerConfig, lora_parameters, patch_model, save_joint, steering_parameters
from fused_steer.config import SITES

from . import heads, released
from .settings import RATES, Settings


@dataclass
class Stage:
    """One stage of training.

    Attributes:
        penalty: returns a term to add to each step's loss.
        after: called when the stage has ended.
        used: returns the number of parameters that have an effect, if not all have one.
    """

    parameters: Sequence[nn.Parameter]
    rate: float
    penalty: Callable[[], Tensor] | None = None
    callbacks: Sequence[TrainerCallback] = ()
    after: Callable[[], Any] | None = None
    used: Callable[[], int] | None = None

    @property
    def trained(self) -> int:
        return self.used() if self.used else sum(p.numel() for p in self.parameters)


@dataclass(frozen=True)
class Method:
    """A method: how it is attached, and its learning-rate schedule (F.5). `warmup` is a share of the steps.

    `save` writes what was trained to a folder; None: there is no file format for it.
    """

    title: str
    attach: Callable[[Any, Settings, float], tuple[Any, list[Stage]]]
    schedule: str = "constant"
    warmup: float = 0.0
    save: Callable[[Any, Path], Any] | None = None


def _save_steering(model: Any, folder: Path) -> None:
    model.steering.save(folder)


def _save_pretrained(model: Any, folder: Path) -> None:
    """Save a LoRA in PEFT's format, or a whole model in transformers'."""
    model.save_pretrained(folder)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _untrained(model: Any, settings: Settings, rate: float) -> tuple[Any, list[Stage]]:
    return model.requires_grad_(False), []


def _full(model: Any, settings: Settings, rate: float) -> tuple[Any, list[Stage]]:
    return model, [Stage(_trained(model.requires_grad_(True)), rate)]


def _with_lora(model: Any, settings: Settings) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def _lora(model: Any, settings: Settings, rate: float) -> tuple[Any, list[Stage]]:
    model = _with_lora(model, settings)
    return model, [Stage(lora_parameters(model), rate)]


def _reft(model: Any, settings: Settings, rate: float, site: str) -> tuple[Any, list[Stage]]:
    fields = {"form": "loreft", "rank": settings.reft_rank, "positions": settings.reft_positions, "site": site}
    return steering(model, settings, rate, activation=None, init_scale=None, **fields)


def _lofit(model: Any, settings: Settings, rate: float) -> tuple[Any, list[Stage]]:
    edits = heads.attach(model, heads.Lofit, "lofit")
    scales, offsets = [e.scale for e in edits], [e.offset for e in edits]
    first = Stage(
        scales,
        settings.lofit_rate,
        penalty=lambda: settings.lofit_l1 * sum(scale.abs().sum() for scale in scales),
        after=lambda: heads.select_heads(edits, settings.lofit_share),
    )
    return model, [
        first,
        Stage(offsets, rate, used=lambda: sum(int(e.chosen.sum()) * e.offset.shape[1] for e in edits)),
    ]


def _jola(model: Any, settings: Settings, rate: float) -> tuple[Any, list[Stage]]:
    edits = heads.attach(model, heads.Jola, "jola")
    return model, [Stage(_trained(model), rate, penalty=heads.JolaPenalty(edits))]


def steering(model: Any, settings: Settings, rate: float, **fields: Any) -> tuple[Any, list[Stage]]:
    fields = {"rank": settings.rank, "activation": settings.activation, "init_scale": settings.init_scale} | fields
    model = patch_model(model, SteerConfig(**{k: v for k, v in fields.items() if v is not None}))
    return model, [Stage(steering_parameters(model), rate)]


def _joint(model: Any, settings: Settings, rate: float, **fields: Any) -> tuple[Any, list[Stage]]:
    model = _with_lora(model, settings)
    model, (stage,) = steering(model, settings, rate, **fields)
    stage.parameters = [*lora_parameters(model), *stage.parameters]
    return model, [stage]


def _joint_released(model: Any, settings: Settings, rate: float) -> tuple[Any, list[Stage]]:
    model = _with_lora(model, settings)
    released.attach(model, settings.rank, settings.activation)
    return model, [Stage(_trained(model), rate, callbacks=[released.ReleasedProjection(settings.projection)])]


METHODS: dict[str, Method] = {
    "untrained": Method("untrained", _untrained),
    "full": Method("full fine-tuning", _full, "cosine", 0.1, _save_pretrained),
    "lora": Method("LoRA", _lora, "cosine", 0.06, _save_pretrained),
    # The paper's ReFT edits the MLP's output, its authors' code (pyreft) by default the block's.
    "reft": Method("ReFT", functools.partial(_reft, site="post_mlp"), save=_save_steering),
    "reft-post-block": Method("ReFT, post-block", functools.partial(_reft, site="post_block"), save=_save_steering),
    "lofit": Method("LoFiT", _lofit),
    "jola": Method("JoLA", _jola),
    "lowrank": Method("post-block", steering, save=_save_steering),
    "rank1": Method("post-block, rank 1", functools.partial(steering, rank=1), save=_save_steering),
    "vector": Method(
        "post-block, vector",
        functools.partial(steering, form="vector", rank=None, activation=None, init_scale=None),
        save=_save_steering,
    ),
    # As in the released code, joint training uses LoRA's schedule for both.
    "joint": Method("naive joint", _joint, "cosine", 0.06, save_joint),
    "joint-orth": Method("Joint-Orth", functools.partial(_joint, orthogonal_to="lora"), "cosine", 0.06, save_joint),
    "joint-released": Method("joint, adapter and projection as released", _joint_released, "cosine", 0.06),
}

#: The title of each site that `--site` chooses.
SITE_TITLES = {"post_attention": "post-attention", "pre_mlp": "pre-MLP", "post_mlp": "post-MLP"}
#: The methods that steer at the chosen site.
SITED = ("lowrank", "rank1", "vector", "joint", "joint-orth")


def at_site(name: str, site: str) -> str:
    """Return the name of a method at a site: `lowrank-pre-mlp`. At `post_block` it is the method's own name."""
    return name if site == "post_block" else f"{name}-{site.replace('_', '-')}"


def _title(title: str, site: str) -> str:
    named = title.replace("post-block", site)
    return named if named != title else f"{title}, {site}"


METHODS |= {
    at_site(name, site): replace(
        METHODS[name],
        title=_title(METHODS[name].title, title),
        attach=functools.partial(METHODS[name].attach, site=site),
    )
    for name in SITED
    for site, title in SITE_TITLES.items()
}


def check_saved(methods: Sequence[str]) -> None:
    """Raise ValueError if what a method trains cannot be saved. `untrained` trains nothing."""
    without = [name for name in methods if METHODS[name].save is None and name != "untrained"]
    if without:
        saved = ", ".join(name for name in RATES if METHODS[name].save is not None)
        raise ValueError(
            f"save is given with {', '.join(without)}, which have no file format; expected some of {saved}"
        )


def at_sites(methods: Sequence[str], sites: Sequence[str]) -> dict[str, str]:
    """Return the methods by name, with the names under which they have rates. Those that steer stand at each site.

    Raises:
        ValueError: there is no such site, a method cannot steer there, or a site is chosen for methods that have none.
    """
    for site in sites:
        if site not in SITES:
            raise ValueError(f"site is {site!r}; expected some of {', '.join(SITES)}")
    if "pre_mlp" in sites and "joint-orth" in methods:
        others = ", ".join(site for site in SITES if site != "pre_mlp")
        raise ValueError(f"site is pre_mlp with joint-orth; expected one that writes into the stream: {others}")
    if list(sites) != ["post_block"] and not set(methods) & set(SITED):
        raise ValueError(f"site is {', '.join(sites)} with {', '.join(methods)}; expected one of {', '.join(SITED)}")
    return {at_site(name, site): name for name in methods for site in (sites if name in SITED else ["post_block"])}
