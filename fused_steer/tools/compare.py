"""`fused-steer compare`: how two saved adapters differ: their configs, and norms and angles of each layer's shifts."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..adapters.files import AdapterFile, read_adapter
from ..adapters.parameters import DOWN, UP, UP_BIAS, Place, steered
from ..adapters.weights import tensors_digest
from .inspect import core_of

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class PlaceComparison:
    """Two adapters at one site of a layer. What an adapter has not is None.

    Attributes:
        layer, site: the place.
        norms: for each adapter the size of its linear part, scale · ‖W2 W1‖_F.
        bias_norms: for each adapter the length of its constant part, scale · ‖b2‖.
        cosine: of the linear parts as vectors of d · d numbers: ⟨W2 W1, W2' W1'⟩_F over the norms.
        written: the largest cosine between directions that the two write, the column spaces of W2 and W2'.
        read: the same of the directions that they read, the row spaces of W1 and W1'.
        bias_cosine: the cosine between b2 and b2'.
    """

    layer: int
    site: str
    norms: tuple[float | None, float | None]
    bias_norms: tuple[float | None, float | None]
    cosine: float | None
    written: float | None
    read: float | None
    bias_cosine: float | None


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`.

    Attributes:
        differences: the fields that differ, each with its two values: of the config, and the base model's name.
        same: whether both are the same adapter, bit for bit, apart from the base model's name.
        places: the places of either adapter.
    """

    differences: dict[str, tuple[Any, Any]]
    same: bool
    places: tuple[PlaceComparison, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON data."""
        return {
            "same": self.same,
            "differences": {name: list(values) for name, values in self.differences.items()},
            "places": [asdict(place) for place in self.places],
        }


def compare(first: str, second: str) -> Comparison:
    """Compare two saved adapters of models of the same sizes.

    Args:
        first, second: directories, or ids on the hub.

    Raises:
        FileNotFoundError, ValueError: there is no such adapter, its files are broken, or the sizes differ.
    """
    files = [read_adapter(source) for source in (first, second)]
    layout = files[0].layout
    layout.check_sizes(second, files[1].layout.hidden, files[1].layout.num_layers)
    fields = [{**file.config.to_dict(), "base_model": file.layout.base or None} for file in files]
    names = dict.fromkeys((*fields[0], *fields[1]))
    values = {name: (fields[0].get(name), fields[1].get(name)) for name in names}
    differences = {name: pair for name, pair in values.items() if pair[0] != pair[1]}
    places = sorted({*files[0].tensors, *files[1].tensors})
    return Comparison(
        differences, _same(files[0], files[1]), tuple(_compared(place, files[0], files[1]) for place in places)
    )


def _same(one: AdapterFile, other: AdapterFile) -> bool:
    # By bytes: torch.equal takes 0.0 for -0.0, and a bfloat16 for a float32 of the same value.
    return one.config == other.config and tensors_digest(one.tensors) == tensors_digest(other.tensors)


def _compared(place: Place, one: AdapterFile, other: AdapterFile) -> PlaceComparison:
    a, b = (_exact(file, place) for file in (one, other))
    scales = one.config.scale, other.config.scale
    cores = [core_of(t) if UP in t else None for t in (a, b)]
    norms = [None if c is None else abs(s) * float(c[1].norm()) for c, s in zip(cores, scales, strict=True)]
    biases = [
        None if UP_BIAS not in t else abs(s) * float(t[UP_BIAS].norm()) for t, s in zip((a, b), scales, strict=True)
    ]
    sign = math.copysign(1.0, scales[0] * scales[1])
    cosine = written = read = bias_cosine = None
    if norms[0] and norms[1]:
        assert cores[0] is not None and cores[1] is not None
        cosine = sign * _cosine(cores[0], cores[1])
        written, read = _principal(a[UP], b[UP]), _principal(a[DOWN].t(), b[DOWN].t())
    if biases[0] and biases[1]:
        lengths = float(a[UP_BIAS].norm() * b[UP_BIAS].norm())
        bias_cosine = _clipped(sign * float(a[UP_BIAS] @ b[UP_BIAS]) / lengths)
    sizes = (norms[0], norms[1]), (biases[0], biases[1])
    return PlaceComparison(place.layer, place.site, *sizes, cosine, written, read, bias_cosine)


def _exact(file: AdapterFile, place: Place) -> dict[str, Tensor]:
    """Return W1, b1, W2 and b2 at a place in float64, or nothing if the adapter does not steer there."""
    if place not in file.tensors:
        return {}
    return {name: tensor.double() for name, tensor in steered(file.config.form, file.tensors[place]).items()}


def _cosine(one: tuple[Tensor, Tensor, Tensor], other: tuple[Tensor, Tensor, Tensor]) -> float:
    """Return ⟨W2 W1, W2' W1'⟩_F over the norms, of two that `core_of` returned, without forming a d × d matrix."""
    (q, a, p), (q2, b, p2) = one, other
    turned = (q.t() @ q2) @ (b / b.norm()) @ (p2.t() @ p)
    return _clipped(float((a / a.norm() * turned).sum()))


def _principal(a: Tensor, b: Tensor) -> float:
    """Return the largest cosine between the column spaces of two matrices (d, r) and (d, r')."""
    return _clipped(float(torch.linalg.matrix_norm(_basis(a).t() @ _basis(b), 2)))


def _basis(matrix: Tensor) -> Tensor:
    """Return an orthonormal basis of the column space, (d, rank)."""
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, s > torch.finfo(torch.float32).eps * s[0]]


def _clipped(cosine: float) -> float:
    return max(-1.0, min(1.0, cosine))


# ----------------------------------------------------------------------------------------------------------- the tables


def differences_table(found: Comparison, first: str, second: str) -> Table:
    """A row for each field that differs."""
    from rich.markup import escape
    from rich.table import Column, Table
    from rich.text import Text

    table = Table("setting", *(Column(escape(name), overflow="fold") for name in (first, second)))
    for name, values in found.differences.items():
        table.add_row(name, *(Text("-" if value is None else str(value)) for value in values))
    return table


def places_table(found: Comparison) -> Table:
    """A row for each site of each layer, with the columns that have a number in one."""
    from rich.table import Table

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    columns = {
        "s‖W2 W1‖ of A": lambda p: p.norms[0],
        "of B": lambda p: p.norms[1],
        "cosine": lambda p: p.cosine,
        "written": lambda p: p.written,
        "read": lambda p: p.read,
        "s‖b2‖ of A": lambda p: p.bias_norms[0],
        "of B ": lambda p: p.bias_norms[1],
        "cosine ": lambda p: p.bias_cosine,
    }
    linear = any(norm is not None for place in found.places for norm in place.norms)
    constant = any(norm is not None for place in found.places for norm in place.bias_norms)
    wanted = [*(list(columns)[:5] if linear else []), *(list(columns)[5:] if constant else [])]
    several = len({place.site for place in found.places}) > 1
    table = Table("layer", *(["site"] if several else []), *wanted)
    for column in table.columns:
        column.justify = "right"
    for place in found.places:
        at = [place.site] if several else []
        table.add_row(str(place.layer), *at, *(shown(columns[name](place)) for name in wanted))
    if linear:
        table.caption = "written, read: the largest cosine between directions of W2 (of W1) of A and of B"
    return table
