"""The format of an adapter: the names, paths and shapes of its tensors, which model it fits, and its module in a layer.

An adapter at one layer has W1 and b1 (`steer_down`), W2 and b2 (`steer_up`); either of each pair may be absent. Of
LoReFT (`form="loreft"`) `steer_down` is W and b, and `steer_up.weight` is P (d, r), of which QR makes Rᵀ
(kernels/rotation.py): what steers is W1 = W − R and W2 = Rᵀ, as `steered` gives them.

    <layers path>.<i>.post_block.steer_down.weight            a tensor's path, as files have it (behind PEFT_PREFIX)
    <layers path>.<i>.post_block.steer_down.<adapter>.weight  the same tensor in a patched model, which may have several
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..config import DTYPES, SteerConfig
from ..kernels.rotation import orthonormal, rotate

T = TypeVar("T")

#: The site's name in its layer, and so part of every parameter's path.
SITE = "post_block"
#: The names of an adapter's tensors below the site: W1 (r, d), b1 (r,), W2 (d, r), b2 (d,).
DOWN, DOWN_BIAS, UP, UP_BIAS = NAMES = ("steer_down.weight", "steer_down.bias", "steer_up.weight", "steer_up.bias")
#: Before each path in a file: where PEFT has the model that it wraps.
PEFT_PREFIX = "base_model.model."

#: The tensors of an adapter: by layer, then by name below the site.
ByLayer = dict[int, dict[str, Tensor]]
#: A tensor's dtype and shape: all that is known of it before it is read.
Spec = tuple[torch.dtype, tuple[int, ...]]

_ADAPTER = re.compile(r"[A-Za-z0-9_-]+")
#: Names that stand in a tensor's path beside the adapter's.
_IN_PATHS = frozenset({SITE, *(part for name in NAMES for part in name.split("."))})
#: What torch.compile, DDP, FSDP and activation checkpointing put into the path of a module that they wrap.
_WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def check_name(name: Any) -> None:
    """Refuse a name that no adapter may have, because it has to do as a part of a path of files and of modules.

    Raises:
        ValueError: it has other characters than letters, digits, _ and -, or means something else in a module's path.
    """
    if not isinstance(name, str) or not _ADAPTER.fullmatch(name):
        raise ValueError(f"adapter name is {name!r}; expected letters, digits, '_' and '-'")
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(f"adapter name is {name!r}, a word that PyTorch's modules use; expected another")
    if name in _IN_PATHS:
        raise ValueError(f"adapter name is {name!r}, a part of every tensor's path; expected another")


def unwrapped(path: str) -> str:
    """The path that a module or tensor has in the model itself, out of what other libraries have wrapped around it."""
    path = without_wrappers(path)
    while path.startswith(PEFT_PREFIX):
        path = path.removeprefix(PEFT_PREFIX)
    return path


def without_wrappers(path: str) -> str:
    """The path as if neither torch.compile, DDP, FSDP nor activation checkpointing had wrapped a module on it."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


_FACTOR = r"steer_(?:down|up)"
_PATH = re.compile(rf"(?:(.+)\.)?(\d+)\.{SITE}\.({_FACTOR}\.(?:weight|bias))")


def split_path(path: str) -> tuple[str, int, str]:
    """A tensor's path in three: the path of the list of layers, the layer's index, the name below the site.

    Raises:
        ValueError: it is no such path.
    """
    found = _PATH.fullmatch(path)
    if found is None:
        raise ValueError(f"it has a tensor {path!r}; expected names such as layers.0.{SITE}.{UP}")
    return found[1] or "", int(found[2]), found[3]


def by_layer(tensors: Mapping[str, T]) -> tuple[str, dict[int, dict[str, T]]]:
    """The path of the list of layers ("" if there are no tensors), and the tensors by layer, in order, and by name.

    Raises:
        ValueError: a path is none of an adapter's, or they belong to several lists of layers.
    """
    found: dict[int, dict[str, T]] = {}
    lists: dict[str, str] = {}
    for path, tensor in tensors.items():
        layers_path, index, name = split_path(path)
        found.setdefault(index, {})[name] = tensor
        lists.setdefault(layers_path, path)
    if len(lists) > 1:
        first, second, *_ = lists.values()
        raise ValueError(f"it has tensors {first} and {second}; expected those of one list of layers")
    return next(iter(lists), ""), dict(sorted(found.items()))


def of_adapter(named: Iterable[tuple[str, T]], adapter: str) -> dict[str, T]:
    """An adapter's tensors, by path, among those of a patched model (its parameters, or its state dict)."""
    paths = ((out_of_model(name, adapter), value) for name, value in named)
    return {path: value for path, value in paths if path is not None}


def out_of_model(name: str, adapter: str) -> str | None:
    """The path of an adapter's tensor that a patched model has under `name`; None: it is none of this adapter's."""
    found = re.fullmatch(rf"(.*\.{SITE}\.{_FACTOR})\.{re.escape(adapter)}\.(weight|bias)", name)
    return None if found is None else f"{found[1]}.{found[2]}"


