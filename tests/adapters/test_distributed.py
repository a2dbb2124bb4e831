"""Tests that two processes train, save and load as one process does: DDP, FSDP2, FSDP1, tensor parallelism.

They run on a CPU with gloo. process_worker.py has the code of the processes. There are few launches, because importing
takes longer than training.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import process_worker as worker
import pytest
import torch
from models import HIDDEN, assert_close, assert_no_worse, build, difference, refused, steering_parameters
from safetensors.torch import load_file
from torch import Tensor

from fused_steer import load_joint, patch_model
from fused_steer.adapters.distributed import gather

PROCESSES = 2
LAUNCHES = [["ddp", "tensor", "joint", "pipeline"], ["fsdp2", "fsdp1"], ["zero"]]
SHARDED = ["fsdp2", "fsdp1"]
RUNS = [(s, run) for s in ("ddp", "tensor", "fsdp2", "fsdp1") for run in ("plain", "checkpointing", "another")]
RUNS += [("fsdp1", "by-name"), ("fsdp1", "root")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives a scenario's folder of results; its first call runs the processes."""
    directory = tmp_path_factory.mktemp("processes")

    @functools.cache
    def launch(number: int) -> None:
        root = Path(__file__).parents[2]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
        paths = [str(root), str(root / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "CUDA_VISIBLE_DEVICES": "",
            "FUSED_STEER_BACKEND": "torch",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [*command, worker.__file__, str(directory), *LAUNCHES[number]],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-6000:]

    def find(scenario: str) -> Path:
        launch(next(number for number, scenarios in enumerate(LAUNCHES) if scenario in scenarios))
        return directory / scenario

    return find


def read(folder: Path, run: str) -> tuple[list[dict[str, Any]], list[dict[str, Tensor]]]:
    """Read the results of each process."""
    results = [json.loads((folder / f"{run}-{rank}.json").read_text()) for rank in range(PROCESSES)]
    return results, [load_file(folder / f"{run}-{rank}.safetensors") for rank in range(PROCESSES)]


def adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a saved adapter: its config without digests and paths, and its weights."""
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    for field in ("weights_sha256", "tensors_sha256", "config_sha256", "base_model_name_or_path"):
        del config[field]
    return config, load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Train on the same batches in one process."""
    saved = tmp_path_factory.mktemp("single")
    model = worker.steered(build())
    start = {name: p.detach().clone() for name, p in steering_parameters(model).items()}
    result, gradients = worker.train(model, model)
    model.steering.save(saved)
    return {**result, "gradients": gradients, "start": start, "saved": saved, "evaluated": worker.evaluate(model)}


@pytest.fixture(scope="module")
def truth() -> dict[str, Any]:
    """Train on the same batches in one process in float64."""
    model = worker.steered(build()).double()
    result, gradients = worker.train(model, model)
    weights = {f"base_model.model.{name}": p.detach() for name, p in steering_parameters(model).items()}
    evaluated = worker.evaluate(model)
    return {"losses": result["losses"], "gradients": gradients, "weights": weights, "evaluated": evaluated}


def assert_losses_no_worse(losses: list[list[float]], single: dict[str, Any], truth: dict[str, Any]) -> None:
    """Assert that the losses, by process and step, are as exact as those of one process."""
    found = torch.tensor(losses, dtype=torch.float64).mean(0)
    assert_no_worse(found, *(torch.tensor(of["losses"], dtype=torch.float64) for of in (single, truth)))


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize(("scenario", "run"), RUNS)
def test_distributed_trains_as_one_process_does(folder, single, truth, scenario, run):
    results, gradients = read(folder(scenario), run)
    losses = torch.tensor([result["losses"] for result in results])
    if scenario == "tensor":
        assert torch.equal(losses[0], losses[1])
    else:
        assert not torch.equal(losses[0], losses[1])  # each process had its own share of the batch
    assert_losses_no_worse(losses.tolist(), single, truth)
    for of_rank in gradients:
        assert_no_worse(of_rank, single["gradients"], truth["gradients"])
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    # With checkpointing a layer steers a second time, in the backward pass.
    assert [result["calls"] for result in results] == [[2 if run == "checkpointing" else 1] * 3] * PROCESSES


def test_distributed_fsdp1_wraps_by_the_name_of_the_class(folder):
    for run, expected in (("by-name", True), ("root", False)):
        results, _ = read(folder("fsdp1"), run)
        assert [result["wrapped"] for result in results] == [[expected] * 3] * PROCESSES


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize(("scenario", "run"), RUNS)
def test_distributed_saves_as_one_process_does(folder, single, truth, scenario, run):
    config, weights = adapter(folder(scenario) / run)
    expected_config, expected = adapter(single["saved"])
    assert config == expected_config
    assert_no_worse(weights, expected, truth["weights"])


@pytest.mark.parametrize("run", ["plain", "checkpointing"])
@pytest.mark.parametrize("scenario", ["ddp", "tensor", *SHARDED])
def test_distributed_saves_before_the_first_forward_pass_and_after_the_last(folder, single, scenario, run):
    _, start = adapter(folder(scenario) / f"{run}-start")
    assert {name.removeprefix("base_model.model.") for name in start} == set(single["start"])
    for name, value in single["start"].items():
        assert torch.equal(start[f"base_model.model.{name}"], value)
    _, trained = adapter(folder(scenario) / run)
    for later in (f"{run}-evaluated", f"{run}-trainer/checkpoint-{worker.STEPS}/fused_steer/default"):
        _, again = adapter(folder(scenario) / later)
        assert again.keys() == trained.keys() and all(torch.equal(trained[name], again[name]) for name in trained)


def test_distributed_a_tensor_that_fsdp1_cut_is_put_together(folder):
    results, _ = read(folder("fsdp1"), "wide")
    assert all(any(0 < part < worker.WIDE.rank * HIDDEN for part in result["parts"]) for result in results)
    expected = steering_parameters(worker.steered(build(), config=worker.WIDE))
    for run in ("wide", "summoned"):
        _, saved = adapter(folder("fsdp1") / run)
        assert len(saved) == len(expected)
        assert all(torch.equal(saved[f"base_model.model.{name}"], value) for name, value in expected.items())


@pytest.mark.parametrize("scenario", ["ddp", "tensor", *SHARDED])
def test_distributed_loads_and_restores(folder, single, truth, scenario):
    for rank, result in enumerate(read(folder(scenario), "files")[0]):
        trained = read(folder(scenario), "plain")[0][rank]["evaluated"]
        assert_no_worse(*(torch.tensor(loss) for loss in (trained, single["evaluated"], truth["evaluated"])))
        assert result["loaded"] == trained
        untrained = worker.evaluate(worker.steered(build()))
        assert difference(torch.tensor(untrained), torch.tensor(trained))[""] > 1e-3
        sharded = "ValueError: layer 0 is sharded by FSDP; expected {} before it is"
        if scenario == "fsdp1":
            assert result["restore"] == sharded.format("adapters to be restored")
            assert_close(torch.tensor(result["restored"]), torch.tensor(untrained))
        else:
            assert result["restore"] == "" and result["restored"] == trained
        refused_later = scenario in SHARDED
        assert result["load"] == (sharded.format("adapters to be loaded") if refused_later else "")
        assert result["unpatch"] == (sharded.format("the model to be unpatched") if refused_later else "")
        assert result["batch"] == (
            "ValueError: layer 0 is sharded by FSDP; expected adapter 'default', which a batch (or generate, with "
            "positions) copies, to be whole in every process (DDP)"
            if refused_later
            else ""
        )


def test_distributed_an_adapter_that_ddp_would_not_average_is_refused(folder):
    for result in read(folder("ddp"), "not-averaged")[0]:
        assert result["train"] == (
            "RuntimeError: adapter 'another' was not in use when DistributedDataParallel wrapped the model, so its "
            "gradients would not be averaged over the processes; expected the model to be wrapped (again) after "
            "steering.use('another')"
        )


@pytest.mark.parametrize("scenario", SHARDED)
def test_distributed_what_the_first_process_raises_is_raised_in_all(folder, scenario):
    for result in read(folder(scenario), "files")[0]:
        assert result["save"].startswith("NotADirectoryError: ") and "is a file" in result["save"]


def test_distributed_the_layers_of_a_pipelines_stages_are_saved_together(folder):
    _, saved = adapter(folder("pipeline") / "saved")
    expected = steering_parameters(worker.steered(build()))
    assert len(saved) == len(expected)
    assert all(torch.equal(saved[f"base_model.model.{name}"], 2 * value) for name, value in expected.items())


def test_distributed_parts_that_make_no_whole_are_refused():
    from fused_steer.adapters.distributed import _join

    whole = torch.arange(6.0)
    for parts in ([whole[:4], whole[4:]], [whole[:0], whole], [whole, whole], [whole, whole[:0]]):
        assert torch.equal(_join("w", parts, (2, 3)), whole.view(2, 3))
    with refused(ValueError, "w is spread", "[4, 4] elements", "expected 6", "summon_full_params"):
        _join("w", [whole[:4], whole[:4]], (2, 3))
    assert torch.equal(gather({"w": whole}, {"w": (2, 3)})["w"], whole.view(2, 3))


def test_distributed_a_partitioned_parameter_is_not_saved(tmp_path):
    model = patch_model(build())
    up = model.model.layers[1].post_block.steer_up["default"].weight
    up.data = torch.empty(0)  # as DeepSpeed's ZeRO-3 leaves it
    with refused(ValueError, "layers.1.post_block.steer_up.weight has shape (0,)", "expected (32, 8)", model=model):
        model.steering.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Joint adaptation


@pytest.fixture(scope="module")
def single_joint() -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    model = worker.with_lora()
    result, gradients = worker.train(model, model)
    return result, gradients, {name: p.detach() for name, p in worker.trained_parameters(model).items()}


@pytest.fixture(scope="module")
def lora_in_parts() -> list[tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]]:
    """Train the unsteered model with its LoRA on half and on whole batches: losses, first gradients, weights."""
    ways = []
    for parts in (PROCESSES, 1):
        model = worker.with_lora()
        model.steering.unpatch()
        parameters = worker.trained_parameters(model.train())
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
        losses, first = [], {}
        for step in range(worker.STEPS):
            shares = [worker.batch(step, rank, parts) for rank in range(parts)]
            loss = sum(model(input_ids=ids, labels=ids).loss for ids in shares) / parts
            loss.backward()
            losses.append(loss.detach())
            first = first or {name: p.grad.clone() for name, p in parameters.items()}
            optimizer.step()
            optimizer.zero_grad()
        ways.append((torch.stack(losses), first, {name: p.detach() for name, p in parameters.items()}))
    return ways


