"""`python -m bench.joint`: does joint adaptation gain by orthogonality? LoRA, steering, and both, on ListOps, on a CPU.

Four methods train SmolLM2-135M-Instruct on the same expressions in the same order: LoRA alone, steering alone, both
without a constraint, and both with `SteerConfig(orthogonal_to="lora")` (Joint-Orth, arXiv 2603.00425, §5.2). Each is
run with every seed, and tested once, when trained. A run that is in the results file is not repeated, so that the same
command goes on where it stopped. `--report` turns the file into `docs/joint-listops.md`, whichever way it came out.

The settings below were fixed before the first run, within the paper's ranges; nothing was chosen by the held-out set.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .results import FOLDER, describe_machine

SCHEMA = 1
METHODS = {"lora": "LoRA", "steering": "steering", "joint": "naive joint", "joint-orth": "joint-orth"}
JOINT = ("joint", "joint-orth")
OPERATORS, DEPTH = ("MAX", "MIN", "MED", "SM"), 2
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DATA_SEED = 0  # of the expressions; the seed of a run chooses its own part of them, and its initial values
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 101  # of the cosine, over -1 to 1; the middle one is centred on 0
LAST = 20  # steps whose mean loss is the final loss
_TESTED_AT_ONCE = 50


@dataclass(frozen=True)
class Settings:
    """All that a result depends on, beside method, seed and machine. The learning rate rises over `warmup` steps, and
    falls to 0 as a cosine over all steps."""

    model: str | None = None
    steps: int = 150
    batch_size: int = 8
    held_out: int = 200
    threads: int = 1  # on a machine in use, as fast as two or faster
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
    """A folder of its own: `bench.report` reads every results file that lies in `out` itself."""
    return out / "joint" / "listops-cpu.json"


# ------------------------------------------------------------------------------------------------------ the experiment


def draw(settings: Settings, seed: int) -> tuple[list[Any], list[Any]]:
    """The held-out expressions, the same for every seed, and those that this seed trains on; none is drawn twice."""
    from fused_steer.listops import distinct

    count = settings.steps * settings.batch_size
    end = settings.held_out + (seed + 1) * count
    drawn = distinct(end, operators=OPERATORS, depth=DEPTH, seed=DATA_SEED)
    return drawn[: settings.held_out], drawn[end - count :]


def adapt(model: Any, method: str, settings: Settings, seed: int) -> tuple[Any, list[dict[str, Any]]]:
    """The model with the method's adapters, and the optimizer's groups. A seed's adapters start the same in all."""
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
    """One AdamW step a batch: the loss and the seconds of each.

    Raises:
        RuntimeError: the loss is no longer finite.
    """
    import torch

    from fused_steer.demo import answer_loss

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
    """Exact matches, a 0 or 1 for each expression, and the mean loss of the answers' tokens."""
    import torch

    from fused_steer.demo import answer_loss, complete, is_exact

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
    """The steering shift W2 φ(W1 x) and the LoRA shift of the MLP's output projection, (α/r) B A m, of every layer.

    x is the hidden state that is steered, m what the projection reads; both are (B, T, ...) of one forward pass.
    """

    def __init__(self, model: Any, settings: Settings) -> None:
        """Find the modules, in a model that has both adapters and is not trained yet."""
        from fused_steer.patch import SITE, find_decoder, inside_peft
        from fused_steer.writers import choose_writers, trace_writers

        self.settings = settings
        decoder = find_decoder(inside_peft(model))
        layers = dict(enumerate(decoder.layers))
        with model.steering.disabled():  # the pass of the trace trains nothing
            writers = trace_writers(decoder.module, layers, decoder.hidden, SITE)
        self.sites = [getattr(layer, SITE) for layer in decoder.layers]
        self.writers = [[w.module for w in choose_writers(writers[i], "mlp")] for i in layers]

    def of_batch(self, model: Any, inputs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
        """Both shifts of each layer, (tokens, d) each, without those of the padding."""
        import torch
        import torch.nn.functional as F

        from fused_steer.kernels.reference import ACTIVATIONS

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
        """‖BᵀW2‖ / (‖B‖ ‖W2‖) of each layer, Frobenius, in float64."""
        import torch

        found = []
        for site, writers in zip(self.sites, self.writers, strict=True):
            b = torch.cat([w.lora_B["default"].weight for w in writers], 1).detach().double()
            up = site.adapter("default").up.weight.detach().double()
            found.append(float((b.T @ up).norm() / (b.norm() * up.norm())))
        return found


def overlap(model: Any, encoder: Any, expressions: Sequence[Any], shifts: Shifts) -> dict[str, Any]:
    """The cosine between the two shifts over all tokens of the prompts: its quantiles by layer, a histogram of all.

    Raises:
        RuntimeError: a layer has no token with both shifts, so that there is no cosine.
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
    """Every method with every seed that is not in the file yet, a seed after the other; saved after each run.

    Raises:
        ValueError: the file is of other settings, or is no results file; or the model is none that can be adapted.
        OSError: the model is not there, or the file cannot be written.
    """
    import torch

    from fused_steer.demo import Encoder, load_model
    from fused_steer.listops import evaluate, ignoring_brackets

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
    machine = describe_machine(device) | {"command": " ".join(["python", "-m", "bench.joint", *sys.argv[1:]])}
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
        save(results, file)
        typer.echo(f"{label}: {run['exact'].count('1')} of {len(run['exact'])} exact")


def save(results: dict[str, Any], file: Path) -> None:
    """Write the file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.new")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def load(file: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        ValueError: it is none, or of another schema.
        FileNotFoundError: there is no such file.
    """
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no JSON ({error}); expected a results file of bench.joint") from None
    schema = results.get("schema") if isinstance(results, dict) else None
    if schema != SCHEMA or not {"machine", "settings", "task", "runs"} <= results.keys():
        raise ValueError(f"{file} has schema {schema!r}; expected one of bench.joint, {SCHEMA}")
    return results


app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder of results; the file is joint/listops-cpu.json in it.")] = FOLDER,
    model: Annotated[str | None, typer.Option(help="Directory or hub id; default: SmolLM2-135M-Instruct.")] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each method, with seeds 0, 1, ...")] = 3,
    steps: Annotated[int, typer.Option(help="Training steps.")] = Settings.steps,
    batch_size: Annotated[int, typer.Option(help="Expressions a step.")] = Settings.batch_size,
    held_out: Annotated[int, typer.Option(help="Expressions to test with.")] = Settings.held_out,
    threads: Annotated[
        int, typer.Option(help="PyTorch's; another number may give other bits.")
    ] = Settings.threads,
) -> None:
    """Train LoRA, steering and both on ListOps, and test them; or write the report of that."""
    try:
        settings = Settings(model, steps, batch_size, held_out, threads)
        run_all(results_file(out), settings, range(seeds))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        typer.echo(f"bench.joint: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
