"""Files that are replaced whole, by any number of processes that save into one directory, killed or not.

New files are written into a folder of their own beside the old ones and then renamed, which is atomic for each. The
folder's name says who saves, so that what a killed process left is known from what a running one still needs.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

_NAME = re.compile(r"\.(?:saving|joint)-([0-9a-f]{12})-(\d+)-[0-9a-f]{8}")
#: Seconds after which the folder of another machine's process, of which nothing else is known, is a leftover.
_OLD = 24 * 3600
_live: set[str] = set()  # the folders of this process


@functools.cache
def _machine() -> str:
    """Names the machine since it was booted, and the container on it, where a process id means one process."""
    parts = [platform.node()]
    try:
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    except OSError:  # no Linux
        parts.append(str(uuid.getnode()))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


@contextlib.contextmanager
def saving_folder(
    directory: Path, kind: str = "saving", keep: Callable[[Path], bool] = lambda folder: False
) -> Iterator[Path]:
    """A new folder in `directory` for files that are being saved, removed afterwards unless `keep` says that it has
    something that is needed."""
    folder = directory / f".{kind}-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    _live.add(str(folder.absolute()))
    try:
        folder.mkdir()
        yield folder
    finally:
        try:
            if not keep(folder):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            _live.discard(str(folder.absolute()))


def leftovers(directory: Path, kind: str = "saving") -> list[Path]:
    """The folders that killed processes left in `directory`; none of a process that still runs."""
    return [folder for folder in sorted(directory.glob(f".{kind}-*")) if _is_leftover(folder)]


def _is_leftover(folder: Path) -> bool:
    found = _NAME.fullmatch(folder.name)
    if found is None:
        return False
    if found[1] == _machine() and os.name == "posix":
        if int(found[2]) == os.getpid():
            return str(folder.absolute()) not in _live
        return not _runs(int(found[2]))
    try:
        return time.time() - folder.stat().st_mtime > _OLD
    except OSError:
        return False  # gone, or out of reach


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass  # another user's
    return True


def write_new(file: Path, content: bytes) -> None:
    """Write a file, and wait until the disk has it."""
    with open(file, "wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def open_regular(file: Path) -> int:
    """A descriptor to read a file by; an error, and no wait, where something else is in its place.

    Raises:
        ValueError: it is a directory, a pipe, a device or a socket.
        OSError: it cannot be opened.
    """
    kind = os.stat(file).st_mode
    if stat.S_ISREG(kind):
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(file, flags)
        kind = os.fstat(descriptor).st_mode  # it may have been replaced meanwhile
        if stat.S_ISREG(kind):
            return descriptor
        os.close(descriptor)
    raise ValueError(f"it is no regular file (its mode is {stat.filemode(kind)}); expected one")


def read_regular(file: Path, most: int) -> bytes:
    """The contents of a file of at most so many bytes.

    Raises:
        ValueError: it is larger, or no regular file.
        OSError: it cannot be read.
    """
    with open(open_regular(file), "rb") as opened:
        content = opened.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is larger than {most} bytes; expected at most that")
    return content


def copy_regular(file: Path, copy: Path) -> None:
    """Copy a file of any size.

    Raises:
        OSError, ValueError: as `open_regular`, or the copy cannot be written.
    """
    with open(open_regular(file), "rb") as opened, open(copy, "wb") as written:
        shutil.copyfileobj(opened, written)


def digest_of(file: Path) -> bytes:
    """The SHA-256 of a file of any size.

    Raises:
        OSError, ValueError: as `open_regular`.
    """
    digest = hashlib.sha256()
    with open(open_regular(file), "rb") as opened:
        while part := opened.read(2**20):
            digest.update(part)
    return digest.digest()
