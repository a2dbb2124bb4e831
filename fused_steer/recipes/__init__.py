"""Training by a recipe, a YAML file: `read_recipe` and `train`."""

from .recipe import Recipe, read_recipe
from .running import Trained, train

__all__ = ["Recipe", "Trained", "read_recipe", "train"]
