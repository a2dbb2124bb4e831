"""Read and write the files of an adapter, in PEFT's layout with safetensors and JSON.

A directory holds `adapter_config.json` and `adapter_model.safetensors`. parameters.py names the tensors. The config has
three digests: `config_sha256` of its fields, `weights_sha256` of the weights file, and `tensors_sha256` of the tensors
in any file. The weights file also holds the config, so it is a complete adapter. Files are written whole or not at all.
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
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
from torch import Tensor

from .._version import __version__
from ..config import DTYPES, SteerConfig
from .fields import fields_of, read_json
from .kinds import (
    CONFIG_NAME,
    JOINT_NAME,
    PEFT_TYPE,
    WEIGHTS_NAME,
    method_in,
    other_method,
    refuse_joint,
)
from .locating import locate_adapter
from .parameters import (
    UP,
    ByPlace,
    Layout,
    T,
    base_name,
    by_place,
    check_rotation,
    check_values,
    is_of_site,
    specs_of,
    split_path,
    unwrapped,
)
from .saving import digest_of, leftovers, open_regular, saving_folder, target_folder, write_new
from .weights import Header, header_of, read_header, tensors_digest, unprefixed, values_of

#: Fields that PEFT writes into every adapter's config, which do not change what the adapter computes.
_PEFT_FIELDS = ("auto_mapping", "inference_mode", "peft_version", "revision", "task_type")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class AdapterFile:
    """A saved adapter: its config, the layout of the model that it was made for, and its tensors by place.

    Every adapter that is read or written is checked as an AdapterFile. One with values that are not finite would spoil
    the hidden states of adapters served beside it, through cache blocks that are used again.

    Raises:
        ValueError: the tensors are not those of the config, or have values that are not finite or that overflow float32
            when multiplied by the strength.
    """

    config: SteerConfig
    layout: Layout
    tensors: ByPlace

    def __post_init__(self) -> None:
        self.layout.check_tensors(self.config, specs_of(self.tensors))
        for path, tensor in self.layout.paths(self.tensors).items():
            check_values(path, tensor, self.config.scale)
            if self.config.form == "loreft" and split_path(path)[2] == UP:
                check_rotation(path, tensor)


def write_adapter(directory: str | os.PathLike[str], adapter: AdapterFile) -> None:
    """Write the adapter's two files into `directory`, which is created if needed. If this fails, earlier files stay.

    If the process is killed, or others save there at the same time, the directory holds one of these adapters whole.

    Raises:
        NotADirectoryError: `directory` is a file.
        TypeError, ValueError: `directory` is no path or an empty one (see `target_folder`), or it holds an adapter of
            another method, with files of the same names.
        OSError: the files could not be written. Folders that were created for them are removed.
    """
    target = target_folder(directory, "the adapter")
    refuse_foreign(target)
    config, weights = _contents(adapter)
    with saving_folder(target) as folder:
        for leftover in leftovers(target):
            shutil.rmtree(leftover, ignore_errors=True)
        write_new(folder / WEIGHTS_NAME, weights)
        write_new(folder / CONFIG_NAME, config)
        _replace_both(folder, target)


def _contents(adapter: AdapterFile) -> tuple[bytes, bytes]:
    """Return the contents of an adapter's two files: config and weights."""
    layout = replace(adapter.layout, layers_path=unwrapped(adapter.layout.layers_path))
    fields = _fields(adapter.config, layout, tensors_digest(adapter.tensors))
    named = sorted(layout.paths(adapter.tensors).items())
    data = b"".join(values_of(tensor) for _, tensor in named)
    shapes = {path: tuple(tensor.shape) for path, tensor in named}
    weights = header_of(shapes, adapter.config.dtype, json.dumps(sealed(fields))) + data
    config = sealed({**fields, "weights_sha256": hashlib.sha256(weights).hexdigest()})
    return (json.dumps(config, indent=2) + "\n").encode(), weights


def _fields(config: SteerConfig, layout: Layout, digest: str) -> dict[str, Any]:
    """Return the config's fields for files, without the digests of files."""
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
    """Return the size in bytes of the weights file of such an adapter."""
    shapes = layout.paths(layout.shapes(config))
    data = sum(map(math.prod, shapes.values())) * DTYPES[config.dtype].itemsize
    text = json.dumps(sealed(_fields(config, layout, "0" * 64)))
    return len(header_of(shapes, config.dtype, text)) + data


