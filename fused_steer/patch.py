"""patch_model: makes a model steerable, in place."""

from __future__ import annotations

import os
import sys
from typing import Any

from torch import nn

from ._requirements import CORE, warn_untried
from .config import SteerConfig, checked_bool
from .model.heads import check_heads
from .steering import Steering


def patch_model(
    model: nn.Module,
    config: Any = None,
    *,
    adapter_name: str = "default",
    check_base: bool = True,
    freeze_head: bool = False,
    fuse_norm: bool = False,
) -> Any:
    """Add steering after the decoder blocks of `model`, in place (arXiv 2603.00425, §3).

    The model's own parameters are frozen. Adapters that PEFT added, such as LoRA, are not changed: trainable ones go on
    training beside the steering (§5.2). Afterwards `model.steering` (a `Steering`) names, switches, saves and loads
    adapters, and undoes the patch.

    Args:
        model: a decoder-only language model, such as one from transformers, bare, wrapped or adapted by PEFT.
        config: a SteerConfig for a fresh adapter (None means SteerConfig()), which changes nothing until it is trained;
            or a saved adapter's directory or hub id.
        adapter_name: the adapter's name.
        check_base: refuse a saved adapter if its base model has another name. Sizes must fit in any case.
        freeze_head: accept the head of a classifier or reward model that was not loaded from a checkpoint, frozen.
        fuse_norm: compute the RMSNorm that reads a steered layer's output in the same pass as the steering. It is a
            choice for this run and not part of a saved adapter. A norm that cannot be fused stays as it is, and
            `model.steering.report()` says why. To get the gradient of a steered layer's output, keep it by
            `output_hidden_states` or by a hook on the layer, the next layer or the norm; of an output that other
            code keeps, `torch.autograd.grad` has the part that bypasses the norm.

    Returns:
        The same object.

    Raises:
        ValueError: the model is patched already, has no decoder layers, or has a head that was not loaded from a
            checkpoint (it would be frozen at random values); or the config or adapter does not fit.
        TypeError: `model` or `config` has a wrong type.
        FileNotFoundError: there is no such adapter.
    """
    if isinstance(getattr(model, "steering", None), Steering):
        raise ValueError("the model is patched already; expected an unpatched one (model.steering.add adds an adapter)")
    if hasattr(model, "steering"):
        raise ValueError(f"{type(model).__name__} has an attribute 'steering' of its own; expected none")
    peft = sys.modules.get("fused_steer.peft")
    if peft is not None and isinstance(model, nn.Module) and peft.is_steered(model):
        raise ValueError(
            "the model is steered by PEFT already, as from_pretrained does with the adapter beside a model; expected "
            "one that is not (fused_steer.peft.unload(model) takes it out)"
        )
    warn_untried(*CORE)
    if config is None:
        config = SteerConfig()
    if not isinstance(config, (SteerConfig, str, os.PathLike)):
        raise TypeError(
            f"config is a {type(config).__name__}; expected a SteerConfig, or the path or hub id of an adapter"
        )
    for name, option in (("check_base", check_base), ("freeze_head", freeze_head), ("fuse_norm", fuse_norm)):
        checked_bool(name, option)
    steering = Steering(model, fuse_norm)
    if not freeze_head:
        check_heads(model)
    try:
        if isinstance(config, SteerConfig):
            steering.add(adapter_name, config)
        else:
            steering.load(config, name=adapter_name, check_base=check_base)
        steering.attach(adapter_name)
        return model
    except BaseException:
        steering.unpatch()
        raise
