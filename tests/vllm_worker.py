"""One engine of vLLM in a process of its own, where the environment is set for it: a job in, tokens out, as JSON."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

_numbers: dict[tuple[str, str | None], int] = {}


def _number(name: str, path: str | None) -> int:
    """vLLM's number of an adapter, which must be its own as long as the engine lives."""
    return _numbers.setdefault((name, path), len(_numbers) + 1)


def ask(engine: Any, requests: list[Any], new_tokens: int) -> list[list[int]]:
    """Greedy continuations of one batch.

    Args:
        requests: of each the adapter's name and directory, or None twice, its prompt, and perhaps steering options.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    loras = [name and LoRARequest(name, _number(name, path), path) for name, path, *_ in requests]
    prompts = [{"prompt_token_ids": prompt} for _, _, prompt, *_ in requests]
    given = [{"steering": options[0]} if options and options[0] else None for _, _, _, *options in requests]
    parameters = [
        SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, extra_args=extra) for extra in given
    ]
    outputs = engine.generate(prompts, parameters, lora_request=loras, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def keys(worker: Any) -> tuple[str, str]:
    """The hash of the config in the process that compiles, as it is, and without what was added to it."""
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
    done = {"tokens": ask(engine, job["requests"], job["new_tokens"])}
    if os.environ.get("VLLM_ALLOW_INSECURE_SERIALIZATION") == "1":
        (done["keys"],) = engine.collective_rpc(keys)
    with open(job["out"], "w") as file:
        json.dump(done, file)
    sys.stdout.flush()


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    main()
