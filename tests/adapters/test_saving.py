"""Tests of saves that are killed at a rename or interleave: the directory holds one whole adapter, no leftovers."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from models import HIDDEN, LAYERS

from fused_steer import SteerConfig
from fused_steer.adapters import files, saving
from fused_steer.adapters.files import AdapterFile, read_adapter, write_adapter
from fused_steer.adapters.parameters import DOWN, UP, Layout, Place

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter(value: float, rank: int = 2) -> AdapterFile:
    """Make an adapter that its values, rank and scale identify."""
    tensors = {
        Place(index): {DOWN: torch.full((rank, HIDDEN), value), UP: torch.full((HIDDEN, rank), -value)}
        for index in range(LAYERS)
    }
    return AdapterFile(
        SteerConfig(rank=rank, scale=value), Layout("model.layers", LAYERS, HIDDEN, "somewhere/tiny"), tensors
    )


def held(directory: Path) -> float:
    """Return the value of the adapter in a directory; check that the adapter is whole."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = read_adapter(directory)
    values = {value for named in file.tensors.values() for tensor in named.values() for value in tensor.abs().unique()}
    assert {float(value) for value in values} == {file.config.scale}
    return file.config.scale


def in_child(run: Callable[[], Any]) -> int:
    """Run in a forked process; return its exit status."""
    child = os.fork()
    if not child:
        try:
            run()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextlib.contextmanager
def at_replace(number: int, do: Callable[[], Any], before: bool) -> Iterator[None]:
    """Inside the `with` block, run `do` once, before or after rename `number`."""
    real, calls = os.replace, [0]

    def replace(*args: Any) -> None:
        calls[0] += 1
        now = calls[0] == number
        if now and before:
            do()
        real(*args)
        if now and not before:
            do()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        yield


BOUNDARIES = [(1, True), (1, False), (2, True), (2, False)]