@pytest.mark.parametrize("run", ["plain", "checkpointing"])
def test_distributed_joint_orth_under_ddp(folder, single_joint, lora_in_parts, run):
    expected, expected_gradients, expected_weights = single_joint
    results, gradients = read(folder("joint"), run)
    _, weights = read(folder("joint"), f"{run}-weights")
    of_losses, of_gradients, of_weights = zip(*lora_in_parts, strict=True)
    losses = torch.tensor([r["losses"] for r in results]).mean(0)
    assert_close(losses, torch.tensor(expected["losses"]), unsteered=of_losses)
    for rank in range(PROCESSES):
        assert len(results[rank]["after_step"]) == worker.STEPS and max(results[rank]["after_step"]) <= 1e-5
        assert_close(gradients[rank], expected_gradients, unsteered=of_gradients)
        assert_close(weights[rank], expected_weights, unsteered=of_weights)
    assert any("lora_B" in name for name in weights[0]) and any("steer_up" in name for name in weights[0])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_distributed_a_lora_that_ddp_would_not_average_is_refused(folder):
    for result in read(folder("joint"), "not-averaged")[0]:
        assert result["before"] == result["steering"] == result["peft before"] == ""
        lora, steering = "mlp.down_proj.lora_A", "post_block.steer_down"  # PEFT's own method of steering
        assert result["after"] == result["lora"] == result["peft"].replace(steering, lora)
        assert result["after"] == (
            "RuntimeError: base_model.model.model.layers.0.mlp.down_proj.lora_A.another.weight did not train when "
            "DistributedDataParallel wrapped the model, so its gradients would not be averaged over the processes; "
            "expected the model to be wrapped (again) after PEFT's set_adapter or enable_adapters"
        )