def in_model(path: str, adapter: str) -> str:
    """The name that a patched model has for a tensor of an adapter."""
    factor, _, kind = path.rpartition(".")
    return f"{factor}.{adapter}.{kind}"


def shapes_of(rank: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor that an adapter of this rank may have, by name."""
    return dict(zip(NAMES, ((rank, hidden), (rank,), (hidden, rank), (hidden,)), strict=True))


def steered(form: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """W1, b1, W2 and b2 of an adapter's tensors at a layer, by name: what the op takes."""
    if form != "loreft":
        return dict(tensors)
    down, up = rotate(tensors[DOWN], tensors[UP])
    return {**tensors, DOWN: down, UP: up}


# ------------------------------------------------------------------------------------------------------- what it fits


@dataclass(frozen=True)
class Layout:
    """What an adapter has to fit: a model's decoder layers.

    layers_path: of the list of layers, "" where only their indices matter; num_layers: how many there are; hidden: d, 0
    where it is not known yet; base: the model's name, "" where it has none.
    """

    layers_path: str
    num_layers: int
    hidden: int
    base: str = ""

    def path(self, index: int, name: str = "") -> str:
        """Of a layer, or of the tensor `name` of an adapter there."""
        return ".".join(part for part in (self.layers_path, str(index), *([SITE, name] if name else [])) if part)

    def paths(self, layers: Mapping[int, Mapping[str, T]]) -> dict[str, T]:
        """What is by layer and name, by path."""
        return {self.path(index, name): value for index, named in layers.items() for name, value in named.items()}

    def indices(self, config: SteerConfig) -> Sequence[int]:
        """The layers that an adapter of `config` steers; never listed, as a file may claim any number of them.

        Raises:
            ValueError: there is no such layer.
        """
        if config.layers is None:
            return range(self.num_layers)
        if config.layers[-1] >= self.num_layers:
            raise ValueError(
                f"layers has {config.layers[-1]}; expected indices below {self.num_layers}, the number of layers"
            )
        return list(config.layers)

    def config_layers(self, indices: Iterable[int]) -> list[int] | None:
        """The config's `layers` for these indices: None for all.

        Raises:
            ValueError: there is no such layer.
        """
        found = sorted(indices)
        if found[-1] >= self.num_layers:
            raise ValueError(f"it has a layer {found[-1]}; expected indices below {self.num_layers}, num_layers")
        return None if len(found) == self.num_layers else found

    def count(self, config: SteerConfig) -> int:
        """How many numbers an adapter of `config` has, in all layers."""
        return sum(math.prod(shape) for shape in self.paths(self.shapes(config)).values())

    def shapes(self, config: SteerConfig) -> dict[int, dict[str, tuple[int, ...]]]:
        """Shape of each tensor of an adapter of `config`, by layer and name."""
        return dict.fromkeys(self.indices(config), self._shapes(config))

    def _shapes(self, config: SteerConfig) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor that an adapter of `config` has at a layer."""
        there = {DOWN: config.rank > 0, DOWN_BIAS: config.down_bias, UP: config.rank > 0, UP_BIAS: config.up_bias}
        return {name: shape for name, shape in shapes_of(config.rank, self.hidden).items() if there[name]}

    def check_tensors(self, config: SteerConfig, specs: Mapping[int, Mapping[str, Spec]]) -> None:
        """Refuse tensors that are not those of `config`: one missing or too many, another shape or dtype.

        Raises:
            ValueError: in one line, about the first of them.
        """
        dtype, shapes, indices = DTYPES[config.dtype], self._shapes(config), self.indices(config)
        for index in indices:  # perhaps 10**9 of them, by what a file says: the first that is missing ends this
            for name, shape in shapes.items():
                found = specs.get(index, {}).get(name)
                if found is None:
                    raise ValueError(f"it has no tensor {self.path(index, name)}; expected one of shape {shape}")
                if found != (dtype, shape):
                    raise ValueError(
                        f"tensor {self.path(index, name)} is {found[0]} {found[1]}; expected {dtype} {shape}"
                    )
        for index, named in specs.items():
            for name in named:
                if index not in indices or name not in shapes:
                    raise ValueError(f"it has a tensor {self.path(index, name)}; expected none but those of its config")

    def check_sizes(self, source: Any, hidden: int | None, num_layers: int | None) -> None:
        """Refuse an adapter for a model of another hidden size or number of layers; None is not known.

        Raises:
            ValueError: it names `source`.
        """
        for what, theirs, ours in (
            ("hidden size", hidden, self.hidden),
            ("number of layers", num_layers, self.num_layers),
        ):
            if theirs is not None and theirs != ours:
                raise ValueError(f"{source} is for a model of {what} {theirs}; expected {ours}")

    def check_fits(self, source: Any, adapter: Layout, check_base: bool) -> None:
        """Refuse an adapter for a model of other sizes, or (`check_base`) of another name.

        Args:
            source: where the adapter was read, for the error.
            adapter: what it was made for.

        Raises:
            ValueError: it does not fit.
        """
        self.check_sizes(source, adapter.hidden, adapter.num_layers)
        if check_base and not same_base(adapter.base, self.base):
            raise ValueError(
                f"{source} is for the base model {adapter.base!r}; expected {self.base!r} "
                "(check_base=False loads it all the same)"
            )


def specs_of(tensors: Mapping[int, Mapping[str, Tensor]]) -> dict[int, dict[str, Spec]]:
    """Dtype and shape of each tensor."""
    return {
        index: {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in named.items()}
        for index, named in tensors.items()
    }


_CACHED = re.compile(r"(?:^|[/\\])models--([^/\\]+?)--([^/\\]+)(?:[/\\]snapshots)?(?:[/\\]|$)")
_HASH = re.compile(r"[0-9a-f]{40,64}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def base_name(base: str) -> str:
    """A base model's name as files record it: the hub id where `base` is a path in the hub's cache."""
    cached = _CACHED.search(base)
    return f"{cached[1]}/{cached[2]}" if cached else base


def same_base(one: str, other: str) -> bool:
    """Whether two names may be of the same base model: hub ids that are equal, or else equal last parts of paths.

    A name that says nothing ("", or a commit's hash) may be of any.
    """
    names = [base_name(base).rstrip("/\\") for base in (one, other)]
    lasts = [re.split(r"[/\\]", name)[-1] for name in names]
    if not all(lasts) or any(_HASH.fullmatch(last) for last in lasts):
        return True
    if all(_HUB_ID.fullmatch(name) and not os.path.isdir(name) for name in names):
        return names[0] == names[1]
    return lasts[0] == lasts[1]


# --------------------------------------------------------------------------------------------------------- in a layer


class Factor(nn.Module):
    """One matrix of an adapter with its bias; either may be absent.

    Not an nn.Linear: what looks for those to quantise, to adapt or to initialise must pass by.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.register_parameter("weight", None if weight is None else nn.Parameter(weight))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))


