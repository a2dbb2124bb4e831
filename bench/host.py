"""`python -m bench.host`: host time of a steered block's call, against a hooked block's.

Below a few hundred tokens a GPU waits for Python, so host time matters. It is measured up to the launch of the kernel:
on a GPU, or over the stub driver, where CPU tensors stand in for GPU tensors and no kernel runs. A layer here is
nothing but its residual add, in a model patched by `patch_model`. All contenders run in one process, in turns.

    call      one layer without gradient, as in decoding
    pass      all layers without gradient, per layer, with as much work between their adds as a decoder layer's. The
              work evicts from the processor's caches what steering uses, and its own time is subtracted.
    train     forward and backward of all layers in one graph, per layer
    grouped   one layer in `steering.batch`, with one adapter per row
    compiled  all layers under torch.compile, without gradient, per layer. `off` is the same compiled model with its
              steering off: plain adds under the same hooks and guards. The goal subtracts its time. The time that
              adapters cost as inputs of the graph counts as steering's.

The hook runs four PyTorch operations after the add: F.linear, SiLU, F.linear, add. The hook of `grouped` runs seven, of
which the first copy each row's weights. Over the stub driver all contenders' tensors are tiny: the rivals' operations
are then little but dispatch, and a result takes the CPU's allocator as little time as a GPU's caching one, whatever its
size. On a GPU each operation also costs a launch; the stub leaves launches out on both sides. A figure is the lower
decile of CPU seconds, because other load on the machine only adds time. Quote only ratios.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from . import timing
from .geometries import DTYPES, HostCase
from .goals import HOST_GOALS, host_ratio, judge
from .results import Results, Row

HOST_CONTENDERS = {
    "call": ("fused", "hook", "hook-modules", "unsteered"),
    "pass": ("fused", "hook", "hook-modules", "unsteered"),
    "train": ("fused", "hook", "hook-modules", "unsteered"),
    "grouped": ("fused", "gather-bmm", "unsteered"),
    "compiled": ("fused", "eager", "hook", "off"),
}
RIVALS_ON_HOST = {"call": "hook", "pass": "hook", "train": "hook", "grouped": "gather-bmm", "compiled": "eager"}
CALLS = 20  # calls of one sample: enough to warm the caches again after another contender's turn

Call = Callable[[], Any]


class Block(nn.Module):
    """A decoder layer that only does the last residual add."""

    def __init__(self, part: type[nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.part = part()  # patch_model takes no list of childless modules for decoder layers

    def forward(self, residual: Tensor, branch: Tensor) -> Tensor:
        hidden_states = residual + branch
        return hidden_states


class WorkingBlock(Block):
    """A decoder layer that does the work of one before the last residual add."""

    def __init__(self) -> None:
        super().__init__(Work)

    def forward(self, residual: Tensor, branch: Tensor) -> Tensor:
        self.part()
        hidden_states = residual + branch
        return hidden_states


class Work(nn.Module):
    """The host's work in a Llama layer, on tiny tensors of its own: norms, projections, attention, MLP.

    Attributes:
        clock: the clock of the measurement.
        nanoseconds: the time of all calls so far.
    """

    clock: ClassVar[Callable[[], int]] = time.thread_time_ns
    nanoseconds: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(7))
        self.register_buffer("state", torch.randn(2, 1, 8))
        for parameter in self.parameters():
            parameter.requires_grad_(False)  # not the adapter's

    @torch.no_grad()
    def forward(self) -> None:
        begin = Work.clock()
        query, key, value, out, gate, up, down = self.projections
        x = self.state
        h = self._normalised(x)
        heads = [projection(h).view(2, 1, 2, 4).transpose(1, 2) for projection in (query, key, value)]
        heads[:2] = [head * 0.5 + torch.cat((-head[..., 2:], head[..., :2]), -1) * 0.5 for head in heads[:2]]
        attention = F.scaled_dot_product_attention(*heads)
        x = x + out(attention.transpose(1, 2).reshape(2, 1, 8))
        h = self._normalised(x)
        down(F.silu(gate(h)) * up(h))
        Work.nanoseconds += Work.clock() - begin

    @staticmethod
    def _normalised(x: Tensor) -> Tensor:
        wide = x.float()
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)


class Chain(nn.Module):
    """A model of blocks. Each layer adds its own branch, or all layers add the same one."""

    def __init__(self, case: HostCase, block: type[Block] = Block) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=case.hidden, num_hidden_layers=case.layers)
        self.layers = nn.ModuleList(block() for _ in range(case.layers))

    def forward(self, inputs_embeds: Tensor, *branches: Tensor) -> Tensor:
        for place, layer in enumerate(self.layers):
            inputs_embeds = layer(inputs_embeds, branches[place if len(branches) > 1 else 0])
        return inputs_embeds


def _hidden(case: HostCase, device: torch.device, gradient: bool = False) -> Tensor:
    """Draw the hidden states of a decode step: (rows, 1, d)."""
    shape = (case.tokens, 1, case.hidden)
    return torch.randn(shape, dtype=DTYPES[case.dtype], device=device, requires_grad=gradient)


# -------------------------------------------------------------------------------------------------------------- models


def patched(case: HostCase, device: torch.device, block: type[Block] = Block) -> Chain:
    from fused_steer import SteerConfig, patch_model

    model = Chain(case, block)
    patch_model(model, SteerConfig(rank=case.rank))
    return model.to(device)


def hooked(case: HostCase, device: torch.device, modules: bool = False, block: type[Block] = Block) -> Chain:
    """Build a model with the paper's forward hook on every layer. modules: the hook calls nn.Modules, as is common."""
    model = Chain(case, block).to(device)
    options = {"dtype": DTYPES[case.dtype], "device": device}
    for layer in model.layers:
        down, up = (
            nn.Linear(a, b, bias=False, **options) for a, b in ((case.hidden, case.rank), (case.rank, case.hidden))
        )
        act = nn.SiLU()
        layer.down, layer.up = down, up  # its parameters
        w1, w2 = down.weight, up.weight

        def by_modules(_: Any, __: Any, h: Tensor, down: Any = down, up: Any = up, act: Any = act) -> Tensor:
            return h + up(act(down(h)))

        def by_functions(_: Any, __: Any, h: Tensor, w1: Tensor = w1, w2: Tensor = w2) -> Tensor:
            return h + F.linear(F.silu(F.linear(h, w1)), w2)

        layer.register_forward_hook(by_modules if modules else by_functions)
    return model


