"""Finds an adapter's files: in a directory, or on the hub, from which they are downloaded."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from .kinds import CHECKPOINT_FOLDER, CONFIG_NAME, JOINT_NAME, LORA_FOLDER, STEERING_FOLDER, WEIGHTS_NAME
from .saving import checked_path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_FILES = (CONFIG_NAME, WEIGHTS_NAME)
#: The files that are downloaded of a steering adapter, also beside a model or a LoRA. JOINT_NAME tells of both.
STEERING_FILES = (JOINT_NAME, *_FILES, *(f"{CHECKPOINT_FOLDER}/*/{name}" for name in _FILES))
#: Those of a directory of `save_joint`.
JOINT_FILES = (JOINT_NAME, *(f"{folder}/{name}" for folder in (STEERING_FOLDER, f"{LORA_FOLDER}/*") for name in _FILES))


def locate_adapter(source: str | os.PathLike[str]) -> Path:
    """Return the local directory of a steering adapter: see `locate_files`, and also below a Trainer's checkpoint."""
    return _beside_a_model(locate_files(source))


def locate_files(source: str | os.PathLike[str], files: Sequence[str] = STEERING_FILES) -> Path:
    """Return the local directory of `source`, a path or a hub id. Of a hub id these files are downloaded, as far as it
    has them.

    Raises:
        FileNotFoundError: there is no such directory, and the hub has no such id or cannot be reached.
        TypeError, ValueError: it is no path or an empty one: see `checked_path`.
    """
    path = checked_path(source, "source", "an adapter's directory, or its id on the hub")
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{path} is a file; expected the directory that holds {CONFIG_NAME}")
    if not isinstance(source, str) or not HUB_ID.fullmatch(source):
        raise FileNotFoundError(f"no adapter directory {source}; expected one that holds {CONFIG_NAME}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(files)))
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise FileNotFoundError(
            f"no adapter directory {source}, and the hub supplied none of this id ({type(error).__name__}: {reason})"
        ) from error


def _beside_a_model(directory: Path) -> Path:
    """Return the folder of the adapter: `directory` itself, or else the only one in its `fused_steer/`.

    Raises:
        ValueError: there are several adapters.
    """
    if (directory / CONFIG_NAME).exists():
        return directory
    found = sorted(config.parent for config in (directory / CHECKPOINT_FOLDER).glob(f"*/{CONFIG_NAME}"))
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        raise ValueError(f"{directory} holds adapters {names}; expected one of them, such as {found[0]}")
    return found[0] if found else directory
