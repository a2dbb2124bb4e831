"""Tests of the launch that packs an adapter's weights: their bits, and the calls in which the op packs them."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from fused_steer.kernels.backend import select_backend
from fused_steer.kernels.contract import Operands
from fused_steer.kernels.packing import MANY_TOKENS, pack_adapter
from fused_steer.kernels.schedule import RESIDENT_RANK, ResidentSchedule, describe_device
from ops import pack_reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("rank", "hidden"), [(1, 64), (8, 200), (16, 99), (40, 136)])
@pytest.mark.parametrize("kept", [(F32, F32), (BF16, F16)], ids=str)
def test_packing_gives_the_bits_of_its_definition(device, dtype, rank, hidden, kept):
    if select_backend(device) == "torch":
        pytest.skip("the torch backend packs nothing")
    down = torch.randn(rank, hidden, device=device).to(kept[0])
    up = torch.randn(hidden, rank, device=device).to(kept[1])
    found, expected = pack_adapter(down, up, dtype), pack_reference(down, up, dtype, describe_device(device).gpu)
    for one, other in zip(found, expected, strict=True):
        assert one.is_contiguous() and one.dtype == other.dtype and torch.equal(one, other)


ROWS = ResidentSchedule(1, 64, 1, 1, 1, ahead=True)
DIRECT = replace(ROWS, direct=True)


@pytest.mark.parametrize("resident", [None, ROWS, DIRECT], ids=["tiles", "resident", "direct"])
@pytest.mark.parametrize("rank", [0, 1, RESIDENT_RANK])
@pytest.mark.parametrize("tokens", [MANY_TOKENS - 1, MANY_TOKENS])
def test_packing_is_for_many_tokens_and_for_the_kernel_that_reads_rows_of_w2(monkeypatch, tokens, rank, resident):
    op = import_module("fused_steer.kernels.triton_backend")
    monkeypatch.setattr(op, "pack_adapter", lambda *weights: "packed")
    operands = Operands(torch.ones(rank, 64), torch.ones(64, rank)) if rank else Operands(up_bias=torch.ones(64))
    found = op.packed_weights(operands, tokens, BF16, resident)
    pays = resident is ROWS and rank > 1 or (tokens >= MANY_TOKENS and resident is not DIRECT)
    assert (found == "packed") is (rank > 0 and pays)
