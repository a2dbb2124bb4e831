"""Adapters in files: PEFT's layout, safetensors and JSON, written whole or not at all.

A directory holds `adapter_config.json` and `adapter_model.safetensors`. The names of the tensors are in parameters.py.
Three digests are in the config: `config_sha256` of its fields, `weights_sha256` of the weights file, `tensors_sha256`
of the tensors in any file. The weights file carries the config too, and is a whole adapter by itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .._version import __version__
from ..config import DTYPES, FLOAT32_MAX, SteerConfig
from ..kernels.rotation import is_orthonormal, orthonormal
from .parameters import (
    SITE,
    UP,
    UP_BIAS,
    ByLayer,
    Layout,
    T,
    base_name,
    by_layer,
    specs_of,
    split_path,
    unwrapped,
)
from .saving import leftovers, open_regular, read_regular, saving_folder, write_new
from .weights import MOST_JSON, Header, header_of, read_header, tensors_digest, unprefixed, values_of

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
        self.layout.check_tensors(self.config, specs_of(self.tensors))
        for path, tensor in self.layout.paths(self.tensors).items():
            check_values(path, tensor, self.config.scale)
            if self.config.form == "loreft" and split_path(path)[2] == UP:
                _check_rotation(path, tensor)


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


def _check_rotation(path: str, matrix: Tensor) -> None:
    """Refuse a matrix that makes no rotation of LoReFT's.

    Raises:
        ValueError: its columns depend on each other, to float32's rounding.
    """
    if not is_orthonormal(orthonormal(matrix.detach().float())):
        raise ValueError(f"tensor {path} has columns that depend on each other; expected independent ones, for LoReFT")


def write_adapter(directory: str | os.PathLike[str], adapter: AdapterFile) -> None:
    """Write the adapter's two files into `directory`, which is made if need be. What was there stays if this fails.

    Where the process is killed, or others save there at the same time, the directory holds one of these adapters.

    Raises:
        NotADirectoryError: `directory` is a file.
        ValueError: it holds an adapter of another method. Those have files of the same names.
        OSError: the files could not be written.
    """
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; expected a directory to save the adapter in")
    refuse_foreign(target)
    config, weights = _contents(adapter)
    target.mkdir(parents=True, exist_ok=True)
    with saving_folder(target) as folder:
        for leftover in leftovers(target):
            shutil.rmtree(leftover, ignore_errors=True)
        write_new(folder / WEIGHTS_NAME, weights)
        write_new(folder / CONFIG_NAME, config)
        _replace_both(folder, target)


def _contents(adapter: AdapterFile) -> tuple[bytes, bytes]:
    """The two files of an adapter: config and weights."""
    layout = replace(adapter.layout, layers_path=unwrapped(adapter.layout.layers_path))
    fields = _fields(adapter.config, layout, tensors_digest(adapter.tensors))
    named = sorted(layout.paths(adapter.tensors).items())
    data = b"".join(values_of(tensor) for _, tensor in named)
    shapes = {path: tuple(tensor.shape) for path, tensor in named}
    weights = header_of(shapes, adapter.config.dtype, json.dumps(sealed(fields))) + data
    config = sealed({**fields, "weights_sha256": hashlib.sha256(weights).hexdigest()})
    return (json.dumps(config, indent=2) + "\n").encode(), weights


def _fields(config: SteerConfig, layout: Layout, digest: str) -> dict[str, Any]:
    """The config as files have it, but for the digests of files."""
    return {
        "peft_type": PEFT_TYPE,
        "base_model_name_or_path": base_name(layout.base) or None,
        "hidden_size": layout.hidden,
        "num_layers": layout.num_layers,
        **config.to_dict(),
        "fused_steer_version": __version__,
        "tensors_sha256": digest,
    }


def weights_size(config: SteerConfig, layout: Layout) -> int:
    """Bytes of the weights file of such an adapter."""
    shapes = layout.paths(layout.shapes(config))
    data = sum(map(math.prod, shapes.values())) * DTYPES[config.dtype].itemsize
    text = json.dumps(sealed(_fields(config, layout, "0" * 64)))
    return len(header_of(shapes, config.dtype, text)) + data


def sealed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config, with their digest."""
    return {**fields, "config_sha256": fields_digest(fields)}


