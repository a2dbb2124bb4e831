"""`python -m bench.joint`: LoRA, steering and both, trained on ListOps on a CPU. Does the orthogonal constraint help?

Four methods train SmolLM2-135M-Instruct on the same expressions in the same order: LoRA alone, steering alone, both
without a constraint, and both with `SteerConfig(orthogonal_to="lora")` (Joint-Orth, arXiv 2603.00425, §5.2). Each
method runs with every seed and is tested once, after training. A run that is in the results file is not repeated, so
the same command resumes an interrupted experiment. `--report` writes `docs/joint-listops.md` from the file.

The settings were fixed before the first run, within the paper's ranges. Nothing was chosen on the held-out set.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import itertools
import math
import statistics
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .results import FOLDER, command_line, describe_machine, read_run, write_json

SCHEMA = 1
METHODS = {"lora": "LoRA", "steering": "steering", "joint": "naive joint", "joint-orth": "joint-orth"}
JOINT = ("joint", "joint-orth")
OPERATORS, DEPTH = ("MAX", "MIN", "MED", "SM"), 2
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DATA_SEED = 0  # the seed of the expressions; a run's own seed selects its part of them and its initial values
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 101  # bins of the cosine from -1 to 1; the middle bin is centred on 0
LAST = 20  # the final loss is the mean loss of this many last steps
_TESTED_AT_ONCE = 50


@dataclass(frozen=True)
class Settings:
    """The settings that all runs share.

    The learning rate rises linearly over `warmup` steps and falls to 0 as a cosine over all steps.
    """

    model: str | None = None
    steps: int = 150
    batch_size: int = 8
    held_out: int = 200
    threads: int = 1  # on a busy machine one thread is as fast as two
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_lr: float = 5e-4
    steering_rank: int = 8
    steering_activation: str = "silu"
    steering_lr: float = 2e-3
    warmup: int = 10
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "held_out", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', ' ')} is {getattr(self, name)}; expected at least 1")


def results_file(out: Path) -> Path:
    """Return the path of the results file. It lies in a subfolder, because `bench.report` reads every file in `out`."""
    return out / "joint" / "listops-cpu.json"


# ------------------------------------------------------------------------------------------------------ the experiment


def draw(settings: Settings, seed: int) -> tuple[list[Any], list[Any]]:
    """Draw the held-out expressions, which are the same for every seed, and this seed's training expressions.

    No expression is drawn twice.
    """
    from fused_steer.tools.listops import distinct

    count = settings.steps * settings.batch_size
    end = settings.held_out + (seed + 1) * count
    drawn = distinct(end, operators=OPERATORS, depth=DEPTH, seed=DATA_SEED)
    return drawn[: settings.held_out], drawn[end - count :]


def adapt(model: Any, method: str, settings: Settings, seed: int) -> tuple[Any, list[dict[str, Any]]]:
    """Add the method's adapters; return the model and the optimizer's parameter groups.

    With one seed the adapters start from the same values in every method.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    from fused_steer import SteerConfig, lora_parameters, patch_model, steering_parameters

    groups = []
    if method != "steering":
        torch.manual_seed(seed)
        config = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=list(TARGETS))
        model = get_peft_model(model, config)
        groups.append({"params": lora_parameters(model), "lr": settings.lora_lr})
    if method != "lora":
        torch.manual_seed(seed)
        config = SteerConfig(
            rank=settings.steering_rank,
            activation=settings.steering_activation,
            orthogonal_to="lora" if method == "joint-orth" else None,
        )
        model = patch_model(model, config)
        groups.append({"params": steering_parameters(model), "lr": settings.steering_lr})
    return model, groups


