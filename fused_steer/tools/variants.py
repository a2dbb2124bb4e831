"""Variants: several adapters of one model, each steering, a LoRA or both, of which one computes at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..patch import patch_model
from .sources import Parts


class Variants:
    """The base model and its adapters. After `use` the model computes by one of them, or by none.

    Attributes:
        model: the given model, patched, and with all LoRAs in its layers. The other adapters' LoRAs are switched off.
    """

    def __init__(self, model: Any, adapters: Mapping[str, Parts], check_base: bool = True) -> None:
        """Load adapters into a bare model, in place. None of them computes until `use`.

        Args:
            model: a causal language model without adapters.
            adapters: from `parts_of`, by name.
            check_base: refuse steering if its base model has another name.

        Raises:
            ValueError, FileNotFoundError: an adapter does not fit the model.
        """
        self.model = model
        self._tuner: Any = None
        self._loras: dict[str, list[str]] = {name: [] for name in adapters}
        self._steers = {name: parts.steering is not None for name, parts in adapters.items()}
        for name, parts in adapters.items():
            for lora, folder in parts.loras.items():
                label = f"{len(sum(self._loras.values(), []))}"  # a number: names of two adapters may be equal
                self._loras[name].append(label)
                try:
                    self._load_lora(label, folder)
                except (RuntimeError, KeyError, ValueError) as error:  # PyTorch's and PEFT's, of other sizes or modules
                    reason = " ".join(str(error).split())
                    raise ValueError(
                        f"the LoRA {lora} in {folder} does not fit the model ({reason:.200}); expected one of it"
                    ) from error
        patched = False
        for name, parts in adapters.items():
            if parts.steering is None:
                continue
            if patched:
                self.model.steering.load(parts.steering, name, check_base=check_base)
            else:
                patch_model(self.model, parts.steering, adapter_name=name, check_base=check_base)
            patched = True
        if not patched:
            patch_model(self.model)  # its fresh adapter changes nothing, and is not used
        self.model.eval()
        self.use(None)

    def _load_lora(self, label: str, folder: Any) -> None:
        from peft import PeftModel

        if self._tuner is None:
            wrapped: Any = PeftModel.from_pretrained(self.model, folder, adapter_name=label)
            self._tuner = wrapped
        else:
            self._tuner.load_adapter(folder, adapter_name=label)

    def use(self, name: str | None) -> None:
        """Let the model compute by one adapter, or be the base model.

        Raises:
            KeyError: there is no such adapter.
        """
        if name is not None and name not in self._loras:
            raise KeyError(f"no adapter {name!r}; expected one of {', '.join(self._loras) or 'none'}")
        self.model.steering.use(name if name is not None and self._steers[name] else None)
        if self._tuner is None:
            return
        tuner, active = self._tuner.base_model, [] if name is None else self._loras[name]
        if active:
            tuner.enable_adapter_layers()
            tuner.set_adapter(active, inference_mode=True)
        else:
            tuner.disable_adapter_layers()
