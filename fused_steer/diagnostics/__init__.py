"""What steering does to a model, in five figures that people can look at (after arXiv 2603.00425, Figs. 2, 3, 5 and 6).

Per steered layer, over the tokens of some prompts:

- the MLP's share of the block's output, ‖y‖ / ‖h‖ (Fig. 2);
- how the leading left singular vectors of LoRA's update s·B·A and of steering's W2 W1 align (Fig. 3);
- the cosine between the steering's shift δ and the LoRA's shift ℓ of the same token (Fig. 5);
- the spectral norm of W2' (Fig. 6);
- the size of the shift, ‖δ‖ / ‖h‖.

h is the block's output before steering, and δ = s (W2 φ(W1 h + b1) + b2) what the site adds to it. δ and ℓ are computed
in float32 from what the model computed: the difference of two bfloat16 hidden states would be mostly rounding.
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
