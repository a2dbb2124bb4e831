"""Finds, checks and copies the adapters that requests name.

Each adapter is copied into a folder of the server, checked there, and kept under the digest of its contents. The engine
reads the copy. So a directory may change or vanish while it is served. Two versions of an adapter never share cached
blocks, because vLLM's key of a block contains the path.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.lora import lora_weights, utils

from ..adapters.fields import MOST_JSON
from ..adapters.files import CONFIG_NAME, JOINT_NAME, PEFT_TYPE, WEIGHTS_NAME, AdapterFile, method_in, read_adapter
from ..adapters.kinds import LORA_FOLDER, STEERING_FOLDER
from ..adapters.parameters import NAMES, PEFT_PREFIX, SITE, ByPlace, Layout, steered
from ..adapters.saving import open_regular, saving_folder
from ..joint import find_joint
from ..kernels import ACTIVATIONS
from .dose import highest_dose
from .options import KEY, REFUSE, lora_of, server_options
from .room import Room, make_room

#: The environment variable that says where copies are kept: a folder that all processes of the engine can read.
FOLDER_VARIABLE = "FUSED_STEER_COPIES"


@dataclass(frozen=True)
class Source:
    """The directories of an adapter: its steering, and the LoRA beside it if there is one."""

    steering: Path
    lora: Path | None = None


@dataclass(frozen=True)
class Served:
    """An adapter that was checked and copied.

    Attributes:
        path: the copy's directory.
        shares_prompt: whether tokens that are not steered are the base model's: false beside a LoRA.
        positions, scale: those of its config, which requests without positions or a scale have.
        dose: the bound of its relative dose at strength 1. 0 if the server does not ask for it.
    """

    path: str
    shares_prompt: bool
    positions: str
    scale: float
    dose: float


def find_source(path: str) -> Source | None:
    """Find the steering adapter that `steering.save` or `save_joint` wrote into a directory; None if there is none.

    Raises:
        ValueError: a joint directory holds several LoRA adapters, or parts that were not saved together.
    """
    folder = Path(path).expanduser()
    if (folder / CONFIG_NAME).exists():
        return Source(folder) if method_in(folder) == PEFT_TYPE else None  # vLLM reports errors of other methods
    if not (folder / JOINT_NAME).exists():
        return None
    steering, loras = find_joint(folder)
    if len(loras) != 1:
        raise ValueError(f"{folder} holds {len(loras)} LoRA adapters; expected one, beside {STEERING_FOLDER}/")
    return Source(steering, *loras.values())


def read_fitting(source: Source, layout: Layout, room: Room) -> AdapterFile:
    """Read and check an adapter.

    Raises:
        ValueError, FileNotFoundError: it is broken, does not fit the model, or the slots have no room for it.
    """
    file = read_adapter(source.steering, layout)
    if file.config.sites != (SITE,):
        sites = ", ".join(file.config.sites)
        raise ValueError(f"{source.steering} steers at {sites}; expected {SITE}, the only site in vLLM")
    room.check(str(source.steering), file)
    return file


def room_of(config: Any) -> Room:
    """Return the room of a server's slots, from its options and the directory that they name.

    Args:
        config: vLLM's config.

    Raises:
        ValueError, OSError: the options do not say it, or the directory has no adapters.
    """
    options, lora = server_options(config), lora_of(config)
    files = []
    if options is not None and options.adapters is not None:
        layout = layout_of(config.model_config)
        files = [read_adapter(source.steering, layout) for source in registered(options.adapters).values()]
    return make_room(options, None if lora is None else lora.max_lora_rank, files)


def registered(directory: str) -> dict[str, Source]:
    """Return the steering adapters of a directory, by the names of their subdirectories.

    Names that begin with a dot are left out: so may be named what is still being copied.

    Raises:
        ValueError: there are none. NotADirectoryError: it is not a directory.
    """
    folder = Path(directory).expanduser()
    if not folder.is_dir():
        raise NotADirectoryError(f"{KEY}.adapters is {directory}; expected a directory with adapters")
    folders = [each for each in sorted(folder.iterdir()) if each.is_dir() and not each.name.startswith(".")]
    found = {each.name: find_source(str(each)) for each in folders}
    sources = {name: source for name, source in found.items() if source is not None}
    if not sources:
        raise ValueError(
            f"{KEY}.adapters is {directory}, which has no steering adapters; expected one in a subdirectory"
        )
    return sources


def check_modules(source: Source, file: AdapterFile, modules: Any) -> None:
    """Check that `--lora-target-modules` leaves out no part of an adapter.

    Args:
        modules: the option's value: last parts of modules' paths, or whole paths. None: all modules.

    Raises:
        ValueError: a steered layer, or a module of the LoRA, is not among them.
    """
    if modules is None:
        return
    named = ", ".join(modules)
    if SITE not in modules:
        found = {int(layer[1]) for module in modules if (layer := re.search(rf"\.(\d+)\.{SITE}$", module))}
        if layers_left_out := sorted({place.layer for place in file.tensors} - found):
            layers = "" if not found else f" in the layers {', '.join(map(str, layers_left_out))}"
            raise ValueError(f"it steers{layers}, and --lora-target-modules is {named}; expected {SITE!r} among them")
    if source.lora is None:
        return
    with open(open_regular(source.lora / WEIGHTS_NAME), "rb") as opened:
        (size,) = struct.unpack("<Q", opened.read(8))
        names = json.loads(opened.read(size)) if size < MOST_JSON else {}
    paths = {name.partition(".lora_")[0] for name in names if ".lora_" in name}
    if left_out := sorted({path.rpartition(".")[2] for path in paths if not _is_among(path, modules)}):
        raise ValueError(
            f"its LoRA adapts {', '.join(left_out)}, and --lora-target-modules is {named}; expected these among them"
        )


#: Modules of vLLM's that stand for several of Hugging Face's.
_PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def _is_among(path: str, modules: Any) -> bool:
    last = path.rpartition(".")[2]
    whole = path.removeprefix(PEFT_PREFIX)
    return any(module in (last, whole) or last in _PACKED.get(module, ()) for module in modules)


class Copies:
    """The copies of served adapters. The name of a copy's folder is the digest of its contents."""

    def __init__(self, config: Any) -> None:
        """
        Args:
            config: the engine's config.
        """
        self._layout, self._room, self._lora = layout_of(config.model_config), room_of(config), lora_of(config)
        options = server_options(config)
        dose = None if options is None else options.dose
        self._dose = dose if dose is not None and dose.action == REFUSE else None

    def find(self, path: str) -> tuple[Path, Source] | None:
        """Return the directory of a steering adapter, and what is in it. Return None if it is not a steering adapter.

        Args:
            path: as `take` gets it.

        Raises:
            ValueError, OSError: it is broken, or is not there.
        """
        folder = Path(path).expanduser()
        if not folder.is_dir():
            if folder.is_absolute() or path.startswith("."):
                raise FileNotFoundError(f"no directory {path}; expected a saved adapter")
            folder = Path(utils.get_adapter_absolute_path(path))
        source = find_source(str(folder))
        return None if source is None else (folder, source)

    def take(self, path: str) -> Served | None:
        """Copy an adapter and check the copy. Return None if it is not a steering adapter.

        Args:
            path: a directory, or an id on the Hugging Face hub.

        Raises:
            ValueError, OSError: it is broken, cannot be served here, or is not there.
        """
        found = self.find(path)
        if found is None:
            return None
        folder, source = found
        with saving_folder(copies_folder()) as new:
            copied = new / "adapter"
            _copy(source, folder, copied)
            try:
                inside = find_source(str(copied))
                assert inside is not None  # it is a copy
                file = read_fitting(inside, self._layout, self._room)
                if self._lora is None and inside.lora is not None:
                    raise ValueError(f"{copied} has a LoRA beside its steering; expected none without --enable-lora")
                check_modules(inside, file, getattr(self._lora, "target_modules", None))
            except (ValueError, OSError) as error:
                raise ValueError(str(error).replace(str(copied), str(folder))) from error
            kept = copies_folder() / _digest(copied)
            try:
                os.rename(copied, kept)
            except OSError:  # it is there already
                if not kept.is_dir():
                    raise
        config = file.config
        dose = 0.0 if self._dose is None else highest_dose(in_float32(file), config.activation, self._dose.norm)
        return Served(str(kept), inside.lora is None, config.positions, config.scale, dose)


