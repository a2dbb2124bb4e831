"""`python -m bench.sweep --out DIR`: time every candidate layout of the forward on this GPU, and print the best ones.

`kernels/schedule.py` chooses a layout by rules and tables that were read off such a run. A candidate is compiled and
checked against float64 before it is timed as `bench.gpu` times the op: by a CUDA graph of many calls on separate
memory. Its time is given over that of a plain add of the same size. Compilation takes most of the minutes, in as many
processes as there are cores. `--rehearse` runs a few candidates over the stub driver, without a GPU and without
results.

With few rows a call packs the weights itself, if its layout wants them packed, as the op does. With many rows this
takes little of the time, and the weights are given packed.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from torch import Tensor

from .checkout import make_importable
from .levels import in_words, l2_bytes, release
from .results import describe_machine, file_name
from .timing import Timed, input_sets

RANKS = (1, 2, 4, 8, 16, 32, 64)
SIZES = ((16384, 4096), (16384, 2048), (4096, 4096), (4096, 2560), (4096, 2048), (4096, 1152), (512, 2048), (8, 2048))
SAMPLES = 5
WORST = 0.01  # relative error from float64 in bf16; a wrong layout gives about 1
FORMS = ("rows", "direct", "cores", "tiles")
FEW = 1024  # rows


@dataclass(frozen=True)
class Candidate:
    """A layout of the forward.

    Attributes:
        form: "rows", whole rows in registers, "direct", the same with W2 as it lies, "cores", whole rows on tensor
            cores (`bench/cores.py`; the op does not use it), or "tiles".
        rows, columns, columns_out: of a block, and of a block when writing; only "tiles" has two widths.
        warps, stages: see `kernels/schedule.py`.
        ahead, held: see `schedule.ResidentSchedule`.
        programs: programs on a multiprocessor that loop over the tiles; 0: one program for each tile.
        chunks: see `cores.Slices.ahead`.
        registers: see `cores.Slices`.
    """

    form: str
    rows: int
    columns: int
    columns_out: int
    warps: int
    stages: int = 1
    ahead: bool = False
    held: bool = False
    programs: int = 0
    chunks: int = 0
    registers: int = 0


def candidates(tokens: int, hidden: int, rank: int) -> list[Candidate]:
    """Return the candidates for a size in bf16."""
    found = []
    if rank <= 8:
        for warps in (1, 2, 4, 8):
            columns = 256 * warps  # 16 bytes for each lane
            blocks = -(-hidden // columns)
            for rows in (1, 2, 4):
                if rows * blocks * 8 <= 160 and blocks * columns <= 1.3 * max(hidden, 256):
                    found += [
                        Candidate("rows", rows, columns, columns, warps, ahead=ahead, held=held)
                        for ahead in ((False, True) if tokens <= FEW and rank * blocks * 8 <= 256 else (False,))
                        for held in ((False, True) if ahead else (False,))
                    ]
    if rank in (2, 4, 8) and tokens <= FEW:
        for warps in (1, 2, 4, 8, 16):
            for vector in (4, 8):
                columns = 32 * vector * warps
                blocks = -(-hidden // columns)
                # Twice as many weights as a thread's registers hold: half of them may wait.
                if 2 * rank * blocks * vector <= min(256, 4096 // warps) and blocks * columns < 2 * hidden:
                    held = (False, True) if 2 * rank * blocks * vector <= 128 else (False,)
                    found += [Candidate("direct", 1, columns, columns, warps, ahead=True, held=one) for one in held]
    if tokens > FEW and rank >= 4:
        from .cores import ROWS

        found += [
            Candidate("cores", ROWS, slices.columns * slices.warps, slices.columns * slices.warps, slices.warps,
                      chunks=slices.ahead, registers=slices.registers, programs=slices.programs)
            for slices in _slices(hidden, rank)
        ]  # fmt: skip
    if tokens > 64:
        tiles = {
            16: ((16, 256, 256, 4, 3), (16, 512, 256, 4, 3), (16, 256, 128, 4, 3), (16, 512, 256, 8, 3),
                 (16, 128, 128, 4, 3), (32, 128, 128, 4, 3), (32, 256, 128, 4, 3), (32, 256, 256, 8, 3)),
            32: ((16, 256, 256, 4, 3), (16, 256, 128, 4, 3), (16, 128, 128, 4, 3), (32, 128, 128, 4, 3),
                 (32, 128, 128, 8, 3), (64, 64, 64, 4, 4)),
            64: ((64, 64, 64, 4, 4), (16, 128, 128, 4, 3), (32, 128, 128, 4, 3), (32, 128, 128, 8, 3),
                 (64, 64, 64, 8, 3), (128, 64, 64, 8, 3)),
        }[max(16, 1 << (rank - 1).bit_length())]  # fmt: skip
        found += [
            Candidate("tiles", *tile, programs=programs)
            for tile in tiles
            if tile[1] <= hidden
            for programs in (0, 1, 2)
        ]
    return found


def _slices(hidden: int, rank: int) -> list[Any]:
    """Return the layouts for tensor cores in which a thread's numbers, 64 to 160 of 16 rows, fit in its registers."""
    from .cores import ROWS, Slices

    return [
        slices
        for warps in (4, 8, 16)
        for columns in (16, 32, 64)
        for ahead in (1, 2, 4)
        for registers in ((128,) if warps == 8 else (0,))  # two programs of 8 warps on a multiprocessor
        for programs in ((0, 1) if warps == 16 else (0,))
        if (slices := Slices(columns, warps, ahead, registers, programs)).fit(hidden)
        and ahead * columns <= 64
        and 64 <= ROWS * hidden // (32 * warps) <= 160
        and columns * max(16, rank) <= 1024
    ]


