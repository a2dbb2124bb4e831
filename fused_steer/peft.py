"""Post-block steering as a method of PEFT: importing this module registers it.

    import fused_steer.peft
    model = get_peft_model(model, PostBlockConfig(r=8, activation="silu"))

PEFT then saves, loads, switches, disables and deletes steering as it does any other adapter; `model.steering` is not
there, and its files are the same (`patch_model(model, "DIR")` reads what `save_pretrained` wrote, and the other way
round). The steered layers are reached as `patch_model` reaches them.

It is one file because the config, the site and the tuner are the parts of one method, which this import registers.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Optional

import torch
from torch import Tensor, nn

from ._requirements import warn_untried
from ._version import __version__
from .adapters.files import (
    CONFIG_NAME,
    PEFT_TYPE,
    WEIGHTS_NAME,
    check_config,
    check_values,
    fields_digest,
    read_adapter,
    sealed,
    tensors_digest,
)
from .adapters.parameters import (
    SITE,
    Adapter,
    Layout,
    by_layer,
    check_name,
    in_model,
    of_adapter,
    out_of_model,
    specs_of,
    without_wrappers,
)
from .config import DTYPES, SteerConfig
from .kernels import MAX_RANK, post_block, select_backend
from .model.decoder import execution_device, find_decoder
from .model.layer import PatchedLayer, patch_layers, unpatch_layers
from .model.site import Site
from .serving.mixed import MixedRows, load_again
from .serving.slots import LoadedSlots

warn_untried("peft")

from peft import PeftConfig  # noqa: E402
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer  # noqa: E402
from peft.utils import PeftType, register_peft_method  # noqa: E402

METHOD = PEFT_TYPE.lower()
PREFIX = "steer_"
_BASE = "__base__"  # PEFT's word for no adapter, among a batch's adapter names


def _add_peft_type() -> PeftType:
    """PeftType.POST_BLOCK. PEFT finds a method by its member of this enumeration, and has no call that adds one."""
    member = str.__new__(PeftType, PEFT_TYPE)
    member._name_, member._value_ = PEFT_TYPE, PEFT_TYPE
    PeftType._member_names_.append(PEFT_TYPE)
    PeftType._member_map_[PEFT_TYPE] = member
    PeftType._value2member_map_[PEFT_TYPE] = member
    type.__setattr__(PeftType, PEFT_TYPE, member)
    return member


POST_BLOCK: PeftType = getattr(PeftType, PEFT_TYPE, None) or _add_peft_type()


# -------------------------------------------------------------------------------------------------------------- config


@dataclass
class PostBlockConfig(PeftConfig):
    """A `SteerConfig` as PEFT has its configs. Fields of the same name mean the same.

    Fields that say how a loaded adapter was kept orthogonal to a LoRA are read; to train so, use `patch_model`.
    `hidden_size` and `num_layers` are of the model that an adapter is for; they are filled in when it is added to one.

    Args:
        r: the rank; `rank` is the same, as adapter files have it.

    Raises:
        TypeError: an unknown field, or a value of the wrong type.
        ValueError: a value out of range.
    """

    r: Optional[int] = None  # noqa: UP045  (PEFT's own parser of its configs reads these)
    form: str = "lowrank"
    activation: Optional[str] = None  # noqa: UP045
    layers: Optional[list[int]] = None  # noqa: UP045
    scale: float = 1.0
    down_bias: bool = False
    up_bias: Optional[bool] = None  # noqa: UP045
    init_scale: float = 1.0
    dtype: str = "float32"
    orthogonal_to: Optional[str] = None  # noqa: UP045
    orthogonal_modules: str = "mlp"
    hidden_size: Optional[int] = None  # noqa: UP045
    num_layers: Optional[int] = None  # noqa: UP045
    rank: Optional[int] = None  # noqa: UP045
    fused_steer_version: Optional[str] = None  # noqa: UP045
    weights_sha256: Optional[str] = None  # noqa: UP045
    tensors_sha256: Optional[str] = None  # noqa: UP045
    config_sha256: Optional[str] = None  # noqa: UP045

    #: What PEFT matches modules by: the steering sites, which are put into the layers before it looks.
    target_modules: ClassVar[str] = SITE

    def __post_init__(self) -> None:
        self.task_type = self.task_type or "CAUSAL_LM"
        super().__post_init__()
        self.peft_type = POST_BLOCK
        if self.r is not None and self.rank is not None and self.r != self.rank:
            raise ValueError(f"r is {self.r} and rank is {self.rank}; expected one of them, or the same")
        self.rank = self.r if self.rank is None else self.rank
        self._take(self.steer_config())
        self._check_digest()

    def _take(self, steer: SteerConfig) -> None:
        for field in dataclasses.fields(SteerConfig):
            setattr(self, field.name, getattr(steer, field.name))
        self.r = self.rank
        self.layers = None if steer.layers is None else list(steer.layers)

    def _check_digest(self) -> None:
        """Check that a file's fields are those that were saved. Its digests are then forgotten: fields may change."""
        digests = {name: getattr(self, name) for name in ("tensors_sha256", "weights_sha256") if getattr(self, name)}
        fields = {**self.to_dict(), "fused_steer_version": self.fused_steer_version, **digests}
        if self.config_sha256 is not None and self.config_sha256 != fields_digest(fields):
            raise ValueError(
                f"the config's fields are not those that were saved; expected config_sha256 {self.config_sha256} (of a "
                "config that was edited on purpose, remove that line)"
            )
        self.tensors_sha256 = self.weights_sha256 = self.config_sha256 = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """As PEFT's. Weights that lie beside are checked, because PEFT reads them after it has changed the model.

        Raises:
            ValueError: a file is broken, or the weights have values that are not finite or overflow float32.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if not folder.is_dir():
            folder = _from_hub(pretrained_model_name_or_path, subfolder, cls._split_kwargs(kwargs)[0])
        file = None
        if (folder / CONFIG_NAME).exists():
            if (folder / WEIGHTS_NAME).exists():
                file = read_adapter(folder)
            else:
                check_config(folder)
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        if file is not None:  # of several saves at a time the weights' own config holds
            config._take(file.config)
            config.hidden_size, config.num_layers = file.layout.hidden, file.layout.num_layers
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's. The digest of the tensors, which PEFT asks for before, is of this save alone."""
        super().save_pretrained(save_directory, **kwargs)
        self.tensors_sha256 = None

    def steer_config(self) -> SteerConfig:
        """The same as a SteerConfig."""
        return SteerConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(SteerConfig)})

    def to_dict(self) -> dict[str, Any]:
        """As both libraries' files have it; with digests where the tensors are being saved."""
        peft = {field.name: getattr(self, field.name) for field in dataclasses.fields(PeftConfig)}
        sizes = {"hidden_size": self.hidden_size, "num_layers": self.num_layers}
        fields = {**peft, **sizes, **self.steer_config().to_dict(), "fused_steer_version": __version__}
        return fields if self.tensors_sha256 is None else sealed({**fields, "tensors_sha256": self.tensors_sha256})


