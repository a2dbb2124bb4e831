"""fused-steer: post-block activation steering (arXiv 2603.00425), fused into the residual add of each decoder block."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .config import SteerConfig
    from .joint import load_joint, lora_parameters, save_joint, steering_parameters
    from .kernels import post_block
    from .patch import patch_model
    from .trainer import SteeringCallback, SteeringTrainer

__all__ = [
    "SteerConfig",
    "SteeringCallback",
    "SteeringTrainer",
    "__version__",
    "load_joint",
    "lora_parameters",
    "patch_model",
    "post_block",
    "save_joint",
    "steering_parameters",
]

_HOMES = {
    "SteerConfig": ".config",
    "SteeringCallback": ".trainer",
    "SteeringTrainer": ".trainer",
    "load_joint": ".joint",
    "lora_parameters": ".joint",
    "patch_model": ".patch",
    "post_block": ".kernels",
    "save_joint": ".joint",
    "steering_parameters": ".joint",
}


def __getattr__(name: str) -> Any:
    # Imported when first asked for, so that the command answers `--help` without importing torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; expected one of {', '.join(__all__)}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value
