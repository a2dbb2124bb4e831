"""Joint adaptation: LoRA on the weights and steering of the activations, trained together (arXiv 2603.00425, §5).

Who trains what, and both parts in files: together in one directory, or each apart by its own library's means
(`model.steering.save`; PEFT's `save_pretrained`).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from .adapters.distributed import is_first, sharder
from .adapters.parameters import PEFT_PREFIX
from .lora.layers import lora_layers
from .model.decoder import inside_peft
from .patch import patch_model
from .steering import Steering

#: Where each part lies in a directory that holds both.
STEERING_FOLDER, LORA_FOLDER = "steering", "lora"


def steering_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the steering adapter in use, for an optimizer's group of their own.

    Raises:
        ValueError: the model is not patched, or no adapter of it is in use.
    """
    found = list(steering_of(model).parameters())
    if not found:
        raise ValueError("no steering adapter of the model trains; expected one in use (model.steering.use)")
    return found


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the model's LoRA that train, for an optimizer's group of their own.

    Raises:
        ValueError: the model carries no LoRA that trains.
    """
    parts = (
        getattr(layer, name) for layer in lora_layers(model).values() for name in sorted(layer.adapter_layer_names)
    )
    found = {id(p): p for part in parts for p in part.parameters() if p.requires_grad}
    if not found:
        raise ValueError(f"{type(model).__name__} carries no LoRA that trains; expected one from PEFT")
    return list(found.values())


def steering_of(model: nn.Module) -> Steering:
    """`model.steering`.

    Raises:
        ValueError: the model is not patched.
    """
    steering = getattr(model, "steering", None)
    if not isinstance(steering, Steering):
        raise ValueError(f"{type(model).__name__} is not steered; expected a model that patch_model patched")
    return steering


# ---------------------------------------------------------------------------------------------------------- both parts


def save_joint(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the steering adapter in use and the active LoRA adapters: `steering/`, and `lora/<name>/` for each.

    Each folder is what its own library reads: `patch_model(model, "DIR/steering")`, and PEFT's
    `PeftModel.from_pretrained(model, "DIR/lora/default")` or `model.load_adapter`. What was there stays if this fails.
    Of the processes in a process group the first writes.

    Raises:
        ValueError: the model is not steered or carries no LoRA, FSDP or ZeRO has sharded it, or a part cannot be
            written.
        NotADirectoryError: `directory` is a file.
    """
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    steering = steering_of(model)
    inner = inside_peft(model)
    configs = _lora_configs(model)
    by = sharder(model)
    if by is not None:
        raise ValueError(f"the model is sharded by {by}; expected one that every process has whole (DDP)")
    if not is_first():
        return
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; expected a directory to save both adapters in")
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=target) as folder:
        new = Path(folder)
        steering.save(new / STEERING_FOLDER)
        for name, config in configs.items():
            place = new / LORA_FOLDER / name
            place.mkdir(parents=True)
            # Named as PEFT names them where it has wrapped the model; others it would pass over when loading.
            tensors = get_peft_model_state_dict(inner, adapter_name=name)
            named = {PEFT_PREFIX + key: tensor.contiguous() for key, tensor in tensors.items()}
            save_file(named, place / "adapter_model.safetensors")
            config.save_pretrained(place)
        for part in (STEERING_FOLDER, LORA_FOLDER):
            _replace_folder(new / part, target / part, new / f"old-{part}")


def _replace_folder(new: Path, target: Path, old: Path) -> None:
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(new, target)
    except BaseException:
        if old.exists():
            os.replace(old, target)
        raise


def _lora_configs(model: nn.Module) -> dict[str, Any]:
    """PEFT's configs of the active LoRA adapters, by name."""
    layers = lora_layers(model).values()
    names = list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))
    configs = getattr(model, "peft_config", {})
    found = {name: configs[name] for name in names if name in configs}
    if not found:
        raise ValueError(f"{type(model).__name__} carries no active LoRA; expected one from PEFT")
    return found


def load_joint(model: nn.Module, directory: str | os.PathLike[str], *, trainable: bool = False) -> Any:
    """Give a bare model what `save_joint` wrote, LoRA and steering, both in use.

    Args:
        model: a model without adapters and unpatched, of the kind that the files were made for.
        directory: that was given to `save_joint`.
        trainable: whether LoRA goes on training (steering does).

    Returns:
        The PeftModel around `model`, patched.

    Raises:
        FileNotFoundError: a part is missing.
        ValueError: a part does not fit the model.
    """
    from peft import PeftModel

    source = Path(directory)
    lora = sorted(path for path in (source / LORA_FOLDER).glob("*") if path.is_dir())
    if not lora or not (source / STEERING_FOLDER).is_dir():
        missing = STEERING_FOLDER if lora else LORA_FOLDER
        raise FileNotFoundError(f"{source} has no {missing}/; expected a directory that save_joint wrote")
    first, *others = lora
    wrapped = PeftModel.from_pretrained(model, first, adapter_name=first.name, is_trainable=trainable)
    try:
        for path in others:
            wrapped.load_adapter(path, adapter_name=path.name, is_trainable=trainable)
        wrapped.base_model.set_adapter([path.name for path in lora], inference_mode=not trainable)
        return patch_model(wrapped, source / STEERING_FOLDER)
    except BaseException:
        wrapped.unload()
        raise