def test_distributed_joint_saved_under_ddp(folder):
    _, weights = read(folder("joint"), "plain-weights")
    model = load_joint(build(), folder("joint") / "plain", trainable=True)
    loaded = worker.trained_parameters(model)
    assert loaded.keys() == weights[0].keys()
    assert all(torch.equal(loaded[name], weights[0][name]) for name in loaded)


def test_distributed_the_callback_saves_under_ddp(folder):
    _, weights = read(folder("joint"), "trainer")
    _, saved = adapter(folder("joint") / "trainer" / "checkpoint-2" / "fused_steer" / "default")
    trained = {name.replace(".default", ""): value for name, value in weights[0].items() if "post_block" in name}
    assert trained.keys() == saved.keys()
    assert all(torch.equal(saved[name], trained[name]) for name in saved)


def test_distributed_joint_orth_is_refused_where_fsdp_shards(folder):
    for result in read(folder("joint"), "sharded")[0]:
        for name in ("train", "save"):
            assert result[name] == (
                "ValueError: layer 0 is sharded by FSDP; expected adapter 'default', which is kept orthogonal to LoRA, "
                "to be whole in every process (DDP)"
            )
        assert result["save_joint"] == (
            "ValueError: the model is sharded by FSDP; expected every process to hold it whole (DDP)"
        )
    assert not (folder("joint") / "sharded").exists()


# ---------------------------------------------------------------------------------------------------------------------
# DeepSpeed, where it is installed


zero = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed, which is not a dependency"
)


@zero
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("run", ["plain", "checkpointing"])
def test_distributed_zero_trains_and_saves_as_one_process_does(folder, single, truth, run, stage):
    results, _ = read(folder("zero"), f"{run}-{stage}")
    assert_losses_no_worse([result["losses"] for result in results], single, truth)
    config, weights = adapter(folder("zero") / f"{run}-{stage}")
    expected_config, expected = adapter(single["saved"])
    assert config == expected_config
    assert_no_worse(weights, expected, truth["weights"])
    for result in results:
        assert (
            result["restore"] == "ValueError: layer 0 is sharded by ZeRO; expected adapters to be restored before it is"
        )
        assert result["load"] == "ValueError: layer 0 is sharded by ZeRO; expected adapters to be loaded before it is"
        assert "has shape (0,)" in result.get("save", "has shape (0,)") and ("save" in result) == (stage == 3)


@zero
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_distributed_joint_orth_is_refused_under_zero(folder, stage):
    for result in read(folder("zero"), f"joint-{stage}")[0]:
        assert all(message.startswith("ValueError: ") and "sharded by ZeRO" in message for message in result.values())
    assert not (folder("zero") / "refused").exists()
