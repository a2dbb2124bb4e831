"""`python -m bench.study`: sites, activations and rivals of steering, compared on ListOps with SmolLM2-135M on a CPU.

Each form trains at every rate of its grid with seed 0, and at the rate that validates best with the other seeds. The
test expressions decide nothing. A run that is in the results file is not repeated, so the same command resumes.
`--report` writes docs/study-listops.md from the file. The rivals are those of `bench.paper`, with its schedules.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .checkout import ROOT
from .results import FOLDER, describe_machine, read_run, write_json

SCHEMA = 1
OPERATORS, DEPTH = ("MAX", "MIN"), 2  # the demo's task
DATA_SEED = 0  # of the expressions; a run's own seed selects its part of them and its initial values
ASLEEP = 1e-3  # a layer does nothing if its median ‖δ‖/‖h‖ is below
_REPEATS = 20_000  # after so many draws in a row without a new one, few more short expressions are expected
_MEASURED = 32  # number of prompts for the size of the shifts, and of the stream


@dataclass(frozen=True)
class Settings:
    """The settings that all runs share.

    Attributes:
        digits: the most digits of an expression, which keeps prompts short.
    """

    model: str | None = None
    steps: int = 60
    batch_size: int = 8
    digits: int = 3
    validated: int = 40
    tested: int = 120
    seeds: int = 3
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "validated", "tested", "seeds", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")


@dataclass(frozen=True)
class Form:
    """One form of adaptation.

    Attributes:
        rates: the learning rates to try.
        fields: of `SteerConfig`; None for a method of `bench.paper`, or for a normalised read.
        method: the name of a method of `bench.paper`.
        by_stream: whether W1 starts divided by the stream's size, the median over tokens of its root mean square.
        normalised: the activation of a module in plain PyTorch that reads h / rms(h).
    """

    title: str
    rates: tuple[float, ...]
    fields: Mapping[str, Any] | None = None
    method: str | None = None
    by_stream: bool = False
    normalised: str | None = None


def _lowrank(activation: str, **fields: Any) -> dict[str, Any]:
    return {"rank": 8, "activation": activation, **fields}


_RATES = (2.5e-4, 7e-4, 2e-3)
FORMS: dict[str, Form] = {
    "identity": Form("identity", _RATES, _lowrank("identity")),
    "silu": Form("SiLU", _RATES, _lowrank("silu")),
    "silu-normalised": Form("SiLU, normalised read", (7e-4, 2e-3, 6e-3), normalised="silu"),
    "identity-normalised": Form("identity, normalised read", (7e-4, 2e-3, 6e-3), normalised="identity"),
    "silu-stream": Form("SiLU, W1 by the stream", (7e-4, 2e-3), _lowrank("silu"), by_stream=True),
    "silu-tenth": Form("SiLU, `init_scale` 0.1", (7e-4, 2e-3), _lowrank("silu", init_scale=0.1)),
    "post_mlp": Form("`post_mlp`", (7e-4, 2e-3), _lowrank("identity", site="post_mlp")),
    "pre_mlp": Form("`pre_mlp`", (7e-4, 2e-3), _lowrank("identity", site="pre_mlp")),
    "post_attention": Form("`post_attention`", (7e-4, 2e-3), _lowrank("identity", site="post_attention")),
    "rank1": Form("post-block, rank 1", (7e-4, 2e-3), _lowrank("identity") | {"rank": 1}),
    "vector": Form("post-block, vector", (2e-3, 6e-3), {"form": "vector"}),
    "lora": Form("LoRA, rank 8, all linear layers", (1e-3, 3e-3), method="lora"),
    "loreft": Form("ReFT, rank 8, all tokens", (3e-4, 1e-3), {"form": "loreft", "rank": 8}),
    "jola": Form("JoLA", (5e-3, 2e-2), method="jola"),
    "lofit": Form("LoFiT", (5e-3, 2e-2), method="lofit"),
}
GROUPS: dict[str, tuple[str, ...]] = {
    "activations": ("identity", "silu", "silu-normalised", "identity-normalised"),
    "sites": ("identity", "post_mlp", "pre_mlp", "post_attention"),
    "rivals": ("identity", "silu", "rank1", "vector", "lora", "loreft", "jola", "lofit"),
    "starts": ("silu", "silu-stream", "silu-tenth"),
}


def results_file(out: Path) -> Path:
    """Return the path of the results file. It lies in a subfolder, because `bench.report` reads every file in `out`."""
    return out / "study" / "listops-cpu.json"


# ---------------------------------------------------------------------------------------------------------------- data


def draw(settings: Settings) -> tuple[list[Any], list[Any], list[list[Any]]]:
    """Draw the expressions for validation, for the test, and for each seed's training. None occurs twice.

    Raises:
        ValueError: the task has too few expressions.
    """
    from fused_steer.tools.listops import count_digits, generate

    size = settings.steps * settings.batch_size
    count = settings.validated + settings.tested + settings.seeds * size
    rng, found, repeats = random.Random(DATA_SEED), {}, 0
    while len(found) < count:
        expression, before = generate(rng, OPERATORS, DEPTH), len(found)
        if count_digits(expression) <= settings.digits:
            found[expression] = None
        repeats = repeats + 1 if len(found) == before else 0
        if repeats == _REPEATS:
            raise ValueError(
                f"{count} expressions of at most {settings.digits} digits were requested, but there are few more than "
                f"{len(found)}; expected a smaller number"
            )
    short = list(found)
    held_out = settings.validated + settings.tested
    starts = [held_out + seed * size for seed in range(settings.seeds)]
    parts = [short[start : start + size] for start in starts]
    return short[: settings.validated], short[settings.validated : held_out], parts


# --------------------------------------------------------------------------------------------------------------- forms


def attach(form: Form, model: Any, rate: float, inputs: Mapping[str, Any]) -> tuple[Any, Any, list[Any]]:
    """Add a form's parameters to a model.

    Args:
        inputs: a batch of prompts, for the size of the stream.

    Returns:
        The model, the method of `bench.paper` (for its schedule), and the stages of training.
    """
    from .paper.methods import METHODS, Stage, steering
    from .paper.settings import Settings as PaperSettings

    if form.method is not None:
        model, stages = METHODS[form.method].attach(model, PaperSettings(model=""), rate)
        return model, METHODS[form.method], stages
    method = METHODS["lowrank"]
    if form.normalised is not None:
        modules = attach_normalised(model, 8, form.normalised)
        return model, method, [Stage([p for module in modules for p in module.parameters()], rate)]
    fields = {"rank": None, "activation": None} | dict(form.fields or {})
    model, stages = steering(model, PaperSettings(model=""), rate, **fields)
    if form.by_stream:
        divide_by_stream(model, inputs)
    return model, method, stages


def normalised_read(hidden: int, rank: int, activation: str) -> Any:
    """A module that maps h to h + W2 φ(W1 h / rms(h)), in plain PyTorch, with `patch_model`'s initial values."""
    import torch
    from fused_steer.kernels.torch_backend import ACTIVATIONS
    from torch import nn

    class NormalisedRead(nn.Module):
        reads = "sum"

        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Linear(hidden, rank, bias=False)
            self.up = nn.Linear(rank, hidden, bias=False)
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up.weight)

        def forward(self, h: torch.Tensor) -> torch.Tensor:
            read = self.down(h) * h.square().mean(-1, keepdim=True).rsqrt()
            return h + self.up(ACTIVATIONS[activation][0](read))

    return NormalisedRead()