def sealed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config with their digest."""
    return {**fields, "config_sha256": fields_digest(fields)}


def fields_digest(fields: Mapping[str, Any]) -> str:
    """Return the digest of a config's fields, without the digest itself and PEFT's fields."""
    own = {name: value for name, value in fields.items() if name not in (*_PEFT_FIELDS, "config_sha256")}
    return hashlib.sha256(json.dumps(own, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def refuse_foreign(directory: Path) -> None:
    """Check that a directory holds no other method's adapter, such as the LoRA that this one was trained with.

    Raises:
        ValueError: `directory` holds one, or a LoRA and steering of `save_joint`; or an adapter file's name there is
            not a regular file.
    """
    if (directory / JOINT_NAME).is_file():
        raise ValueError(
            f"{directory} holds a LoRA and steering together; expected another directory, to leave them alone"
        )
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if (directory / name).exists() and not (directory / name).is_file():
            raise ValueError(f"{directory / name} is not a regular file; expected one, or none")
    method = method_in(directory)
    if method not in (None, PEFT_TYPE):
        raise ValueError(f"{directory} holds an adapter of {method}; expected another directory, to leave it alone")


def _replace_both(new: Path, directory: Path) -> None:
    """Rename the weights, then the config. If that fails, restore the earlier weights."""
    weights, earlier = directory / WEIGHTS_NAME, new / "earlier"
    if weights.exists():
        shutil.copy2(weights, earlier)  # os.link is missing on some file systems
    ours = os.stat(new / WEIGHTS_NAME)
    try:
        os.replace(new / WEIGHTS_NAME, weights)
        os.replace(new / CONFIG_NAME, directory / CONFIG_NAME)
    except BaseException:
        # Not if the config is in place already, or if another process has since saved its own weights.
        if (new / CONFIG_NAME).exists() and weights.exists() and os.path.samestat(os.stat(weights), ours):
            if earlier.exists():
                os.replace(earlier, weights)
            else:
                weights.unlink()
        raise


@dataclass(frozen=True)
class _Head:
    """The contents of an adapter's config file.

    Attributes:
        config: the adapter's config.
        layout: its layout, without the path of the layers, which the tensors tell.
        weights_sha256, tensors_sha256: digests, or None.
        sealed: whether the config has its own digest.
        saved_modules: the names of modules that PEFT saved beside it.
    """

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
        raise other_method(peft_type)
    version = fields.pop("fused_steer_version", None)
    weights, tensors, config_digest = (
        _digest_field(fields, f"{part}_sha256") for part in ("weights", "tensors", "config")
    )
    modules = fields.pop("modules_to_save", None)
    modules = [] if modules is None else modules
    if not isinstance(modules, list) or not all(isinstance(name, str) and name for name in modules):
        raise ValueError(f"modules_to_save is {modules!r:.200}; expected a list of names, or null")
    base = fields.pop("base_model_name_or_path", None)
    base = "" if base is None else base
    if not isinstance(base, str):
        raise ValueError(f"base_model_name_or_path is {base!r:.200}; expected a name, or null")
    hidden, num_layers = (_positive(fields, key) for key in ("hidden_size", "num_layers"))
    try:
        config = SteerConfig.from_dict(fields)
    except TypeError as error:
        raise ValueError(f"{error} (it was written by fused-steer {version}, this is {__version__})") from None
    layout = Layout("", num_layers, hidden, base)
    layout.indices(config)
    if config_digest is not None and config_digest != fields_digest(given):
        raise ValueError(
            f"its fields were changed after saving; expected config_sha256 {config_digest} (remove that line if you "
            "edited the config on purpose)"
        )
    return _Head(config, layout, weights, tensors, config_digest is not None, tuple(modules))


def check_config(directory: Path) -> None:
    """Read and check an adapter's config, without its weights.

    Raises:
        OSError, ValueError: the config cannot be read, is of another method, has unknown keys or was changed.
    """
    with blaming(directory / CONFIG_NAME):
        _head(read_json(directory / CONFIG_NAME))


def read_adapter(
    source: str | os.PathLike[str], model: Layout | None = None, *, check_base: bool = False
) -> AdapterFile:
    """Read and check an adapter's files. Only JSON and safetensors are ever opened.

    The tensors are copies of the checked bytes. A killed save, or several at a time, may leave a config file of another
    save than the weights. Then the config inside the weights file is used, with a warning. Files may be written by
    hand, so missing digests are not checked. A flipped bit cannot remove a digest, because unknown keys are refused.

    Args:
        source: the directory, or an id on the hub.
        model: the layout that the adapter has to fit, or None.
        check_base: check the base model's name, too.

    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        ValueError: a file is truncated or corrupt, is of another method, has unknown keys or weights that PEFT saved
            beside the steering, or does not match the other file; or the adapter does not fit `model`.
    """
    return _read(source, model, check_base, with_heads=False)[0]


def read_with_heads(source: str | os.PathLike[str]) -> tuple[AdapterFile, dict[str, Tensor]]:
    """Read an adapter as `read_adapter` does, and the weights of the model that PEFT saved beside it, such as heads."""
    return _read(source, None, False, with_heads=True)


def _read(
    source: str | os.PathLike[str], model: Layout | None, check_base: bool, with_heads: bool
) -> tuple[AdapterFile, dict[str, Tensor]]:
    directory = locate_adapter(source)
    refuse_joint(directory)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / name).exists():
            raise FileNotFoundError(f"{directory} has no {name}; expected a saved steering adapter")
    with blaming(directory / CONFIG_NAME):
        head = _head(read_json(directory / CONFIG_NAME))
    file = directory / WEIGHTS_NAME
    # One descriptor for the header and the data, because another process may replace the file meanwhile.
    with contextlib.ExitStack() as stack:
        with blaming(file):
            opened = stack.enter_context(open(open_regular(file), "rb"))
            header = read_header(opened)
            embedded = None if header.config is None else _head(fields_of(header.config))
            by_peft = embedded is None and head.weights_sha256 is not None
            own, others = _split(header.specs, head.saved_modules, by_peft)
            if others and not with_heads:
                raise ValueError(
                    f"it has weights of the model beside the steering, {next(iter(others))}; expected only steering "
                    "(PEFT loads both: import fused_steer.peft, then PeftModel.from_pretrained)"
                )
            layers_path, specs = by_place(own)
        _warn_of_other_part(directory)
        heads = [head] if embedded is None else [head, embedded]

        def refusal(head: _Head) -> ValueError | None:
            """Return why the tensors do not match this config, or the config does not fit the model, or None."""
            try:
                if model is not None:
                    model.check_fits(source, head.layout, check_base)
                with blaming(file):
                    replace(head.layout, layers_path=layers_path).check_tensors(head.config, specs)
            except ValueError as error:
                return error
            return None

        refusals = [refusal(one) for one in heads]
        if all(refusals):  # before reading as many bytes as the file claims
            raise refusals[0]  # type: ignore[misc]
        with blaming(file):
            content = _read_whole(opened, header, head)
            named = {unprefixed(name): tensor for name, tensor in safetensors.torch.load(content).items()}
            steering, beside = _split(named, head.saved_modules, by_peft)
            _, tensors = by_place(steering)
            chosen = _matching(head, embedded, header.plain, content, partial(tensors_digest, tensors, beside))
    if chosen is not head:
        warnings.warn(
            f"{directory / CONFIG_NAME} is of another save than {WEIGHTS_NAME}; the config inside {WEIGHTS_NAME} is "
            "used instead",
            stacklevel=3,
        )
    refused = refusals[0 if chosen is head else 1]
    if refused is not None:
        raise refused
    with blaming(file):
        layout = replace(chosen.layout, layers_path=unwrapped(layers_path))
        return AdapterFile(chosen.config, layout, tensors), beside


def files_digest(folder: Path) -> str | None:
    """Return the digest of an adapter's two files, or None if one is missing."""
    digest = hashlib.sha256()
    try:
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            digest.update(digest_of(folder / name))
    except (OSError, ValueError):
        return None
    return digest.hexdigest()


