"""The PEFT tuner for steering: puts sites into a model's layers, and adapters into the sites."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, register_peft_method
from torch import Tensor, nn

from ..adapters.parameters import (
    PEFT_PREFIX,
    SITE,
    Layout,
    Place,
    by_lower,
    by_place,
    check_name,
    check_values,
    in_model,
    of_adapter,
    out_of_model,
    refuse_clash,
    specs_of,
    unwrapped,
    without_wrappers,
)
from ..adapters.weights import tensors_digest
from ..config import DTYPES, SteerConfig, checked_number
from ..kernels import MAX_RANK
from ..model.decoder import execution_device, find_decoder
from ..model.heads import fresh_heads, warn_of_random
from ..model.layer import PatchedLayer, give_sites, unpatch_layers
from ..positions import ALL
from ..serving.mixed import MixedRows, load_again
from ..serving.slots import LoadedSlots
from .config import POST_BLOCK, PostBlockConfig
from .loading import (
    CheckedLoading,
    folder_that_peft_loads,
    peft_loads,
    peft_loads_a_further_adapter,
    read_for,
    transformers_loads,
)
from .site import PeftSite, cannot_merge

PREFIX = "steer_"
#: Names of heads that PEFT adds to a config's `modules_to_save` for its task, whether the model has them or not.
_PEFTS_HEADS = {"classifier", "score", "qa_outputs"}
_BASE = "__base__"  # PEFT's name for no adapter in a batch


class PostBlockModel(BaseTuner):
    """A model whose decoder layers PEFT steers: the sites in the layers hold the adapters."""

    prefix = PREFIX
    tuner_layer_cls = PeftSite
    target_module_mapping: dict[str, list[str]] = {}
    #: The slots of the latest batch with an adapter for each row, reused if they fit.
    _loaded: LoadedSlots | None = None
    #: Removes the adapter whose weights PEFT loads next.
    _undo_load: Callable[[], None] | None = None

    # --------------------------------------------------------------------------------------- injection and removal

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put sites into the layers, then add an adapter by PEFT's own injection.

        Raises:
            ValueError: the model has no decoder layers or is patched otherwise, or the adapter is for another model.
        """
        config: Any = self.peft_config[adapter_name]  # a PostBlockConfig
        first = not any(isinstance(module, BaseTunerLayer) for module in model.modules())
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        new: list[PatchedLayer] = []

        def undo() -> None:
            for patched in new:
                patched.remove()
            for site in self._sites():
                if adapter_name in site.configs:
                    site.delete_adapter(adapter_name)
            self.peft_config.pop(adapter_name, None)
            _take_out_heads(model, {adapter_name})
            for parameter, required in trained:
                parameter.requires_grad_(required)
            if getattr(model, "peft_config", None) == {}:
                forget_adapters(model)

        try:
            check_name(adapter_name)
            refuse_clash(adapter_name, by_lower(name for name in self.peft_config if name != adapter_name))
            decoder = find_decoder(model)
            layout = decoder.layout
            layout.check_sizes("the adapter", config.hidden_size, config.num_layers)
            indices = layout.indices(config.steer_config())
            if config.orthogonal_to is not None and not config.inference_mode:
                raise ValueError(
                    f"orthogonal_to is {config.orthogonal_to!r} in an adapter that trains; expected patch_model, which "
                    "keeps the constraint, or inference_mode=True"
                )
            if config.positions != ALL:
                raise ValueError(
                    f"positions is {config.positions!r}, and PEFT's steering is at every token; expected 'all', or "
                    "patch_model"
                )
            _complete_heads(config, model, adapter_name)
            layers = {index: decoder.layers[index] for index in indices}
            bare = {i: layer for i, layer in layers.items() if not isinstance(getattr(layer, SITE, None), PeftSite)}
            new = [PatchedLayer(each, i, layout.layer_path(i), type(decoder.module)) for i, each in bare.items()]
            give_sites({patched: [SITE] for patched in new}, PeftSite)
            config.hidden_size, config.num_layers = layout.hidden, layout.num_layers
            self._targets = {layout.path(Place(index)) for index in indices}
            if first:  # PEFT takes the new sites for an earlier adapter's, and then freezes nothing
                model.requires_grad_(False)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            undo()
            raise
        if peft_loads() or transformers_loads():
            self._load_next(config, adapter_name, layout, undo)

    def _load_next(self, config: PostBlockConfig, adapter_name: str, layout: Layout, undo: Callable[[], None]) -> None:
        """Prepare to load the weights of an adapter that was just added.

        Args:
            undo: removes the adapter.

        Raises:
            ValueError: the adapter has a head inside a compiled module, where PEFT does not find the head's tensors.
        """
        saved = set()
        for path, wrapper in _wrappers(self.model):
            for name, inside in wrapper.adapter_state_dict_load_map(adapter_name).items():
                saved.add(f"{path}.{name}")
                if without_wrappers(f"{path}.{inside}") != f"{path}.{inside}":
                    undo()
                    raise ValueError(
                        f"the adapter to load as {adapter_name!r} has a head, and {path}.{inside} is compiled; "
                        "expected the plain model (torch.compile afterwards)"
                    )
        if peft_loads():
            self._undo_load = undo
        else:
            CheckedLoading(self.model, adapter_name, config.steer_config(), layout, saved, undo)

    def take_undo(self) -> Callable[[], None] | None:
        """Return the function that removes the adapter being loaded, once; None if no adapter was added for a load."""
        undo, self._undo_load = self._undo_load, None
        return undo

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
        """Keep the config's dtype. Without autocast, use the layer's dtype."""
        for site in () if autocast_adapter_dtype else self._sites():
            others = (p for name, p in site.patched.layer.named_parameters() if not name.startswith(f"{SITE}."))
            dtype = next((p.dtype for p in others if p.is_floating_point()), None)
            if dtype is not None and dtype in DTYPES.values():
                site.cast(adapter_name, dtype)

    def unload(self) -> nn.Module:
        """Return the model without steering, with its own layer classes and heads."""
        take_out(self.model, set(self.peft_config))
        if hasattr(self.model, "peft_config"):
            forget_adapters(self.model)
        return self.model

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        raise cannot_merge()

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise cannot_merge()

    def _sites(self) -> Iterator[PeftSite]:
        return (module for module in self.model.modules() if isinstance(module, PeftSite))

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return an adapter's tensors for saving, checked before PEFT writes them."""
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kwargs)
        tensors = of_adapter(found.items(), adapter_name)
        for path, tensor in tensors.items():
            check_values(path, tensor, config.scale)
        dtypes = {tensor.dtype for tensor in tensors.values()}
        config.dtype = next((name for name, dtype in DTYPES.items() if {dtype} == dtypes), config.dtype)
        heads = {}
        for name, wrapper in _wrappers(model):
            start = f"{name}."
            own = {key.removeprefix(start): value for key, value in state_dict.items() if key.startswith(start)}
            for key, tensor in wrapper.adapter_state_dict(adapter_name, own).items():
                heads[without_wrappers(start + key).removeprefix(PEFT_PREFIX)] = tensor
        config.tensors_sha256 = tensors_digest(by_place(tensors)[1], heads)
        return found

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Return the path of a tensor in a file, without the wrappers that are around the model now."""
        return without_wrappers(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the tensors to load, under the model's names and matched by layer: the tensors of the file that PEFT
        loads, or else those of `state_dict`.

        Tensors that do not fit are refused before any is loaded. PEFT would load the others and warn. An adapter that
        was added for this load is then removed. The tensors are copies, because PEFT may put them in place of tensors
        on meta.
        """
        tuner = getattr(model, "base_model", None)
        undo = tuner.take_undo() if isinstance(tuner, cls) else None
        try:
            return _fitting(model, config, adapter_name, state_dict, super()._remap_adapter_state_dict_for_load)
        except BaseException:
            if undo is not None:
                undo()
            raise

    # ----------------------------------------------------------------------------------------------- several adapters

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Let each row of a batch use the adapter of `adapter_names`, or none ("__base__"), for inference."""
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
        sites = {site.place: site for site in self._sites()}
        known = {name: config for site in sites.values() for name, config in site.configs.items()}
        configs = {name: known[name] for name in dict.fromkeys(rows) if name != _BASE}
        self._loaded = load_again(self._loaded, sites, configs)
        mixed = MixedRows(rows, configs, self._loaded, sites, find_decoder(self.model).module)
        heads = contextlib.ExitStack()
        try:
            for site in sites.values():
                site.mixed = mixed
            for _, wrapper in _wrappers(self.model):
                of_head = [name if name in wrapper.modules_to_save else _BASE for name in rows]
                hook = partial(_pass_names, of_head)
                heads.callback(wrapper.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield
        finally:
            heads.close()
            for site in sites.values():
                site.mixed = None

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter with the weighted sum of other adapters' shifts: Σ wᵢ sᵢ (W2ᵢ φ(W1ᵢ h + b1ᵢ) + b2ᵢ).

        Args:
            adapters, weights: the names of the adapters, and their weights.
            adapter_name: the new adapter's name. Its rank is the sum of the adapters' ranks.
            combination_type: "linear", for vectors and φ = identity, or "cat", also for adapters with the same φ.

        Raises:
            TypeError: no list of adapters or weights, or a weight that is no number.
            ValueError: an unknown or taken name, adapters with heads, or with a sum that is no adapter or not finite.
        """
        for what, given in (("adapters", adapters), ("weights", weights)):
            if isinstance(given, str) or not isinstance(given, Sequence):
                raise TypeError(f"{what} is {given!r:.200}; expected a list")
        configs = [self._known(name) for name in adapters]
        if adapter_name in self.peft_config:
            raise ValueError(f"there is an adapter {adapter_name!r} already; expected a new name")
        if not adapters or len(adapters) != len(weights):
            raise ValueError(f"there are {len(adapters)} adapters and {len(weights)} weights; expected one for each")
        factors = [
            checked_number(f"the weight of {name!r}", weight) for name, weight in zip(adapters, weights, strict=True)
        ]
        for name in adapters:
            if any(name in wrapper.modules_to_save for _, wrapper in _wrappers(self.model)):
                raise ValueError(
                    f"adapter {name!r} has a trained head; expected adapters without one, as heads have no sum"
                )
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
            "modules_to_save": [],
            "dtype": configs[0].dtype if len({one.dtype for one in configs}) == 1 else "float32",  # it holds all values
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
        try:
            with torch.no_grad():
                for site in self._sites():
                    if adapter_name in site.configs:
                        _fill(site, adapter_name, list(zip(adapters, factors, configs, strict=True)))
            for path, tensor in of_adapter(self.model.named_parameters(), adapter_name).items():
                check_values(path, tensor, 1.0)
        except BaseException:
            self.delete_adapter(adapter_name)
            raise
        finally:
            self.set_adapter(active)

    def _known(self, name: str) -> SteerConfig:
        if not isinstance(name, str) or name not in self.peft_config:
            raise ValueError(f"no adapter {name!r:.200}; expected one of {list(self.peft_config)}")
        config: Any = self.peft_config[name]
        return config.steer_config()


