"""Steering as a plug-in of axolotl.

    plugins:
      - fused_steer.axolotl.SteeringPlugin
    fused_steer:              # the fields of SteerConfig
      rank: 8
      layers: [8, 9, 10, 11]

axolotl then trains the steering alone, or with `adapter: lora` LoRA and steering together. Each checkpoint holds the
steering in `fused_steer/default/`, and `output_dir/fused_steer/default/` holds the trained adapter, for `patch_model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from .adapters.kinds import CHECKPOINT_FOLDER
from .config import SteerConfig
from .joint import steering_of
from .patch import patch_model
from .trainer import SteeringCallback

KEY = "fused_steer"


class SteeringArgs(BaseModel):
    """The plug-in's key in axolotl's configuration: the fields of `SteerConfig`. Left out: the defaults."""

    fused_steer: dict[str, Any] | None = None


def _config(cfg: Mapping[str, Any]) -> SteerConfig:
    given = cfg.get(KEY)
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"{KEY} is {given!r:.80}; expected the fields of SteerConfig, such as rank: 8")
    return SteerConfig.from_dict(dict(given or {}))


class SteeringPlugin(BasePlugin):
    """Adds a fresh steering adapter to the model that axolotl trains. Name it in axolotl's `plugins:`."""

    def register(self, cfg: dict[str, Any]) -> None:
        """Check the fields, before anything is loaded.

        Raises:
            TypeError, ValueError: an unknown field, or a bad value.
        """
        _config(cfg)

    def get_input_args(self) -> str:
        return f"{__name__}.{SteeringArgs.__name__}"

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Patch the model, in place, after its LoRA has been added. The base is frozen."""
        patch_model(model, _config(cfg))

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[SteeringCallback]:
        """Keep the steering in checkpoints, and restore it when training resumes."""
        return [SteeringCallback(cfg.get("resume_from_checkpoint") or None)]

    def post_train(self, cfg: Any, model: Any) -> None:
        """Save the trained adapter beside what axolotl saves."""
        steering = steering_of(model)
        steering.save(Path(cfg["output_dir"], CHECKPOINT_FOLDER, str(steering.active)))
