"""Tests of training LoRA and steering together: parameter groups, files with both parts, transformers' Trainer."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build, logits, refused, skip_without_add_adapter, steering_parameters, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

import fused_steer.joint
from fused_steer import (
    SteerConfig,
    SteeringCallback,
    SteeringTrainer,
    load_joint,
    lora_parameters,
    patch_model,
    save_joint,
)
from fused_steer import (
    steering_parameters as parameters_of_steering,
)
from fused_steer.peft import PostBlockConfig

STEPS = 6
ORTHOGONAL = SteerConfig(rank=4, orthogonal_to="lora")
DATASET = [{"input_ids": ids, "labels": torch.full_like(ids, 7)} for ids in tokens(batch=32)]


def joint(seed: int = 0, add: bool = False, config: SteerConfig = ORTHOGONAL) -> nn.Module:
    """Build a model with LoRA and steering. The base is the same for every seed; the fresh adapters differ."""
    model = build()
    torch.manual_seed(seed)
    lora = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], lora_dropout=0.0)
    if add:
        skip_without_add_adapter()
        model.add_adapter(lora)
    else:
        model = get_peft_model(model, lora)
    return patch_model(model, config)


def trained(model: nn.Module, steps: int = 3) -> nn.Module:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        model.train()(tokens(step), labels=tokens(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n or ".post_block." in n}


def overlaps(model: nn.Module) -> list[float]:
    layers = model.get_base_model().model.layers
    pairs = [
        (layer.mlp.down_proj.lora_B["default"].weight.detach(), layer.post_block.steer_up["default"].weight.detach())
        for layer in layers
    ]
    return [((b.T @ w).norm() / (b.norm() * w.norm())).item() for b, w in pairs]


# ---------------------------------------------------------------------------------------------------------------------
# Groups of parameters


@pytest.mark.parametrize("add", [False, True], ids=["get_peft_model", "add_adapter"])
def test_joint_each_part_has_its_parameters(add):
    model = joint(add=add)
    steering, lora = parameters_of_steering(model), lora_parameters(model)
    assert set(steering) == set(steering_parameters(model).values())
    assert set(lora) == {p for name, p in model.named_parameters() if "lora_" in name}
    assert len(steering) == len(set(steering)) and len(lora) == len(set(lora))
    assert set(steering) | set(lora) == {p for p in model.parameters() if p.requires_grad}


def test_joint_parameters_of_what_is_not_there():
    model = build()
    with refused(ValueError, "LlamaForCausalLM is not steered", "expected", model=model):
        parameters_of_steering(model)
    patch_model(model)
    with refused(ValueError, "LlamaForCausalLM carries no LoRA that trains", "expected", model=model):
        lora_parameters(model)
    with refused(TypeError, "model is a int; expected a torch.nn.Module that carries a LoRA"):
        lora_parameters(3)
    model.steering.use(None)
    with refused(ValueError, "no steering adapter of the model trains", "expected", model=model):
        parameters_of_steering(model)


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("add", [False, True], ids=["get_peft_model", "add_adapter"])
def test_joint_saved_together_and_loaded_bit_equal(tmp_path, add):
    model = trained(joint(add=add))
    save_joint(model, tmp_path)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == [
        "joint.json",
        "lora/default/adapter_config.json",
        "lora/default/adapter_model.safetensors",
        "steering/adapter_config.json",
        "steering/adapter_model.safetensors",
    ]
    again = load_joint(build(), tmp_path)
    assert isinstance(again, PeftModel) and again.steering.config() == ORTHOGONAL
    assert torch.equal(logits(again), logits(model))
    prefix = "" if add else "base_model.model."
    expected = {name.removeprefix(prefix): value for name, value in state(model).items()}
    actual = {name.removeprefix("base_model.model."): value for name, value in state(again).items()}
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in actual)
    assert not any(p.requires_grad for name, p in again.named_parameters() if "lora_" in name)


def test_joint_steering_is_not_saved_over_lora(tmp_path):
    model = joint()
    model.save_pretrained(str(tmp_path))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with refused(ValueError, str(tmp_path), "an adapter of LORA", "expected another directory"):
        model.steering.save(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_joint_merged_lora_on_embeddings_is_not_saved(target, tmp_path):
    """PEFT saves the merged weight with it, and loading applied the LoRA twice."""
    wrapped = get_peft_model(build(), LoraConfig(r=2, target_modules=["q_proj", target], init_lora_weights=False))
    model = patch_model(wrapped, SteerConfig(rank=2)).eval()
    before = logits(model)
    save_joint(model, tmp_path / "apart")
    assert torch.equal(logits(load_joint(build(), tmp_path / "apart").eval()), before)
    wrapped.merge_adapter()
    with refused(ValueError, "is merged into the weights", target, "expected model.unmerge_adapter()", model=model):
        save_joint(model, tmp_path / "merged")
    assert os.listdir(tmp_path) == ["apart"]


def test_joint_several_lora_adapters_together(tmp_path):
    model = build()
    wrapped = get_peft_model(model, LoraConfig(r=3, target_modules=["down_proj"]))
    wrapped.add_adapter("more", LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.base_model.set_adapter(["default", "more"])
    trained(patch_model(wrapped, ORTHOGONAL))
    save_joint(wrapped, tmp_path)
    again = load_joint(build(), tmp_path, trainable=True)
    assert torch.equal(logits(again), logits(wrapped))
    assert {p for n, p in again.named_parameters() if "lora_" in n} == set(lora_parameters(again))


def test_joint_saved_apart_and_loaded_bit_equal(tmp_path):
    model = trained(joint())
    model.steering.save(tmp_path / "steering")
    model.save_pretrained(str(tmp_path / "lora"))
    again = PeftModel.from_pretrained(build(), str(tmp_path / "lora"))
    with model.steering.mode("lora"):
        assert torch.equal(logits(again), logits(model))
    patch_model(again, tmp_path / "steering")
    assert torch.equal(logits(again), logits(model))
    other_order = PeftModel.from_pretrained(patch_model(build(), tmp_path / "steering"), str(tmp_path / "lora"))
    assert torch.equal(logits(other_order), logits(model))
    assert {n: tuple(t.shape) for n, t in state(other_order).items()} == {
        n: tuple(t.shape) for n, t in state(model).items()
    }


def values(model: nn.Module) -> tuple[float, float]:
    """Return the two values that fill the steering and the LoRA."""
    found = state(model)
    return tuple(
        {float(value) for name, tensor in found.items() if part in name for value in tensor.unique()}.pop()
        for part in ("steer_down", "lora_A")
    )


def filled(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "steer_down" in name:
                parameter.fill_(value)
    return model


@pytest.fixture(scope="module")
def two() -> tuple[nn.Module, nn.Module]:
    """Build two models that differ in their values and ranks."""
    return filled(joint(), 1.0), filled(joint(seed=1, config=SteerConfig(rank=3, orthogonal_to="lora")), 2.0)


def replacing(number: int, do: Any, before: bool) -> Any:
    """Return an os.replace that calls `do` once, before or after rename `number`."""
    real, calls = os.replace, [0]

    def replace(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == number and before:
            do()
        real(*args)
        if calls[0] == number and not before:
            do()

    return replace


#: The renames of a save over an earlier one: the steering's two files, the record, and two parts out and in.
RENAMES = 7


def test_joint_save_of_both_takes_so_many_renames(two, tmp_path, monkeypatch):
    save_joint(two[0], tmp_path)
    real, calls = os.replace, []
    monkeypatch.setattr(os, "replace", lambda *args: (calls.append(args), real(*args)))
    save_joint(two[1], tmp_path)
    assert len(calls) == RENAMES
    assert values(load_joint(build(), tmp_path)) == (2.0, 2.0)


@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize("number", range(1, RENAMES + 1))
def test_joint_failed_save_of_both_leaves_what_was_there(two, earlier, number, tmp_path, monkeypatch):
    out = tmp_path / "new" / "deep"
    if earlier:
        save_joint(two[0], out)
    elif number > RENAMES - 2:
        pytest.skip("this save has nothing to move away")

    def content() -> dict[Path, bytes | None]:
        return {p: p.read_bytes() if p.is_file() else None for p in tmp_path.rglob("*")}

    before = content()

    def full() -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space left"):
        patched.setattr(os, "replace", replacing(number, full, True))
        save_joint(two[1], out)
    assert content() == before
    save_joint(two[1], out)
    assert values(load_joint(build(), out)) == (2.0, 2.0)


@pytest.mark.parametrize("number", range(1, RENAMES + 1))
@pytest.mark.parametrize("before", [True, False])
def test_joint_killed_save_of_both_leaves_parts_of_one_time(two, number, before, tmp_path):
    save_joint(two[0], tmp_path)
    child = os.fork()
    if not child:
        try:
            os.replace = replacing(number, lambda: os._exit(9), before)
            save_joint(two[1], tmp_path)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    committed = number > 3 or (number == 3 and not before)
    assert values(load_joint(build(), tmp_path)) == ((2.0, 2.0) if committed else (1.0, 1.0))
    save_joint(two[0], tmp_path)
    assert values(load_joint(build(), tmp_path)) == (1.0, 1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["joint.json", "lora", "steering"]


@pytest.mark.parametrize("number", range(3, RENAMES + 1))
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("fails", [True, False], ids=["which then fails", "which goes on"])
def test_joint_saves_of_both_that_interleave_leave_parts_of_one_time(two, number, before, fails, tmp_path, monkeypatch):
    """If a whole save runs inside another save, both parts on disk come from the same save."""
    save_joint(two[0], tmp_path)
    three = filled(joint(seed=2), 3.0)

    def within() -> None:
        save_joint(three, tmp_path)
        if fails:
            raise OSError("no space left")

    with monkeypatch.context() as patched, contextlib.suppress(OSError):
        patched.setattr(os, "replace", replacing(number, within, before))
        save_joint(two[1], tmp_path)
    found = values(load_joint(build(), tmp_path))
    assert found in ((2.0, 2.0), (3.0, 3.0))
    save_joint(two[0], tmp_path)
    assert values(load_joint(build(), tmp_path)) == (1.0, 1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["joint.json", "lora", "steering"]


@pytest.mark.parametrize("killed", [True, False])
def test_joint_part_that_an_ending_save_has_moved_aside_is_not_lost(two, killed, tmp_path, monkeypatch):
    """A part in the temporary folder of a finished save is still found there until the next save."""
    save_joint(two[0], tmp_path)
    three, real, calls = filled(joint(seed=2), 3.0), os.replace, [0]

    def replace(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == 4:  # just before the first part is moved away
            calls[0] += 100
            save_joint(three, tmp_path)
            calls[0] -= 100 + RENAMES
        if calls[0] == 5:
            if killed:
                os._exit(9)
            raise OSError("no space left")
        real(*args)

    child = os.fork() if killed else 0
    if not child:
        monkeypatch.setattr(os, "replace", replace)
        with contextlib.suppress(OSError):
            save_joint(two[1], tmp_path)
        if killed:
            os._exit(1)
        monkeypatch.undo()
    else:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / "steering").exists() and len(list(tmp_path.glob(".joint-*"))) == 1
    assert values(load_joint(build(), tmp_path)) == (3.0, 3.0)
    save_joint(two[0], tmp_path)
    assert values(load_joint(build(), tmp_path)) == (1.0, 1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["joint.json", "lora", "steering"]


def test_joint_parts_of_several_saves_are_refused(two, tmp_path):
    for number, model in enumerate(two):
        save_joint(model, tmp_path / str(number))
    for part in ("steering", "lora/default"):
        mixed = shutil.copytree(tmp_path / "0", tmp_path / part.replace("/", "-"))
        shutil.rmtree(mixed / part)
        shutil.copytree(tmp_path / "1" / part, mixed / part)
        model = build()
        with refused(ValueError, str(mixed / part), "saved together", "expected", model=model):
            load_joint(model, mixed)
    file = tmp_path / "0" / "lora" / "default" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with refused(ValueError, "lora/default", "saved together", "expected"):
        load_joint(build(), tmp_path / "0")


@pytest.mark.parametrize("change", ["swapped", "flipped", "cut"])
def test_joint_loads_what_was_checked_whatever_happens_to_the_directory(change, two, tmp_path, monkeypatch):
    """After the digests were compared, before PEFT opens the LoRA."""
    for number, model in enumerate(two):
        save_joint(model, tmp_path / str(number))
    there = tmp_path / "0"
    load = PeftModel.from_pretrained

    def loading(*args: Any, **kwargs: Any) -> Any:
        for part in ("steering", "lora/default"):
            if change == "swapped":
                shutil.rmtree(there / part)
                shutil.copytree(tmp_path / "1" / part, there / part)
            else:
                file = there / part / "adapter_model.safetensors"
                content = file.read_bytes()
                os.truncate(file, 0) if change == "cut" else file.write_bytes(content[:-1] + b"@")
        return load(*args, **kwargs)

    monkeypatch.setattr(PeftModel, "from_pretrained", loading)
    assert values(load_joint(build(), there)) == (1.0, 1.0)
    monkeypatch.undo()
    with refused(ValueError, str(there), "saved together", "expected"):
        load_joint(build(), there)


def test_joint_loading_waits_for_a_save_that_moves_the_parts(two, tmp_path, monkeypatch):
    save_joint(two[0], tmp_path)
    copied, copy = [], fused_steer.joint.copy_regular

    def copying(file: Path, to: Path) -> None:
        copied.append(file)
        if len(copied) == 2:
            save_joint(two[1], tmp_path)
        copy(file, to)

    monkeypatch.setattr(fused_steer.joint, "copy_regular", copying)
    assert values(load_joint(build(), tmp_path)) == (2.0, 2.0)


def test_joint_steering_alone_that_is_of_another_time_than_the_lora(two, tmp_path):
    for number, model in enumerate(two):
        save_joint(model, tmp_path / str(number))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_model(build(), tmp_path / "0" / "steering")
        patch_model(build(), shutil.copytree(tmp_path / "0" / "steering", tmp_path / "alone"))
    shutil.copy(tmp_path / "1" / "joint.json", tmp_path / "0")  # as a kill between two renames leaves it
    with pytest.warns(UserWarning, match="was not saved together with the LoRA beside it; expected load_joint"):
        model = patch_model(build(), tmp_path / "0" / "steering")
    with pytest.warns(UserWarning, match="was not saved together"):
        PostBlockConfig.from_pretrained(str(tmp_path / "0" / "steering"))
    assert model.steering.active == "default"


@pytest.mark.parametrize("name", ["../escaped", "/escaped", "a/b", "a b", "x\n", "post_block", "weight", "keys"])
def test_joint_names_of_adapters_never_leave_the_directory(name, two, tmp_path):
    save_joint(two[0], tmp_path / "saved")
    record = tmp_path / "saved" / "joint.json"
    fields = json.loads(record.read_text())
    record.write_text(json.dumps({**fields, f"lora/{name}": fields.pop("lora/default")}))
    with refused(ValueError, "joint.json", "adapter name is", "expected"):
        load_joint(build(), tmp_path / "saved")
    if name in ("../escaped", "a/b"):
        return  # PEFT makes no module for it
    model = build()
    try:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"]), adapter_name=name)
    except (KeyError, ValueError, AttributeError, TypeError):
        return  # PEFT refuses it
    patch_model(model, SteerConfig(rank=2))
    with refused(ValueError, "adapter name is", "expected", model=model):
        save_joint(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["[" * 10**5, "{}", '{"steering": 1}', '{"steering": "0", "x": "0"}', "null"])
def test_joint_broken_records_are_refused(text, two, tmp_path):
    save_joint(two[0], tmp_path)
    (tmp_path / "joint.json").write_text(text)
    with refused(ValueError, "joint.json cannot be loaded", "expected"):
        load_joint(build(), tmp_path)


def test_joint_refusals_of_both_parts(tmp_path):
    plain = patch_model(build())
    with refused(ValueError, "carries no active LoRA", "expected", model=plain):
        save_joint(plain, tmp_path / "out")
    with refused(ValueError, "is not steered", "expected"):
        save_joint(build(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with refused(NotADirectoryError, "file", "expected a directory"):
        save_joint(joint(), tmp_path / "file")
    model = build()
    with refused(FileNotFoundError, "has no joint.json", "expected", model=model):
        load_joint(model, tmp_path)
    save_joint(joint(), tmp_path / "out")
    other = build(hidden_size=64)
    with refused(ValueError, "expected", model=other):
        load_joint(other, tmp_path / "out")
    steering = tmp_path / "out" / "steering"
    fields = json.loads((steering / "adapter_config.json").read_text())
    (steering / "adapter_config.json").write_text("{}")
    with refused(ValueError, str(steering), "was not saved together", "expected", model=model):
        load_joint(model, tmp_path / "out")
    # If the steering does not fit, the LoRA that PEFT has already loaded is removed again.
    with pytest.MonkeyPatch.context() as patched, refused(ValueError, "steering", "expected"):
        del fields["config_sha256"]
        (steering / "adapter_config.json").write_text(json.dumps(fields))
        patched.setattr("fused_steer.joint.files_digest", lambda folder: "0")
        (tmp_path / "out" / "joint.json").write_text(json.dumps({"steering": "0", "lora/default": "0"}))
        patched.setattr(
            "fused_steer.joint.patch_model", lambda *args, **_: patch_model(*args, adapter_name="a steering")
        )
        load_joint(model, tmp_path / "out")
    assert not any(hasattr(module, "lora_A") for module in model.modules())  # the LoRA is removed again


# ---------------------------------------------------------------------------------------------------------------------
# Trainer


class TwoRates(Trainer):
    """A Trainer with one learning rate for the steering and another for the LoRA."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        groups = [
            {"params": parameters_of_steering(self.model), "lr": 2e-2},
            {"params": lora_parameters(self.model), "lr": 5e-3},
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        return self.optimizer