@pytest.mark.parametrize(("number", "before"), BOUNDARIES)
@pytest.mark.parametrize("earlier", [True, False])
def test_saving_killed_save_leaves_one_whole_adapter(number, before, earlier, tmp_path):
    if earlier:
        write_adapter(tmp_path, adapter(1.0))

    def save() -> None:
        with at_replace(number, lambda: os._exit(9), before):
            write_adapter(tmp_path, adapter(2.0, rank=3))

    assert in_child(save) == 9
    if earlier:
        assert held(tmp_path) == (1.0 if (number, before) == (1, True) else 2.0)
    elif (number, before) == (2, False):
        assert held(tmp_path) == 2.0
    else:
        assert not (tmp_path / CONFIG).exists()
    assert len(list(tmp_path.glob(".saving-*"))) == 1
    write_adapter(tmp_path, adapter(3.0))
    assert held(tmp_path) == 3.0
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize(("number", "before"), BOUNDARIES)
@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize("fails", [True, False], ids=["which then fails", "which goes on"])
def test_saving_saves_that_interleave_leave_one_whole_adapter(number, before, earlier, fails, tmp_path):
    """If a whole save runs inside another save, the directory holds one whole adapter."""
    if earlier:
        write_adapter(tmp_path, adapter(1.0))

    def within() -> None:
        write_adapter(tmp_path, adapter(2.0, rank=3))
        assert held(tmp_path) == 2.0
        if fails:
            raise PermissionError("no more")

    with at_replace(number, within, before):
        if fails:
            with pytest.raises(PermissionError, match="no more"):
                write_adapter(tmp_path, adapter(3.0))
        else:
            write_adapter(tmp_path, adapter(3.0))
    assert held(tmp_path) in (2.0, 3.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    write_adapter(tmp_path, adapter(4.0))
    assert held(tmp_path) == 4.0


def test_saving_torn_save_is_read_with_a_warning_and_a_flipped_bit_is_not(tmp_path):
    write_adapter(tmp_path / "a", adapter(1.0)), write_adapter(tmp_path / "b", adapter(2.0))
    os.replace(tmp_path / "b" / WEIGHTS, tmp_path / "a" / WEIGHTS)
    with pytest.warns(UserWarning, match=r"adapter_config\.json is of another save"):
        assert read_adapter(tmp_path / "a").config.scale == 2.0
    for name in (CONFIG, WEIGHTS):
        check_flips(tmp_path / "a" / name)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_saving_every_flipped_bit_is_found(name, tmp_path):
    write_adapter(tmp_path, adapter(1.0))
    check_flips(tmp_path / name)


def check_flips(file: Path) -> None:
    """Check that a flipped bit is found: each bit of the header, and some of the data."""
    content = file.read_bytes()
    text = len(content) if file.name == CONFIG else 8 + int.from_bytes(content[:8], "little")
    places = [(byte, bit) for byte in range(0, text, 3) for bit in (byte % 8, (byte + 3) % 8)]
    places += [(byte, byte % 8) for byte in range(text, len(content), 97)]
    taken = []
    for byte, bit in places:
        damaged = bytearray(content)
        damaged[byte] ^= 1 << bit
        file.write_bytes(damaged)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read_adapter(file.parent)
            taken.append((byte, bit))
        except ValueError as error:
            assert "\n" not in str(error) and str(file.parent) in str(error)
    file.write_bytes(content)
    assert taken == []


# ---------------------------------------------------------------------------------------------------------------------
# Leftovers


def test_saving_folder_of_a_running_saver_is_left_alone(tmp_path):
    code = (
        "import sys, pathlib\n"
        "from fused_steer.adapters.saving import saving_folder\n"
        "with saving_folder(pathlib.Path(sys.argv[1])) as folder:\n"
        "    print(folder, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert folder.parent == tmp_path
        with saving.saving_folder(tmp_path) as own:
            write_adapter(tmp_path, adapter(1.0))
            assert own.is_dir() and folder.is_dir()
    finally:
        process.kill()
        process.wait()
    assert folder.is_dir()
    write_adapter(tmp_path, adapter(1.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def test_saving_folder_of_another_machine_is_removed_when_it_is_old(tmp_path):
    for name in (f".saving-{'0' * 12}-{os.getpid()}-{'0' * 8}", ".saving-of-somebody"):
        (tmp_path / name).mkdir()
    write_adapter(tmp_path, adapter(1.0))
    assert len(list(tmp_path.glob(".saving-*"))) == 2
    for folder in tmp_path.glob(".saving-*"):
        os.utime(folder, (1, 1))
    write_adapter(tmp_path, adapter(1.0))
    assert [folder.name for folder in tmp_path.glob(".saving-*")] == [".saving-of-somebody"]


# ---------------------------------------------------------------------------------------------------------------------
# Hangs and bombs


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_saving_pipe_in_place_of_a_file_is_refused_at_once(name, tmp_path):
    write_adapter(tmp_path, adapter(1.0))
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    for run in (lambda: read_adapter(tmp_path), lambda: write_adapter(tmp_path, adapter(1.0))):
        assert in_child(lambda: _refused_at_once(run)) == 0  # noqa: B023


def _refused_at_once(run: Callable[[], Any]) -> None:
    import signal

    signal.alarm(5)  # ends this process
    with pytest.raises(ValueError, match="not a regular file"):
        run()


def test_saving_file_that_is_cut_while_it_is_read_is_refused(tmp_path, monkeypatch):
    write_adapter(tmp_path, adapter(1.0))
    real = os.fstat
    sizes = []

    def cut(descriptor: int) -> os.stat_result:
        found = real(descriptor)
        sizes.append(found.st_size)
        if len(sizes) > 1:
            os.truncate(tmp_path / WEIGHTS, 100)
        return found

    monkeypatch.setattr(os, "fstat", cut)
    with pytest.raises(ValueError, match="cannot be loaded"):
        read_adapter(tmp_path)


def test_saving_adapter_that_is_replaced_while_it_is_read_is_read_whole(tmp_path, monkeypatch):
    """Between the header and the data another process saves twice. The data are those of the header."""
    write_adapter(tmp_path, adapter(1.0))
    real = files.read_header

    def replaced(opened: BinaryIO) -> Any:
        header = real(opened)
        write_adapter(tmp_path, adapter(2.0)), write_adapter(tmp_path, adapter(3.0))
        return header

    monkeypatch.setattr(files, "read_header", replaced)
    assert held(tmp_path) == 1.0
    monkeypatch.undo()
    assert held(tmp_path) == 3.0


def bomb(directory: Path, **fields: Any) -> None:
    import json

    config = json.loads((directory / CONFIG).read_text()) | fields
    for digest in ("config_sha256", "weights_sha256", "tensors_sha256"):
        config.pop(digest, None)
    (directory / CONFIG).write_text(json.dumps(config))


def header(directory: Path, entry: dict[str, Any], size: int | None = None) -> None:
    """Write a weights file with a header for one tensor and `size` bytes of data."""
    import json

    name = "base_model.model.model.layers.0.post_block.steer_down.weight"
    text = json.dumps({name: entry}).encode()
    with open(directory / WEIGHTS, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if size is not None:
            file.truncate(8 + len(text) + size)  # sparse: no disk is used


BOMBS: dict[str, Callable[[Path], Any]] = {
    "layers": lambda directory: bomb(directory, num_layers=10**9),
    "more layers than an integer": lambda directory: bomb(directory, num_layers=10**300),
    "hidden size": lambda directory: bomb(directory, hidden_size=10**18),
    "large config": lambda directory: os.truncate(directory / CONFIG, 2**40),
    "large weights": lambda directory: os.truncate(directory / WEIGHTS, 2**40),
    "large header": lambda directory: (directory / WEIGHTS).write_bytes((2**40).to_bytes(8, "little") + b"{" * 64),
    "nested header": lambda directory: (directory / WEIGHTS).write_bytes((10**5).to_bytes(8, "little") + b"[" * 10**5),
    "large tensor that is there": lambda directory: header(
        directory, {"dtype": "F32", "shape": [2, 2**37], "data_offsets": [0, 2**40]}, 2**40
    ),
    "tensor smaller than it claims": lambda directory: header(
        directory, {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}, 4
    ),
    "shape of another type": lambda directory: header(
        directory, {"dtype": "F32", "shape": {"a": 1}, "data_offsets": [0, 4]}, 4
    ),
    "entry of another type": lambda directory: header(directory, [1], 4),  # type: ignore[arg-type]
    "offsets of another type": lambda directory: header(
        directory, {"dtype": "F32", "shape": [1], "data_offsets": [None, []]}, 4
    ),
    "dtype of another type": lambda directory: header(
        directory, {"dtype": [], "shape": [1], "data_offsets": [0, 4]}, 4
    ),
    "negative shape": lambda directory: header(
        directory, {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}, 4
    ),
}


@pytest.mark.parametrize("build", BOMBS.values(), ids=BOMBS)
def test_saving_bombs_are_refused_in_one_line_and_nothing_is_allocated(build, tmp_path):
    import resource
    import signal

    write_adapter(tmp_path, adapter(1.0))
    build(tmp_path)

    def read() -> None:
        signal.alarm(20)
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, used + 2**27))
        with pytest.raises(ValueError, match=f"^{tmp_path}[^\n]*expected[^\n]*$") as caught:
            read_adapter(tmp_path)
        assert "memory" not in str(caught.value)

    assert in_child(read) == 0
