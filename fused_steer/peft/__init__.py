"""Post-block steering as a PEFT method. Importing this package registers it.

    import fused_steer.peft
    model = get_peft_model(model, PostBlockConfig(r=8, activation="silu"))

PEFT then saves, loads, switches, disables and deletes steering like any other adapter. There is no `model.steering`.
The files are the same as `patch_model`'s: `patch_model(model, "DIR")` reads the output of `save_pretrained`, and PEFT
reads the output of `steering.save`. The steered layers are the same, too.
"""

from __future__ import annotations

from torch import nn

from . import saving  # noqa: F401  (checks what PEFT saves)
from .config import POST_BLOCK, PostBlockConfig  # warns about an untried PEFT before anything imports it
from .site import PeftSite
from .tuner import PostBlockModel, forget_adapters, take_out

__all__ = ["POST_BLOCK", "PeftSite", "PostBlockConfig", "PostBlockModel", "is_steered", "unload"]


def unload(model: nn.Module) -> nn.Module:
    """Remove the steering that transformers added by `from_pretrained`, `load_adapter` or `add_adapter`.

    Returns the model. A model wrapped by `get_peft_model` or `PeftModel` has its own `unload`.

    Raises:
        RuntimeError: another library has since changed a layer's class. Nothing is undone.
        ValueError: the model is wrapped.
    """
    from peft import PeftMixedModel, PeftModel

    if isinstance(model, (PeftModel, PeftMixedModel)):
        raise ValueError(
            f"model is a {type(model).__name__}; expected one that PEFT does not wrap (model.unload() takes all "
            "adapters out of this one)"
        )
    configs = getattr(model, "peft_config", {})
    names = {name for name, config in configs.items() if config.peft_type == POST_BLOCK}
    take_out(model, names)
    for name in names:
        del configs[name]
    if not configs and hasattr(model, "peft_config"):
        forget_adapters(model)
    return model


def is_steered(model: nn.Module) -> bool:
    """Return whether the model carries PEFT's steering."""
    return any(isinstance(module, PeftSite) for module in model.modules())
