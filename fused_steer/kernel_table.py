"""The verb `kernels`: what each kernel costs on each target, compiled ahead of time, and the least time of a pass.

Nothing here needs a GPU. Heavy imports are inside functions, as the command line starts without them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from .kernels.aot import Case
    from .kernels.launch import Launch

_MAX_HIDDEN, _MAX_TOKENS = 1 << 20, (1 << 31) - 1  # the kernels count both in 32 bits

DTYPES = ("bfloat16", "float16", "float32")


def _post_block(case: Case, target: str) -> dict[str, list[Launch]]:
    from .kernels.aot import record_passes

    return record_passes(case, target)


#: The ops: how the launches of each of their passes are recorded.
OPS: dict[str, Callable[[Case, str], dict[str, list[Launch]]]] = {"post_block": _post_block}


@dataclass(frozen=True)
class Request:
    """What is asked for: an op of `OPS` at d = `hidden`, r = `rank`, a dtype of `DTYPES`, for each N of `tokens` and
    each target; no target is all of them."""

    op: str
    hidden: int
    rank: int
    dtype: str
    tokens: tuple[int, ...]
    targets: tuple[str, ...] = ()

    def validate(self) -> None:
        """
        Raises:
            ValueError: what is asked for is not there, or out of range.
        """
        from .kernels import MAX_RANK
        from .kernels.schedule import TARGETS

        for name, value, known in (
            ("op", self.op, OPS),
            ("dtype", self.dtype, DTYPES),
            *(("target", target, TARGETS) for target in self.targets),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")
        for name, number, least, most in (
            ("hidden", self.hidden, 1, _MAX_HIDDEN),
            ("rank", self.rank, 0, MAX_RANK),
            *(("tokens", count, 1, _MAX_TOKENS) for count in self.tokens),
        ):
            if not least <= number <= most:
                raise ValueError(f"{name} is {number}; expected {least} to {most}")


def describe_kernels(request: Request) -> dict[str, Any]:
    """The kernels of `request` and the floors of its passes, as JSON has them.

    `kernels`: a row for each launch that each target would make, with its grid, its blocks and what it uses (see
    `kernels.aot.Resources`). `floors`: for each number of tokens, pass and GPU the units (hidden states read or
    written), their bytes, and the seconds that these take at least.

    Raises:
        ValueError: as `Request.validate`.
        RuntimeError: kernels are interpreted here, or a compiler's report is unreadable.
    """
    request.validate()
    import torch

    from .kernels.aot import GPUS, Case, compile_launch, hidden_states, time_floor
    from .kernels.schedule import TARGETS

    passes_of = OPS[request.op]
    kernels, floors = [], []
    for tokens in request.tokens:
        case = Case(tokens, request.hidden, request.rank, getattr(torch, request.dtype))
        for target in request.targets or TARGETS:
            for name, launches in passes_of(case, target).items():
                for launch in launches:
                    plan = launch.schedule
                    layout = {
                        "grid": list(launch.grid),
                        "block_n": plan.block_n,
                        "block_d": plan.block_d,
                        "block_r": plan.block_r,
                        "num_stages": plan.num_stages,
                        "units": len(hidden_states(launch)),
                    }
                    used = asdict(compile_launch(launch, target))
                    kernels.append({"target": target, "tokens": tokens, "pass": name, **layout, **used})
        for gpu, (target, _) in GPUS.items():
            for name, launches in passes_of(case, target).items():
                states = [state for launch in launches for state in hidden_states(launch).values()]
                floors.append(
                    {
                        "tokens": tokens,
                        "pass": name,
                        "gpu": gpu,
                        "units": len(states),
                        "bytes": sum(state.nbytes for state in states),
                        "seconds": time_floor(launches, gpu),
                    }
                )
    asked = {"op": request.op, "hidden": request.hidden, "rank": request.rank, "dtype": request.dtype}
    return {**asked, "kernels": kernels, "floors": floors}


def _table(*columns: str, left: int) -> Table:
    """A table of `columns`, the first `left` of them text, the rest numbers; narrow, to fit in 80 characters."""
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=True)
    return table


def _kernel_table(rows: list[dict[str, Any]]) -> Table:
    columns = ("regs", "spill", "smem", "occ", "ld128", "st128", "b16", "async", "mma", "local")
    table = _table("target", "kernel", "grid", *columns, left=3)
    for row in rows:
        table.add_row(
            row["target"],
            row["kernel"].removesuffix("_kernel"),
            "x".join(map(str, row["grid"])),
            str(row["registers"]),
            str(row["spills"]),
            f"{-(-row['shared'] // 1024)}K",
            f"{row['occupancy']:.0%}",
            str(row["loads_128"] + row["async_copies_128"]),
            str(row["stores_128"]),
            str(row["loads_16"] + row["stores_16"]),
            str(row["async_copies"]),
            str(row["tensor_core"]),
            str(row["local_accesses"]),
        )
    return table


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.3g}" if seconds < 1e-3 else f"{seconds * 1e6:,.0f}"


def _floor_table(floors: list[dict[str, Any]]) -> Table:
    """One row a pass, one column a GPU."""
    gpus = dict.fromkeys(floor["gpu"] for floor in floors)
    table = _table("N", "pass", "units", *(f"{gpu} µs" for gpu in gpus), left=2)
    seconds = {(floor["tokens"], floor["pass"], floor["gpu"]): floor["seconds"] for floor in floors}
    units = {(floor["tokens"], floor["pass"]): floor["units"] for floor in floors}
    for (tokens, name), count in units.items():
        times = (_microseconds(seconds[tokens, name, gpu]) for gpu in gpus)
        table.add_row(str(tokens), name, str(count), *times)
    return table


def print_kernels(description: dict[str, Any], console: Console) -> None:
    """Print what `describe_kernels` found: a table for each number of tokens, and the floors."""
    what = "{op}: d = {hidden}, r = {rank}, {dtype}".format(**description)
    for tokens in dict.fromkeys(row["tokens"] for row in description["kernels"]):
        console.print(f"{what}, N = {tokens} tokens")
        console.print(_kernel_table([row for row in description["kernels"] if row["tokens"] == tokens]))
    console.print(
        "smem: shared memory of a program; occ: resident warps, of the most there can be;\n"
        "ld128, st128: global accesses of 128 bits, async ones included; b16: of 16 bits;\n"
        "async: copies to shared memory; mma: tensor cores; local: spill traffic.\n"
        "Instructions are counted as they stand in the code, not as often as they run.\n"
    )
    console.print("The least time of a pass: its hidden states' bytes at the datasheet's bandwidth")
    console.print(_floor_table(description["floors"]))
