"""Import adapters of the code released with arXiv 2603.00425 (github.com/SprocketLab/steerling)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.files import AdapterFile
from ..adapters.parameters import DOWN, UP, UP_BIAS, Place
from ..adapters.saving import checked_path
from ..config import SteerConfig
from ..kernels import ACTIVATIONS
from ..model.residual import ResidualNotFound
from ..model.sublayers import find_in, parts_of
from .reading import DTYPE_NAMES, assemble, checked_tensor, decoder_of, layout, naming, read_pickle, read_safetensors

_BASE = "base_model."
_INDEX = r"layer(0|[1-9][0-9]*)"
_SITE = r"(block|attn|mlp)"
_MATRIX = re.compile(rf"(?:adapters\.)?{_INDEX}_{_SITE}\.(down|up)\.weight")
_VECTOR = re.compile(rf"(?:deltas\.)?{_INDEX}_{_SITE}")

#: Their sites (`--submodules`) -> ours. `attn` is after the layer's `post_attention_layernorm`, `mlp` after its `mlp`.
_SITES = {"block": "post_block", "attn": "pre_mlp", "mlp": "post_mlp"}
#: The released code's part of a layer -> our parameter below the site.
_PARAMETERS = {"down": DOWN, "up": UP, "vector": UP_BIAS}


@dataclass(frozen=True)
class Imported:
    """An imported adapter, and counts of the entries that were left out.

    Attributes:
        adapter: the adapter, ready to be written.
        ignored: the number of `base_model.*` entries, which are the frozen base.
        lora: the number of these that belong to a LoRA, which the adapter lacks.
    """

    adapter: AdapterFile
    ignored: int
    lora: int


def import_steerling(
    file: str | os.PathLike[str],
    *,
    scale: float | None,
    activation: str | None = None,
    positions: str = "all",
    base: str = "",
    num_layers: int | None = None,
    layers_path: str | None = None,
) -> Imported:
    """Import a state dict of the paper's released code: h -> h + scale · up(φ(down(h))), or h + scale · vector (§3).

    The file is a whole Trainer checkpoint (`pytorch_model.bin`, `model.safetensors`) or only the steering
    (`adapter_steerer.pt`). For layer i it holds `adapters.layer{i}_block.down.weight` (r, d) and `….up.weight` (d, r),
    or `deltas.layer{i}_block` (d,), with or without the first word. `--submodules` adds `attn` and `mlp`, which are the
    sites pre_mlp and post_mlp in a model with a `post_attention_layernorm` before its `mlp`. Values and dtype are kept.
    `base_model.*` is left out. A pickle is opened by `torch.load(weights_only=True)`, which executes nothing in it.

    The file does not record the steered tokens. The released code steers every token, unless trained with
    `--intervene-last`, which is `positions="last_prompt+generated"`.

    Args:
        file: a `.safetensors`, or a file of `torch.save`.
        scale: the released code's alpha. Its vectors have none: give 1.0.
        activation: φ of a low-rank adapter: identity (the released code's None and --linear), silu, gelu, gelu_tanh,
            relu or tanh. Vectors have none.
        positions: the steered tokens, as SteerConfig has them.
        base: the base model's name, recorded in the adapter; "" for none. If `num_layers` or `layers_path` is not
            given, or the file has `attn` or `mlp`, it must be a directory or hub id. Its config (no weights, no code)
            is read, and the file must fit.
        num_layers: the number of the base model's decoder layers. The file only holds the steered ones.
        layers_path: the path of the decoder layers: "model.layers" in a LlamaForCausalLM, "transformer.h" in a GPT-2.

    Returns:
        The adapter for `write_adapter`, with `layers=None` if every layer is in the file.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: an argument of the wrong type.
        ValueError: an argument is missing or out of range, the base's config cannot be read or does not fit, or the
            file cannot be read safely, has no entry or other entries, entries that do not fit each other or the
            model's layers, or values that are not finite.
    """
    if scale is None:
        raise ValueError("scale is not given; expected a number (--scale): the file does not record it")
    # checked first, so that an error does not name the file
    SteerConfig(scale=scale, activation=activation, positions=positions)
    target = layout(base, num_layers, layers_path)
    entries, ignored = _read(checked_path(file, "file", "one of the released code's"))
    with naming(file):
        places = _by_place(entries, len(ignored))
        hidden, rank, dtype = _sizes(places)
        if rank and activation is None:
            raise ValueError(
                f"activation is not given; expected one of {', '.join(ACTIVATIONS)} (--activation): "
                "the file, a low-rank adapter, does not record it"
            )
        if not rank and activation is not None:
            raise ValueError(f"activation is {activation!r} (--activation), and it holds vectors; expected none given")
        _check_sites(places, base)
    adapter = assemble(
        file,
        target,
        hidden,
        {place: {_PARAMETERS[part]: tensor for part, tensor in parts.items()} for place, parts in places.items()},
        form="lowrank" if rank else "vector",
        rank=rank,
        activation=activation,
        scale=scale,
        dtype=DTYPE_NAMES[dtype],
        positions=positions,
    )
    return Imported(adapter, len(ignored), sum("lora_" in key for key in ignored))


# ------------------------------------------------------------------------------------------------------------ the file


def _read(file: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the state dict without the base model's entries, and the keys of these entries."""
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}; expected a state dict of the paper's released code")
    state = read_safetensors(file, without=_BASE) if file.suffix == ".safetensors" else read_pickle(file)
    if not isinstance(state, Mapping):
        raise ValueError(f"{file} holds a {type(state).__name__}; expected a state dict")
    nameless = [key for key in state if not isinstance(key, str)]
    if nameless:
        raise ValueError(f"{file} has a key {nameless[0]!r}; expected names")
    ignored = [key for key in state if key.startswith(_BASE)]
    return {key: value for key, value in state.items() if not key.startswith(_BASE)}, ignored


