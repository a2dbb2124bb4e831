"""Tells what an adapter's directory holds: steering, another method's adapter such as a LoRA, or both together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .fields import read_json

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
#: The folder for adapters beside other files, each in a folder of its name. It is one level deeper than the place where
#: transformers' Trainer looks for further PEFT adapters.
CHECKPOINT_FOLDER = "fused_steer"
#: The file in which `save_joint` records `files_digest` of each part, by the part's place.
JOINT_NAME = "joint.json"
#: The folders of both parts in a directory of `save_joint`.
STEERING_FOLDER, LORA_FOLDER = "steering", "lora"
#: PEFT's `peft_type` of steering and of a LoRA.
PEFT_TYPE, LORA_TYPE = "POST_BLOCK", "LORA"


def method_in(directory: Path) -> Any:
    """Return the `peft_type` of the adapter in a directory. None without an adapter or a readable config."""
    try:
        fields = read_json(directory / CONFIG_NAME)
    except (OSError, ValueError):
        return None
    return fields.get("peft_type")


def other_method(peft_type: Any) -> ValueError:
    """Return the error for another method's adapter in place of steering. For a LoRA it names what takes one."""
    takes = " (`fused-steer eval --adapter` takes a LoRA, `fused-steer fit` turns it into steering)"
    return ValueError(f"peft_type is {peft_type!r}; expected {PEFT_TYPE!r}{takes if peft_type == LORA_TYPE else ''}")


def refuse_joint(directory: Path) -> None:
    """Raise ValueError for a directory of `save_joint`, where steering alone is expected."""
    if (directory / JOINT_NAME).is_file() and not (directory / CONFIG_NAME).exists():
        raise ValueError(
            f"{directory} holds a LoRA and steering together; expected steering alone (load_joint, `fused-steer eval "
            "--adapter`, `fused-steer fit` and `fused-steer diagnose --joint` take both)"
        )
