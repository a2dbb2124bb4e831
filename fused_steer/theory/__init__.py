"""Weight updates as shifts of activations (arXiv 2603.00425): the statements as functions, and what follows from them.

`fit` turns a fine-tuned model into a steering adapter without training, and `fit_within` finds the rank that keeps each
layer's error below a bound. `statements` has the theorem and the
propositions, each as a function that gives both of its sides. `divergence` compares two models' next-token
distributions.
"""

from .fitting import RIDGE, Fit, LayerFit, fit, fit_each, fit_within
from .next_token import Divergence, divergence

__all__ = ["RIDGE", "Divergence", "Fit", "LayerFit", "divergence", "fit", "fit_each", "fit_within"]
