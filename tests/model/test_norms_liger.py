"""Tests of `patch_model(..., fuse_norm=True)` beside Liger's kernels.

Liger replaces norms, MLPs, rotary embeddings and the loss of a model. Without a GPU both run in Triton's interpreter.
"""

import copy
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hardware import HAS_GPU
from models import LAYERS, assert_close, build, gradients, logits, randomize, snapshot
from torch import nn

from fused_steer import SteerConfig, patch_model

liger = pytest.importorskip("liger_kernel.transformers", reason="needs `pip install --no-deps liger-kernel`")

#: Gradients go through more sums than logits: as in test_norms.py, 1e-5 is allowed.
ROUNDED_SUMS = torch.ones(1), torch.ones(1) * (1 + 5e-6)
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
#: By family, the end of the name of Liger's function.
APPLY = {"llama": "llama", "gemma3": "gemma3_text"}


@pytest.fixture(autouse=True)
def as_when_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton's interpreter run Liger's kernels.

    They cast their float arguments, which only compiled kernels get as tensors, and call two functions of libdevice.
    """
    if HAS_GPU:
        return
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def converted(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(numpy.array([argument], numpy.float32), tl.float32), tl.float32)
        return convert(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    monkeypatch.setattr("liger_kernel.ops.rms_norm.rsqrt", lambda x: 1.0 / tl.sqrt(x))
    monkeypatch.setattr("liger_kernel.ops.geglu.tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)


@pytest.fixture(params=APPLY)
def family(request: pytest.FixtureRequest) -> Iterator[str]:
    """Choose a family, and undo afterwards what Liger changed in its module of transformers."""
    modeling = _modeling(request.param)
    before = dict(vars(modeling))
    classes = {cls: dict(vars(cls)) for cls in before.values() if isinstance(cls, type) and issubclass(cls, nn.Module)}
    yield request.param
    for name, value in before.items():
        setattr(modeling, name, value)
    for cls, own in classes.items():
        if "forward" in own:
            cls.forward = own["forward"]


def _modeling(family: str) -> ModuleType:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def apply_liger(family: str, **options: Any) -> None:
    getattr(liger, f"apply_liger_kernel_to_{APPLY[family]}")(**options)


def assert_same_steering(model: nn.Module, plain: nn.Module) -> None:
    """Assert that logits and gradients are those of the same model, steered without fused norms."""
    parameters = randomize(model)
    others = randomize(plain)
    assert_close(logits(model), logits(plain))
    assert_close(gradients(model, parameters, 1), gradients(plain, others, 1), unsteered=ROUNDED_SUMS)


def norms(model: nn.Module) -> list[str]:
    return [entry.norm for entry in model.steering.report()]


def taken(model: nn.Module) -> list[int]:
    return [entry.norm_calls for entry in model.steering.report()]


def test_liger_for_the_class_before_the_model_is_built(family):
    """Liger's norm is a class of its own. Its kind is measured like any other's."""
    apply_liger(family)
    base = build(family).to(DEVICE)
    assert "Liger" in type(base.model.norm).__name__
    plain = patch_model(copy.deepcopy(base), SteerConfig(rank=4))
    model = patch_model(base, SteerConfig(rank=4), fuse_norm=True)
    assert_same_steering(model, plain)
    model.steering.reset_calls()
    logits(model)
    assert norms(model) == ["fused"] * LAYERS and taken(model) == [1] * LAYERS


def test_liger_for_a_model_before_it_is_patched(family):
    """Liger sets the forward of each norm on the instance. It stays Liger's."""
    base = build(family).to(DEVICE)
    apply_liger(family, model=base)
    before = snapshot(base)
    plain = copy.deepcopy(base)
    apply_liger(family, model=plain)  # a copy's methods are bound to the original
    patch_model(plain, SteerConfig(rank=4))
    model = patch_model(base, SteerConfig(rank=4), fuse_norm=True)
    assert_same_steering(model, plain)
    assert all("was replaced on the instance" in state for state in norms(model))
    assert taken(model) == [0] * LAYERS
    model.steering.unpatch()
    assert snapshot(model) == before


def test_liger_for_a_model_after_it_was_patched(family):
    """The norms that Liger replaces are its own from then on, and stay so when the model is unpatched."""
    base = build(family).to(DEVICE)
    plain = patch_model(copy.deepcopy(base), SteerConfig(rank=4))
    model = patch_model(base, SteerConfig(rank=4), fuse_norm=True)
    logits(model)
    assert norms(model) == ["fused"] * LAYERS and taken(model) == [1] * LAYERS
    for network in (model, plain):
        apply_liger(family, model=network)
    model.steering.reset_calls()
    assert_same_steering(model, plain)
    assert all("was replaced since" in state for state in norms(model))
    assert taken(model) == [0] * LAYERS
    expected = logits(model)
    assert not torch.equal(logits(model.steering.unpatch()), expected)
    assert all(type(module).__module__.startswith("transformers") for module in (model.model.norm, *model.model.layers))
