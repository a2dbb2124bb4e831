"""Joint training of LoRA and steering (arXiv 2603.00425, §5): parameter groups, and saving and loading both together.

Each part can also be saved alone: by `model.steering.save`, and by PEFT's `save_pretrained`.
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
from .adapters.fields import read_json
from .adapters.files import (
    CONFIG_NAME,
    JOINT_NAME,
    WEIGHTS_NAME,
    files_digest,
    read_adapter,
)
from .adapters.kinds import LORA_FOLDER, STEERING_FOLDER, method_in
from .adapters.locating import HUB_ID, JOINT_FILES, locate_files
from .adapters.parameters import PEFT_PREFIX, by_lower, check_name, refuse_clash, unwrapped
from .adapters.saving import (
    checked_path,
    copy_regular,
    leftovers,
    saving_folder,
    target_folder,
    write_new,
)
from .config import checked_bool
from .lora.layers import lora_layers, saved_modules
from .model.decoder import find_decoder, inside_peft
from .patch import patch_model
from .steering import Steering

#: How often a save retries after another process has moved files.
_ATTEMPTS = 20
_JOINT = "a directory that save_joint wrote"


def steering_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the active steering adapter, for an optimizer's parameter group.

    Raises:
        ValueError: the model is not patched, or no adapter is in use.
    """
    found = list(steering_of(model).parameters())
    if not found:
        raise ValueError("no steering adapter of the model trains; expected one in use (model.steering.use)")
    return found


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters of the model's LoRA and of heads beside it, for an optimizer's parameter group.

    Raises:
        TypeError: `model` is not a module.
        ValueError: the model carries no trainable LoRA.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module that carries a LoRA")
    layers: list[Any] = [*lora_layers(model).values(), *saved_modules(model)]
    parts = (getattr(layer, name) for layer in layers for name in sorted(layer.adapter_layer_names))
    found = {id(p): p for part in parts for p in part.parameters() if p.requires_grad}
    if not found:
        raise ValueError(f"{type(model).__name__} carries no LoRA that trains; expected one from PEFT")
    return list(found.values())


def steering_of(model: nn.Module) -> Steering:
    """Return `model.steering`, or raise if the model is not patched.

    Raises:
        ValueError: the model is not patched.
    """
    steering = getattr(model, "steering", None)
    if not isinstance(steering, Steering):
        raise ValueError(f"{type(model).__name__} is not steered; expected a model that patch_model patched")
    return steering


# ---------------------------------------------------------------------------------------------------------- both parts


