"""A trainer of a tiny model, shared by several tests."""

from pathlib import Path
from typing import Any

import torch
from models import tokens
from torch import nn
from transformers import Trainer, TrainingArguments

from fused_steer import SteerConfig, SteeringTrainer

STEPS = 6
CONFIG = SteerConfig(rank=4, down_bias=True, up_bias=True)
DATASET = [{"input_ids": ids, "labels": torch.full_like(ids, 7)} for ids in tokens(batch=32)]


def trainer(model: nn.Module, directory: Path, cls: type[Trainer] = SteeringTrainer, **options: Any) -> Trainer:
    arguments = {
        "output_dir": str(directory),
        "max_steps": STEPS,
        "save_steps": STEPS // 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
        **options,
    }
    return cls(model, TrainingArguments(**arguments), train_dataset=DATASET, eval_dataset=DATASET[:4])
