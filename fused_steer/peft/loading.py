"""Read the files that PEFT and transformers load, so that the loaded bytes are the checked bytes.

Both libraries open the weights again after they have read the config, and map them into memory. A process that touches
such a map is killed if the file was shortened meanwhile. So PEFT's function that maps a file is replaced by one that
copies the files of steering adapters and passes all others on, and transformers gets the tensors of `read_with_heads`.
"""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import peft.utils.save_and_load
from peft import PeftModel
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor
from transformers.integrations.peft import PeftAdapterMixin

from ..adapters.files import PEFT_TYPE, AdapterFile, method_in, read_with_heads
from ..adapters.parameters import PEFT_PREFIX, Layout
from ..config import SteerConfig
from ..model.stored import check_same_config
from .config import folder_of


def read_for(source: Path, name: str, config: SteerConfig) -> tuple[AdapterFile, dict[str, Tensor]]:
    """Return an adapter and its heads, to be loaded into the adapter `name` of a model.

    Raises:
        FileNotFoundError, ValueError: as `read_with_heads`, or the file has another config than `config`.
    """
    file, heads = read_with_heads(source)
    check_same_config(source, file.config, name, config)
    return file, heads


def folder_that_peft_loads() -> Path | None:
    """Return the folder that `PeftModel.load_adapter` is loading in this thread, or None if it is not running.

    PEFT passes only the tensors of a file to a method, so the folder is read from the running function.
    """
    found = _running(PeftModel.load_adapter)
    if found is None:
        return None
    options = dict(found["hf_hub_download_kwargs"])
    return folder_of(found["model_id"], options.pop("subfolder", None), options)


def peft_loads() -> bool:
    """Return whether PEFT is loading a file in this thread. It adds the adapter first and loads the weights next."""
    return _running(PeftModel.load_adapter) is not None or _running(PeftModel.from_pretrained) is not None


def peft_loads_a_further_adapter() -> bool:
    """Return whether PEFT is adding an adapter to a PeftModel in this thread, to load its file next."""
    return _running(PeftModel.load_adapter) is not None


def transformers_loads() -> bool:
    """Return whether transformers is loading an adapter's file in this thread."""
    return _running(PeftAdapterMixin.load_adapter) is not None


def _running(function: Any) -> dict[str, Any] | None:
    """Return the local variables of `function` if this thread is inside it, else None."""
    code = inspect.unwrap(function).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return None if frame is None else frame.f_locals


def named(file: AdapterFile, heads: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Return the tensors of an adapter and its heads under PEFT's names in files."""
    return {PEFT_PREFIX + path: tensor for path, tensor in {**layout.paths(file.tensors), **heads}.items()}


def copy_instead_of_mapping() -> None:
    """Let PEFT read steering adapters by `read_with_heads`.

    PEFT has no hook for a method that reads its own files, so its module's name for safetensors' function is replaced.
    If PEFT has no such name, a warning says so.
    """
    module, name = peft.utils.save_and_load, "safe_load_file"
    mapping = getattr(module, name, None)
    if mapping is None:
        warnings.warn(
            "this PEFT reads weights by another function than the known one; do not change files while PEFT loads them",
            stacklevel=2,
        )
    elif not hasattr(mapping, "of_steering"):
        setattr(module, name, _copying(mapping))


def _copying(mapping: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Return PEFT's function `mapping` from a weights file to its tensors, changed to copy steering adapters."""

    @functools.wraps(mapping)
    def load_file(filename: str | os.PathLike[str], device: Any = "cpu", **options: Any) -> dict[str, Tensor]:
        folder = Path(filename).parent
        if method_in(folder) != PEFT_TYPE:
            return mapping(filename, device=device, **options)
        running = _running(PeftModel.load_adapter) or {}
        try:
            file, heads = read_with_heads(folder)
            if running:
                _check_heads(folder, running["self"], running["adapter_name"], heads)
        except BaseException:
            take_undo = getattr(getattr(running.get("self"), "base_model", None), "take_undo", None)
            if take_undo is not None and (undo := take_undo()) is not None:
                undo()
            raise
        return {path: tensor.to(device) for path, tensor in named(file, heads, file.layout).items()}

    load_file.of_steering = True  # type: ignore[attr-defined]
    return load_file


def _check_heads(folder: Path, model: Any, adapter: str, heads: Collection[str]) -> None:
    """Check that a file has the heads of the adapter to be loaded, which PEFT would look up without asking.

    Raises:
        ValueError: a head is missing.
    """
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for name in module.adapter_state_dict_load_map(adapter):
                key = f"{path}.{name}".removeprefix(PEFT_PREFIX)
                if key not in heads:
                    raise ValueError(
                        f"{folder} has no {key}; expected the head of adapter {adapter!r}, as its task_type asks for"
                    )


class CheckedLoading:
    """Replaces `model._load_pretrained_model` for one call, in which transformers loads an adapter."""

    def __init__(
        self,
        model: Any,
        name: str,
        config: SteerConfig,
        layout: Layout,
        heads: Collection[str],
        undo: Callable[[], None],
    ) -> None:
        """
        Args:
            model: the model, which already has the adapter.
            name: the adapter's name.
            config: the adapter's config.
            layout: the model's layout.
            heads: the paths of the tensors of the adapter's heads.
            undo: removes the adapter from the model.
        """
        self.model, self.name, self.config, self.layout, self.heads, self.undo = (
            model,
            name,
            config,
            layout,
            heads,
            undo,
        )
        model._load_pretrained_model = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call transformers' method with the checked tensors.

        Raises:
            FileNotFoundError, ValueError: see `read_for`. The adapter is then removed from the model.
        """
        del self.model._load_pretrained_model
        try:
            if files := kwargs["checkpoint_files"]:
                folder = Path(files[0]).parent
                file, heads = read_for(folder, self.name, self.config)
                for path in heads.keys() ^ self.heads:
                    raise ValueError(
                        f"{path} is only in one of {folder} and adapter {self.name!r}; expected the same heads in both "
                        "(PeftModel.from_pretrained also loads embeddings)"
                    )
                kwargs |= {"checkpoint_files": [], "state_dict": named(file, heads, self.layout)}
            return self.model._load_pretrained_model(*args, **kwargs)
        except BaseException:
            self.undo()
            raise


copy_instead_of_mapping()
