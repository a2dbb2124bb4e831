"""Shared steps of all importers: open a file, check its tensors, find the base model's sizes, assemble the adapter."""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from ..adapters.fields import MOST_JSON
from ..adapters.files import AdapterFile
from ..adapters.parameters import Layout, Place
from ..adapters.saving import open_regular
from ..config import DTYPES, SteerConfig, plain
from ..model.decoder import Decoder, find_decoder, meta_model

_PATH = re.compile(r"\w+(\.\w+)*")
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


# ------------------------------------------------------------------------------------------------------ the base model


def layout(base: str, num_layers: int | None, layers_path: str | None) -> Layout:
    """Return the layout that the adapter is for, from the arguments or from the base model's config.

    If `num_layers` and `layers_path` are both given, the config is not read and the hidden size is left open (0).

    Raises:
        TypeError: `num_layers` is not an integer.
        ValueError: an argument is missing or out of range, or the base's config cannot be read or contradicts it.
    """
    num_layers = plain(num_layers)
    if num_layers is not None and (not isinstance(num_layers, int) or isinstance(num_layers, bool)):
        raise TypeError(f"num_layers is {num_layers!r}; expected an integer")
    if num_layers is not None and num_layers < 1:
        raise ValueError(f"num_layers is {num_layers}; expected at least 1")
    if layers_path is not None and not _PATH.fullmatch(layers_path):
        raise ValueError(f"layers_path is {layers_path!r}; expected a module's path such as model.layers")
    if num_layers is not None and layers_path is not None:
        return Layout(layers_path, num_layers, 0, base)
    if not base:
        missing = [name for name, value in (("num_layers", num_layers), ("layers_path", layers_path)) if value is None]
        raise ValueError(
            f"{' and '.join(missing)} not given; expected both (--num-layers, --layers-path), or the base model "
            "(--base-model) to read them from: the file does not record them"
        )
    decoder = decoder_of(base)
    for name, given, found in (
        ("num_layers", num_layers, len(decoder.layers)),
        ("layers_path", layers_path, decoder.path),
    ):
        if given not in (None, found):
            raise ValueError(f"{name} is {given}; expected {found}, as the base model {base!r} has")
    return replace(decoder.layout, base=base)


def decoder_of(base: str) -> Decoder:
    """The decoder layers of a base model, without weights, by its config.

    Raises:
        ValueError: the config cannot be read, or says of no decoder layers.
    """
    try:
        return find_decoder(meta_model(base))
    except Exception as error:
        raise ValueError(
            f"the base model {base!r} does not tell its layers ({type(error).__name__}: {first_line(error)}); "
            "expected a directory or hub id with a config, or both num_layers and layers_path"
        ) from error


def assemble(
    file: str | os.PathLike[str],
    layout: Layout,
    hidden: int,
    places: Mapping[Place, Mapping[str, Tensor]],
    **fields: Any,
) -> AdapterFile:
    """Return the adapter of these tensors, given by place and by name below the site. The tensors are copied.

    Args:
        file: the imported file, named in errors.
        layout: the layout from the function `layout`.
        hidden: the tensors' hidden size.
        layers: the tensors.
        fields: the config's fields except `layers` and `site`.

    Raises:
        ValueError: the tensors do not fit the layout or each other, or the config refuses a field.
    """
    with naming(file):
        if layout.hidden not in (0, hidden):
            raise ValueError(f"its hidden size is {hidden}; expected {layout.hidden}, that of {layout.base}")
        sites = list({place.site for place in places})
        config = SteerConfig(layers=layout.config_layers({place.layer for place in places}), site=sites, **fields)
        # Copied, because safetensors refuses tensors that share memory.
        tensors = {
            place: {
                name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in named.items()
            }
            for place, named in places.items()
        }
        return AdapterFile(config, replace(layout, hidden=hidden), tensors)


