"""The format of an adapter: names, paths and shapes of its tensors, and the model that it fits.

An adapter steers at places: a site in a layer, such as `post_block` in layer 3. At one place it has W1 and b1
(`steer_down`), W2 and b2 (`steer_up`). Either of each pair may be missing. For LoReFT (`form="loreft"`) `steer_down` is
W and b, and `steer_up.weight` is a matrix P (d, r) with the QR factor Rᵀ (kernels/rotation.py). `steered` turns them
into W1 = W − R and W2 = Rᵀ.

    <layers path>.<i>.<site>.steer_down.weight            a tensor's path in files (after PEFT_PREFIX)
    <layers path>.<i>.<site>.steer_down.<adapter>.weight  its name in a patched model
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..config import DTYPES, FLOAT32_MAX, SITES, SteerConfig
from ..kernels.rotation import is_orthonormal, orthonormal, rotate
from ..positions import shown
from .kinds import CHECKPOINT_FOLDER

T = TypeVar("T")

#: The default site.
SITE = "post_block"
#: The names of an adapter's tensors below the site: W1 (r, d), b1 (r,), W2 (d, r), b2 (d,).
DOWN, DOWN_BIAS, UP, UP_BIAS = NAMES = ("steer_down.weight", "steer_down.bias", "steer_up.weight", "steer_up.bias")
#: The prefix of each path in a file, where PEFT's wrapper holds the model.
PEFT_PREFIX = "base_model.model."


class Place(NamedTuple):
    """Where an adapter has parameters: a site in a layer. The site's module is the layer's child of that name."""

    layer: int
    site: str = SITE

    def __str__(self) -> str:
        return f"layer {self.layer}" if self.site == SITE else f"{self.site} of layer {self.layer}"


#: The tensors of an adapter: by place, then by name below the site.
ByPlace = dict[Place, dict[str, Tensor]]
#: A tensor's dtype and shape, known before it is read.
Spec = tuple[torch.dtype, tuple[int, ...]]

_ADAPTER = re.compile(r"[A-Za-z0-9_-]+")
_LONGEST_NAME = 200  # a folder's name may have 255 bytes, and a save adds to it
#: Names in a tensor's path other than the adapter's.
_IN_PATHS = frozenset({*SITES, *(part for name in NAMES for part in name.split("."))})
#: Names that torch.compile, DDP, FSDP and activation checkpointing put into the path of a module that they wrap.
_WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def check_name(name: Any) -> None:
    """Check an adapter's name, which is a part of file paths and module paths.

    Raises:
        ValueError: the name has other characters than letters, digits, _ and -, has more than 200 of them, or has a
            meaning in module paths.
    """
    if not isinstance(name, str) or not _ADAPTER.fullmatch(name):
        raise ValueError(f"adapter name is {shown(name)}; expected letters, digits, '_' and '-'")
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"adapter name has {len(name)} characters, {name:.20}…; expected at most {_LONGEST_NAME}")
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(f"adapter name is {name!r}, a word that PyTorch's modules use; expected another")
    if name in _IN_PATHS:
        raise ValueError(f"adapter name is {name!r}, a part of every tensor's path; expected another")


def by_lower(names: Iterable[str]) -> dict[str, str]:
    """Return names by their lower-case form."""
    return {name.lower(): name for name in names}


def refuse_clash(name: str, taken: Mapping[str, str], where: str = "") -> None:
    """Refuse a name that is taken, or that differs from a taken name only in letter case.

    Adapters are saved in folders of their names, and some file systems ignore case.

    Args:
        taken: the taken names, from `by_lower`.
        where: the place of the names in the error, such as " in the pool".

    Raises:
        ValueError: the name clashes with another one.
    """
    other = taken.get(name.lower())
    if other == name:
        raise ValueError(f"there is an adapter {name!r}{where} already; expected a new name")
    if other is not None:
        raise ValueError(
            f"there is an adapter {other!r}{where} already, and {name!r} differs only in letter case; expected a new "
            "name"
        )


def unwrapped(path: str) -> str:
    """Return the path of a module or tensor in the bare model, without the wrappers of other libraries."""
    path = without_wrappers(path)
    while path.startswith(PEFT_PREFIX):
        path = path.removeprefix(PEFT_PREFIX)
    return path


def without_wrappers(path: str) -> str:
    """Return a path without the parts added by torch.compile, DDP, FSDP and activation checkpointing."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


