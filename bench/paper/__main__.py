"""`python -m bench.paper run`, `report`, `cost`: runs the paper's experiments, writes tables, estimates the cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from fused_steer.config import SITES
from fused_steer.paper.tasks import TASKS

from ..results import FOLDER
from .settings import RATES, SCHEDULES, Settings

OUT = FOLDER / "paper"
app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


def chosen(text: str | None, known: Mapping[str, object], what: str) -> list[str]:
    """Return the names in a comma-separated list; without a list, all of `known`."""
    names = text.split(",") if text else list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"{what} is {name!r}; expected some of {', '.join(known)}")
    return names


def parse_rates(given: list[str]) -> dict[str, tuple[float, ...]]:
    """Return the rates of each method: the defaults, overridden by each `METHOD=RATE,RATE`."""
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
    tasks: Annotated[str | None, typer.Option(help=f"Some of {', '.join(TASKS)}. Default: all.")] = None,
    methods: Annotated[str | None, typer.Option(help=f"Some of {', '.join(RATES)}. Default: all.")] = None,
    rates: Annotated[list[str], typer.Option(help="METHOD=RATE,RATE: learning rates to try. Repeatable.")] = [],  # noqa: B006
    seeds: Annotated[int, typer.Option(help="Number of seeds at the rate that validates best.")] = 5,
    data: Annotated[Path | None, typer.Option(help="Folder with <task>/train.jsonl. Default: the hub.")] = None,
    splits: Annotated[str, typer.Option(help="ours, or released: those of the released code.")] = Settings.splits,
    out: Annotated[Path, typer.Option(help="Folder of results.")] = OUT,
    rank: Annotated[int, typer.Option(help="Rank of the steering.")] = Settings.rank,
    activation: Annotated[str, typer.Option(help="Activation of the steering.")] = Settings.activation,
    init_scale: Annotated[float, typer.Option(help="Factor on W1's initial values.")] = Settings.init_scale,
    site: Annotated[
        str, typer.Option(help=f"Sites of the steering, each with runs of its own: some of {', '.join(SITES)}.")
    ] = "post_block",
    positions: Annotated[str, typer.Option(help="Positions that ReFT edits (docs/positions.md).")] = "first_7+last_7",
    lofit_share: Annotated[float, typer.Option(help="Share of heads that LoFiT selects.")] = Settings.lofit_share,
    lofit_rate: Annotated[float, typer.Option(help="Learning rate of LoFiT's first stage.")] = Settings.lofit_rate,
    lofit_l1: Annotated[float, typer.Option(help="L1 penalty of LoFiT's first stage.")] = Settings.lofit_l1,
    projection: Annotated[str, typer.Option(help="joint-released projects at: step, epoch, init or N steps.")] = "100",
    epochs: Annotated[int | None, typer.Option(help="Epochs. Default: as in the paper, 1; 3 for GSM8K.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens to generate. Default: the task's.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a training row. Default: the task's.")] = None,
    accumulation: Annotated[int, typer.Option(help="Batches of 8 per optimizer step.")] = Settings.accumulation,
    schedule: Annotated[
        str | None, typer.Option(help=f"Schedule of the learning rate: {', '.join(SCHEDULES)}. Default: the method's.")
    ] = None,
    warmup: Annotated[float | None, typer.Option(help="Warm-up, a share of the steps. Default: the method's.")] = None,
    train_limit: Annotated[int | None, typer.Option(help="Training rows per task. Default: all.")] = None,
    evaluated_limit: Annotated[int | None, typer.Option(help="Rows of validation and of test. Default: all.")] = None,
    listops_lengths: Annotated[str, typer.Option(help="Lengths of generated ListOps, shortest:longest.")] = "4:64",
    end: Annotated[bool, typer.Option("--end", help="Train an end-of-sequence token after each answer.")] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Use the chat template, as the released code does for Gemma.")
    ] = False,
    save: Annotated[bool, typer.Option("--save", help="Save what each run trains, beside its results.")] = False,
    dtype: Annotated[str, typer.Option(help="The model's dtype: float32, bfloat16, float16.")] = Settings.dtype,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    batch: Annotated[int, typer.Option(help="Prompts per batch of generation.")] = 16,
    smoke: Annotated[bool, typer.Option("--smoke", help="A quick check: all methods and tasks, tiny sizes.")] = False,
) -> None:
    """Train and test. A run with a results file is not repeated, so the same command resumes."""
    import torch

    from fused_steer.tools.demo import choose_device

    from .methods import at_sites, check_saved
    from .runs import run_all

    try:
        asked, named = chosen(tasks, TASKS, "tasks"), at_sites(chosen(methods, RATES, "methods"), site.split(","))
        if save:
            check_saved(list(named))
        if smoke:
            from . import smoke as tiny

            out = out / "smoke"
            model, data, seeds, device = str(out / "files" / "tiny"), out / "files" / "data", 1, "cpu"
            if not data.is_dir():
                tiny.write_model(Path(model))
                tiny.write_data(data)
            torch.set_num_threads(1)  # more threads are no faster for a tiny model, and slower on a busy machine
            rates = [f"{name}=1e-3" for name in RATES if name != "untrained"]
        if model is None:
            raise ValueError("no model is named; expected --model or --smoke")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {dtype!r}; expected float32, bfloat16 or float16")
        settings = Settings(
            model=model,
            dtype=dtype,
            epochs=epochs,
            accumulation=accumulation,
            schedule=schedule,
            warmup=warmup,
            rank=rank,
            activation=activation,
            init_scale=init_scale,
            reft_positions=positions,
            lofit_share=lofit_share,
            lofit_rate=lofit_rate,
            lofit_l1=lofit_l1,
            new_tokens=new_tokens,
            max_length=max_length,
            projection=projection,
            end=end,
            chat=chat,
            train_limit=train_limit,
            evaluated_limit=evaluated_limit,
            listops_lengths=parse_lengths(listops_lengths),
            splits=splits,
            data=str(data) if data else None,
        )
        grids = parse_rates(rates)
        tried = {name: grids[method] for name, method in named.items()}
        done = run_all(settings, out, asked, tried, seeds, choose_device(device), batch, save)
        typer.echo(f"{done} new runs; the results are in {out}")
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        raise fail(error) from None


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="Folder of results, and of report.md with its pictures.")] = OUT,
) -> None:
    """Write the tables and pictures, beside the paper's own figures where we have them."""
    from .report import write

    try:
        typer.echo(f"written: {write(out)}")
    except (ValueError, OSError) as error:
        raise fail(error) from None


@app.command()
def cost(
    geometry: Annotated[str, typer.Option(help="A size in bench/geometries.py, or a model's directory or hub id.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer. Default: the model's; SmolLM2's for a size.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help=f"Some of {', '.join(TASKS)}. Default: all.")] = None,
    data: Annotated[Path | None, typer.Option(help="See `run`.")] = None,
    listops_lengths: Annotated[str, typer.Option(help="See `run`.")] = "4:64",
    batch: Annotated[int, typer.Option(help="See `run`.")] = 16,
    counted: Annotated[int, typer.Option(help="Number of training examples to count tokens of.")] = 500,
) -> None:
    """Estimate the minutes of one run on an A100 from counted operations and bytes. Nothing is measured."""
    from .cost import table

    try:
        names = chosen(tasks, TASKS, "tasks")
        typer.echo(table(geometry, tokenizer, names, data, parse_lengths(listops_lengths), batch, counted))
    except (ValueError, OSError, ImportError) as error:
        raise fail(error) from None


if __name__ == "__main__":
    app()
