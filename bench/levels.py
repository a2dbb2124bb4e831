"""The measurements of the op, of models and of memory, from a case to rows of results.

`pytest bench` and `bench.gpu` share them.
"""

from __future__ import annotations

import contextlib
import gc
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from . import timing
from .contenders import (
    MODEL_CONTENDERS,
    OP_CONTENDERS,
    OpContender,
    Operands,
    absent,
    build,
    copy_of,
    make_operands,
    op_errors,
    plain,
)
from .geometries import FEW_LAYERS_VOCABULARY, GEOMETRIES, ModelCase, OpCase
from .results import Row
from .timing import Timed

OP_PASSES = ("forward", "backward", "both")
MODEL_RUNS = ("train", "prefill", "decode", "decode-graph")
LITTLE = 6 << 30  # bytes: CUDA's context, workspaces and inputs of the op are within it
FLOOR_UNITS = {"forward": 3, "backward": 3, "both": 6}  # of N × d tensors through device memory


def l2_bytes(device: torch.device) -> int:
    """Return the size of the L2 cache; 0 on a CPU, where no kernel is timed."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def in_words(error: BaseException) -> str:
    """Return an error as a row's status. Where memory ran out, it says who has the GPU's memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory{': ' + memory_in_words() if torch.cuda.is_available() else ''}"
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def memory_in_words() -> str:
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    parts = (total, torch.cuda.memory_allocated(), reserved, total - free - reserved)
    has, live, ours, others = (f"{nbytes / 2**30:.1f}" for nbytes in parts)
    words = f"of {has} GiB PyTorch has {ours} ({live} in tensors), others in and beside this process {others}"
    return words + "".join(f"; {line}" for line in _processes())


def _processes() -> list[str]:
    """Return a line for each process on the GPU, such as "process 123 uses 512.000 MB"; none without NVML."""
    try:
        listed = torch.cuda.list_gpu_processes()
    except Exception:  # NVML may fail in any way, and this only explains another failure
        return []
    return [" ".join(line.split()) for line in listed.splitlines() if line.startswith("process")][:4]


def left_in_words(device: torch.device) -> list[str]:
    """Say who has memory of the GPU between steps, when a step has freed its own; nothing if it is little."""
    if device.type != "cuda":
        return []
    free, total = torch.cuda.mem_get_info()
    return [f"left: {memory_in_words()}"] if total - free > LITTLE else []


def forgotten(error: BaseException) -> str:
    """Return an error as a row's status, and free what its traceback's frames hold, such as a model."""
    words = in_words(error)
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen.__traceback__ = None
        seen = seen.__cause__ or seen.__context__
    return words


