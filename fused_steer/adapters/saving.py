"""Replace files whole, while any number of processes save into one directory and may be killed.

New files are written into a new folder beside the old ones and then renamed, which is atomic for each file. The
folder's name identifies the saving process, so that folders of killed processes can be removed.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
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
from typing import Any

_NAME = re.compile(r"\.(?:saving|joint)-([0-9a-f]{12})-(\d+)-[0-9a-f]{8}")
#: Seconds after which the folder of another machine's process counts as a leftover, as nothing else is known of it.
_OLD = 24 * 3600
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_live: set[str] = set()  # the folders of this process


@functools.cache
def _machine() -> str:
    """Return an id of the machine since its boot, and of the container: the scope in which process ids are unique."""
    parts = [platform.node()]
    try:
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    except OSError:  # not Linux
        parts.append(str(uuid.getnode()))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


@contextlib.contextmanager
def saving_folder(
    directory: Path, kind: str = "saving", keep: Callable[[Path], bool] = lambda folder: False
) -> Iterator[Path]:
    """Create a folder in `directory` for files that are being saved, and remove it on exit.

    `directory` is created if needed: see `made_folder`. The folder is kept if `keep` returns that it holds a needed
    file. The system's errors name `directory`, if they name nothing: those of a full disk.
    """
    folder = directory / f".{kind}-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    with made_folder(directory):
        _live.add(str(folder.absolute()))
        try:
            folder.mkdir()
            yield folder
        except OSError as error:
            if error.errno is not None and error.filename is None:
                error.filename = os.fspath(directory)
            raise
        finally:
            try:
                if not keep(folder):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                _live.discard(str(folder.absolute()))


def leftovers(directory: Path, kind: str = "saving") -> list[Path]:
    """Return the folders in `directory` that killed processes left. Folders of running processes are not returned."""
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
        pass  # the process belongs to another user
    return True


def checked_path(given: Any, name: str, expected: str) -> Path:
    """Return a path that a user gave. Nothing needs to be there.

    Args:
        name: the argument's name, for the error message.
        expected: what was expected, for the error message.

    Raises:
        TypeError: it is neither a str nor a path of str.
        ValueError: it is empty, which pathlib takes as the current directory; it has control characters, which would
            break an error's line; or the file system can have no such name.
    """
    text = os.fspath(given) if isinstance(given, os.PathLike) else given
    if not isinstance(text, str):
        raise TypeError(f"{name} is a {type(given).__name__}; expected {expected}")
    if not text or _CONTROL.search(text):
        raise ValueError(f"{name} is {text!r:.200}; expected {expected}")
    try:
        os.stat(text)
    except UnicodeEncodeError:
        raise ValueError(f"{name} is {text!a:.200}, which is no text; expected {expected}") from None
    except OSError as error:  # whoever opens the path reports other errors
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(
                f"{name} is {text!r:.60}… of {len(text)} characters, too long for a path; expected {expected}"
            ) from None
    return Path(text)


def target_folder(directory: str | os.PathLike[str], content: str) -> Path:
    """Return the path of a directory to save into, which may be missing.

    Args:
        content: what is saved, for the error message.

    Raises:
        TypeError, ValueError: see `checked_path`; or it is Path('.'), which Path('') is too.
        NotADirectoryError: it or one of its parents is a file, or a link to nothing.
    """
    target = checked_path(directory, "directory", f"a directory to save {content} in")
    if not isinstance(directory, str) and target == Path():
        raise ValueError(
            f"directory is Path('.'), as Path('') is; expected a directory to save {content} in ('.' or Path.cwd() is "
            "the current one)"
        )
    if reason := _no_directory(target):
        raise NotADirectoryError(f"{reason}; expected a directory to save {content} in")
    return target


def _no_directory(target: Path) -> str | None:
    """Return why there can be no directory at a path, or None."""
    for path in (target, *target.parents):
        if path.exists():
            return None if path.is_dir() else f"{path} is a file"
        if path.is_symlink():
            return f"{path} is a link to {os.readlink(path)}, which is not there"
    return None


def check_output(out: Path) -> None:
    """Check, before work that takes long, that a directory can take files. It may be missing.

    Raises:
        ValueError: it or one of its parents is a file or a link to nothing, or see `check_writable`.
    """
    if reason := _no_directory(out):
        raise ValueError(f"out is {str(out)!r} but {reason}; expected a directory")
    check_writable(out)


def check_writable(out: Path, name: str = "out") -> None:
    """Check, before work that takes long, that a file or directory can be written, or made if it is missing.

    Args:
        name: the argument's name, for the error message.

    Raises:
        ValueError: the file system does not allow it.
    """
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK | (os.X_OK if there.is_dir() else 0)):
        raise ValueError(f"{name} is {str(out)!r} and {there} cannot be written; expected a path that can be")


@contextlib.contextmanager
def made_folder(target: Path) -> Iterator[None]:
    """Create a directory and its missing parents. After an exception, the created ones that are empty are removed."""
    made: list[Path] = []
    try:
        for folder in (*reversed(target.parents), target):
            if not folder.is_dir():
                with contextlib.suppress(FileExistsError):  # another process was faster
                    folder.mkdir()
                    made.append(folder)
        yield
    except BaseException:
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def write_new(file: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with open(file, "wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file, text in UTF-8, whole or not at all. If this fails, an earlier file stays.

    Raises:
        OSError: the file could not be written.
    """
    data = content.encode() if isinstance(content, str) else content
    if file.exists() and not file.is_file():  # such as /dev/stdout
        file.write_bytes(data)
        return
    with saving_folder(file.parent) as folder:
        write_new(folder / file.name, data)
        os.replace(folder / file.name, file.resolve())


def save_figure(figure: Any, file: Path) -> None:
    """Write a matplotlib figure as a PNG, whole or not at all. If this fails, an earlier file stays.

    Raises:
        OSError: the file could not be written.
    """
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_whole(file, content.getvalue())


def open_regular(file: Path) -> int:
    """Open a regular file for reading and return its descriptor. Anything else is an error, without waiting.

    Raises:
        ValueError: the path is a directory, a pipe, a device or a socket.
        OSError: the file cannot be opened.
    """
    kind = os.stat(file).st_mode
    if stat.S_ISREG(kind):
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(file, flags)
        kind = os.fstat(descriptor).st_mode  # it may have been replaced meanwhile
        if stat.S_ISREG(kind):
            return descriptor
        os.close(descriptor)
    raise ValueError(f"it is not a regular file (its mode is {stat.filemode(kind)}); expected one")


def read_regular(file: Path, most: int) -> bytes:
    """Return the contents of a file of at most `most` bytes.

    Raises:
        ValueError: the file is larger, or not a regular file.
        OSError: the file cannot be read.
    """
    with open(open_regular(file), "rb") as opened:
        content = opened.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is larger than {most} bytes; expected at most that")
    return content


def copy_regular(file: Path, copy: Path) -> None:
    """Copy a file of any size.

    Raises:
        OSError, ValueError: see `open_regular`, or the copy cannot be written.
    """
    with open(open_regular(file), "rb") as opened, open(copy, "wb") as written:
        shutil.copyfileobj(opened, written)


def digest_of(file: Path) -> bytes:
    """Return the SHA-256 of a file of any size.

    Raises:
        OSError, ValueError: see `open_regular`.
    """
    digest = hashlib.sha256()
    with open(open_regular(file), "rb") as opened:
        while part := opened.read(2**20):
            digest.update(part)
    return digest.digest()