def trainer(model: nn.Module, directory: Path, **options: Any) -> Trainer:
    arguments = {
        "output_dir": str(directory),
        "max_steps": STEPS,
        "save_steps": STEPS // 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
        **options,
    }
    return TwoRates(
        model,
        TrainingArguments(**arguments),
        train_dataset=DATASET,
        eval_dataset=DATASET[:4],
        callbacks=[SteeringCallback()],
    )


def test_joint_trainer_trains_both_at_rates_of_their_own_and_resumes(tmp_path):
    model = joint()
    before = state(model)
    run = trainer(model, tmp_path)
    run.train()
    # The schedule has lowered both rates by the same factor.
    assert [group["initial_lr"] for group in run.optimizer.param_groups] == [2e-2, 5e-3]
    after = state(model)
    assert not any(torch.equal(after[name], before[name]) for name in after)
    losses = {row["step"]: row["loss"] for row in run.state.log_history if "loss" in row}
    assert losses[STEPS] < losses[1]
    assert max(overlaps(model)) <= 1e-6

    resumed = joint(seed=1)
    half = trainer(resumed, tmp_path)
    half.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert {row["step"]: row["loss"] for row in half.state.log_history if "loss" in row} == losses
    again = state(resumed)
    assert all(torch.equal(again[name], after[name]) for name in after)