def _fitting(
    model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], remap: Callable[..., Any]
) -> dict[str, Tensor]:
    """Return the tensors to load into an adapter and its heads, under the model's names.

    Args:
        state_dict: the tensors under their names in a file; those of heads already have the model's names.
        remap: PEFT's function from names in a file to the model's names.

    Raises:
        ValueError: tensors are missing, unknown, or of another shape or dtype.
    """
    steer = config.steer_config()
    layers_path, _ = by_place(of_adapter(model.named_parameters(), adapter_name))
    layout = Layout(layers_path, config.num_layers, config.hidden_size)
    # The names of the heads' tensors in the model, by their names in files.
    names = {
        f"{path}.{name}": f"{path}.{inside}"
        for path, wrapper in _wrappers(model)
        for name, inside in wrapper.adapter_state_dict_load_map(adapter_name).items()
    }
    prefix = PEFT_PREFIX if layers_path.startswith(PEFT_PREFIX) else ""
    folder = folder_that_peft_loads()
    if folder is None:
        beside = {name: state_dict[name].clone() for name in names.values() if name in state_dict}
        found = remap(model, config, adapter_name, {n: t for n, t in state_dict.items() if n not in beside})
    else:
        file, heads = read_for(folder, adapter_name, steer)
    try:
        if folder is None:
            _, layers = by_place({out_of_model(name, adapter_name) or name: t for name, t in found.items()})
            layers = {i: {name: tensor.clone() for name, tensor in named.items()} for i, named in layers.items()}
        else:
            layers, in_file = file.tensors, {unwrapped(name): inside for name, inside in names.items()}
            for path in in_file.keys() - heads.keys():
                raise ValueError(f"it has no {path}; expected the head that the adapter trained")
            beside = {in_file.get(path, prefix + path): tensor for path, tensor in heads.items()}
        layout.check_tensors(steer, specs_of(layers))
        for path, tensor in layout.paths(layers).items():
            check_values(path, tensor, config.scale)
        expected = model.state_dict()
        for name, tensor in beside.items():
            if name not in expected:
                raise ValueError(f"it has a {name}; expected weights that the model has")
            if tensor.shape != expected[name].shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)}; expected {tuple(expected[name].shape)}")
    except ValueError as error:
        raise ValueError(f"the adapter to load as {adapter_name!r} does not fit: {error}") from error
    return {in_model(path, adapter_name): tensor for path, tensor in layout.paths(layers).items()} | beside