@contextmanager
def chosen(candidate: Candidate, tokens: int, hidden: int, rank: int, device: Any) -> Iterator[None]:
    """Make the launcher choose the candidate."""
    op = importlib.import_module("fused_steer.kernels.triton_backend")
    schedule = importlib.import_module("fused_steer.kernels.schedule")
    c, tiles = candidate, schedule.ceil_div(tokens, candidate.rows)
    if c.form != "tiles":
        blocks = schedule.ceil_div(hidden, c.columns)
        resident = schedule.ResidentSchedule(
            c.rows, c.columns, blocks, tiles, c.warps, c.ahead, c.form == "direct", c.held
        )
        replaced: dict[str, Callable[..., Any]] = {"resident_schedule": lambda *_: resident}
    else:
        block_r = schedule.padded_rank(rank)
        groups = 1 if hidden % c.columns else schedule._groups(c.rows, c.columns, block_r, c.warps, 2, device)
        programs = min(tiles, c.programs * device.multiprocessors) if c.programs else tiles
        forward = schedule.ForwardSchedule(
            c.rows, c.rows, c.columns, c.columns_out, block_r, groups, programs, c.warps, c.stages, c.stages
        )
        replaced = dict.fromkeys(("resident_schedule", "forward_splits"), lambda *_: None)
        replaced["forward_schedule"] = lambda *_: forward
    with mock.patch.multiple(op, **replaced):
        yield


def _operands(hidden: int, rank: int, device: torch.device, packs: bool) -> tuple[Any, Tensor, Tensor]:
    """Return the op's operands, and W1 and W2 in float64 as they are multiplied. packs: whether they are packed."""
    contract = importlib.import_module("fused_steer.kernels.contract")
    packing = importlib.import_module("fused_steer.kernels.packing")
    generator = torch.Generator(device).manual_seed(0)
    down = torch.randn(rank, hidden, generator=generator, device=device) / hidden**0.5
    up = torch.randn(hidden, rank, generator=generator, device=device) / rank**0.5
    packed = packing.pack_adapter(down, up, torch.bfloat16) if packs else None
    return contract.Operands(down, up, packed=packed), down.bfloat16().double(), up.bfloat16().double()


