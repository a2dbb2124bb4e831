"""Tests of TRL's trainers on a patched model: the base is the reference, without a copy; runs resume bit for bit."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build, build_frozen, classifier, logits, randomize, refused, tokens
from pages import run_page
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from text import save_tiny, tokenizer
from torch import Tensor, nn

trl = pytest.importorskip("trl", reason="needs TRL (the extra trl)")

from datasets import Dataset  # noqa: E402

from fused_steer import SteerConfig, SteeringCallback, SteeringTrainer, patch_model  # noqa: E402
from fused_steer.trl import (  # noqa: E402
    Reference,
    SteeringDPOTrainer,
    SteeringGRPOTrainer,
    SteeringSFTTrainer,
)

SUMS = [(f"{a}+{b}=", str(a + b)) for a in range(6) for b in range(6)]
COMPLETIONS = Dataset.from_list([{"prompt": p, "completion": c} for p, c in SUMS])
PREFERENCES = Dataset.from_list([{"prompt": p, "chosen": c, "rejected": f"{c}, i think!"} for p, c in SUMS])


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("CI", "1")  # keeps TRL from sending telemetry


def steered(seed: int = 0, lora: bool = False) -> nn.Module:
    """Build a model with steering (and LoRA) that already changes the output, so that it differs from its reference."""
    model = build()
    torch.manual_seed(seed)
    if lora:
        config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(model, config)
    model = patch_model(model, SteerConfig(rank=4))
    randomize(model, seed=seed)
    return model


def config(cls: type, directory: Path, **options: Any) -> Any:
    common = {
        "output_dir": str(directory),
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    return cls(**common | options)


def dpo(model: nn.Module, directory: Path, cls: Any = SteeringDPOTrainer, ref: Any = None, **options: Any) -> Any:
    arguments = config(trl.DPOConfig, directory, **options)
    return cls(model, ref, arguments, train_dataset=PREFERENCES, processing_class=tokenizer())


def reward(completions: list[str], **_: Any) -> list[float]:
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def grpo(model: nn.Module, directory: Path, cls: Any = SteeringGRPOTrainer, **options: Any) -> Any:
    options = {"max_steps": 2, "num_generations": 2, "max_completion_length": 6, **options}
    arguments = config(trl.GRPOConfig, directory, **options)
    return cls(model, reward, arguments, train_dataset=COMPLETIONS, processing_class=tokenizer())


def values(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n or ".post_block." in n}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys() and actual
    assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []


def logged(run: Any, key: str) -> list[float]:
    return [row[key] for row in run.state.log_history if key in row]


# ---------------------------------------------------------------------------------------------------------------------
# The reference


@pytest.mark.parametrize("lora", [False, True], ids=["steering", "steering and LoRA"])
def test_trl_the_reference_is_the_base_model_and_no_copy(lora):
    model = steered(lora=lora)
    reference, before = Reference(model), logits(model)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert torch.equal(logits(reference), logits(build_frozen()))
    assert {id(p) for p in reference.parameters()} == {id(p) for p in model.parameters()}
    assert torch.equal(logits(model), before) and not torch.equal(before, logits(build()))
    with pytest.raises(RuntimeError):
        reference(tokens().float())
    assert torch.equal(logits(model), before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trains
    with refused(ValueError, "LlamaForCausalLM is not steered", "expected"):
        Reference(build())


@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}], ids=["each step", "precomputed"])
@pytest.mark.parametrize("lora", [False, True], ids=["steering", "steering and LoRA"])
def test_trl_dpo_equals_a_run_beside_a_second_model(tmp_path, monkeypatch, lora, options):
    expected = steered(lora=lora)
    beside = dpo(expected, tmp_path / "two", trl.DPOTrainer, ref=build_frozen(), **options)
    beside.train()
    model = steered(lora=lora)
    assert_same(values(model), values(steered(lora=lora)))
    with monkeypatch.context() as patched:
        patched.setattr("trl.trainer.dpo_trainer.create_model_from_path", None)  # loading a second model would fail
        run = dpo(model, tmp_path / "one", **options)
    run.train()
    assert_same(values(model), values(expected))
    assert logged(run, "rewards/margins") == logged(beside, "rewards/margins")
    assert any(logged(run, "rewards/margins"))
    assert {id(p) for p in run.ref_model.parameters()} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_trl_grpo_equals_a_run_beside_a_second_model(tmp_path, monkeypatch, beta):
    base = save_tiny(tmp_path / "base")
    expected, model = steered(), steered()
    for each in (expected, model):
        each.config._name_or_path = str(base)  # the path from which TRL loads its second model
    beside = grpo(expected, tmp_path / "two", trl.GRPOTrainer, beta=beta)
    if beside.ref_model is not None:
        beside.ref_model.requires_grad_(False)  # like the steered model's base
    beside.train()
    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", None)
    run = grpo(model, tmp_path / "one", beta=beta)
    run.train()
    assert run.args.beta == run.beta == beta
    assert_same(values(model), values(expected))
    assert not any(torch.equal(value, values(steered())[name]) for name, value in values(model).items())
    assert logged(run, "kl") == logged(beside, "kl") and (any(logged(run, "kl")) == (beta > 0))


def test_trl_grpo_with_lora_refers_to_the_base(tmp_path):
    model = steered(lora=True)
    run = grpo(model, tmp_path, beta=0.5)
    run.train()
    assert set(model.peft_config) == {"default"}  # otherwise TRL has added a frozen copy of the LoRA
    assert torch.equal(logits(run.ref_model), logits(build_frozen()))
    assert all(value > 0 for value in logged(run, "kl"))


def test_trl_a_reference_of_ones_own_is_used(tmp_path):
    own = build(seed=3)
    run = dpo(steered(), tmp_path, ref=own)
    assert run.ref_model is own


def test_trl_what_would_go_wrong_is_refused(tmp_path):
    model = steered()
    with refused(ValueError, "LlamaForCausalLM is not steered"):
        dpo(build(), tmp_path)
    with refused(ValueError, "LlamaForCausalLM is not steered"):
        grpo(build(), tmp_path)
    with refused(ValueError, "sync_ref_model", "expected False", model=model):
        dpo(model, tmp_path, sync_ref_model=True)
    with refused(ValueError, "sync_ref_model", "expected False", model=model):
        grpo(model, tmp_path, sync_ref_model=True, beta=0.1)
    with refused(ValueError, "use_vllm", "expected False", model=model):
        grpo(model, tmp_path, use_vllm=True)
    arguments = config(trl.GRPOConfig, tmp_path, beta=0.5, num_generations=2)
    with pytest.raises(TypeError):
        SteeringGRPOTrainer(model, reward, arguments, nonsense=1)
    assert arguments.beta == 0.5


def test_trl_a_steered_reference_is_refused_in_other_trainers(tmp_path):
    """For a model with a LoRA they would switch that off, or take a copy of it, and leave the steering on."""

    class SteeringKTOTrainer(SteeringTrainer, trl.KTOTrainer):
        pass

    rows = COMPLETIONS.add_column("label", [i % 2 == 0 for i in range(len(COMPLETIONS))])

    def kto(reference: Any = None, cls: Any = SteeringKTOTrainer, **kw: Any) -> Any:
        model = build()
        model = get_peft_model(model, LoraConfig(r=3, target_modules=["down_proj"]))
        model = patch_model(model, SteerConfig(rank=4), adapter_name="polite")
        reference = reference and reference(model)
        arguments = config(trl.KTOConfig, tmp_path, max_steps=1)
        return cls(model, reference, arguments, train_dataset=rows, processing_class=tokenizer(), **kw)

    run = kto()
    with refused(ValueError, "SteeringKTOTrainer has no ref_model", "Reference(model)", model=run.model):
        run.train()
    run = kto(Reference)
    run.train()
    assert list(run.model.peft_config) == ["default"] and run.state.global_step == 1
    for reference in (None, Reference):  # TRL's own trainer, with a callback
        run = kto(reference, trl.KTOTrainer, callbacks=[SteeringCallback()])
        with (
            contextlib.nullcontext() if reference else refused(ValueError, "KTOTrainer has no ref_model", "Reference(")
        ):
            run.train()
        assert run.state.global_step == (1 if reference else 0)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def sft(model: nn.Module, directory: Path) -> Any:
    arguments = config(trl.SFTConfig, directory)
    return SteeringSFTTrainer(model, arguments, train_dataset=COMPLETIONS, processing_class=tokenizer())


@pytest.mark.parametrize("make", [sft, dpo])
@pytest.mark.parametrize("lora", [False, True], ids=["steering", "steering and LoRA"])
def test_trl_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, make, lora):
    model = steered(lora=lora)
    make(model, tmp_path).train()
    assert not list(tmp_path.rglob("model*.safetensors"))
    resumed = steered(seed=1, lora=lora)
    make(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(values(resumed), values(model))
    folder = tmp_path / "checkpoint-4" / ("fused_steer/default" if lora else "")
    with model.eval().steering.mode("steering") if lora else contextlib.nullcontext():
        assert torch.equal(logits(patch_model(build(), folder)), logits(model))


def test_trl_reward_trainer_trains_and_saves_the_head(tmp_path):
    from fused_steer.peft import PostBlockConfig

    model = classifier()
    model.config.num_labels, model.num_labels, model.score = 1, 1, nn.Linear(32, 1, bias=False)
    run = trl.RewardTrainer(
        model,
        config(trl.RewardConfig, tmp_path, max_steps=2),
        train_dataset=PREFERENCES,
        processing_class=tokenizer(),
        peft_config=PostBlockConfig(r=4),
    )
    names = [name for name, p in run.model.named_parameters() if p.requires_grad]
    before = {name: run.model.get_parameter(name).detach().clone() for name in names}
    run.train()
    assert any(".score." in name for name in names) and any(".post_block." in name for name in names)
    assert [name for name in names if torch.equal(run.model.get_parameter(name), before[name])] == []
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.score.weight"], run.model.base_model.model.score.weight)


def test_trl_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    names = {
        "model": build(),
        "tokenizer": tokenizer(),
        "completions": COMPLETIONS,
        "preferences": PREFERENCES,
        "prompts": COMPLETIONS,
        "reward": reward,
    }
    run_page("trl.md", names)
    for folder in ("sft", "dpo", "grpo"):
        assert Path(folder, "checkpoint-2", "adapter_config.json").is_file()
    saved = [logits(patch_model(build(), f"{folder}/checkpoint-2")) for folder in ("sft", "dpo", "grpo")]
    assert torch.equal(logits(patch_model(build(), "polite")), saved[0])
    assert not torch.equal(saved[0], logits(build()))
    assert not torch.equal(saved[0], saved[1]) and not torch.equal(saved[1], saved[2])