# --------------------------------------------------------------------------------------------------------- contenders


def _layer_call(model: Chain, case: HostCase, device: torch.device) -> Call:
    layer, x, branch = model.layers[0], _hidden(case, device), _hidden(case, device)

    def call(keep: Chain = model) -> Any:  # the call keeps the model alive, and with it the model's batch
        return layer(x, branch)

    return call


def _train_call(model: Chain, case: HostCase, device: torch.device) -> Call:
    x = _hidden(case, device, gradient=True)
    branches = [_hidden(case, device, gradient=True) for _ in model.layers]
    leaves = [x, *branches, *model.parameters()]
    grad = torch.ones_like(x)
    return lambda: torch.autograd.grad(model(x, *branches), leaves, grad)


def _pass_call(model: Chain, case: HostCase, device: torch.device) -> Call:
    x, branch = _hidden(case, device), _hidden(case, device)
    return lambda: model(x, branch)


def _block_contenders(
    call: Callable[[Chain, HostCase, torch.device], Call],
    case: HostCase,
    device: torch.device,
    block: type[Block] = Block,
) -> dict[str, Call]:
    return {
        "fused": call(patched(case, device, block), case, device),
        "hook": call(hooked(case, device, block=block), case, device),
        "hook-modules": call(hooked(case, device, modules=True, block=block), case, device),
        "unsteered": call(Chain(case, block).to(device), case, device),
    }