def _warn_of_other_part(directory: Path) -> None:
    """Warn if the folder belongs to a joint save but was not saved together with its other parts."""
    try:
        recorded = read_json(directory.parent / JOINT_NAME).get(directory.name)
    except (OSError, ValueError):
        return  # no joint save
    if recorded is not None and recorded != files_digest(directory):
        warnings.warn(
            f"{directory} was not saved together with the LoRA beside it; expected "
            f"load_joint(model, {os.fspath(directory.parent)!r}), which finds the parts of one save",
            stacklevel=4,
        )


def _read_whole(opened: BinaryIO, header: Header, head: _Head) -> bytes:
    length = os.fstat(opened.fileno()).st_size
    opened.seek(0)
    content = opened.read(header.size + 1) if length == header.size else b""
    if len(content) != header.size:
        if head.weights_sha256 is not None:
            raise _other_contents(head)
        raise ValueError(f"it has {length} bytes; expected {header.size} by its header")
    return content


def _split(named: Mapping[str, T], modules: Sequence[str], by_peft: bool) -> tuple[dict[str, T], dict[str, T]]:
    """Split tensors by path into those of the adapter and those of the model beside it.

    Args:
        modules: names of modules that PEFT saved.
        by_peft: PEFT wrote the file, and may have saved embeddings too (`save_embedding_layers`).
    """

    def is_beside(path: str) -> bool:
        return not is_of_site(path) and (by_peft or any(f".{name}." in f".{path}" for name in modules))

    beside = {path: value for path, value in named.items() if is_beside(path)}
    return {path: value for path, value in named.items() if path not in beside}, beside


