"""Find the decoder layers of a model, the device of each, and the model inside PEFT's wrapper."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .._hub_access import reaching_hub
from ..adapters.fields import read_json
from ..adapters.files import blaming
from ..adapters.kinds import CONFIG_NAME, JOINT_NAME
from ..adapters.parameters import Layout
from .residual import unusual_input
from .weak import Weakly, what_is_left

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: More than any model has, and few enough to build for a check.
_MOST_LAYERS = 10_000


class Decoder:
    """A model's stack of decoder layers. It does not keep the model alive.

    Attributes:
        module: the module with the forward that runs the layers.
        model: the smallest module around it with a forward that takes token ids. For BERT's kin `module` takes none.
        path: the path of the list of layers in the model.
        layers: the list of layers.
        hidden: the hidden size d.
        config: the model's config.
    """

    module = Weakly[nn.Module]()
    model = Weakly[nn.Module](lambda self: self.module)

    def __init__(self, model: nn.Module, path: str, layers: nn.ModuleList, hidden: int) -> None:
        """Take the layers at `path` of the whole `model`."""
        self.path, self.layers, self.hidden = path, layers, hidden
        self.config: Any = model.config
        parents = path.split(".")[:-1]
        around = [model.get_submodule(".".join(parents[:count])) for count in range(len(parents), -1, -1)]
        self.module = around[0]
        self.model = next((m for m in around if "input_ids" in inspect.signature(m.forward).parameters), around[0])

    @property
    def alive(self) -> bool:
        """Whether `module` was not deleted."""
        return what_is_left(self, "module") is not None

    @property
    def layout(self) -> Layout:
        """The layout that adapters have to fit, with the present name in the model's config."""
        base = getattr(self.config, "_name_or_path", "") or ""
        return Layout(self.path, len(self.layers), self.hidden, base)


def find_decoder(model: nn.Module) -> Decoder:
    """Find the decoder layers of `model` by structure: the outermost list of `num_hidden_layers` modules.

    The modules must have children, and the nearest config above them must be of the model's class.

    Raises:
        TypeError: `model` is not a module.
        ValueError: the model has no config, no such list, more than one, or also an encoder.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module with decoder layers")
    name = type(model).__name__
    config = getattr(model, "config", None)
    text: Any = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    if any(getattr(one, "is_encoder_decoder", False) for one in (config, text)):  # or its language model is one
        raise ValueError(f"{name} is an encoder-decoder model; expected a decoder-only one")
    config = text
    hidden, count = (getattr(config, key, None) for key in ("hidden_size", "num_hidden_layers"))
    if not isinstance(hidden, int) or not isinstance(count, int):
        raise ValueError(f"{name} has no config with hidden_size and num_hidden_layers; expected a decoder model's")
    found: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{outer}.") for outer, _ in found):
            found.append((path, module))
    # Other towers (for images, for sound) also have lists of layers, below their own config.
    own = {id(layers) for path, layers in found if _config_above(model, path) in (type(model.config), type(config))}
    # Exclude ModuleLists of bare norms or projections that happen to have one entry per layer: layers have children.
    fitting = [
        (path, layers)
        for path, layers in found
        if len(layers) == count and id(layers) in own and all(any(layer.children()) for layer in layers)
    ]
    if len(fitting) > 1 and hasattr(model, "get_decoder"):
        get_decoder: Any = model.get_decoder
        inside = {id(module) for module in get_decoder().modules()}
        fitting = [(path, layers) for path, layers in fitting if id(layers) in inside]
    if len(fitting) != 1:
        lists = [
            f"{path} of {len(layers)}"
            + ("" if id(layers) in own else f" under a {_config_above(model, path).__name__}")
            for path, layers in found
        ]
        raise ValueError(
            f"{name} has no decoder layers that can be told apart; expected one list of {count} modules, "
            f"found {', '.join(lists) or 'none'}"
        )
    path, layers = fitting[0]
    return Decoder(model, path, layers, hidden)


def check_rows(decoder: nn.Module, what: str, expected: str = "", shape: Any = None) -> None:
    """Refuse a decoder that gives its layers another hidden state than (rows, tokens, d).

    Args:
        decoder: the module that runs the layers.
        what: what needs (rows, tokens, d), for the error.
        expected: what else could be done.
        shape: a layer's hidden state, if it is known to be another. None: it is read in the decoder's source, because
            as many rows as tokens, such as XLNet's, are not told apart by their shape.

    Raises:
        ValueError: the hidden state is another.
    """
    found = unusual_input(type(decoder)) if shape is None else tuple(shape)
    if found is not None:
        either = f"{expected}, or " if expected else ""
        raise ValueError(
            f"{type(decoder).__name__} gives its layers {found}, and {what}; expected {either}a model with layers of "
            "(rows, tokens, d)"
        )


def refuse_adapter(source: str) -> None:
    """Raise ValueError if a directory that should hold a model holds only an adapter."""
    folder = Path(source)
    if (folder / "config.json").exists():
        return
    if any((folder / name).exists() for name in (CONFIG_NAME, JOINT_NAME)):
        raise ValueError(f"{source} holds an adapter and no model; expected the model that the adapter was made for")


def meta_model(base: str) -> PreTrainedModel:
    """Return a language model without weights, built from the config of a directory or hub id.

    Raises:
        ValueError: the config is broken or has an impossible number of layers, or the directory holds an adapter.
        OSError: there is no such model.
    """
    refuse_adapter(base)
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        file = Path(base, "config.json")
        if file.exists():
            with blaming(file):
                read_json(file)  # transformers would wait for a pipe and accept deep nesting
        with reaching_hub(base, "model"):
            config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        count = getattr(config.get_text_config(), "num_hidden_layers", 0)
        if not isinstance(count, int) or count > _MOST_LAYERS:
            raise ValueError(f"its config has num_hidden_layers {count!r:.50}; expected at most {_MOST_LAYERS}")
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (AttributeError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"its config builds no model ({type(error).__name__}: {reason}); expected a config") from error


def execution_device(module: nn.Module) -> torch.device:
    """Return the device on which a module runs. The parameters of an offloaded module are on meta between its calls."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    if device.type != "meta":
        return device
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):  # several hooks in a row are one
            found = getattr(one, "execution_device", None)
            if found is not None:
                return torch.device(found)
    return device


def inside_peft(model: nn.Module) -> nn.Module:
    """Return the model inside PEFT's wrapper, so that paths do not depend on it. Without a wrapper return `model`."""
    peft = sys.modules.get("peft")  # a wrapped model has imported peft
    return model.get_base_model() if peft is not None and isinstance(model, peft.PeftModel) else model


def _config_above(model: nn.Module, path: str) -> type:
    """Return the class of the nearest config above `path`, which is that of the tower with `path`."""
    while path:
        path = path.rpartition(".")[0]
        config = getattr(model.get_submodule(path), "config", None)
        if config is not None:
            return type(config)
    return type(model.config)