def gathered(case: HostCase, device: torch.device) -> Chain:
    """Build a model with hooks that copy each row's weights: two gathers and two batched products."""
    dtype = DTYPES[case.dtype]
    model = Chain(case).to(device)
    ids = torch.arange(case.tokens, device=device) % case.adapters
    for layer in model.layers:
        downs = torch.randn(case.adapters, case.rank, case.hidden, dtype=dtype, device=device)
        ups = torch.randn(case.adapters, case.hidden, case.rank, dtype=dtype, device=device)

        def gather(_: Any, __: Any, h: Tensor, downs: Tensor = downs, ups: Tensor = ups) -> Tensor:
            a = torch.bmm(downs[ids], h.view(-1, case.hidden, 1))
            return h + torch.bmm(ups[ids], F.silu(a)).view(h.shape)

        layer.register_forward_hook(gather)
    return model


def _grouped_contenders(case: HostCase, device: torch.device) -> dict[str, Call]:
    from fused_steer import SteerConfig

    model = patched(case, device)
    names = ["default", *(str(number) for number in range(1, case.adapters))]
    for name in names[1:]:
        model.steering.add(name, SteerConfig(rank=case.rank))
    model.batch = model.steering.batch([names[row % len(names)] for row in range(case.tokens)])
    model.batch.__enter__()  # lasts as long as the model
    model(_hidden(case, device), _hidden(case, device))  # the first pass prepares the batch for all layers
    return {
        "fused": _layer_call(model, case, device),
        "gather-bmm": _layer_call(gathered(case, device), case, device),
        "unsteered": _layer_call(Chain(case), case, device),
    }


def _compiled_contenders(case: HostCase, device: torch.device) -> dict[str, Call]:
    x, branch = _hidden(case, device), _hidden(case, device)
    model, hook = patched(case, device), hooked(case, device)
    torch.compiler.config.force_disable_caches = True  # type: ignore[attr-defined]  # no code that older sources left
    compiled = torch.compile(patched(case, device), fullgraph=True, dynamic=False)
    off = patched(case, device)
    off.context = off.steering.disabled()
    off.context.__enter__()  # lasts as long as the model
    plain = torch.compile(off, fullgraph=True, dynamic=False)
    return {
        "fused": lambda: compiled(x, branch),
        "eager": lambda: model(x, branch),
        "hook": lambda: hook(x, branch),
        "off": lambda: plain(x, branch),
    }


_MAKERS: dict[str, Callable[[HostCase, torch.device], dict[str, Call]]] = {
    "call": functools.partial(_block_contenders, _layer_call),
    "pass": functools.partial(_block_contenders, _pass_call, block=WorkingBlock),
    "train": functools.partial(_block_contenders, _train_call),
    "grouped": _grouped_contenders,
    "compiled": _compiled_contenders,
}


# ------------------------------------------------------------------------------------------------------------- measure


def count_launches(call: Call, device: torch.device) -> int | None:
    """Count the kernels that a call launches: all on a GPU, only Triton's over the stub driver, else None."""
    from .stub import active

    stub = active()
    if stub is None:
        return timing.count_launches(call, device)
    with stub.launched() as launched:
        call()
    return len(launched)


def interleave(calls: dict[str, Call], device: torch.device, rounds: int, number: int) -> dict[str, list[float]]:
    """Measure the CPU seconds of each call, with the calls in turns.

    On a CPU the clock is this thread's. On a GPU it is the process's, because the backward runs in another thread. The
    time of `Work` does not count.
    """
    clock = Work.clock = time.process_time_ns if device.type == "cuda" else time.thread_time_ns
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3 * number):
            call()
    timing.synchronize(device)
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for name in timing.in_turn(list(calls), turn):
                call = calls[name]
                begin = clock() - Work.nanoseconds
                for _ in range(number):
                    call()
                samples[name].append((clock() - Work.nanoseconds - begin) / number / 1e9)
                timing.synchronize(device)
    finally:
        gc.enable()
    return samples