def copies_folder() -> Path:
    """Return the folder of this server's copies. If the environment names none, make a temporary one."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named is None:
        # The engine's processes inherit the variable, so that all have the same folder.
        named = os.environ[FOLDER_VARIABLE] = tempfile.mkdtemp(prefix="fused-steer-")
        atexit.register(_remove, named, os.getpid())
    folder = Path(named)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _remove(folder: str, pid: int) -> None:
    if os.getpid() == pid:  # a forked process inherits what runs at exit
        shutil.rmtree(folder, ignore_errors=True)


def _copy(source: Source, folder: Path, out: Path) -> None:
    """Copy the files that an adapter consists of, and no others."""
    parts = {out: source.steering}
    if source.lora is not None:
        parts = {out / STEERING_FOLDER: source.steering, out / LORA_FOLDER / source.lora.name: source.lora}
        out.mkdir()
        _copy_file(folder / JOINT_NAME, out / JOINT_NAME)
    for place, part in parts.items():
        place.mkdir(parents=True)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if (part / name).exists():  # the reader says what is missing
                _copy_file(part / name, place / name)


def _copy_file(source: Path, out: Path) -> None:
    with open(open_regular(source), "rb") as opened, open(out, "wb") as written:
        shutil.copyfileobj(opened, written)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(json.dumps([str(file.relative_to(folder)), content]).encode())
    return digest.hexdigest()


def layout_of(config: Any) -> Layout:
    """Return the layout that adapters must fit. It has no path, because tensors are matched by layer."""
    return Layout("", config.hf_text_config.num_hidden_layers, config.get_hidden_size())


def in_float32(file: AdapterFile) -> ByPlace:
    """Return W1, b1, W2 and b2 in float32. The strength is not in them, because it is a gain of each token."""
    return {
        place: {name: t.float() for name, t in steered(file.config.form, tensors).items()}
        for place, tensors in file.tensors.items()
    }


def layer_weights(path: str, rank: int, tensors: dict[str, Tensor], activation: str) -> lora_weights.LoRALayerWeights:
    """Pack one layer's tensors into vLLM's weights object. `SteeringWithLoRA.set_lora` unpacks them."""
    packed = [tensors.get(name, torch.empty(0)) for name in NAMES]
    packed.append(torch.tensor(ACTIVATIONS.index(activation)))
    return lora_weights.LoRALayerWeights(path, rank, rank, packed, list(packed), scaling=1.0)
