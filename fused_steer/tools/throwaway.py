"""Adapters for a trial: random ones that change a model's answers, and Hugging Face's verdict on steered answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._hub_access import loading
from ..adapters.files import AdapterFile, read_adapter, write_adapter
from ..adapters.parameters import DOWN, UP, UP_BIAS, Place
from ..config import SteerConfig
from ..model.decoder import find_decoder
from ..patch import patch_model
from ..positions import ALL
from .loading import load_causal

#: The size of a layer's shift, as a share of its hidden state's norm.
DOSE = 0.25
VECTOR = "vector"


@dataclass(frozen=True)
class Answer:
    """A request and its greedy answer.

    Attributes:
        prompt, answer: token ids.
        adapter: its directory, or None.
        scale, positions: as `steering.batch` takes them; None: the adapter's own.
    """

    prompt: Sequence[int]
    answer: Sequence[int]
    adapter: str | None = None
    scale: float | None = None
    positions: str | None = None


@dataclass(frozen=True)
class Verdict:
    """Hugging Face's verdict on answers of another engine.

    At each token, the *gap* is how far the logit of the answer's token lies below the highest one, as a share of the
    largest logit. It is 0 if Hugging Face would take the same token.

    Attributes:
        worst: each answer's largest gap.
        same: each answer's number of tokens that Hugging Face would take.
        bound: the largest gap between two right implementations. Each may be wrong by the model's own rounding error,
            at either token: four times that error. The error is measured on the unsteered model, against the same
            model in the next wider dtype.
    """

    worst: list[float]
    same: list[int]
    bound: float

    def right(self, index: int) -> bool:
        return self.worst[index] <= self.bound


def load(model: str, dtype: str, device: str) -> Any:
    """Load a causal language model."""
    return load_causal(model, getattr(torch, dtype)).to(device)


def dtype_of(model: str, dtype: str) -> str:
    """Return the dtype that "auto" stands for: the one that the model's config names."""
    if dtype != "auto":
        return dtype
    from transformers import AutoConfig

    with loading(model, "model"):
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    found = getattr(config.get_text_config(), "dtype", None) or torch.float32
    return str(found).removeprefix("torch.")


@torch.no_grad()
def make_adapters(
    model: str, dtype: str, device: str, prompts: Sequence[Sequence[int]], rank: int, out: Path, count: int
) -> tuple[int, int]:
    """Save `count` low-rank adapters in out/0, out/1, … and a steering vector in out/vector.

    Every layer's shift is DOSE of the hidden state's median norm over the tokens of these prompts.

    Returns:
        The number of layers, and d.
    """
    loaded = load(model, dtype, device)
    layout = find_decoder(loaded).layout
    ids = torch.tensor([list(prompt) for prompt in prompts], device=device)
    hidden = loaded(ids, output_hidden_states=True, use_cache=False).hidden_states
    # The state after the last layer is normed already; the one before it is nearly as large.
    states = [each.flatten(0, 1).float().cpu() for each in (*hidden[1:-1], hidden[-2])]
    for number in range(count):
        generator = torch.Generator().manual_seed(number + 1)
        made = {Place(index): _low_rank(state, rank, generator) for index, state in enumerate(states)}
        write_adapter(out / str(number), AdapterFile(SteerConfig(rank=rank), layout, made))
    generator = torch.Generator().manual_seed(0)
    vectors = {Place(index): {UP_BIAS: _vector(state, generator)} for index, state in enumerate(states)}
    write_adapter(out / VECTOR, AdapterFile(SteerConfig(form="vector"), layout, vectors))
    return len(states), layout.hidden


