"""The result of `diagnose`, saved as JSON and one picture for each quantity."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._version import __version__
from ..adapters.saving import target_folder, write_whole

if TYPE_CHECKING:
    pass
from .figures import _FIGURES, check_matplotlib
from .records import ASLEEP, BINS, LayerDiagnosis

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
        tokens: the number of measured tokens: those at the adapter's positions, padding excluded.
        layers: the steered layers.
    """

    model: str
    adapter: str
    config: dict[str, Any]
    lora: tuple[str, ...]
    tokens: int
    layers: tuple[LayerDiagnosis, ...]

    @property
    def asleep(self) -> tuple[LayerDiagnosis, ...]:
        """The layers that do nothing: the median ‖δ‖/‖h‖ is below 0.001."""
        return tuple(layer for layer in self.layers if layer.shift and layer.shift.quantiles["0.5"] < ASLEEP)

    def warning(self) -> str | None:
        """Return a sentence on the layers that do nothing, or None if there are none."""
        if not self.asleep:
            return None
        several = len({layer.site for layer in self.layers}) > 1
        names = ", ".join(f"{layer.layer} ({layer.site})" if several else str(layer.layer) for layer in self.asleep)
        return (
            f"{len(self.asleep)} of {len(self.layers)} steered layers do nothing, with a median ‖δ‖/‖h‖ below "
            f"{ASLEEP:g}: {names}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the diagnosis as JSON data. Every number is finite."""
        fields = json.loads(json.dumps(asdict(self), allow_nan=False))
        edges = np.linspace(-1, 1, BINS + 1).tolist()
        return {
            "fused_steer_version": __version__,
            "cosine_bin_edges": edges,
            "asleep": [{"layer": layer.layer, "site": layer.site} for layer in self.asleep],
            **fields,
        }

    def save(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Write `diagnostics.json` and, for each site, a PNG of each quantity. Return the written files.

        If a quantity is absent from every layer, its PNG of an earlier diagnosis in `directory` is removed.

        Raises:
            ImportError: matplotlib is missing. Nothing is written.
            NotADirectoryError, TypeError, ValueError: `directory` is a file, or see `target_folder`.
        """
        check_matplotlib()
        target = target_folder(directory, "the diagnosis")
        target.mkdir(parents=True, exist_ok=True)
        files = [target / JSON_NAME]
        write_whole(files[0], json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n")
        sites = list(dict.fromkeys(layer.site for layer in self.layers))
        for name, site in itertools.product(QUANTITIES, sites):
            file = target / (f"{name}.png" if len(sites) == 1 else f"{name}-{site}.png")
            layers = [layer for layer in self.layers if layer.site == site and getattr(layer, name) is not None]
            if layers:
                _FIGURES[name](layers, file)
                files.append(file)
            else:
                file.unlink(missing_ok=True)
        return files
