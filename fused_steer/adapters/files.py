"""Adapters in files: PEFT's layout, safetensors and JSON, written whole or not at all.

A directory holds `adapter_config.json` and `adapter_model.safetensors`. The names of the tensors are in parameters.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .._version import __version__
from ..config import FLOAT32_MAX, SteerConfig
from .parameters import PEFT_PREFIX, UP, UP_BIAS, ByLayer, Layout, by_layer, split_path

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_TYPE = "POST_BLOCK"
#: Where adapters lie beside other files, each in a folder of its name: one level deeper than where transformers'
#: Trainer looks for further adapters of PEFT's.
CHECKPOINT_FOLDER = "fused_steer"
#: What PEFT writes into every adapter's config, and what says nothing of what it computes.
_PEFT_FIELDS = ("auto_mapping", "inference_mode", "peft_version", "revision", "task_type")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class AdapterFile:
    """What a saved adapter is: its config, the layout of the model that it was made for, and its tensors by layer.

    Every adapter that is read or written is one of these, so that none with values that spoil a hidden state exists:
    served beside others, it would spoil theirs too, through cache blocks that are used again.

    Raises:
        ValueError: the tensors are not those of the config, or one has values that are not finite, or that overflow
            float32 when the strength multiplies them.
    """

    config: SteerConfig
    layout: Layout
    tensors: ByLayer

    def __post_init__(self) -> None:
        self.layout.check_tensors(self.config, self.tensors)
        for path, tensor in self.layout.paths(self.tensors).items():
            check_values(path, tensor, self.config.scale)


def check_values(path: str, tensor: Tensor, scale: float) -> None:
    """Refuse a tensor with values that are not finite, and a W2 or b2 that overflows float32 times the strength.

    Raises:
        ValueError: in one line, which names the tensor by `path`.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return  # of a dtype or shape that no adapter has: refused as such
    if tensor.element_size() == 1:  # no arithmetic is defined on float8
        tensor = tensor.float()
    least, most = torch.stack(tensor.detach().aminmax()).tolist()  # NaN if one value is
    largest = max(-least, most)
    if not math.isfinite(largest):
        raise ValueError(f"tensor {path} has values that are NaN or infinite; expected finite ones")
    if split_path(path)[2] in (UP, UP_BIAS) and abs(scale) * largest > FLOAT32_MAX:
        raise ValueError(
            f"tensor {path} has values up to {largest:.3g}, and scale is {scale:.3g}; expected a product of at most "
            f"{FLOAT32_MAX:.3g}, float32's largest"
        )