def test_joint_trainer_loads_the_best_of_both_at_the_end(tmp_path):
    model = joint()
    run = trainer(
        model,
        tmp_path,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=3,
        metric_for_best_model="eval_x",
    )
    scores = iter([2.0, 1.0])  # at step 3, the best, and at step 6
    run.compute_metrics = lambda _: {"x": next(scores)}
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    best = joint(seed=1)
    best.load_adapter(str(tmp_path / "checkpoint-3"), "default")
    best.steering.restore(tmp_path / "checkpoint-3" / "fused_steer" / "default")
    assert state(best).keys() == state(model).keys()
    assert all(torch.equal(value, state(model)[name]) for name, value in state(best).items())


def test_joint_a_checkpoint_without_steering_is_not_resumed(tmp_path):
    run = trainer(joint(), tmp_path)
    run.remove_callback(SteeringCallback)
    run.train()
    with refused(FileNotFoundError, "fused_steer/default", "expected"):
        trainer(joint(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("given", [None, "first"])
def test_joint_steering_of_another_run_is_not_resumed(tmp_path, given):
    """The Trainer resumes the second run; the callback would restore the first one's steering, of the same step."""
    folders = [tmp_path / name / f"checkpoint-{STEPS // 2}" for name in ("first", "second")]
    for seed, folder in enumerate(folders):
        trainer(joint(), folder.parent, seed=seed).train()
    model = joint(seed=1)
    run = trainer(model, folders[0].parent if given is None else tmp_path / "third")
    if given is not None:
        run.remove_callback(SteeringCallback)
        run.add_callback(SteeringCallback(folders[0]))
    with refused(ValueError, str(folders[0]), "is not the checkpoint that the Trainer resumes from", "resume_from"):
        run.train(resume_from_checkpoint=str(folders[1]))
    run.remove_callback(SteeringCallback)
    run.add_callback(SteeringCallback(folders[1]))
    run.train(resume_from_checkpoint=str(folders[1]))


def said(caught: Any) -> list[str]:
    return [str(warning.message) for warning in caught if "steering adapter" in str(warning.message)]


def test_joint_a_trainer_that_forgets_the_steering_is_told_at_the_save_and_at_the_resume(tmp_path):
    run = trainer(joint(), tmp_path, gradient_checkpointing=False)
    run.remove_callback(SteeringCallback)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train()
    saves = said(caught)
    assert len(saves) == 2 and all("SteeringCallback" in text and "'default'" in text for text in saves)
    assert f"checkpoint-{STEPS // 2} gets PEFT's adapters without" in saves[0]
    again = trainer(joint(), tmp_path, gradient_checkpointing=False)
    again.remove_callback(SteeringCallback)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))
    text, *_ = said(caught)
    assert f"checkpoint-{STEPS}" in text and "stays as it is" in text


