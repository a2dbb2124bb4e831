"""Joint adaptation: LoRA on the weights and steering of the activations, trained together (arXiv 2603.00425, §5).

Who trains what, and both parts in files: together in one directory, or each apart by its own library's means
(`model.steering.save`; PEFT's `save_pretrained`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from .adapters.distributed import is_first, sharder
from .adapters.files import (
    CONFIG_NAME,
    JOINT_NAME,
    WEIGHTS_NAME,
    files_digest,
    read_adapter,
    read_json,
)
from .adapters.parameters import PEFT_PREFIX, by_lower, check_name, refuse_clash, unwrapped
from .adapters.saving import copy_regular, leftovers, saving_folder, write_new
from .lora.layers import lora_layers, saved_modules
from .model.decoder import find_decoder, inside_peft
from .patch import patch_model
from .steering import Steering

#: Where each part lies in a directory that holds both.
STEERING_FOLDER, LORA_FOLDER = "steering", "lora"
#: How often a save looks again at what others have moved meanwhile.
_ATTEMPTS = 20


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
    """The parameters of the model's LoRA, and of heads beside it, that train, for an optimizer's group of their own.

    Raises:
        ValueError: the model carries no LoRA that trains.
    """
    layers: list[Any] = [*lora_layers(model).values(), *saved_modules(model)]
    parts = (getattr(layer, name) for layer in layers for name in sorted(layer.adapter_layer_names))
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
    """Write the steering adapter in use and the active LoRA adapters: `steering/`, `lora/<name>/` for each, and
    `joint.json`, which says that they belong together.

    Each folder is what its own library reads: `patch_model(model, "DIR/steering")`, and PEFT's
    `PeftModel.from_pretrained(model, "DIR/lora/default")` or `model.load_adapter`. What was there stays if this fails.
    If the process is killed, `load_joint` finds either all parts of this save or all of the earlier one. Of the
    processes in a process group the first writes.

    Raises:
        ValueError: the model is not steered or carries no LoRA, FSDP or ZeRO has sharded it, a part cannot be written,
            or a LoRA has a name that no folder may have.
        NotADirectoryError: `directory` is a file.
    """
    steering = steering_of(model)
    inner = inside_peft(model)
    configs = _lora_configs(model)
    _check_names(configs)
    by = sharder(model)
    if by is not None:
        raise ValueError(f"the model is sharded by {by}; expected one that every process has whole (DDP)")
    if not is_first():
        return
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; expected a directory to save both adapters in")
    target.mkdir(parents=True, exist_ok=True)
    with saving_folder(target, "joint", keep=lambda folder: _needed(target, folder)) as new:
        steering.save(new / STEERING_FOLDER)
        places = {STEERING_FOLDER: new / STEERING_FOLDER}
        for name, config in configs.items():
            place = places[f"{LORA_FOLDER}/{name}"] = new / f"{LORA_FOLDER}-{name}"
            _write_lora(place, inner, name, config)
        _commit(target, new, {place: files_digest(folder) for place, folder in places.items()})
        for folder in leftovers(target, "joint"):
            if not _needed(target, folder):
                shutil.rmtree(folder, ignore_errors=True)


def _write_lora(folder: Path, inner: nn.Module, name: str, config: Any) -> None:
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save

    folder.mkdir()
    # Named as PEFT names them where it has wrapped the model; others it would pass over when loading.
    tensors = get_peft_model_state_dict(inner, adapter_name=name)
    named = {PEFT_PREFIX + unwrapped(key): tensor.contiguous() for key, tensor in tensors.items()}
    write_new(folder / WEIGHTS_NAME, save(named))
    config.save_pretrained(folder)


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
        ValueError: the parts are not those of one save, or one does not fit the model.
    """
    with tempfile.TemporaryDirectory() as copies:
        try:
            steering, lora = _copy_parts(Path(directory), Path(copies))
            return _load_parts(model, steering, lora, trainable)
        except ValueError as error:
            raise ValueError(str(error).replace(copies, os.fspath(directory))) from error


def _load_parts(model: nn.Module, steering: Path, lora: dict[str, Path], trainable: bool) -> Any:
    from peft import PeftModel

    read_adapter(steering, find_decoder(model).layout, check_base=True)  # before PEFT changes the model
    (first, path), *others = lora.items()
    wrapped = PeftModel.from_pretrained(model, path, adapter_name=first, is_trainable=trainable)
    try:
        for name, path in others:
            wrapped.load_adapter(path, adapter_name=name, is_trainable=trainable)
        tuner: Any = wrapped.base_model
        tuner.set_adapter(list(lora), inference_mode=not trainable)
        return patch_model(wrapped, steering)
    except BaseException:
        wrapped.unload()
        raise


# ------------------------------------------------------------------------------------------- parts that belong together
#
# joint.json has a digest of each part. It is renamed into place before the parts are, and from then on the parts are
# those of this save, wherever in the directory they lie: in their places, or still in the folder of who saves them.


def find_joint(directory: str | os.PathLike[str]) -> tuple[Path, dict[str, Path]]:
    """Where the parts of a joint directory are: the steering's folder, and each LoRA's by name.

    Raises:
        FileNotFoundError: there is no such directory, or `save_joint` wrote none there.
        ValueError: a part is not the one that was saved with the others.
    """
    source = Path(directory)
    if not (source / JOINT_NAME).exists():
        raise FileNotFoundError(f"{source} has no {JOINT_NAME}; expected a directory that save_joint wrote")
    found: dict[str, Path | None] = {"": None}
    for _ in range(3):  # a part may be moved into its place while it is looked for
        if None in found.values():
            found = {place: _locate(source, place, digest) for place, digest in _record(source).items()}
    for place, folder in found.items():
        if folder is None:
            raise ValueError(
                f"{source / place} is not what was saved together with the other parts; expected that of {JOINT_NAME}"
            )
    return _by_name({place: folder for place, folder in found.items() if folder is not None})


