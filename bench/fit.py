"""`python -m bench.fit`: how much of a LoRA can fitted steering adapters express? ListOps, SmolLM2-135M, on a CPU.

A LoRA on every linear projection learns the demo's task. Then `fused_steer.theory.fit` fits adapters of several ranks
to its hidden states, in closed form, and all are tested on the same expressions. A fit that is in the results file is
not done again, so that the same command goes on where it stopped. `--report` writes the tables and pictures of
docs/theory.md.

Adapters are fitted on expressions without answers, which are neither trained on nor tested with. The settings below
were fixed before the first run; nothing was chosen by the tests.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from . import joint
from .report.pages import ROOT, with_block
from .report.plots import Panel, Plot, Series, draw
from .report.tables import as_table
from .results import FOLDER, describe_machine, read_run, write_json

SCHEMA = 1
OPERATORS, DEPTH = ("MAX", "MIN"), 2  # the demo's task
RANKS = (0, 1, 2, 4, 8, 16, 64)
POST_BLOCK = "post_block"
OTHER_SITES, OTHER_RANKS = ("post_mlp", "pre_mlp", "post_attention"), (1, 8, 64)
_AT_ONCE = 50
_SIZES = tuple(10 ** (-place / 2) for place in range(7))  # of weight updates, in the picture of the theorem


@dataclass(frozen=True)
class Settings:
    """All that a result depends on, beside the fit and the machine."""

    model: str | None = None
    steps: int = 110
    batch_size: int = 8
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_lr: float = 1e-3
    tested: int = 100
    fitted: int = 300
    ridge: float = 1e-6
    seed: int = 0
    threads: int = 1


def results_file(out: Path) -> Path:
    """A folder of its own: `bench.report` reads every results file that lies in `out` itself."""
    return out / "fit" / "listops-cpu.json"


# ------------------------------------------------------------------------------------------------------ the experiment


def draw_expressions(settings: Settings) -> tuple[list[Any], list[Any], list[Any]]:
    """The expressions to test with, to train on, and to fit on; none is drawn twice."""
    from fused_steer.tools.listops import distinct

    trained = settings.tested + settings.steps * settings.batch_size
    drawn = distinct(trained + settings.fitted, operators=OPERATORS, depth=DEPTH, seed=settings.seed)
    return drawn[: settings.tested], drawn[settings.tested : trained], drawn[trained:]


def train_lora(base: Any, encoder: Any, settings: Settings, folder: Path) -> None:
    """Train a LoRA on every linear projection, and save it in `folder`. `base` is left with the LoRA in it."""
    _, training, _ = draw_expressions(settings)
    size = settings.batch_size
    batches = [encoder.training_batch(training[i : i + size]) for i in range(0, len(training), size)]
    names = ("steps", "batch_size", "lora_rank", "lora_alpha", "lora_lr")
    as_joint = joint.Settings(**{name: getattr(settings, name) for name in names})
    model, groups = joint.adapt(base, "lora", as_joint, settings.seed)
    joint.train(model, groups, batches, as_joint, "LoRA")
    model.save_pretrained(folder)


def exact(model: Any, encoder: Any, expressions: Sequence[Any]) -> str:
    """A 0 or 1 for each expression: whether the model says its value and nothing else."""
    from fused_steer.tools.demo import complete, is_exact

    said = complete(model, encoder, expressions)
    return "".join(str(int(is_exact(*pair))) for pair in zip(said, expressions, strict=True))


def fit_ranks(
    base: Any, tuned: Any, tokenizer: Any, site: str, ranks: Sequence[int], sequence: bool, settings: Settings
) -> tuple[list[Any], float]:
    """A fit of each rank at a site, and the seconds that they took together."""
    from fused_steer import SteerConfig
    from fused_steer.theory import fit_each
    from fused_steer.tools.prompts import encode

    tested, _, fitted = draw_expressions(settings)
    parts = [encode(tokenizer, [f"{one} =" for one in some], 512, _AT_ONCE) for some in (fitted, tested)]
    configs = [
        SteerConfig(rank=rank, activation="identity", up_bias=True, site=site)
        if rank
        else SteerConfig(form="vector", site=site)
        for rank in ranks
    ]
    start = time.perf_counter()
    fits = fit_each(base, tuned, parts[0], configs, held_out=parts[1], ridge=settings.ridge, sequence=sequence)
    return fits, time.perf_counter() - start


def try_fit(base: Any, encoder: Any, found: Any, settings: Settings, folder: Path) -> dict[str, Any]:
    """Save a fitted adapter in `folder`, and test the base model with it."""
    from fused_steer import patch_model
    from fused_steer.adapters.files import write_adapter

    write_adapter(folder, found.adapter)
    steered = patch_model(copy.deepcopy(base), folder)
    config = found.adapter.config
    return {
        "site": config.site,
        "rank": config.rank,
        "exact": exact(steered, encoder, draw_expressions(settings)[0]),
        "parameters": found.adapter.layout.count(config),
        "fit": found.as_dict(),
    }


def run_all(file: Path, settings: Settings, ranks: Mapping[str, Sequence[int]], work: Path) -> None:
    """Every fit that is not in the file yet, saved when tested; the LoRA is trained if `work` has none.

    Args:
        ranks: of each site. At post_block each rank is also fitted layer by layer on the base's own stream.

    Raises:
        ValueError: the file is of other settings, or is no results file.
        OSError: the model is not there, or a file cannot be written.
    """
    import torch
    from peft import PeftModel

    from fused_steer.tools.demo import Encoder, load_model

    results = load(file) if file.exists() else None
    if results is not None and results["settings"] != dataclasses.asdict(settings):
        raise ValueError(f"the settings are {dataclasses.asdict(settings)}; expected those of {file}")
    done = {(run["site"], run["sequence"], run["rank"]) for run in results["runs"]} if results else set()
    wanted = [(site, sequence) for site in ranks for sequence in ((True, False) if site == POST_BLOCK else (True,))]
    todo = {key: [rank for rank in ranks[key[0]] if (*key, rank) not in done] for key in wanted}
    if not any(todo.values()):
        typer.echo(f"all {len(done)} fits are in {file}")
        return
    torch.set_num_threads(settings.threads)
    device = torch.device("cpu")
    base, tokenizer = load_model(settings.model, device)
    encoder = Encoder(tokenizer, device)
    if not (work / "lora").is_dir():
        train_lora(copy.deepcopy(base), encoder, settings, work / "lora")
    tuned = PeftModel.from_pretrained(copy.deepcopy(base), work / "lora").eval()
    tested, _, _ = draw_expressions(settings)
    machine = describe_machine(device, "bench.fit")
    if results is None:
        results = {
            "schema": SCHEMA,
            "machine": machine,
            "settings": dataclasses.asdict(settings),
            "model": {
                "parameters": sum(p.numel() for p in base.parameters()),
                "lora_parameters": sum(p.numel() for name, p in tuned.named_parameters() if "lora_" in name),
                "base": exact(base, encoder, tested),
                "tuned": exact(tuned, encoder, tested),
            },
            "runs": [],
        }
        typer.echo(" and ".join(f"{name}: {results['model'][name].count('1')} exact" for name in ("base", "tuned")))
    for (site, sequence), missing in todo.items():
        if not missing:
            continue
        fits, seconds = fit_ranks(base, tuned, tokenizer, site, missing, sequence, settings)
        for found in fits:
            name = f"{site}-rank-{found.adapter.config.rank}{'' if sequence else '-alone'}"
            run = {"sequence": sequence, **try_fit(base, encoder, found, settings, work / name)}
            run |= {"seconds": seconds, "together": len(missing)}
            results["runs"].append(run | {key: machine[key] for key in ("commit", "dirty", "date")})
            write_json(results, file)
            typer.echo(f"{name}: {run['exact'].count('1')} of {len(tested)} exact")


def load(file: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        ValueError: the file is no results file, or has another schema.
        FileNotFoundError: there is no such file.
    """
    return read_run(file, "bench.fit", SCHEMA, {"machine", "settings", "model", "runs"})


