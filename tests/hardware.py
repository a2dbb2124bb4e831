"""Detects the hardware that the tests run on."""

import torch

#: Whether there is a GPU that Triton can drive.
HAS_GPU = torch.cuda.is_available() or torch.xpu.is_available()
