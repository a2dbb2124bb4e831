"""Runs one vLLM engine in a subprocess with its own environment variables: reads a job, writes tokens, as JSON."""

from __future__ import annotations

import json
import os
import shutil
import sys
from typing import Any

_numbers: dict[tuple[str, str | None], int] = {}


def _number(name: str, path: str | None) -> int:
    """Return an adapter's number in vLLM. It must stay unique for the engine's lifetime."""
    return _numbers.setdefault((name, path), len(_numbers) + 1)


def ask(engine: Any, requests: list[Any], new_tokens: int) -> list[list[int]]:
    """Return the tokens of `answer`."""
    return [list(output.outputs[0].token_ids) for output in answer(engine, requests, new_tokens)]


def answer(engine: Any, requests: list[Any], new_tokens: int) -> list[Any]:
    """Generate greedy continuations of one batch.

    Args:
        requests: (adapter's name, its directory, prompt), and perhaps steering options. Name and directory may be None.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    loras = [name and LoRARequest(name, _number(name, path), path) for name, path, *_ in requests]
    prompts = [{"prompt_token_ids": prompt} for _, _, prompt, *_ in requests]
    given = [{"steering": options[0]} if options and options[0] else None for _, _, _, *options in requests]
    parameters = [
        SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, extra_args=extra) for extra in given
    ]
    return engine.generate(prompts, parameters, lora_request=loras, use_tqdm=False)


def answer_waves(engine: Any, waves: list[Any], new_tokens: int) -> dict[str, Any]:
    """Generate greedy continuations of one batch after another.

    Args:
        waves: (contents, requests). Contents are name -> (its directory, another directory, copied there). An adapter
            under this name is unloaded before.
    """
    tokens, cached = [], 0
    for contents, requests in waves:
        for name, (path, content) in contents.items():
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(content, path)
            engine.llm_engine.remove_lora(_number(name, path))
        outputs = answer(engine, requests, new_tokens)
        tokens += [list(output.outputs[0].token_ids) for output in outputs]
        cached += sum(output.num_cached_tokens or 0 for output in outputs)
    metrics = {metric.name: metric for metric in engine.get_metrics()}
    return {"tokens": tokens, "cached": cached, "preempted": metrics["vllm:num_preemptions"].value}


def keys(worker: Any) -> tuple[str, str]:
    """Return the hash of the config in the compiling process, with and without the plug-in's additions."""
    config = worker.vllm_config
    marked, added = config.compute_hash(), config.additional_config
    config.additional_config = {}
    try:
        return marked, config.compute_hash()
    finally:
        config.additional_config = added


def main() -> None:
    from vllm import LLM

    job = json.load(sys.stdin)
    engine = LLM(**job["engine"])
    if "waves" in job:
        done = answer_waves(engine, job["waves"], job["new_tokens"])
    else:
        done = {"tokens": ask(engine, job["requests"], job["new_tokens"])}
    if os.environ.get("VLLM_ALLOW_INSECURE_SERIALIZATION") == "1":
        (done["keys"],) = engine.collective_rpc(keys)
    with open(job["out"], "w") as file:
        json.dump(done, file)
    sys.stdout.flush()


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    main()