def _by_place(entries: Mapping[str, Any], ignored: int) -> dict[Place, dict[str, Tensor]]:
    """Return the tensors by place, in order, and by part: down and up, or vector."""
    places: dict[Place, dict[str, Tensor]] = {}
    for key, value in entries.items():
        matrix, vector = (form.fullmatch(key) for form in (_MATRIX, _VECTOR))
        if matrix:
            place, part = Place(int(matrix[1]), _SITES[matrix[2]]), matrix[3]
        elif vector:
            place, part = Place(int(vector[1]), _SITES[vector[2]]), "vector"
        else:
            raise ValueError(
                f"it has an unknown key {key!r}; expected names such as adapters.layer0_block.down.weight, "
                "deltas.layer0_block and base_model.*"
            )
        parts = places.setdefault(place, {})
        if part in parts:
            raise ValueError(f"it has {key!r} with and without the first word; expected it once")
        parts[part] = checked_tensor(key, value, dimensions=2 if matrix else 1)
    if not places:
        raise ValueError(
            f"it has no adapter, only {ignored} base_model.* entries; expected keys such as "
            "adapters.layer0_block.down.weight or deltas.layer0_block"
        )
    return dict(sorted(places.items()))


def _check_sites(places: Iterable[Place], base: str) -> None:
    """Refuse `attn` and `mlp` of a base model that has something else than our sites where their hooks are."""
    sites = {place.site for place in places} - {"post_block"}
    if not sites:
        return
    if not base:
        raise ValueError(
            "it steers at attn or mlp; expected the base model (--base-model) to see what its layers have there"
        )
    for index, layer in enumerate(decoder_of(base).layers):
        for site in sorted(sites):
            try:
                found = find_in(type(layer), site, parts_of(layer, type(layer)))
            except ResidualNotFound as reason:
                raise ValueError(f"layer {index} of {base!r} cannot be steered at {site}: {reason}") from reason
            hooked = found.given if site == "pre_mlp" else found.modules
            theirs = "post_attention_layernorm" if site == "pre_mlp" else "mlp"
            if hooked != (theirs,):
                raise ValueError(
                    f"it steers at {site} by a hook on {theirs}, and layer {index} of {base!r} has "
                    f"{' or '.join(filter(None, hooked)) or 'another value'} there; expected a model that has {theirs}"
                )


def _sizes(places: Mapping[Place, Mapping[str, Tensor]]) -> tuple[int, int, torch.dtype]:
    """Return the hidden size, rank (0 for vectors) and dtype that all places share."""
    vectors = [place for place, parts in places.items() if "vector" in parts]
    matrices = [place for place, parts in places.items() if parts.keys() != {"vector"}]
    if vectors and matrices:
        raise ValueError(f"it has a vector ({vectors[0]}) and matrices ({matrices[0]}); expected one form")
    found = {place: _sizes_at(place, parts) for place, parts in places.items()}
    first, expected = next(iter(found.items()))
    for place, sizes in found.items():
        for name, size, its in zip(("hidden size", "rank", "dtype"), sizes, expected, strict=True):
            if size != its:
                raise ValueError(f"{place} has {name} {size}; expected {its}, as {first} has")
    return expected


def _sizes_at(place: Place, parts: Mapping[str, Tensor]) -> tuple[int, int, torch.dtype]:
    if "vector" in parts:
        return len(parts["vector"]), 0, parts["vector"].dtype
    for part, other in (("down", "up"), ("up", "down")):
        if part not in parts:
            raise ValueError(f"{place} has no {part}.weight; expected one beside its {other}.weight")
    down, up = parts["down"], parts["up"]
    rank, hidden = down.shape
    if tuple(up.shape) != (hidden, rank):
        raise ValueError(
            f"{place} has an up.weight of shape {tuple(up.shape)}; expected {(hidden, rank)}, as its down.weight "
            f"has {(rank, hidden)}"
        )
    if up.dtype != down.dtype:
        raise ValueError(f"{place} has an up.weight of {up.dtype}; expected {down.dtype}, as its down.weight")
    return hidden, rank, down.dtype
