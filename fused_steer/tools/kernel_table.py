"""`fused-steer kernels`: the resources of each kernel, compiled ahead of time, and the predicted time of a pass.

Nothing here needs a GPU. Heavy imports are inside functions, because the command starts without them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console

    from ..kernels.launch import Launch


_MAX_HIDDEN, _MAX_TOKENS = 1 << 20, (1 << 31) - 1  # the kernels count both in 32 bits

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Request:
    """The arguments of `fused-steer kernels`: shapes of `post_block`, targets and GPUs.

    Attributes:
        hidden: d.
        rank: r.
        dtype: one of `DTYPES`.
        tokens: each number of tokens N.
        targets: compilation targets. Empty means `TARGETS`.
        gpus: GPUs of `GPUS` to predict for. None means every GPU with one of the targets.
        norm: whether the RMSNorm that follows is computed too, by `post_block_norm`.
    """

    hidden: int
    rank: int
    dtype: str
    tokens: tuple[int, ...]
    targets: tuple[str, ...] = ()
    gpus: tuple[str, ...] | None = None
    norm: bool = False

    def validate(self) -> None:
        """Check that every name is known and every number in range.

        Raises:
            ValueError: a name is unknown, or a number is out of range.
        """
        from ..kernels import MAX_RANK
        from ..kernels.aot import ALL_TARGETS, GPUS

        for name, value, known in (
            ("dtype", self.dtype, DTYPES),
            *(("target", target, ALL_TARGETS) for target in self.targets),
            *(("gpu", gpu, GPUS) for gpu in self.gpus or ()),
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
    """Compile the kernels of `request` and predict its passes. Returns JSON data.

    Returns:
        A dict with these entries.
        `kernels`: a row for each launch on each target, with its grid, blocks, used resources (`kernels.aot.Resources`)
            and work (`l2_bytes`, `memory_bytes`, `fill`, `series`: see `kernels.predict`).
        `cannot`: what each of the smaller targets lacks.
        `predictions`: for each number of tokens, pass and GPU the seconds and each limit's share of them, in total and
            for each launch.
        `floors`: the number of hidden states read or written (`units`), their bytes, and the least seconds for these.

    Raises:
        ValueError: see `Request.validate`.
        RuntimeError: kernels are interpreted here, or a compiler's report is unreadable.
    """
    request.validate()
    import torch

    from ..kernels.aot import CANNOT, GPUS, Case, record_norm_passes, record_passes
    from ..kernels.schedule import FEW_TOKENS, TARGETS

    def passes(case: Case, target: str) -> dict[str, list[Launch]]:
        if not request.norm:
            return record_passes(case, target)
        found = record_norm_passes(case, target)
        return {name.replace("_", " "): found[name] for name in ("forward", "backward", "in_turn") if name in found}

    targets = request.targets or tuple(TARGETS)
    gpus = tuple(gpu for gpu in GPUS if GPUS[gpu][0] in targets) if request.gpus is None else request.gpus
    kernels, predictions, floors = [], [], []
    for tokens in request.tokens:
        # Fewer tokens are a decoding step, which keeps nothing for a backward.
        case = Case(
            tokens, request.hidden, request.rank, getattr(torch, request.dtype), keeps_a=tokens > FEW_TOKENS
        )  # fmt: skip
        for target in targets:
            for name, launches in passes(case, target).items():
                if name != "in turn":  # the op does not launch it
                    kernels += [{"tokens": tokens, "pass": name, **row} for row in _kernel_rows(launches, target)]
        for gpu, (target, _) in GPUS.items():
            for name, launches in passes(case, target).items():
                what = {"tokens": tokens, "pass": name, "gpu": gpu}
                if gpu in gpus:
                    predictions.append({**what, **_prediction(launches, gpu)})
                floors.append({**what, **_floor(launches, gpu)})
    asked = {name: getattr(request, name) for name in ("hidden", "rank", "dtype", "norm")}
    cannot = {target: CANNOT[target] for target in targets if target in CANNOT}
    return {**asked, "kernels": kernels, "cannot": cannot, "predictions": predictions, "floors": floors}


def _kernel_rows(launches: list[Launch], target: str) -> list[dict[str, Any]]:
    from ..kernels.aot import compile_all, hidden_states
    from ..kernels.predict import fill, l2_bytes, memory_bytes, work

    rows = []
    compiled = compile_all(launches, target)
    for launch, moved, used in zip(launches, memory_bytes(launches, target), compiled, strict=True):
        plan = launch.schedule
        layout = {
            "target": target,
            "grid": list(launch.grid),
            "block_n": plan.constants.get("BLOCK_N", 0),  # the kernel that packs weights has no rows
            "block_d": plan.constants["BLOCK_D"],
            "block_r": plan.constants.get("BLOCK_R", 0),  # at rank 0 the kernel has no such block
            "num_stages": plan.num_stages,
            "units": len(hidden_states(launch)),
        }
        done = {
            "l2_bytes": int(l2_bytes(launch)),
            "memory_bytes": int(moved),
            "fill": fill(launch, target),
            "series": work(launch).series,
        }
        rows.append({**layout, **done, **asdict(used)})
    return rows


def _prediction(launches: list[Launch], gpu: str) -> dict[str, Any]:
    from ..kernels.predict import predict

    found = predict(launches, gpu)
    each = [
        {"kernel": launch.kernel, "binds": launch.binds, "busy": launch.busy, **asdict(launch.times)}
        for launch in found.launches
    ]
    totals = {"seconds": found.seconds, "floors": found.floors, "binds": found.binds, **asdict(found.times)}
    return {**totals, "launches": each}


def _floor(launches: list[Launch], gpu: str) -> dict[str, Any]:
    from ..kernels.aot import hidden_states, time_floor

    states = [state for launch in launches for state in hidden_states(launch).values()]
    size = sum(state.nbytes for state in states)
    return {"units": len(states), "bytes": size, "seconds": time_floor(launches, gpu)}


def _table(*columns: str, left: int) -> Table:
    """Return a table of `columns` for 80 characters. The first `left` columns hold text, the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=True)
    return table


