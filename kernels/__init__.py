"""The fused steering kernels and their launchers, shipped as `fused_steer.kernels`. They know no models.

The map, in reading order. A file imports only files that stand above it.

    contract.py      types shared by the op and its backends
    activations.py   φ and φ' as device functions
    numerics.py      rounding of operands and results
    rows.py          device functions for rows of hidden states: addresses, sums, strengths, RMSNorm
    backend.py       chooses the backend for a device
    schedule.py      chooses the layout of a launch: tiles, programs, warps
    derivatives.py   recognises derivatives that no kernel computes
    launch.py        launches kernels, or records their launches
    flops.py         counts the floating-point operations of the ops
    registered.py    registers ops that torch.compile keeps as one node
    inductor.py      makes the code that Inductor generates start kernels itself
    torch_backend.py post_block in plain PyTorch: the `torch` backend
    packing.py       packs an adapter's weights by one launch
    resident.py      the forward's kernel for low ranks, which holds whole rows in registers
    plan.py          launch plans: launches recorded once and started directly afterwards
    transforms.py    the op's rules under the transforms of torch.func
    triton_backend.py post_block's forward and backward kernels and their launchers: the `triton` backend
    post_block.py    the op: forward and backward on any backend, registered ops, autograd
    planned.py       the op with launch plans, for a layer's site
    norm_torch.py    RMSNorm in plain PyTorch
    norm.py          RMSNorm: forward and backward kernels, launchers, autograd
    post_block_norm_backward.py the backward of post_block_norm for low ranks, with whole rows in registers
    post_block_norm.py post_block and the RMSNorm that follows, forward by one kernel
    planned_norm.py  post_block_norm with launch plans, for a layer's site
    exporting.py     the registered ops as operations of PyTorch, for other runtimes
    grouped_torch.py post_block_grouped in plain PyTorch
    grouped.py       the op with an adapter for each token, forward only
    grouped_norm.py  the same and the RMSNorm that follows, by one kernel
    orthogonal.py    Joint-Orth's projections, for all layers at once
    rotation.py      LoReFT's rotation, orthonormal under any optimizer
    aot.py           compiles kernels ahead of time and reads their resources
    sass.py          reads NVIDIA machine code
    predict.py       predicts the time of a pass
"""

if __name__ == "kernels":
    # In a checkout this folder is importable as `kernels`, the name of a Hub package. transformers probes for that
    # package by importing it. It gets an empty module, which it takes for absent. Any other import is an error.
    from traceback import walk_stack

    if not any(frame.f_globals.get("__name__") == "transformers.utils.import_utils" for frame, _ in walk_stack(None)):
        raise ImportError("this `kernels` is part of fused-steer; expected `import fused_steer.kernels`")
else:
    from .activations import ACTIVATIONS
    from .backend import select_backend
    from .exporting import decompositions
    from .post_block import post_block
    from .schedule import MAX_RANK

    __all__ = ["ACTIVATIONS", "MAX_RANK", "decompositions", "post_block", "select_backend"]
