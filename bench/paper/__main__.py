"""`python -m bench.paper run`, `report`, `cost`: the paper's experiments, their tables, and what a run costs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from ..results import FOLDER
from .settings import RATES, Settings
from .tasks import TASKS

OUT = FOLDER / "paper"
app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


def chosen(text: str | None, known: Mapping[str, object], what: str) -> list[str]:
    """Names from a comma-separated list, all of `known` without one."""
    names = text.split(",") if text else list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"{what} is {name!r}; expected some of {', '.join(known)}")
    return names


def parse_rates(given: list[str]) -> dict[str, tuple[float, ...]]:
    """The rates of each method, with those that `METHOD=RATE,RATE` replaces."""
    rates = dict(RATES)
    for text in given:
        method, _, numbers = text.partition("=")
        try:
            values = tuple(map(float, numbers.split(",")))
        except ValueError:
            values = ()
        if method not in rates or not values or min(values) <= 0:
            raise ValueError(f"rates is {text!r}; expected such as lowrank=9e-4,2e-3 of {', '.join(rates)}")
        rates[method] = values
    return rates


def parse_lengths(text: str) -> tuple[int, int]:
    try:
        shortest, longest = map(int, text.split(":"))
    except ValueError:
        raise ValueError(f"ListOps lengths are {text!r}; expected such as 4:64 or 500:2000") from None
    return shortest, longest


def fail(error: BaseException) -> typer.Exit:
    typer.echo(f"bench.paper: {' '.join(str(error).split())}", err=True)
    return typer.Exit(1)


@app.command()
def run(
    model: Annotated[str | None, typer.Option(help="Directory or hub id; a hub id is downloaded.")] = None,
    tasks: Annotated[str | None, typer.Option(help=f"Of {', '.join(TASKS)}; default: all.")] = None,
    methods: Annotated[str | None, typer.Option(help=f"Of {', '.join(RATES)}; default: all.")] = None,
    rates: Annotated[list[str], typer.Option(help="METHOD=RATE,RATE in place of ours; once a method.")] = [],  # noqa: B006
    seeds: Annotated[int, typer.Option(help="Runs at the rate that validates best, with seeds 0, 1, ...")] = 5,
    data: Annotated[Path | None, typer.Option(help="Folder of <task>/train.jsonl and so on; default: the hub.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of results.")] = OUT,
    rank: Annotated[int, typer.Option(help="Of the steering.")] = Settings.rank,
    activation: Annotated[str, typer.Option(help="Of the steering.")] = Settings.activation,
    positions: Annotated[str, typer.Option(help="That ReFT edits: f7+l7 of the prompt, or all.")] = "f7+l7",
    projection: Annotated[str, typer.Option(help="Of joint-released: step, epoch, init, or every N steps.")] = "100",
    epochs: Annotated[int | None, typer.Option(help="Default: the paper's, 1, and 3 of GSM8K.")] = None,
    train_limit: Annotated[int | None, typer.Option(help="Training rows of a task; default: all.")] = None,
    evaluated_limit: Annotated[int | None, typer.Option(help="Validation and test rows; default: all.")] = None,
    listops_lengths: Annotated[str, typer.Option(help="Of generated ListOps; Long Range Arena has 500:2000.")] = "4:64",
    end: Annotated[bool, typer.Option("--end", help="Train an end-of-sequence token behind each answer.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Through the chat template, as the paper has Gemma.")] = False,
    dtype: Annotated[str, typer.Option(help="Of the model: float32, bfloat16, float16.")] = Settings.dtype,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    batch: Annotated[int, typer.Option(help="Prompts that are generated for at once.")] = 16,
    smoke: Annotated[bool, typer.Option("--smoke", help="All methods and tasks, tiny: minutes on two cores.")] = False,
) -> None:
    """Train and test. A run that has its results file is not done again, so the same command goes on."""
    import torch

    from fused_steer.tools.demo import choose_device

    from .runs import run_all

    try:
        if smoke:
            from . import smoke as tiny

            out = out / "smoke"
            model, data, seeds, device = str(out / "files" / "tiny"), out / "files" / "data", 1, "cpu"
            if not data.is_dir():
                tiny.write_model(Path(model))
                tiny.write_data(data)
            torch.set_num_threads(1)  # for so small a model as fast as more, and on a machine in use faster
            rates = [f"{name}=1e-3" for name in RATES if name != "untrained"]
        if model is None:
            raise ValueError("no model is named; expected --model or --smoke")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {dtype!r}; expected float32, bfloat16 or float16")
        settings = Settings(
            model=model,
            dtype=dtype,
            epochs=epochs,
            rank=rank,
            activation=activation,
            reft_positions=positions,
            projection=projection,
            end=end,
            chat=chat,
            train_limit=train_limit,
            evaluated_limit=evaluated_limit,
            listops_lengths=parse_lengths(listops_lengths),
            data=str(data) if data else None,
        )
        names = chosen(tasks, TASKS, "tasks"), chosen(methods, RATES, "methods")
        done = run_all(settings, out, *names, parse_rates(rates), seeds, choose_device(device), batch)
        typer.echo(f"{done} runs were done now; the results are in {out}")
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        raise fail(error) from None


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="Folder of results; report.md and its pictures go there too.")] = OUT,
) -> None:
    """Write the tables and pictures, beside the paper's own figures where those are at hand."""
    from .report import write

    try:
        typer.echo(f"written: {write(out)}")
    except (ValueError, OSError) as error:
        raise fail(error) from None


@app.command()
def cost(
    geometry: Annotated[str, typer.Option(help="A size in bench/geometries.py, or a model's directory or hub id.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="That counts; default: the model's, SmolLM2's of a size.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help=f"Of {', '.join(TASKS)}; default: all.")] = None,
    data: Annotated[Path | None, typer.Option(help="As of `run`.")] = None,
    listops_lengths: Annotated[str, typer.Option(help="As of `run`.")] = "4:64",
    batch: Annotated[int, typer.Option(help="As of `run`.")] = 16,
    counted: Annotated[int, typer.Option(help="How many examples of a split have their tokens counted.")] = 500,
) -> None:
    """Estimate the minutes of one run on an A100, from counted operations and bytes. Nothing is measured."""
    from .cost import table

    try:
        names = chosen(tasks, TASKS, "tasks")
        typer.echo(table(geometry, tokenizer, names, data, parse_lengths(listops_lengths), batch, counted))
    except (ValueError, OSError, ImportError) as error:
        raise fail(error) from None


if __name__ == "__main__":
    app()
