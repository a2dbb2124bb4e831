"""Fused steering kernels and their launchers, shipped as `fused_steer.kernels`. Knows torch and triton, not models.

The map, in reading order. A file imports what stands above it, never what stands below.

    contract.py      types shared by the op and its backends
    activations.py   φ and φ' as device functions
    numerics.py      how operands and results are rounded
    backend.py       which backend runs on a device
    schedule.py      how a launch is laid out: tiles, programs, warps
    launch.py        launches a kernel, or records that it would be
    registered.py    ops that torch.compile keeps as one node
    torch_backend.py post_block in plain PyTorch: the `torch` backend
    packing.py       weights of all layers packed by one launch
    plan.py          launch plans: a call worked out once and started directly
    post_block.py    the op: forward and backward kernels, launchers, autograd
    planned.py       the op by launch plans, as a layer calls it
    grouped_torch.py post_block_grouped in plain PyTorch
    grouped.py       the op with an adapter for each token, forward only
    orthogonal.py    Joint-Orth's projections, for all layers at once
    rotation.py      LoReFT's rotation, orthonormal whatever an optimizer does
    aot.py           compiles kernels ahead of time and says what they use
    sass.py          reads NVIDIA machine code
    predict.py       predicts how long a pass takes
"""

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