def peft_weights_digest(folder: Path, tensors_sha256: str, modules: Sequence[str]) -> str | None:
    """Return the digest of a weights file that PEFT has just written, or None if it does not hold these tensors."""
    try:
        content = (folder / WEIGHTS_NAME).read_bytes()
        named = {unprefixed(name): tensor for name, tensor in safetensors.torch.load(content).items()}
        steering, beside = _split(named, modules, by_peft=False)
        places = by_place({path: tensor for path, tensor in steering.items() if is_of_site(path)})[1]
    except (OSError, ValueError, safetensors.SafetensorError):
        return None
    return hashlib.sha256(content).hexdigest() if tensors_digest(places, beside) == tensors_sha256 else None


def _matching(head: _Head, embedded: _Head | None, plain: bool, content: bytes, digest_of: Callable[[], str]) -> _Head:
    """Return the config that these weights were saved with: the config file's, or the one inside the weights.

    Args:
        digest_of: returns the digest of the tensors. It is slow, so it is called only if needed.

    Raises:
        ValueError: neither config matches.
    """
    if head.weights_sha256 is not None and hashlib.sha256(content).hexdigest() == head.weights_sha256:
        return head
    digest = digest_of()
    if head.weights_sha256 is None:  # PEFT's configs have the tensors' digest, hand-written ones may have none
        expected = head.tensors_sha256 or (embedded and embedded.tensors_sha256)
        if expected is None or (digest == expected and (plain or not head.sealed)):
            return head
    if embedded is not None and embedded.sealed and head.sealed and plain and embedded.tensors_sha256 == digest:
        return embedded
    raise _other_contents(head, embedded)


def _other_contents(head: _Head, embedded: _Head | None = None) -> ValueError:
    expected = head.weights_sha256 or f"{head.tensors_sha256 or (embedded and embedded.tensors_sha256)} of its tensors"
    return ValueError(f"its contents do not match {CONFIG_NAME}; expected sha256 {expected}")


def _digest_field(fields: dict[str, Any], key: str) -> str | None:
    value = fields.pop(key, None)
    if value is not None and not (isinstance(value, str) and _DIGEST.fullmatch(value)):
        raise ValueError(f"{key} is {value!r:.200}; expected 64 hexadecimal digits, or null")
    return value


def _positive(fields: dict[str, Any], key: str) -> int:
    value = fields.pop(key, None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} is {value!r}; expected a positive integer")
    return value


@contextlib.contextmanager
def blaming(file: Path) -> Iterator[None]:
    """Re-raise errors as a one-line ValueError that names the file."""
    try:
        yield
    except MemoryError:
        raise ValueError(f"{file} cannot be loaded: it is larger than the memory; expected an adapter") from None
    except (ValueError, TypeError, OverflowError, RecursionError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file} cannot be loaded: {' '.join(str(error).split())}") from error
