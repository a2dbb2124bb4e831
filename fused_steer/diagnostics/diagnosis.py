"""The result of `diagnose`, saved as JSON and one picture for each quantity."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._version import __version__

if TYPE_CHECKING:
    pass
from .figures import _FIGURES, check_matplotlib
from .records import BINS, LayerDiagnosis

QUANTITIES = ("mlp_share", "alignment", "cosine", "spectral_norm", "shift")
JSON_NAME = "diagnostics.json"


@dataclass(frozen=True)
class Diagnosis:
    """The result of `diagnose`: the measured quantities of each steered layer.

    Attributes:
        model: the model's name or path, or else its class.
        adapter: the name of the steering adapter.
        config: the adapter's `SteerConfig` as a dict.
        lora: the names of the active LoRA adapters.
        tokens: the number of measured tokens, padding excluded.
        layers: the steered layers.
    """

    model: str
    adapter: str
    config: dict[str, Any]
    lora: tuple[str, ...]
    tokens: int
    layers: tuple[LayerDiagnosis, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the diagnosis as JSON data. Every number is finite."""
        fields = json.loads(json.dumps(asdict(self), allow_nan=False))
        return {"fused_steer_version": __version__, "cosine_bin_edges": np.linspace(-1, 1, BINS + 1).tolist(), **fields}

    def save(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Write `diagnostics.json` and a PNG for each quantity that some layer has. Return the written files.

        If a quantity is absent from every layer, its PNG of an earlier diagnosis in `directory` is removed.

        Raises:
            ImportError: matplotlib is missing. Nothing is written.
            NotADirectoryError: `directory` is a file.
        """
        check_matplotlib()
        target = Path(directory)
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(f"{target} is a file; expected a directory to save the diagnosis in")
        target.mkdir(parents=True, exist_ok=True)
        files = [target / JSON_NAME]
        files[0].write_text(json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        for name in QUANTITIES:
            file = target / f"{name}.png"
            layers = [layer for layer in self.layers if getattr(layer, name) is not None]
            if layers:
                _FIGURES[name](layers, file)
                files.append(file)
            else:
                file.unlink(missing_ok=True)
        return files
