"""Read and write control vectors in GGUF files: the architecture, and tensors of float32 or float16.

The layout is described in ggml's docs/gguf.md; versions 2 and 3 are read, 3 is written, little-endian. The package gguf
maps a file into memory, and the process dies if another one overwrites the file. Here every byte is copied.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .reading import first_line, foreign_file

_VERSIONS = (2, 3)
#: The types of metadata that struct knows, by their codes; besides, a string is 8 and an array 9.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT32, _STRING, _ARRAY = 4, 8, 9
_ALIGNMENT = 32  # where a file names no other
_DTYPES = {0: torch.float32, 1: torch.float16}
_NAMES = {0: "F32", 1: "F16", 28: "F64", 30: "BF16"}


def read_gguf(file: Path, architecture: str, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of a GGUF file, by name.

    Args:
        architecture: the expected architecture.
        prefix: the expected beginning of each tensor's name.

    Raises:
        ValueError: the file cannot be read, or has another architecture or other tensors.
    """
    try:
        with foreign_file(file) as opened:
            return _read(_Reader(opened), architecture, prefix)
    except (OSError, ValueError, OverflowError, struct.error) as error:
        reason = first_line(error)
        expected = "" if "; expected" in reason else "; expected a GGUF file"
        raise ValueError(f"{file} cannot be read: {reason}{expected}") from error


class _Reader:
    """Reads one value after another, and never beyond the end of the file."""

    def __init__(self, opened: BinaryIO) -> None:
        self.opened, self.end = opened, os.fstat(opened.fileno()).st_size

    def take(self, size: int) -> bytes:
        self.check(size)
        content = self.opened.read(size)
        if len(content) < size:  # the file has become shorter
            raise ValueError(f"it asks for {size} bytes and has {len(content)} left")
        return content

    def skip(self, size: int) -> None:
        self.check(size)
        self.opened.seek(size, os.SEEK_CUR)

    def check(self, size: int) -> None:
        left = self.end - self.opened.tell()
        if not 0 <= size <= left:
            raise ValueError(f"it asks for {size} bytes and has {left} left")

    def number(self, form: str) -> Any:
        [value] = struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))
        return value

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        """Return a value of metadata, or None for an array, which is skipped."""
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_form(kind))
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            self.skip(count * struct.calcsize(f"<{_form(kind)}"))
        return None


def _form(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"it has metadata of type {kind}")
    return _SCALARS[kind]


def _read(reader: _Reader, architecture: str, prefix: str) -> dict[str, Tensor]:
    if reader.take(4) != b"GGUF":
        raise ValueError("its magic is not GGUF's")
    version = reader.number("I")
    if version not in _VERSIONS:
        raise ValueError(f"its version is {version}, where 2 and 3 are known")
    tensors, fields = reader.number("Q"), reader.number("Q")
    metadata = {reader.text(): reader.value(reader.number("I")) for _ in range(fields)}
    found = metadata.get("general.architecture")
    if found != architecture:
        raise ValueError(f"its architecture is {found!r}; expected {architecture!r}")
    places = [_place(reader, prefix) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"its alignment is {alignment!r}")
    data = math.ceil(reader.opened.tell() / alignment) * alignment
    return {name: _tensor(reader, data + offset, dtype, shape) for name, offset, dtype, shape in places}


def _place(reader: _Reader, prefix: str) -> tuple[str, int, torch.dtype, tuple[int, ...]]:
    """Return a tensor's name, its offset in the data, its dtype and its shape."""
    name, dimensions = reader.text(), reader.number("I")
    if not name.startswith(prefix):
        raise ValueError(f"it has a tensor {name!r}; expected {prefix}<layer> alone")
    if dimensions > 4:
        raise ValueError(f"{name} has {dimensions} dimensions")
    shape = tuple(reader.number("Q") for _ in range(dimensions))[::-1]
    kind = reader.number("I")
    if kind not in _DTYPES:
        raise ValueError(f"{name} is {_NAMES.get(kind, f'of type {kind}')}; expected F32 or F16")
    return name, reader.number("Q"), _DTYPES[kind], shape


def _tensor(reader: _Reader, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    reader.opened.seek(start)
    content = bytearray(reader.take(math.prod(shape) * dtype.itemsize))
    return torch.frombuffer(content, dtype=dtype).reshape(shape) if content else torch.empty(shape, dtype=dtype)


def gguf_bytes(metadata: Mapping[str, str | int], tensors: Mapping[str, Tensor]) -> bytes:
    """Return the content of a GGUF file.

    Args:
        metadata: strings and unsigned 32-bit integers, by name.
        tensors: float32 tensors, by name.
    """

    def text(value: str) -> bytes:
        encoded = value.encode("utf-8")
        return struct.pack("<Q", len(encoded)) + encoded

    head = b"GGUF" + struct.pack("<IQQ", _VERSIONS[-1], len(tensors), len(metadata))
    for name, value in metadata.items():
        if isinstance(value, str):
            head += text(name) + struct.pack("<I", _STRING) + text(value)
        else:
            head += text(name) + struct.pack("<II", _UINT32, value)
    data = b""
    for name, tensor in tensors.items():
        shape = tensor.shape[::-1]
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(data))
        data += _padded(tensor.detach().cpu().contiguous().numpy().astype("<f4").tobytes())
    return _padded(head) + data


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % _ALIGNMENT)
