"""Tests of training a patched model, with transformers' Trainer and step by step beside a model with forward hooks."""

from __future__ import annotations

from pathlib import Path

import torch
from models import DRAWS, Hooked, assert_no_worse, build, randomize, steering_parameters, tokens
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from fused_steer import SteerConfig, patch_model

STEPS = 8
CONFIG = SteerConfig(rank=4, down_bias=True, up_bias=True)

#: The next token is the same for every text, so it is learnt quickly.
DATASET = [{"input_ids": ids, "labels": torch.full_like(ids, 7)} for ids in tokens(batch=32)]


def trainer(model: nn.Module, directory: Path) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=STEPS,
        save_steps=STEPS // 2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-1,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    return Trainer(model, arguments, train_dataset=DATASET)


def patched(seed: int) -> nn.Module:
    """Build a patched model. The base is the same for every seed; the fresh adapters differ."""
    model = build()
    torch.manual_seed(seed)
    return patch_model(model, CONFIG)


def copies(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def mean_loss(model: nn.Module) -> float:
    batch = {name: torch.stack([row[name] for row in DATASET]) for name in DATASET[0]}
    with torch.no_grad():
        return model.eval()(**batch).loss.item()


def test_training_trainer_learns_freezes_and_resumes(tmp_path):
    model = patched(seed=0)
    frozen = copies({name: p for name, p in model.named_parameters() if "post_block" not in name})
    fresh, loss_before = copies(steering_parameters(model)), mean_loss(model)

    run = trainer(model, tmp_path)
    run.train()
    optimized = {p for group in run.optimizer.param_groups for p in group["params"]}
    assert optimized == set(steering_parameters(model).values())
    assert mean_loss(model) < 0.5 * loss_before
    learnt = copies(steering_parameters(model))
    assert not any(torch.equal(learnt[name], fresh[name]) for name in learnt)
    now = dict(model.named_parameters())
    assert frozen and all(torch.equal(now[name], parameter) for name, parameter in frozen.items())

    resumed = patched(seed=1)
    assert not all(torch.equal(p, fresh[name]) for name, p in steering_parameters(resumed).items())
    second_half = trainer(resumed, tmp_path)
    second_half.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    losses = {row["step"]: row["loss"] for row in second_half.state.log_history if "loss" in row}
    assert losses == {row["step"]: row["loss"] for row in run.state.log_history if "loss" in row}
    for name, parameter in steering_parameters(resumed).items():
        assert torch.equal(parameter, learnt[name])


def twenty_steps(network: nn.Module, parameters: dict[str, Tensor]) -> Tensor:
    """Train twenty steps; return the loss of each."""
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=1e-2)
    losses = []
    for step in range(20):
        ids = tokens(seed=step % 4)
        loss = network(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_training_twenty_steps_equal_those_of_hooks():
    losses, weights = ([], [], []), ([], [], [])
    for seed in range(DRAWS):
        model = patch_model(build(), CONFIG)
        hooked = Hooked(build(), randomize(model, seed=seed))
        truth = hooked.double()
        runs = (model, steering_parameters(model)), (hooked.model, hooked.leaves), (truth.model, truth.leaves)
        for i, run in enumerate(runs):
            losses[i].append(twenty_steps(*run))
            weights[i].append(run[1])
        assert losses[0][-1][-1] < 0.9 * losses[0][-1][0]
    assert_no_worse(*map(torch.stack, losses))
    assert_no_worse(*({name: torch.stack([drawn[name] for drawn in of]) for name in of[0]} for of in weights))
