"""Export adapters to pyreft (github.com/stanfordnlp/pyreft, version 0.1.0), in the files of `reft_model.save`.

Each form becomes one of pyreft's interventions on block outputs, with h as in pyreft.py:

    loreft                                 LoReFT     R, W and b
    lowrank, W2 orthonormal, W1 = −W2ᵀ     ConsReFT   R = W2ᵀ, b = b1 (φ the identity)
    lowrank, W2 orthonormal                DiReFT     R = W2ᵀ, W = W1, b = b1
    any other lowrank                      NoDiReFT   W1, b = b1, W2 transposed
    vector                                 LobiReFT   R = vᵀ / ‖v‖ of rank 1, b = ‖v‖

No intervention has a strength: a scale is multiplied into W2 or v, and a scaled LoReFT becomes a NoDiReFT. None has a
bias outside φ: a b2 becomes one more rank of NoDiReFT, s · b2 / φ(β) · φ(0 h + β). Every φ of ours is β or 1 to the bit
at β = 32, so that b2 is kept to the bit too.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.files import AdapterFile, read_adapter
from ..adapters.parameters import DOWN, DOWN_BIAS, SITE, UP, UP_BIAS, steered
from ..adapters.saving import made_folder, target_folder
from ..config import FLOAT32_MAX, SteerConfig
from ..kernels.rotation import is_orthonormal, orthonormal
from .pyreft import CONFIG_NAME, FIELDS, FILE_NAME, ORIGINAL, REQUIRED, TRIVIAL, file_name

Tensors = Mapping[str, Tensor]
#: Where φ of a constant row is exact in every dtype: 1 for tanh, this number itself for every other φ.
_SATURATED = 32.0
#: pyreft's act_fn of each activation, if it has another name there.
_ACT_FNS = {"identity": None, "gelu_tanh": "gelu_pytorch_tanh"}


@dataclass(frozen=True)
class PyreftExport:
    """A written export.

    Attributes:
        adapter: the exported adapter.
        name: the class of pyreft's interventions.
        rank: their rank.
        act_fn: the act_fn to create them with; None is pyreft's default, the identity.
    """

    adapter: AdapterFile
    name: str
    rank: int
    act_fn: str | None

    @property
    def loads_by_itself(self) -> bool:
        """Whether `pyreft.ReftModel.load` can create the interventions. It passes neither act_fn nor add_bias."""
        return self.name != "NodireftIntervention" and self.act_fn is None

    def usage(self, directory: str | os.PathLike[str]) -> str:
        """Return the Python code that loads the directory onto a `model`."""
        if self.loads_by_itself:
            return f"import pyreft\nreft_model = pyreft.ReftModel.load({os.fspath(directory)!r}, model)"
        given = [f"embed_dim={self.adapter.layout.hidden}", f"low_rank_dimension={self.rank}"]
        if self.name == "NodireftIntervention":
            given.append("add_bias=False")
        if self.act_fn is not None:
            given.append(f"act_fn={self.act_fn!r}")
        layers = [place.layer for place in self.adapter.tensors]
        return "\n".join(
            (
                "import pyreft, torch",
                "representations = []",
                f"for layer in {layers}:",
                f"    intervention = pyreft.{self.name}({', '.join(given)}, dtype=model.dtype)",
                f"    state = torch.load({os.fspath(directory)!r} + '/{FILE_NAME}'.format(layer))",
                "    intervention.load_state_dict(state)",
                "    entry = {'layer': layer, 'component': 'block_output', 'intervention': intervention}",
                f"    representations.append({{**entry, 'low_rank_dimension': {self.rank}}})",
                "reft_model = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations))",
            )
        )


def export_pyreft(source: str | os.PathLike[str], directory: str | os.PathLike[str]) -> PyreftExport:
    """Write an adapter at `post_block` as pyreft's `reft_model.save` does.

    `import_pyreft(directory, activation=…)` computes the same. LoReFT, ConsReFT, DiReFT and NoDiReFT have the adapter's
    own bits in float32. A scale other than 1 is multiplied in and the product rounded to float32 once. A vector is
    rounded twice, as R and b. pyreft's files have no positions and no act_fn. pyreft rounds W1 and b1 to the dtype that
    it creates its interventions with, by default bfloat16. The weights are pickles of tensors, as pyreft has them.
    ConsReFT, DiReFT and LobiReFT store a (d, d) matrix a layer, as torch's parametrisation of R does.

    Args:
        source: a saved adapter: its directory, or its id on the hub.
        directory: a new or an empty one.

    Returns:
        The adapter, and what it became.

    Raises:
        FileNotFoundError, ValueError: there is no such adapter, its files are broken, it steers at another site, the
            length of a vector overflows float32, or the directory holds something. Nothing is written then.
    """
    target = target_folder(directory, "pyreft's files")
    adapter = read_adapter(source)
    config = adapter.config
    if config.sites != (SITE,):
        raise ValueError(f"{source} steers at {', '.join(config.sites)}; expected {SITE}, pyreft's block_output")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty directory; expected a new one")
    layers = {place.layer: tensors for place, tensors in adapter.tensors.items()}
    name, state_of = _conversion(config, layers)
    with made_folder(target.parent), tempfile.TemporaryDirectory(dir=target.parent) as parent:
        folder = Path(parent, target.name)
        folder.mkdir()
        rank = 0
        for index, tensors in layers.items():
            rank, state = state_of(tensors)
            if not state.get("learned_source", torch.zeros(1)).isfinite().all():
                raise ValueError(
                    f"{source} has values for which the length of the vector of layer {index} overflows, and scale is "
                    f"{config.scale:.3g}; expected at most {FLOAT32_MAX:.3g}, float32's largest"
                )
            sizes = {key: torch.tensor(adapter.layout.hidden) for key in ("embed_dim", "interchange_dim")}
            buffers = {} if name == "LoreftIntervention" else sizes  # its own state_dict leaves them out
            torch.save(OrderedDict({**buffers, **state}), folder / file_name(index))
        fields = {
            "intervention_constant_sources": [True for _ in layers],
            "intervention_dimensions": [adapter.layout.hidden for _ in layers],
            "intervention_types": [f"<class 'pyreft.interventions.{name}'>" for _ in layers],
            "mode": "parallel",
            "representations": [
                [{"layer": i, **REQUIRED, "low_rank_dimension": rank}.get(field) for field in FIELDS] for i in layers
            ],
            "sorted_keys": [file_name(i).removeprefix("intkey_").removesuffix(".bin") for i in layers],
        }
        (folder / CONFIG_NAME).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        os.replace(folder, target)
    act_fn = _ACT_FNS.get(config.activation, config.activation)
    return PyreftExport(adapter, name, rank, act_fn)


def _conversion(
    config: SteerConfig, layers: Mapping[int, Tensors]
) -> tuple[str, Callable[[Tensors], tuple[int, dict[str, Tensor]]]]:
    """Return the class, and a function from a layer's tensors to the intervention's rank and state dict."""
    if config.form == "vector":
        return "LobireftIntervention", lambda t: (1, _lobireft(config.scale * t[UP_BIAS].double()))
    if config.form == "loreft" and config.scale == 1:
        return "LoreftIntervention", lambda t: (config.rank, _loreft(t))
    if config.scale == 1 and not config.up_bias and all(map(_is_rotation, layers.values())):
        if config.activation == "identity" and all(map(_replaces, layers.values())):
            return "ConsreftIntervention", lambda t: (config.rank, _consreft(t))
        return "DireftIntervention", lambda t: (config.rank, _direft(t))
    rank = config.rank + config.up_bias
    return "NodireftIntervention", lambda t: (rank, _nodireft(steered(config.form, t), config))


def _is_rotation(tensors: Tensors) -> bool:
    up = tensors[UP].float()
    return up.shape[1] < up.shape[0] and is_orthonormal(up)


def _replaces(tensors: Tensors) -> bool:
    """Return whether W1 = −W2ᵀ, so that the adapter replaces the part of h in a subspace."""
    return torch.equal(tensors[DOWN], -tensors[UP].t())


def _loreft(t: Tensors) -> dict[str, Tensor]:
    return {"weight": t[DOWN], "bias": t[DOWN_BIAS], "rotate_layer": orthonormal(t[UP])}


def _consreft(t: Tensors) -> dict[str, Tensor]:
    return {"learned_source": _down_bias(t), **_rotation(t[UP].float())}


def _direft(t: Tensors) -> dict[str, Tensor]:
    return {**_source(t[DOWN].float(), _down_bias(t)), **_rotation(t[UP].float())}


def _lobireft(vector: Tensor) -> dict[str, Tensor]:
    """Return the state dict of a vector (d,) in float64."""
    length = vector.norm()
    direction = vector / length if length else torch.eye(len(vector))[0]
    return {"learned_source": length.float()[None], **_rotation(direction.float()[:, None])}


def _nodireft(t: Tensors, config: SteerConfig) -> dict[str, Tensor]:
    """Return the state dict of W1, b1, W2 and b2, times the scale."""
    down, down_bias, up = t[DOWN].float(), _down_bias(t), config.scale * t[UP].double()
    if config.up_bias:
        value = 1.0 if config.activation == "tanh" else _SATURATED
        down = torch.cat((down, down.new_zeros(1, down.shape[1])))
        down_bias = torch.cat((down_bias, down_bias.new_tensor([_SATURATED])))
        up = torch.cat((up, config.scale * t[UP_BIAS].double()[:, None] / value), 1)
    return {"proj_layer.weight": up.t().float().contiguous(), **_source(down, down_bias)}


def _down_bias(t: Tensors) -> Tensor:
    return t[DOWN_BIAS].float() if DOWN_BIAS in t else torch.zeros(len(t[DOWN]))


def _source(down: Tensor, down_bias: Tensor) -> dict[str, Tensor]:
    return {"learned_source.weight": down, "learned_source.bias": down_bias}


def _rotation(up: Tensor) -> dict[str, Tensor]:
    """Return torch's parametrisation of Rᵀ (d, r): no reflectors, and a basis that begins with Rᵀ."""
    basis = torch.linalg.qr(up, mode="complete").Q
    basis[:, : up.shape[1]] = up
    return {ORIGINAL: -torch.eye(*up.shape), TRIVIAL: basis}