def _states(tokens: int, hidden: int, device: torch.device, sets: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator(device).manual_seed(1)

    def state() -> Tensor:
        return torch.randn(tokens, hidden, generator=generator, device=device, dtype=torch.bfloat16)

    return [(state(), state()) for _ in range(sets)]


def _run(
    candidate: Candidate, tokens: int, hidden: int, rank: int, operands: Any
) -> Callable[[Tensor, Tensor], Tensor]:
    device = importlib.import_module("fused_steer.kernels.launch").device_of(operands.down)
    if candidate.form == "cores":
        from .cores import Slices, forward_cores

        c = candidate
        slices = Slices(c.columns // c.warps, c.warps, c.chunks, c.registers, c.programs * device.multiprocessors)
        return lambda residual, branch: forward_cores(residual, branch, *operands.packed, rank, slices)
    op = importlib.import_module("fused_steer.kernels.triton_backend")

    def call(residual: Tensor, branch: Tensor) -> Tensor:
        with chosen(candidate, tokens, hidden, rank, device):
            return op.forward(residual, branch, operands, False)[0]

    return call


def compile_one(job: tuple[Candidate, int, int, bool]) -> str:
    """Compile a candidate for (hidden, rank, whether weights are packed) by running it on few rows.

    Returns "" or the reason why it cannot run.
    """
    make_importable()
    candidate, hidden, rank, packs = job
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        operands, *_ = _operands(hidden, rank, device, packs)
        _run(candidate, 2 * candidate.rows, hidden, rank, operands)(*_states(2 * candidate.rows, hidden, device, 1)[0])
        torch.cuda.synchronize()
    except Exception as error:  # such as too much shared memory: the other candidates go on
        return in_words(error)
    return ""


def _median(call: Callable[[Tensor, Tensor], Any], sets: list[tuple[Tensor, Tensor]], device: torch.device) -> float:
    timed = Timed("", [lambda x=x, b=b: call(x, b) for x, b in sets])
    timed.prepare(device, graph=True)
    for _ in range(SAMPLES):
        timed.sample(device)
    return sorted(timed.samples)[SAMPLES // 2]


def measure_size(
    tokens: int, hidden: int, rank: int, tried: list[Candidate], device: torch.device
) -> Iterator[dict[str, Any]]:
    """Yield a row for each candidate: its layout, seconds, error, and the seconds of an add of the same size."""
    sets = _states(tokens, hidden, device, input_sets(3 * tokens * hidden * 2, l2_bytes(device)))
    operands, down, up = _operands(hidden, rank, device, tokens > FEW)
    x = sets[0][0][:64].double() + sets[0][1][:64].double()
    a = x @ down.t()
    truth = x + (a * torch.sigmoid(a)) @ up.t()
    add = _median(torch.add, sets, device)
    for candidate in tried:
        row = {"tokens": tokens, "hidden": hidden, "rank": rank, "add": add, **asdict(candidate)}
        try:
            call = _run(candidate, tokens, hidden, rank, operands)
            out = call(*sets[0])[:64].double()
            row["error"] = float((out - truth).norm() / truth.norm())
            yield {**row, "seconds": _median(call, sets, device)}
        except Exception as error:
            yield {**row, "status": in_words(error)}


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the best candidate of each form, size and rank."""
    right = [row for row in rows if "seconds" in row and row["error"] < WORST]
    for key in dict.fromkeys((row["tokens"], row["hidden"], row["rank"]) for row in rows):
        for form in FORMS:
            of = [r for r in right if (r["tokens"], r["hidden"], r["rank"]) == key and r["form"] == form]
            if of:
                best = min(of, key=lambda row: row["seconds"])
                layout = {name: best[name] for name in list(Candidate.__dataclass_fields__)[1:]}
                time_of = f"{best['seconds'] * 1e6:8.1f} us  {best['seconds'] / best['add']:.2f} adds"
                yield f"N={key[0]:6} d={key[1]:5} r={key[2]:3}  {form:6} {time_of}  {layout}"
    wrong = sum(1 for row in rows if row.get("error", 0) >= WORST)
    missing = sum(1 for row in rows if "status" in row)
    yield f"{len(rows)} candidates, {missing} cannot run here, {wrong} are wrong"


def _some(found: list[Candidate], rehearse: bool) -> list[Candidate]:
    """Return the candidates, or for a rehearsal one of each form."""
    return list({c.form: c for c in found}.values()) if rehearse else found


def main(
    out: Annotated[Path | None, typer.Option(help="Directory for the results file.")] = None,
    minutes: Annotated[float, typer.Option(help="Time limit of the timings, after the compilation.")] = 5.0,
    rank: Annotated[list[int] | None, typer.Option(help=f"A rank; default: {', '.join(map(str, RANKS))}.")] = None,
    rehearse: Annotated[bool, typer.Option(help="A few candidates over the stub driver, without results.")] = False,
) -> None:
    """Time every candidate layout of the forward on this GPU."""
    if rehearse:
        from .stub import active

        if active() is None:
            os.execv(sys.executable, [sys.executable, "-m", "bench.stub", "-m", "bench.sweep", *sys.argv[1:]])
        from .stub.pretence import pretend

        pretend()
    elif not torch.cuda.is_available() or out is None or out.is_file():
        problem = "there is no CUDA GPU; expected one" if not torch.cuda.is_available() else "out is no directory"
        typer.echo(f"bench.sweep: {problem} (--rehearse shows on a CPU that the run works)", err=True)
        raise typer.Exit(1)
    make_importable()
    device = torch.device("cuda", torch.cuda.current_device())
    ranks = tuple(rank) if rank else (4, 64) if rehearse else RANKS
    sizes = ((2 * FEW, 512), (80, 512), (8, 256)) if rehearse else SIZES
    work = {(n, d, r): _some(candidates(n, d, r), rehearse) for n, d in sizes for r in ranks}
    if not rehearse:
        jobs = list({(c, d, r, n > FEW): None for (n, d, r), tried in work.items() for c in tried})
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), spawn) as pool:
            failed = sum(bool(problem) for problem in pool.map(compile_one, jobs, chunksize=8))
        typer.echo(f"{len(jobs)} candidates compiled, {failed} cannot run here")
    begin, rows = time.monotonic(), []
    for (n, d, r), tried in work.items():
        if time.monotonic() - begin > 60 * minutes:
            typer.echo(f"no time for N={n} d={d} r={r} and what follows")
            break
        rows += list(measure_size(n, d, r, tried, device))
        release(device)
    for line in lines(rows):
        typer.echo(line)
    if out is not None and not rehearse:
        machine = describe_machine(device, "bench.sweep")
        out.mkdir(parents=True, exist_ok=True)
        file = out / file_name(machine["device"])
        file.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
        typer.echo(f"results: {file}")
    if rehearse and any("status" in row for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