def save_joint(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Save the active steering adapter and the active LoRA adapters into one directory.

    The directory holds `steering/`, `lora/<name>/` for each LoRA, and `joint.json`, which records that they belong
    together. Each folder can be read by its own library: `patch_model(model, "DIR/steering")`, and PEFT's
    `PeftModel.from_pretrained(model, "DIR/lora/default")` or `model.load_adapter`. If saving fails, the earlier files
    stay. If the process is killed, `load_joint` finds either all parts of this save or all of the earlier one. In a
    process group only the first process writes.

    Raises:
        ValueError: the model is not steered or carries no LoRA, FSDP or ZeRO has sharded it, a part cannot be written,
            the path is empty (see `target_folder`), the directory holds an adapter that is no part of such a save, the
            name of a LoRA is not valid for a folder, or a LoRA on embeddings or the head is merged into the weights.
        NotADirectoryError: `directory` is a file.
    """
    steering = steering_of(model)
    inner = inside_peft(model)
    configs = _lora_configs(model)
    _check_names(configs)
    by = sharder(model)
    if by is not None:
        raise ValueError(f"the model is sharded by {by}; expected every process to hold it whole (DDP)")
    if not is_first():
        return
    target = target_folder(directory, "both adapters")
    refuse_adapter_beside(target)
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


def refuse_adapter_beside(directory: Path) -> None:
    """Check that a directory for both parts holds no adapter of its own, which readers would take for the saved one.

    Raises:
        ValueError: it holds one.
    """
    method = method_in(directory)
    if method is not None:
        raise ValueError(
            f"{directory} holds an adapter of {method}; expected another directory for the LoRA and the steering"
        )


def _write_lora(folder: Path, inner: nn.Module, name: str, config: Any) -> None:
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save

    folder.mkdir()
    # Named as in a model wrapped by PEFT, because PEFT ignores other names when loading.
    tensors = get_peft_model_state_dict(inner, adapter_name=name)
    # PEFT saves the base's weight beside a LoRA on embeddings or on the head. Loading would add a merged LoRA again.
    merged = next((path for path, layer in lora_layers(inner).items() if getattr(layer, "merged", False)), None)
    own = next((key for key in tensors if ".base_layer." in key), None)
    if merged is not None and own is not None:
        raise ValueError(
            f"the LoRA is merged into the weights of {merged}, and PEFT saves {own} with it, to which loading would "
            "add it again; expected model.unmerge_adapter() before"
        )
    named = {PEFT_PREFIX + unwrapped(key): tensor.contiguous() for key, tensor in tensors.items()}
    write_new(folder / WEIGHTS_NAME, save(named))
    config.save_pretrained(folder)


def _lora_configs(model: nn.Module) -> dict[str, Any]:
    """Return PEFT's configs of the active LoRA adapters, by name."""
    layers = lora_layers(model).values()
    names = list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))
    configs = getattr(model, "peft_config", {})
    found = {name: configs[name] for name in names if name in configs}
    if not found:
        raise ValueError(f"{type(model).__name__} carries no active LoRA; expected one from PEFT")
    return found


def load_joint(
    model: nn.Module, directory: str | os.PathLike[str], *, trainable: bool = False, check_base: bool = True
) -> Any:
    """Load the LoRA and steering adapters that `save_joint` wrote into a bare model. All of them are active.

    Args:
        model: an unpatched model without adapters, of the same kind as the saved one.
        directory: the directory that was given to `save_joint`, or the hub id of its upload.
        trainable: whether the LoRA is trainable. Steering always is.
        check_base: refuse steering if its base model has another name. Sizes must fit in any case.

    Returns:
        The patched PeftModel around `model`.

    Raises:
        FileNotFoundError: a part is missing.
        TypeError, ValueError: `directory` is no path or an empty one, the parts were not saved together, or a part does
            not fit the model.
    """
    checked_bool("trainable", trainable)
    checked_bool("check_base", check_base)
    source = _local(directory)
    with tempfile.TemporaryDirectory() as copies:
        try:
            steering, lora = _copy_parts(source, Path(copies))
            return _load_parts(model, steering, lora, trainable, check_base)
        except ValueError as error:
            raise ValueError(str(error).replace(copies, os.fspath(directory))) from error


def _load_parts(model: nn.Module, steering: Path, lora: dict[str, Path], trainable: bool, check_base: bool) -> Any:
    from peft import PeftModel

    read_adapter(steering, find_decoder(model).layout, check_base=check_base)  # before PEFT changes the model
    (first, path), *others = lora.items()
    wrapped = PeftModel.from_pretrained(model, path, adapter_name=first, is_trainable=trainable)
    try:
        for name, path in others:
            wrapped.load_adapter(path, adapter_name=name, is_trainable=trainable)
        tuner: Any = wrapped.base_model
        tuner.set_adapter(list(lora), inference_mode=not trainable)
        return patch_model(wrapped, steering, check_base=check_base)
    except BaseException:
        wrapped.unload()
        raise


# ------------------------------------------------------------------------------------------- parts that belong together
#
# joint.json holds a digest of each part. A save puts it in place before it moves the parts. From then on the
# directory's parts are those with these digests, in their places or still in the saving process's folder.