# ---------------------------------------------------------------------------------------------------------- the report


def runs_of(results: dict[str, Any], sequence: bool, site: str = POST_BLOCK) -> list[dict[str, Any]]:
    """By rank."""
    found = (run for run in results["runs"] if (run["site"], run["sequence"]) == (site, sequence))
    return sorted(found, key=lambda run: run["rank"])


def site_table(results: dict[str, Any]) -> str:
    """Return a table with a row for each site and a column for each rank that another site than post_block has."""
    exact = {(run["site"], run["rank"]): run["exact"] for run in results["runs"] if run["sequence"]}
    ranks = sorted({rank for site, rank in exact if site != POST_BLOCK})
    if not ranks:
        return ""
    head = ["exact of " + str(results["settings"]["tested"]), *(f"rank {rank}" for rank in ranks)]
    rows = [
        [f"`{site}`", *(str(exact[site, rank].count("1")) if (site, rank) in exact else "–" for rank in ranks)]
        for site in (POST_BLOCK, *OTHER_SITES)
    ]
    note = """The same at the other [sites](sites.md), by exact answers. Each adapter is fitted, in sequence, to what
        the LoRA makes of the tensor at its site, and has as many parameters as above. Only at `post_block` it sees and
        moves the whole stream: elsewhere, what the LoRA changes in the rest of a block is out of its reach."""
    return f"\n\n{joint.paragraph(note)}\n\n{as_table(head, rows, texts=1)}"