class Rotation(Factor):
    """W2 = Rᵀ of LoReFT, made of `weight` in each pass: see kernels/rotation.py. It has no bias."""


if TYPE_CHECKING:

    class Factors(nn.ModuleDict):
        """W1 with b1, or W2 with b2, of each adapter at a site, by the adapter's name."""

        def __getitem__(self, key: str) -> Factor: ...
else:
    Factors = nn.ModuleDict


class Adapter:
    """The parameters of one adapter at one site, before they are attached: W1 and b1, W2 and b2."""

    def __init__(self, down: Factor, up: Factor) -> None:
        self.down = down
        self.up = up

    @classmethod
    def fresh(cls, config: SteerConfig, hidden: int, device: torch.device) -> Adapter:
        """A new adapter that changes nothing: W1 kaiming-uniform (a = √5) times `init_scale`, all else 0.

        Of LoReFT R is random, W = R and b = 0.

        Raises:
            ValueError: LoReFT's rank is more than d.
        """
        options: dict[str, Any] = {"device": device, "dtype": DTYPES[config.dtype]}
        down = up = None
        if config.form == "loreft":
            if config.rank > hidden:
                raise ValueError(
                    f"rank is {config.rank} with form='loreft'; expected at most {hidden}, the hidden size"
                )
            up = orthonormal(torch.randn(hidden, config.rank, device=device)).to(options["dtype"])
            down = up.t().contiguous()
        elif config.rank:
            down = torch.empty(config.rank, hidden, **options)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            down *= config.init_scale
            up = torch.zeros(hidden, config.rank, **options)
        down_bias = torch.zeros(config.rank, **options) if config.down_bias else None
        up_bias = torch.zeros(hidden, **options) if config.up_bias else None
        return cls(Factor(down, down_bias), _up_factor(config.form)(up, up_bias))

    @classmethod
    def of_tensors(
        cls, tensors: Mapping[str, Tensor], device: torch.device | None = None, form: str = "lowrank"
    ) -> Adapter:
        """From tensors by name, moved to `device`; None leaves them where they are."""
        moved = {name: tensor if device is None else tensor.to(device) for name, tensor in tensors.items()}
        up = _up_factor(form)(moved.get(UP), moved.get(UP_BIAS))
        return cls(Factor(moved.get(DOWN), moved.get(DOWN_BIAS)), up)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters by name."""
        sides = (("steer_down", self.down), ("steer_up", self.up))
        return {f"{side}.{name}": p for side, factor in sides for name, p in factor.named_parameters()}

    def named_tensors(self) -> dict[str, Tensor]:
        """The values by name, without gradients."""
        return {name: parameter.detach() for name, parameter in self.named_parameters().items()}

    def steered(self) -> dict[str, Tensor]:
        """W1, b1, W2 and b2 by name, without gradients."""
        return steered("loreft" if isinstance(self.up, Rotation) else "lowrank", self.named_tensors())

    def weights(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """W1, W2, b1 and b2 as the op takes them, with gradients; None where the adapter has none."""
        down, up = self.down.weight, self.up.weight
        if isinstance(self.up, Rotation) and down is not None and up is not None:
            return *rotate(down, up), self.down.bias, None
        return down, up, self.down.bias, self.up.bias


def _up_factor(form: str) -> type[Factor]:
    return Rotation if form == "loreft" else Factor
