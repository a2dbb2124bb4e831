"""Measure what steering does to a model, as JSON and five figures (after arXiv 2603.00425, Figs. 2, 3, 5 and 6).

Each quantity is measured at every steered layer, over the tokens of some prompts:

- the MLP's share of the block's output, ‖y‖ / ‖h‖ (Fig. 2);
- the alignment of the leading left singular vectors of LoRA's update s·B·A with those of steering's W2 W1 (Fig. 3);
- the cosine between the steering's shift δ and the LoRA's shift ℓ of the same token (Fig. 5);
- the spectral norm of W2' (Fig. 6);
- the size of the shift, ‖δ‖ / ‖h‖.

h is the block's output before steering. The site adds δ = s (W2 φ(W1 h + b1) + b2) to it. δ and ℓ are computed in
float32 from the inputs of the site and of the LoRA. The difference of two bfloat16 hidden states would be mostly
rounding.
"""

from .command import DiagnoseOptions, run
from .diagnosis import JSON_NAME, QUANTITIES, Diagnosis
from .measure import diagnose
from .records import BINS, LEVELS, Alignment, Cosine, LayerDiagnosis, Spread

__all__ = [
    "BINS",
    "JSON_NAME",
    "LEVELS",
    "QUANTITIES",
    "Alignment",
    "Cosine",
    "DiagnoseOptions",
    "Diagnosis",
    "LayerDiagnosis",
    "Spread",
    "diagnose",
    "run",
]