def measure_host(case: HostCase, what: str, device: torch.device, rounds: int = 150) -> list[Row]:
    """Measure the host time of one kind of call for each contender. On a CPU this needs the stub driver.

    There hidden size, rank and dtype of the case are replaced by 8, 2 and float32.

    Raises:
        ValueError: there is no such kind of call.
    """
    if what not in _MAKERS:
        raise ValueError(f"what is {what!r}; expected one of {', '.join(_MAKERS)}")
    if device.type == "cpu":
        case = replace(case, hidden=8, rank=2, dtype="float32")
    whole = what in ("pass", "train", "compiled")  # a call of all layers
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with contextlib.nullcontext() if what == "train" else torch.no_grad():
            calls = _MAKERS[what](case, device)
            for call in calls.values():
                call()  # compiles
            launches = {name: count_launches(call, device) for name, call in calls.items()}
            samples = interleave(calls, device, rounds, CALLS)
    finally:
        torch.set_num_threads(threads)
    rows = []
    for name in HOST_CONTENDERS[what]:
        layers = case.layers if whole else 1
        rows.append(Row("host", what, name, asdict(case), [s / layers for s in samples[name]], launches=launches[name]))
    return rows


def lines(results: Results) -> list[str]:
    """Return the lines of the table of ratios, and a line for each goal."""
    found = [f"{'':10} {'':14} {'µs':>8} {'x rival':>8} {'launches':>9}"]
    for what in HOST_CONTENDERS:
        for row in results.rows:
            if row.what == what:
                ratio = host_ratio(results, what, row.contender, RIVALS_ON_HOST[what])
                share = "-" if ratio is None else f"{ratio:.2f}"
                launches = "-" if row.launches is None else row.launches
                seconds = row.quantile(0.1)
                assert seconds is not None
                found.append(f"{what:10} {row.contender:14} {1e6 * seconds:8.2f} {share:>8} {launches:>9}")
    for goal in judge(HOST_GOALS, results):
        value = "-" if goal.value is None else f"{goal.value:.2f}"
        met = {True: "met", False: "NOT MET", None: "not measured"}[goal.met]
        found.append(f"{goal.name:15} {value:>6} {goal.limit:>8}  {met:<12} {goal.text}")
    return found


def main(
    what: Annotated[
        list[str] | None, typer.Argument(help=f"Some of {', '.join(HOST_CONTENDERS)}. Default: all.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Number of samples of each contender.")] = 150,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON instead of the table.")] = False,
) -> None:
    """Measure the host time of a block's call, on a GPU or over the stub driver."""
    if torch.cuda.is_available():
        device, kind = torch.device("cuda", torch.cuda.current_device()), "gpu"
    else:
        from fused_steer.kernels.numerics import INTERPRETED

        if INTERPRETED:
            typer.echo("bench.host: kernels are interpreted here; run `python -m bench.stub -m bench.host`", err=True)
            raise typer.Exit(1)
        from .stub import arm

        try:
            arm()
        except RuntimeError as error:
            typer.echo(f"bench.host: {error}", err=True)
            raise typer.Exit(1) from None
        device, kind = torch.device("cpu"), "stub"
    results = Results({"kind": kind})
    try:
        for each in what or HOST_CONTENDERS:
            results.rows += measure_host(HostCase(), each, device, rounds)
    except ValueError as error:
        typer.echo(f"bench.host: {error}", err=True)
        raise typer.Exit(1) from None
    if as_json:
        json.dump([asdict(row) for row in results.rows], sys.stdout)
    else:
        where = "a GPU" if kind == "gpu" else "the stub driver: executed on the host, no kernel ran"
        typer.echo("\n".join([f"host time over {where}", *lines(results)]))


if __name__ == "__main__":
    typer.run(main)
