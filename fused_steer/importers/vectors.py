"""Control vectors as adapters of `form="vector"`, and back: GGUF files of repeng and llama.cpp, and plain tensors.

Layer N is the decoder layer of index N, from 0. Its vector is added to that layer's output. repeng wraps
`model.layers[N]`. llama.cpp adds `direction.N` to its `l_out` of layer N, with N from 1. steering-vectors hooks its
decoder block N. EasySteer has the same layers in the same GGUF. The output of layer N is `hidden_states[N + 1]`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..adapters.files import AdapterFile, read_adapter
from ..adapters.parameters import SITE, UP_BIAS, Place
from ..adapters.saving import checked_path, saving_folder, target_folder
from ..config import SteerConfig
from ..positions import ALL
from .gguf import gguf_bytes, read_gguf
from .reading import (
    DTYPE_NAMES,
    assemble,
    checked_tensor,
    layout,
    naming,
    read_pickle,
    read_safetensors,
)

_ARCHITECTURE = "controlvector"
_DIRECTION = "direction."
_SUFFIXES = (".gguf", ".safetensors", ".pt")
_KEY = re.compile(r"(?:(?:direction|layers?)\.)?(0|[1-9][0-9]*)")


def import_vector(
    file: str | os.PathLike[str],
    *,
    scale: float | None,
    layers: Sequence[int] | None = None,
    base: str = "",
    num_layers: int | None = None,
    layers_path: str | None = None,
) -> AdapterFile:
    """Import one vector for each layer: h -> h + scale · vector, at every token.

    repeng's `normalize=True`, which scales the sum back to the norm of h, and `operator`s other than the sum are not
    vectors. Its files do not record them. repeng skips padding; here padding is steered too, which has no effect.

    Args:
        file: a `.gguf` of repeng, llama.cpp or EasySteer, with `direction.N` for layer N; a `.safetensors`; or a file
            of `torch.save`. The latter two hold a dict of tensors (d,) with keys `N` (or the integer), `layer.N`,
            `layers.N` or `direction.N`, or one tensor (L, d) or (d,), bare or in a dict. The dtype (float32, bfloat16
            or float16) is kept.
        scale: repeng's coefficient, llama.cpp's `--control-vector-scaled`, steering-vectors' multiplier.
        layers: for a dict, the layers to import, repeng's `layer_ids` (default: all in the file). For a tensor (L, d),
            the layer of each row; needed unless the tensor has a row for each layer of the model.
        base: the base model's name, as in `import_steerling`.
        num_layers: the number of the base model's decoder layers, steered or not.
        layers_path: the path of the decoder layers in the model.

    Returns:
        The adapter for `write_adapter`, with `layers=None` if it has a vector for every layer.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: an argument of the wrong type.
        ValueError: an argument is missing or out of range, the base's config cannot be read or does not fit, or the
            file cannot be read safely, has other content, or tensors that do not fit each other.
    """
    if scale is None:
        raise ValueError("scale is not given; expected a number (--scale): the file does not record it")
    SteerConfig("vector", scale=scale, layers=layers)
    order = None if layers is None else [int(index) for index in layers]  # an array's, too; rows come in this order
    target = layout(base, num_layers, layers_path)
    state = _read(checked_path(file, "file", "a control vector's"))
    with naming(file):
        vectors = _by_layer(state, order, target.num_layers)
        hidden, dtype = _sizes(vectors)
    named = {Place(index): {UP_BIAS: vector} for index, vector in vectors.items()}
    return assemble(file, target, hidden, named, form="vector", scale=scale, dtype=DTYPE_NAMES[dtype])


def export_vector(
    source: str | os.PathLike[str], file: str | os.PathLike[str], *, model_type: str = ""
) -> tuple[AdapterFile, list[int]]:
    """Write an adapter of `form="vector"` as control vectors, one for each layer, for use at strength 1.

    The adapter's strength is multiplied in, and the product rounded to float32 once. `import_vector(file, scale=1)`
    computes the same.

    Args:
        source: a saved adapter: its directory, or its id on the hub.
        file: a new file: `.gguf` for llama.cpp and repeng, with `direction.N` for layer N; `.safetensors` with tensors
            `layer.N`; or `.pt`, a dict of tensors by layer, as steering-vectors' `layer_activations`.
        model_type: recorded in a `.gguf` as its model_hint, such as "llama".

    Returns:
        The adapter, and the layers with a vector.

    Raises:
        FileNotFoundError, ValueError: there is no such adapter, its files are broken, the format has no such form, site
            or positions, or the file exists. Nothing is written then.
    """
    target = checked_path(file, "file", "a new file for the vectors")
    adapter = read_adapter(source)
    config = adapter.config
    if target.suffix not in _SUFFIXES:
        raise ValueError(f"the file is {target}; expected its name to end in {', '.join(_SUFFIXES)}")
    if config.form != "vector":
        raise ValueError(f"{source} is of form {config.form!r}; expected 'vector': a control vector is nothing else")
    if config.sites != (SITE,):
        raise ValueError(f"{source} steers at {', '.join(config.sites)}; expected {SITE}, the place of control vectors")
    if config.positions != ALL:
        raise ValueError(f"{source} has positions {config.positions!r}; expected {ALL!r}: files record no others")
    if target.suffix == ".gguf" and Place(0) in adapter.tensors:
        raise ValueError(f"{source} steers layer 0; expected layers from 1: llama.cpp refuses a direction.0")
    if target.exists():
        raise ValueError(f"{target} exists; expected a new file")
    vectors = {
        place.layer: (config.scale * tensors[UP_BIAS].double()).float() for place, tensors in adapter.tensors.items()
    }
    with saving_folder(target_folder(str(target.parent), "the vectors")) as folder:
        written = folder / target.name
        if target.suffix == ".pt":
            torch.save(vectors, written)
        elif target.suffix == ".safetensors":
            written.write_bytes(safetensors.torch.save({f"layer.{i}": vector for i, vector in vectors.items()}))
        else:
            hint, count = f"{_ARCHITECTURE}.model_hint", f"{_ARCHITECTURE}.layer_count"
            metadata: dict[str, str | int] = {
                "general.architecture": _ARCHITECTURE,
                hint: model_type,
                count: len(vectors),
            }
            named = {f"{_DIRECTION}{i}": vector for i, vector in vectors.items()}
            written.write_bytes(gguf_bytes(metadata, named))
        os.replace(written, target)
    return adapter, list(vectors)


def _read(file: Path) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}; expected a control vector: .gguf, .safetensors or torch.save's")
    if file.suffix == ".gguf":
        return read_gguf(file, _ARCHITECTURE, _DIRECTION)
    return read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file)


def _by_layer(state: Any, layers: Sequence[int] | None, count: int) -> dict[int, Tensor]:
    """Return the vectors by layer, in order."""
    if isinstance(state, Mapping) and len(state) == 1:
        [(key, value)] = state.items()
        if _layer_of(key) is None:
            return _rows(str(key), value, layers, count)
    if isinstance(state, Tensor):
        return _rows("its tensor", state, layers, count)
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"it holds {'nothing' if state == {} else f'a {type(state).__name__}'}; expected vectors")
    vectors: dict[int, Tensor] = {}
    for key, value in state.items():
        index = _layer_of(key)
        if index is None:
            raise ValueError(f"it has an unknown key {key!r}; expected names such as direction.7, layer.7 or 7")
        if index in vectors:
            raise ValueError(f"it has layer {index} twice, also as {key!r}; expected it once")
        vectors[index] = checked_tensor(str(key), value, dimensions=1)
    missing = sorted(set(layers or ()) - vectors.keys())
    if missing:
        raise ValueError(f"layers has {missing[0]}; expected those in the file: {', '.join(map(str, sorted(vectors)))}")
    return {i: vectors[i] for i in sorted(vectors if layers is None else layers)}


def _layer_of(key: Any) -> int | None:
    found = _KEY.fullmatch(str(key)) if isinstance(key, (str, int)) else None
    return int(found[1]) if found else None


def _rows(name: str, tensor: Any, layers: Sequence[int] | None, count: int) -> dict[int, Tensor]:
    dimensions = 1 if isinstance(tensor, Tensor) and tensor.ndim == 1 else 2
    rows = checked_tensor(name, tensor, dimensions).reshape(-1, tensor.shape[-1])
    if layers is None and len(rows) != count:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, and layers is not given; expected the layer of each row "
            f"(--layers), or {count} rows, num_layers"
        )
    if layers is not None and len(rows) != len(layers):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {len(layers)} rows, as many as layers")
    return dict(sorted(zip(range(count) if layers is None else layers, rows, strict=True)))


def _sizes(vectors: Mapping[int, Tensor]) -> tuple[int, torch.dtype]:
    """Return the hidden size and dtype that all layers share."""
    first, expected = next(iter(vectors.items()))
    for i, vector in vectors.items():
        for name, found, its in (
            ("hidden size", len(vector), len(expected)),
            ("dtype", vector.dtype, expected.dtype),
        ):
            if found != its:
                raise ValueError(f"layer {i} has {name} {found}; expected {its}, as layer {first} has")
    return len(expected), expected.dtype
