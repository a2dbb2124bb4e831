"""What `fused-steer fit` runs: two models and prompts in, an adapter and a table out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..adapters.fields import read_json
from ..adapters.files import blaming, read_adapter, refuse_foreign, write_adapter
from ..adapters.kinds import CONFIG_NAME, JOINT_NAME, LORA_TYPE, PEFT_TYPE, method_in
from ..adapters.locating import HUB_ID, JOINT_FILES, STEERING_FILES, locate_files
from ..adapters.parameters import SITE
from ..adapters.saving import check_output, checked_path
from ..config import SteerConfig, checked_choice
from ..kernels import ACTIVATIONS
from ..model.decoder import find_decoder, meta_model
from ..patch import patch_model
from ..tools.loading import load_causal
from ..tools.prompts import encode, read_prompts, refuse_long_texts
from ..tools.sources import check_parts, note_parts, parts_of
from ..tools.variants import Variants
from .fitting import Fit, check_config, check_decoders, check_positions, check_ridge, check_site, fit, fit_within
from .next_token import Divergence, divergence

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True)
class FitOptions:
    """What `run` does. The command's options document each and hold the defaults.

    Raises:
        ValueError: a value out of range, or `out` is a file.
    """

    base: str
    tuned: str
    prompts: Path
    field: str | None
    rank: int | None
    error: float | None
    activation: str
    site: str
    layers: list[int] | None
    bias: bool
    ridge: float
    sequence: bool
    held_out: float
    out: Path
    max_prompts: int | None
    max_length: int
    batch_size: int
    device: str
    as_json: bool
    check_base: bool = True

    def __post_init__(self) -> None:
        for name in ("max_prompts", "max_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name.replace('_', ' ')} is {value}; expected at least 1")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held out is {self.held_out}; expected a share of the prompts, 0 or more and below 1")
        checked_choice("activation", self.activation, ACTIVATIONS)
        if self.error is not None and self.rank is not None:
            raise ValueError(f"rank is {self.rank} and error is {self.error}; expected one of them")
        if self.error is not None and not 0 < self.error < 1:
            raise ValueError(f"error is {self.error}; expected a share of the oracle, above 0 and below 1")
        if self.rank == 0 and self.activation != "identity":
            raise ValueError(f"activation is {self.activation!r} with rank 0, a vector; expected it not given")
        check_ridge(self.ridge)
        check_output(self.out)
        refuse_foreign(self.out)

    @property
    def config(self) -> SteerConfig:
        """Of the rank that is given, or the first that is tried."""
        rank = self.rank if self.rank is not None else RANK if self.error is None else 1
        if not rank:
            return SteerConfig(form="vector", site=self.site, layers=self.layers)
        return SteerConfig(
            rank=rank,
            activation=self.activation,
            site=self.site,
            layers=self.layers,
            up_bias=self.bias,
            down_bias=self.bias and self.activation != "identity",  # where φ is the identity b2 does the same
        )


#: The rank, if neither it nor an error is given.
RANK = 8


#: The kind of a directory that holds a LoRA and steering: of `save_joint`, or a Trainer's checkpoint.
JOINT = "joint"


def adapter_type(source: str) -> str | None:
    """The `peft_type` of the adapter in a directory or of a hub id, or JOINT; None: it is a whole model.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: a LoRA and steering were not saved together.
    """
    directory = checked_path(source, "the tuned model", "a directory or hub id")
    if not directory.is_dir():
        if not HUB_ID.fullmatch(source):
            raise FileNotFoundError(f"no directory {source}; expected a fine-tuned model, a LoRA or a steering adapter")
        directory = locate_files(source, [*STEERING_FILES, *JOINT_FILES])
    joint = (directory / JOINT_NAME).is_file() or method_in(directory) == LORA_TYPE
    if joint and parts_of(source).steering is not None:
        return JOINT
    if not (directory / CONFIG_NAME).exists():
        return None
    with blaming(directory / CONFIG_NAME):
        return str(read_json(directory / CONFIG_NAME).get("peft_type"))


def load_tuned(options: FitOptions, kind: str | None, device: torch.device) -> Any:
    """The tuned model: of its own weights, or the base with a LoRA, steering, or both, as `adapter_type` says."""
    from ..tools.demo import load_model

    if kind is None:  # its tokenizer is not needed, and need not be saved beside it
        whole = load_causal(options.tuned, torch.float32)
        return refuse_long_texts(whole).to(device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    model, _ = load_model(options.base, device)
    if kind == PEFT_TYPE:
        return patch_model(model, options.tuned, check_base=options.check_base)
    if kind == JOINT:
        variants = Variants(model, {"tuned": parts_of(options.tuned)}, options.check_base)
        variants.use("tuned")
        return variants.model.eval()
    from peft import PeftModel

    return PeftModel.from_pretrained(model, options.tuned).eval()


def table_of(found: Fit) -> Table:
    """A row for each layer."""
    from rich.table import Table

    names = ("share", "held out", "median token", "of the rest", "at best", "growth")
    table = Table("layer", "‖δh‖/‖h‖", *names)
    for column in table.columns:
        column.justify = "right"
    for layer in found.layers:
        shares = (layer.share, layer.held_out, layer.token, layer.rest, layer.reach)
        growth = "-" if layer.growth is None else f"{layer.growth:.2f}"
        table.add_row(str(layer.layer), f"{layer.oracle:.3g}", *map(_percent, shares), growth)
    table.caption = (
        "share: of δh = h_tuned − h_base, what the steered stream has after the layer; of the rest: of what the "
        "adapters before it had left; at best: share of any function with values in as many directions as the rank; "
        "growth: of the distance to the tuned model in the layer"
    )
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None or math.isnan(share) else f"{share:.1%}"


def run(options: FitOptions, console: Console) -> None:
    """Load, fit, write the adapter to `options.out`, and print a row for each layer.

    Raises:
        ValueError, FileNotFoundError: an input is missing or does not fit; nothing has been written then.
        ImportError: PEFT is missing for a LoRA.
    """
    from ..tools.demo import choose_device, load_model

    device = choose_device(options.device)
    config = options.config
    prompts = read_prompts(options.prompts, options.field)[: options.max_prompts]
    last = len(prompts) - int(options.held_out * len(prompts))
    kind = adapter_type(options.tuned)
    if kind is not None:
        note_parts(options.tuned)
    plan = find_decoder(meta_model(options.base))  # all that can be refused before weights are read is
    check_config(config, plan)
    if kind in (PEFT_TYPE, JOINT):
        check_site(options.tuned, options.site)
    if kind == PEFT_TYPE:
        steering = read_adapter(options.tuned, plan.layout, check_base=options.check_base)
        check_positions(options.tuned, steering.config)
    if kind == JOINT:
        check_parts(parts_of(options.tuned), plan.layout, options.check_base)
    if kind is None:
        check_decoders(plan, find_decoder(meta_model(options.tuned)))
    base, tokenizer = load_model(options.base, device)
    parts = [
        encode(tokenizer, some, options.max_length, options.batch_size) for some in (prompts[:last], prompts[last:])
    ]
    tuned = load_tuned(options, kind, device)
    check_vocabulary(base, tuned)
    given: dict[str, Any] = {"held_out": parts[1], "ridge": options.ridge, "sequence": options.sequence}
    if options.error is None:
        found = fit(base, tuned, parts[0], config, **given)
    else:
        found = fit_within(base, tuned, parts[0], config, options.error, **given)
    config = found.adapter.config
    write_adapter(options.out, found.adapter)
    # Adapters that were fitted each on the base's own stream are not for use together.
    shown = parts[1] or parts[0]
    apart = [divergence(base, tuned, shown)]
    if options.sequence:
        apart.append(divergence(patch_model(base, options.out), tuned, shown))

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if options.as_json:
        named = {name: asdict(one) for name, one in zip(("base", "steered"), apart, strict=False)}
        say(json.dumps({"adapter": str(options.out), **found.as_dict(), "next_token": named}, indent=2))
        return
    say(f"base      {options.base}, {base.dtype} on {device}")
    say(f"tuned     {options.tuned}")
    say(f"prompts   {last} of {options.prompts}, {found.tokens[0]} tokens; held out {len(prompts) - last}")
    console.print(table_of(found))
    if math.isnan(found.share):
        say("share     none: the tuned model's hidden states after the last layer are the base's")
    elif options.sequence:
        where = "after" if config.site == SITE else f"at {config.site} of"
        held_out = "" if found.held_out is None else f", {_percent(found.held_out)} on held-out prompts"
        say(
            f"share     {found.share:.1%} of the oracle {where} the last layer{held_out}; of a median token's "
            f"{_percent(found.token)}"
        )
    if options.error is not None:
        missed, layer = found.missed
        say(f"error     at most {missed:.1%} of the oracle after each layer, the most after layer {layer}")
    say(next_token(apart, held_out=bool(parts[1])))
    phi = "" if config.activation == "identity" else f"{config.activation}, "
    say(f"adapter   {options.out}, rank {config.rank}, {phi}{found.adapter.layout.count(config):,} parameters")


def next_token(apart: Sequence[Divergence], held_out: bool) -> str:
    """A line on how far the base's and the steered model's next-token distributions are from the tuned model's."""
    where = "held-out prompts" if held_out else "the prompts"
    kl = " -> ".join(f"{one.kl:.3g}" for one in apart)
    same = " -> ".join(f"{one.same:.1%}" for one in apart)
    steps = "base -> steered" if len(apart) > 1 else "base"
    return f"next token  KL to tuned {kl} nats, same likeliest token {same} ({steps}, on {where})"


def check_vocabulary(base: Any, tuned: Any) -> None:
    """Refuse a tuned model that lacks tokens of the base's."""
    sizes = [model.get_input_embeddings().num_embeddings for model in (base, tuned)]
    if sizes[1] < sizes[0]:
        raise ValueError(f"the tuned model has {sizes[1]} tokens; expected {sizes[0]}, as the base has")