def _pass_names(names: list[str], wrapper: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """A forward pre-hook that passes each row's adapter name to a head wrapped by PEFT."""
    return args, {**kwargs, "adapter_names": names}


def _complete_heads(config: PostBlockConfig, model: nn.Module, adapter_name: str) -> None:
    """Let heads that were not loaded from a checkpoint train and be saved, unless the config names the modules to save.

    If the config is of a file without these heads, they stay random, with a warning.

    Raises:
        ValueError: the config names a module that the model lacks. PEFT would ignore it.
    """
    if config.fused_steer_version is not None:  # of a file, which says what was saved
        if peft_loads_a_further_adapter():  # and has added the heads of the PeftModel's task
            config.modules_to_save = list(config.modules_in_file)
        warn_of_random(model, config.modules_in_file, adapter_name)
    if config.inference_mode or config.fused_steer_version is not None:
        return
    named = set(config.modules_to_save or ())
    modules = [path for path, _ in model.named_modules()]
    for name in sorted(named - _PEFTS_HEADS):
        if not any(path.endswith(name) for path in modules):
            raise ValueError(f"modules_to_save has {name!r}; expected modules of a {type(model).__name__}")
    if config.modules_to_save is None or named and named <= _PEFTS_HEADS:
        more = [name for name in fresh_heads(model) if not any(name.endswith(ending) for ending in named)]
        if more:
            config.modules_to_save = [*(config.modules_to_save or ()), *more]


def _wrappers(model: nn.Module) -> Iterator[tuple[str, ModulesToSaveWrapper]]:
    """Yield PEFT's wrappers of modules that are trained and saved beside adapters, with their paths."""
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            yield name.removeprefix("_fsdp_wrapped_module."), module


def take_out(model: nn.Module, names: set[str]) -> None:
    """Remove the sites, and the heads of the named adapters."""
    unpatch_layers(m.patched for m in model.modules() if isinstance(m, PeftSite) and m.patched is not None)
    _take_out_heads(model, names)


def forget_adapters(model: Any) -> None:
    """Remove the marks of PEFT and transformers on a model with adapters."""
    del model.peft_config
    vars(model).pop("_hf_peft_config_loaded", None)  # transformers' mark; the class has False


def _take_out_heads(model: nn.Module, names: set[str]) -> None:
    for path, wrapper in list(_wrappers(model)):
        if set(wrapper.modules_to_save) <= names:
            model.set_submodule(path, wrapper.original_module)
        else:  # another method's adapter uses the head too
            for name in names & set(wrapper.modules_to_save):
                wrapper.delete_adapter(name, None)


def _fill(site: PeftSite, name: str, parts: list[tuple[str, float, SteerConfig]]) -> None:
    """Fill an adapter with the others side by side: rows of W1, and columns of W2 times weight and strength.

    The parts of an adapter without a tensor are zeros.
    """
    target: Any = site.adapter(name)  # has every tensor that one of the others has
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
        down, up, down_bias, up_bias = source.weights()
        if down is not None and up is not None:
            target.down.weight[rows] = down.to(target.down.weight)
            target.up.weight[:, rows] = factor * up.to(target.up.weight)
        if down_bias is not None:
            target.down.bias[rows] = down_bias.to(target.down.bias)
        if up_bias is not None:
            target.up.bias += factor * up_bias.to(target.up.bias)


register_peft_method(name=POST_BLOCK.lower(), config_cls=PostBlockConfig, model_cls=PostBlockModel, prefix=PREFIX)
