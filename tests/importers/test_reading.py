"""Tests that malicious foreign files are refused in one line: files that hang, fill the memory or forge values."""

from __future__ import annotations

import json
import os
import resource
import signal
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import write_gguf
from models import refused
from safetensors.torch import save_file
from transformers import LlamaConfig

from fused_steer.adapters.parameters import Place
from fused_steer.importers import gguf as gguf_reader
from fused_steer.importers.gguf import read_gguf
from fused_steer.importers.pyreft import import_pyreft
from fused_steer.importers.reading import read_pickle, read_safetensors
from fused_steer.importers.steerling import import_steerling
from fused_steer.importers.vectors import import_vector
from fused_steer.model.decoder import meta_model

KEY = "deltas.layer0_block"
MODEL: dict[str, Any] = {"num_layers": 2, "layers_path": "model.layers"}


class Lying:
    """An object that pickles as a large tensor over a storage of four values."""

    def __init__(self, size: int, stride: int) -> None:
        self.size, self.stride = size, stride

    def __reduce__(self) -> Any:
        storage = torch.ones(4)._typed_storage()
        return torch._utils._rebuild_tensor_v2, (storage, 0, (self.size,), (self.stride,), False, OrderedDict())


def in_little_memory(run: Callable[[], Any]) -> None:
    """Run in a forked process that may use 128 MiB more memory and 20 seconds."""

    def limited() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, used + 2**27))
        run()

    in_a_process(limited)


def in_a_process(run: Callable[[], Any]) -> None:
    """Run in a forked process for at most 20 seconds. It must exit by itself."""
    child = os.fork()
    if not child:
        try:
            signal.alarm(20)
            run()
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("size", [5, 2**16, 2**40])
@pytest.mark.parametrize("stride", [0, 1])
@pytest.mark.parametrize("zipped", [True, False])
def test_reading_tensors_that_claim_more_than_they_have(size, stride, zipped, tmp_path):
    file = tmp_path / "state.pt"
    torch.save({KEY: Lying(size, stride)}, file, _use_new_zipfile_serialization=zipped)
    torch.save({"0": Lying(size, stride)}, tmp_path / "vector.pt", _use_new_zipfile_serialization=zipped)

    def run() -> None:
        with refused(ValueError, str(file), "expected"):
            import_steerling(file, scale=1.0, **MODEL)
        with refused(ValueError, str(tmp_path / "vector.pt"), "expected"):
            import_vector(tmp_path / "vector.pt", scale=1.0, **MODEL)

    in_little_memory(run)


@pytest.mark.parametrize("text", ["[" * 10**5, '{"representations":' + "[" * 10**5, '{"a": 1' + "0" * 5000 + "}"])
def test_reading_nested_and_endless_json(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with refused(ValueError, str(tmp_path / "config.json"), "expected"):
        import_pyreft(tmp_path, positions="all", **MODEL)
    with refused(ValueError, str(tmp_path), "expected"):
        import_vector(vector(tmp_path), scale=1.0, base=str(tmp_path))


def vector(folder: Path) -> Path:
    torch.save({"0": torch.ones(8)}, folder / "v.pt")
    return folder / "v.pt"


@pytest.mark.parametrize("name", ["config.json", "v.pt", "v.safetensors", "v.gguf"])
def test_reading_pipes(name, tmp_path):
    os.mkfifo(tmp_path / name)

    if name == "config.json":
        in_little_memory(lambda: _refused(lambda: import_pyreft(tmp_path, positions="all", **MODEL)))
        file = vector(tmp_path)
        in_little_memory(lambda: _refused(lambda: import_vector(file, scale=1.0, base=str(tmp_path))))
    else:
        in_little_memory(lambda: _refused(lambda: import_vector(tmp_path / name, scale=1.0, **MODEL)))


def _refused(run: Callable[[], Any]) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match="expected"):
        run()


@pytest.mark.parametrize("count", [10**9, 10**300, -1, "many", None, [3]])
def test_reading_absurd_layer_counts(count, tmp_path):
    LlamaConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "num_hidden_layers": count}))

    def run() -> None:
        with refused(ValueError, str(tmp_path), "expected"):
            import_vector(vector(tmp_path), scale=1.0, base=str(tmp_path))

    in_little_memory(run)
    with refused(ValueError, "expected"):
        import_vector(vector(tmp_path), scale=1.0, num_layers=10**9, layers_path="model.layers", layers=[10**9])


def test_reading_model_of_a_config_has_no_weights(tmp_path):
    LlamaConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2).save_pretrained(tmp_path)
    model = meta_model(str(tmp_path))
    assert len(model.model.layers) == 2 and all(p.is_meta for p in model.parameters())


