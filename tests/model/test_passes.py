"""Tests of the packed weights of a forward pass: correct for that pass, and never used longer or for other weights."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fused_steer.kernels.packing import FEW_TOKENS, address_table, pack_weights
from fused_steer.kernels.schedule import describe_device
from models import Hooked, assert_close, build, randomize, steering_parameters, tokens
from ops import pack_reference
from torch import Tensor, nn

from fused_steer import SteerConfig, patch_model
from fused_steer.model import passes
from fused_steer.model.watch import thread

CONFIG = SteerConfig(rank=4)
IDS = tokens(batch=8)
assert IDS.numel() > FEW_TOKENS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rank", "hidden"), [(1, 64), (8, 200), (16, 99), (40, 136)])
@pytest.mark.parametrize("kept", [(torch.float32, torch.float32), (torch.bfloat16, torch.float16)], ids=str)
def test_passes_all_layers_are_packed_in_one_launch(device, dtype, rank, hidden, kept):
    if device.type == "cpu" and passes.select_backend(device) == "torch":
        pytest.skip("the torch backend packs nothing")
    weights = [
        (torch.randn(rank, hidden, device=device).to(kept[0]), torch.randn(hidden, rank, device=device).to(kept[1]))
        for _ in range(3)
    ]
    found = pack_weights(address_table(weights), *weights[0], dtype)
    for packed, (down, up) in zip(found, weights, strict=True):
        for one, expected in zip(packed, pack_reference(down, up, dtype, describe_device(device).gpu), strict=True):
            assert one.is_contiguous() and one.dtype == expected.dtype and torch.equal(one, expected)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here, not interpreted")
    monkeypatch.setenv("FUSED_STEER_BACKEND", "triton")


@pytest.fixture
def seen(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Record the packed weights that each layer gets, or None. Assert that no pass is open at the end."""
    answers: list[Any] = []
    of = passes.Pack.of

    def noted(self: passes.Pack, *operands: Any) -> Any:
        answers.append(of(self, *operands))
        return answers[-1]

    monkeypatch.setattr(passes.Pack, "of", noted)
    yield answers
    assert thread.packs == []


def steered(config: SteerConfig = CONFIG, seed: int = 1) -> nn.Module:
    model = patch_model(build(), config)
    randomize(model, seed=seed)
    return model


def logits(model: nn.Module, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, **options).logits


def hooked_logits(model: nn.Module) -> Tensor:
    return logits(Hooked(build(), steering_parameters(model)).model)


def test_passes_every_layer_of_a_long_pass_uses_its_packed_weights(seen):
    model = steered()
    for number in (1, 2):  # the second pass uses plans
        assert_close(logits(model), hooked_logits(model))
        assert len(seen) == 3 * number and None not in seen
    assert len({packed.down.data_ptr() for packed in seen[-3:]}) == 3


def test_passes_training_uses_them_forward_and_backward(seen):
    model = steered()
    hooked = Hooked(build(), steering_parameters(model))
    for _ in range(2):
        found, expected = [], []
        for one, leaves, kept in (
            (model, steering_parameters(model), found),
            (hooked.model, hooked.leaves, expected),
        ):
            for leaf in leaves.values():
                leaf.grad = None
            one(IDS, labels=IDS).loss.backward()
            kept.append({name: leaf.grad for name, leaf in leaves.items()})
        assert_close(found[0], expected[0])
    assert len(seen) == 6 and None not in seen


@pytest.mark.parametrize("reentrant", [False, True])
def test_passes_checkpointing_repeats_a_layer_without_them(seen, reentrant):
    def gradient(checkpointing: bool) -> dict[str, Tensor]:
        model = steered().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        leaves = steering_parameters(model)
        for _ in range(2):
            for leaf in leaves.values():
                leaf.grad = None
            model(IDS, labels=IDS, use_cache=False).loss.backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    assert_close(gradient(True), gradient(False))


def test_passes_a_few_tokens_have_none(seen):
    model = steered()
    with torch.no_grad():
        model(tokens())
    assert seen == []


@pytest.mark.parametrize("case", ["disabled", "none in use", "vector", "batch"])
def test_passes_that_no_low_rank_steers_have_none(seen, case):
    model = steered(SteerConfig(form="vector") if case == "vector" else CONFIG)
    if case == "disabled":
        with model.steering.disabled():
            logits(model)
    elif case == "batch":
        with model.steering.batch(["default"] * 8):
            logits(model)
    else:
        if case == "none in use":
            model.steering.use(None)
        logits(model)
    assert seen == []


@pytest.mark.parametrize("write", ["data", "numpy", "copy", "optimizer"])
def test_passes_a_write_between_passes_that_no_version_shows(seen, write):
    model = steered()
    first = logits(model)
    up = model.model.layers[1].post_block.steer_up["default"].weight
    if write == "data":
        up.data.add_(1)
    elif write == "numpy":
        np.add(up.detach().numpy(), 1, out=up.detach().numpy())
    elif write == "copy":
        up.data.copy_(torch.randn(up.shape))
    else:
        up.grad = torch.ones_like(up)
        torch.optim.SGD([up], lr=1.0, fused=True).step()
    assert not torch.equal(logits(model), first)
    assert_close(logits(model), hooked_logits(model))
    assert None not in seen


