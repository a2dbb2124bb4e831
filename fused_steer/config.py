"""SteerConfig: the configuration of an adapter."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, ParamSpec

import torch

from .kernels import ACTIVATIONS, MAX_RANK
from .positions import ALL, read_positions, shown

P = ParamSpec("P")

FORMS = ("lowrank", "vector", "loreft")
#: Where in a decoder block, in the order in which a block computes.
SITES = ("post_attention", "pre_mlp", "post_mlp", "post_block")
ORTHOGONAL_TO = ("lora",)
ORTHOGONAL_MODULES = ("mlp", "all")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOAT32_MAX = torch.finfo(torch.float32).max


def _names_its_fields(init: Callable[P, None]) -> Callable[P, None]:
    """Make an unknown field an error that lists the known ones."""

    @functools.wraps(init)
    def checked(*args: P.args, **fields: P.kwargs) -> None:
        _check_fields(fields)
        init(*args, **fields)

    return checked


def _check_fields(given: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(SteerConfig)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise TypeError(f"SteerConfig has no field {', '.join(map(repr, unknown))}; expected {', '.join(known)}")


def plain(value: Any) -> Any:
    """Return a NumPy or PyTorch number as Python's own number, and any other value unchanged."""
    if not isinstance(value, (int, float)) and getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True, init=False)
class SteerConfig:
    """The configuration of an adapter, which steers h -> h + scale · (W2 φ(W1 h + b1) + b2) in each of `layers`.

    The formula is that of arXiv 2603.00425, §3. After construction every field has a value, defaults included.

    Args:
        form: "lowrank"; "vector", the paper's 1-vec, h -> h + scale · b2; or "loreft" (arXiv 2404.03592),
            h -> h + scale · Rᵀ(W h + b − R h) with orthonormal rows of R: W1 = W − R, b1 = b, W2 = Rᵀ.
        rank: r, the rows of W1, 1 to 256. The default is 8. A vector has none (0).
        activation: φ, one of identity, silu, gelu, gelu_tanh, relu, tanh. The default is silu. Vectors and
            LoReFT have none (identity). The paper's Tables 1 and 2 use the identity. SiLU was better in the study of
            docs/study-listops.md. Which is better depends on the task: try both on held-out data.
        layers: indices of the steered layers, from 0. None means every layer.
        site: the h that is steered in a layer, or a list of several. "post_block" (the default) is the layer's output.
            "post_mlp" is the MLP's output before it is added to the stream, "pre_mlp" the MLP's input.
            "post_attention" is the output of the attention, or of the module in its place, before it is added.
        scale: the strength s.
        down_bias: whether there is a b1 (r,), initially 0. LoReFT always has one.
        up_bias: whether there is a b2 (d,), initially 0. A vector always has one, LoReFT never.
        init_scale: factor on W1's initial values, kaiming-uniform with a = √5 (the paper's released code uses 1e-3).
            W2 is initially 0, so that a fresh adapter changes nothing. For LoReFT W = R and b = 0.
        dtype: the dtype of the parameters: "float32" (master weights), "bfloat16" or "float16".
        orthogonal_to: "lora" for Joint-Orth (arXiv 2603.00425, §5.2), else None. W2 = (I − V Vᵀ) W2 and b2 are kept
            orthogonal to the LoRA's updates of the residual stream, with V an orthonormal basis of its B's columns.
        orthogonal_modules: the modules with the LoRA. "mlp" is the MLP's output projection, as in the paper. "all"
            adds every other module of the layer that writes into the stream before the site, such as the attention's
            output projection.
        positions: the steered tokens, in training and by default in inference: "all", "prompt", "generated",
            "last_prompt", "first_7", "last_7" (any number), or several of them joined by "+".

    Raises:
        TypeError: an unknown field, or a value of the wrong type.
        ValueError: a value out of range.
    """

    form: str
    rank: int
    activation: str
    layers: tuple[int, ...] | None
    site: str | tuple[str, ...]
    scale: float
    down_bias: bool
    up_bias: bool
    init_scale: float
    dtype: str
    orthogonal_to: str | None
    orthogonal_modules: str
    positions: str

    @_names_its_fields
    def __init__(
        self,
        form: str = "lowrank",
        rank: int | None = None,
        activation: str | None = None,
        layers: Sequence[int] | None = None,
        site: str | Sequence[str] = "post_block",
        scale: float = 1.0,
        down_bias: bool | None = None,
        up_bias: bool | None = None,
        init_scale: float = 1.0,
        dtype: str = "float32",
        orthogonal_to: str | None = None,
        orthogonal_modules: str = "mlp",
        positions: str = ALL,
    ) -> None:
        checked_choice("form", form, FORMS)
        vector, loreft = form == "vector", form == "loreft"
        fixed = form if vector or loreft else None
        fields: dict[str, Any] = {
            "form": form,
            "rank": _given("rank", plain(rank), 0 if vector else 8, form if vector else None),
            "activation": _given("activation", activation, "identity" if vector or loreft else "silu", fixed),
            "layers": None if layers is None else _checked_layers(layers),
            "site": _checked_site(site),
            "scale": checked_number("scale", scale),
            "down_bias": _given("down_bias", down_bias, loreft, fixed),
            "up_bias": _given("up_bias", up_bias, vector, fixed),
            "init_scale": checked_number("init_scale", init_scale),
            "dtype": dtype,
            "orthogonal_to": orthogonal_to,
            "orthogonal_modules": orthogonal_modules,
            "positions": read_positions(positions).name,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        if not _is_int(self.rank):
            raise TypeError(f"rank is {shown(self.rank)}; expected an integer")
        if self.form != "vector" and not 1 <= self.rank <= MAX_RANK:
            raise ValueError(f"rank is {self.rank}; expected 1 to {MAX_RANK}")
        checked_choice("activation", self.activation, ACTIVATIONS)
        for name in ("down_bias", "up_bias"):
            checked_bool(name, getattr(self, name))
        checked_choice("dtype", self.dtype, DTYPES)
        if self.orthogonal_to is not None and not _is_one_of(self.orthogonal_to, ORTHOGONAL_TO):
            raise ValueError(f"orthogonal_to is {shown(self.orthogonal_to)}; expected 'lora' or None")
        if not _is_one_of(self.orthogonal_modules, ORTHOGONAL_MODULES):
            choices = " or ".join(map(repr, ORTHOGONAL_MODULES))
            raise ValueError(f"orthogonal_modules is {shown(self.orthogonal_modules)}; expected {choices}")
        if self.form == "loreft" and self.init_scale != 1:
            raise ValueError(f"init_scale is {self.init_scale} with form='loreft'; expected 1 or nothing")
        if self.form == "loreft" and self.orthogonal_to is not None:
            raise ValueError(
                "orthogonal_to is 'lora' with form='loreft'; expected None, because LoReFT's W2 is orthonormal already"
            )
        if self.orthogonal_to is None and self.orthogonal_modules != "mlp":
            raise ValueError(
                f"orthogonal_modules is {self.orthogonal_modules!r} without orthogonal_to; expected "
                "orthogonal_to='lora'"
            )
        if self.orthogonal_to is not None and "pre_mlp" in self.sites:
            raise ValueError(
                "orthogonal_to is 'lora' at the site pre_mlp, which does not write into the residual stream; expected "
                "other sites, or None"
            )

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites, in the order in which a block computes."""
        return (self.site,) if isinstance(self.site, str) else self.site

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SteerConfig:
        """Return the config with these fields. An unknown field is a TypeError."""
        _check_fields(fields)
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON data. Those of orthogonality, positions and the site are left out at their
        defaults."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.site == "post_block":
            del fields["site"]
        elif not isinstance(self.site, str):
            fields["site"] = list(self.site)
        if self.positions == ALL:
            del fields["positions"]
        if self.orthogonal_to is None:
            del fields["orthogonal_to"], fields["orthogonal_modules"]
        return {**fields, "layers": None if self.layers is None else list(self.layers)}


def _given(name: str, value: Any, default: Any, form: str | None) -> Any:
    """Return the value of a field, or its default. With `form` (not None) only the default is allowed."""
    if value is None:
        return default
    if form is not None and not (isinstance(value, type(default)) and value == default):  # an array has no truth value
        raise ValueError(f"{name} is {shown(value)} with form={form!r}; expected {default!r} or nothing")
    return value


def checked_bool(name: str, value: Any) -> bool:
    """Return the value if it is True or False. Any other is a TypeError: the text "no" would count as True."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {shown(value)}; expected True or False")
    return value


