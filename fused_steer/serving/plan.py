"""`fused-steer serve-plan`: computes the memory and bandwidth of many adapters, from a model's config or its sizes.

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
from ..adapters.parameters import Layout
from ..config import DTYPES, SteerConfig, checked_number
from ..model.decoder import find_decoder, meta_model
from .holding import checked_size

#: The values of vLLM's `--max-lora-rank`, up to the kernels' highest rank.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256)


#: The most layers of a model that is given by its sizes.
_MOST_LAYERS = 10_000
#: The largest of the other whole numbers. Beyond it a quotient may be too large for a float.
_MOST = 10**12


@dataclass(frozen=True)
class PlanRequest:
    """The serving set-up to plan for.

    Attributes:
        model: a directory or hub id with a config; None: the model is given by hidden and num_layers.
        adapters: A, the number of adapters.
        slots: S, the number of slots.
        layers: the steered layers; None: all.
        hidden: d. Only without a model.
        num_layers: the number of decoder layers. Only without a model.
        parameters: the number of the base model's parameters. Only without a model; None: unknown.
        memory: the device's memory in GiB, or None.
        bandwidth: the device's memory bandwidth in GB (10⁹ bytes) a second, or None.
        network: the bandwidth to the adapters' store in Gbit (10⁹ bits) a second, or None.

    Raises:
        ValueError, TypeError: a number is out of range, or `SteerConfig` refuses a value.
    """

    model: str | None
    adapters: int
    rank: int
    slots: int = 64
    form: str = "lowrank"
    layers: tuple[int, ...] | None = None
    dtype: str = "float32"
    model_dtype: str = "bfloat16"
    batch: int = 64
    memory: float | None = None
    hidden: int | None = None
    num_layers: int | None = None
    parameters: float | None = None
    bandwidth: float | None = None
    network: float | None = None

    def __post_init__(self) -> None:
        self._check_model()
        for name in ("adapters", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("adapters", "batch", "hidden"):
            if (getattr(self, name) or 0) > _MOST:
                raise ValueError(f"{name} has {getattr(self, name).bit_length()} bits; expected at most {_MOST}")
        checked_size(self.slots, self.rank, self.dtype)
        if self.model_dtype not in DTYPES:
            raise ValueError(f"model_dtype is {self.model_dtype!r}; expected one of {', '.join(DTYPES)}")
        units = {"memory": "GiB", "bandwidth": "GB a second", "network": "Gbit a second", "parameters": "a number"}
        for name, unit in units.items():
            value = getattr(self, name)
            if value is not None and checked_number(name, value) <= 0:
                raise ValueError(f"{name} is {value}; expected {unit} above 0")
        if self.memory is not None and self.model is None and self.parameters is None:
            raise ValueError(f"memory is {self.memory}, and the base model's size is unknown; expected parameters too")
        self.config()

    def _check_model(self) -> None:
        sizes = {"hidden": self.hidden, "num_layers": self.num_layers}
        if self.model is not None:
            for name, value in {**sizes, "parameters": self.parameters}.items():
                if value is not None:
                    raise ValueError(
                        f"{name} is {value} beside the model {self.model!r}; expected one without the other"
                    )
            return
        for (name, value), most in zip(sizes.items(), (None, _MOST_LAYERS), strict=True):
            if value is None:
                raise ValueError(
                    f"there is no model and no {name}; expected a model, or hidden and num_layers (--layers)"
                )
            if value < 1 or most is not None and value > most:
                raise ValueError(f"{name} is {value}; expected at least 1" + (f", at most {most}" if most else ""))

    def config(self) -> SteerConfig:
        rank = None if self.form == "vector" else self.rank
        return SteerConfig(form=self.form, rank=rank, layers=self.layers, dtype=self.dtype)


@dataclass(frozen=True)
class Plan:
    """The sizes of a serving set-up, in bytes unless stated otherwise.

    Attributes:
        layers: the number of steered layers.
        base: the base model's weights, or None if its size is unknown.
        file: one adapter's weights file.
        page_cache: all adapters' files, once they have been read.
        slot: one slot, over all layers.
        all_slots: a slot for each adapter.
        read_by_steering: bytes read in a decoding step of a batch where each row has another adapter.
        read_by_all: such bytes if the batch has a row for each adapter.
        read_by_base: bytes of the base model read in such a step, or None.
        share: the steering's share of both, a ratio, or None.
        fitting: the number of slots that fit beside the base model's weights, without a key-value cache, or None.
        reading_seconds: the time in which a step's adapters are read at the device's bandwidth, or None.
        loading_seconds: the time in which one file passes the network, or None.
        vllm: vLLM's options for the same set-up.
    """

    layers: int
    hidden: int
    base: int | None
    file: int
    page_cache: int
    slot: int
    slots: int
    all_slots: int
    read_by_steering: int
    read_by_all: int
    read_by_base: int | None
    share: float | None
    fitting: int | None
    reading_seconds: float | None
    loading_seconds: float | None
    vllm: str


@dataclass(frozen=True)
class _Base:
    """The base model: the layout that adapters fit, the bytes of its weights, and the bytes that a step reads."""

    layout: Layout
    weights: int | None
    read: int | None


def _base_of(request: PlanRequest) -> _Base:
    item = DTYPES[request.model_dtype].itemsize
    if request.model is None:
        assert request.hidden is not None and request.num_layers is not None  # checked
        weights = None if request.parameters is None else int(request.parameters) * item
        return _Base(Layout("model.layers", request.num_layers, request.hidden), weights, weights)
    model = meta_model(request.model)
    weights = sum(p.numel() for p in model.parameters()) * item
    # A step reads one row of the embedding for each token. A table that is also the output's weights is read in full.
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    table: Any = model.get_input_embeddings()
    return _Base(find_decoder(model).layout, weights, weights - (0 if tied else table.weight.numel() * item))


def plan(request: PlanRequest) -> Plan:
    """Compute the plan. A model is built on the meta device, so no weights are read.

    Raises:
        ValueError: the model has no decoder layers, or lacks a layer to steer.
        OSError: there is no such model.
    """
    config, base = request.config(), _base_of(request)
    indices, hidden = base.layout.indices(config), base.layout.hidden
    item, rank = DTYPES[request.dtype].itemsize, config.rank
    file = weights_size(config, base.layout)
    slot = len(indices) * ((2 * rank * hidden + rank + hidden if rank else hidden) * item)
    whole = slot + 4 * len(indices)  # with each layer's activation code
    reading = slot * request.batch
    fitting = share = None
    if request.memory is not None and base.weights is not None:
        fitting = max(0, int((request.memory * 2**30 - base.weights) // whole))
    if base.read is not None:
        share = reading / (reading + base.read)
    in_vllm = next(each for each in _VLLM_RANKS if each >= max(rank, 1))
    return Plan(
        layers=len(indices),
        hidden=hidden,
        base=base.weights,
        file=file,
        page_cache=file * request.adapters,
        slot=slot,
        slots=whole * request.slots,
        all_slots=whole * request.adapters,
        read_by_steering=reading,
        read_by_all=slot * request.adapters,
        read_by_base=base.read,
        share=share,
        fitting=fitting,
        reading_seconds=None if request.bandwidth is None else reading / (request.bandwidth * 1e9),
        loading_seconds=None if request.network is None else 8 * file / (request.network * 1e9),
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
    many, where = f"{request.adapters:,}", f"{found.layers} layers steered, d = {found.hidden}"
    sizes = [
        ("an adapter's file", found.file, f"{kind}, {request.dtype}, {where}"),
        (f"{many} files", found.page_cache, "on disk, and in the page cache once all were read"),
        ("a slot", found.slot, "an adapter on the device, over all layers"),
        (f"{request.slots:,} slots", found.slots, "on the device, whatever is in them"),
        (f"{many} slots", found.all_slots, "on the device, if all adapters are there at a time"),
        ("read by steering", found.read_by_steering, f"a step of {request.batch} rows, each its own adapter"),
        (f"read by {many} rows", found.read_by_all, "a step, each row its own adapter"),
    ]
    if found.base is not None:
        sizes.insert(0, ("base model", found.base, request.model_dtype))
    if found.read_by_base is not None:
        sizes.append(("read by the base", found.read_by_base, "a step, its weights once; beside the key-value cache"))
    for name, size, note in sizes:
        table.add_row(name, _human(size), note)
    if found.share is not None:
        share = f"{100 * found.share:.2f} %"
        table.add_row("steering's share", share, "of both, at most: rows of one adapter read it once")
    if found.reading_seconds is not None:
        time = f"{1e3 * found.reading_seconds:.3f} ms"
        table.add_row(
            "reading adapters", time, f"a step of {request.batch} rows, at {request.bandwidth:g} GB/s, at least"
        )
    if found.loading_seconds is not None:
        time, all_of_them = f"{1e3 * found.loading_seconds:.2f} ms", found.loading_seconds * request.adapters
        note = f"an adapter over {request.network:g} Gbit/s, at least; {many} adapters {all_of_them:.2f} s"
        table.add_row("loading", time, note)
    if found.fitting is not None:
        table.add_row("slots that fit", f"{found.fitting:,}", f"in {request.memory:g} GiB, beside the base model alone")
    console.print(table)
    console.print("Worked out from shapes; nothing was measured. The same in vLLM:", markup=False)
    console.print(f"  vllm serve {request.model or 'BASE'} {found.vllm}", markup=False, soft_wrap=True)


def _human(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.2f} {unit}"