def write_adapter(directory: str | os.PathLike[str], adapter: AdapterFile) -> None:
    """Write the adapter's two files into `directory`, which is made if need be. What was there stays if this fails.

    Raises:
        NotADirectoryError: `directory` is a file.
        ValueError: it holds an adapter of another method, whose files have the same names.
        OSError: the files could not be written.
    """
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; expected a directory to save the adapter in")
    refuse_foreign(target)
    layout, named = adapter.layout, adapter.layout.paths(adapter.tensors)
    tensors = {PEFT_PREFIX + path: tensor.detach().cpu().contiguous() for path, tensor in named.items()}
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    config = {
        "peft_type": PEFT_TYPE,
        "base_model_name_or_path": layout.base or None,
        "hidden_size": layout.hidden,
        "num_layers": layout.num_layers,
        **adapter.config.to_dict(),
        "fused_steer_version": __version__,
        # Ties the two files: weights of another save, or a bit flipped since, are found out when the adapter is loaded.
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    target.mkdir(parents=True, exist_ok=True)
    _replace_files(target, {WEIGHTS_NAME: weights, CONFIG_NAME: (json.dumps(config, indent=2) + "\n").encode()})


def refuse_foreign(directory: Path) -> None:
    """Refuse to write over another method's adapter, such as the LoRA beside which this one was trained.

    Raises:
        ValueError: `directory` holds one.
    """
    try:
        fields = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # none, or nothing that could still be read
    method = fields.get("peft_type", PEFT_TYPE) if isinstance(fields, dict) else PEFT_TYPE
    if method != PEFT_TYPE:
        raise ValueError(f"{directory} holds an adapter of {method}; expected another directory, to leave it alone")


def _replace_files(directory: Path, contents: Mapping[str, bytes]) -> None:
    """Write all files under temporary names, then rename them; if a rename fails, take the earlier ones back."""
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as folder:
        new, old = Path(folder, "new"), Path(folder, "old")
        new.mkdir(), old.mkdir()
        for name, content in contents.items():
            with open(new / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if (directory / name).exists():
                shutil.copy2(directory / name, old / name)  # not os.link: some file systems have none
        replaced = []
        try:
            for name in contents:
                os.replace(new / name, directory / name)
                replaced.append(name)
        except BaseException:
            for name in replaced:
                if (old / name).exists():
                    os.replace(old / name, directory / name)
                else:
                    (directory / name).unlink()
            raise


def locate_adapter(source: str | os.PathLike[str]) -> Path:
    """The local directory of `source`: a path, or a hub id, whose two files are then downloaded.

    Raises:
        FileNotFoundError: no such directory, and no such hub id or no network to ask it.
    """
    path = Path(source)
    if path.is_dir():
        return _beside_a_model(path)
    if path.exists():
        raise NotADirectoryError(f"{path} is a file; expected the directory that holds {CONFIG_NAME}")
    if not isinstance(source, str) or not HUB_ID.fullmatch(source):
        raise FileNotFoundError(f"no adapter directory {source}; expected one that holds {CONFIG_NAME}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME]))
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise FileNotFoundError(
            f"no adapter directory {source}, and the hub supplied none of this id ({type(error).__name__}: {reason})"
        ) from error


def _beside_a_model(directory: Path) -> Path:
    """The directory, or the one adapter in its `fused_steer/`, where a whole model is that has none at the top.

    Raises:
        ValueError: there are several.
    """
    if (directory / CONFIG_NAME).exists():
        return directory
    found = sorted(config.parent for config in (directory / CHECKPOINT_FOLDER).glob(f"*/{CONFIG_NAME}"))
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        raise ValueError(f"{directory} holds adapters {names}; expected one of them, such as {found[0]}")
    return found[0] if found else directory


@dataclass(frozen=True)
class AdapterHead:
    """What a saved adapter is, before its tensors are read: where, its config, its layout (without the path of the
    layers, which the tensors tell), and its weights' digest."""

    directory: Path
    config: SteerConfig
    layout: Layout
    sha256: str | None

    @property
    def weights(self) -> Path:
        return self.directory / WEIGHTS_NAME


def read_head(source: str | os.PathLike[str]) -> AdapterHead:
    """Read and check an adapter's config.

    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        ValueError: the config is truncated or corrupt, is of another method, or has unknown keys.
    """
    directory = locate_adapter(source)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} has no {name}; expected a saved steering adapter")
    config_file = directory / CONFIG_NAME
    with _blaming(config_file):
        fields = json.loads(config_file.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError(f"it holds a {type(fields).__name__}; expected an object")
        for key in _PEFT_FIELDS:
            fields.pop(key, None)
        peft_type = fields.pop("peft_type", None)
        if peft_type != PEFT_TYPE:
            raise ValueError(f"peft_type is {peft_type!r}; expected {PEFT_TYPE!r}")
        version = fields.pop("fused_steer_version", None)
        digest = fields.pop("weights_sha256", None)
        base = fields.pop("base_model_name_or_path", None) or ""
        if not isinstance(base, str):
            raise ValueError(f"base_model_name_or_path is {base!r}; expected a name, or null")
        hidden, num_layers = (_positive(fields, key) for key in ("hidden_size", "num_layers"))
        try:
            config = SteerConfig.from_dict(fields)
        except TypeError as error:
            raise ValueError(f"{error} (it was written by fused-steer {version}, this is {__version__})") from None
        layout = Layout("", num_layers, hidden, base)
        layout.indices(config)
    return AdapterHead(directory, config, layout, digest)


def read_adapter(
    source: str | os.PathLike[str], model: Layout | None = None, *, check_base: bool = False
) -> AdapterFile:
    """Read and check an adapter's files. Nothing but JSON and safetensors is ever opened.

    Args:
        source: the directory, or an id on the hub.
        model: what the adapter has to fit; None leaves that open.
        check_base: whether the base model's name has to fit, too.

    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        ValueError: a file is truncated or corrupt, is of another method, has unknown keys, or does not fit the other;
            or the adapter does not fit `model`.
    """
    head = read_head(source)
    if model is not None:
        model.check_fits(source, head.layout, check_base)
    with _blaming(head.weights):
        weights = head.weights.read_bytes()
        _check_digest(head, hashlib.sha256(weights).hexdigest())
        tensors = safetensors.torch.load(weights)
    return _file(head, tensors)


def map_adapter(head: AdapterHead, *, check_digest: bool = True) -> AdapterFile:
    """The adapter with tensors that lie in the file and are read where they are used, as memory that it maps.

    check_digest: whether the file is read through, to see that it is the one that was saved.

    Raises:
        ValueError: the file is truncated or corrupt, or does not fit the config.
    """
    with _blaming(head.weights):
        if check_digest and head.sha256 is not None:
            with open(head.weights, "rb") as file:
                if os.fstat(file.fileno()).st_size == 0:  # of which no map can be made
                    raise ValueError("it is empty")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                    _check_digest(head, hashlib.sha256(mapped).hexdigest())
        with safetensors.safe_open(head.weights, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
    return _file(head, tensors)


def _check_digest(head: AdapterHead, found: str) -> None:
    if head.sha256 is not None and found != head.sha256:
        raise ValueError(f"its contents are not those that {CONFIG_NAME} was saved with; expected sha256 {head.sha256}")


def _file(head: AdapterHead, tensors: Mapping[str, Tensor]) -> AdapterFile:
    named = {_unprefixed(name, head.weights): tensor for name, tensor in tensors.items()}
    with _blaming(head.weights):
        layers_path, layers = by_layer(named)
        return AdapterFile(head.config, replace(head.layout, layers_path=layers_path), layers)


def _unprefixed(name: str, file: Path) -> str:
    if not name.startswith(PEFT_PREFIX):
        raise ValueError(f"{file}: tensor {name!r}; expected names that begin with {PEFT_PREFIX!r}")
    return name[len(PEFT_PREFIX) :]


def _positive(fields: dict[str, Any], key: str) -> int:
    value = fields.pop(key, None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} is {value!r}; expected a positive integer")
    return value


@contextlib.contextmanager
def _blaming(file: Path) -> Iterator[None]:
    """Whatever is wrong inside is one line that names the file."""
    try:
        yield
    except RecursionError:
        raise ValueError(f"{file} cannot be loaded: it is nested too deeply; expected an object of fields") from None
    except (ValueError, TypeError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file} cannot be loaded: {' '.join(str(error).split())}") from error
