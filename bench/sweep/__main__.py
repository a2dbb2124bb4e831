"""The command `python -m bench.sweep`.

A candidate is compiled and checked against float64 before it is timed as `bench.gpu` times the op: by a CUDA graph of
many calls on separate memory. Its time is given over that of a plain add of the same size. Compilation takes most of
the minutes, in as many processes as there are cores. `--rehearse` runs a few candidates over the stub driver, without a
GPU and without results.
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
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..checkout import make_importable
from ..levels import in_words, l2_bytes, release
from ..results import describe_machine, file_name
from ..timing import Timed, input_sets, launch_seconds

SAMPLES = 5
WORST = 0.01  # relative error from float64 in bf16; a wrong layout gives about 1
_OF_SIZE = ("tokens", "hidden", "rank", "add", "form", "seconds", "error", "launches", "status")


def candidates_of(name: str) -> Any:
    """Return the module with the candidates of a pass, "forward" or "backward"."""
    return importlib.import_module(f"bench.sweep.{name}")


def compile_one(job: tuple[str, Any, int, int, int, bool]) -> str:
    """Compile a candidate of (pass, candidate, tokens, hidden, rank, whether weights are packed) by running it.

    Returns "" or the reason why it cannot run.
    """
    make_importable()
    name, candidate, tokens, hidden, rank, packs = job
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        problem = candidates_of(name).Problem(tokens, hidden, rank, device, 1, packs)
        problem.call_of(candidate)(*problem.sets[0])
        torch.cuda.synchronize()
    except Exception as error:  # such as too much shared memory: the other candidates go on
        return in_words(error)
    return ""


def _median(call: Callable[..., Any], sets: list[tuple[Any, ...]], device: torch.device) -> float:
    timed = Timed("", [lambda given=given: call(*given) for given in sets])
    timed.prepare(device, graph=True)
    for _ in range(SAMPLES):
        timed.sample(device)
    return sorted(timed.samples)[SAMPLES // 2]


def measure_size(
    of_pass: Any, tokens: int, hidden: int, rank: int, tried: list[Any], device: torch.device
) -> Iterator[dict[str, Any]]:
    """Yield a row for each candidate: its layout, seconds, error, and the seconds of an add of the same size.

    The form "chosen" also has the seconds of each launch.
    """
    sets = input_sets(of_pass.Problem.bytes_each(tokens, hidden), l2_bytes(device))
    problem = of_pass.Problem(tokens, hidden, rank, device, sets, of_pass.packs(tokens))
    add = _median(torch.add, [given[:2] for given in problem.sets], device)
    for candidate in tried:
        row = {"tokens": tokens, "hidden": hidden, "rank": rank, "add": add, **asdict(candidate)}
        try:
            call = problem.call_of(candidate)
            row["error"] = problem.error(call(*problem.sets[0]))
            if candidate.form == "chosen":
                row["launches"] = launch_seconds(lambda call=call: call(*problem.sets[0]), device)
            yield {**row, "seconds": _median(call, problem.sets, device)}
        except Exception as error:
            yield {**row, "status": in_words(error)}


def lines(rows: list[dict[str, Any]], forms: tuple[str, ...]) -> Iterator[str]:
    """Yield the best candidate of each form, size and rank."""
    right = [row for row in rows if "seconds" in row and row["error"] < WORST]
    for key in dict.fromkeys((row["tokens"], row["hidden"], row["rank"]) for row in rows):
        for form in forms:
            of = [r for r in right if (r["tokens"], r["hidden"], r["rank"]) == key and r["form"] == form]
            if of:
                best = min(of, key=lambda row: row["seconds"])
                layout = {name: value for name, value in best.items() if name not in _OF_SIZE}
                time_of = f"{best['seconds'] * 1e6:8.1f} us  {best['seconds'] / best['add']:.2f} adds"
                shown = layout if layout["warps"] else ""
                yield f"N={key[0]:6} d={key[1]:5} r={key[2]:3}  {form:7} {time_of}  {shown}"
                for name, seconds in best.get("launches", ()):
                    yield f"    {seconds * 1e6:8.1f} us  {name}"
    wrong = sum(1 for row in rows if row.get("error", 0) >= WORST)
    missing = sum(1 for row in rows if "status" in row)
    yield f"{len(rows)} candidates, {missing} cannot run here, {wrong} are wrong"


def _some(found: list[Any], rehearse: bool) -> list[Any]:
    """Return the candidates, or for a rehearsal the first of each form."""
    return list({c.form: c for c in reversed(found)}.values()) if rehearse else found


def main(
    out: Annotated[Path | None, typer.Option(help="Directory for the results file.")] = None,
    backward: Annotated[bool, typer.Option(help="The layouts of the backward instead of the forward's.")] = False,
    minutes: Annotated[float, typer.Option(help="Time limit of the timings, after the compilation.")] = 5.0,
    rank: Annotated[list[int] | None, typer.Option(help="A rank; default: those of the pass.")] = None,
    rehearse: Annotated[bool, typer.Option(help="A few candidates over the stub driver, without results.")] = False,
) -> None:
    """Time every candidate layout of the forward, or of the backward, on this GPU."""
    if rehearse:
        from ..stub import active

        if active() is None:
            os.execv(sys.executable, [sys.executable, "-m", "bench.stub", "-m", "bench.sweep", *sys.argv[1:]])
        from ..stub.pretence import pretend

        pretend()
    elif not torch.cuda.is_available() or out is None or out.is_file():
        problem = "there is no CUDA GPU; expected one" if not torch.cuda.is_available() else "out is no directory"
        typer.echo(f"bench.sweep: {problem} (--rehearse shows on a CPU that the run works)", err=True)
        raise typer.Exit(1)
    make_importable()
    name = "backward" if backward else "forward"
    of_pass = candidates_of(name)
    device = torch.device("cuda", torch.cuda.current_device())
    described = importlib.import_module("fused_steer.kernels.schedule").describe_device(device)
    ranks = tuple(rank) if rank else of_pass.REHEARSED_RANKS if rehearse else of_pass.RANKS
    sizes = of_pass.REHEARSED_SIZES if rehearse else of_pass.SIZES
    work = {(n, d, r): _some(of_pass.candidates(n, d, r, described), rehearse) for n, d in sizes for r in ranks}
    if not rehearse:
        jobs = list({
            (name, *of_pass.compiled(c, n), d, r, of_pass.packs(n)): None
            for (n, d, r), tried in work.items() for c in tried
        })  # fmt: skip
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), spawn) as pool:
            failed = sum(bool(problem) for problem in pool.map(compile_one, jobs, chunksize=8))
        typer.echo(f"{len(jobs)} candidates compiled, {failed} cannot run here")
    begin, rows = time.monotonic(), []
    for (n, d, r), tried in work.items():
        if time.monotonic() - begin > 60 * minutes:
            typer.echo(f"no time for N={n} d={d} r={r} and what follows")
            break
        rows += list(measure_size(of_pass, n, d, r, tried, device))
        release(device)
    for line in lines(rows, of_pass.FORMS):
        typer.echo(line)
    if out is not None and not rehearse:
        machine = describe_machine(device, "bench.sweep")
        out.mkdir(parents=True, exist_ok=True)
        file = out / file_name(machine["device"] + (" backward" if backward else ""))
        file.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
        typer.echo(f"results: {file}")
    if rehearse and any("status" in row for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