def report_text(results: dict[str, Any]) -> str:
    """What stands between the markers of docs/theory.md."""
    settings, model, machine = (results[name] for name in ("settings", "model", "machine"))
    count = settings["tested"]
    rows = [
        ["the base model", "–", str(model["base"].count("1")), "–", "–", "–"],
        ["with the LoRA, trained", f"{model['lora_parameters']:,}", f"**{model['tuned'].count('1')}**", "–", "–", "–"],
    ]
    alone = {run["rank"]: run for run in runs_of(results, False)}
    for run in runs_of(results, True):
        last = run["fit"]["layers"][-1]
        other = alone.get(run["rank"])
        rows.append(
            [
                f"fitted, rank {run['rank']}" if run["rank"] else "fitted, one vector",
                f"{run['parameters']:,}",
                f"**{run['exact'].count('1')}**",
                f"{last['held_out']:.2%}",
                f"{last['token']:.1%}",
                str(other["exact"].count("1")) if other else "–",
            ]
        )
    head = [
        "",
        "parameters",
        f"exact of {count}",
        "share",
        "of a median token",
        "each layer by itself",
    ]
    tokens = results["runs"][0]["fit"]["tokens"]
    slowest = max(runs_of(results, True), key=lambda run: run["seconds"])
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "transformers", "peft"))
    commits = ", ".join(sorted({run["commit"] or "unknown" for run in results["runs"]}))
    note = f"""{settings["model"] or "SmolLM2-135M-Instruct"} ({model["parameters"]:,} parameters), ListOps of
        {" and ".join(OPERATORS)}, depth {DEPTH}. The LoRA is on every linear projection, r = {settings["lora_rank"]},
        α = {settings["lora_alpha"]}, trained with {settings["steps"]} steps of {settings["batch_size"]} expressions at
        {settings["lora_lr"]:g}. Adapters: identity with a bias at every layer (of one vector, the bias alone), fitted
        on {settings["fitted"]} other expressions ({tokens:,} tokens) without their answers, ridge
        {settings["ridge"]:g}. *Share* is that of the oracle after the last layer, over all tokens of the tested
        prompts; a few tokens with very large hidden states outweigh all others in it, but not in the median over tokens
        beside it. The last column is of adapters fitted each on the base's own stream: together they add the same
        shift again and again. Fitting {slowest["together"]} ranks took {slowest["seconds"] / 60:.0f} minutes on a busy
        CPU ({machine["device"]}, {settings["threads"]} thread). One LoRA, one seed; the standard error of such a count
        is about {100 * (0.2 / count) ** 0.5:.0f} in a hundred. fused-steer {machine["fused_steer"]}, {versions}, commit
        {commits}, {machine["date"][:10]}."""
    return f"{as_table(head, rows, texts=1)}\n\n{joint.paragraph(note)}{site_table(results)}"