def release(device: torch.device) -> None:
    """Free the memory of the last case."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def take_samples(
    ready: Sequence[Timed], rows: dict[str, Row], device: torch.device, rounds: int, before: timing.Call | None = None
) -> None:
    """Time the prepared contenders, interleaved, and put the samples into their rows."""
    timing.interleave(ready, device, rounds, before=before)
    for timed in ready:
        rows[timed.name].samples, rows[timed.name].replayed = timed.samples, timed.replayed


# ----------------------------------------------------------------------------------------------------------------- op


def check_op(case: OpCase, what: str, names: Sequence[str], device: torch.device) -> dict[str, str]:
    """Return the contenders that compute a wrong result: name -> the problem.

    The error from float64 must be at most twice the eager hook's in the same dtype, plus 1e-6. The output is checked
    and, if a backward pass is timed, every gradient.
    """
    wrong = {}
    for name in dict.fromkeys(names):
        contender = OP_CONTENDERS[name]
        if not contender.steers or name.endswith("-again"):
            continue
        try:
            errors = op_errors(case, contender, device, gradients=what != "forward")
        except Exception as error:  # a rival may fail in any way, and the run goes on
            wrong[name] = forgotten(error)
        else:
            too_far = [(ours, hook) for ours, hook in errors if not ours <= 2 * hook + 1e-6]  # NaN too
            if too_far:
                ours, hook = too_far[0]
                wrong[name] = f"wrong: relative error {ours:.2e}; expected at most twice the hook's, {hook:.2e}"
    return _again_too(wrong, names)


def _again_too(wrong: dict[str, str], names: Sequence[str]) -> dict[str, str]:
    """Copy the problem of each contender to its `-again` row, the second timing of the same code."""
    return {name: wrong[name.removesuffix("-again")] for name in names if name.removesuffix("-again") in wrong}


def op_calls(case: OpCase, what: str, contender: OpContender, sets: Sequence[Operands]) -> list[timing.Call]:
    """Return one call per set of operands for one contender. For `backward` the forward has already run."""
    function = contender.call()
    if not contender.steers:
        return [_floor_call(what, function, x) for x in sets]
    return [_op_call(what, function, plain(case, contender, x)) for x in sets]


def _floor_call(what: str, function: Callable[[Operands], Tensor], x: Operands) -> timing.Call:
    """Return a call of the floor. One add is the floor of either pass: two tensors read, one written."""

    def call() -> list[Tensor]:
        return [function(x) for _ in range(2 if what == "both" else 1)]

    return call


def _op_call(what: str, function: Callable[[Operands], Tensor], x: Operands) -> timing.Call:
    if what == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return function(x)

        return forward
    x, leaves = x.with_leaves()
    if what == "backward":
        out = function(x)
        return lambda: torch.autograd.grad(out, leaves, x.grad, retain_graph=True)
    return lambda: torch.autograd.grad(function(x), leaves, x.grad)


def measure_op(
    case: OpCase, what: str, device: torch.device, names: Sequence[str], rounds: int = 20, count: bool = True
) -> list[Row]:
    """Time one pass of the op for all contenders, interleaved.

    A contender that cannot run, or computes a wrong result, gets a row that says so. count: also count launches, which
    takes longer than the timing.
    """
    rows = {name: Row("op", what, name, asdict(case)) for name in names}
    for name, problem in check_op(case, what, names, device).items():
        rows[name].status = problem
    try:
        sets_of = timing.input_sets((2 if what == "forward" else 3) * case.unit_bytes, l2_bytes(device))
        sets = [make_operands(case, device, seed) for seed in range(sets_of)]
    except torch.OutOfMemoryError as error:
        for row in rows.values():
            row.status = forgotten(error)
        return list(rows.values())
    on_gpu = device.type == "cuda"
    # Autograd runs a backward pass on the stream of its forward, so the forward must run on the captured stream.
    stream = torch.cuda.Stream(device) if on_gpu else None
    ready: list[Timed] = []
    for name, row in rows.items():
        if row.status != "ok":
            continue
        try:
            with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                timed = Timed(name, op_calls(case, what, OP_CONTENDERS[name], sets))
            timed.prepare(device, graph=True, stream=stream)
            row.launches = timing.count_launches(timed.calls[0], device) if count else None
        except Exception as error:  # as above
            row.status = forgotten(error)
            continue
        ready.append(timed)
    take_samples(ready, rows, device, rounds)
    return list(rows.values())


def measure_accuracy(case: OpCase, device: torch.device, draws: int = 4) -> list[Row]:
    """Measure the error from float64 over the eager hook's, pooled over draws: of the output, dx, dW1 and dW2."""
    row = Row("accuracy", "error", "fused", asdict(case))
    try:
        errors = [op_errors(case, OP_CONTENDERS["fused"], device, True, seed) for seed in range(draws)]
    except Exception as error:  # the run goes on
        row.status = forgotten(error)
        return [row]
    for of_draws in zip(*errors, strict=True):
        ours, hook = (sum(error**2 for error in side) ** 0.5 for side in zip(*of_draws, strict=True))
        row.samples.append(ours / hook)
    if not all(math.isfinite(ratio) for ratio in row.samples):
        row.samples, row.status = [], f"wrong: errors over the hook's are {row.samples}; expected finite ones"
    return [row]


# -------------------------------------------------------------------------------------------------------------- model


@dataclass
class Prepared:
    """A steered model and the call to measure. `reset` sets its cache back to the start of decoding."""

    model: Any
    call: timing.Call
    reset: timing.Call | None = None


def _vocabulary(case: ModelCase) -> int | None:
    small = GEOMETRIES[case.geometry][1]["vocab_size"] < FEW_LAYERS_VOCABULARY
    return FEW_LAYERS_VOCABULARY if case.layers and not small else None


def build_base(case: ModelCase, device: torch.device) -> Any:
    return build(case.geometry, case.layers, case.dtype, device, _vocabulary(case))


