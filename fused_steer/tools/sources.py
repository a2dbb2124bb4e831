"""Adapters that a command is given: their names, and whether each is steering, a LoRA, or both."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from ..adapters.fields import read_json
from ..adapters.files import read_adapter
from ..adapters.kinds import CHECKPOINT_FOLDER, CONFIG_NAME, JOINT_NAME, LORA_TYPE, PEFT_TYPE, WEIGHTS_NAME, method_in
from ..adapters.locating import JOINT_FILES, STEERING_FILES, locate_adapter, locate_files
from ..adapters.parameters import Layout, by_lower, check_name, refuse_clash
from ..joint import find_joint


def sources(adapters: list[str]) -> dict[str, str]:
    """Return adapters by name, from NAME=PATH, or PATH, which is named by its last part.

    Raises:
        ValueError: a name is invalid, is "base", or occurs twice.
    """
    found: dict[str, str] = {}
    for given in adapters:
        name, sign, source = given.partition("=")
        if not sign:
            name, source = Path(given).name, given
        check_name(name)
        if name == "base":
            raise ValueError("an adapter has the name 'base', that of the base model; expected another one: NAME=PATH")
        if name in found:
            raise ValueError(f"there are two adapters {name!r}; expected a name for each: NAME=PATH")
        refuse_clash(name, by_lower(found))
        found[name] = source
    return found


@dataclass(frozen=True)
class Parts:
    """The parts of one adapter: steering, a LoRA that PEFT saved, or both together.

    Attributes:
        steering: the steering's directory or hub id, or None.
        loras: the directory of each LoRA by name. All of them are active at once.
    """

    steering: str | Path | None
    loras: dict[str, Path]

    @property
    def kind(self) -> str:
        """What it is, in words."""
        return " and ".join(["LoRA"] * bool(self.loras) + ["steering"] * (self.steering is not None))


def parts_of(source: str) -> Parts:
    """Find the parts of an adapter in a directory or hub id, of which `save_joint`, a Trainer or PEFT wrote the files.

    Raises:
        FileNotFoundError: there is no such adapter, or a file of a LoRA is missing.
        ValueError: it is of another method, or its parts were not saved together.
    """
    directory = locate_files(source, [*STEERING_FILES, *JOINT_FILES])
    if (directory / JOINT_NAME).is_file():
        steering, loras = find_joint(directory)
        return Parts(steering, loras)
    method = method_in(directory)
    if method == LORA_TYPE:
        if not (directory / WEIGHTS_NAME).is_file():
            raise FileNotFoundError(f"{directory} has no {WEIGHTS_NAME}; expected a LoRA that PEFT saved")
        beside = sorted(file.parent for file in (directory / CHECKPOINT_FOLDER).glob(f"*/{CONFIG_NAME}"))
        if len(beside) > 1:
            names = ", ".join(folder.name for folder in beside)
            raise ValueError(f"{directory} holds a LoRA and the steering adapters {names}; expected one of them")
        return Parts(beside[0] if beside else None, {"default": directory})
    if method not in (None, PEFT_TYPE):
        raise ValueError(f"{directory} holds an adapter of {method}; expected steering, a LoRA, or both")
    return Parts(source, {})


def check_parts(parts: Parts, layout: Layout | None = None, check_base: bool = True) -> None:
    """Read and check an adapter before a model is loaded.

    Args:
        parts: from `parts_of`.
        layout: that of the model, which the steering has to fit; None if it is not known yet.
        check_base: refuse steering if its base model has another name.

    Raises:
        FileNotFoundError, ValueError: see `read_adapter`; or a LoRA changes the model's own weights.
        ImportError: there is a LoRA, and PEFT is not installed.
    """
    if parts.steering is not None:
        read_adapter(parts.steering, layout, check_base=check_base and layout is not None)
    if parts.loras and find_spec("peft") is None:
        raise ImportError("a LoRA needs PEFT; `pip install 'fused-steer[peft]'`")
    for folder in parts.loras.values():
        bias = read_json(folder / CONFIG_NAME).get("bias", "none")
        if bias != "none":  # PEFT puts trained biases into the base's own, for good
            raise ValueError(
                f"{folder / CONFIG_NAME} has bias {bias!r}; expected 'none', as the base is used without it"
            )


def whole_of(source: str | os.PathLike[str]) -> Path | None:
    """Return the directory of a LoRA and steering that were trained together, of which `source` is one part.

    None: the files do not tell that it is a part.
    """
    directory = Path(source).resolve()
    if not directory.is_dir():
        return None
    for above in directory.parents[:2]:
        try:
            if directory.relative_to(above).as_posix() in read_json(above / JOINT_NAME):
                return above
        except (OSError, ValueError):
            continue
    checkpoint = directory.parent.name == CHECKPOINT_FOLDER and directory.parents[1]
    return checkpoint if checkpoint and method_in(checkpoint) == LORA_TYPE else None


def note_parts(source: str) -> None:
    """Say on stderr if an adapter is only a part of what was trained, and so runs without the rest."""
    whole = whole_of(source)
    if whole is not None:
        told = (
            f"was trained together with the other part in {whole} and runs here without it; expected {whole} for both"
        )
    else:
        try:
            fields = read_json(locate_adapter(source) / CONFIG_NAME)
        except (OSError, ValueError):
            return  # refused when it is read
        if fields.get("peft_type") != PEFT_TYPE or fields.get("orthogonal_to") is None:
            return
        told = "was trained together with a LoRA (orthogonal_to) and runs here without it"
    Console(stderr=True).print(f"note      {source} {told}", markup=False, highlight=False, soft_wrap=True)