def train(model: Any, groups: list[dict[str, Any]], batches: Sequence[Any], settings: Settings, label: str) -> Any:
    """Train with one AdamW step per batch; return the losses and the seconds of the steps.

    Raises:
        RuntimeError: the loss is no longer finite.
    """
    import torch

    from fused_steer.tools.demo import answer_loss

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / settings.warmup) * (1 + math.cos(math.pi * step / settings.steps)) / 2

    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses, seconds = [], []
    model.train()
    for step, batch in enumerate(batches):
        start = time.perf_counter()
        loss = answer_loss(model, *batch)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise RuntimeError(f"{label}: the loss of step {step + 1} is {losses[-1]}; expected it finite")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        if (step + 1) % LAST == 0 or step + 1 == len(batches):
            mean, pace = statistics.fmean(losses[-LAST:]), statistics.median(seconds[-LAST:])
            typer.echo(f"{label}: step {step + 1} of {len(batches)}, loss {mean:.3f}, {pace:.2f} s a step")
    model.eval()
    return losses, seconds


def test(model: Any, encoder: Any, expressions: Sequence[Any]) -> dict[str, Any]:
    """Test the model: an exact match (0 or 1) for each expression, and the mean loss of the answers' tokens."""
    import torch

    from fused_steer.tools.demo import answer_loss, complete, is_exact

    said = complete(model, encoder, expressions)
    total = count = 0.0
    with torch.no_grad():
        for start in range(0, len(expressions), _TESTED_AT_ONCE):
            inputs, labels = encoder.training_batch(expressions[start : start + _TESTED_AT_ONCE])
            tokens = int((labels >= 0).sum())
            total += answer_loss(model, inputs, labels).item() * tokens
            count += tokens
    exact = "".join(str(int(is_exact(*pair))) for pair in zip(said, expressions, strict=True))
    return {"exact": exact, "held_out_loss": total / count}


# --------------------------------------------------------------------------------------------------------- the overlap