def _by_name(folders: dict[str, Path]) -> tuple[Path, dict[str, Path]]:
    steering = folders.pop(STEERING_FOLDER)
    return steering, {place.removeprefix(f"{LORA_FOLDER}/"): folder for place, folder in folders.items()}


def _copy_parts(source: Path, copies: Path) -> tuple[Path, dict[str, Path]]:
    """As `find_joint`, of copies of the parts: nothing that happens to the directory changes them any more.

    PEFT opens a file several times, and maps it into memory.
    """
    for _ in range(_ATTEMPTS):
        steering, lora = find_joint(source)
        found = {STEERING_FOLDER: steering, **{f"{LORA_FOLDER}/{name}": folder for name, folder in lora.items()}}
        record = _record(source)
        try:
            for place, folder in found.items():
                (copies / place).mkdir(parents=True, exist_ok=True)
                for name in (CONFIG_NAME, WEIGHTS_NAME):
                    copy_regular(folder / name, copies / place / name)
        except FileNotFoundError:
            continue  # another process has moved it
        if {place: files_digest(copies / place) for place in found} == record:
            return _by_name({place: copies / place for place in found})
    raise OSError(f"{source} is written to again and again while it is read; expected a directory at rest")


def _record(directory: Path) -> dict[str, str]:
    """The digest of each part, by its place.

    Raises:
        OSError, ValueError: there is none, or it is broken.
    """
    file = directory / JOINT_NAME
    try:
        fields, names = read_json(file), []
        for place, digest in fields.items():
            if place != STEERING_FOLDER:
                part, _, name = place.partition("/")
                if part != LORA_FOLDER:
                    raise ValueError(f"it has a part {place!r}; expected {STEERING_FOLDER} and {LORA_FOLDER}/<name>")
                names.append(name)
            if not isinstance(digest, str):
                raise ValueError(f"{place} is {digest!r}; expected a digest")
        if STEERING_FOLDER not in fields or len(fields) < 2:
            raise ValueError(f"it has {', '.join(fields) or 'nothing'}; expected {STEERING_FOLDER} and a LoRA")
        _check_names(names)
    except ValueError as error:
        raise ValueError(f"{file} cannot be loaded: {error}") from None
    return fields


def _check_names(names: Iterable[str]) -> None:
    """Refuse names of LoRA adapters of which no folders can be made beside each other; a ValueError."""
    seen: dict[str, str] = {}
    for name in names:
        check_name(name)
        refuse_clash(name, seen)
        seen |= by_lower([name])


def _locate(directory: Path, place: str, digest: str | None) -> Path | None:
    for folder in (directory / place, *sorted(directory.glob(".joint-*/*/"))):
        if files_digest(folder) == digest:
            return folder
    return None


def _needed(directory: Path, folder: Path) -> bool:
    """Whether a saver's folder has a part that the directory needs."""
    try:
        record = _record(directory)
    except (OSError, ValueError):
        return False
    missing = {digest for place, digest in record.items() if files_digest(directory / place) != digest}
    return any(files_digest(part) in missing for part in folder.glob("*/"))


def _commit(directory: Path, new: Path, digests: dict[str, str | None]) -> None:
    """Make the parts in `new` those of the directory; if that fails, the earlier ones come back."""
    record = directory / JOINT_NAME
    write_new(new / JOINT_NAME, (json.dumps(digests, indent=2) + "\n").encode())
    if record.exists():
        shutil.copy2(record, new / "earlier.json")
    ours = os.stat(new / JOINT_NAME)
    moved: list[tuple[Path, Path]] = []
    try:
        os.replace(new / JOINT_NAME, record)
        _settle(directory, new, moved)
    except BaseException:
        if record.exists() and os.path.samestat(os.stat(record), ours):  # not where another has saved since
            if (new / "earlier.json").exists():
                os.replace(new / "earlier.json", record)
            else:
                record.unlink()
            for source, target in reversed(moved):
                with contextlib.suppress(OSError):
                    os.replace(target, source)
        raise


def _settle(directory: Path, new: Path, moved: list[tuple[Path, Path]]) -> None:
    """Move the parts that the record names into their places, and all else there out of the way, into `new`.

    Another process may do the same at any time, and commit other parts. What it finds out of place it moves too.
    """
    for attempt in range(_ATTEMPTS):
        digests = _record(directory)
        there = [f"{LORA_FOLDER}/{path.name}" for path in (directory / LORA_FOLDER).glob("*/")]
        wrong = [place for place in {**digests, **dict.fromkeys(there)} if not _is_settled(directory, place, digests)]
        if not wrong:
            return
        try:
            for number, place in enumerate(wrong):
                source = _locate(directory, place, digests[place]) if place in digests else None
                target, aside = directory / place, new / f"out-{attempt}-{number}"
                if target.exists():
                    moved.append((target, aside))
                    os.replace(target, aside)
                if source is not None:
                    target.parent.mkdir(exist_ok=True)
                    moved.append((source, target))
                    os.replace(source, target)
        except FileNotFoundError:
            continue  # another process has moved it
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise  # and put another in its place
    raise OSError(f"{directory} is being saved to by too many processes; expected one at a time")


def _is_settled(directory: Path, place: str, digests: dict[str, str]) -> bool:
    return place in digests and files_digest(directory / place) == digests[place]
