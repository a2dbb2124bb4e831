"""Tests of `fused-steer serve-plan`: its numbers against real files, slots and weights of a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from models import HIDDEN, LAYERS, build
from typer.testing import CliRunner

from fused_steer import SteerConfig, patch_model
from fused_steer.cli import app
from fused_steer.serving import plan


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
        (
            ["--rank", 3, "--dtype", "bfloat16", "--steered", "0,2"],
            SteerConfig(rank=3, dtype="bfloat16", layers=[0, 2]),
        ),
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


def test_serve_plan_sizes_in_place_of_a_model(folder):
    """Without a model, the sizes give the same plan as the model of these sizes."""
    parameters = sum(p.numel() for p in build().parameters())
    options = ["--rank", 4, "--steered", "0,2", "--adapters", 77, "--memory", 0.01]
    sizes = ["--hidden", HIDDEN, "--layers", LAYERS, "--parameters", parameters]
    known = json.loads(invoke(folder, *options, "--json")[1])["plan"]
    code, out, err = invoke(*sizes, *options, "--json")
    assert code == 0, err
    found = json.loads(out)["plan"]
    # The file's header has the model's name in it. The embedding's part of the parameters is not known.
    differing = {"file", "page_cache", "read_by_base", "share"}
    assert {name for name in known if known[name] != found[name]} == differing
    assert known["file"] - found["file"] <= len(str(folder)) + 8  # safetensors pads its header to 8 bytes
    assert found["read_by_base"] == known["base"]


def test_serve_plan_per_thousand_adapters():
    """The sizes of a thousand adapters are those of one, a thousand times; times follow from bytes and bandwidths."""
    options = ["--hidden", 64, "--layers", 3, "--bandwidth", 100, "--network", 10]
    one, many = (json.loads(invoke(*options, "--adapters", n, "--json")[1])["plan"] for n in (1, 1000))
    assert json.loads(invoke(*options, "--json")[1])["plan"] == many  # the default
    for name in ("page_cache", "all_slots", "read_by_all"):
        assert many[name] == 1000 * one[name]
    assert many["page_cache"] == 1000 * many["file"] and many["read_by_all"] == 1000 * many["slot"]
    assert many["all_slots"] == 1000 * many["slots"] // 64
    assert many["reading_seconds"] == 64 * many["slot"] / 100e9
    assert many["loading_seconds"] == 8 * many["file"] / 10e9
    assert many["base"] is many["share"] is many["fitting"] is None


def test_serve_plan_output_on_the_page_is_the_commands(monkeypatch):
    """The page on serving shows this command's output."""
    page = Path(__file__).parents[2] / "docs" / "serving.md"
    command, shown = re.search(
        r"```bash\n(fused-steer serve-plan --hidden[^\n]+)\n```\n+```text\n(.*?)```", page.read_text(), re.DOTALL
    ).groups()
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = invoke(*command.split()[2:])
    lines = [line.rstrip() for line in out.splitlines()]
    assert code == 0 and "\n".join(lines).strip("\n") == shown.rstrip("\n")


def test_serve_plan_sizes_reach_no_network(monkeypatch):
    monkeypatch.setattr(plan, "meta_model", lambda name: pytest.fail("a model was asked for"))
    code, out, _ = invoke("--hidden", 64, "--layers", 3)
    assert code == 0 and "vllm serve BASE " in out and "base model" not in out


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ([], "there is no model and no hidden; expected a model, or hidden and num_layers"),
        (["--hidden", 64], "there is no model and no num_layers"),
        (["--hidden", 0, "--layers", 2], "hidden is 0; expected at least 1"),
        (["--hidden", 64, "--layers", 1000000000], "num_layers is 1000000000; expected at least 1, at most 10000"),
        (["--hidden", 10**30, "--layers", 2], "hidden has 100 bits; expected at most 1000000000000"),
        (["--hidden", 64, "--layers", 2, "--adapters", 10**400], "adapters has 1329 bits; expected at most 1000000"),
        (["--hidden", 64, "--layers", 2, "--slots", 10**400], "slots has 1329 bits; expected at most 2147483647"),
        (["--hidden", 64, "--layers", 2, "--steered", "2"], "layers has 2; expected indices below 2"),
        (["--hidden", 64, "--layers", 2, "--memory", 80], "the base model's size is unknown; expected parameters too"),
        (["--hidden", 64, "--layers", 2, "--parameters", -1], "parameters is -1.0; expected a number above 0"),
    ],
    ids=str,
)
def test_serve_plan_sizes_that_cannot_be_planned(options, part):
    code, out, err = invoke(*options)
    assert code == 1 and not out and part in err and err.count("\n") == 1


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
        (["--adapters", 1, "--steered", "7"], "layers has 7; expected indices below 3"),
        (["--layers", 3], "num_layers is 3 beside the model"),
        (["--hidden", 64], "hidden is 64 beside the model"),
        (["--parameters", 1e9], "parameters is 1000000000.0 beside the model"),
        (["--bandwidth", 0], "bandwidth is 0.0; expected GB a second above 0"),
        (["--network", "nan"], "network is nan"),
        (["--adapters", 1, "--form", "dense"], "form is 'dense'"),
        (["--adapters", 1, "--memory", -1], "memory is -1.0; expected GiB above 0"),
        (["--adapters", 1, "--batch", 0], "batch is 0; expected at least 1"),
    ],
    ids=str,
)
def test_serve_plan_what_cannot_be_planned(folder, options, part):
    code, out, err = invoke(folder, *options)
    assert code == 1 and not out and part in err and err.count("\n") == 1