def _from_hub(repo_id: str, subfolder: str | None, options: dict[str, Any]) -> Path:
    """The local folder of an adapter on the hub, whose files PEFT reads next; a folder that does not exist where there
    is none. PEFT says what is wrong then."""
    from huggingface_hub import hf_hub_download

    folder = Path(repo_id, subfolder or "")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        with contextlib.suppress(Exception):
            folder = Path(hf_hub_download(repo_id, name, subfolder=subfolder, **options)).parent
    return folder


def _named_fields(config: type[PostBlockConfig]) -> type[PostBlockConfig]:
    """An unknown field is refused: PEFT would leave it out, and load an adapter that computes something else."""
    init = config.__init__

    def __init__(self: PostBlockConfig, *args: Any, **fields: Any) -> None:
        known = [field.name for field in dataclasses.fields(config)]
        unknown = sorted(fields.keys() - set(known))
        if unknown:
            written = fields.get("fused_steer_version")
            by = f" (written by fused-steer {written}, this is {__version__})" if written else ""
            raise TypeError(f"PostBlockConfig has no field {', '.join(map(repr, unknown))}{by}; expected {known}")
        init(self, *args, **fields)

    config.__init__ = __init__  # type: ignore[method-assign]
    return config


_named_fields(PostBlockConfig)


# ---------------------------------------------------------------------------------------------------------------- site


