"""vLLM engines in processes of their own, which answer the same requests in turn."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any


@dataclass(frozen=True)
class Ask:
    """A request to an engine.

    Attributes:
        prompt: token ids.
        adapter: a name for vLLM, or None.
        path: the adapter's directory, or None.
        extra: vLLM's `extra_args` of the request.
    """

    prompt: Sequence[int]
    adapter: str | None = None
    path: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


class Engine:
    """A vLLM engine in a separate process, with its own environment variables."""

    def __init__(self, options: dict[str, Any], environment: Mapping[str, str]) -> None:
        """
        Args:
            options: arguments of vLLM's `LLM`.
            environment: variables that are set before vLLM is imported.
        """
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, options, dict(environment)))
        self._process.start()
        theirs.close()

    def wait(self) -> None:
        """Wait until the engine is ready.

        Raises:
            RuntimeError: the engine could not be started.
        """
        try:
            self._receive()
        except RuntimeError as error:
            raise RuntimeError(f"vLLM did not start: {error}") from None

    def answer(self, requests: Sequence[Ask], new_tokens: int) -> tuple[list[list[int]], float]:
        """Generate greedy continuations of one batch; return the tokens and the seconds."""
        return self._call("answer", requests, new_tokens)

    def forget_prompts(self) -> None:
        """Empty the cache of prompts' blocks."""
        self._call("forget_prompts")

    def unload(self, adapter: str) -> bool:
        """Unload the adapter of this name. Return whether vLLM had loaded it."""
        return self._call("unload", adapter)

    def graphs(self) -> int:
        """Return the number of CUDA graphs that the engine's first worker has captured."""
        return self._call("graphs")

    def close(self) -> None:
        if self._process.is_alive():
            try:
                self._pipe.send(None)
            except OSError:
                pass
            self._process.join(60)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _call(self, method: str, *arguments: Any) -> Any:
        self._pipe.send((method, arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            found, problem = self._pipe.recv()
        except EOFError:
            raise RuntimeError("vLLM's process is gone; expected an answer (its own output says why)") from None
        if problem:
            raise RuntimeError(problem)
        return found


# ---------------------------------------------------------------------------------------------- in an engine's process


def _serve(pipe: Connection, options: dict[str, Any], environment: dict[str, str]) -> None:
    """Start vLLM; answer calls of `_Served`'s methods until None comes. Each answer is (result, error)."""
    os.environ.update(environment)
    served: Any = None
    try:
        served = _Served(options)
    except Exception as error:  # the main process must hear of any error
        pipe.send((None, _in_words(error)))
        return
    pipe.send((None, ""))
    while (called := pipe.recv()) is not None:
        method, arguments = called
        try:
            found, problem = getattr(served, method)(*arguments), ""
        except Exception as error:  # a refused request; the engine may go on
            found, problem = None, _in_words(error)
        pipe.send((found, problem))
    served.engine.llm_engine.engine_core.shutdown()


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class _Served:
    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM

        self.engine: Any = LLM(**options)
        self._numbers: dict[str, int] = {}

    def answer(self, requests: Sequence[Ask], new_tokens: int) -> tuple[list[list[int]], float]:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        inputs = [{"prompt_token_ids": list(one.prompt)} for one in requests]
        greedy = {"temperature": 0, "max_tokens": new_tokens, "ignore_eos": True, "detokenize": False}
        parameters = [SamplingParams(**greedy, extra_args=dict(one.extra) or None) for one in requests]
        adapters: Any = [
            None if one.adapter is None else LoRARequest(one.adapter, self._number(one.adapter), one.path)
            for one in requests
        ]
        if not any(adapters):  # an engine without LoRA takes no list of None
            adapters = None
        begin = time.perf_counter()
        outputs = self.engine.generate(inputs, parameters, lora_request=adapters, use_tqdm=False)
        seconds = time.perf_counter() - begin
        return [list(output.outputs[0].token_ids) for output in outputs], seconds

    def _number(self, adapter: str) -> int:
        return self._numbers.setdefault(adapter, len(self._numbers) + 1)

    def forget_prompts(self) -> None:
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its cache of prompts; expected no request to run")

    def unload(self, adapter: str) -> bool:
        return bool(self.engine.llm_engine.remove_lora(self._number(adapter)))

    def graphs(self) -> int:
        return int(self.engine.collective_rpc(_captured)[0])


def _captured(worker: Any) -> int:
    from vllm.compilation.counter import compilation_counter

    return compilation_counter.num_cudagraph_captured