def attach_normalised(model: Any, rank: int, activation: str) -> list[Any]:
    """Freeze the model and steer every layer's output by a normalised read."""
    from fused_steer.model.decoder import find_decoder

    model.requires_grad_(False)
    decoder = find_decoder(model)
    modules = []
    for layer in decoder.layers:
        module = normalised_read(decoder.hidden, rank, activation)

        def hook(_: Any, __: Any, output: Any, module: Any = module) -> Any:
            return (module(output[0]), *output[1:]) if isinstance(output, tuple) else module(output)

        layer.register_forward_hook(hook)
        layer.add_module("normalised", module)
        modules.append(module)
    return modules


def steered_modules(model: Any) -> list[Any]:
    """Return the modules that steer, in the order of the layers; empty for other forms."""
    from fused_steer.model.site import Site

    return [m for name, m in model.named_modules() if isinstance(m, Site) or name.endswith(".normalised")]


def watch(model: Any, inputs: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """Run a batch. Return what each steering module steers, and its shift: (tokens, d) each, without the padding."""
    import torch

    kept, found = inputs["attention_mask"].bool(), []

    def keep(module: Any, args: Any, output: Any) -> None:
        parts = [arg for arg in args if isinstance(arg, torch.Tensor)]
        h = parts[1] if module.reads == "branch" else sum(parts)
        found.append((h[kept], (output - sum(parts))[kept]))

    handles = [module.register_forward_hook(keep) for module in steered_modules(model)]
    try:
        with torch.no_grad():
            model(**inputs, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return found


def divide_by_stream(model: Any, inputs: Mapping[str, Any]) -> None:
    """Divide each layer's W1 by the median root mean square of what it reads in a batch."""
    import torch

    sizes = [h.square().mean(1).sqrt().median() for h, _ in watch(model, inputs)]
    with torch.no_grad():
        for site, size in zip(steered_modules(model), sizes, strict=True):
            site.adapter("default").down.weight /= size


def shift_medians(model: Any, inputs: Mapping[str, Any]) -> list[float]:
    """Return the median ‖δ‖/‖h‖ over the tokens of a batch, for each steering module."""
    return [float((shift.norm(dim=1) / h.norm(dim=1)).median()) for h, shift in watch(model, inputs)]


# ------------------------------------------------------------------------------------------------- training and testing


def train(model: Any, method: Any, stage: Any, batches: Sequence[Any]) -> list[float]:
    """Train one stage, one AdamW step per batch, as `bench.paper` does. Return the losses.

    Raises:
        RuntimeError: the loss is no longer finite.
    """
    import torch
    from transformers import get_scheduler

    from fused_steer.tools.demo import answer_loss

    optimizer = torch.optim.AdamW(stage.parameters, lr=stage.rate, weight_decay=0.0)
    warmup = math.ceil(method.warmup * len(batches))
    schedule = get_scheduler(method.schedule, optimizer, num_warmup_steps=warmup, num_training_steps=len(batches))
    losses = []
    model.train()
    for step, batch in enumerate(batches, 1):
        loss = answer_loss(model, *batch)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise RuntimeError(f"the loss of step {step} is {losses[-1]}; expected it finite")
        (loss if stage.penalty is None else loss + stage.penalty()).backward()
        torch.nn.utils.clip_grad_norm_(stage.parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    if stage.after is not None:
        stage.after()
    return losses


def test(model: Any, encoder: Any, expressions: Sequence[Any], at_once: int = 50) -> dict[str, Any]:
    """Test the model: for each expression a 0 or 1, and the mean loss of the answers' tokens.

    An answer is exact if each of its tokens, and the end of the sequence after it, is the model's first choice. Greedy
    generation would say the same tokens.
    """
    import torch
    import torch.nn.functional as F

    exact, total, count = "", 0.0, 0
    with torch.no_grad():
        for start in range(0, len(expressions), at_once):
            inputs, labels = encoder.training_batch(expressions[start : start + at_once])
            width = labels.shape[1]
            logits = model(**inputs, logits_to_keep=width + 1).logits[:, -width - 1 : -1]
            asked = labels >= 0
            right = (logits.argmax(-1) == labels) | ~asked
            exact += "".join(str(int(row)) for row in right.all(1))
            total += F.cross_entropy(logits[asked].float(), labels[asked], reduction="sum").item()
            count += int(asked.sum())
    return {"exact": exact, "loss": total / count}


def run_one(base: Any, encoder: Any, form: Form, rate: float, seed: int, settings: Settings) -> dict[str, Any]:
    """Train and test a copy of `base`."""
    import torch

    validation, tested, parts = draw(settings)
    size, training = settings.batch_size, parts[seed]
    batches = [encoder.training_batch(training[i : i + size]) for i in range(0, len(training), size)]
    prompts = encoder.inputs([encoder.prompt(expression) for expression in training[:_MEASURED]])
    start = time.perf_counter()
    torch.manual_seed(seed)
    model, method, stages = attach(form, copy.deepcopy(base), rate, prompts)
    losses = [train(model, method, stage, batches) for stage in stages]
    seconds = time.perf_counter() - start
    measured = encoder.inputs([encoder.prompt(expression) for expression in validation[:_MEASURED]])
    return {
        "rate": rate,
        "seed": seed,
        "trained": stages[-1].trained,
        "validation": None if seed else test(model, encoder, validation),
        "test": test(model, encoder, tested),
        "shifts": shift_medians(model, measured) if steered_modules(model) else [],
        "losses": losses,
        "seconds": seconds,
    }


# ------------------------------------------------------------------------------------------------------------ the runs


def runs_of(results: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the runs of a form with seed 0, by rate, then those of the other seeds."""
    found = [run for run in results["runs"] if run["form"] == name]
    return sorted(found, key=lambda run: (run["seed"], run["rate"]))


def best_rate(runs: Sequence[Mapping[str, Any]]) -> float:
    """Return the rate that validates best with seed 0: the most exact answers, and on a tie the smallest loss."""
    first = [run for run in runs if run["seed"] == 0]
    return min(first, key=lambda run: (-run["validation"]["exact"].count("1"), run["validation"]["loss"]))["rate"]


def missing(results: Mapping[str, Any], names: Sequence[str], seeds: int) -> Iterator[tuple[str, float, int]]:
    """Yield the runs that are not done yet; `results` may grow between two of them. The first seed comes first."""
    for seed in range(seeds):
        for name in names:
            done = {(run["rate"], run["seed"]) for run in runs_of(results, name)}
            rates = FORMS[name].rates if seed == 0 else (best_rate(runs_of(results, name)),)
            for rate in rates:
                if (rate, seed) not in done:
                    yield name, rate, seed


def run_all(file: Path, settings: Settings, groups: Sequence[str], load_base: Callable[[], tuple[Any, Any]]) -> int:
    """Do every run of the groups that is not in the file, and save after each; return the number of new runs.

    Args:
        load_base: returns the untrained model and its encoder. It is called if there is a run to do.

    Raises:
        ValueError: the file has other settings or is no results file.
        RuntimeError: a loss is not finite.
    """
    import torch

    results = load(file) if file.exists() else None
    if results is not None:
        theirs, ours = results["settings"], dataclasses.asdict(settings)
        for name in ours:
            if theirs.get(name) != ours[name]:
                raise ValueError(f"{name} is {ours[name]} but {theirs.get(name)} in {file}; expected the same")
    torch.set_num_threads(settings.threads)
    base = encoder = None
    machine = describe_machine(torch.device("cpu"), "bench.study")
    started = {key: machine[key] for key in ("commit", "dirty", "date")}
    done = 0
    for group in groups:
        while (key := next(missing(results or {"runs": []}, GROUPS[group], settings.seeds), None)) is not None:
            if base is None:
                base, encoder = load_base()
            if results is None:
                results = {"schema": SCHEMA, "machine": machine, "settings": dataclasses.asdict(settings)}
                results |= {"base": describe_base(base, encoder, settings), "runs": []}
            name, rate, seed = key
            run = run_one(base, encoder, FORMS[name], rate, seed, settings)
            results["runs"].append({"form": name, **run, **started})
            write_json(results, file)
            gc.collect()  # a model that is in a cycle would hold its memory for some more runs
            done += 1
            shown = f"{percent(run['test']['exact']):.1f} % exact, {run['seconds']:.0f} s"
            typer.echo(f"{name}, rate {rate:g}, seed {seed}: {shown}")
    return done


def describe_base(base: Any, encoder: Any, settings: Settings) -> dict[str, Any]:
    """Test the untrained model, and one that ignores inner brackets."""
    from fused_steer.tools.listops import evaluate, ignoring_brackets

    _, tested, _ = draw(settings)
    return {
        "parameters": sum(p.numel() for p in base.parameters()),
        "ignoring_brackets": sum(ignoring_brackets(e) == evaluate(e) for e in tested),
        **test(base, encoder, tested),
    }


def load(file: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        ValueError: the file is no results file, or has another schema.
        FileNotFoundError: there is no such file.
    """
    return read_run(file, "bench.study", SCHEMA, {"machine", "settings", "base", "runs"})


def percent(exact: str) -> float:
    return 100 * exact.count("1") / len(exact)


# ---------------------------------------------------------------------------------------------------------- the report

#: Of each group: its heading, the form that the others are compared with, and a sentence.
PARTS: dict[str, tuple[str, str, str]] = {
    "activations": (
        "Activations",
        "silu",
        """Steering of rank 8 at `post_block`. A *normalised read* is a = W1 h / rms(h), in plain PyTorch: the kernels
        do not have it.""",
    ),
    "sites": (
        "Sites",
        "identity",
        "The identity, rank 8, with the same number of parameters at every [site](sites.md).",
    ),
    "rivals": (
        "Rivals",
        "identity",
        """Post-block steering, of rank 8 with the identity and with SiLU, of rank 1 (identity), and as a vector, beside
        LoRA, ReFT, JoLA and LoFiT. LoFiT trains twice as long: it first selects its heads.""",
    ),
    "starts": (
        "Initial values of W1",
        "silu",
        """SiLU, rank 8, at `post_block`. *By the stream* divides each layer's initial W1 by the median over tokens of
        rms(h), so that its pre-activations begin at the same size in every layer.""",
    ),
}


def chosen_runs(results: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return a form's runs at the rate that validates best, by seed; empty if it has none."""
    runs = runs_of(results, name)
    return [run for run in runs if run["rate"] == best_rate(runs)] if runs else []


def against(results: Mapping[str, Any], name: str, other: str) -> str:
    """Return the difference in exact answers of one form to another, in points, by the seeds that both have."""
    from .joint import Difference

    ours, theirs = ({run["seed"]: run["test"]["exact"] for run in chosen_runs(results, one)} for one in (name, other))
    seeds = sorted(ours.keys() & theirs.keys())
    if name == other or not seeds:
        return "–"
    rows = [[100 * (int(a) - int(b)) for a, b in zip(ours[seed], theirs[seed], strict=True)] for seed in seeds]
    means = [statistics.fmean(column) for column in zip(*rows, strict=True)]
    found = Difference([statistics.fmean(row) for row in rows], statistics.stdev(means) / math.sqrt(len(means)))
    verdict = ("better" if found.mean > 0 else "worse") if found.shown and len(seeds) > 1 else "not told apart"
    return f"{found.mean:+.1f} ± {found.error:.1f}, {verdict}"


def row_of(results: Mapping[str, Any], name: str, other: str) -> list[str]:
    """Return a form's row in the table of a group that is compared with `other`."""
    from .joint import spread

    runs, form = chosen_runs(results, name), FORMS[name]
    if not runs:
        return [form.title, "not run", *["–"] * 7]
    rates = sorted({run["rate"] for run in runs_of(results, name)})
    asleep = [sum(shift < ASLEEP for shift in run["shifts"]) for run in runs if run["shifts"]]
    return [
        form.title,
        f"{runs[0]['trained']:,}",
        f"{runs[0]['rate']:g} of {', '.join(f'{rate:g}' for rate in rates)}",
        f"**{spread([percent(run['test']['exact']) for run in runs], 1)}**",
        ", ".join(f"{percent(run['test']['exact']):.1f}" for run in runs),
        spread([run["test"]["loss"] for run in runs], 3),
        against(results, name, other),
        ", ".join(map(str, asleep)) or "–",
        f"{statistics.median(run['seconds'] for run in runs):.0f}",
    ]


def rows_of_rates(results: Mapping[str, Any], name: str) -> list[list[str]]:
    """Return a row for each rate that a form was tried at with seed 0."""
    return [
        [
            FORMS[name].title,
            f"{run['rate']:g}",
            f"{percent(run['validation']['exact']):.1f}",
            f"{run['validation']['loss']:.3f}",
            f"{percent(run['test']['exact']):.1f}",
            str(sum(shift < ASLEEP for shift in run["shifts"])) if run["shifts"] else "–",
        ]
        for run in runs_of(results, name)
        if run["seed"] == 0
    ]


def report_text(results: Mapping[str, Any]) -> str:
    """Return the text of docs/study-listops.md."""
    from .joint import paragraph, table

    settings, base, machine = (results[name] for name in ("settings", "base", "machine"))
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "transformers", "peft"))
    commits = ", ".join(sorted({str(run["commit"])[:12] for run in results["runs"]}))
    parts = [
        "<!-- Written by `python -m bench.study --report` from bench/results/study/listops-cpu.json. Do not edit. -->",
        "# Sites, activations and rivals on ListOps",
        paragraph(f"""This page compares forms of steering with each other and with other methods. It is one small model
        ({settings["model"] or "SmolLM2-135M-Instruct"}, {base["parameters"]:,} parameters), one easy task, and a short
        training: {settings["steps"]} steps of {settings["batch_size"]} expressions. It says little about larger models,
        harder tasks or longer training. Try the candidates on your own validation set
        ([choosing](choosing.md))."""),
        paragraph(f"""The task is the demo's, ListOps of {" and ".join(OPERATORS)} with depth {DEPTH}, here with at most
        {settings["digits"]} digits: `[MAX 3 [MIN 4 7 ] ] = 4`. The untrained model is exact on
        {percent(base["exact"]):.1f} % of the {settings["tested"]} test expressions; a rule that ignores the inner
        brackets, on {100 * base["ignoring_brackets"] / settings["tested"]:.1f} %."""),
        paragraph(f"""Each form trains at each rate of its grid with seed 0. The other seeds train at the rate with the
        most exact answers on {settings["validated"]} validation expressions, on a tie the smallest loss. A seed
        chooses the training expressions and the initial values. Training follows the paper's F.5: AdamW without weight
        decay, a constant rate for all but LoRA, which has a cosine with a warm-up of 0.06; gradients are clipped to a
        norm of 1. ReFT edits all tokens, at `post_block`, as steering does; the ReFT of the paper edits the MLP's
        output (`post_mlp`). The grids of steering and of ReFT were moved to lower rates after the first runs; those of
        LoRA, JoLA and LoFiT were not. Where the best rate is the lowest or the highest of its grid, a better one may
        lie outside."""),
        paragraph("""*Exact* is the mean over the seeds, with the least and the greatest. *Loss* is that of the answers'
        tokens. The *difference* is in points of exact answers, over the seeds that both forms have, ± its standard
        error over the test expressions; a form is *better* or *worse* if it has several seeds, all agree on the sign,
        and the mean exceeds two standard errors. *Asleep* counts, for each seed, the layers with a median ‖δ‖/‖h‖
        below 0.001 ([diagnostics](diagnostics.md)). *Seconds* are those of training, on a busy CPU: they compare
        nothing but the cost of trying it."""),
    ]
    for group, (title, other, text) in PARTS.items():
        if any(runs_of(results, name) for name in GROUPS[group] if name != other):
            head = ["", "trained", "rate", "exact, %", "by seed", "loss", f"against {FORMS[other].title}"]
            rows = [row_of(results, name, other) for name in GROUPS[group]]
            parts += [f"## {title}", paragraph(text), table([*head, "asleep", "seconds"], rows)]
    head = ["", "rate", "validation, %", "validation loss", "test, %", "asleep"]
    parts += ["## Every rate, seed 0", table(head, [row for name in FORMS for row in rows_of_rates(results, name)])]
    parts.append(
        paragraph(f"""Made by `python -m bench.study`: {machine["cores"]} CPU cores ({machine["device"]}),
        {settings["threads"]} thread, Python {machine["python"]}, fused-steer {machine["fused_steer"]}, {versions},
        commit {commits}, {machine["date"][:10]}. The same command does the runs that are missing.""")
    )
    return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------------------------------------- command

app = typer.Typer(add_completion=False)


def load_smollm2(settings: Settings) -> tuple[Any, Any]:
    import torch

    from fused_steer.tools.demo import Encoder, load_model

    device = torch.device("cpu")
    base, tokenizer = load_model(settings.model, device)
    return base, Encoder(tokenizer, device)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder of results; the file is study/listops-cpu.json in it.")] = FOLDER,
    groups: Annotated[str, typer.Option(help=f"Some of {', '.join(GROUPS)}, in the order to run.")] = ",".join(GROUPS),
    model: Annotated[str | None, typer.Option(help="Directory or hub id; default: SmolLM2-135M-Instruct.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of each stage of training.")] = Settings.steps,
    validated: Annotated[int, typer.Option(help="Expressions to choose rates by.")] = Settings.validated,
    tested: Annotated[int, typer.Option(help="Expressions to test with.")] = Settings.tested,
    seeds: Annotated[int, typer.Option(help="Seeds of each form.")] = Settings.seeds,
    threads: Annotated[
        int, typer.Option(help="PyTorch's threads; another number may give other bits.")
    ] = Settings.threads,
    report: Annotated[bool, typer.Option("--report", help="Train nothing; write the report of the results.")] = False,
    docs: Annotated[Path, typer.Option(help="Folder of study-listops.md.")] = ROOT / "docs",
) -> None:
    """Train and test every form; or write the report of that."""
    from .paper.__main__ import chosen

    try:
        if report:
            page = docs / "study-listops.md"
            page.write_text(report_text(load(results_file(out))), encoding="utf-8")
            typer.echo(f"written: {page}")
            return
        settings = Settings(model, steps, validated=validated, tested=tested, seeds=seeds, threads=threads)
        names = chosen(groups, GROUPS, "groups")
        done = run_all(results_file(out), settings, names, functools.partial(load_smollm2, settings))
        typer.echo(f"{done} new runs; the results are in {results_file(out)}")
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        typer.echo(f"bench.study: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