def test_joint_nobody_is_told_where_the_steering_is_kept(tmp_path):
    model = joint()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(model, tmp_path / "callback", gradient_checkpointing=False)
        run.train()
        trainer(joint(), tmp_path / "callback", gradient_checkpointing=False).train(
            resume_from_checkpoint=str(tmp_path / "callback" / f"checkpoint-{STEPS // 2}")
        )
        arguments = TrainingArguments(
            str(tmp_path / "trainer"), max_steps=1, save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True
        )
        steering = SteeringTrainer(model, arguments, train_dataset=DATASET)
        steering.train()
        steering.save_model(str(tmp_path / "last"))
        model.save_pretrained(str(tmp_path / "alone"))  # a call by the user
        model.load_adapter(str(tmp_path / "alone"), "second")
    assert said(caught) == []
    with warnings.catch_warnings(record=True) as caught:  # no callback is told of this save
        warnings.simplefilter("always")
        run.save_model(str(tmp_path / "last"))
    assert len(said(caught)) == 1


def test_joint_unpatched_peft_model_has_its_own_methods_again():
    model = get_peft_model(build(), LoraConfig(r=3, target_modules=["q_proj"]))
    before = set(vars(model))
    patch_model(model, SteerConfig(rank=2)).steering.unpatch()
    assert set(vars(model)) == before


def test_joint_restore_is_of_the_same_config(tmp_path):
    model = trained(joint())
    model.steering.scale = 0.5
    model.steering.save(tmp_path)
    other = joint(seed=1)
    parameters = steering_parameters(other)
    other.steering.restore(tmp_path)
    assert other.steering.scale == 0.5
    assert steering_parameters(other) == parameters  # the same objects
    assert all(torch.equal(p, steering_parameters(model)[name]) for name, p in parameters.items())
    wrong = joint(config=SteerConfig(rank=4, activation="tanh", orthogonal_to="lora"))
    before = state(wrong)
    with refused(ValueError, "activation", "'silu'", "expected 'tanh'", model=wrong):
        wrong.steering.restore(tmp_path)
    assert all(torch.equal(before[name], value) for name, value in state(wrong).items())
    with refused(KeyError, "'none'"):
        wrong.steering.restore(tmp_path, "none")