def plots(results: dict[str, Any]) -> list[Plot]:
    """The pictures of the results."""
    runs = {sequence: runs_of(results, sequence) for sequence in (True, False)}
    ranks = sorted({run["rank"] for sequence in runs.values() for run in sequence})
    ticks = ["base", *(f"rank {rank}" if rank else "vector" for rank in ranks), "LoRA"]
    ends = [(0, _percent(results["model"]["base"])), (len(ticks) - 1, _percent(results["model"]["tuned"]))]
    bars = [Series("not fitted", _points(ends), None)]
    for place, (sequence, label) in enumerate(((True, "fitted in sequence"), (False, "fitted each layer by itself"))):
        if runs[sequence]:
            exact = [(1 + ranks.index(run["rank"]), _percent(run["exact"])) for run in runs[sequence]]
            bars.append(Series(label, _points(exact), place))
    accuracy = Panel("", "", "exact answers, %", tuple(bars), tuple(ticks))
    missed = [
        Series(
            f"rank {run['rank']}" if run["rank"] else "one vector",
            _points(enumerate(1 - layer["token"] for layer in run["fit"]["layers"])),
            place,
            ".-",
        )
        for place, run in enumerate(runs[True])
    ]
    sizes = Series(
        "the LoRA", _points(enumerate(layer["oracle"] for layer in runs[True][0]["fit"]["layers"])), None, ".-"
    )
    layers = (
        Panel("How far the LoRA moves the stream", "layer", "‖δh‖ / ‖h‖, median", (sizes,), log_y=True),
        Panel(
            "What adapters fitted in sequence miss of that",
            "layer",
            "part of a median token",
            tuple(missed),
            log_y=True,
        ),
    )
    return [
        Plot("accuracy-by-rank", "ListOps: adapters fitted to a LoRA", (accuracy,)),
        *_site_plot(results),
        Plot("missed-by-layer", "The oracle, and what is missed of it, layer by layer", layers),
    ]


def _site_plot(results: dict[str, Any]) -> list[Plot]:
    """The picture of exact answers by site; none if no other site than post_block was run."""
    runs = {site: runs_of(results, True, site) for site in (POST_BLOCK, *OTHER_SITES)}
    ranks = sorted({run["rank"] for site in OTHER_SITES for run in runs[site]})
    if not ranks:
        return []
    bars = []
    for place, (site, found) in enumerate(runs.items()):
        exact = [(ranks.index(run["rank"]), _percent(run["exact"])) for run in found if run["rank"] in ranks]
        if exact:
            bars.append(Series(site, _points(exact), place))
    panel = Panel("", "", "exact answers, %", tuple(bars), tuple(f"rank {rank}" for rank in ranks))
    return [Plot("accuracy-by-site", "ListOps: adapters fitted to a LoRA, by site", (panel,))]


def _percent(exact: str) -> float:
    return 100 * exact.count("1") / len(exact)


def _points(pairs: Iterable[tuple[float, float]]) -> tuple[tuple[float, float, float, float], ...]:
    return tuple((x, y, y, y) for x, y in pairs)