def make_tokens(case: ModelCase, model: Any, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(2, model.config.vocab_size, (case.batch, case.length), generator=generator).to(device)


def training_loss(model: Any, tokens: Tensor) -> Tensor:
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    return model(inputs_embeds=embedded, labels=tokens, use_cache=False).loss


def train_call(case: ModelCase, model: Any, device: torch.device) -> Prepared:
    """Prepare a training step: forward, loss, backward and AdamW.

    The embedded tokens require a gradient, so that the backward runs through all blocks, also in the frozen model.
    """
    tokens = make_tokens(case, model, device)
    model.train()
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0) if parameters else None

    def step() -> None:
        training_loss(model, tokens).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return Prepared(model, step)


def prefill_call(case: ModelCase, model: Any, device: torch.device) -> Prepared:
    tokens = make_tokens(case, model.eval(), device)

    @torch.no_grad()
    def prefill() -> Tensor:
        return model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits

    return Prepared(model, prefill)


def decode_call(case: ModelCase, model: Any, device: torch.device) -> Prepared:
    """Prepare a decode step: one token per row after `length` tokens, on a static cache. A CUDA graph can replay it."""
    from transformers import StaticCache

    model.eval()
    room = case.length + 64
    cache = StaticCache(config=model.config, max_cache_len=room)
    start = torch.tensor([case.length], device=device)
    token = make_tokens(case, model, device)[:, :1].contiguous()
    positions = start.expand(case.batch, 1).contiguous()
    visible = torch.ones(case.batch, 1, 1, room, dtype=torch.bool, device=device)
    # Ready-made masks: building a mask needs a length on the host, and a CUDA graph cannot wait for that.
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    masks = dict.fromkeys(kinds, visible) if "sliding_attention" in kinds else visible

    @torch.no_grad()
    def step() -> Tensor:
        return model(
            input_ids=token, position_ids=positions, cache_position=start, attention_mask=masks,
            past_key_values=cache, use_cache=True,
        ).logits  # fmt: skip

    def reset() -> None:
        for layer in cache.layers:
            length = getattr(layer, "cumulative_length", None)
            if isinstance(length, Tensor):
                length.fill_(case.length)

    step()  # allocates the cache
    reset()
    return Prepared(model, step, reset)


_CALLS = {"train": train_call, "prefill": prefill_call, "decode": decode_call, "decode-graph": decode_call}


def prepare_model(case: ModelCase, what: str, name: str, base: Any, device: torch.device) -> Prepared:
    """Copy `base`, steer the copy by the contender `name`, and prepare the call to measure.

    The copy shares the weights of `base`.

    Raises:
        ValueError: there is no such run or contender.
    """
    for kind, value, known in (("run", what, _CALLS), ("contender", name, MODEL_CONTENDERS)):
        if value not in known:
            raise ValueError(f"{kind} is {value!r}; expected one of {', '.join(known)}")
    model = MODEL_CONTENDERS[name].steer(copy_of(base), case.rank)
    return _CALLS[what](case, model, device)


def check_models(case: ModelCase, names: Sequence[str], device: torch.device) -> dict[str, str]:
    """Return the contenders that compute wrong logits: name -> the problem.

    A contender that computes the fused function must give the hook's logits on a model of two layers in float32. The
    hook must change the logits.
    """
    small = ModelCase(case.geometry, 2, 2, 17, dtype="float32", rank=case.rank)
    base = build_base(small, device)

    def logits(name: str) -> Tensor:
        return prefill_call(small, MODEL_CONTENDERS[name].steer(copy_of(base), case.rank), device).call()

    truth, unsteered = logits("hook"), logits("unsteered")
    wrong = {}
    if not (truth - unsteered).norm() > 1e-3 * unsteered.norm():
        wrong["hook"] = "wrong: it does not move the logits; expected it to steer"
    for name in dict.fromkeys(names):
        if not MODEL_CONTENDERS[name].same or name == "hook" or name.endswith("-again"):
            continue
        try:
            error = float((logits(name) - truth).norm() / truth.norm())
        except Exception as failure:  # as above
            wrong[name] = forgotten(failure)
        else:
            if not error <= 1e-3:
                wrong[name] = f"wrong: it differs from the hook by {error:.2e}; expected at most 1e-3"
    return _again_too(wrong, names)


