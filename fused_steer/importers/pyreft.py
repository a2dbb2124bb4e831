"""Import adapters that pyreft saved (github.com/stanfordnlp/pyreft, in pyvene's file layout).

With a block's output h and R (r, d) of orthonormal rows, pyreft's interventions compute, in its own notation,

    LoReFT    h + Rᵀ(φ(W h + b) − R h)        DiReFT    h + Rᵀ φ(W h + b)       ConsReFT  h + Rᵀ(b − R h)
    NoReFT    h + W2ᵀ(φ(W1 h + b) − W2 h − c)  NoDiReFT  h + W2ᵀ φ(W1 h + b)     LobiReFT  h + Rᵀ b

(`pyreft.interventions`, version 0.1.0; its dropout has no effect at inference). Each is h + W2 φ(W1 h + b1) or a
vector. For LoReFT and NoReFT this holds only if φ is the identity. LoReFT becomes `form="loreft"`, bit for bit, if R is
orthonormal. Weight decay shrinks pyreft's R. Such a file becomes `form="lowrank"` with W1 = W − R and W2 = Rᵀ.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.fields import read_json
from ..adapters.files import AdapterFile
from ..adapters.parameters import DOWN, DOWN_BIAS, UP, UP_BIAS, Place
from ..adapters.saving import checked_path
from ..config import SteerConfig
from ..kernels import ACTIVATIONS
from ..kernels.rotation import is_orthonormal
from .reading import assemble, checked_tensor, first_line, layout, naming, read_pickle

CONFIG_NAME = "config.json"
#: The file of an intervention, with {} for its layer.
FILE_NAME = "intkey_layer_{}_comp_block_output_unit_pos_nunit_1#0.bin"
_SHORT, _ENDS = re.compile(r"\b([fl])(\d+)\b"), {"f": "first", "l": "last"}
_BASE_NAME = "pytorch_model.bin"
_TYPE = re.compile(r"<class 'pyreft\.interventions\.(\w+)'>")

#: The fields of pyvene's RepresentationConfig, in the order in which its JSON lists their values.
FIELDS = (
    "layer",
    "component",
    "unit",
    "max_number_of_units",
    "low_rank_dimension",
    "intervention_type",
    "intervention",
    "subspace_partition",
    "group_key",
    "intervention_link_key",
    "moe_key",
    "source_representation",
    "hidden_source_representation",
    "latent_dim",
)
REQUIRED = {"component": "block_output", "unit": "pos", "max_number_of_units": 1}
#: Fields that change the function. Groups and links only order and tie interventions, and every value is saved.
_ABSENT = ("subspace_partition", "moe_key", "source_representation", "hidden_source_representation", "latent_dim")

#: Entries of a state dict with their shapes: r is the rank, d the hidden size.
_SOURCE = {"learned_source.weight": "rd", "learned_source.bias": "r"}
ORIGINAL, TRIVIAL = "rotate_layer.parametrizations.weight.original", "rotate_layer.parametrizations.weight.0.base"
_ROTATION = {ORIGINAL: "dr", TRIVIAL: "dd"}
#: Buffers that do not affect the result.
_IGNORED = ("embed_dim", "interchange_dim")


def _difference(minuend: Tensor, subtrahend: Tensor) -> Tensor:
    """Return the difference, rounded to float32 only once."""
    return (minuend.double() - subtrahend.double()).float()


def _loreft(t: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _lowrank(t["weight"], t["bias"], t["rotate_layer"])  # Rᵀ, stored as it is used


def _with_difference(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return LoReFT's tensors as those of a low rank: W1 = W − R."""
    return {**tensors, DOWN: _difference(tensors[DOWN], tensors[UP].t())}


def _noreft(t: Mapping[str, Tensor]) -> dict[str, Tensor]:
    bias = t["learned_source.bias"]
    if "proj_layer.bias" in t:
        bias = _difference(bias, t["proj_layer.bias"])
    return _lowrank(_difference(t["learned_source.weight"], t["proj_layer.weight"]), bias, t["proj_layer.weight"].t())