def theorem_plot() -> Plot:
    """How far a block that is steered by a site's oracle to first order stays from one with updated weights."""
    import torch

    from fused_steer.theory.statements import MATRICES, block, equivalent_shift, random_block

    generator = torch.Generator().manual_seed(0)
    weights = random_block(64, 160, generator)
    updates = {name: random_block(64, 160, generator)[name] for name in MATRICES}
    x = torch.randn(24, 64, generator=generator, dtype=torch.float64)
    shift = equivalent_shift(weights, updates, x, heads=4)
    sites = {
        "after the block": ("post_block", shift.post_block),
        "at the MLP's output": ("post_mlp", shift.post_mlp),
        "at the attention's output": ("post_attention", shift.attention),
    }
    base = block(weights, x, 4)
    lines = []
    for place, (label, (site, value)) in enumerate(sites.items()):
        points = []
        for size in _SIZES:
            updated = block({name: w + size * updates.get(name, 0) for name, w in weights.items()}, x, 4)
            steered = block(weights, x, 4, {site: size * value})
            # Rounded, so that another library's last bits draw the same picture.
            error = float(f"{float((updated - steered).norm() / (updated - base).norm()):.4g}")
            points.append((float(f"{size:.4g}"), error, error, error))
        lines.append(Series(f"steered {label}", tuple(points), place))
    axes = {"log_x": True, "log_y": True}
    panel = Panel("", "size of the updates, relative to the weights", "part of the change missed", tuple(lines), **axes)
    return Plot("first-order", "A block with all its weights updated, or steered by a site's oracle instead", (panel,))


def render(file: Path, docs: Path) -> dict[Path, bytes]:
    """The files that the results give, with their content.

    Raises:
        ValueError: the file is no results file, or the page lacks its markers.
        OSError: a file cannot be read.
    """
    results = load(file)
    page = docs / "theory.md"
    text = with_block(page.read_text(encoding="utf-8"), "fit", report_text(results), page)
    pictures = {docs / "theory" / f"{plot.name}.svg": draw(plot) for plot in (theorem_plot(), *plots(results))}
    return {page: text.encode(), **pictures}


# ------------------------------------------------------------------------------------------------------------- command

app = typer.Typer(add_completion=False)


def _listed(ranks: Sequence[int]) -> str:
    return ",".join(map(str, ranks))


def _read_ranks(text: str) -> list[int]:
    try:
        return [int(rank) for rank in text.split(",") if rank]
    except ValueError:
        raise ValueError(f"ranks are {text!r}; expected such as 1,8,64") from None


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder of results; the file is fit/listops-cpu.json in it.")] = FOLDER,
    work: Annotated[Path, typer.Option(help="Folder for the LoRA and the adapters.")] = Path("fused-steer-fit"),
    model: Annotated[str | None, typer.Option(help="Directory or hub id; default: SmolLM2-135M-Instruct.")] = None,
    ranks: Annotated[str, typer.Option(help="Ranks at post_block, such as 0,1,8; 0 is a vector.")] = _listed(RANKS),
    other_ranks: Annotated[str, typer.Option(help=f"Ranks at {', '.join(OTHER_SITES)}.")] = _listed(OTHER_RANKS),
    steps: Annotated[int, typer.Option(help="Steps of the LoRA's training.")] = Settings.steps,
    tested: Annotated[int, typer.Option(help="Expressions to test with.")] = Settings.tested,
    fitted: Annotated[int, typer.Option(help="Expressions to fit on.")] = Settings.fitted,
    threads: Annotated[
        int, typer.Option(help="PyTorch's threads; another number may give other bits.")
    ] = Settings.threads,
    report: Annotated[bool, typer.Option("--report", help="Fit nothing; write the report of the results.")] = False,
    docs: Annotated[Path, typer.Option(help="Folder of theory.md.")] = ROOT / "docs",
) -> None:
    """Train a LoRA, fit adapters to it, and test all; or write the report of that."""
    try:
        if report:
            for path, content in render(results_file(out), docs).items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                typer.echo(f"written: {path}")
        else:
            settings = Settings(model, steps, tested=tested, fitted=fitted, threads=threads)
            by_site = {POST_BLOCK: _read_ranks(ranks)} | dict.fromkeys(OTHER_SITES, _read_ranks(other_ranks))
            run_all(results_file(out), settings, by_site, work)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        typer.echo(f"bench.fit: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
