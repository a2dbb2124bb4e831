"""Steering adapters served by vLLM, as a plug-in: installed beside it, this is loaded with it.

    vllm serve BASE --enable-lora --lora-modules polite=DIR terse=DIR2
    LLM(BASE, enable_lora=True).generate(prompts, lora_request=LoRARequest("polite", 1, DIR))

DIR is what `model.steering.save` wrote, or `save_joint`: LoRA and steering in one request. They are named, loaded,
unloaded, evicted and batched as LoRA adapters are, beside those, by vLLM's own machinery.

How: when vLLM looks for the modules of a loaded model that LoRA can adapt, each decoder layer is given a weightless
child that looks like one, and a forward that passes what the layer returns through it. vLLM replaces the child by our
LoRA layer, which keeps the adapters' slots and reads whose each token is. A layer of vLLM's returns the residual
stream un-added, as (hidden, residual): x = hidden + residual, and the shift goes into hidden, in place.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import vllm
from packaging.version import Version
from torch import Tensor, nn

#: The versions that this was tried with.
FIRST, BELOW = "0.32", "0.33"
if not Version(FIRST) <= Version(vllm.__version__.partition("+")[0]) < Version(BELOW):
    raise ImportError(f"vllm is {vllm.__version__}; expected >={FIRST},<{BELOW} here: it serves no steering adapters")

from vllm.exceptions import VLLMValidationError  # noqa: E402
from vllm.logger import init_logger  # noqa: E402
from vllm.lora import lora_model, lora_weights, model_manager, utils, worker_manager  # noqa: E402
from vllm.lora.layers import BaseLayerWithLoRA  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.model_executor.layers.linear import LinearBase  # noqa: E402
from vllm.v1.engine import input_processor  # noqa: E402

from .adapters.files import CONFIG_NAME, PEFT_TYPE, AdapterFile, method_in, read_adapter  # noqa: E402
from .adapters.parameters import DOWN, NAMES, SITE, UP, UP_BIAS, ByLayer, Layout, steered  # noqa: E402
from .joint import JOINT_NAME, STEERING_FOLDER, find_joint  # noqa: E402
from .kernels import ACTIVATIONS, MAX_RANK, grouped  # noqa: E402
from .model.residual import ResidualNotFound, names_in_final_adds  # noqa: E402
from .positions import ALL  # noqa: E402
from .serving.slots import Slots  # noqa: E402

logger = init_logger(f"vllm.{__name__}")


# ---------------------------------------------------------------------------------------------- what a layer returns

FINISHED, UNADDED = "finished", "unadded"


class Unreachable(ValueError):
    """A model, or a layer of it, whose residual stream is not known to be reached rightly."""


@functools.cache
def returned_state(cls: type[nn.Module]) -> str:
    """What a decoder layer of this class returns: UNADDED, x = hidden + residual, or FINISHED, x itself (or first).

    Read from its forward: a layer that has a `residual` and returns (hidden, residual) is UNADDED, unless hidden is a
    sum that has the residual in it already, as in Cohere's, which returns a residual that nobody adds any more.

    Raises:
        Unreachable: neither is plain.
    """
    forward = inspect.unwrap(cls.forward)
    try:
        lines, first = inspect.getsourcelines(forward)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        raise Unreachable(f"{cls.__name__} has no source to read") from None
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    try:
        sums = names_in_final_adds(cls)
    except ResidualNotFound:
        sums = []
    pairs = [value.elts[1] for value in returned if isinstance(value, ast.Tuple) and len(value.elts) == 2]
    names = {second.id if isinstance(second, ast.Name) else None for second in pairs}
    if not pairs and sums:
        return FINISHED
    if len(pairs) != len(returned) or len(names) != 1:
        raise Unreachable(f"{cls.__name__} returns what is not known to be a hidden state, or a pair with its residual")
    (residual,) = names
    if sums and (residual is None or all(residual in added for added in sums)):
        return FINISHED
    if sums or residual is None or residual not in inspect.signature(forward).parameters:
        raise Unreachable(f"{cls.__name__} returns a pair that is not known to be (hidden, residual), un-added")
    return UNADDED


def _scales_in_float16(cls: type[nn.Module]) -> bool:
    """Whether the layer does something of its own in float16, as DeepSeek's, which scales its stream down."""
    return "float16" in re.sub(r"bfloat16", "", inspect.getsource(inspect.unwrap(cls.forward)))