def measure_model(
    case: ModelCase, what: str, device: torch.device, names: Sequence[str], rounds: int = 10, check: bool = True
) -> list[Row]:
    """Time one run of a model for all contenders, interleaved; for `train` also measure the memory.

    Eager runs also get rows `busy`: the time on the GPU without the gaps, which a slow host makes.

    A contender that cannot run, or computes a wrong result, gets a row that says so. The contenders share the weights
    of one model, and nothing of them is left afterwards, compiled code included.
    """
    rows = {name: Row("model", what, name, asdict(case)) for name in names}
    missing = absent()
    for name in names:
        if name in missing:
            rows[name].status = f"not run: {missing[name]}"
    present = [name for name in names if name not in missing]
    memory: list[Row] = []
    try:
        for name, problem in (check_models(case, present, device) if check else {}).items():
            rows[name].status = problem
        release(device)
        memory = _measure_present(case, what, device, [n for n in present if rows[n].status == "ok"], rows, rounds)
    except torch.OutOfMemoryError as error:
        status = forgotten(error)
        for name in present:
            if rows[name].status == "ok" and not rows[name].samples:
                rows[name].status = status
    finally:
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # compiled code may hold a model
        release(device)
    return [*rows.values(), *memory]


@dataclass
class _Ready:
    """A contender of a model that is ready to be timed, its time on the GPU, and its memory in training."""

    timed: Timed
    prepared: Prepared
    busy: float | None = None
    kept: int | None = None
    peak: int | None = None


def _get_ready(case: ModelCase, what: str, name: str, base: Any, device: torch.device) -> _Ready:
    prepared = prepare_model(case, what, name, base, device)
    one = _Ready(Timed(name, [prepared.call]), prepared)
    one.timed.prepare(device, graph=what == "decode-graph")
    if what != "decode-graph":  # a replay has no gaps
        one.busy = timing.busy_seconds(prepared.call, device)
    if what == "train":
        one.kept = kept_bytes(case, prepared.model, device)
        one.peak = timing.peak_bytes(prepared.call, device)
    return one


def _measure_present(
    case: ModelCase, what: str, device: torch.device, names: Sequence[str], rows: dict[str, Row], rounds: int
) -> list[Row]:
    """Time the contenders and put the samples into their rows; return the rows of GPU time and memory.

    All models end with this call.

    Raises:
        torch.OutOfMemoryError: the model itself does not fit, or the contenders together.
    """
    base = build_base(case, device)
    ready: list[_Ready] = []
    for name in names:
        try:
            ready.append(_get_ready(case, what, name, base, device))
        except Exception as error:  # a rival may fail in any way, and the run goes on
            rows[name].status = forgotten(error)
        if rows[name].status != "ok":
            release(device)  # after the error, which held the contender

    def reset() -> None:
        for one in ready:
            if one.prepared.reset is not None:
                one.prepared.reset()

    take_samples([one.timed for one in ready], rows, device, rounds, before=reset)
    kept = {one.timed.name: one.kept for one in ready if one.kept is not None}
    peak = {one.timed.name: one.peak for one in ready}
    busy = [
        Row("busy", what, one.timed.name, asdict(case), samples=[one.busy]) for one in ready if one.busy is not None
    ]
    return [*busy, *_memory_rows(case, base.config.num_hidden_layers, kept, peak)]


def kept_bytes(case: ModelCase, model: Any, device: torch.device) -> int:
    """Measure the bytes that one training forward keeps for its backward, in a model that `train_call` prepared."""
    tokens = make_tokens(case, model, device)
    with timing.counting_kept(model, tokens) as kept:
        loss = training_loss(model, tokens)
        nbytes = kept()
    del loss
    return nbytes


def _memory_rows(case: ModelCase, layers: int, kept: dict[str, int], peak: dict[str, int | None]) -> list[Row]:
    """Return the memory rows.

    kept: bytes kept for the backward per layer, beyond the unsteered model. peak: peak memory beyond the unsteered
    model. peak-total: peak memory.
    """
    rows = []
    if "unsteered" in kept:
        for name, nbytes in kept.items():
            rows.append(Row("memory", "kept", name, asdict(case), [(nbytes - kept["unsteered"]) / layers]))
    unsteered = peak.get("unsteered")
    if unsteered is not None:
        for name, nbytes in peak.items():
            if nbytes is not None:
                rows.append(Row("memory", "peak", name, asdict(case), [nbytes - unsteered]))
                rows.append(Row("memory", "peak-total", name, asdict(case), [nbytes]))
    return rows