class PeftSite(Site, BaseTunerLayer):
    """A site whose adapters PEFT manages: it steers by all that are active, or each row by its own."""

    adapter_layer_names = ("steer_down", "steer_up")

    def __init__(self) -> None:
        super().__init__()
        self.configs: dict[str, SteerConfig] = {}
        self.mixed: MixedRows | None = None  # while each row of a batch has its own adapter
        self.merged_adapters = []
        self._active_adapter = []

    def add(self, name: str, config: SteerConfig, hidden: int, device: torch.device) -> None:
        self.attach(name, Adapter.fresh(config, hidden, device))
        self.configs[name] = config

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.configs.pop(adapter_name, None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise _cannot_merge()

    def steer(self, residual: Tensor, branch: Tensor | None = None, entering: Tensor | None = None) -> Tensor:
        branch = self.called(residual, branch, entering)
        self.__dict__["calls"] += 1  # past nn.Module's __setattr__, which takes long
        self.__dict__["backend"] = select_backend(residual.device)
        if self.mixed is not None and not self.disable_adapters:
            return self.mixed.steer(self.patched.index, residual, branch)
        return self.in_graph(residual, branch)

    def in_graph(self, residual: Tensor, branch: Tensor | None) -> Tensor:
        if not self.disable_adapters:
            if self.mixed is not None:
                return self.mixed.in_graph(self.patched.index, residual, branch)
            names = [name for name in self.active_adapters if name in self.configs]
            if names:
                return self._sum(residual, branch, names)
        return residual if branch is None else residual + branch

    def _sum(self, residual: Tensor, branch: Tensor | None, names: list[str]) -> Tensor:
        """The shifts of several adapters are those of the same hidden state, and are added up."""
        if len(names) == 1:
            return self._steer(residual, branch, names[0])
        x = residual if branch is None else residual + branch
        out = self._steer(x, None, names[0])
        for name in names[1:]:
            out = out + (self._steer(x, None, name) - x)
        return out

    def _steer(self, residual: Tensor, branch: Tensor | None, name: str) -> Tensor:
        config, down, up = self.configs[name], self.steer_down[name], self.steer_up[name]
        return post_block(
            residual,
            branch,
            down.weight,
            up.weight,
            down_bias=down.bias,
            up_bias=up.bias,
            activation=config.activation,
            scale=config.scale,
        )

    def extra_repr(self) -> str:
        return f"active={self.active_adapters!r}"


def _cannot_merge() -> ValueError:
    return ValueError(
        "a steering adapter cannot be merged into weights: its shift is added to the stream after the block, where "
        "there is no weight to take it up; expected it to be kept (save_pretrained), or taken out (unload)"
    )


# --------------------------------------------------------------------------------------------------------------- tuner


class PostBlockModel(BaseTuner):
    """Puts a site into each steered decoder layer, and adapters into the sites."""

    prefix = PREFIX
    tuner_layer_cls = PeftSite
    target_module_mapping: dict[str, list[str]] = {}
    #: The slots of the batch before that had an adapter for each row; used again where they fit.
    _loaded: LoadedSlots | None = None

    # ----------------------------------------------------------------------------------------------------- in and out

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter: PEFT's own injection, after the layers have been given their sites.

        Raises:
            ValueError: the model has no decoder layers, is patched otherwise, or the adapter is for another.
        """
        config: Any = self.peft_config[adapter_name]  # a PostBlockConfig
        first = not any(isinstance(module, BaseTunerLayer) for module in model.modules())
        new: dict[int, PatchedLayer] = {}
        try:
            check_name(adapter_name)
            decoder = find_decoder(model)
            layout = decoder.layout
            layout.check_sizes("the adapter", config.hidden_size, config.num_layers)
            indices = layout.indices(config.steer_config())
            if config.orthogonal_to is not None and not config.inference_mode:
                raise ValueError(
                    f"orthogonal_to is {config.orthogonal_to!r} in an adapter that trains; expected patch_model, which "
                    "keeps the constraint, or inference_mode=True"
                )
            layers = {index: decoder.layers[index] for index in indices}
            bare = {i: layer for i, layer in layers.items() if not isinstance(getattr(layer, SITE, None), PeftSite)}
            new = patch_layers(bare, layout, PeftSite)
            config.hidden_size, config.num_layers = layout.hidden, layout.num_layers
            self._targets = {f"{layout.path(index)}.{SITE}" for index in indices}
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            for patched in new.values():
                patched.remove()
            self.peft_config.pop(adapter_name, None)
            raise
        if first:  # PEFT takes the sites for an earlier adapter's, beside which it freezes nothing more
            self._mark_only_adapters_as_trainable(model)

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        return peft_config

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        return key in self._targets

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        *args: Any,
        **kw: Any,
    ) -> None:
        target.add(adapter_name, peft_config.steer_config(), peft_config.hidden_size, execution_device(parent))

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """The config says of what dtype the parameters are."""

    def unload(self) -> nn.Module:
        """The model as it was: its layers' own classes, no sites."""
        _take_out(self.model)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        raise _cannot_merge()

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise _cannot_merge()

    def _sites(self) -> Iterator[PeftSite]:
        return (module for module in self.model.modules() if isinstance(module, PeftSite))

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Refuse values that no adapter file may have. PEFT asks for the tensors before it writes them."""
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kwargs)
        tensors = of_adapter(found.items(), adapter_name)
        for path, tensor in tensors.items():
            check_values(path, tensor, config.scale)
        dtypes = {tensor.dtype for tensor in tensors.values()}
        config.dtype = next((name for name, dtype in DTYPES.items() if {dtype} == dtypes), config.dtype)
        config.tensors_sha256 = tensors_digest(by_layer(tensors)[1])
        return found

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """A file's path of a tensor, without what is wrapped around the model now."""
        return without_wrappers(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Tensors by the model's names, matched by layer. What does not fit is refused before any of it is loaded: PEFT
        would load the part that does, and warn."""
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        layers_path, _ = by_layer(of_adapter(model.named_parameters(), adapter_name))
        layout = Layout(layers_path, config.num_layers, config.hidden_size)
        try:
            _, layers = by_layer({out_of_model(name, adapter_name) or name: t for name, t in found.items()})
            layout.check_tensors(config.steer_config(), specs_of(layers))
            for path, tensor in layout.paths(layers).items():
                check_values(path, tensor, config.scale)
        except ValueError as error:
            raise ValueError(f"the adapter to load as {adapter_name!r} does not fit: {error}") from error
        return {in_model(path, adapter_name): tensor for path, tensor in layout.paths(layers).items()}

    # ----------------------------------------------------------------------------------------------- several adapters

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """`adapter_names`: each row of a batch by its own adapter, or by none ("__base__"), in inference."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names is given in training mode; expected it in inference (model.eval())")
        unknown = sorted(set(names) - {_BASE} - self.peft_config.keys())
        if unknown:
            raise ValueError(f"adapter_names has {unknown[0]!r}; expected some of {[*self.peft_config, _BASE]}")
        beams = kwargs.get("num_beams") or getattr(kwargs.get("generation_config"), "num_beams", None) or 1
        rows = [name for name in names for _ in range(beams)]  # beam search repeats each row
        sites = {site.patched.index: site for site in self._sites()}
        known = {name: config for site in sites.values() for name, config in site.configs.items()}
        configs = {name: known[name] for name in dict.fromkeys(rows) if name != _BASE}
        self._loaded = load_again(self._loaded, sites, configs)
        mixed = MixedRows(rows, configs, self._loaded, sites)
        try:
            for site in sites.values():
                site.mixed = mixed
            yield
        finally:
            for site in sites.values():
                site.mixed = None

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter whose shift is the weighted sum of others': Σ wᵢ sᵢ (W2ᵢ φ(W1ᵢ h + b1ᵢ) + b2ᵢ).

        Args:
            adapters, weights: those that are added up, and by how much.
            adapter_name: the new one's. Its rank is the sum of theirs.
            combination_type: "linear", of vectors and linear forms; "cat", also of adapters that share a nonlinear φ.

        Raises:
            ValueError: an unknown or taken name, weights that do not fit, or forms whose sum is no such adapter.
        """
        configs = [self._known(name) for name in adapters]
        if adapter_name in self.peft_config:
            raise ValueError(f"there is an adapter {adapter_name!r} already; expected a new name")
        if not adapters or len(adapters) != len(weights):
            raise ValueError(f"there are {len(adapters)} adapters and {len(weights)} weights; expected one for each")
        if combination_type not in ("linear", "cat"):
            raise ValueError(f"combination_type is {combination_type!r}; expected 'linear' or 'cat'")
        activations = sorted({config.activation for config in configs if config.rank})
        nonlinear = [name for name in activations if name != "identity"]
        if combination_type == "linear" and nonlinear:
            raise ValueError(
                f"the sum of {', '.join(nonlinear)} adapters is not linear in their factors; expected vectors and "
                "activation='identity', or combination_type='cat', which puts adapters of one activation side by side"
            )
        if len(activations) > 1:
            raise ValueError(f"the adapters have activations {', '.join(activations)}; expected the same")
        rank = sum(config.rank for config in configs)
        if rank > MAX_RANK:
            raise ValueError(f"the ranks add up to {rank}; expected at most {MAX_RANK}")
        layers: set[int] | None = set()
        for config in configs:
            layers = None if layers is None or config.layers is None else layers | set(config.layers)
        common: dict[str, Any] = {
            "layers": None if layers is None else sorted(layers),
            "dtype": max((config.dtype for config in configs), key=lambda name: DTYPES[name].itemsize),
        }
        if rank:
            combined = PostBlockConfig(
                r=rank,
                activation=activations[0],
                down_bias=any(config.down_bias for config in configs),
                up_bias=any(config.up_bias for config in configs),
                **common,
            )
        else:
            combined = PostBlockConfig(form="vector", **common)
        active = self.active_adapters
        self.peft_config[adapter_name] = combined
        self.inject_adapter(self.model, adapter_name)
        with torch.no_grad():
            for site in self._sites():
                if adapter_name in site.configs:
                    _fill(site, adapter_name, list(zip(adapters, weights, configs, strict=True)))
        self.set_adapter(active)

    def _known(self, name: str) -> SteerConfig:
        if name not in self.peft_config:
            raise ValueError(f"no adapter {name!r}; expected one of {list(self.peft_config)}")
        config: Any = self.peft_config[name]
        return config.steer_config()


def unload(model: nn.Module) -> nn.Module:
    """Take out the steering that transformers put in by `from_pretrained`, `load_adapter` or `add_adapter`; the model.

    What `get_peft_model` or `PeftModel` has wrapped has an `unload` of its own.

    Raises:
        RuntimeError: another library has since changed a layer's class; nothing is undone then.
    """
    _take_out(model)
    configs = getattr(model, "peft_config", {})
    for name in [name for name, config in configs.items() if config.peft_type == POST_BLOCK]:
        del configs[name]
    if not configs and hasattr(model, "peft_config"):
        carrier: Any = model
        del carrier.peft_config
        carrier._hf_peft_config_loaded = False  # transformers' own mark
    return model


def is_steered(model: nn.Module) -> bool:
    """Whether PEFT's steering is in the model."""
    return any(isinstance(module, PeftSite) for module in model.modules())


def _take_out(model: nn.Module) -> None:
    unpatch_layers(m.patched for m in model.modules() if isinstance(m, PeftSite) and m.patched is not None)


def _fill(site: PeftSite, name: str, parts: list[tuple[str, float, SteerConfig]]) -> None:
    """Put the parts side by side: rows of W1, columns of W2 by weight and strength; an absent one is zeros."""
    target: Any = site.adapter(name)  # has each part that one of the others has
    for parameter in (target.down.weight, target.down.bias, target.up.weight, target.up.bias):
        if parameter is not None:
            parameter.zero_()
    start = 0
    for part, weight, config in parts:
        source = site.adapter(part)
        rows = slice(start, start + config.rank)
        start = rows.stop
        if source is None:
            continue
        factor = weight * config.scale
        if source.down.weight is not None and source.up.weight is not None:
            target.down.weight[rows] = source.down.weight.to(target.down.weight)
            target.up.weight[:, rows] = factor * source.up.weight.to(target.up.weight)
        if source.down.bias is not None:
            target.down.bias[rows] = source.down.bias.to(target.down.bias)
        if source.up.bias is not None:
            target.up.bias += factor * source.up.bias.to(target.up.bias)


register_peft_method(name=METHOD, config_cls=PostBlockConfig, model_cls=PostBlockModel, prefix=PREFIX)