_FACTOR = r"steer_(?:down|up)"
_SITE = "|".join(SITES)
_INDEX = "0|[1-9][0-9]*"  # one spelling for each layer, so that two paths are two tensors
_PATH = re.compile(rf"(?:(.+)\.)?({_INDEX})\.({_SITE})\.({_FACTOR}\.(?:weight|bias))")


def split_path(path: str) -> tuple[str, Place, str]:
    """Split a tensor's path into the path of the list of layers, the place, and the name below the site.

    Raises:
        ValueError: the path has another form.
    """
    found = _PATH.fullmatch(path)
    if found is None:
        raise ValueError(f"it has a tensor {path!r}; expected names such as layers.0.{SITE}.{UP}")
    return found[1] or "", Place(int(found[2]), found[3]), found[4]


def by_place(tensors: Mapping[str, T]) -> tuple[str, dict[Place, dict[str, T]]]:
    """The path of the list of layers ("" if there are no tensors), and the tensors by place, in order, and by name.

    Raises:
        ValueError: a path is not that of an adapter's tensor, or the paths belong to several lists of layers.
    """
    found: dict[Place, dict[str, T]] = {}
    lists: dict[str, str] = {}
    for path, tensor in tensors.items():
        layers_path, place, name = split_path(path)
        found.setdefault(place, {})[name] = tensor
        lists.setdefault(layers_path, path)
    if len(lists) > 1:
        first, second, *_ = lists.values()
        raise ValueError(f"it has tensors {first} and {second}; expected tensors of one list of layers")
    return next(iter(lists), ""), dict(sorted(found.items()))


def of_adapter(named: Iterable[tuple[str, T]], adapter: str) -> dict[str, T]:
    """Return an adapter's tensors by path, from a patched model's named parameters or state dict."""
    paths = ((out_of_model(name, adapter), value) for name, value in named)
    return {path: value for path, value in paths if path is not None}


def out_of_model(name: str, adapter: str) -> str | None:
    """Return the path of an adapter's tensor from its `name` in a patched model. None if it is not this adapter's."""
    found = re.fullmatch(rf"(.*\.(?:{_SITE})\.{_FACTOR})\.{re.escape(adapter)}\.(weight|bias)", name)
    return None if found is None else f"{found[1]}.{found[2]}"


def is_of_site(path: str) -> bool:
    """Return whether a path in a model leads into a site."""
    return any(f".{site}." in f".{path}." for site in SITES)


def in_model(path: str, adapter: str) -> str:
    """Return a patched model's name of an adapter's tensor."""
    factor, _, kind = path.rpartition(".")
    return f"{factor}.{adapter}.{kind}"