# ------------------------------------------------------------------------------------------- files that others write to

#: name of a file -> how it is written, and read, as its importer reads it.
READERS: dict[str, tuple[Callable[[Any, Path], Any], Callable[[Path], Any]]] = {
    "v.safetensors": (save_file, read_safetensors),
    "v.pt": (torch.save, read_pickle),
    "v.gguf": (write_gguf, lambda file: read_gguf(file, "controlvector", "direction.")),
}
VALUES = {"direction.0": torch.randn(2**20), "direction.1": torch.randn(2**20)}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("written", ["cut", "other"])
def test_reading_outlives_a_file_that_is_overwritten_in_place(name, written, tmp_path):
    """Of a file that is mapped into memory, the pages that are gone kill the process that looks at them."""
    file, (write, read) = tmp_path / name, READERS[name]
    write(VALUES, file)

    def run() -> None:
        found = read(file)
        os.truncate(file, 0) if written == "cut" else file.write_bytes(bytes(file.stat().st_size))
        assert all(torch.equal(found[key], value) for key, value in VALUES.items())

    in_a_process(run)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("written", ["cut", "other"])
def test_reading_refuses_a_file_that_is_overwritten_meanwhile(name, written, tmp_path, monkeypatch):
    file, (write, read) = tmp_path / name, READERS[name]
    write(VALUES, file)
    inside = {"v.safetensors": json.loads, "v.pt": torch.load, "v.gguf": gguf_reader._place}[name]
    place = {"v.safetensors": json, "v.pt": torch, "v.gguf": gguf_reader}[name]

    def then_overwrite(*args: Any, **kwargs: Any) -> Any:
        found = inside(*args, **kwargs)
        os.truncate(file, 0) if written == "cut" else file.write_bytes(bytes(file.stat().st_size))
        return found

    def run() -> None:
        monkeypatch.setattr(place, inside.__name__, then_overwrite)
        with refused(ValueError, str(file), "expected"):
            read(file)

    in_a_process(run)


def test_reading_refuses_a_compressed_pickle(tmp_path):
    """torch.save compresses nothing; a few kilobytes may be gigabytes."""
    torch.save({"0": torch.zeros(2**20)}, tmp_path / "plain.pt")
    file = tmp_path / "v.pt"
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for info in plain.infolist():
            packed.writestr(info.filename, plain.read(info))
    in_little_memory(lambda: _refused(lambda: import_vector(file, scale=1.0, **MODEL)))


def test_reading_leaves_the_base_models_weights_unread(tmp_path):
    """A checkpoint of several gigabytes with a few kilobytes of steering, of which no more is in memory."""
    file = tmp_path / "model.safetensors"
    size = 2**33
    entries = {
        "base_model.embed": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]},
        KEY: {"dtype": "F32", "shape": [8], "data_offsets": [size, size + 32]},
    }
    text = json.dumps(entries).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with open(file, "r+b") as opened:  # a sparse file
        opened.seek(8 + len(text) + size)
        opened.write(torch.ones(8).numpy().tobytes())

    def run() -> None:
        assert torch.equal(
            import_steerling(file, scale=1.0, **MODEL).adapter.tensors[Place(0)]["steer_up.bias"], torch.ones(8)
        )

    in_little_memory(run)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [8], "data_offsets": [0, 2**50]},
        {"dtype": "F32", "shape": [8], "data_offsets": [-32, 0]},
        {"dtype": "F32", "shape": [8], "data_offsets": [8, 40]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 32]},
        {"dtype": "F33", "shape": [8], "data_offsets": [0, 32]},
        {"dtype": "F32", "shape": [8]},
        None,
    ],
)
def test_reading_refuses_headers_of_safetensors_that_lie(entry, tmp_path):
    text = json.dumps({KEY: entry}).encode()
    file = tmp_path / "v.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(32))
    in_little_memory(lambda: _refused(lambda: import_steerling(file, scale=1.0, **MODEL)))


@pytest.mark.parametrize("at", range(0, 180, 3))
def test_reading_refuses_gguf_files_that_lie(at, tmp_path):
    """A byte of the header is another, of every third: another answer or a line, and neither a crash nor gigabytes."""
    file = tmp_path / "v.gguf"
    write_gguf({"direction.0": torch.ones(8)}, file)
    content = bytearray(file.read_bytes())
    content[at] ^= 0xFF
    file.write_bytes(content)

    def run() -> None:
        try:
            import_vector(file, scale=1.0, **MODEL)
        except ValueError as error:
            assert str(file) in str(error) and "expected" in str(error) and "\n" not in str(error)

    in_little_memory(run)
