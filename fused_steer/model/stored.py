"""Convert an adapter of a patched model to file contents, and restore its values from a file."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.distributed import check_unsharded, gather, in_group, is_dtensor, merge, part_of, sharder
from ..adapters.files import AdapterFile
from ..adapters.parameters import UP_BIAS, ByPlace, Layout, Place, by_place, in_model, of_adapter
from ..config import DTYPES, SteerConfig
from .site import SteeringSite

Sites = Mapping[Place, SteeringSite]


def adapter_tensors(sites: Sites, name: str) -> ByPlace:
    """Return an adapter's tensors by layer, as this process holds them."""
    adapters = {place: site.adapter(name) for place, site in sites.items()}
    return {place: adapter.named_tensors() for place, adapter in adapters.items() if adapter is not None}


def adapter_file(
    name: str, config: SteerConfig, layout: Layout, sites: Sites, constrained: ByPlace, absent: Collection[int]
) -> tuple[AdapterFile, bool]:
    """Return an adapter as file contents, and whether all processes gathered it together.

    Args:
        name: the adapter's name.
        config: the adapter's config. The written dtype is the parameters' own.
        layout: the model's layout.
        sites: the model's sites.
        constrained: values that replace the parameters' values.
        absent: layers that are not in this process's model, to be taken from the others (stages of a pipeline).

    Raises:
        ValueError: the parameters have several dtypes, are not finite, or the shards do not form a whole adapter.
    """
    found = {place: {**named, **constrained.get(place, {})} for place, named in adapter_tensors(sites, name).items()}
    tensors = layout.paths(found)
    if absent and in_group():
        here = layout.paths({place: named for place, named in found.items() if place.layer not in absent})
        return _file(name, config, layout, tensors | merge(here), False), True
    together = any(map(is_dtensor, tensors.values())) or any(sharder(site) == "FSDP" for site in sites.values())
    return _file(name, config, layout, tensors, together), together


def files_of_state(
    configs: Mapping[str, SteerConfig], layout: Layout, state: Mapping[str, Tensor]
) -> dict[str, AdapterFile]:
    """Return the adapters in a model's state dict as file contents, by name, with the state dict's values.

    Raises:
        ValueError: see `adapter_file`; or the state dict has only a part of an adapter.
    """
    files = {}
    for name, config in configs.items():
        paths = layout.paths(layout.shapes(config))
        tensors = {path: tensor for path, tensor in of_adapter(state.items(), name).items() if path in paths}
        missing = [in_model(path, name) for path in paths if path not in tensors]
        if tensors and missing:
            raise ValueError(f"state_dict has no {missing[0]}; expected all of adapter {name!r}, or none of it")
        if tensors:
            files[name] = _file(name, config, layout, tensors, any(map(is_dtensor, tensors.values())))
    return files


def _file(name: str, config: SteerConfig, layout: Layout, tensors: dict[str, Tensor], together: bool) -> AdapterFile:
    dtypes = {tensor.dtype for tensor in tensors.values()}
    names = [dtype_name for dtype_name, dtype in DTYPES.items() if {dtype} == dtypes]
    if not names:
        raise ValueError(
            f"adapter {name!r} has parameters of {sorted(map(str, dtypes))}; expected one of {list(DTYPES)}"
        )
    config = replace(config, dtype=names[0])
    shapes = layout.paths(layout.shapes(config))
    if together:
        tensors = gather(tensors, shapes)
    for path, shape in shapes.items():
        if tuple(tensors[path].shape) != shape:
            raise ValueError(
                f"{path} has shape {tuple(tensors[path].shape)} in this process; expected {shape} "
                "(under DeepSpeed's ZeRO-3, save inside deepspeed.zero.GatheredParameters)"
            )
    try:
        return AdapterFile(config, layout, by_place(tensors)[1])
    except ValueError as error:
        raise ValueError(f"adapter {name!r} cannot be saved: {error}") from error


def vectors_file(vectors: Mapping[int, Any], layout: Layout, *, scale: float, site: str, positions: str) -> AdapterFile:
    """Return steering vectors as file contents.

    Args:
        vectors: a tensor or array (d,) for each layer, by its index. It is copied to float32.
        layout: the model's layout.
        scale, site, positions: as in `SteerConfig`.

    Raises:
        TypeError, ValueError: see `Steering.add_vector`.
    """
    if not isinstance(vectors, Mapping):
        raise TypeError(f"vectors is a {type(vectors).__name__}; expected a tensor for each layer, by its index")
    config = SteerConfig("vector", layers=list(vectors), site=site, scale=scale, positions=positions)
    indices = layout.indices(config)
    given = {int(index): _vector(index, values, layout.hidden) for index, values in vectors.items()}
    if layout.config_layers(indices) is None:
        config = replace(config, layers=None)
    return AdapterFile(
        config, layout, {place: {UP_BIAS: given[place.layer].clone()} for place in layout.places(config)}
    )


def _vector(layer: int, values: Any, hidden: int) -> Tensor:
    try:
        vector = torch.as_tensor(values).detach()
        if vector.is_complex():
            raise TypeError
        vector = vector.to("cpu", torch.float32, copy=True).contiguous()
    except (TypeError, ValueError, RuntimeError, OverflowError):  # PyTorch's errors do not name the layer
        kind = f"tensor of {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(
            f"the vector of layer {layer} is a {kind}; expected a tensor or array ({hidden},) of real numbers"
        ) from None
    if tuple(vector.shape) != (hidden,):
        raise ValueError(f"the vector of layer {layer} has shape {tuple(vector.shape)}; expected ({hidden},)")
    return vector


def check_same_config(source: Any, saved: SteerConfig, name: str, here: SteerConfig) -> None:
    """Check that saved values have the same config as the adapter, apart from the strength.

    Raises:
        ValueError: a field differs. The message names `source` and the field.
    """
    theirs, ours = (replace(config, scale=1.0).to_dict() for config in (saved, here))
    for field in dict.fromkeys((*ours, *theirs)):
        if theirs.get(field) != ours.get(field):
            raise ValueError(
                f"{source} was saved with {field} {theirs.get(field)!r}; expected {ours.get(field)!r}, that of "
                f"adapter {name!r}"
            )


@torch.no_grad()
def restore_values(file: AdapterFile, name: str, sites: Sites, layers: Iterable[nn.Module]) -> None:
    """Write a file's values into an adapter's parameters; all or none. With several processes each takes its own part.

    Args:
        file: the saved adapter, with the same config.
        name: the adapter's name.
        sites: the model's sites.
        layers: all of the model's decoder layers.

    Raises:
        ValueError: FSDP1 or ZeRO has sharded the adapter, or a tensor of it is computed from others.
    """
    for place, site in sites.items():
        adapter = site.adapter(name)
        for computed in () if adapter is None else adapter.computed():
            raise ValueError(
                f"{computed} of adapter {name!r} at {place} is computed from other parameters (parametrized or "
                "pruned); expected parameters that values can be copied into"
            )
    parts = adapter_tensors(sites, name)
    if not all(is_dtensor(part) for named in parts.values() for part in named.values()):
        check_unsharded(layers, "adapters to be restored")
    earlier = {part: part.clone() for named in parts.values() for part in named.values()}
    try:
        for place, tensors in file.tensors.items():
            for key, tensor in tensors.items():
                part = parts[place][key]
                part.copy_(part_of(tensor.to(part.device), part))
    except BaseException:
        for part, values in earlier.items():
            part.copy_(values)
        raise
