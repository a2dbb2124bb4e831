"""Fused steering kernels and their launchers, shipped as `fused_steer.kernels`. Knows torch and triton, not models."""

if __name__ == "kernels":
    # A checkout's root is on sys.path. transformers probes for the Hub package of this name by importing it, and takes
    # a module without a version for absent: its probe gets an empty module, everyone else a refusal.
    from traceback import walk_stack

    if not any(frame.f_globals.get("__name__") == "transformers.utils.import_utils" for frame, _ in walk_stack(None)):
        raise ImportError("this `kernels` is part of fused-steer; expected `import fused_steer.kernels`")
else:
    from .activations import ACTIVATIONS
    from .backend import select_backend
    from .post_block import post_block
    from .schedule import MAX_RANK

    __all__ = ["ACTIVATIONS", "MAX_RANK", "post_block", "select_backend"]