def _consreft(t: Mapping[str, Tensor]) -> dict[str, Tensor]:
    rotation = _rotation(t)
    return _lowrank(-rotation.t(), t["learned_source"], rotation)


def _direft(t: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _lowrank(t["learned_source.weight"], t["learned_source.bias"], _rotation(t))


def _nodireft(t: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # The forward uses only proj_layer's weight, so its bias has no effect.
    return _lowrank(t["learned_source.weight"], t["learned_source.bias"], t["proj_layer.weight"].t())


def _lobireft(t: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {UP_BIAS: (_rotation(t).double() @ t["learned_source"].double()).float()}


def _lowrank(down: Tensor, down_bias: Tensor, up: Tensor) -> dict[str, Tensor]:
    return {DOWN: down, DOWN_BIAS: down_bias, UP: up}


def _rotation(t: Mapping[str, Tensor]) -> Tensor:
    """Return Rᵀ (d, r), computed as `torch.nn.utils.parametrizations.orthogonal` does from Householder reflectors."""
    reflectors = t[ORIGINAL].tril(-1)
    signs = t[ORIGINAL].diagonal().int()  # torch truncates them too
    return t[TRIVIAL] @ (torch.linalg.householder_product(reflectors, 2 / (1 + reflectors.square().sum(0))) * signs)


@dataclass(frozen=True)
class _Kind:
    """A class of pyreft's interventions, and its conversion to our parameters.

    Attributes:
        entries: the state dict's entries with their shapes.
        convert: computes our parameters from the entries.
        phi: whether the class has an act_fn, which its file does not record.
        linear: whether it can only be converted without an act_fn.
        optional: entries that may be missing.
    """

    entries: Mapping[str, str]
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    phi: bool = True
    linear: bool = False
    optional: Mapping[str, str] | None = None


_PROJECTION, _PROJECTION_BIAS = {"proj_layer.weight": "rd"}, {"proj_layer.bias": "r"}
_KINDS = {
    "LoreftIntervention": _Kind({"weight": "rd", "bias": "r", "rotate_layer": "dr"}, _loreft, linear=True),
    "NoreftIntervention": _Kind(_SOURCE | _PROJECTION, _noreft, linear=True, optional=_PROJECTION_BIAS),
    "ConsreftIntervention": _Kind({"learned_source": "r"} | _ROTATION, _consreft, phi=False),
    "DireftIntervention": _Kind(_SOURCE | _ROTATION, _direft),
    "NodireftIntervention": _Kind(_SOURCE | _PROJECTION, _nodireft, optional=_PROJECTION_BIAS),
    "LobireftIntervention": _Kind({"learned_source": "r"} | _ROTATION, _lobireft, phi=False),
}


def import_pyreft(
    directory: str | os.PathLike[str],
    *,
    positions: str | None,
    activation: str | None = None,
    base: str = "",
    num_layers: int | None = None,
    layers_path: str | None = None,
) -> AdapterFile:
    """Import the output of pyreft's `reft_model.save(directory)`: `config.json` and the `intkey_….bin` files.

    The interventions must be of one of the six classes above, on `block_output`, one for each layer, and all of one
    class and rank. The parameters become float32. bfloat16 values keep their numbers. The difference of NoReFT, the
    vector Rᵀb of LobiReFT, and W − R of a LoReFT that is not orthonormal are rounded once. Pickles are opened by
    `torch.load(weights_only=True)`, which executes nothing in them. pyreft itself is not needed.

    Args:
        directory: a local directory.
        positions: the tokens where pyreft intervened, as SteerConfig names them, or in pyreft's words: "f7+l7" is
            "first_7+last_7". pyreft takes them at each call, and its files do not record them. If a prompt is shorter
            than all of these and has an odd number of tokens, pyreft leaves out the middle one, fused-steer does not.
        activation: the act_fn, for the classes that have one: identity (its None and "linear"), silu, gelu, gelu_tanh
            ("gelu_pytorch_tanh"), relu or tanh.
        base: the base model's name, as in `import_steerling`.
        num_layers: the number of the base model's decoder layers, steered or not.
        layers_path: the path of the decoder layers in the model.

    Returns:
        The adapter for `write_adapter`, with `scale=1`, and `layers=None` if every layer is in the directory.

    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        TypeError: an argument of the wrong type.
        ValueError: an argument is missing or out of range, the base's config cannot be read or does not fit, or the
            directory cannot be expressed exactly as an adapter, or its files do not fit each other.
    """
    if positions is None:
        raise ValueError(
            "positions is not given; expected 'all' or such as 'f7+l7' (--positions), where pyreft intervened: its "
            "files do not record it"
        )
    where = _SHORT.sub(lambda found: f"{_ENDS[found[1]]}_{found[2]}", str(positions))
    SteerConfig(activation=activation, positions=where)
    target = layout(base, num_layers, layers_path)
    folder = checked_path(directory, "directory", "one that reft_model.save wrote")
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"no file {folder / CONFIG_NAME}; expected the directory that reft_model.save wrote")
    with naming(folder / CONFIG_NAME):
        name, representations = _read_config(folder / CONFIG_NAME)
    kind = _KINDS[name]
    with naming(folder):
        _check_activation(name, activation)
        _check_files(folder, representations)
    layers: dict[int, dict[str, Tensor]] = {}
    sizes: dict[str, int] = {}
    for index, rank in sorted(representations.items()):
        file = folder / file_name(index)
        state = read_pickle(file)
        with naming(file):
            tensors = _checked_state(kind, state, sizes)
            if rank not in (None, sizes["r"]):
                raise ValueError(f"its rank is {sizes['r']}; expected {rank}, the low_rank_dimension of {CONFIG_NAME}")
        layers[index] = {name: tensor.float() for name, tensor in kind.convert(tensors).items()}
    vector, form = kind.convert is _lobireft, "lowrank"
    if kind.convert is _loreft:
        if all(is_orthonormal(named[UP]) for named in layers.values()):
            form = "loreft"
        else:
            layers = {index: _with_difference(named) for index, named in layers.items()}
    return assemble(
        folder,
        target,
        sizes["d"],
        {Place(index): tensors for index, tensors in layers.items()},
        form="vector" if vector else form,
        rank=0 if vector else sizes["r"],
        activation=activation or "identity",
        down_bias=not vector,
        positions=where,
    )


# ---------------------------------------------------------------------------------------------------------- config.json


def _read_config(file: Path) -> tuple[str, dict[int, int | None]]:
    """Return the class of all interventions, and each layer's recorded rank or None."""
    try:
        fields = read_json(file)
    except OSError as error:
        raise ValueError(f"it cannot be read: {first_line(error)}; expected JSON") from error
    except ValueError as error:
        raise ValueError(f"it cannot be read: {first_line(error)}") from error
    entries, types = fields.get("representations"), fields.get("intervention_types")
    if not isinstance(entries, list) or not isinstance(types, list) or not entries or len(entries) != len(types):
        raise ValueError("its representations and intervention_types are not as many; expected a pair an intervention")
    if fields.get("mode", "parallel") != "parallel":
        raise ValueError(f"mode is {fields['mode']!r}; expected 'parallel'")
    names = {_type_name(type_) for type_ in types}
    if len(names) > 1:
        raise ValueError(f"its interventions are of {', '.join(sorted(names))}; expected one class")
    layers: dict[int, int | None] = {}
    for entry in entries:
        index, rank = _read_representation(entry)
        if index in layers:
            raise ValueError(f"layer {index} has several interventions; expected one a layer, at all positions")
        layers[index] = rank
    return names.pop(), layers


def _type_name(type_: Any) -> str:
    found = _TYPE.fullmatch(type_) if isinstance(type_, str) else None
    if found is None or found[1] not in _KINDS:
        raise ValueError(f"an intervention is {type_!r}; expected pyreft's {', '.join(_KINDS)}")
    return found[1]


def _read_representation(entry: Any) -> tuple[int, int | None]:
    if isinstance(entry, list) and len(entry) <= len(FIELDS):
        entry = dict(zip(FIELDS, entry, strict=False))
    if not isinstance(entry, dict) or not entry.keys() <= set(FIELDS):
        raise ValueError(f"a representation is {entry!r}; expected pyvene's {', '.join(FIELDS)}")
    index, rank = entry.get("layer", 0), entry.get("low_rank_dimension")
    for field, value in (("layer", index), ("low_rank_dimension", 0 if rank is None else rank)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{field} is {value!r}; expected an integer from 0")
    for field, expected in REQUIRED.items():
        if entry.get(field, expected) != expected:
            raise ValueError(f"layer {index} has {field} {entry[field]!r}; expected {expected!r}")
    for field in _ABSENT:
        if entry.get(field) is not None:
            raise ValueError(f"layer {index} has a {field}; expected none")
    return index, rank


def _check_activation(name: str, activation: str | None) -> None:
    kind = _KINDS[name]
    if kind.phi and activation is None:
        raise ValueError(
            f"activation is not given; expected {'identity' if kind.linear else ' or '.join(ACTIVATIONS)} "
            f"(--activation): it is the act_fn, None being identity, and {name}'s files do not record it"
        )
    if not kind.phi and activation is not None:
        raise ValueError(f"activation is {activation!r} (--activation), and {name} has none; expected none given")
    if kind.linear and activation != "identity":
        raise ValueError(
            f"activation is {activation!r} (--activation), and {name} subtracts a term outside it, which is not of the "
            "form W2 φ(W1 h + b1); expected identity"
        )


# -------------------------------------------------------------------------------------------------------------- weights


def file_name(index: int) -> str:
    return FILE_NAME.format(index)


def _check_files(folder: Path, layers: Mapping[int, Any]) -> None:
    expected = {file_name(index) for index in layers}
    found = {file.name for file in folder.glob("intkey_*.bin")}
    for name in sorted(expected - found):
        raise FileNotFoundError(f"no file {folder / name}; expected one for each intervention of {CONFIG_NAME}")
    for name in sorted(found - expected):
        raise ValueError(f"it has a file {name}, which {CONFIG_NAME} does not list; expected no other")
    if (folder / _BASE_NAME).exists():
        trained = read_pickle(folder / _BASE_NAME)
        if not isinstance(trained, dict) or trained:
            raise ValueError(f"it has weights of the base model ({_BASE_NAME}); expected the base frozen: without them")


def _checked_state(kind: _Kind, state: Any, sizes: dict[str, int]) -> dict[str, Tensor]:
    """Return the entries of an intervention that affect the result. `sizes` holds r and d once they are known."""
    if not isinstance(state, Mapping):
        raise ValueError(f"it holds a {type(state).__name__}; expected a state dict")
    state = {key: value for key, value in state.items() if key not in _IGNORED}
    shapes = {**kind.entries, **{key: shape for key, shape in (kind.optional or {}).items() if key in state}}
    if state.keys() != shapes.keys():
        raise ValueError(f"it has {', '.join(map(str, state)) or 'nothing'}; expected {', '.join(shapes)}")
    for key, letters in shapes.items():
        value = checked_tensor(key, state[key], len(letters))
        expected = tuple(sizes.setdefault(letter, size) for letter, size in zip(letters, value.shape, strict=True))
        if tuple(value.shape) != expected:
            raise ValueError(f"{key} has shape {tuple(value.shape)}; expected {expected}, as those before it")
    if ORIGINAL in shapes and sizes["r"] >= sizes["d"]:  # torch parametrises a square R otherwise
        raise ValueError(f"its rank is {sizes['r']}; expected less than its hidden size, {sizes['d']}")
    for key in _ROTATION:
        if key in state and state[key].dtype != torch.float32:
            raise ValueError(f"{key} is {state[key].dtype}; expected torch.float32, in which torch orthogonalises")
    return state
