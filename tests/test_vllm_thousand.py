"""A thousand random requests to vLLM, on both of its model runners, with and without LoRA: none is answered wrongly.

Each request has a random adapter, strength, positions and prompt. Four requests in a row differ only in the prompt's
end, so that cached blocks are used again. Prompts are fed in chunks. There are too few blocks, so that requests are
preempted, and fewer slots than adapters. Between the waves adapters get other contents under their name, number and
path. Each answer is compared with that of Hugging Face. Without --every-engine only the first runner is started, and no
LoRA.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm_models import CONFIGS, engine_options, save_adapter, save_model, second_runner

from fused_steer import patch_model

pytestmark = pytest.mark.vllm

WORKER = Path(__file__).with_name("vllm_worker.py")
WAVES, ROWS, NEW_TOKENS = 10, 100, 8
NAMES = [f"name-{number}" for number in range(6)]
POSITIONS = ["all", "generated", "prompt", "last_prompt", "last_3", "first_7", "first_2+generated"]
WAYS: dict[str, dict[str, Any]] = {
    "with LoRA": {"lora_target_modules": ["post_block"]},
    "without LoRA": {"enable_lora": False, "max_loras": 1, "additional_config": {"steering": {"rank": 8, "slots": 4}}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Make a folder with model/, and contents for adapters: two of each form."""
    root = tmp_path_factory.mktemp("thousand")
    save_model(root / "model")
    for seed in range(2 * len(CONFIGS)):
        name = list(CONFIGS)[seed // 2]
        save_adapter(root / "model", root / f"{name}-{seed}", CONFIGS[name], 70 + seed)
    return root


def make_waves(folder: Path) -> list[tuple[dict[str, Any], list[Any]]]:
    """Return the waves: (contents, requests). The contents of a name are another adapter's directory."""
    # With this seed the likeliest token leads by at least 6e-5 of the largest logit in all answers, so that no rounding
    # decides them, on any processor.
    chance = random.Random(11)
    contents = sorted(path.name for path in folder.iterdir() if path.name != "model")
    beginnings = [[chance.randrange(3, 60) for _ in range(44)] for _ in range(5)]
    waves = []
    for number in range(WAVES):
        given = NAMES if number == 0 else chance.sample(NAMES, 3)
        requests: list[Any] = []
        for _ in range(ROWS // 4):
            name, options = chance.choice([None, *NAMES]), {}
            if name and chance.random() < 0.7:
                options["scale"] = round(chance.uniform(-3, 3), 3)
            if name and chance.random() < 0.7:
                options["positions"] = chance.choice(POSITIONS)
            beginning = chance.choice(beginnings)
            for _ in range(4):
                # Many prompts end close to a block's end, so that their answers need another block.
                prompt = beginning[: chance.choice([chance.randrange(1, 45), chance.randrange(28, 33)])]
                if chance.random() < 0.3:
                    prompt = [*prompt, *(chance.randrange(3, 60) for _ in range(chance.randrange(1, 10)))]
                requests.append((name, prompt, options))
        waves.append(({name: chance.choice(contents) for name in given}, requests))
    return waves


@pytest.fixture(scope="module")
def waves(folder) -> list[tuple[dict[str, Any], list[Any]]]:
    return make_waves(folder)


@pytest.fixture(scope="module")
def right(folder, waves) -> list[list[int]]:
    """Return Hugging Face's answers, with prompts of one length in a batch."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    now: dict[str, str] = {}
    rows: list[tuple[str | None, list[int], dict[str, Any]]] = []
    for contents, requests in waves:
        now |= contents
        rows += [(name and now[name], prompt, options) for name, prompt, options in requests]
    for number, content in enumerate(sorted({content for content, _, _ in rows if content})):
        if number:
            model.steering.load(folder / content, content)
        else:
            model = patch_model(model, folder / content, adapter_name=content)
    found: list[list[int]] = [[]] * len(rows)
    for length in sorted({len(prompt) for _, prompt, _ in rows}):
        here = [row for row, (_, prompt, _) in enumerate(rows) if len(prompt) == length]
        names, prompts, options = zip(*(rows[row] for row in here), strict=True)
        scales, positions = [one.get("scale") for one in options], [one.get("positions") for one in options]
        with model.steering.batch(list(names), scale=scales, positions=positions):
            out = model.generate(torch.tensor(prompts), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
        for row, tokens in zip(here, out[:, length:].tolist(), strict=True):
            found[row] = tokens
    return found


@pytest.mark.parametrize(
    ("runner", "way"),
    [
        pytest.param(
            runner, way, marks=() if (runner, way) == ("first runner", "without LoRA") else pytest.mark.every_engine
        )
        for runner in ("first runner", "second runner")
        for way in WAYS
    ],
)
def test_vllm_a_thousand_random_requests(folder, waves, right, tmp_path, runner, way):
    served = {name: str(tmp_path / name) for name in NAMES}
    options = {
        "block_size": 32, "enable_prefix_caching": True, "num_gpu_blocks_override": 10, "max_num_seqs": 16,
        "max_num_batched_tokens": 96, "max_cpu_loras": 5, "disable_log_stats": False,
    }  # fmt: skip
    job = {
        "engine": engine_options(folder / "model", **WAYS[way], **options),
        "waves": [
            (
                {name: (served[name], str(folder / content)) for name, content in contents.items()},
                [(name, name and served[name], prompt, options) for name, prompt, options in requests],
            )
            for contents, requests in waves
        ],
        "new_tokens": NEW_TOKENS,
        "out": str(tmp_path / "out.json"),
    }
    done = subprocess.run(
        [sys.executable, str(WORKER)],
        input=json.dumps(job),
        env={**os.environ, **(second_runner(tmp_path) if runner == "second runner" else {})},
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert (tmp_path / "out.json").exists(), (done.stdout + done.stderr)[-20000:]
    assert ("Using V2 Model Runner" in done.stdout + done.stderr) == (runner == "second runner")
    found = json.loads((tmp_path / "out.json").read_text())
    asked = [request for _, requests in waves for request in requests]
    wrong = [
        (row, asked[row], mine, theirs)
        for row, (mine, theirs) in enumerate(zip(found["tokens"], right, strict=True))
        if mine != theirs
    ]
    seen = f"{len(wrong)} of {len(right)} wrong, {found['cached']} cached tokens, {found['preempted']} preemptions"
    print(seen, runner, way)
    assert len(right) == WAVES * ROWS and not wrong, (seen, wrong[:5])
    assert found["cached"] > 1000 and found["preempted"] > 10, seen
