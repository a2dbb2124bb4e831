"""The files from which PEFT and transformers load an adapter: read here, so that the bytes are those that were checked.

Both open the weights once more after the config was read, and map them into memory. What they would load from there is
left alone, and the tensors of `read_with_heads` take its place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers.integrations.peft import PeftAdapterMixin

from ..adapters.files import AdapterFile, read_with_heads
from ..adapters.parameters import PEFT_PREFIX, Layout
from ..config import SteerConfig
from ..model.stored import check_same_config
from .config import folder_of


def read_for(source: Path, name: str, config: SteerConfig) -> tuple[AdapterFile, dict[str, Tensor]]:
    """An adapter and its heads, as `read_with_heads`, for the adapter `name` of a model.

    Raises:
        FileNotFoundError, ValueError: as `read_with_heads`, or the file is of another config than `config`.
    """
    file, heads = read_with_heads(source)
    check_same_config(source, file.config, name, config)
    return file, heads


def folder_that_peft_loads() -> Path | None:
    """The folder from which `PeftModel.load_adapter` loads an adapter now, in this thread; None: it does not run.

    PEFT hands a method the tensors of a file and does not say of which.
    """
    found = _running(PeftModel.load_adapter)
    if found is None:
        return None
    options = dict(found["hf_hub_download_kwargs"])
    return folder_of(found["model_id"], options.pop("subfolder", None), options)


def peft_loads() -> bool:
    """Whether an adapter that is added now, in this thread, is one that PEFT loads from a file next."""
    return _running(PeftModel.load_adapter) is not None or _running(PeftModel.from_pretrained) is not None


def transformers_loads() -> bool:
    """Whether an adapter that is added now, in this thread, is one that transformers loads from a file next."""
    return _running(PeftAdapterMixin.load_adapter) is not None


def _running(function: Any) -> dict[str, Any] | None:
    """The local variables of a function that this thread is in; None: it is in none."""
    code = inspect.unwrap(function).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return None if frame is None else frame.f_locals


class CheckedLoading:
    """`model._load_pretrained_model` while transformers loads an adapter: the tensors are read here."""

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
            name: the adapter's, which has been added to the model.
            config: the adapter's.
            layout: the model's.
            heads: paths of the tensors of its heads.
            undo: takes the adapter out of the model again.
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
        """As transformers', of the tensors that were checked.

        Raises:
            FileNotFoundError, ValueError: see `read_for`; the adapter is taken out of the model then.
        """
        del self.model._load_pretrained_model
        try:
            if files := kwargs["checkpoint_files"]:
                folder = Path(files[0]).parent
                file, heads = read_for(folder, self.name, self.config)
                for path in heads.keys() ^ self.heads:
                    raise ValueError(
                        f"{path} is in one alone of {folder} and the adapter {self.name!r}; expected the same heads in "
                        "both (PeftModel.from_pretrained also loads embeddings)"
                    )
                tensors = {**self.layout.paths(file.tensors), **heads}
                named = {PEFT_PREFIX + path: tensor for path, tensor in tensors.items()}
                kwargs |= {"checkpoint_files": [], "state_dict": named}
            return self.model._load_pretrained_model(*args, **kwargs)
        except BaseException:
            self.undo()
            raise
