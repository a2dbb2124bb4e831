"""Run by the Kernels hub's CI on a GPU: the op against float64, and no worse than plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

import kernels

steer = kernels.get_kernel("fused-steer/fused-steer-kernels", version=1)


def plain(residual, branch, down, up):
    x = residual + branch
    return x + F.linear(F.silu(F.linear(x, down)), up)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_post_block(dtype):
    device = "cuda" if torch.cuda.is_available() else "xpu" if torch.xpu.is_available() else "cpu"
    residual, branch = torch.randn(2, 4, 100, 512, device=device).to(dtype)
    down, up = torch.randn(8, 512, device=device) / 512**0.5, torch.randn(512, 8, device=device)
    truth = plain(*(tensor.double() for tensor in (residual, branch, down, up)))
    ours = steer.post_block(residual, branch, down, up).double()
    theirs = plain(residual, branch, down.to(dtype), up.to(dtype)).double()
    assert (ours - truth).norm() <= 2 * (theirs - truth).norm() + 1e-6 * truth.norm()