def checked_choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """Return the value if it is one of the choices. Any other, of whatever type, is a ValueError."""
    if not _is_one_of(value, choices):
        raise ValueError(f"{name} is {shown(value)}; expected one of {', '.join(choices)}")
    return value


def _is_one_of(value: Any, choices: Iterable[str]) -> bool:
    return isinstance(value, str) and value in choices  # `in` compares an array number by number


def checked_number(name: str, value: Any) -> float:
    """Return the value as a float that is finite in float32, the kernels' dtype. An error names the field."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {shown(value)}; expected a number")
    try:
        number = float(value)
    except OverflowError:  # an integer with too many digits for Python to print
        whole: Any = value
        raise ValueError(f"{name} is an integer of {int(whole).bit_length()} bits; expected a float32 number") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}; expected a finite number")
    if abs(number) > FLOAT32_MAX:
        raise ValueError(f"{name} is {number}; expected at most {FLOAT32_MAX:.7g} in magnitude, float32's largest")
    return number


def _checked_site(site: Any) -> str | tuple[str, ...]:
    """A site's name; of several a tuple, in the order in which a block computes."""
    names = [site] if isinstance(site, str) else site
    if not isinstance(names, Sequence) or isinstance(names, bytes) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"site is {shown(site)}; expected one of {', '.join(SITES)}, or a list of them")
    if not names:
        raise ValueError(f"site is empty; expected at least one of {', '.join(SITES)}")
    for name in names:
        if name not in SITES:
            raise ValueError(f"site is {name!r}; expected one of {', '.join(SITES)}, or a list of them")
    if len(set(names)) != len(names):
        raise ValueError(f"site names a site twice: {list(names)}; expected each once")
    return names[0] if len(names) == 1 else tuple(sorted(names, key=SITES.index))


def _checked_layers(layers: Any) -> tuple[int, ...]:
    if getattr(layers, "ndim", None) == 1 and hasattr(layers, "tolist"):
        layers = layers.tolist()
    if isinstance(layers, Sequence) and not isinstance(layers, (str, bytes)):
        layers = [plain(index) for index in layers]
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Sequence) or not all(map(_is_int, layers)):
        raise TypeError(f"layers is {shown(layers)}; expected a list of integers, or None for every layer")
    if not layers:
        raise ValueError("layers is empty; expected at least one layer, or None for every layer")
    if min(layers) < 0:
        raise ValueError(f"layers has {min(layers)}; expected indices from 0")
    if len(set(layers)) != len(layers):
        raise ValueError(f"layers names a layer twice: {list(layers)}; expected each once")
    return tuple(sorted(layers))