@contextlib.contextmanager
def foreign_file(file: Path) -> Iterator[BinaryIO]:
    """Open a file to copy its bytes. If it were mapped into memory, overwriting it would kill the process.

    Raises:
        ValueError: it is not a regular file, or it was written to before the end of the block.
        OSError: it cannot be opened.
    """
    with open(open_regular(file), "rb") as opened:
        before = os.fstat(opened.fileno())
        yield opened
        after = os.fstat(opened.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ValueError("it was written to while it was read")


def read_safetensors(file: Path, without: str | None = None) -> dict[str, Tensor | None]:
    """Read a safetensors file. Keys that begin with `without` are given None, as their tensors may be gigabytes.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        with foreign_file(file) as opened:
            return _read_safetensors(opened, without)
    except Exception as error:  # SafetensorError, or any error that a damaged header causes
        raise ValueError(f"{file} cannot be read: {first_line(error)}; expected a safetensors file") from error


def _read_safetensors(opened: BinaryIO, without: str | None) -> dict[str, Tensor | None]:
    length = os.fstat(opened.fileno()).st_size
    size = int.from_bytes(opened.read(8), "little")
    if size > min(length - 8, MOST_JSON):
        raise ValueError(f"its header is of {size} bytes, in a file of {length}")
    header = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    end, content = 0, bytearray()
    wanted: dict[str, dict[str, Any]] = {}
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (start, stop), begin = entry["data_offsets"], len(content)
        if start != end or not start <= stop <= length - 8 - size:
            raise ValueError(f"its header has {key} at {start} to {stop}, of {length - 8 - size} bytes")
        end = stop
        if without is None or not key.startswith(without):
            opened.seek(8 + size + start)
            content += opened.read(stop - start)
            wanted[key] = {**entry, "data_offsets": [begin, len(content)]}
    text = json.dumps(wanted).encode()
    tensors = safetensors.torch.load(len(text).to_bytes(8, "little") + text + content)
    return {key: tensors.get(key) for key in header}


def read_pickle(file: Path) -> Any:
    """Read a file of `torch.save` that holds only tensors in plain containers. Nothing in it is executed.

    Raises:
        ValueError: the file cannot be read, or holds other objects.
    """
    try:
        with foreign_file(file) as opened, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about files that are refused below
            if zipfile.is_zipfile(opened):
                _refuse_compressed(opened)
            opened.seek(0)
            return torch.load(opened, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle may raise anything
        # torch's own message advises loading the pickle unsafely, so it is not repeated.
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {named[1]}" if named else type(error).__name__
        raise ValueError(
            f"{file} cannot be read: {reason}; expected only tensors, as torch.load(weights_only=True) reads them"
        ) from error


def _refuse_compressed(opened: BinaryIO) -> None:
    """Refuse a compressed archive. torch.save compresses nothing, and a small file could fill the memory."""
    with zipfile.ZipFile(opened) as archive:
        size, length = sum(info.file_size for info in archive.infolist()), os.fstat(opened.fileno()).st_size
    if size > length:
        raise ValueError(f"it holds {size} bytes in {length}")


def checked_tensor(key: str, value: Any, dimensions: int) -> Tensor:
    """Return the value if it is a dense tensor of `dimensions` dimensions with finite numbers.

    Raises:
        ValueError: the value is anything else.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{key} is a {type(value).__name__}; expected a tensor")
    if value.layout is not torch.strided or value.is_meta:
        raise ValueError(f"{key} is a {value.layout} tensor on {value.device}; expected a dense one with values")
    if value.dtype not in DTYPE_NAMES:
        raise ValueError(f"{key} is {value.dtype}; expected one of {', '.join(DTYPES)}")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():  # expanded, by strides of 0
        raise ValueError(f"{key} has shape {tuple(value.shape)} and fewer values; expected as many as it takes")
    if value.ndim != dimensions or not value.numel():
        expected = "two dimensions" if dimensions == 2 else "one dimension"
        raise ValueError(f"{key} has shape {tuple(value.shape)}; expected {expected}, not of size 0")
    if not value.isfinite().all():
        raise ValueError(f"{key} has values that are NaN or infinite; expected finite ones")
    return value


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextlib.contextmanager
def naming(file: str | os.PathLike[str]) -> Iterator[None]:
    """Re-raise errors as a ValueError that begins with the file's name."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{os.fspath(file)}: {error}") from error