def _low_rank(state: Tensor, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return W1 and W2 of one layer, with W1 h of size 1 for the hidden states (tokens, d)."""
    down = torch.randn(rank, state.shape[1], generator=generator) / _median_norm(state)
    up = torch.randn(state.shape[1], rank, generator=generator)
    return {DOWN: down, UP: up * DOSE * _median_norm(state) / _median_norm(F.silu(state @ down.T) @ up.T)}


def _vector(state: Tensor, generator: torch.Generator) -> Tensor:
    vector = torch.randn(state.shape[1], generator=generator)
    return vector * DOSE * _median_norm(state) / vector.norm()


def _median_norm(rows: Tensor) -> Tensor:
    return rows.norm(dim=1).median()


def write_displaced(adapter: Path, out: Path) -> None:
    """Write an adapter that steers each layer by the parameters of the layer before it, and the first by the last's."""
    file = read_adapter(adapter)
    places = list(file.tensors)
    moved = dict(zip(places, [file.tensors[place] for place in (places[-1], *places[:-1])], strict=True))
    write_adapter(out, replace(file, tensors=moved))


def faulty_readings(answers: Sequence[Answer], layers: int) -> dict[str, list[Answer]]:
    """Return the answers with what a faulty plug-in would have done in place of what was asked: fault -> answers.

    Adapters with the parameters of other layers are written beside those of the answers.

    Args:
        layers: of the model. One layer cannot be taken for another.
    """
    made = ["0", "1", VECTOR]

    def sibling(adapter: str, name: str) -> str:
        return str(Path(adapter).with_name(name))

    faults: dict[str, Callable[[Answer, str], Answer]] = {
        "no steering": lambda one, adapter: replace(one, adapter=None, scale=None, positions=None),
        "half the strength": lambda one, adapter: replace(one, scale=(1.0 if one.scale is None else one.scale) / 2),
        "other positions": lambda one, adapter: replace(one, positions="generated" if one.positions is None else ALL),
        "another adapter": lambda one, adapter: replace(
            one, adapter=sibling(adapter, made[made.index(Path(adapter).name) - 1])
        ),
    }
    if layers > 1:
        displaced = {}
        for adapter in {one.adapter for one in answers if one.adapter is not None}:
            displaced[adapter] = sibling(adapter, f"displaced-{Path(adapter).name}")
            write_displaced(Path(adapter), Path(displaced[adapter]))
        faults["other layers"] = lambda one, adapter: replace(one, adapter=displaced[adapter])
    return {
        name: [one if one.adapter is None else fault(one, one.adapter) for one in answers]
        for name, fault in faults.items()
    }


@torch.no_grad()
def judge(model: str, dtype: str, device: str, readings: Mapping[str, Sequence[Answer]]) -> dict[str, Verdict]:
    """Return Hugging Face's verdict on each reading of the same answers.

    Args:
        readings: a name -> the answers. The readings have the same prompts and tokens, and differ in what they say of
            the steering. Prompts are of equal length, and so are answers.
    """
    loaded, (first, *_) = load(model, dtype, device), readings.values()
    base = _logits(loaded, first)
    wide = {"bfloat16": "float32", "float16": "float32", "float32": "float64"}[dtype]
    exact = _logits(loaded.to(getattr(torch, wide)), first)
    bound = 4 * float(((base - exact).abs().amax(-1) / exact.abs().amax(-1)).max())
    del loaded, exact
    paths = sorted({one.adapter for answers in readings.values() for one in answers if one.adapter is not None})
    loaded = load(model, dtype, device)
    for number, path in enumerate(paths):
        if number:
            loaded.steering.load(path, str(number), check_base=False)
        else:
            patch_model(loaded, path, adapter_name="0", check_base=False)
    found = {}
    for name, answers in readings.items():
        logits = base
        rows = [None if one.adapter is None else str(paths.index(one.adapter)) for one in answers]
        if any(rows):
            scales, places = [one.scale for one in answers], [one.positions for one in answers]
            with loaded.steering.batch(rows, scale=scales, positions=places):
                logits = _logits(loaded, answers)
        taken = torch.tensor([list(one.answer) for one in answers])
        highest = logits.amax(-1)
        gaps = (highest - logits.gather(2, taken[:, :, None])[:, :, 0]) / logits.abs().amax(-1)
        found[name] = Verdict(gaps.amax(1).tolist(), (gaps == 0).sum(1).tolist(), bound)
    return found


def _logits(model: Any, answers: Sequence[Answer]) -> Tensor:
    """Return the logits for each token of the answers: (answers, tokens, vocabulary) float64, on the CPU."""
    device = next(model.parameters()).device
    prompts, tokens = (
        torch.tensor([list(row) for row in rows], device=device)
        for rows in ([one.prompt for one in answers], [one.answer for one in answers])
    )
    first = model(prompts, use_cache=True)
    found = [first.logits[:, -1:]]
    if tokens.shape[1] > 1:  # the answer's tokens come after cached ones, so that they count as generated
        found.append(model(tokens[:, :-1], past_key_values=first.past_key_values, use_cache=True).logits)
    return torch.cat(found, 1).double().cpu()
