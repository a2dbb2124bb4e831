"""Steering vectors from contrasting texts, without training: `extract`, and `sweep` to choose a strength."""

from .extraction import Extraction, LayerVector, extract
from .sweeping import Dose, continuations, sweep

__all__ = ["Dose", "Extraction", "LayerVector", "continuations", "extract", "sweep"]
