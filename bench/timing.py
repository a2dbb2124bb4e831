"""Timing of calls, and counts of launches and bytes.

A call of a few microseconds cannot be timed alone: clock, launch and a warm cache distort the time by more than that.
So a sample on a GPU is the replay of a CUDA graph of many calls. Each call reads and writes separate memory, together
more than the L2 cache. Contenders take turns within a round, so that drift affects all of them.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

MAX_SETS = 256
GRAPH_WARMUPS = 3

Call = Callable[[], Any]
T = TypeVar("T")


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def input_sets(bytes_each: int, l2: int) -> int:
    """Return the number of input sets to rotate through, so that each is out of the L2 cache when its turn comes again.

    The sets fill the cache twice. There are at least two and at most `MAX_SETS`. Very small inputs stay in the cache
    even so, as they do in a model.
    """
    return max(2, min(MAX_SETS, -(-2 * l2 // max(1, bytes_each))))


@dataclass
class Timed:
    """One contender with the calls to time.

    Attributes:
        calls: one call per set of inputs. Each returns all tensors that it wrote.
        samples: the mean seconds per call, one for each time `sample` ran.
        replayed: whether the calls are replayed from a CUDA graph.
    """

    name: str
    calls: Sequence[Call]
    samples: list[float] = field(default_factory=list)
    replayed: bool = False
    _run: Call | None = None
    _graph: Any = None  # must outlive its replays

    def prepare(self, device: torch.device, graph: bool, stream: Any = None) -> None:
        """Warm up and, with `graph` on a GPU, capture the calls into a CUDA graph.

        Raises:
            RuntimeError: the calls cannot be captured.
        """
        if not graph or device.type != "cuda":
            for call in self.calls[:GRAPH_WARMUPS]:
                call()
            synchronize(device)
            self._run = self._all
            return
        stream = stream or torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(GRAPH_WARMUPS):
                self.calls[0]()
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, stream=stream):
            outputs = self._all()
        del outputs  # the graph keeps their addresses
        self._graph, self._run, self.replayed = captured, captured.replay, True
        self._run()
        torch.cuda.synchronize(device)

    def _all(self) -> list[Any]:
        """Run all calls and return all results.

        Holding the results gives every call its own output memory. Writes to one address would stay in the cache.
        """
        return [call() for call in self.calls]

    def sample(self, device: torch.device) -> None:
        """Run all calls once and record the mean time of a call."""
        assert self._run is not None
        outputs: Any
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            outputs = self._run()
            end.record()
            end.synchronize()
            seconds = start.elapsed_time(end) / 1e3
        else:
            begin = time.perf_counter()
            outputs = self._run()
            synchronize(device)
            seconds = time.perf_counter() - begin
        del outputs  # freed after the clock has stopped
        self.samples.append(seconds / len(self.calls))


def in_turn(contenders: Sequence[T], number: int) -> list[T]:
    """Return the contenders in the random order of round `number`, so that no contender always follows the same one."""
    return random.Random(number).sample(contenders, len(contenders))


def interleave(
    timed: Sequence[Timed], device: torch.device, rounds: int, before: Call | None = None, first: int = 0
) -> None:
    """Take `rounds` samples of each contender, in turns.

    before: a call before each sample. first: the number of the first round.
    """
    for number in range(first, first + rounds):
        for one in in_turn(timed, number):
            if before is not None:
                before()
            one.sample(device)


def copy_bandwidth(device: torch.device, nbytes: int = 1 << 30, rounds: int = 20) -> float:
    """Measure the bandwidth of a copy inside the device's memory: bytes read plus bytes written, per second."""
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = Timed("copy", [lambda: target.copy_(source)])
    copy.prepare(device, graph=False)
    interleave([copy], device, rounds)
    return 2 * nbytes / sorted(copy.samples)[len(copy.samples) // 2]


def _on_device(call: Call, device: torch.device) -> list[Any]:
    """Return the profiler's events of the kernels and copies that one call runs on the GPU; none on a CPU."""
    if device.type != "cuda":
        return []
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize(device)
    on_device = torch.autograd.DeviceType.CUDA
    return [e for e in profiler.events() if e.device_type == on_device and "sync" not in e.name.lower()]


def count_launches(call: Call, device: torch.device) -> int | None:
    """Count the kernels and copies that one call launches, by the profiler; None on a CPU, or if it sees none."""
    return len(_on_device(call, device)) or None


def busy_seconds(call: Call, device: torch.device) -> float | None:
    """Return the time that one call's kernels and copies take on the GPU, without the gaps; None on a CPU."""
    return sum(event.device_time for event in _on_device(call, device)) / 1e6 or None


def launch_seconds(call: Call, device: torch.device) -> list[tuple[str, float]]:
    """Return the name and the time of each kernel and copy of one call on the GPU, in order; [] on a CPU."""
    return [(event.name, event.device_time / 1e6) for event in _on_device(call, device)]


@contextmanager
def counting_kept(model: nn.Module, *inputs: Tensor) -> Iterator[Callable[[], int]]:
    """Count the bytes that autograd keeps for the backward of the code inside the `with` block.

    Each storage counts once. The model's parameters and buffers and `inputs` do not count. Exact on any machine.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *inputs)}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that its address is not reused
        return tensor.detach()  # a node that keeps its own output would keep itself, and the graph, for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(storage.nbytes() for storage in kept.values())


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Measure the peak device memory of `call`, beyond the memory allocated before it; None on a CPU."""
    if device.type != "cuda":
        return None
    call()
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
