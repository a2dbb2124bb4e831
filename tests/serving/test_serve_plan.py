"""Tests of `fused-steer serve-plan`: its numbers against real files, slots and weights of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import HIDDEN, LAYERS, build
from typer.testing import CliRunner

from fused_steer import SteerConfig, patch_model
from fused_steer.cli import app


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["serve-plan", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "config"),
    [
        (["--rank", 4], SteerConfig(rank=4)),
        (["--rank", 3, "--dtype", "bfloat16", "--layers", "0,2"], SteerConfig(rank=3, dtype="bfloat16", layers=[0, 2])),
        (["--form", "vector", "--rank", 0], SteerConfig(form="vector")),
    ],
    ids=str,
)
def test_serve_plan_numbers_are_those_of_real_tensors(folder, tmp_path, options, config):
    code, out, _ = invoke(folder, "--adapters", 1000, *options, "--slots", 5, "--model-dtype", "float32", "--json")
    assert code == 0
    plan = json.loads(out)["plan"]
    model = build()
    model.config._name_or_path = str(folder)
    patch_model(model, config)
    assert plan["base"] == sum(p.nbytes for p in build().parameters())
    model.steering.save(tmp_path / "adapter")
    assert plan["file"] == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert plan["page_cache"] == 1000 * plan["file"]
    pool = model.steering.make_pool(slots=5, rank=config.rank, layers=config.layers, dtype=config.dtype)
    assert plan["slots"] == pool.nbytes
    assert plan["slot"] == sum(s.nbytes - s.codes.nbytes for s in pool.slots.values()) // 5
    assert (plan["layers"], plan["hidden"]) == (len(config.layers or range(LAYERS)), HIDDEN)
    assert plan["read_by_steering"] == 64 * plan["slot"]
    embedding = build().get_input_embeddings().weight.nbytes
    assert plan["read_by_base"] == plan["base"] - embedding
    assert plan["share"] == plan["read_by_steering"] / (plan["read_by_steering"] + plan["read_by_base"])


def test_serve_plan_tied_embeddings_are_read_as_the_output(tmp_path):
    build(tie_word_embeddings=True).save_pretrained(tmp_path)
    plan = json.loads(invoke(tmp_path, "--adapters", 1, "--json")[1])["plan"]
    assert plan["read_by_base"] == plan["base"]


def test_serve_plan_what_fits_and_what_vllm_takes(folder):
    plan = json.loads(invoke(folder, "--adapters", 100, "--rank", 9, "--memory", 0.5, "--json")[1])["plan"]
    room = 0.5 * 2**30 - plan["base"]
    each = plan["slot"] + 4 * LAYERS
    assert plan["fitting"] * each <= room < (plan["fitting"] + 1) * each
    assert plan["vllm"].endswith("--max-loras 64 --max-cpu-loras 100 --max-lora-rank 16")
    assert json.loads(invoke(folder, "--adapters", 1, "--memory", 1e-6, "--json")[1])["plan"]["fitting"] == 0


def test_serve_plan_shown_as_a_table(folder):
    code, out, _ = invoke(folder, "--adapters", 1000, "--memory", 80)
    assert code == 0
    for part in ("1,000 files", "64 slots", "slots that fit", "nothing was measured", "vllm serve", "MiB"):
        assert part in out


def test_serve_plan_no_weights_are_made(folder, monkeypatch):
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda self: pytest.fail("not on meta")
                        if self.weight.device.type != "meta" else None)  # fmt: skip
    assert invoke(folder, "--adapters", 10)[0] == 0


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--adapters", 0], "adapters is 0; expected at least 1"),
        (["--adapters", 1, "--rank", 257], "rank is 257; expected at most 256"),
        (["--adapters", 1, "--rank", 0], "rank is 0; expected 1 to 256"),
        (["--adapters", 1, "--slots", 0], "slots is 0; expected at least 1"),
        (["--adapters", 1, "--dtype", "int8"], "dtype is 'int8'"),
        (["--adapters", 1, "--model-dtype", "int8"], "model_dtype is 'int8'"),
        (["--adapters", 1, "--layers", "7"], "layers has 7; expected indices below 3"),
        (["--adapters", 1, "--form", "dense"], "form is 'dense'"),
        (["--adapters", 1, "--memory", -1], "memory is -1.0; expected GiB above 0"),
        (["--adapters", 1, "--batch", 0], "batch is 0; expected at least 1"),
    ],
    ids=str,
)
def test_serve_plan_what_cannot_be_planned(folder, options, part):
    code, out, err = invoke(folder, *options)
    assert code == 1 and not out and part in err and err.count("\n") == 1