def _short(kernel: str) -> str:
    name = kernel.removeprefix("post_block_").removesuffix("_kernel")
    return name.replace("norm_bwd_", "norm_").replace("add_partial_sums", "add_sums")  # 80 columns are few


def _kernel_table(rows: list[dict[str, Any]]) -> Table:
    columns = ("regs", "spill", "smem", "occ", "ld128", "st128", "b16", "async", "mma", "local")
    table = _table("target", "kernel", "grid", *columns, left=3)
    for row in rows:
        table.add_row(
            row["target"],
            _short(row["kernel"]),
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


def _work_table(rows: list[dict[str, Any]]) -> Table:
    table = _table("target", "kernel", "L2 MB", "memory MB", "waves", "series", left=2)
    for row in rows:
        table.add_row(
            row["target"],
            _short(row["kernel"]),
            f"{row['l2_bytes'] / 1e6:.3g}",
            f"{row['memory_bytes'] / 1e6:.3g}",
            f"{row['fill']:.0%}",
            str(row["series"]),
        )
    return table


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.3g}" if seconds < 1e-3 else f"{seconds * 1e6:,.0f}"


def _floor_table(floors: list[dict[str, Any]]) -> Table:
    """Return the table of floors, with a row for each pass and a column for each GPU."""
    gpus = dict.fromkeys(floor["gpu"] for floor in floors)
    table = _table("N", "pass", "units", *(f"{gpu} µs" for gpu in gpus), left=2)
    seconds = {(floor["tokens"], floor["pass"], floor["gpu"]): floor["seconds"] for floor in floors}
    units = {(floor["tokens"], floor["pass"]): floor["units"] for floor in floors}
    for (tokens, name), count in units.items():
        times = (_microseconds(seconds[tokens, name, gpu]) for gpu in gpus)
        table.add_row(str(tokens), name, str(count), *times)
    return table


def _prediction_table(predictions: list[dict[str, Any]]) -> Table:
    limits = {"memory": "memory", "l2": "L2", "issue": "issue", "host": "host"}
    table = _table("GPU", "N", "pass", *limits.values(), "µs", "floors", "binds", left=3)
    for row in predictions:
        table.add_row(
            row["gpu"],
            str(row["tokens"]),
            row["pass"],
            *(_microseconds(row[limit]) for limit in limits),
            _microseconds(row["seconds"]),
            f"{row['floors']:.3g}",
            limits[row["binds"]],
        )
    return table


def print_kernels(description: dict[str, Any], console: Console) -> None:
    """Print the result of `describe_kernels`: two tables for each number of tokens, the predictions and the floors."""
    op = "post_block_norm" if description["norm"] else "post_block"
    what = "{}: d = {hidden}, r = {rank}, {dtype}".format(op, **description)
    for tokens in dict.fromkeys(row["tokens"] for row in description["kernels"]):
        rows = [row for row in description["kernels"] if row["tokens"] == tokens]
        console.print(f"{what}, N = {tokens} tokens")
        console.print(_kernel_table(rows))
        console.print(_work_table(rows))
    console.print(
        "smem: shared memory of a program; occ: resident warps, of the most there can be;\n"
        "ld128, st128: global accesses of 128 bits, async ones included; b16: of 16 bits;\n"
        "async: copies to shared memory; mma: tensor cores; local: spill traffic.\n"
        "Instructions are counted as they stand in the code, not as often as they run.\n"
        "L2: bytes that L2 sends to the multiprocessors; memory: bytes of device memory;\n"
        "waves: how full they are; series: loop trips of a program, one after the other.\n"
    )
    for target, line in description["cannot"].items():
        console.print(f"{target}: {line}\n")
    if description["predictions"]:
        console.print("Predicted, not measured: an uncalibrated model; an H100 took up to twice as long")
        console.print(_prediction_table(description["predictions"]))
        console.print(
            "memory, L2, issue, host: µs that each limit alone would take; host: the launches'\n"
            "starts in a captured graph. µs: of each launch the longest of the first three, and\n"
            "the starts. floors: the same without the starts, over the time that each hidden\n"
            "state takes once through memory, at 90 % of the datasheet's bandwidth.\n"
        )
    if any(row["pass"] == "in turn" for row in description["floors"]):
        console.print(
            "in turn: the norm's backward and then post_block's, the form of the backward\n"
            "that the op does not take here (docs/speed.md).\n"
        )
    console.print("The least time of a pass: its hidden states' bytes at the datasheet's bandwidth")
    console.print(_floor_table(description["floors"]))
