"""`fused-steer serve-plan`: computes the memory and bandwidth of serving many adapters, from a model's config alone.

L layers of width d are steered at rank r, with A adapters and S slots. Sizes in values:

    adapter    L · 2 r d             of low rank, without biases; L · d for a vector
    slot       L · (2 r d + r + d)   of an `AdapterPool`, with room for b1 and b2; L · d if all adapters are vectors
    token      one slot, read for each token of a decoding batch; the base model's weights, once for the batch
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..adapters.files import weights_size
from ..config import DTYPES, SteerConfig, checked_number
from ..model.decoder import find_decoder, meta_model
from .holding import checked_size

#: The values of vLLM's `--max-lora-rank`, up to the kernels' highest rank.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class PlanRequest:
    """The serving set-up to plan for.

    Attributes:
        model: a directory or hub id with a config.
        adapters: A, the number of adapters.
        slots: S, the number of slots.
        memory: the device's memory in GiB, or None.

    Raises:
        ValueError, TypeError: a number is out of range, or `SteerConfig` refuses a value.
    """

    model: str
    adapters: int
    rank: int
    slots: int = 64
    form: str = "lowrank"
    layers: tuple[int, ...] | None = None
    dtype: str = "float32"
    model_dtype: str = "bfloat16"
    batch: int = 64
    memory: float | None = None

    def __post_init__(self) -> None:
        for name in ("adapters", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        checked_size(self.slots, self.rank, self.dtype)
        if self.model_dtype not in DTYPES:
            raise ValueError(f"model_dtype is {self.model_dtype!r}; expected one of {', '.join(DTYPES)}")
        if self.memory is not None and checked_number("memory", self.memory) <= 0:
            raise ValueError(f"memory is {self.memory}; expected GiB above 0")
        self.config()

    def config(self) -> SteerConfig:
        rank = None if self.form == "vector" else self.rank
        return SteerConfig(form=self.form, rank=rank, layers=self.layers, dtype=self.dtype)


@dataclass(frozen=True)
class Plan:
    """The sizes of a serving set-up, in bytes unless stated otherwise.

    Attributes:
        file: one adapter's weights file.
        page_cache: all adapters' files, once they have been read.
        slot: one slot, over all layers.
        read_by_steering: bytes read in a decoding step of a batch where each row has another adapter.
        read_by_base: bytes of the base model read in such a step.
        share: the steering's share of both, a ratio.
        fitting: the number of slots that fit beside the base model's weights, without a key-value cache, or None.
        vllm: vLLM's options for the same set-up.
    """

    layers: int
    hidden: int
    base: int
    file: int
    page_cache: int
    slot: int
    slots: int
    read_by_steering: int
    read_by_base: int
    share: float
    fitting: int | None
    vllm: str


def plan(request: PlanRequest) -> Plan:
    """Compute the plan. The model is built on the meta device, so no weights are read.

    Raises:
        ValueError: the model has no decoder layers, or lacks a layer to steer.
        OSError: there is no such model.
    """
    config = request.config()
    model = meta_model(request.model)
    decoder = find_decoder(model)
    layout = decoder.layout
    indices = layout.indices(config)
    item, rank, hidden = DTYPES[request.dtype].itemsize, config.rank, decoder.hidden
    base = sum(p.numel() for p in model.parameters()) * DTYPES[request.model_dtype].itemsize
    # A step reads one row of the embedding for each token. A table that is also the output's weights is read in full.
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    table: Any = model.get_input_embeddings()
    embedding = 0 if tied else table.weight.numel() * DTYPES[request.model_dtype].itemsize
    file = weights_size(config, layout)
    slot = len(indices) * ((2 * rank * hidden + rank + hidden if rank else hidden) * item)
    slots = slot * request.slots + 4 * request.slots * len(indices)  # with each layer's activation codes
    reading, weights = slot * request.batch, base - embedding
    fitting = None
    if request.memory is not None:
        fitting = max(0, int((request.memory * 2**30 - base) // (slot + 4 * len(indices))))
    in_vllm = next(each for each in _VLLM_RANKS if each >= max(rank, 1))
    return Plan(
        layers=len(indices),
        hidden=hidden,
        base=base,
        file=file,
        page_cache=file * request.adapters,
        slot=slot,
        slots=slots,
        read_by_steering=reading,
        read_by_base=weights,
        share=reading / (reading + weights),
        fitting=fitting,
        vllm=(
            f"--enable-lora --lora-target-modules post_block --max-loras {request.slots} --max-cpu-loras "
            f"{max(request.slots, request.adapters)} --max-lora-rank {in_vllm}"
        ),
    )


def as_json(request: PlanRequest, found: Plan) -> str:
    return json.dumps({"request": asdict(request), "plan": asdict(found)}, indent=2)


def show(request: PlanRequest, found: Plan, console: Console) -> None:
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    kind = "vector" if request.form == "vector" else f"rank {request.rank}"
    for name, size, note in (
        ("base model", found.base, f"{request.model_dtype}, {found.layers} layers steered, d = {found.hidden}"),
        ("an adapter's file", found.file, f"{kind}, {request.dtype}"),
        (f"{request.adapters:,} files", found.page_cache, "on disk, and in the page cache once all were read"),
        ("a slot", found.slot, "an adapter on the device, over all layers"),
        (f"{request.slots:,} slots", found.slots, "on the device, whatever is in them"),
        ("read by steering", found.read_by_steering, f"a step of {request.batch} rows, each its own adapter"),
        ("read by the base", found.read_by_base, "a step, its weights once; the key-value cache comes to it"),
    ):
        table.add_row(name, _human(size), note)
    table.add_row(
        "steering's share", f"{100 * found.share:.2f} %", "of both, at most: rows of one adapter read it once"
    )
    if found.fitting is not None:
        table.add_row("slots that fit", f"{found.fitting:,}", f"in {request.memory:g} GiB, beside the base model alone")
    console.print(table)
    console.print("Worked out from shapes; nothing was measured. The same in vLLM:", markup=False)
    console.print(f"  vllm serve {request.model} {found.vllm}", markup=False, soft_wrap=True)


def _human(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.2f} {unit}"
