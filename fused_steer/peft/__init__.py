"""Post-block steering as a method of PEFT: importing this package registers it.

    import fused_steer.peft
    model = get_peft_model(model, PostBlockConfig(r=8, activation="silu"))

PEFT then saves, loads, switches, disables and deletes steering as it does any other adapter; `model.steering` is not
there, and its files are the same (`patch_model(model, "DIR")` reads what `save_pretrained` wrote, and the other way
round). The steered layers are reached as `patch_model` reaches them.
"""

from __future__ import annotations

from torch import nn

from .config import POST_BLOCK, PostBlockConfig  # warns of an untried PEFT, before anything imports it
from .site import PeftSite
from .tuner import PostBlockModel, forget_adapters, take_out

__all__ = ["POST_BLOCK", "PeftSite", "PostBlockConfig", "PostBlockModel", "is_steered", "unload"]


def unload(model: nn.Module) -> nn.Module:
    """Take out the steering that transformers put in by `from_pretrained`, `load_adapter` or `add_adapter`; the model.

    What `get_peft_model` or `PeftModel` has wrapped has an `unload` of its own.

    Raises:
        RuntimeError: another library has since changed a layer's class; nothing is undone then.
    """
    configs = getattr(model, "peft_config", {})
    names = {name for name, config in configs.items() if config.peft_type == POST_BLOCK}
    take_out(model, names)
    for name in names:
        del configs[name]
    if not configs and hasattr(model, "peft_config"):
        forget_adapters(model)
    return model


def is_steered(model: nn.Module) -> bool:
    """Whether PEFT's steering is in the model."""
    return any(isinstance(module, PeftSite) for module in model.modules())