def shapes_of(rank: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor that an adapter of this rank may have, by name."""
    return dict(zip(NAMES, ((rank, hidden), (rank,), (hidden, rank), (hidden,)), strict=True))


def steered(form: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return W1, b1, W2 and b2, by name, of an adapter's tensors at a layer. The op takes these."""
    if form != "loreft":
        return dict(tensors)
    down, up = rotate(tensors[DOWN], tensors[UP])
    return {**tensors, DOWN: down, UP: up}


# ------------------------------------------------------------------------------------------- the model that it fits


@dataclass(frozen=True)
class Layout:
    """The decoder layers of a model, which an adapter has to fit.

    Attributes:
        layers_path: the path of the list of layers, "" if only their indices matter.
        num_layers: their number.
        hidden: d, or 0 if it is not known yet.
        base: the model's name, or "".
    """

    layers_path: str
    num_layers: int
    hidden: int
    base: str = ""

    def layer_path(self, index: int) -> str:
        """Return the path of a layer."""
        return f"{self.layers_path}.{index}" if self.layers_path else str(index)

    def path(self, place: Place, name: str = "") -> str:
        """Return the path of a site, or of the tensor `name` of an adapter there."""
        return ".".join(part for part in (self.layer_path(place.layer), place.site, name) if part)

    def paths(self, places: Mapping[Place, Mapping[str, T]]) -> dict[str, T]:
        """Return values that are given by place and name, by path."""
        return {self.path(place, name): value for place, named in places.items() for name, value in named.items()}

    def indices(self, config: SteerConfig) -> Sequence[int]:
        """Return the layers that an adapter of `config` steers.

        All layers are returned as a range, because a file may claim any number of them.

        Raises:
            ValueError: the model lacks a layer.
        """
        if config.layers is None:
            return range(self.num_layers)
        if config.layers[-1] >= self.num_layers:
            raise ValueError(
                f"layers has {config.layers[-1]}; expected indices below {self.num_layers}, the number of layers"
            )
        return list(config.layers)

    def places(self, config: SteerConfig) -> Iterator[Place]:
        """Return where an adapter of `config` steers, layer by layer.

        Raises:
            ValueError: there is no such layer.
        """
        return (Place(index, site) for index in self.indices(config) for site in config.sites)

    def config_layers(self, indices: Iterable[int]) -> list[int] | None:
        """Return the config's `layers` for these indices. None means all.

        Raises:
            ValueError: the model lacks a layer.
        """
        found = sorted(indices)
        if found[-1] >= self.num_layers:
            raise ValueError(f"it has a layer {found[-1]}; expected indices below {self.num_layers}, num_layers")
        return None if len(found) == self.num_layers else found

    def count(self, config: SteerConfig) -> int:
        """Return the number of parameters of an adapter of `config`, over all places."""
        return sum(math.prod(shape) for shape in self.paths(self.shapes(config)).values())

    def shapes(self, config: SteerConfig) -> dict[Place, dict[str, tuple[int, ...]]]:
        """Return the shape of each tensor of an adapter of `config`, by place and name."""
        return dict.fromkeys(self.places(config), self._shapes(config))

    def _shapes(self, config: SteerConfig) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor that an adapter of `config` has at one place."""
        there = {DOWN: config.rank > 0, DOWN_BIAS: config.down_bias, UP: config.rank > 0, UP_BIAS: config.up_bias}
        return {name: shape for name, shape in shapes_of(config.rank, self.hidden).items() if there[name]}

    def check_tensors(self, config: SteerConfig, specs: Mapping[Place, Mapping[str, Spec]]) -> None:
        """Check that tensors are exactly those of `config`: none missing, none more, with the right shapes and dtypes.

        Raises:
            ValueError: one line about the first wrong tensor.
        """
        dtype, shapes, indices = DTYPES[config.dtype], self._shapes(config), self.indices(config)
        for place in self.places(config):  # perhaps 10**9, by what a file says: the first that is missing ends this
            for name, shape in shapes.items():
                found = specs.get(place, {}).get(name)
                if found is None:
                    raise ValueError(f"it has no tensor {self.path(place, name)}; expected one of shape {shape}")
                if found != (dtype, shape):
                    raise ValueError(
                        f"tensor {self.path(place, name)} is {found[0]} {found[1]}; expected {dtype} {shape}"
                    )
        for place, named in specs.items():
            for name in named:
                if place.layer not in indices or place.site not in config.sites or name not in shapes:
                    raise ValueError(
                        f"it has a tensor {self.path(place, name)}; expected only the tensors of its config"
                    )

    def check_sizes(self, source: Any, hidden: int | None, num_layers: int | None) -> None:
        """Check that an adapter is for a model of the same hidden size and number of layers. None is not checked.

        Raises:
            ValueError: a size differs. The message names `source`.
        """
        for what, theirs, ours in (
            ("hidden size", hidden, self.hidden),
            ("number of layers", num_layers, self.num_layers),
        ):
            if theirs is not None and theirs != ours:
                raise ValueError(f"{source} is for a model of {what} {theirs}; expected {ours}")

    def check_fits(self, source: Any, adapter: Layout, check_base: bool) -> None:
        """Check that an adapter is for a model of the same sizes, and with `check_base` of the same name.

        An adapter in the folder of the whole model, where `save_pretrained` writes both, is for this model under
        whatever name.

        Args:
            source: the adapter's source, named in the error.
            adapter: the layout that the adapter was made for.

        Raises:
            ValueError: the adapter does not fit.
        """
        self.check_sizes(source, adapter.hidden, adapter.num_layers)
        if check_base and not same_base(adapter.base, self.base) and not lies_beside(source, self.base):
            raise ValueError(
                f"{source} is for the base model {adapter.base!r}; expected {self.base!r} "
                "(check_base=False, in a command --no-check-base, takes both names for the same model)"
            )


def specs_of(tensors: Mapping[Place, Mapping[str, Tensor]]) -> dict[Place, dict[str, Spec]]:
    """Return the dtype and shape of each tensor."""
    return {
        place: {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in named.items()}
        for place, named in tensors.items()
    }


def check_range(what: Any, tensors: Mapping[Place, Mapping[str, Tensor]], dtype: torch.dtype) -> None:
    """Check that an adapter's values are finite in the dtype that they are converted to. float16 ends at 65504.

    Args:
        what: the adapter, for the error message.

    Raises:
        ValueError: a value is beyond the dtype.
    """
    if dtype == torch.float32:  # no adapter has a wider one
        return
    for place, named in tensors.items():
        for tensor in named.values():
            if not tensor.to(dtype).isfinite().all():
                raise ValueError(
                    f"{what} has values up to {tensor.abs().max():.3g} in {place}; expected at most "
                    f"{torch.finfo(dtype).max:.3g}, the largest of the slots' {str(dtype).removeprefix('torch.')}"
                )


def check_values(path: str, tensor: Tensor, scale: float) -> None:
    """Check that a tensor has finite values, and for W2 or b2 that they do not overflow float32 times the strength.

    Raises:
        ValueError: one line that names the tensor by `path`.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return  # another check refuses a wrong dtype or shape
    if tensor.element_size() == 1:  # float8 has no arithmetic
        tensor = tensor.float()
    ends = tensor.detach().aminmax()  # NaN if any value is NaN
    # Autocast refuses to stack float16 where its own dtype is bfloat16.
    least, most = torch.stack([end.float() if end.element_size() == 2 else end for end in ends]).tolist()
    largest = max(-least, most)
    if not math.isfinite(largest):
        raise ValueError(f"tensor {path} has values that are NaN or infinite; expected finite ones")
    if split_path(path)[2] in (UP, UP_BIAS) and abs(scale) * largest > FLOAT32_MAX:
        raise ValueError(
            f"tensor {path} has values up to {largest:.3g}, and scale is {scale:.3g}; expected a product of at most "
            f"{FLOAT32_MAX:.3g}, float32's largest"
        )


def check_rotation(path: str, matrix: Tensor) -> None:
    """Refuse a matrix that makes no rotation of LoReFT's.

    Raises:
        ValueError: its columns depend on each other, to float32's rounding.
    """
    if not is_orthonormal(orthonormal(matrix.detach().float())):
        raise ValueError(f"tensor {path} has columns that depend on each other; expected independent ones, for LoReFT")


_CACHED = re.compile(r"(?:^|[/\\])models--([^/\\]+?)--([^/\\]+)(?:[/\\]snapshots)?(?:[/\\]|$)")
_HASH = re.compile(r"[0-9a-f]{40,64}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def base_name(base: str) -> str:
    """Return a base model's name for files: the hub id if `base` is a path in the hub's cache."""
    cached = _CACHED.search(base)
    return f"{cached[1]}/{cached[2]}" if cached else base


def lies_beside(source: str | os.PathLike[str], base: str) -> bool:
    """Return whether an adapter's source is the folder or the hub id of the model, or a folder for adapters there."""
    if os.fspath(source) == base:
        return bool(base)
    folder = Path(source).resolve()
    places = [folder, *([folder.parents[1]] if folder.parent.name == CHECKPOINT_FOLDER else [])]
    return os.path.isdir(base) and Path(base).resolve() in places


def same_base(one: str, other: str) -> bool:
    """Return whether two names may mean the same base model: equal hub ids, or else equal last parts of paths.

    An empty name or a commit's hash may mean any model.
    """
    names = [base_name(base).rstrip("/\\") for base in (one, other)]
    lasts = [re.split(r"[/\\]", name)[-1] for name in names]
    if not all(lasts) or any(_HASH.fullmatch(last) for last in lasts):
        return True
    if all(_HUB_ID.fullmatch(name) and not os.path.isdir(name) for name in names):
        return names[0] == names[1]
    return lasts[0] == lasts[1]