# -------------------------------------------------------------------------------------------------------- in the layer


class SteeringPoint(LinearBase):
    """The child of a decoder layer where its output passes; without adapters it changes nothing.

    A LinearBase, without weights, as vLLM looks for LoRA's places among those.
    """

    def __init__(self, layer: nn.Module, index: int, path: str, hidden: int, state: str) -> None:
        super().__init__(hidden, hidden, prefix=f"{path}.{SITE}", disable_tp=True)
        self.quant_method = None  # there is nothing to process when weights are loaded again
        self.index, self.hidden, self.state = index, hidden, state
        self.device = next((p.device for p in layer.parameters()), torch.device("cpu"))

    def forward(self, output: Any) -> Any:
        return output


class SteeringWithLoRA(BaseLayerWithLoRA):
    """Steers what passes by the adapter of each token's request."""

    def __init__(self, base_layer: SteeringPoint) -> None:
        super().__init__()
        self.base_layer = base_layer

    @classmethod
    def can_replace_layer(cls, source_layer: nn.Module, *args: Any, **kwargs: Any) -> bool:
        return isinstance(source_layer, SteeringPoint)

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        rank = min(lora_config.max_lora_rank, MAX_RANK)
        point = self.base_layer
        self.slots = Slots(
            max_loras, rank, point.hidden, dtype=torch.float32, device=point.device, down_bias=True, up_bias=True
        )

    @property
    def lora_a_stacked(self) -> tuple[Tensor | None, ...]:
        """Where vLLM reads the sizes of the empty adapters that it warms up with."""
        return (self.slots.downs,)

    @property
    def lora_b_stacked(self) -> tuple[Tensor | None, ...]:
        return (self.slots.ups,)

    def reset_lora(self, index: int) -> None:
        self.slots.clear(index)

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """lora_a: what `_weights` packed; a bare tensor is W1 of an empty adapter, lora_b then its W2."""
        if isinstance(lora_a, Tensor):
            self.slots.put(index, {DOWN: lora_a, UP: lora_b}, "identity")
            return
        *tensors, code = lora_a
        named = {name: tensor for name, tensor in zip(NAMES, tensors, strict=True) if tensor.numel()}
        self.slots.put(index, named, ACTIVATIONS[int(code)])

    def set_mapping(self, punica_wrapper: Any) -> None:
        super().set_mapping(punica_wrapper)
        # Before the first batch has been mapped it holds anything.
        punica_wrapper._token_lora_indices.fill_(-1)

    def forward(self, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self._steer(output)
        hidden, *rest = output
        if self.base_layer.state == UNADDED:
            residual = rest[0]
            self.slots(self._rows(residual), self._rows(hidden), self._ids(hidden), into_branch=True)
            return output
        return (self._steer(hidden), *rest)

    def _steer(self, hidden: Tensor) -> Tensor:
        rows = self._rows(hidden)
        return self.slots(rows, None, self._ids(hidden)).view(hidden.shape)

    def _rows(self, hidden: Tensor) -> Tensor:
        return hidden.view(-1, self.base_layer.hidden)

    def _ids(self, hidden: Tensor) -> Tensor:
        # Not its property of the name, whose length is a number that a compiled graph would keep.
        return self.punica_wrapper._token_lora_indices[: hidden.numel() // self.base_layer.hidden]


@functools.cache
def steered_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a layer class whose forward passes its output through the layer's steering point."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, SITE)(base.forward(self, *args, **kwargs))

    namespace = {"__module__": base.__module__, "__qualname__": base.__qualname__, "forward": forward}
    metaclass: Any = type(base)
    return metaclass(base.__name__, (base,), namespace)


# -------------------------------------------------------------------------------------------------------- in the model


@dataclass(frozen=True)
class Reached:
    """What an adapter has to fit, and the reason where the model's decoder layers are not reached."""

    layout: Layout
    reason: str = ""


def find_layers(model: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    """The path of the model's list of decoder layers, and the list, where layers of other stages are missing.

    Raises:
        Unreachable: there is not one such list.
    """
    get_language: Any = getattr(model, "get_language_model", None)
    language = model if get_language is None else get_language()
    found: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == count
            and not any(path.startswith(f"{outer}.") for outer, _ in found)
            and all(any(layer.children()) or _is_missing(layer) for layer in module)
            and any(module is inside for inside in language.modules())
        ):
            found.append((path, module))
    if len(found) != 1:
        lists = ", ".join(path for path, _ in found) or "none"
        raise Unreachable(f"{type(model).__name__} has no one list of {count} decoder layers; found {lists}")
    return found[0]


def _is_missing(layer: nn.Module) -> bool:
    return type(layer).__name__ == "PPMissingLayer"


def reach(model: nn.Module, config: Any) -> Reached:
    """Give each decoder layer of a loaded model its steering point. All or none; a reason where they are not reached.

    config: vLLM's of the model.
    """
    layout = layout_of(config)
    try:
        path, layers = find_layers(model, layout.num_layers)
        here = {index: layer for index, layer in enumerate(layers) if not _is_missing(layer)}
        classes: dict[int, Any] = {index: type(layer) for index, layer in here.items()}
        states = {index: returned_state(cls) for index, cls in classes.items()}
        for layer in here.values():
            if hasattr(layer, SITE):
                raise Unreachable(f"{type(layer).__name__} has a {SITE!r} of its own")
            if config.dtype == torch.float16 and _scales_in_float16(type(layer)):
                raise Unreachable(f"{type(layer).__name__} computes otherwise in float16; expected bfloat16 or float32")
    except Unreachable as reason:
        return Reached(layout, str(reason))
    for index, layer in here.items():
        point = SteeringPoint(layer, index, f"{path}.{index}", layout.hidden, states[index])
        layer.add_module(SITE, point)
        layer.__class__ = steered_class(classes[index])
    return Reached(layout)


def layout_of(config: Any) -> Layout:
    """What an adapter has to fit, by vLLM's config of the model. Tensors are matched by layer: no path is needed."""
    return Layout("", config.hf_text_config.num_hidden_layers, config.get_hidden_size())


# ------------------------------------------------------------------------------------------------------------ in files


@dataclass(frozen=True)
class Source:
    """Where a request's adapter lies: its steering, and the LoRA beside it, if any."""

    steering: Path
    lora: Path | None = None


def find_source(path: str) -> Source | None:
    """What a directory holds, as `steering.save` or `save_joint` wrote it; None: nothing of ours.

    Raises:
        ValueError: a joint directory of several LoRA adapters, or of parts that were not saved together.
    """
    folder = Path(path).expanduser()
    if (folder / CONFIG_NAME).exists():
        return Source(folder) if method_in(folder) == PEFT_TYPE else None  # vLLM says what is wrong with others
    if not (folder / JOINT_NAME).exists():
        return None
    steering, loras = find_joint(folder)
    if len(loras) != 1:
        raise ValueError(f"{folder} holds {len(loras)} LoRA adapters; expected one, beside {STEERING_FOLDER}/")
    return Source(steering, *loras.values())


def read_fitting(source: Source, layout: Layout, max_rank: int) -> AdapterFile:
    """The adapter, whole and checked; ValueError (or FileNotFoundError) if it is broken or does not fit."""
    file = read_adapter(source.steering, layout)
    rank, most = file.config.rank, min(max_rank, MAX_RANK)
    if rank > most:
        raise ValueError(f"{source.steering} is of rank {rank}; expected at most {most} (--max-lora-rank)")
    if file.config.positions != ALL:
        raise ValueError(f"{source.steering} has positions {file.config.positions!r}; expected 'all' in vLLM")
    return file


def scaled(file: AdapterFile) -> ByLayer:
    """W1, b1, W2 and b2 of an adapter in float32, its strength in W2 and b2."""
    scale = {UP: file.config.scale, UP_BIAS: file.config.scale}
    return {
        index: {
            name: t.float() * scale[name] if name in scale else t.float()
            for name, t in steered(file.config.form, tensors).items()
        }
        for index, tensors in file.tensors.items()
    }


def _weights(path: str, rank: int, tensors: dict[str, Tensor], activation: str) -> lora_weights.LoRALayerWeights:
    """One layer's, in the shape in which vLLM hands weights on: `SteeringWithLoRA.set_lora` unpacks them."""
    packed = [tensors.get(name, torch.empty(0)) for name in NAMES]
    packed.append(torch.tensor(ACTIVATIONS.index(activation)))
    return lora_weights.LoRALayerWeights(path, rank, rank, packed, list(packed), scaling=1.0)


# --------------------------------------------------------------------------------------------------------- into vLLM


def load(manager: worker_manager.WorkerLoRAManager, request: LoRARequest, source: Source, load_lora: Any) -> Any:
    """The request's adapter as vLLM's manager keeps it. `load_lora`: how vLLM loads a LoRA.

    Raises:
        ValueError: it is broken, does not fit, or the model is not reached.
    """
    models = manager._adapter_manager
    reached: Reached = models.steering
    if reached.reason:
        raise ValueError(
            f"{request.lora_name!r} is a steering adapter, and this model cannot be steered: {reached.reason}"
        )
    points = {m.index: path for path, m in models.modules.items() if isinstance(m, SteeringWithLoRA)}
    if not points:
        raise ValueError(
            f"{request.lora_name!r} steers, and --lora-target-modules leaves steering out; expected {SITE!r} among them"
        )
    file = read_fitting(source, reached.layout, manager.lora_config.max_lora_rank)
    if source.lora is None:
        loaded = lora_model.LoRAModel(request.lora_int_id, max(file.config.rank, 1), {})
    else:
        loaded = load_lora(manager, _at(request, source.lora))
    for index, tensors in scaled(file).items():
        if index in points:  # the others are another stage's
            loaded.loras[points[index]] = _weights(points[index], loaded.rank, tensors, file.config.activation)
    return loaded


def _at(request: LoRARequest, path: Path) -> LoRARequest:
    return LoRARequest(request.lora_name, request.lora_int_id, str(path), load_inplace=request.load_inplace)


@functools.lru_cache(maxsize=4096)
def _checked(path: str, stamps: tuple[Any, ...], layout: Layout, max_rank: int) -> None:
    source = find_source(path)
    if source is not None:
        read_fitting(source, layout, max_rank)


def _stamps(path: str) -> tuple[Any, ...]:
    """What changes when one of an adapter's files does."""
    files = sorted(file for file in Path(path).expanduser().rglob("*") if file.is_file())
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def check_request(request: LoRARequest, config: Any) -> None:
    """Refuse a request whose steering adapter cannot be served, before it reaches the engine, which it would end.

    Raises:
        VLLMValidationError: it is broken, does not fit, or is not there.
    """
    path = request.lora_path
    if not Path(path).expanduser().is_dir():
        if Path(path).expanduser().is_absolute() or path.startswith("."):
            raise VLLMValidationError(f"adapter {request.lora_name!r}: no directory {path}; expected a saved adapter")
        return  # an id on the hub
    try:
        _checked(path, _stamps(path), layout_of(config.model_config), config.lora_config.max_lora_rank)
    except (ValueError, OSError) as error:
        raise VLLMValidationError(f"adapter {request.lora_name!r}: {error}") from error


def fingerprint(model: nn.Module) -> str:
    """What a compiled graph of this model depends on beside vLLM and its config: our code and the layers steered."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for file in sorted(Path(grouped.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    digest.update(inspect.getsource(Slots).encode())
    for path, module in model.named_modules():
        if isinstance(module, SteeringWithLoRA):
            downs: Any = module.slots.downs
            digest.update(f"{path} {module.base_layer.state} {tuple(downs.shape)}".encode())
    return digest.hexdigest()


class _WithFingerprint:
    """A user's `additional_config` that is no dict, with ours in its hash."""

    def __init__(self, given: Any, mark: str) -> None:
        self._given, self._mark = given, mark

    def __getattr__(self, name: str) -> Any:
        return getattr(self._given, name)

    def compute_hash(self) -> str:
        return hashlib.sha256(f"{self._given.compute_hash()} {self._mark}".encode()).hexdigest()


def put_into_cache_key(model: nn.Module, config: Any) -> None:
    """vLLM keeps compiled graphs in files, by a hash of its config: one made without us, or otherwise, must not come
    back. It hashes `additional_config`, of each config that a part of the model has kept."""
    mark = fingerprint(model)
    kept = [getattr(module, "vllm_config", None) for module in model.modules()]
    for each in {id(c): c for c in (config, *kept) if c is not None}.values():
        given = each.additional_config
        if isinstance(given, dict):
            each.additional_config = {**given, "fused_steer": mark}
        elif not isinstance(given, _WithFingerprint):
            each.additional_config = _WithFingerprint(given, mark)


def _wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Put `make(original)` in the place of a method, once: a process may load its plug-ins more often."""
    original = getattr(owner, name)
    if getattr(original, "_fused_steer", False):
        return
    wrapped: Any = functools.wraps(original)(make(original))
    wrapped._fused_steer = True
    setattr(owner, name, wrapped)


def _init_manager(original: Any) -> Any:
    def __init__(self: Any, model: nn.Module, *args: Any, vllm_config: Any, **kwargs: Any) -> None:
        self.steering = reach(model, vllm_config.model_config)
        if self.steering.reason:
            logger.warning("Steering adapters will be refused: %s", self.steering.reason)
        original(self, model, *args, vllm_config=vllm_config, **kwargs)
        put_into_cache_key(model, vllm_config)

    return __init__


def _load_adapter(original: Any) -> Any:
    def _load_adapter(self: Any, lora_request: LoRARequest) -> Any:
        source = find_source(utils.get_adapter_absolute_path(lora_request.lora_path))
        return original(self, lora_request) if source is None else load(self, lora_request, source, original)

    return _load_adapter


def _add_adapter(original: Any) -> Any:
    """In every step vLLM asks for each adapter of a batch whether it is loaded, by making a dict of all that are: a
    cost that grows with their square. Of one that is in its slot there is nothing to do but to note that it was used.
    """

    def add_adapter(self: Any, lora_request: LoRARequest) -> bool:
        models, number = self._adapter_manager, lora_request.lora_int_id
        here = number in models._active_adapters and number in models._registered_adapters
        if here and not lora_request.load_inplace:
            models.get_adapter(number)
            models.activate_adapter(number)
            return True
        return original(self, lora_request)

    return add_adapter


def _validate_lora(original: Any) -> Any:
    def _validate_lora(self: Any, lora_request: LoRARequest | None) -> None:
        original(self, lora_request)
        if lora_request is not None:
            check_request(lora_request, self.vllm_config)

    return _validate_lora


def register() -> None:
    """Called by vLLM in each of its processes: the entry point `fused_steer` of `vllm.general_plugins`."""
    if SteeringWithLoRA not in utils._all_lora_classes:
        utils._all_lora_classes = (SteeringWithLoRA, *utils._all_lora_classes)
    _wrap(model_manager.LoRAModelManager, "__init__", _init_manager)
    _wrap(worker_manager.WorkerLoRAManager, "_load_adapter", _load_adapter)
    _wrap(worker_manager.LRUCacheWorkerLoRAManager, "add_adapter", _add_adapter)
    _wrap(input_processor.InputProcessor, "_validate_lora", _validate_lora)