def fields_digest(fields: Mapping[str, Any]) -> str:
    """Of a config's fields, apart from the digest itself and what is PEFT's."""
    own = {name: value for name, value in fields.items() if name not in (*_PEFT_FIELDS, "config_sha256")}
    return hashlib.sha256(json.dumps(own, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def refuse_foreign(directory: Path) -> None:
    """Refuse to write over another method's adapter, such as the LoRA beside which this one was trained.

    Raises:
        ValueError: `directory` holds one, or has something else than a file under an adapter's file's name.
    """
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if (directory / name).exists() and not (directory / name).is_file():
            raise ValueError(f"{directory / name} is no regular file; expected one, or none")
    method = method_in(directory)
    if method not in (None, PEFT_TYPE):
        raise ValueError(f"{directory} holds an adapter of {method}; expected another directory, to leave it alone")


def method_in(directory: Path) -> Any:
    """The `peft_type` of the adapter in a directory; None without an adapter or a readable config."""
    try:
        fields = read_json(directory / CONFIG_NAME)
    except (OSError, ValueError):
        return None
    return fields.get("peft_type")


def read_json(file: Path) -> dict[str, Any]:
    """The fields of a small JSON file.

    Raises:
        OSError, ValueError: it cannot be read, is too large, or holds something else than an object.
    """
    try:
        fields = json.loads(read_regular(file, MOST_JSON).decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply; expected an object of fields") from None
    if not isinstance(fields, dict):
        raise ValueError(f"it holds a {type(fields).__name__}; expected an object")
    return fields


def _replace_both(new: Path, directory: Path) -> None:
    """Rename the weights, then the config. If that fails, the earlier weights come back."""
    weights, earlier = directory / WEIGHTS_NAME, new / "earlier"
    if weights.exists():
        shutil.copy2(weights, earlier)  # not os.link: some file systems have none
    ours = os.stat(new / WEIGHTS_NAME)
    try:
        os.replace(new / WEIGHTS_NAME, weights)
        os.replace(new / CONFIG_NAME, directory / CONFIG_NAME)
    except BaseException:
        # Not where the config is in place, or where another process has since saved its own weights.
        if (new / CONFIG_NAME).exists() and weights.exists() and os.path.samestat(os.stat(weights), ours):
            if earlier.exists():
                os.replace(earlier, weights)
            else:
                weights.unlink()
        raise


def locate_adapter(source: str | os.PathLike[str]) -> Path:
    """The local directory of `source`, which is a path or a hub id. The files of a hub id are downloaded.

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
class _Head:
    """What a config says: what the adapter computes, its layout (without the path of the layers, which the tensors
    tell), and digests. sealed: whether it has its own; saved_modules: names of what PEFT saved beside it."""

    config: SteerConfig
    layout: Layout
    weights_sha256: str | None
    tensors_sha256: str | None
    sealed: bool
    saved_modules: tuple[str, ...]


def _head(given: Mapping[str, Any]) -> _Head:
    fields = dict(given)
    for key in _PEFT_FIELDS:
        fields.pop(key, None)
    peft_type = fields.pop("peft_type", None)
    if peft_type != PEFT_TYPE:
        raise ValueError(f"peft_type is {peft_type!r}; expected {PEFT_TYPE!r}")
    version = fields.pop("fused_steer_version", None)
    weights, tensors, config_digest = (fields.pop(f"{part}_sha256", None) for part in ("weights", "tensors", "config"))
    modules = fields.pop("modules_to_save", None) or []
    if not isinstance(modules, list) or not all(isinstance(name, str) and name for name in modules):
        raise ValueError(f"modules_to_save is {modules!r:.200}; expected a list of names, or null")
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
    if config_digest is not None and config_digest != fields_digest(given):
        raise ValueError(
            f"its fields are not those that were saved; expected config_sha256 {config_digest} (of a config that was "
            "edited on purpose, remove that line)"
        )
    return _Head(config, layout, weights, tensors, config_digest is not None, tuple(modules))


def check_config(directory: Path) -> None:
    """Read and check an adapter's config alone.

    Raises:
        OSError, ValueError: it cannot be read, is of another method, has unknown keys or is not what was saved.
    """
    with _blaming(directory / CONFIG_NAME):
        _head(read_json(directory / CONFIG_NAME))


def read_adapter(
    source: str | os.PathLike[str],
    model: Layout | None = None,
    *,
    check_base: bool = False,
    without_heads: bool = False,
) -> AdapterFile:
    """Read and check an adapter's files. Nothing but JSON and safetensors is ever opened.

    The tensors are copies of the bytes that were checked. A config of another save than the weights' own, which a
    killed save or one of several at a time may leave, gives way to the one that the weights carry, with a warning.
    Digests that a config lacks are not checked: files may be written by hand. A bit that flips cannot remove one,
    because an unknown key is refused.

    Args:
        source: the directory, or an id on the hub.
        model: what the adapter has to fit; None leaves that open.
        check_base: whether the base model's name has to fit, too.
        without_heads: leave out the heads that PEFT trained and saved beside the adapter, instead of refusing them.

    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        ValueError: a file is truncated or corrupt, is of another method, has unknown keys, or does not fit the other;
            or the adapter does not fit `model`.
    """
    directory = locate_adapter(source)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / name).exists():
            raise FileNotFoundError(f"{directory} has no {name}; expected a saved steering adapter")
    with _blaming(directory / CONFIG_NAME):
        head = _head(read_json(directory / CONFIG_NAME))
    file = directory / WEIGHTS_NAME
    with _blaming(file), open(open_regular(file), "rb") as opened:
        header = read_header(opened)
        embedded = None if header.config is None else _head(json.loads(header.config))
        own, others = _split(header.specs, head.saved_modules)
        if others and not without_heads:
            raise ValueError(
                f"it has a trained head beside the steering, {next(iter(others))}; expected steering alone (PEFT loads "
                "both: import fused_steer.peft, then PeftModel.from_pretrained)"
            )
        layers_path, specs = by_layer(own)
    heads = [head] if embedded is None else [head, embedded]

    def refusal(head: _Head) -> ValueError | None:
        """Why these tensors are not what it says, or it is not for this model."""
        try:
            if model is not None:
                model.check_fits(source, head.layout, check_base)
            with _blaming(file):
                replace(head.layout, layers_path=layers_path).check_tensors(head.config, specs)
        except ValueError as error:
            return error
        return None

    refusals = [refusal(one) for one in heads]
    if all(refusals):  # before anything is read that is as large as the file claims
        raise refusals[0]  # type: ignore[misc]
    with _blaming(file):
        content = _read_whole(file, header, head)
        named = {unprefixed(name): tensor for name, tensor in safetensors.torch.load(content).items()}
        steering, beside = _split(named, head.saved_modules)
        _, tensors = by_layer(steering)
        chosen = _matching(head, embedded, header.plain, content, partial(tensors_digest, tensors, beside))
    if chosen is not head:
        warnings.warn(
            f"{directory / CONFIG_NAME} is of another save than {WEIGHTS_NAME}, which is read by the config that it "
            "carries: the adapter that was saved with it",
            stacklevel=2,
        )
    refused = refusals[0 if chosen is head else 1]
    if refused is not None:
        raise refused
    with _blaming(file):
        return AdapterFile(chosen.config, replace(chosen.layout, layers_path=unwrapped(layers_path)), tensors)


def _read_whole(file: Path, header: Header, head: _Head) -> bytes:
    with open(open_regular(file), "rb") as opened:
        length = os.fstat(opened.fileno()).st_size
        content = opened.read(header.size + 1) if length == header.size else b""
    if len(content) != header.size:
        if head.weights_sha256 is not None:
            raise _other_contents(head)
        raise ValueError(f"it has {length} bytes; expected {header.size} by its header")
    return content


def _split(named: Mapping[str, T], modules: Sequence[str]) -> tuple[dict[str, T], dict[str, T]]:
    """What is an adapter's by its path, and what is of the modules of these names."""

    def is_beside(path: str) -> bool:
        return f".{SITE}." not in path and any(f".{name}." in f".{path}" for name in modules)

    beside = {path: value for path, value in named.items() if is_beside(path)}
    return {path: value for path, value in named.items() if path not in beside}, beside


def _matching(head: _Head, embedded: _Head | None, plain: bool, content: bytes, digest_of: Callable[[], str]) -> _Head:
    """The config that these weights were saved with: that of the config's file, or the one that they carry.

    Args:
        digest_of: gives the digest of the tensors; it takes long, and may not be needed.

    Raises:
        ValueError: it is neither.
    """
    if head.weights_sha256 is not None and hashlib.sha256(content).hexdigest() == head.weights_sha256:
        return head
    digest = digest_of()
    if head.weights_sha256 is None:  # PEFT's have the digest of the tensors, and what a person wrote perhaps none
        expected = head.tensors_sha256 or (embedded and embedded.tensors_sha256)
        if expected is None or (digest == expected and (plain or not head.sealed)):
            return head
    if embedded is not None and embedded.sealed and head.sealed and plain and embedded.tensors_sha256 == digest:
        return embedded
    raise _other_contents(head)


def _other_contents(head: _Head) -> ValueError:
    expected = head.weights_sha256 or f"{head.tensors_sha256} of its tensors"
    return ValueError(f"its contents are not those that {CONFIG_NAME} was saved with; expected sha256 {expected}")


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
    except MemoryError:
        raise ValueError(f"{file} cannot be loaded: it is larger than the memory; expected an adapter") from None
    except (ValueError, TypeError, OverflowError, RecursionError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file} cannot be loaded: {' '.join(str(error).split())}") from error
