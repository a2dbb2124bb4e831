"""fused-steer: post-block activation steering (arXiv 2603.00425), fused into the residual add of each decoder block."""

from ._version import __version__
from .config import SteerConfig
from .kernels import post_block
from .patch import patch_model

__all__ = ["SteerConfig", "__version__", "patch_model", "post_block"]