@pytest.mark.parametrize("change", ["data", "parameter", "load"])
def test_passes_weights_that_move_within_a_pass_are_read_where_they_are(seen, change):
    """If a hook of the first layer changes the last layer's weights, the last layer uses the new ones."""
    model = steered()
    site = model.model.layers[2].post_block
    other = torch.randn(32, 4)

    def move(*_: Any) -> None:
        if change == "data":
            site.steer_up["default"].weight.data = other.clone()
        elif change == "parameter":
            site.steer_up["default"].weight = nn.Parameter(other.clone(), requires_grad=False)
        else:
            site.load_state_dict({**site.state_dict(), "steer_up.default.weight": other.clone()}, assign=True)

    handle = model.model.layers[0].register_forward_hook(move)
    found = logits(model)
    handle.remove()
    assert seen[:2].count(None) == 0 and seen[2] is None
    assert_close(found, hooked_logits(model))


def test_passes_a_pass_cut_short_leaves_nothing_behind(seen):
    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    model = steered()
    for layer in (model.model.layers[1], model.model):
        handle = layer.register_forward_pre_hook(stop)
        with pytest.raises(Stop):
            logits(model)
        handle.remove()
        assert thread.packs == []
    model.model.layers[1].post_block.steer_up["default"].weight.data.mul_(2)
    assert_close(logits(model), hooked_logits(model))


def test_passes_pack_of_an_interrupted_pass_ends_with_the_next(seen):
    """After Ctrl-C in a layer the next pass drops the pack. PyTorch calls no hook at the end of an interrupted pass."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    model = steered()
    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(model)
    handle.remove()
    model.model.layers[1].post_block.steer_up["default"].weight.data.mul_(2)
    assert_close(logits(model), hooked_logits(model))
    assert thread.packs == [] and thread.quiet


def test_passes_an_early_exit_and_layers_called_by_themselves(seen):
    model = steered()
    model.config.num_hidden_layers = 2
    logits(model)
    assert len(seen) == 2
    x = torch.randn(8, 9, 32)
    position = model.model.rotary_emb(x, torch.arange(9)[None])
    with torch.no_grad():
        model.model.layers[0](x, position_embeddings=position)
    assert len(seen) == 2, "outside of a pass a layer reads its parameters"


def test_passes_threads_have_packs_of_their_own(seen):
    """Two threads that run one model have separate packs. (Triton's interpreter itself runs in one thread only.)"""
    weights = {nn.Module(): (torch.randn(4, 32), torch.randn(32, 4))}
    packing, other = passes.Packing(), []
    packing.begin(torch.float32, weights)
    mine = thread.packs[-1]

    def run() -> None:
        other.append(list(thread.packs))
        packing.begin(torch.float32, weights)
        other.append(thread.packs[-1])
        packing.end()
        other.append(list(thread.packs))

    one = threading.Thread(target=run)
    one.start()
    one.join()
    assert other[0] == other[2] == [] and other[1] not in (None, mine)
    assert thread.packs == [mine]
    packing.end()


def test_passes_copies_make_tables_of_their_own(seen):
    model = steered()
    logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        randomize(twin, seed=3)
        assert_close(logits(twin), hooked_logits(twin))
        assert not torch.equal(logits(twin), logits(model))


def test_passes_a_hidden_state_of_another_dtype_or_stream_reads_the_parameters(interpreted, monkeypatch):
    down, up = torch.randn(4, 32), torch.randn(32, 4)
    site = nn.Module()
    packing = passes.Packing()
    packing.begin(torch.float32, {site: (down, up)})
    pack = thread.packs[-1]
    try:
        x = torch.randn(2, 32)
        assert pack.of(site, x, down, up) is not None
        assert pack.of(site, x.bfloat16(), down, up) is None
        assert pack.of(nn.Module(), x, down, up) is None
        assert pack.of(site, x, down.clone(), up) is None
        monkeypatch.setattr(passes, "_stream", lambda device: "another")
        assert pack.of(site, x, down, up) is None
    finally:
        packing.end()


def test_passes_weights_that_are_sharded_or_freed_are_not_packed(interpreted):
    whole = torch.randn(4, 32), torch.randn(32, 4)
    freed = torch.randn(4, 32)
    freed.untyped_storage().resize_(0)  # as FSDP leaves a layer's weights between its calls
    shard = nn.Parameter(torch.randn(64))
    others = [(freed, whole[1]), (shard, shard), (torch.empty(0), torch.empty(0)), (torch.randn(8, 32)[::2], whole[1])]
    others.append((whole[0].to("meta"), whole[1].to("meta")))
    sites = [nn.Module() for _ in range(len(others) + 1)]
    packing = passes.Packing()
    packing.begin(torch.float32, dict(zip(sites, [whole, *others], strict=True)))
    pack = thread.packs[-1]
    packing.end()
    x = torch.randn(2, 32)
    assert pack.of(sites[0], x, *whole) is not None
    assert all(pack.of(site, x, *weights) is None for site, weights in zip(sites[1:], others, strict=True))
    packing.begin(torch.float32, dict(zip(sites[1:], others, strict=True)))
    assert thread.packs == [None]
    packing.end()


def test_passes_joint_training_kept_orthogonal(seen):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(build(), LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False))
    model = patch_model(model, SteerConfig(rank=4, orthogonal_to="lora"))
    model(IDS, labels=IDS).loss.backward()
    assert None not in seen and len(seen) == 3
    for layer in model.base_model.model.model.layers:
        basis = layer.post_block.basis
        grad = layer.post_block.steer_up["default"].weight.grad
        assert (basis.t() @ grad).norm() <= 1e-5 * grad.norm()