class Shifts:
    """Computes two shifts of every layer: steering's W2 φ(W1 x), and (α/r) B A m of the LoRA on the MLP's output.

    x is the hidden state before steering, m the input of the MLP's output projection, both of one forward pass.
    """

    def __init__(self, model: Any, settings: Settings) -> None:
        """Find the steered layers and the MLP's LoRA modules of an untrained model with both adapters."""
        from fused_steer.adapters.parameters import SITE
        from fused_steer.lora.writers import choose_writers, trace_writers
        from fused_steer.model.decoder import find_decoder, inside_peft

        self.settings = settings
        decoder = find_decoder(inside_peft(model))
        layers = dict(enumerate(decoder.layers))
        with model.steering.disabled():  # the tracing pass must not count as a training pass
            writers = trace_writers(decoder.module, layers, decoder.hidden)
        self.sites = [getattr(layer, SITE) for layer in decoder.layers]
        self.writers = [[w.module for w in choose_writers(writers[i], "mlp")] for i in layers]

    def of_batch(self, model: Any, inputs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
        """Yield both shifts of each layer, each (tokens, d) without the padding."""
        import torch
        import torch.nn.functional as F
        from fused_steer.kernels.torch_backend import ACTIVATIONS

        read: dict[Any, Any] = {}

        def keep(module: Any, args: Any, output: Any) -> None:
            read[module] = sum(arg for arg in args if arg is not None)  # a site's: residual + branch

        every = [*self.sites, *itertools.chain(*self.writers)]
        handles = [module.register_forward_hook(keep) for module in every]
        try:
            with torch.no_grad():
                model(**inputs, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
        tokens = inputs["attention_mask"].bool()
        phi = ACTIVATIONS[self.settings.steering_activation][0]
        with torch.no_grad():
            for site, writers in zip(self.sites, self.writers, strict=True):
                adapter = site.adapter("default")
                steering = F.linear(phi(F.linear(read[site][tokens], adapter.down.weight)), adapter.up.weight)
                lora = sum(
                    w.lora_B["default"](w.lora_A["default"](read[w][tokens])) * w.scaling["default"] for w in writers
                )
                yield steering, lora

    def weight_overlap(self) -> list[float]:
        """Compute ‖BᵀW2‖ / (‖B‖ ‖W2‖) of each layer with Frobenius norms in float64."""
        import torch

        found = []
        for site, writers in zip(self.sites, self.writers, strict=True):
            b = torch.cat([w.lora_B["default"].weight for w in writers], 1).detach().double()
            up = site.adapter("default").up.weight.detach().double()
            found.append(float((b.T @ up).norm() / (b.norm() * up.norm())))
        return found


def overlap(model: Any, encoder: Any, expressions: Sequence[Any], shifts: Shifts) -> dict[str, Any]:
    """Measure the cosine between the two shifts over all prompt tokens: quantiles by layer, and one histogram.

    Raises:
        RuntimeError: a layer has no token with both shifts, so there is no cosine.
    """
    import torch

    cosines: list[list[Any]] = [[] for _ in shifts.sites]
    ratios: list[list[Any]] = [[] for _ in shifts.sites]
    for start in range(0, len(expressions), _TESTED_AT_ONCE):
        rows = [encoder.prompt(expression) for expression in expressions[start : start + _TESTED_AT_ONCE]]
        for i, (steering, lora) in enumerate(shifts.of_batch(model, encoder.inputs(rows))):
            a, b = steering.double(), lora.double()
            norms = a.norm(dim=1), b.norm(dim=1)
            both = (norms[0] > 0) & (norms[1] > 0)
            cosines[i].append(((a * b).sum(1) / (norms[0] * norms[1]))[both])
            ratios[i].append((norms[0] / norms[1])[both])
    layers = []
    for i, (cosine, ratio) in enumerate(zip(map(torch.cat, cosines), map(torch.cat, ratios), strict=True)):
        if not len(cosine):
            raise RuntimeError(f"layer {i} has no token with both shifts; expected a cosine between them")
        quantiles = torch.quantile(cosine, cosine.new_tensor(QUANTILES)).tolist()
        layers.append(
            {
                "tokens": len(cosine),
                "quantiles": quantiles,
                "mean_abs": float(cosine.abs().mean()),
                "max_abs": float(cosine.abs().max()),
                "median_norm_ratio": float(ratio.median()),
            }
        )
    every = torch.cat([torch.cat(cosine) for cosine in cosines])
    histogram = torch.histc(every, BINS, -1, 1).int().tolist()
    return {"layers": layers, "histogram": histogram, "weight_overlap": shifts.weight_overlap()}


# ------------------------------------------------------------------------------------------------------------ the runs


def run_one(base: Any, encoder: Any, method: str, seed: int, settings: Settings, label: str) -> dict[str, Any]:
    """Train and test a copy of `base`."""
    held_out, training = draw(settings, seed)
    size = settings.batch_size
    batches = [encoder.training_batch(training[i : i + size]) for i in range(0, len(training), size)]
    model, groups = adapt(copy.deepcopy(base), method, settings, seed)
    shifts = Shifts(model, settings) if method in JOINT else None
    losses, seconds = train(model, groups, batches, settings, label)
    run = {
        "method": method,
        "seed": seed,
        "trained": sum(p.numel() for group in groups for p in group["params"]),
        **test(model, encoder, held_out),
        "losses": losses,
        "seconds": seconds,
    }
    return run | ({"overlap": overlap(model, encoder, held_out, shifts)} if shifts else {})


def run_all(file: Path, settings: Settings, seeds: Sequence[int]) -> None:
    """Run every method with every seed, except the runs already in the file; save after each run.

    Raises:
        ValueError: the file has other settings or is no results file, or the model cannot be adapted.
        OSError: the model is missing, or the file cannot be written.
    """
    import torch

    from fused_steer.tools.demo import Encoder, load_model
    from fused_steer.tools.listops import evaluate, ignoring_brackets

    results = load(file) if file.exists() else None
    if results is not None:
        theirs, ours = results["settings"], dataclasses.asdict(settings)
        for name in ours:
            if theirs.get(name) != ours[name]:
                raise ValueError(f"{name} is {ours[name]} but {theirs.get(name)} in {file}; expected the same")
    done = {(run["method"], run["seed"]) for run in results["runs"]} if results else set()
    todo = [(method, seed) for seed in seeds for method in METHODS if (method, seed) not in done]
    if not todo:
        typer.echo(f"all {len(done)} runs are in {file}")
        return
    torch.set_num_threads(settings.threads)
    device = torch.device("cpu")
    base, tokenizer = load_model(settings.model, device)
    encoder = Encoder(tokenizer, device)
    machine = describe_machine(device) | {"command": command_line("bench.joint")}
    if results is None:
        held_out, _ = draw(settings, 0)
        values = [evaluate(expression) for expression in held_out]
        results = {
            "schema": SCHEMA,
            "machine": machine,
            "settings": dataclasses.asdict(settings),
            "task": {
                "ignoring_brackets": sum(ignoring_brackets(e) == v for e, v in zip(held_out, values, strict=True)),
                "most_frequent_answer": max(collections.Counter(values).values()),
                "parameters": sum(p.numel() for p in base.parameters()),
                **test(base, encoder, held_out),  # untrained
            },
            "runs": [],
        }
        typer.echo(f"untrained: {results['task']['exact'].count('1')} of {len(held_out)} exact")
    for number, (method, seed) in enumerate(todo, 1):
        label = f"[{number}/{len(todo)}] {METHODS[method]}, seed {seed}"
        run = run_one(base, encoder, method, seed, settings, label)
        results["runs"].append(run | {key: machine[key] for key in ("commit", "dirty", "date")})
        write_json(results, file)
        typer.echo(f"{label}: {run['exact'].count('1')} of {len(run['exact'])} exact")


def load(file: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        ValueError: the file is no results file, or has another schema.
        FileNotFoundError: there is no such file.
    """
    return read_run(file, "bench.joint", SCHEMA, {"machine", "settings", "task", "runs"})


# ---------------------------------------------------------------------------------------------------------- the report


@dataclass(frozen=True)
class Difference:
    """The difference in exact match between two methods, in percentage points.

    Attributes:
        seeds: the difference for each seed that both methods have.
        error: the standard error of the mean over the held-out expressions, after averaging each expression over the
            seeds. It does not include the variation between seeds.
    """

    seeds: list[float]
    error: float

    @property
    def mean(self) -> float:
        return statistics.fmean(self.seeds)

    @property
    def shown(self) -> bool:
        """Whether all seeds agree on the sign and the mean exceeds two standard errors."""
        agree = all(seed > 0 for seed in self.seeds) or all(seed < 0 for seed in self.seeds)
        return agree and abs(self.mean) > 2 * self.error


def difference(results: dict[str, Any], method: str, other: str) -> Difference | None:
    """Return the difference of `method` over `other`, or None if no seed has both methods."""
    ours, theirs = ({run["seed"]: run["exact"] for run in runs_of(results, name)} for name in (method, other))
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    rows = [[100 * (int(a) - int(b)) for a, b in zip(ours[seed], theirs[seed], strict=True)] for seed in seeds]
    means = [statistics.fmean(column) for column in zip(*rows, strict=True)]
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.inf
    return Difference([statistics.fmean(row) for row in rows], error)


def runs_of(results: dict[str, Any], method: str) -> list[dict[str, Any]]:
    """Return the runs of a method, ordered by seed."""
    return sorted((run for run in results["runs"] if run["method"] == method), key=lambda run: run["seed"])


def complete(results: dict[str, Any]) -> dict[str, Any]:
    """Return the results reduced to the seeds that all methods have; "left_out" lists the labels of the other runs.

    Raises:
        ValueError: no seed has all methods.
    """
    common = set.intersection(*({run["seed"] for run in runs_of(results, method)} for method in METHODS))
    if not common:
        ran = ", ".join(f"{METHODS[run['method']]} {run['seed']}" for run in results["runs"]) or "none"
        raise ValueError(f"the runs are of {ran}; expected a seed with all of {', '.join(METHODS.values())}")
    kept = [run for run in results["runs"] if run["seed"] in common]
    left_out = [f"{METHODS[run['method']]} of seed {run['seed']}" for run in results["runs"] if run not in kept]
    return results | {"runs": kept, "left_out": left_out}


def percent(exact: str) -> float:
    return 100 * exact.count("1") / len(exact)


def paragraph(text: str) -> str:
    """Return the text as one Markdown paragraph, wrapped at 120 columns."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def _mean_exact(results: dict[str, Any], method: str) -> float:
    return statistics.fmean(percent(run["exact"]) for run in runs_of(results, method))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with a first column of text and right-aligned figures after it."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Sequence[float], decimals: int) -> str:
    """Format values as mean (least–greatest), as in `61.2 (58.0–64.5)`; a single value as itself."""
    mean, low, high = (f"{value:.{decimals}f}" for value in (statistics.fmean(values), min(values), max(values)))
    return f"{mean} ({low}–{high})" if len(values) > 1 else mean


def report_text(results: dict[str, Any]) -> str:
    """Return the text of `docs/joint-listops.md` from results that `complete` returned."""
    parts = [
        "<!-- Written by `python -m bench.joint --report` from bench/results/joint/listops-cpu.json. Do not edit. -->",
        "# Joint adaptation on ListOps",
        _outcome(results),
        _accuracy(results),
        "![Training loss of each method](joint-listops-losses.png)",
        _overlap(results),
        "![Cosine between the steering shift and the LoRA shift](joint-listops-cosines.png)",
        _overlap_by_layer(results),
        _setting(results),
    ]
    return "\n\n".join(parts) + "\n"


def _outcome(results: dict[str, Any]) -> str:
    pairs = [("joint-orth", "joint"), ("joint-orth", "lora"), ("joint-orth", "steering"), ("joint", "lora")]
    found = {pair: difference(results, *pair) for pair in pairs}
    main = found[pairs[0]]
    if main is None or not main.shown:
        headline = "Joint-orth is not shown to be better than naive joint here, nor worse."
    else:
        headline = f"Joint-orth is {'better' if main.mean > 0 else 'worse'} than naive joint here."
    seeds = len({run["seed"] for run in results["runs"]})
    scope = f"""This page compares four ways to adapt a small model to ListOps: LoRA, steering, both trained together
        (naive joint), and both with the steering kept orthogonal to the LoRA (joint-orth, see
        [joint training](joint.md)). It is one model of {results["task"]["parameters"] / 1e6:.1f} million parameters,
        one task, {results["settings"]["steps"]} steps, {seeds} seed{"s" if seeds > 1 else ""} and no tuning. It says
        nothing about larger models or longer training."""
    if results["left_out"]:
        scope += f" Not all methods were run with every seed; left out: {', '.join(results['left_out'])}."
    rule = """A method is *better* or *worse* if all seeds agree on the sign and the mean exceeds two standard errors.
        The standard error is over the held-out expressions, which are the same for all runs. The differences by seed
        stand beside it. The loss is the loss of the held-out answers: lower is better, and it decides no verdict."""
    lines = "\n".join(_verdict(results, *pair, diff) for pair, diff in found.items())
    return "\n\n".join([paragraph(f"**{headline}** {scope}"), lines, paragraph(rule)])


def _verdict(results: dict[str, Any], method: str, other: str, diff: Difference | None) -> str:
    start = f"- {METHODS[method]} against {METHODS[other]}: "
    if diff is None:
        return start + "no seed has both"
    ours, theirs = ({run["seed"]: run["held_out_loss"] for run in runs_of(results, name)} for name in (method, other))
    losses = ", ".join(f"{ours[seed] - theirs[seed]:+.3f}" for seed in sorted(ours.keys() & theirs.keys()))
    verdict = ("**better**" if diff.mean > 0 else "**worse**") if diff.shown else "not told apart"
    each = ", ".join(f"{seed:+.1f}" for seed in diff.seeds)
    return (
        f"{start}{verdict}; {diff.mean:+.1f} points of exact match (by seed {each}; standard error {diff.error:.1f}), "
        f"loss by seed {losses}"
    )


def _accuracy(results: dict[str, Any]) -> str:
    task, count = results["task"], results["settings"]["held_out"]
    rows = []
    for method, name in METHODS.items():
        runs = runs_of(results, method)
        exact = [percent(run["exact"]) for run in runs]
        rows.append(
            [
                name,
                f"{runs[0]['trained']:,} ({runs[0]['trained'] / task['parameters']:.2%})",
                spread(exact, 1),
                ", ".join(f"{value:.1f}" for value in exact),
                spread([run["held_out_loss"] for run in runs], 3),
                spread([statistics.fmean(run["losses"][-LAST:]) for run in runs], 3),
                spread([statistics.median(run["seconds"]) for run in runs], 2),
                spread([sorted(run["seconds"])[len(run["seconds"]) // 10] for run in runs], 2),
            ]
        )
    head = [
        "method",
        "trained parameters",
        "exact, %",
        "each seed",
        "held-out loss",
        "final loss",
        "s per step",
        "fastest tenth",
    ]
    flat = 100 * task["ignoring_brackets"] / count
    error = math.sqrt(flat * (100 - flat) / count)
    above = [name for method, name in METHODS.items() if _mean_exact(results, method) > flat + 2 * error]
    note = f"""Each cell has the mean over the seeds and, in parentheses, the least and the greatest. *Exact* is the
        share of exact matches on the same {count} held-out expressions. *Held-out loss* is the mean cross entropy of
        their answers' tokens. *Final loss* is the training loss of the last {LAST} steps. *s per step* is the median
        of a run's steps, *fastest tenth* their lower decile. The machine also did other work, more in some runs than
        in others, so these times do not compare the methods. Three baselines: the untrained model gets
        {percent(task["exact"]):.1f} % (held-out loss {task["held_out_loss"]:.3f}). Always giving the most frequent
        answer gets {100 * task["most_frequent_answer"] / count:.1f} %. Ignoring the inner brackets gets {flat:.1f} %;
        {" and ".join(above) or "no method"} exceeded this by two standard errors ({2 * error:.1f} points)."""
    return "\n\n".join(["## Accuracy and loss", table(head, rows), paragraph(note)])


def _overlap(results: dict[str, Any]) -> str:
    rows = []
    for method in JOINT:
        overlaps = [run["overlap"] for run in runs_of(results, method)]
        layers = [layer for overlap in overlaps for layer in overlap["layers"]]
        means = [statistics.fmean(layer["mean_abs"] for layer in overlap["layers"]) for overlap in overlaps]
        rows.append(
            [
                METHODS[method],
                _small(statistics.fmean(means)),
                _small(max(layer["mean_abs"] for layer in layers)),
                _small(max(layer["max_abs"] for layer in layers)),
                _small(max(max(overlap["weight_overlap"]) for overlap in overlaps)),
                _small(statistics.median(layer["median_norm_ratio"] for layer in layers)),
            ]
        )
    head = ["method", "mean abs. cosine", "of the worst layer", "of the worst token", "max ‖BᵀW2‖/(‖B‖‖W2‖)", "‖δ‖/‖ℓ‖"]
    steering = runs_of(results, "steering")[0]["trained"]
    layers = len(runs_of(results, JOINT[0])[0]["overlap"]["layers"])
    hidden = steering // (2 * results["settings"]["steering_rank"] * layers)  # W1 and W2 of each layer
    start = """δ = W2 φ(W1 x) is the shift that steering adds. ℓ = (α/r) B A m is the shift of the LoRA on the MLP's
        output projection; joint-orth keeps W2 orthogonal to its B. The table shows their cosine, measured at each
        layer and each token of the held-out prompts:"""
    end = f"""All seeds are included. The last column is the median over layers of the median over tokens. Two random
        directions of d = {hidden} have a mean absolute cosine of {math.sqrt(2 / (math.pi * hidden)):.3f}. For
        joint-orth the cosine is 0 by construction; its figures are rounding errors."""
    return "\n\n".join(["## Where steering and LoRA overlap", paragraph(start), table(head, rows), paragraph(end)])


def _overlap_by_layer(results: dict[str, Any]) -> str:
    rows = []
    naive, orthogonal = ([run["overlap"]["layers"] for run in runs_of(results, method)] for method in JOINT)
    for index in range(len(naive[0])):
        quantiles = [
            statistics.fmean(layers[index]["quantiles"][number] for layers in naive) for number in range(len(QUANTILES))
        ]
        mean_abs = statistics.fmean(layers[index]["mean_abs"] for layers in naive)
        greatest = max(layers[index]["max_abs"] for layers in orthogonal)
        rows.append([str(index), *(f"{q:+.3f}" for q in quantiles), f"{mean_abs:.3f}", _small(greatest)])
    head = ["layer", *(f"{q:.0%}" for q in QUANTILES), "mean abs.", "joint-orth: greatest abs."]
    return f"""\
Quantiles of the cosine over tokens in naive joint (means over the seeds), and the greatest cosine of joint-orth:

{table(head, rows)}"""


def _small(value: float) -> str:
    return f"{value:.3f}" if value >= 1e-3 else f"{value:.0e}"


def _setting(results: dict[str, Any]) -> str:
    s, machine = results["settings"], results["machine"]
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "transformers", "peft"))
    edited = {True: " with uncommitted changes", False: ""}
    commits = sorted({(run["commit"] or "unknown") + edited[run["dirty"]] for run in results["runs"]})
    how = f"""{s["model"] or "SmolLM2-135M-Instruct"} in float32; ListOps of {", ".join(OPERATORS)}, depth {DEPTH};
        {s["steps"]} steps of {s["batch_size"]} expressions. Each expression is seen once. Each seed has its own
        expressions; all methods see them in the same order. LoRA: PEFT's, r = {s["lora_rank"]},
        α = {s["lora_alpha"]}, no dropout, on {", ".join(TARGETS)}; learning rate {s["lora_lr"]:g}. Steering: rank
        {s["steering_rank"]}, {s["steering_activation"]}, every layer; learning rate {s["steering_lr"]:g}. AdamW
        without weight decay, gradients clipped to norm {s["max_grad_norm"]:g}; {s["warmup"]} steps of linear warm-up
        and a cosine that falls to 0. With one seed the adapters start from the same values in every method. All
        settings were fixed before the first run. Nothing was chosen on the held-out set."""
    on = f"""fused-steer {machine["fused_steer"]}, {versions}, Python {machine["python"]}; a CPU ({machine["device"]})
        of {machine["cores"]} cores, threads used: {s["threads"]}; commit {", ".join(commits)}; {machine["date"]}."""
    return f"""\
## How it was run

{paragraph(how)}

{paragraph(on)}

```bash
python -m bench.joint --out bench/results  # resumes where it stopped
python -m bench.joint --report             # writes this file and its pictures
```"""


def draw_losses(results: dict[str, Any], file: Path) -> None:
    """Draw the training loss of each method as a PNG: a line per seed, each point the mean of ten steps."""
    figure, (axes,) = _figure(1, (6, 4))
    for colour, (method, name) in enumerate(METHODS.items()):
        for number, run in enumerate(runs_of(results, method)):
            losses = run["losses"]
            means = [statistics.fmean(losses[max(0, i - 9) : i + 1]) for i in range(len(losses))]
            axes.plot(range(1, len(means) + 1), means, color=f"C{colour}", linewidth=1, label=None if number else name)
    axes.set(xlabel="step", ylabel="loss of the answer tokens, mean of 10", yscale="log", title="Training")
    axes.legend()
    figure.savefig(file, dpi=110)


def draw_cosines(results: dict[str, Any], file: Path) -> None:
    """Draw the cosine between both shifts as a PNG: its spread by layer, and a histogram over all layers and tokens."""
    figure, (by_layer, over_all) = _figure(2, (10, 4))
    edges = [2 * i / BINS - 1 for i in range(BINS + 1)]
    for colour, method in zip(("C2", "C3"), JOINT, strict=True):
        overlaps = [run["overlap"] for run in runs_of(results, method)]
        low, _, middle, _, high = (
            [
                statistics.fmean(layer["quantiles"][number] for layer in layers)
                for layers in zip(*(overlap["layers"] for overlap in overlaps), strict=True)
            ]
            for number in range(len(QUANTILES))
        )
        by_layer.fill_between(range(len(low)), low, high, color=colour, alpha=0.25, linewidth=0)
        by_layer.plot(middle, color=colour, marker=".", label=f"{METHODS[method]}: median, 5 % to 95 %")
        counts = [sum(column) for column in zip(*(overlap["histogram"] for overlap in overlaps), strict=True)]
        over_all.stairs([count / sum(counts) for count in counts], edges, color=colour, label=METHODS[method])
    by_layer.set(xlabel="layer", ylabel="cosine", title="Over tokens, by layer")
    over_all.set(xlabel="cosine", ylabel=f"share, a bin of {2 / BINS:.3f}", yscale="log", title="All tokens and layers")
    for axes in (by_layer, over_all):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=110)


def _figure(panels: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, panels, number + 1) for number in range(panels)]


def write_report(file: Path, docs: Path) -> None:
    """Write the report and its pictures to `docs`.

    Raises:
        ValueError: the file is no results file, or has no seed that all methods have.
        OSError: a file cannot be read or written.
    """
    results = complete(load(file))
    text = report_text(results)
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "joint-listops.md").write_text(text, encoding="utf-8")
    draw_losses(results, docs / "joint-listops-losses.png")
    draw_cosines(results, docs / "joint-listops-cosines.png")
    typer.echo(f"written: {docs / 'joint-listops.md'} and its pictures")


# ------------------------------------------------------------------------------------------------------------- command

app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder of the results file, joint/listops-cpu.json.")] = FOLDER,
    model: Annotated[str | None, typer.Option(help="Directory or hub id. Default: SmolLM2-135M-Instruct.")] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds: 0, 1, ...")] = 3,
    steps: Annotated[int, typer.Option(help="Training steps.")] = Settings.steps,
    batch_size: Annotated[int, typer.Option(help="Expressions per step.")] = Settings.batch_size,
    held_out: Annotated[int, typer.Option(help="Number of test expressions.")] = Settings.held_out,
    threads: Annotated[int, typer.Option(help="PyTorch's threads; they affect rounding.")] = Settings.threads,
    report: Annotated[bool, typer.Option("--report", help="Write the report of the results; train nothing.")] = False,
    docs: Annotated[Path, typer.Option(help="Folder for the report.")] = FOLDER.parents[1] / "docs",
) -> None:
    """Train LoRA, steering and both on ListOps and test them, or write the report of the results."""
    try:
        if report:
            write_report(results_file(out), docs)
        else:
            settings = Settings(model, steps, batch_size, held_out, threads)
            run_all(results_file(out), settings, range(seeds))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        typer.echo(f"bench.joint: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
