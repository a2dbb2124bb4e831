"""Tests that malicious foreign files are refused in one line: files that hang, fill the memory or forge values."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import refused
from transformers import LlamaConfig

from fused_steer.importers.pyreft import import_pyreft
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
    child = os.fork()
    if not child:
        try:
            signal.alarm(20)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, used + 2**27))
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
