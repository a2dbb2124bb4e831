"""Tests of exported control vectors: read back by our importer, by the package gguf, and by repeng where installed."""

from __future__ import annotations

import importlib.util
import re

import numpy as np
import pytest
import torch
from command import assert_refused, invoke, plain_output  # noqa: F401 - an autouse fixture
from foreign import write_gguf
from models import HIDDEN, LAYERS, build, logits, randomize, refused
from safetensors.torch import load_file

from fused_steer import SteerConfig, patch_model
from fused_steer.adapters.files import write_adapter
from fused_steer.adapters.parameters import UP_BIAS
from fused_steer.importers.vectors import export_vector, import_vector

LAYOUT = {"num_layers": LAYERS, "layers_path": "model.layers"}


@pytest.fixture
def saved(tmp_path):
    """Save a random adapter of a config; return its directory and its model."""

    def save(config):
        model = patch_model(build(), config)
        randomize(model)
        model.steering.save(tmp_path / "adapter")
        return tmp_path / "adapter", model

    return save


@pytest.mark.parametrize("suffix", [".gguf", ".safetensors", ".pt"])
@pytest.mark.parametrize("scale", [1.0, -1.7])
def test_export_vector_round_trip(saved, tmp_path, suffix, scale):
    """At strength 1 the bits come back; else the product is rounded once."""
    directory, model = saved(SteerConfig("vector", layers=[1, 2], scale=scale))
    file = tmp_path / "new" / f"vector{suffix}"
    adapter, layers = export_vector(directory, file)
    assert layers == [1, 2] and adapter.config == model.steering.config()
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    back = import_vector(file, scale=1.0, **LAYOUT)
    for place, tensors in back.tensors.items():
        exact = scale * adapter.tensors[place][UP_BIAS].double()
        assert torch.equal(tensors[UP_BIAS], exact.float())
    assert back.tensors.keys() == adapter.tensors.keys()
    if scale == 1:
        write_adapter(tmp_path / "back", back)
        assert torch.equal(logits(patch_model(build(), tmp_path / "back")), logits(model))


def test_export_vector_every_layer(saved, tmp_path):
    directory, _ = saved(SteerConfig("vector"))
    for suffix in (".safetensors", ".pt"):
        export_vector(directory, tmp_path / f"v{suffix}")
        assert import_vector(tmp_path / f"v{suffix}", scale=1.0, **LAYOUT).config == SteerConfig("vector")
    assert sorted(load_file(tmp_path / "v.safetensors")) == [f"layer.{i}" for i in range(LAYERS)]
    assert list(torch.load(tmp_path / "v.pt", weights_only=True)) == list(range(LAYERS))


def test_export_vector_gguf_is_repengs_own_file(saved, tmp_path):
    """The bytes are those of the package gguf for the same vectors, as repeng's export_gguf calls it."""
    directory, _ = saved(SteerConfig("vector", layers=[1, 2]))
    adapter, _ = export_vector(directory, tmp_path / "ours.gguf", model_type="llama")
    write_gguf({f"direction.{p.layer}": t[UP_BIAS] for p, t in adapter.tensors.items()}, tmp_path / "theirs.gguf")
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()
    gguf = pytest.importorskip("gguf", reason="needs `pip install gguf`")
    reader = gguf.GGUFReader(tmp_path / "ours.gguf")
    assert [(t.name, list(t.shape), t.tensor_type.name) for t in reader.tensors] == [
        (f"direction.{i}", [HIDDEN], "F32") for i in (1, 2)
    ]


@pytest.mark.skipif(importlib.util.find_spec("repeng") is None, reason="reads with repeng itself, where installed")
def test_export_vector_is_read_by_repeng(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(np, "float_", np.float64, raising=False)  # repeng 0.4.0 names it, NumPy 2 removed it
    from repeng import ControlVector

    directory, _ = saved(SteerConfig("vector", layers=[1, 2]))
    adapter, _ = export_vector(directory, tmp_path / "v.gguf", model_type="llama")
    found = ControlVector.import_gguf(tmp_path / "v.gguf")
    assert found.model_type == "llama"
    expected = {place.layer: tensors[UP_BIAS].numpy() for place, tensors in adapter.tensors.items()}
    assert found.directions.keys() == expected.keys()
    assert all(np.array_equal(found.directions[i], expected[i]) for i in expected)


@pytest.mark.parametrize(
    ("config", "name", "parts"),
    [
        (SteerConfig(rank=2), "v.gguf", ("is of form 'lowrank'; expected 'vector'",)),
        (SteerConfig("loreft", rank=2), "v.pt", ("is of form 'loreft'",)),
        (SteerConfig("vector", site="post_mlp"), "v.pt", ("steers at post_mlp; expected post_block",)),
        (SteerConfig("vector", positions="prompt"), "v.pt", ("positions 'prompt'; expected 'all'",)),
        (SteerConfig("vector"), "v.gguf", ("steers layer 0; expected layers from 1",)),
        (SteerConfig("vector"), "v.bin", ("expected its name to end in .gguf, .safetensors, .pt",)),
    ],
    ids=["low rank", "loreft", "site", "positions", "layer 0", "suffix"],
)
def test_export_vector_refusals(saved, tmp_path, config, name, parts):
    directory, _ = saved(config)
    with refused(ValueError, *parts):
        export_vector(directory, tmp_path / name)
    assert not (tmp_path / name).exists()
    assert_refused(invoke("export", "vector", directory, "--out", tmp_path / name), *parts)


def test_export_vector_leaves_an_existing_file(saved, tmp_path):
    directory, _ = saved(SteerConfig("vector", layers=[2]))
    (tmp_path / "v.gguf").write_bytes(b"mine")
    assert_refused(invoke("export", "vector", directory, "--out", tmp_path / "v.gguf"), "exists; expected a new file")
    assert (tmp_path / "v.gguf").read_bytes() == b"mine"


def test_export_vector_command(saved, tmp_path):
    directory, _ = saved(SteerConfig("vector", layers=[1, 2], scale=0.5))
    result = invoke("export", "vector", directory, "--out", tmp_path / "v.gguf")
    assert result.exit_code == 0, result.output
    assert re.search(r"vectors of layers 1, 2, multiplied by the strength 0.5, written to .*v\.gguf", result.stdout)
    assert f"--control-vector {tmp_path / 'v.gguf'}" in result.stdout
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