def find_joint(directory: str | os.PathLike[str]) -> tuple[Path, dict[str, Path]]:
    """Return the folder of the steering, and the folder of each LoRA by name, in a directory of `save_joint`.

    Its upload to the hub is downloaded by its id.

    Raises:
        FileNotFoundError: there is no such directory, or `save_joint` did not write it.
        TypeError, ValueError: `directory` is no path or an empty one, or a part was not saved together with the others.
    """
    source = _local(directory)
    if not (source / JOINT_NAME).exists():
        raise FileNotFoundError(f"{source} has no {JOINT_NAME}; expected {_JOINT}")
    found: dict[str, Path | None] = {"": None}
    for _ in range(3):  # a part may be moved into its place during the search
        if None in found.values():
            found = {place: _locate(source, place, digest) for place, digest in _record(source).items()}
    for place, folder in found.items():
        if folder is None:
            raise ValueError(
                f"{source / place} was not saved together with the other parts; expected the part in {JOINT_NAME}"
            )
    return _by_name({place: folder for place, folder in found.items() if folder is not None})


def _local(directory: str | os.PathLike[str]) -> Path:
    """Return a directory of `save_joint`; the files of a hub id are downloaded. Whether it is one is not checked."""
    source = checked_path(directory, "directory", _JOINT)
    if source.exists() or not isinstance(directory, str) or not HUB_ID.fullmatch(directory):
        return source
    return locate_files(directory, JOINT_FILES)


def _by_name(folders: dict[str, Path]) -> tuple[Path, dict[str, Path]]:
    steering = folders.pop(STEERING_FOLDER)
    return steering, {place.removeprefix(f"{LORA_FOLDER}/"): folder for place, folder in folders.items()}


def _copy_parts(source: Path, copies: Path) -> tuple[Path, dict[str, Path]]:
    """Copy the parts into the folder `copies`, and return them as `find_joint` does.

    PEFT opens a file several times and maps it into memory, so it must read files that nobody else writes to.
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
    """Return the digest of each part from joint.json, by the part's place.

    Raises:
        OSError, ValueError: the file is missing or broken.
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
    """Raise ValueError for names of LoRA adapters that cannot be folders beside each other."""
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
    """Return whether a saving process's folder holds a part that the directory needs."""
    try:
        record = _record(directory)
    except (OSError, ValueError):
        return False
    missing = {digest for place, digest in record.items() if files_digest(directory / place) != digest}
    return any(files_digest(part) in missing for part in folder.glob("*/"))


def _commit(directory: Path, new: Path, digests: dict[str, str | None]) -> None:
    """Replace the directory's parts by those in `new`. If that fails, restore the earlier ones."""
    record = directory / JOINT_NAME
    write_new(new / JOINT_NAME, (json.dumps(digests, indent=2) + "\n").encode())
    if record.exists():
        shutil.copy2(record, new / "earlier.json")
    ours, had_lora = os.stat(new / JOINT_NAME), (directory / LORA_FOLDER).exists()
    moved: list[tuple[Path, Path]] = []
    try:
        os.replace(new / JOINT_NAME, record)
        _settle(directory, new, moved)
    except BaseException:
        if record.exists() and os.path.samestat(os.stat(record), ours):  # unless another process has saved since
            if (new / "earlier.json").exists():
                os.replace(new / "earlier.json", record)
            else:
                record.unlink()
            for source, target in reversed(moved):
                with contextlib.suppress(OSError):
                    os.replace(target, source)
            if not had_lora:
                with contextlib.suppress(OSError):
                    (directory / LORA_FOLDER).rmdir()
        raise


def _settle(directory: Path, new: Path, moved: list[tuple[Path, Path]]) -> None:
    """Move the parts named by joint.json into their places, and other folders there into `new`.

    Another process may do the same at any time and commit other parts. It also moves misplaced parts.
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
                raise  # and put another part in its place
    raise OSError(f"{directory} is being saved to by too many processes; expected one at a time")


def _is_settled(directory: Path, place: str, digests: dict[str, str]) -> bool:
    return place in digests and files_digest(directory / place) == digests[place]
