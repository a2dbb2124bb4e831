"""The weights file of an adapter: safetensors with the adapter's config in the header.

So the weights file is a complete adapter, even beside the config of another save.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..config import DTYPES
from .fields import MOST_JSON, fields_of
from .parameters import PEFT_PREFIX, SITE, ByPlace, Place, Spec

#: The metadata key of the config inside a weights file.
_EMBEDDED = "fused_steer_config"
_SAFETENSORS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def header_of(shapes: Mapping[str, tuple[int, ...]], dtype: str, config: str) -> bytes:
    """Return the bytes of a weights file before its data: the header's length and the header, padded to 8 bytes.

    Args:
        shapes: the tensors' shapes by path, in the order of the data.
        dtype: the name of all tensors' dtype.
        config: the text of the config inside the file.
    """
    names = {name: short for short, name in _SAFETENSORS.items()}
    end = 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt", _EMBEDDED: config}}
    for path, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[PEFT_PREFIX + path] = {"dtype": names[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensors_digest(tensors: ByPlace, heads: Mapping[str, Tensor] = MappingProxyType({})) -> str:
    """Return the digest of an adapter's tensors by layer and name, and of the heads beside it by path."""
    digest = hashlib.sha256()
    own = [(f"{_key(place)} {name}", named[name]) for place, named in sorted(tensors.items()) for name in sorted(named)]
    for name, tensor in (*own, *sorted(heads.items())):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(values_of(tensor))
    return digest.hexdigest()


def _key(place: Place) -> str:
    return str(place.layer) if place.site == SITE else f"{place.layer}.{place.site}"


def values_of(tensor: Tensor) -> Any:
    """Return a tensor's bytes."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


@dataclass(frozen=True)
class Header:
    """The contents of a weights file before its data.

    Attributes:
        size: the size of the whole file.
        specs: the tensors' dtypes and shapes, by path.
        config: the config inside the file, or None.
        plain: whether the metadata has no other entry.
    """

    size: int
    specs: dict[str, Spec]
    config: str | None
    plain: bool


def read_header(opened: BinaryIO) -> Header:
    """Read and check a weights file up to its data.

    Raises:
        ValueError: the file is not the weights file of an adapter.
    """
    length = os.fstat(opened.fileno()).st_size
    if length < 8:
        raise ValueError(f"it has no header, at {length} bytes; expected a file of safetensors")
    size, most = int.from_bytes(opened.read(8), "little"), min(length - 8, MOST_JSON)
    if size > most:
        raise ValueError(f"its header is of {size} bytes; expected at most {most}")
    try:
        fields = fields_of(opened.read(size))
    except ValueError as error:
        raise ValueError(f"its header is not that of a safetensors file: {error}") from None
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"its header has __metadata__ as {metadata!r:.200}; expected an object")
    specs, data = {}, 0
    for name, entry in fields.items():
        path, (dtype, shape), end = unprefixed(name), *_entry(name, entry)
        specs[path] = (dtype, shape)
        data = max(data, end)
    config = metadata.pop(_EMBEDDED, None)
    return Header(8 + size + data, specs, config, metadata == {"format": "pt"})


def _entry(name: str, entry: Any) -> tuple[Spec, int]:
    """Return a tensor's dtype and shape, and the end of its data."""
    try:
        dtype, (start, end) = DTYPES[_SAFETENSORS[entry["dtype"]]], entry["data_offsets"]
        shape = tuple(map(operator.index, entry["shape"]))
        fits = min(shape, default=0) >= 0 <= start and math.prod(shape) * dtype.itemsize == end - start
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"its header has {name} as {entry!r:.200}; expected an adapter's tensor") from None
    if not fits:
        raise ValueError(f"its header has {name} of shape {shape} in {end - start} bytes; expected as many as it takes")
    return (dtype, shape), end


def unprefixed(name: str) -> str:
    if not name.startswith(PEFT_PREFIX):
        raise ValueError(f"it has a tensor {name!r}; expected names that begin with {PEFT_PREFIX!r}")
    return name[len(PEFT_PREFIX) :]
